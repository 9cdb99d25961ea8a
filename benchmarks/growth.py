"""A shallow model grown twice against a deep one from scratch and a shallow one never grown, at equal operations.

Real runs on the quickstart's data (`make quickstart-data` first), one process each, with the quickstart's
configuration but for depth and schedule. Every arm has three phases with a third of the operations each, counted by
rdm_scale/cost.py; where the depth changes from one to the next, tools/grow_depth.py makes the checkpoint that the next
goes on from. The learning rate is the same function of the operations spent in all arms but for its warm-up, which
takes 50 steps: then constant, and in the last phase down to a twentieth along half a cosine. Arms that begin alike
share those phases.

Draws docs/images/growth.png, prints Markdown and writes benchmarks/results/growth.json. What is found in --work is
used again, so that an interrupted call goes on.

    OMP_NUM_THREADS=1 python benchmarks/growth.py --steps 600
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdm_scale.config import RunConfig, load_config
from rdm_scale.cost import model_flops, model_parameters

ROOT = Path(__file__).parents[1]
CONFIG = "configs/quickstart.yaml"
RESULTS, PICTURE = ROOT / "benchmarks/results/growth.json", ROOT / "docs/images/growth.png"
DEEP = 24
VALIDATIONS = 8  # of each phase
WARMUP = 50  # steps


@dataclass(frozen=True)
class Arm:
    depths: tuple[int, ...]  # of each phase
    placement: str = ""

    @property
    def grows(self) -> bool:
        return len(set(self.depths)) > 1

    def until(self, phase: int) -> str:
        """A name for the phases up to this one."""
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
    parser.add_argument("--steps", type=int, default=600, help="of the deep arm; the others have its operations")
    parser.add_argument("--work", type=Path, default=Path("runs/growth"), help="directory of the runs")
    options = parser.parse_args()
    curves = {name: run(arm, options.steps, options.work) for name, arm in ARMS.items()}
    result: dict[str, Any] = {"steps": options.steps, "batch": load_config(CONFIG).train.global_batch_size}
    result["seed"], result["arms"] = load_config(CONFIG).train.seed, curves
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    draw(curves)
    report(curves)


def run(arm: Arm, deep_steps: int, work: Path) -> dict[str, Any]:
    """Trains an arm: its phases, and its validation losses by operations spent."""
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
        seconds = float((folder / "seconds").read_text())
        phases.append({"depth": depth, "steps": step - first, "flops": (step - first) * flops, "seconds": seconds})
    return {"phases": phases, "points": points}


def train(arm: Arm, number: int, first: int, last: int, folder: Path, previous: Path | None) -> None:
    """One phase, from step `first` to `last`, as a user would start it."""
    depth = arm.depths[number]
    overrides = {
        "model.depth": depth,
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
            grown = folder.with_name(folder.name + "-grown")
            if not (grown / source.name).exists():
                call("tools/grow_depth.py", source, grown, "--depth", depth, "--placement", arm.placement)
            source = grown / source.name
        if not (folder / "config.yaml").exists():  # an interrupted phase goes on by itself
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
    """Operations of a training step: forward, and twice that backward."""
    return 3.0 * config.train.global_batch_size * model_flops(config.model)


def draw(curves: dict[str, dict[str, Any]]) -> None:
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
    axes.set(xlabel="floating-point operations of training", ylabel="validation loss", yscale="log")
    axes.legend()
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


def report(curves: dict[str, dict[str, Any]]) -> None:
    print("\n| arm | steps | operations (1e12) | validation loss at 1/3 | 2/3 | end | minutes |")
    print("|---|---|---|---|---|---|---|")
    for name, curve in curves.items():
        phases, points = curve["phases"], curve["points"]
        ends, spent = [], 0.0
        for phase in phases:
            spent += phase["flops"]
            ends.append([p["validation_loss"] for p in points if p["flops"] <= spent * 1.0001][-1])
        steps = " + ".join(str(phase["steps"]) for phase in phases)
        minutes = sum(phase["seconds"] for phase in phases) / 60
        losses = " | ".join(f"{loss:.4f}" for loss in ends)
        print(f"| {name} | {steps} | {spent / 1e12:.2f} | {losses} | {minutes:.1f} |")
    print("\nparameters: " + ", ".join(f"{model_parameters(depth_of(d).model).total:,} ({d})" for d in (6, 12, DEEP)))


if __name__ == "__main__":
    main()
