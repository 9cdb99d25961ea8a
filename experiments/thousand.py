"""Training of 1,000 blocks with Neural-RDM's gates and with plain residuals, each against 100 blocks.

The arms named `base 4` use the learning rate that experiments/transfer.py found best at 4 blocks, with
model.base_depth=4. The others have the same learning rate and no base.

The arms are ordinary runs on the quickstart's data (`make quickstart-data` first) with its objective, a narrow model
and small batches. All take the same samples, noise and learning rates for the same number of steps, one process each,
two at a time. Then the deep Neural-RDM with a base repeats the first steps on four ranks (two pipeline stages x two
ranks under ZeRO-3), whose losses are compared with those of one process.

Draws docs/images/thousand.png, prints Markdown and writes experiments/results/thousand.json. Runs found in --work are
not repeated, so that an interrupted call can be continued.

    OMP_NUM_THREADS=1 python experiments/thousand.py --steps 100
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.report import IMAGES, ROOT, print_table, write_results

PICTURE = IMAGES / "thousand.png"
DEEP, SHALLOW = 1000, 100
KINDS: dict[str, dict[str, Any]] = {
    "neural_rdm, base 4": {"model.base_depth": 4},
    "neural_rdm": {},
    "plain": {"model.residual": "plain"},
}
VALIDATIONS = 5
SETTINGS = {
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "model.gate.multiplier": 1,
    "optimizer.lr": 2.0**-6,
    "optimizer.warmup_steps": 10,
    "train.global_batch_size": 16,
    "checkpoint.every": 0,
    "monitor.sample_every": 0,
    "monitor.tensorboard": "false",
    "monitor.log_every": 5,
}
PARALLEL = {"parallel.pipeline": 2, "parallel.zero_stage": 3, "train.micro_batch_size": 4}  # on four ranks
PARALLEL_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("runs/thousand"), help="directory of the runs")
    options = parser.parse_args()
    options.work /= f"{options.steps}-steps-at-{SETTINGS['optimizer.lr']:g}"
    arms = {}
    alone = {"parallel.zero_stage": 0, "train.steps": options.steps}
    names = {(kind, depth): f"{kind}, {depth} blocks" for depth in (DEEP, SHALLOW) for kind in KINDS}
    with ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(run, options.work / name.replace(", ", "-"), depth, options.steps, 1, KINDS[kind] | alone)
            for (kind, depth), name in names.items()
        ]
        for name, future in zip(names.values(), started, strict=True):
            future.result()
            arms[name] = curves(options.work / name.replace(", ", "-"))
    first, folder = next(iter(KINDS)), options.work / "four-ranks"
    run(folder, DEEP, options.steps, 4, KINDS[first] | PARALLEL | {"train.steps": PARALLEL_STEPS})
    pairs = zip(arms[names[first, DEEP]]["loss"], curves(folder)["loss"], strict=False)
    distances = [abs(four / one - 1) for one, four in pairs]
    result = {"steps": options.steps, "settings": SETTINGS, "arms": arms, "four_ranks_relative_distance": distances}
    write_results(__file__, result)
    plot(arms)
    report(arms, distances)


def run(folder: Path, depth: int, schedule: int, ranks: int, settings: dict[str, Any]) -> None:
    """Run the training command unless the run in `folder` is complete."""
    if any(folder.glob("checkpoints/*/commit.json")):
        return
    settings = SETTINGS | settings | {"model.depth": depth, "run.dir": folder}
    settings |= {"optimizer.schedule_steps": schedule, "monitor.depth_every": schedule // VALIDATIONS}
    settings |= {"monitor.validate_every": schedule // VALIDATIONS}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, *launcher, "-m", "rdm_scale.train", "configs/quickstart.yaml", *overrides]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def curves(folder: Path) -> dict[str, Any]:
    """Training loss and gradient norm of each step, and the validation losses by step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    return {
        "loss": [r["loss"] for r in records],
        "grad_norm": [r["grad_norm"] for r in records],
        "validation_loss": validations,
        "largest_rise": max((b - a for a, b in pairwise(validations.values())), default=0.0),
        "step_s": sorted(r["step_s"] for r in records)[len(records) // 2],
    }


def plot(arms: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    losses, norms = figure.subplots(1, 2)
    for color, (name, arm) in enumerate(arms.items()):
        smooth = [sum(arm["loss"][max(0, i - 4) : i + 1]) / min(5, i + 1) for i in range(len(arm["loss"]))]
        losses.plot(range(1, len(smooth) + 1), smooth, color=f"C{color}", alpha=0.4)
        losses.plot(*zip(*arm["validation_loss"].items(), strict=True), color=f"C{color}", marker="o", label=name)
        norms.semilogy(range(1, len(smooth) + 1), arm["grad_norm"], color=f"C{color}", label=name)
    losses.set(xlabel="step", title="validation loss (dots); training loss, mean of 5 steps", ylim=(0.4, 2.2))
    norms.set(xlabel="step", title="gradient norm before clipping")
    for axes in (losses, norms):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(PICTURE)


def report(arms: dict[str, dict[str, Any]], distances: list[float]) -> None:
    steps = list(next(iter(arms.values()))["validation_loss"])
    rows = []
    for name, arm in arms.items():
        losses = [f"{loss:.4f}" for loss in arm["validation_loss"].values()]
        rows.append((name, *losses, f"{max(arm['grad_norm']):.3g}", f"{arm['step_s']:.2f}"))
    print_table(("validation loss after steps", *steps, "largest gradient norm", "s a step"), rows)
    print("\nfour ranks, relative distance of the loss at each step:", ", ".join(f"{d:.1e}" for d in distances))


if __name__ == "__main__":
    main()
