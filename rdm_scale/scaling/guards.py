"""Checks of a sweep and of a prediction: what makes a scaling law wrong without anybody noticing."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rdm_scale.config import RunConfig
from rdm_scale.errors import DataError
from rdm_scale.scaling.law_file import FittedLaw, run_flops
from rdm_scale.scaling.sweep import Sweep, SweepRun
from rdm_scale.scaling.sweep_runner import RunState

WARMUP_LIMIT = 0.2
EXTRAPOLATION_LIMIT = 10.0


def check_sweep(folder: Path, sweep: Sweep) -> list[str]:
    """Warnings about a sweep's configurations.

    Raises:
        DataError: the runs cannot be compared: other validation data, noise, or a schedule that does not end with
            the run.
    """
    warnings, validations = [], set()
    for run in sweep.runs:
        config = sweep.run_config(run, folder)
        validations.add(_validation(config))
        _check_schedule(config, run)
        if config.optimizer.warmup_steps > WARMUP_LIMIT * run.steps:
            warnings.append(
                f"{run.name}: the warm-up takes {config.optimizer.warmup_steps} of {run.steps} steps, more than a fifth"
            )
    if len(validations) > 1:
        raise DataError(
            f"the runs of the sweep are judged by {len(validations)} different validation losses (data, number of "
            "samples or noise): give all of them the same data.validation, monitor.validation_samples and diffusion"
        )
    if any(not validation[0] for validation in validations):
        warnings.append("there is no data.validation: the law is fitted to training losses")
    return warnings


def _validation(config: RunConfig) -> tuple[tuple[str, ...], int, str]:
    sources = tuple(source.path for source in config.data.validation)
    return sources, config.monitor.validation_samples, config.diffusion.model_dump_json()


def _check_schedule(config: RunConfig, run: SweepRun) -> None:
    optimizer = config.optimizer
    if optimizer.schedule != "constant" and optimizer.schedule_steps != run.steps:
        raise DataError(
            f"{run.name}: the learning rate's schedule ends at step {optimizer.schedule_steps} and the run at "
            f"{run.steps}: a run whose schedule is cut, or has ended before, is no point of the law (arXiv 2203.15556)"
        )


def unused_runs(states: Sequence[RunState]) -> list[str]:
    """In words, runs that are in no fit, with the reason: none is dropped in silence."""
    reasons = {
        "waiting": "was not started",
        "unfinished": "is not finished (step {step} of {steps})",
        "diverged": "diverged (loss {loss:.4g} at step {step})",
    }
    return [
        f"{state.run.name} " + reasons[state.state].format(step=state.step, steps=state.run.steps, loss=state.loss)
        for state in states
        if state.state in reasons
    ]


def prediction_warnings(law: FittedLaw, parameters: float, samples: float, flops: float) -> list[str]:
    """Reasons to doubt a prediction."""
    runs, found = law.observations, []
    largest = float(run_flops(runs, law.flops).max())
    for what, value, top in (
        ("FLOPs", flops, largest),
        (law.size, parameters, float(runs.parameters.max())),
        ("samples", samples, float(runs.samples.max())),
    ):
        if value > EXTRAPOLATION_LIMIT * top:
            found.append(f"{value:.3g} {what} are {value / top:.1f} times the largest of the fit: a far extrapolation")
    return found + law.warnings


def repetition(states: Sequence[RunState], set_size: int) -> list[str]:
    """Warnings about runs that see their data more than four times (Muennighoff et al., arXiv 2305.16264)."""
    passes: dict[int, float] = defaultdict(float)
    for state in states:
        passes[state.run.steps] = state.run.samples / set_size
    worst = max(passes.values(), default=0.0)
    if worst <= 4:
        return []
    return [f"the longest runs see the {set_size:,} training samples {worst:.1f} times: D counts repetitions as new"]
