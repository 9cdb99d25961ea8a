"""Section of the configuration that divides the model over the ranks."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rdm_scale.config.section import Section


class ParallelConfig(Section):
    """Division of the model over the ranks (keys `parallel.*`)."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size")
    pipeline: int = Field(1, ge=1, description="pipeline-parallel size")
    sequence: bool = Field(
        False,
        description="sequence parallelism: a tensor-parallel rank keeps 1/tensor of the tokens between linear layers",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        3, description="DeepSpeed ZeRO stage of the data-parallel axis; 0: nothing is sharded"
    )
    schedule: Literal["1f1b", "interleaved_1f1b", "v_1f1b"] = Field("1f1b", description="pipeline schedule")
    chunks: int | None = Field(
        None, ge=1, description="model chunks per pipeline rank; null: 2, or 1 with the schedule 1f1b"
    )
    keep_gathered: Literal["auto", "always", "never"] = Field(
        "auto",
        description="ZeRO 3: gather parameters and reduce gradients once per step (always) or per block (never); auto: "
        "once per step if memory allows",
    )
    overlap: bool = Field(
        True,
        description="gather parameters and reduce gradients in buckets, beside forwards and backwards (ZeRO 2 and 3)",
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype in which gradients are summed over the data-parallel ranks"
    )
    shard_size: int | None = Field(
        None,
        ge=1,
        description="ZeRO 3: shard over groups of so many data-parallel ranks and replicate between the groups; null: "
        "over all",
    )
    offload: Literal["none", "optimizer"] = Field(
        "none",
        description="optimizer: keep master weights, optimizer state and EMA weights in host memory and update them on "
        "the CPU (ZeRO 3 with gathered parameters)",
    )
    recompute: str = Field(
        "none",
        pattern=r"^(none|full|selective|every_([2-9]|[1-9]\d+))$",
        description="activation checkpointing: none, full, selective (all but matrix products and attention), "
        "or every_N (recompute every N-th block: every_2, every_3, ...)",
    )
    memory_gib: float | None = Field(
        None, gt=0, description="memory that a rank may use in GiB; null: all memory of its device"
    )
    timeout_s: int = Field(
        600, ge=1, description="timeout of collectives in seconds; a collective that hangs ends the run"
    )
    start_timeout_s: int = Field(600, ge=1, description="seconds within which all ranks must have come at the start")

    @field_validator("schedule", mode="before")
    @classmethod
    def _explain_missing_schedule(cls, schedule: Any) -> Any:
        if schedule == "zero_bubble":
            raise ValueError(
                "parallel.schedule=zero_bubble is not offered: splitting the backward costs more than the bubble it "
                "fills (docs/parallelism.md); choose interleaved_1f1b"
            )
        return schedule

    @property
    def chunks_per_rank(self) -> int:
        """Model chunks per pipeline rank."""
        return self.chunks or (1 if self.schedule == "1f1b" else 2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence=true needs parallel.tensor of 2 or more")
        if self.schedule != "1f1b" and self.pipeline == 1:
            raise ValueError(f"parallel.schedule={self.schedule} needs parallel.pipeline of 2 or more")
        chunks, given = self.chunks_per_rank, f"parallel.chunks={self.chunks}"
        if self.schedule == "1f1b" and chunks > 1:
            raise ValueError(f"{given} needs parallel.schedule=interleaved_1f1b or v_1f1b")
        if self.schedule == "interleaved_1f1b" and chunks < 2:
            raise ValueError(f"{given}: parallel.schedule=interleaved_1f1b needs 2 or more")
        if self.schedule == "v_1f1b" and chunks != 2:
            raise ValueError(f"{given}: parallel.schedule=v_1f1b has 2 on every rank")
        if self.shard_size is not None and self.zero_stage < 3:
            raise ValueError(
                f"parallel.shard_size={self.shard_size} needs parallel.zero_stage=3: the lower stages shard over all "
                "data-parallel ranks"
            )
        if self.offload != "none" and (self.zero_stage < 3 or self.keep_gathered == "never"):
            raise ValueError(
                f"parallel.offload={self.offload} needs parallel.zero_stage=3 and parallel.keep_gathered=always or auto"
            )
        if self.keep_gathered == "never" and self.zero_stage < 3:
            raise ValueError(
                f"parallel.keep_gathered=never needs parallel.zero_stage=3: stage {self.zero_stage} does not "
                "shard parameters"
            )
        return self
