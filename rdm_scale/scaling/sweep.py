"""Sweeps: training runs over model size and length, planned from one configuration.

A sweep varies depth, width or both along a stated path: `depth` at the configuration's width, `width` at its depth, in
steps of one attention head, or `both` in its ratio. Learning rates transfer by model.base_depth and model.base_width,
and every run's schedule ends with the run.
"""

import math
import shlex
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rdm_scale import cost
from rdm_scale.config import RunConfig, load_config
from rdm_scale.errors import ConfigError
from rdm_scale.storage.location import Location

AXES = ("depth", "width", "both")
SPAN = 16.0  # parameters of the largest size, divided by those of the smallest
WARMUP_SHARE = 0.1  # of a run's steps; longer warm-ups would make short runs a law of their own


@dataclass(frozen=True)
class SweepRun:
    """A training run of a sweep.

    Attributes:
        overrides: `key=value` on top of the sweep's.
        flops: training FLOPs of the whole run.
        held_out: not part of a fit; trained after the prediction of its loss is written.
    """

    name: str
    overrides: tuple[str, ...]
    parameters: int
    samples: int
    flops: float
    depth: int
    width: int
    steps: int
    seed: int
    held_out: bool = False


@dataclass(frozen=True)
class Sweep:
    """Runs over one configuration."""

    config: str
    overrides: tuple[str, ...]
    axis: str
    runs: tuple[SweepRun, ...]

    def run_config(self, run: SweepRun, folder: Path) -> RunConfig:
        """Configuration of a run below the sweep's folder."""
        return load_config(self.config, self.run_overrides(run, folder))

    def run_overrides(self, run: SweepRun, folder: Path) -> list[str]:
        return [*self.overrides, *run.overrides, f"run.dir={folder / 'runs' / run.name}"]


def plan_sweep(
    config: str,
    overrides: Sequence[str],
    *,
    axis: str,
    budget: float,
    sizes: int,
    lengths: Sequence[int],
    seeds: int,
    held_out_factor: float = 0.0,
) -> Sweep:
    """Plan a sweep whose largest run takes about `budget` training FLOPs.

    Args:
        sizes: number of model sizes, spaced evenly in the logarithm of their parameters.
        lengths: steps of the runs of each size.
        seeds: runs of each size and length.
        held_out_factor: with a value over 0, plan a held-out run of this many times the largest run's FLOPs, longer and
            larger than it, once per seed.

    Raises:
        ConfigError: the configuration lacks the base of the axis, or the budget is too small for two sizes.
    """
    base = load_config(config, list(overrides))
    _check_base(base, axis)
    if min(lengths) < 10 or seeds < 1 or sizes < 2:
        raise ConfigError("a sweep needs lengths of at least 10 steps, a seed and 2 sizes")
    longest = max(lengths)
    members = _sizes(base, axis, budget / (longest * base.train.global_batch_size), sizes)
    planned = [(size, length, False) for size in members for length in sorted(lengths)]
    if held_out_factor > 0:
        largest = 3 * _sample_flops(base, members[-1]) * longest
        length = round(longest * held_out_factor**0.5)
        per_sample = held_out_factor * largest / length / 3
        planned.append((_largest_within(base, axis, per_sample, members[-1]), length, True))
    runs = [
        _sweep_run(base, size, length, seed, held_out)
        for size, length, held_out in planned
        for seed in range(base.train.seed, base.train.seed + seeds)
    ]
    return Sweep(str(Path(config).resolve()), tuple(overrides), axis, tuple(runs))


Size = tuple[int, int]  # depth, width


def _check_base(config: RunConfig, axis: str) -> None:
    if axis not in AXES:
        raise ConfigError(f"there is no axis {axis!r}: choose {', '.join(AXES)}")
    needed = {"depth": ("base_depth",), "width": ("base_width",), "both": ("base_depth", "base_width")}[axis]
    missing = [key for key in needed if getattr(config.model, key) is None]
    if missing:
        raise ConfigError(
            f"a sweep over {axis} needs model.{' and model.'.join(missing)}, the size at which optimizer.lr was tuned: "
            "without it every size would need a learning rate of its own (docs/depth.md)"
        )


def _resized(config: RunConfig, size: Size) -> list[str]:
    depth, width = size
    head = config.model.hidden_size // config.model.num_heads
    return [f"model.depth={depth}", f"model.hidden_size={width}", f"model.num_heads={width // head}"]


