"""Configuration of checkpoints: place, interval, retention, start and resume (keys `checkpoint.*`)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rdm_scale.config.section import Section
from rdm_scale.errors import ConfigError

Weights = Literal["ema", "raw"]
WeightsName = Literal["ema", "raw", "weights"]  # "weights" is an earlier name of "raw"


def parse_weights(name: str) -> Weights:
    """Weights by their name in configurations and options.

    Raises:
        ConfigError: there are no such weights.
    """
    if name not in ("ema", "raw", "weights"):
        raise ConfigError(f"weights={name!r} is unknown: choose ema, or raw for the weights without averaging")
    return "ema" if name == "ema" else "raw"


class CheckpointConfig(Section):
    """Checkpoints: place, interval, retention, start and resume (keys `checkpoint.*`)."""

    dir: str | None = Field(None, description="directory or fsspec URL of the checkpoints; null: run.dir/checkpoints")
    every: int = Field(1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(3, ge=0, description="number of newest checkpoints to keep; 0: all")
    keep_every: int = Field(0, ge=0, description="keep checkpoints of multiples of this step permanently; 0: none")
    timeout_s: int = Field(3600, ge=1, description="seconds that training waits for a save; then the run ends")
    on_failure: Literal["stop", "continue"] = Field(
        "stop", description="if a checkpoint cannot be saved: stop the run, or continue until the next checkpoint"
    )
    resume: str = Field(
        "auto",
        description="auto (newest complete checkpoint of this run), never, or the path of the checkpoint or run to go "
        "on with",
    )
    start_from: str | None = Field(
        None,
        min_length=1,
        description="weights that a new run starts with at step 0: a run, a checkpoint, a merged folder, a folder of "
        "diffusers or a file of published weights; has no effect once the run has a checkpoint of its own",
    )
    start_weights: Weights = Field(
        "ema", description="with start_from: the EMA weights where there are any, or the weights without averaging"
    )

    take_over: bool = Field(
        False,
        description="go on with the checkpoints in checkpoint.dir although another run owns them, once that run has "
        "ended or has not been alive for 60 s",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every={self.every}: "
                "there are no checkpoints of other steps"
            )
        return self
