"""Sections and keys of the configuration, each typed and documented, with the checks between keys beside them."""

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rdm_scale.config.checkpoints import CheckpointConfig
from rdm_scale.config.model import ModelConfig
from rdm_scale.config.monitor_section import MonitorConfig
from rdm_scale.config.parallel import ParallelConfig
from rdm_scale.config.section import Section, Switch
from rdm_scale.errors import ConfigError

OBJECTIVE_SAMPLERS = {"ddpm": ("ddpm", "ddim"), "flow": ("euler", "heun")}  # the first one is the default


class DiffusionConfig(Section):
    """Training objective (keys `diffusion.*`)."""

    objective: Literal["ddpm", "flow"] = Field(
        "flow", description="ddpm: predict the noise; flow (rectified flow): predict the velocity"
    )
    noise_schedule: Literal["linear", "cosine"] = Field("linear", description="ddpm: schedule of the betas")
    num_timesteps: int = Field(1000, ge=2, description="ddpm: number of diffusion steps in training")
    timestep_sampling: Literal["uniform", "logit_normal"] = Field("uniform", description="flow: distribution of t")
    logit_mean: float = Field(0.0, description="flow, logit_normal: mean of logit(t)")
    logit_std: float = Field(1.0, gt=0, description="flow, logit_normal: standard deviation of logit(t)")
    condition_dropout: float = Field(
        0.1, ge=0, le=1, description="probability of training a sample with the null condition"
    )


class SamplingConfig(Section):
    """Sampler of grids and default of the tools (keys `sampling.*`)."""

    sampler: Literal["ddpm", "ddim", "euler", "heun"] | None = Field(
        None, description="ddpm or ddim (objective ddpm), euler or heun (objective flow); null: ddpm or euler"
    )
    steps: int = Field(50, ge=1, description="sampling steps")
    guidance: float = Field(1.0, ge=0, description="scale of classifier-free guidance; 1: no guidance")


class DataSource(Section):
    """Training or validation dataset with its weight."""

    path: str = Field(min_length=1, description="URL or path of a manifest.json, on any fsspec file system")
    weight: float = Field(1.0, gt=0, description="share of the steps, relative to the weights of the other data sets")


class DataConfig(Section):
    """Datasets and how they are read (keys `data.*`)."""

    train: tuple[DataSource, ...] = Field(
        description="URL or path of the manifest.json of the training data, on any fsspec file system, or a list of "
        "data sets with their shares of the steps: [{path: ..., weight: ...}, ...]",
    )
    validation: tuple[DataSource, ...] = Field(
        (), description="validation data, written like data.train; null: no validation loss"
    )
    prefetch: int = Field(2, ge=1, description="batches prepared in the background, ahead of the step")
    workers: int = Field(4, ge=1, description="range requests that a data-parallel rank makes at the same time")
    cache_dir: str | None = Field(None, description="local directory that caches what was read; null: no cache")
    cache_gib: float = Field(64.0, gt=0, description="size limit of data.cache_dir in GiB")
    options: dict[str, Any] = Field(
        {}, description="fsspec options of the file system; S3 credentials and endpoint come from AWS_* variables"
    )
    read_timeout_s: float = Field(45.0, gt=0, description="time limit of one read in seconds, including retries")
    lost_shards: int = Field(
        0, ge=0, description="number of unreadable shards to tolerate; samples of other shards substitute for theirs"
    )

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        """Accept a single source for a list of one, and a path for a source of weight 1."""
        if value is None:
            return ()
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.train:
            raise ValueError("data.train is empty: name at least one manifest")
        return self