def _model(config: RunConfig, size: Size) -> Any:
    depth, width = size
    head = config.model.hidden_size // config.model.num_heads
    return config.model.model_copy(update={"depth": depth, "hidden_size": width, "num_heads": width // head})


def _sample_flops(config: RunConfig, size: Size) -> float:
    return float(cost.model_flops(_model(config, size)))


def _parameters(config: RunConfig, size: Size) -> int:
    return cost.model_parameters(_model(config, size)).total


def _path(config: RunConfig, axis: str) -> list[Size]:
    """All sizes along an axis, ascending."""
    model = config.model
    head = model.hidden_size // model.num_heads
    least = 2 if model.stacking == "flow" else 3
    if axis == "depth":
        return [(depth, model.hidden_size) for depth in range(least, 4097)]
    widths = range(head, 257 * head, head)
    if axis == "width":
        return [(model.depth, width) for width in widths]
    return [(max(least, round(model.depth * width / model.hidden_size)), width) for width in widths]


def _affordable(config: RunConfig, axis: str, flops: float) -> list[Size]:
    """Sizes along an axis whose forward on a sample takes at most `flops`."""
    path = _path(config, axis)
    return path[: bisect_right(path, flops, key=partial(_sample_flops, config))]


def _largest_within(config: RunConfig, axis: str, flops: float, at_least: Size) -> Size:
    """Largest size whose forward on a sample takes at most `flops`, and no smaller than `at_least`."""
    return max([at_least, *_affordable(config, axis, flops)[-1:]])


def _sizes(config: RunConfig, axis: str, training_flops: float, count: int) -> list[Size]:
    """Sizes within a budget of FLOPs a sample, spaced evenly in the logarithm of their parameters."""
    affordable = _affordable(config, axis, training_flops / 3)
    if len(affordable) < 2:
        least = 3 * _sample_flops(config, _path(config, axis)[1]) / training_flops
        raise ConfigError(
            f"the budget is too small for two sizes along {axis}: it would have to be {least:.1f} times as large, or "
            "--lengths shorter"
        )
    parameters = partial(_parameters, config)
    top, least = parameters(affordable[-1]), parameters(affordable[0])
    chosen = set()
    for target in np.geomspace(max(top / SPAN, least), top, count):
        after = bisect_left(affordable, target, key=parameters)
        near = affordable[max(after - 1, 0) : after + 1] or affordable[-1:]
        chosen.add(min(near, key=lambda size: abs(math.log(parameters(size) / target))))
    return sorted(chosen)


def _sweep_run(config: RunConfig, size: Size, steps: int, seed: int, held_out: bool) -> SweepRun:
    batch, (depth, width) = config.train.global_batch_size, size
    overrides = [*_resized(config, size), f"train.steps={steps}", f"train.seed={seed}"]
    overrides += [f"optimizer.warmup_steps={max(1, round(WARMUP_SHARE * steps))}", f"monitor.validate_every={steps}"]
    overrides += ["checkpoint.every=0", "monitor.depth_every=0", "monitor.sample_every=0", "monitor.tensorboard=false"]
    if config.optimizer.schedule != "constant":
        overrides.append(f"optimizer.schedule_steps={steps}")
    return SweepRun(
        name=f"{'heldout-' if held_out else ''}d{depth}-w{width}-s{steps}-seed{seed}",
        overrides=tuple(overrides),
        parameters=_parameters(config, size),
        samples=steps * batch,
        flops=3 * _sample_flops(config, size) * steps * batch,
        depth=depth,
        width=width,
        steps=steps,
        seed=seed,
        held_out=held_out,
    )


def write_sweep(file: Path, sweep: Sweep) -> None:
    tree = asdict(sweep) | {"overrides": list(sweep.overrides)}
    tree["runs"] = [asdict(run) | {"overrides": list(run.overrides)} for run in sweep.runs]
    Location(file).write(yaml.safe_dump(tree, sort_keys=False, width=1000).encode())


def read_sweep(file: Path) -> Sweep:
    """Read a sweep.

    Raises:
        ConfigError: the file is missing, or no sweep.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        runs = tuple(SweepRun(**run | {"overrides": tuple(run["overrides"])}) for run in tree["runs"])
        return Sweep(str(tree["config"]), tuple(tree["overrides"]), str(tree["axis"]), runs)
    except OSError as error:
        raise ConfigError(f"cannot read the sweep {file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no sweep ({error}): write one with `scaling.py plan ... -o {file}`") from None


def slurm_array(file: Path, sweep: Sweep) -> str:
    """Slurm batch script that trains each run of a sweep in an array task of its own; the held-out runs are left."""
    numbers = [str(number) for number, run in enumerate(sweep.runs) if not run.held_out]
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --job-name=sweep-{file.stem}",
            f"#SBATCH --array={','.join(numbers)}",
            "#SBATCH --ntasks=1",
            "#SBATCH --requeue",
            "set -euo pipefail",
            f'exec rdm-scaling run {shlex.quote(str(file.resolve()))} --only "$SLURM_ARRAY_TASK_ID"',
            "",
        ]
    )
