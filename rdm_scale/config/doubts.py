"""Warnings about configurations that are valid but do not do what their keys promise."""

from collections.abc import Iterator

from rdm_scale.config.model import GateConfig
from rdm_scale.config.schema import DiffusionConfig, RunConfig


def doubts(config: RunConfig) -> list[str]:
    """One line for each key whose value has no effect, or another one than its description says, in this run.

    They are warnings and not errors because short trial runs of long configurations must stay possible.
    """
    return [*_condition_doubts(config), *_length_doubts(config), *_unread_keys(config)]


def _condition_doubts(config: RunConfig) -> Iterator[str]:
    dropout, guidance = config.diffusion.condition_dropout, config.sampling.guidance
    if guidance != 1 and not config.trains_null_condition:
        yield (
            f"sampling.guidance={guidance:g} needs the null condition, which diffusion.condition_dropout=0 never "
            "trains: sample grids will be meaningless, and the drawing tools will refuse this guidance"
        )
    if dropout == 1 and config.model.condition != "none":
        yield (
            f"diffusion.condition_dropout=1: no sample is trained with its condition, so model.condition="
            f"{config.model.condition} is never learned"
        )


def _length_doubts(config: RunConfig) -> Iterator[str]:
    optimizer, steps, monitor = config.optimizer, config.train.steps, config.monitor
    if optimizer.warmup_steps >= steps:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} is not below train.steps={steps}: the run ends before "
            f"its learning rate has risen to optimizer.lr={optimizer.lr:g}"
        )
    if (horizon := 1 / (1 - optimizer.ema_decay)) > steps:
        yield (
            f"optimizer.ema_decay={optimizer.ema_decay} averages over about {horizon:,.0f} steps, more than "
            f"train.steps={steps}: the EMA's warm-up will shorten it to about {(steps + 10) / 9:,.0f} steps"
        )
    if optimizer.schedule != "constant" and optimizer.schedule_steps is not None and optimizer.schedule_steps < steps:
        rate = optimizer.lr * optimizer.final_lr_ratio
        yield (
            f"optimizer.schedule_steps={optimizer.schedule_steps} ends before train.steps={steps}: the "
            f"{steps - optimizer.schedule_steps} steps after it have the learning rate {rate:g}"
            + (", which changes nothing" if rate == 0 else "")
        )
    if config.data.validation and monitor.validate_every > steps:
        yield f"monitor.validate_every={monitor.validate_every} exceeds train.steps={steps}: no validation loss"
    if monitor.sample_every > steps:
        yield f"monitor.sample_every={monitor.sample_every} exceeds train.steps={steps}: no sample grid"
    if monitor.measure_every > steps:
        yield f"monitor.measure_every={monitor.measure_every} exceeds train.steps={steps}: no measure of samples"


def _unread_keys(config: RunConfig) -> Iterator[str]:
    diffusion, default = config.diffusion, DiffusionConfig()
    ddpm = diffusion.objective == "ddpm"
    if ddpm and config.sampling.steps > diffusion.num_timesteps:
        yield (
            f"sampling.steps={config.sampling.steps} exceeds diffusion.num_timesteps={diffusion.num_timesteps}: there "
            "are no more timesteps to sample with, and the drawing tools will refuse"
        )
    unread = ("timestep_sampling", "logit_mean", "logit_std") if ddpm else ("noise_schedule", "num_timesteps")
    for name in unread:
        if getattr(diffusion, name) != getattr(default, name):
            yield (
                f"diffusion.{name}={getattr(diffusion, name)} has no effect with diffusion.objective="
                f"{diffusion.objective}"
            )
    if not ddpm and diffusion.timestep_sampling == "uniform":
        for name in ("logit_mean", "logit_std"):
            if getattr(diffusion, name) != getattr(default, name):
                yield f"diffusion.{name}={getattr(diffusion, name)} has no effect with timestep_sampling=uniform"
    if config.model.residual != "neural_rdm" and config.model.gate != GateConfig():
        yield f"model.gate has no effect with model.residual={config.model.residual}"
    if config.monitor.reference is not None and not config.monitor.measure_every:
        yield "monitor.reference has no effect with monitor.measure_every=0"
    if config.checkpoint.start_weights != "ema" and config.checkpoint.start_from is None:
        yield f"checkpoint.start_weights={config.checkpoint.start_weights} has no effect without checkpoint.start_from"
