"""Residual structures at 4, 16 and 64 blocks, with the base size of experiments/transfer.py, and in the quickstart.

The first part trains as that experiment does, each structure at several learning rates, and compares the best of each.
The second trains the quickstart's configuration (its model, batches and 1,200 steps) with some of them. Reported are
validation losses at the end, means and ranges over seeds.

Draws docs/images/structures.png, prints Markdown and writes experiments/results/structures.json. Runs found in --work
are not repeated; experiments/transfer.py with the same steps leaves some of those of the first part there.

    OMP_NUM_THREADS=1 python experiments/structures.py --steps 160 --seeds 3
"""

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.report import IMAGES, ROOT, print_table, write_results
from experiments.transfer import SIZES, Job, once, run
from rdm_scale.config import load_config
from rdm_scale.models import build_model

PICTURE = IMAGES / "structures.png"
STRUCTURES: dict[str, tuple[str, ...]] = {
    "neural_rdm": (),
    "neural_rdm, m0 = 0.3": ("model.gate.multiplier=0.3",),
    "neural_rdm, m0 = 0.1": ("model.gate.multiplier=0.1",),
    "neural_rdm, unconditional": ("model.gate.conditional=false",),
    "adaln_zero": ("model.residual=adaln_zero",),
}
IN_QUICKSTART = ("neural_rdm", "neural_rdm, m0 = 0.3", "adaln_zero")
EXPONENTS = (-6, -5)

Losses = dict[str, list[float]]  # by seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160, help="of the first part")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--work", type=Path, default=Path("runs/transfer"), help="directory of finished runs")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    context, seeds = multiprocessing.get_context("spawn"), range(options.seeds)
    with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (1,)) as pool:
        quick = {
            name: [pool.submit(in_quickstart, STRUCTURES[name], seed, options.work) for seed in seeds]
            for name in IN_QUICKSTART
        }
        deep = {
            (name, depth, exponent): [
                pool.submit(run, Job("depth", depth, True, exponent, seed, options.steps, overrides), options.work)
                for seed in seeds
            ]
            for depth in reversed(SIZES["depth"])
            for name, overrides in STRUCTURES.items()
            for exponent in EXPONENTS
        }
        total = sum(map(len, (*quick.values(), *deep.values())))
        with tqdm(total=total, unit="run") as bar:
            for future in (f for futures in (*quick.values(), *deep.values()) for f in futures):
                future.add_done_callback(lambda _: bar.update())
            quickstart: Losses = {name: [f.result() for f in futures] for name, futures in quick.items()}
            swept = {key: [f.result() for f in futures] for key, futures in deep.items()}
    result = {
        "steps": options.steps,
        "quickstart": quickstart,
        "parameters": {name: parameters(STRUCTURES[name]) for name in IN_QUICKSTART},
        "depths": {f"{name}, {depth} blocks, 2^{e}": losses for (name, depth, e), losses in swept.items()},
    }
    write_results(__file__, result)
    plot(swept)
    report(swept, quickstart)


def in_quickstart(overrides: tuple[str, ...], seed: int, work: Path) -> float:
    config = load_config(
        ROOT / "configs/quickstart.yaml", [f"train.seed={seed}", "model.gate.multiplier=1", *overrides]
    )
    return once(config, work / ("-".join(["quickstart", str(seed), *overrides]) + ".json"))


def parameters(overrides: tuple[str, ...]) -> int:
    config = load_config(ROOT / "configs/quickstart.yaml", list(overrides))
    return sum(p.numel() for p in build_model(config.model).parameters())


Swept = dict[tuple[str, int, int], list[float]]


def best(swept: Swept, name: str, depth: int) -> tuple[int, list[float]]:
    """Exponent of the learning rate with the lowest mean loss, and the losses at it."""
    rows = {e: losses for (structure, d, e), losses in swept.items() if (structure, d) == (name, depth)}
    return min(rows.items(), key=lambda item: statistics.mean(item[1]))


def plot(swept: Swept) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name in STRUCTURES:
        found = [best(swept, name, depth)[1] for depth in SIZES["depth"]]
        middle = [statistics.mean(losses) for losses in found]
        spans = [
            [m - min(x) for m, x in zip(middle, found, strict=True)],
            [max(x) - m for m, x in zip(middle, found, strict=True)],
        ]
        axes.errorbar(SIZES["depth"], middle, spans, marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="blocks", ylabel="validation loss (mean and range of the seeds)")
    axes.set_xticks(SIZES["depth"], map(str, SIZES["depth"]))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PICTURE)


def report(swept: Swept, quickstart: Losses) -> None:
    rows = []
    for name in STRUCTURES:
        cells = []
        for depth in SIZES["depth"]:
            exponent, losses = best(swept, name, depth)
            cells.append(f"{shown(losses)} at 2^{exponent}")
        cells.append(shown(quickstart[name]) if name in quickstart else "")
        rows.append((name, *cells))
    print_table(("structure", *(f"{depth} blocks" for depth in SIZES["depth"]), "in the quickstart"), rows)


def shown(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


if __name__ == "__main__":
    main()
