"""Transfer of the best learning rate from a small model to deeper and to wider ones (CompleteP, muP).

Sweeps over depth at one width and over width at one depth, each with and without a base size
(models/parameterization.py), on the quickstart's data (`make quickstart-data` first) with its objective: a plain loop
over the package's model, optimizer, learning-rate schedule, data order and noise, one process per run. Learning rates
go in factors of 2; where the best of a size is at an end of its row, the row is extended. Compared are validation
losses at the end, means over seeds.

Draws docs/images/transfer.png, prints Markdown and writes experiments/results/transfer.json. Runs found in --work are
not repeated, so that an interrupted call can be continued.

    OMP_NUM_THREADS=1 python experiments/transfer.py --steps 160 --seeds 3
"""

import argparse
import json
import math
import multiprocessing
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.report import IMAGES, ROOT, print_table, write_results
from experiments.validation import sample_losses, validation_loss
from rdm_scale.config import RunConfig, load_config
from rdm_scale.data.stream import LatentStream
from rdm_scale.diffusion import build_objective
from rdm_scale.diffusion.training_draws import draw
from rdm_scale.models import build_model
from rdm_scale.training.optimizer import build_optimizer, learning_rate

PICTURE = IMAGES / "transfer.png"
SIZES = {"depth": (4, 16, 64), "width": (32, 128, 256)}
WIDTH, DEPTH, HEAD = 32, 4, 16  # held fixed while the other varies
EXPONENTS = range(-10, -5)  # first learning rates, as powers of 2
EXTENSIONS = 4  # of a row, at most


class Job(NamedTuple):
    """One training run."""

    along: str  # depth or width
    size: int
    based: bool  # with the smallest size as base
    exponent: int
    seed: int
    steps: int
    overrides: tuple[str, ...] = ()

    @property
    def row(self) -> tuple[str, int, bool]:
        return self.along, self.size, self.based

    def config(self) -> RunConfig:
        depth, width = (self.size, WIDTH) if self.along == "depth" else (DEPTH, self.size)
        base = [f"model.base_{self.along}={SIZES[self.along][0]}"] if self.based else []
        settings = {
            "model.depth": depth,
            "model.hidden_size": width,
            "model.num_heads": width // HEAD,
            "model.gate.multiplier": 1,
            "optimizer.lr": 2.0**self.exponent,
            "optimizer.warmup_steps": self.steps // 10,
            "optimizer.schedule_steps": self.steps,
            "train.global_batch_size": 16,
            "train.seed": self.seed,
        }
        overrides = [*(f"{k}={v}" for k, v in settings.items()), *base, *self.overrides]
        return load_config(ROOT / "configs/quickstart.yaml", overrides)

    @property
    def file(self) -> str:
        return "-".join(map(str, [*self[:-1], *self.overrides])) + ".json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--work", type=Path, default=Path("runs/transfer"), help="directory of finished runs")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = {(along, size, based) for along, sizes in SIZES.items() for size in sizes for based in (True, False)}
    wanted = {row: list(EXPONENTS) for row in rows}
    losses: dict[Job, float] = {}
    for _ in range(EXTENSIONS + 1):
        jobs = [
            Job(*row, exponent, seed, options.steps)
            for row, exponents in wanted.items()
            for exponent in exponents
            for seed in range(options.seeds)
        ]
        losses |= run_all([job for job in jobs if job not in losses], options.work, options.workers)
        for row, exponents in wanted.items():
            best = min(means(losses, row).items(), key=lambda item: item[1])[0]
            exponents += [best - 1] * (best == min(exponents)) + [best + 1] * (best == max(exponents))
    table = {row: means(losses, row) for row in sorted(rows)}
    result = {
        "steps": options.steps,
        "seeds": options.seeds,
        "losses": {job.file.removesuffix(".json"): loss for job, loss in sorted(losses.items())},
    }
    write_results(__file__, result)
    plot(table)
    report(table)


def run_all(jobs: list[Job], work: Path, workers: int) -> dict[Job, float]:
    """Run jobs in parallel, the largest first, so that none runs alone at the end."""
    jobs = sorted(jobs, key=lambda job: -job.size if job.along == "depth" else -job.size // 4)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        found = pool.map(run, jobs, [work] * len(jobs))
        return dict(zip(jobs, tqdm(found, total=len(jobs), unit="run"), strict=True))


def run(job: Job, work: Path) -> float:
    """Validation loss of a job at its end; infinite if training diverged."""
    return once(job.config(), work / job.file)


def once(config: RunConfig, path: Path) -> float:
    """Train, or read the validation loss that an earlier call wrote to `path`."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(train(config)))
        partial.replace(path)
    return float(json.loads(path.read_text()))


def train(config: RunConfig) -> float:
    """Train with a plain loop; return the validation loss, or infinity if a loss was not finite."""
    options, data = config.optimizer, config.data
    model = build_model(config.model, config.train.seed)
    optimizer = build_optimizer(options, config.model, model)
    objective = build_objective(config.diffusion, config.model.learned_variance)

    batch_size = config.train.global_batch_size
    stream = iter(LatentStream(data.train, global_batch_size=batch_size, seed=config.train.seed, config=data))
    for step in range(1, (options.schedule_steps or config.train.steps) + 1):
        batch = draw(
            next(stream),
            objective=objective,
            seed=config.train.seed,
            num_classes=config.model.num_classes,
            condition_dropout=config.diffusion.condition_dropout,
        )
        loss = sample_losses(model, objective, batch).mean()
        if not loss.isfinite():
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step) * group["lr_scale"]
        optimizer.step()
    return validation_loss(model, config, samples=1024)


def means(losses: dict[Job, float], row: tuple[str, int, bool]) -> dict[int, float]:
    """Mean loss over seeds by exponent of the learning rate, for one row."""
    by_exponent: dict[int, list[float]] = {}
    for job, loss in losses.items():
        if job.row == row:
            by_exponent.setdefault(job.exponent, []).append(loss)
    return {exponent: statistics.mean(found) for exponent, found in sorted(by_exponent.items())}


Table = dict[tuple[str, int, bool], dict[int, float]]


def plot(table: Table) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), dpi=110, layout="constrained")
    for axes, (along, based) in zip(figure.subplots(2, 2).flat, panels(), strict=True):
        for color, size in enumerate(SIZES[along]):
            curve = table[along, size, based]
            axes.plot([2.0**e for e in curve], list(curve.values()), f"C{color}o-", label=f"{along} {size}")
            best = min(curve, key=lambda e: curve[e])
            axes.plot(2.0**best, curve[best], f"C{color}*", markersize=16)
        base = f"base_{along} = {SIZES[along][0]}" if based else "no base"
        axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss", title=f"{along}, {base}")
        lowest = min(loss for row, curve in table.items() if row[0] == along for loss in curve.values())
        axes.set_ylim(lowest - 0.03, lowest + 0.7)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(PICTURE)


def panels() -> Iterable[tuple[str, bool]]:
    return [(along, based) for along in SIZES for based in (True, False)]


def report(table: Table) -> None:
    exponents = sorted({exponent for curve in table.values() for exponent in curve})
    rows = []
    for along, based in panels():
        for size in SIZES[along]:
            curve = table[along, size, based]
            best = min(curve, key=lambda e: curve[e])
            cells = [f"{curve[e]:.4f}" if e in curve else "" for e in exponents]
            rows.append((f"{along} {size}{', base' if based else ''}", *cells, f"2^{best}"))
    print_table(("validation loss at learning rate", *(f"2^{e}" for e in exponents), "best"), rows)


if __name__ == "__main__":
    main()