class OptimizerConfig(Section):
    """AdamW, its learning-rate schedule, and EMA (keys `optimizer.*`)."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of matrices (never of gates, biases, embeddings)")
    warmup_steps: int = Field(0, ge=0, description="steps of linear learning rate warm-up from 0")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning rate schedule after the warm-up"
    )
    schedule_steps: int | None = Field(None, ge=1, description="step at which a cosine or linear schedule ends")
    final_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="learning rate at the end of the schedule, divided by lr"
    )
    grad_clip: float = Field(1.0, ge=0, description="maximum global gradient norm; 0: no clipping")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="decay of the EMA weights, after its warm-up")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)} must lie in [0, 1)")
        if self.schedule != "constant":
            if self.schedule_steps is None:
                raise ValueError(
                    f"optimizer.schedule={self.schedule} needs optimizer.schedule_steps, the step at which it "
                    "ends (separate from train.steps, so that a run can be extended without changing earlier steps)"
                )
            if self.schedule_steps <= self.warmup_steps:
                raise ValueError(
                    f"optimizer.schedule_steps={self.schedule_steps} must exceed warmup_steps={self.warmup_steps}"
                )
        return self


class TrainConfig(Section):
    """Length, batch, seed and precision of training (keys `train.*`)."""

    steps: int = Field(1000, ge=1, description="total number of optimizer steps, including those before a resume")
    global_batch_size: int = Field(256, ge=1, description="samples per step, over all ranks")
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples per forward and backward; null: all of a rank's samples at once"
    )
    seed: int = Field(0, ge=0, description="seed of initialization, data order and noise")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="compute dtype of the residual branches; master weights are always fp32"
    )
    residual_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype of the residual stream with precision bf16"
    )
    deterministic: bool = Field(
        False, description="refuse nondeterministic GPU kernels (CPU runs are always deterministic)"
    )
    profile: tuple[int, int] | None = Field(
        None, description="[first, last]: steps of which torch's profiler writes a trace to run.dir/profile; null: none"
    )
    profile_ranks: tuple[int, ...] = Field((0,), description="ranks that write a trace of the steps of train.profile")
    compile: Switch = Field("auto", description="compile the blocks with torch.compile, each kind once; auto: on GPUs")
    compile_shapes: int = Field(
        8, ge=1, description="shapes of micro-batches that get compiled code and graphs of their own"
    )
    cuda_graphs: Switch = Field(
        "auto",
        description="replay a micro-batch as one CUDA graph; auto: where that is possible, with several data ranks "
        "only under parallel.overlap=false",
    )
    attention: Literal["auto", "cudnn", "flash"] = Field(
        "auto", description="attention kernel on GPUs in bf16; auto: the faster one, measured at the start"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.precision == "fp32" and self.residual_dtype == "bf16":
            raise ValueError("train.residual_dtype=bf16 needs train.precision=bf16")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"train.profile={list(self.profile)} is not [first, last] with 1 <= first <= last")
        if not self.profile_ranks or min(self.profile_ranks) < 0:
            raise ValueError(f"train.profile_ranks={list(self.profile_ranks)} must name ranks, which count from 0")
        if self.micro_batch_size is not None and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not divisible by "
                f"train.micro_batch_size={self.micro_batch_size}"
            )
        return self


class RunSection(Section):
    """Directory of the run (keys `run.*`)."""

    dir: str = Field(description="local directory of the run: metrics, samples and checkpoints")


class RunConfig(Section):
    """Complete configuration of a run."""

    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunSection

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model.learned_variance and self.diffusion.objective != "ddpm":
            raise ValueError("model.learned_variance=true needs diffusion.objective=ddpm")
        allowed = OBJECTIVE_SAMPLERS[self.diffusion.objective]
        if self.sampling.sampler not in (None, *allowed):
            raise ValueError(
                f"sampling.sampler={self.sampling.sampler} does not fit diffusion.objective="
                f"{self.diffusion.objective}: choose {' or '.join(allowed)}"
            )
        if self.sampling.guidance != 1 and self.model.condition == "none":
            raise ValueError("sampling.guidance other than 1 needs a model.condition other than none")
        if self.monitor.sample_every and self.model.condition == "text":
            raise ValueError(
                "monitor.sample_every needs class labels or no condition: with model.condition=text set it to 0"
            )
        if self.monitor.measure_every and self.model.condition == "text":
            raise ValueError(
                "monitor.measure_every needs class labels or no condition: with model.condition=text set it to 0 and "
                "use tools/measure.py run with --prompts"
            )
        if self.monitor.measure_every and self.monitor.reference is None:
            raise ValueError(
                "monitor.measure_every needs monitor.reference, the statistics that tools/measure.py reference writes"
            )
        self._check_layout()
        return self

    def _check_layout(self) -> None:
        """Check that the model can be divided as `parallel` says."""
        model, parallel = self.model, self.parallel
        for what, size in (("num_heads", model.num_heads), ("hidden_size * model.mlp_ratio", model.mlp_size)):
            if size % parallel.tensor:
                raise ValueError(f"parallel.tensor={parallel.tensor} does not divide model.{what}={size}")
        if parallel.sequence and model.tokens % parallel.tensor:
            raise ValueError(
                f"parallel.sequence=true: parallel.tensor={parallel.tensor} does not divide the {model.tokens} tokens "
                "of a sample; change parallel.tensor, model.patch_size or set parallel.sequence=false"
            )
        if model.stacking == "u" and parallel.pipeline > 1 and parallel.schedule != "v_1f1b":
            raise ValueError(
                f"model.stacking=u with parallel.pipeline={parallel.pipeline} needs parallel.schedule=v_1f1b, which "
                f"puts both ends of a long skip on one rank; parallel.schedule={parallel.schedule} does not"
            )
        chunks = parallel.pipeline * parallel.chunks_per_rank
        if model.depth < chunks:
            raise ValueError(
                f"model.depth={model.depth} is less than the {chunks} chunks of parallel.pipeline="
                f"{parallel.pipeline} x parallel.chunks={parallel.chunks_per_rank}: each needs a block"
            )

    @property
    def trains_null_condition(self) -> bool:
        """True if samples are trained without their condition, or the weights to start with may have been."""
        started = self.checkpoint.start_from is not None
        return self.model.condition == "none" or self.diffusion.condition_dropout > 0 or started

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel size of a world of `world_size` ranks: the ranks divided by tensor and pipeline sizes.

        Raises:
            ConfigError: the layout does not divide the world, or the batch cannot be divided over the ranks.
        """
        model_parallel = self.parallel.tensor * self.parallel.pipeline
        if world_size % model_parallel:
            raise ConfigError(
                f"parallel.tensor x parallel.pipeline = {model_parallel} does not divide the {world_size} ranks started"
            )
        dp, batch = world_size // model_parallel, self.train.global_batch_size
        if batch % dp:
            raise ConfigError(
                f"train.global_batch_size={batch} is not divisible by the {dp} data-parallel ranks; "
                f"start another number of ranks or use a multiple of {dp}"
            )
        micro = self.train.micro_batch_size
        if micro is not None and (batch // dp) % micro:
            raise ConfigError(
                f"a rank's share of the batch, {batch // dp} = train.global_batch_size={batch} / {dp} ranks, "
                f"is not divisible by train.micro_batch_size={micro}"
            )
        count = batch // dp // (micro or batch // dp)
        if self.parallel.schedule == "interleaved_1f1b" and count % self.parallel.pipeline:
            raise ConfigError(
                f"parallel.schedule=interleaved_1f1b needs a multiple of parallel.pipeline={self.parallel.pipeline} "
                f"micro-batches a step, and there are {count}: change train.micro_batch_size"
            )
        return dp

    def identity(self) -> dict[str, Any]:
        """Values that a resumed run must not change, by dotted key; train.py adds the identity of the data."""
        tree = self.model_dump(mode="json")
        kept = {"model": tree["model"], "diffusion": tree["diffusion"]}
        kept["train"] = {name: tree["train"][name] for name in ("seed", "global_batch_size")}
        return dict(flatten(kept))

    def digest(self) -> str:
        """A short hash of the configuration, by which ranks check that they agree."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over (dotted key, value) of all leaves of a nested dictionary."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
