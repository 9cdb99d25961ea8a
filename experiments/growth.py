"""Depth growth: a model grown twice against a deep and a shallow one of fixed depth, at equal training FLOPs.

The arms are ordinary runs on the quickstart's data (`make quickstart-data` first), one process each, with the
quickstart's configuration except for depth and learning-rate schedule. Every arm has three phases of equal FLOPs
(rdm_scale/cost.py); where the depth changes between two phases, tools/grow_depth.py makes the checkpoint from which the
next one starts. Except for a warm-up of 50 steps, the learning rate is the same function of FLOPs in all arms:
constant, and in the last phase down to a twentieth along half a cosine. Arms with the same first phases share them.

Draws docs/images/growth.png, prints Markdown and writes experiments/results/growth.json. Runs found in --work are not
repeated, so that an interrupted call can be continued.

    OMP_NUM_THREADS=1 python experiments/growth.py --steps 600
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import IMAGES, ROOT, print_table, write_results
from experiments.validation import validation_loss
from rdm_scale.checkpoint import load_trained
from rdm_scale.config import RunConfig, WeightsName, load_config
from rdm_scale.cost import model_flops, model_parameters

CONFIG = "configs/quickstart.yaml"
PICTURE = IMAGES / "growth.png"
DEEP = 24
VALIDATIONS = 8  # of each phase
WARMUP = 50  # steps


@dataclass(frozen=True)
class Arm:
    """One way of reaching the final depth."""

    depths: tuple[int, ...]  # of each phase
    placement: str = ""

    def until(self, phase: int) -> str:
        """Name of the phases up to this one."""
        depths = self.depths[: phase + 1]
        return "-".join(map(str, depths)) + (f"-{self.placement}" if len(set(depths)) > 1 else "")


ARMS = {
    "24 blocks from scratch": Arm((DEEP, DEEP, DEEP)),
    "6, 12, 24 blocks, interleaved": Arm((6, 12, DEEP), "interleaved"),
    "6, 12, 24 blocks, stacked": Arm((6, 12, DEEP), "stacked"),
    "6 blocks throughout": Arm((6, 6, 6)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the deep arm; the others have the same FLOPs")
    parser.add_argument("--work", type=Path, default=Path("runs/growth"), help="directory of the runs")
    options = parser.parse_args()
    curves = {name: run(arm, options.steps, options.work) for name, arm in ARMS.items()}
    result: dict[str, Any] = {"steps": options.steps, "batch": load_config(CONFIG).train.global_batch_size}
    result["seed"], result["arms"] = load_config(CONFIG).train.seed, curves
    write_results(__file__, result)
    plot(curves)
    report(curves)


def run(arm: Arm, deep_steps: int, work: Path) -> dict[str, Any]:
    """Train an arm; return its phases and its validation losses by FLOPs."""
    third = deep_steps // 3 * step_flops(depth_of(DEEP))
    step, spent = 0, 0.0
    phases: list[dict[str, Any]] = []
    points: list[dict[str, float]] = []
    for number, depth in enumerate(arm.depths):
        flops = step_flops(depth_of(depth))
        first, step = step, step + round(third / flops)
        folder = work / arm.until(number)
        if not (folder / "seconds").exists():
            previous = None if number == 0 else work / arm.until(number - 1)
            began = time.perf_counter()
            train(arm, number, first, step, folder, previous)
            (folder / "seconds").write_text(str(time.perf_counter() - began))
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if "validation_loss" in record:
                done = spent + (record["step"] - first) * flops
                points.append({"step": record["step"], "flops": done, "validation_loss": record["validation_loss"]})
        spent += (step - first) * flops
        end = folder / "checkpoints" / f"step_{step:08d}"
        phase = {"depth": depth, "steps": step - first, "flops": (step - first) * flops}
        phase |= {
            "seconds": float((folder / "seconds").read_text()),
            "validation_loss": loss_of(end, "weights"),
        }
        phase |= {"validation_loss_of_averages": loss_of(end, "ema")}
        grown = grown_for(folder) / f"step_{first:08d}"
        if grown.exists():
            phase["validation_loss_when_grown"] = loss_of(grown, "raw")
        phases.append(phase)
        if points[-1]["step"] < step:
            points.append({"step": step, "flops": spent, "validation_loss": phase["validation_loss"]})
    return {"phases": phases, "points": points}


def grown_for(folder: Path) -> Path:
    """Directory of the grown checkpoint from which a phase starts."""
    return folder.with_name(folder.name + "-grown")


def loss_of(checkpoint: Path, weights: WeightsName) -> float:
    """Validation loss of a checkpoint, as its run computes it."""
    trained = load_trained(str(checkpoint), weights)
    return validation_loss(trained.model, trained.config, trained.config.monitor.validation_samples)


def train(arm: Arm, number: int, first: int, last: int, folder: Path, previous: Path | None) -> None:
    """Run the training command of one phase, from step `first` to `last`."""
    depth = arm.depths[number]
    overrides = {
        "model.depth": depth,
        "model.gate.multiplier": 1,
        "train.steps": last,
        "run.dir": folder,
        "checkpoint.every": 0,
        "monitor.validate_every": max(1, (last - first) // VALIDATIONS),
        "monitor.sample_every": 0,
        "monitor.tensorboard": "false",
        "parallel.zero_stage": 0,  # one rank
        "optimizer.warmup_steps": WARMUP,
        "optimizer.schedule": "constant",
    }
    if previous is not None:
        source = previous / "checkpoints" / f"step_{first:08d}"
        if depth != arm.depths[number - 1]:
            grown = grown_for(folder)
            if not (grown / source.name).exists():
                call("tools/grow_depth.py", source, grown, "--depth", depth, "--placement", arm.placement)
            source = grown / source.name
        if not (folder / "config.yaml").exists():  # an interrupted phase resumes from its own checkpoints
            overrides["checkpoint.resume"] = source
    if number == len(arm.depths) - 1:
        overrides |= {"optimizer.schedule": "cosine", "optimizer.schedule_steps": last, "optimizer.warmup_steps": first}
    call("-m", "rdm_scale.train", CONFIG, *(f"{key}={value}" for key, value in overrides.items()))


def call(*command: object) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True)


def depth_of(depth: int) -> RunConfig:
    return load_config(ROOT / CONFIG, [f"model.depth={depth}"])


def step_flops(config: RunConfig) -> float:
    """FLOPs of a training step: forward, and twice that for backward."""
    return 3.0 * config.train.global_batch_size * model_flops(config.model)


def plot(curves: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in curves.items():
        points = curve["points"]
        axes.plot(
            [p["flops"] for p in points], [p["validation_loss"] for p in points], marker=".", markersize=4, label=name
        )
    third = curves["24 blocks from scratch"]["phases"][0]["flops"]
    for boundary in (third, 2 * third):
        axes.axvline(boundary, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="FLOPs of training", ylabel="validation loss", yscale="log")
    axes.legend()
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


def report(curves: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, curve in curves.items():
        phases = curve["phases"]
        steps = " + ".join(str(phase["steps"]) for phase in phases)
        flops, minutes = (sum(phase[key] for phase in phases) / n for key, n in (("flops", 1e12), ("seconds", 60)))
        losses = [phase["validation_loss"] for phase in phases] + [phases[-1]["validation_loss_of_averages"]]
        rows.append((name, steps, f"{flops:.2f}", *(f"{loss:.4f}" for loss in losses), f"{minutes:.1f}"))
    losses_header = ("validation loss at 1/3", "2/3", "end", "of EMA weights")
    print_table(("arm", "steps", "FLOPs (1e12)", *losses_header, "minutes"), rows)
    print("\nvalidation loss before and after growing:")
    for name, curve in curves.items():
        for before, after in itertools.pairwise(curve["phases"]):
            if "validation_loss_when_grown" in after:
                losses = before["validation_loss"], after["validation_loss_when_grown"]
                print(f"  {name}, to {after['depth']}: {losses[0]:.8f}, {losses[1]:.8f}")
    print("\nparameters: " + ", ".join(f"{model_parameters(depth_of(d).model).total:,} ({d})" for d in (6, 12, DEEP)))


if __name__ == "__main__":
    main()
