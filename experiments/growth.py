"""A shallow model grown twice against a deep one from scratch and a shallow one never grown, at equal operations.

Real runs on the quickstart's data (`make quickstart-data` first), one process each, with the quickstart's
configuration but for depth and schedule. Every arm has three phases with a third of the operations each, counted by
rdm_scale/cost.py; where the depth changes from one to the next, tools/grow_depth.py makes the checkpoint that the next
goes on from. The learning rate is the same function of the operations spent in all arms but for its warm-up, which
takes 50 steps: then constant, and in the last phase down to a twentieth along half a cosine. Arms that begin alike
share those phases.

Draws docs/images/growth.png, prints Markdown and writes experiments/results/growth.json. What is found in --work is
used again, so that an interrupted call goes on.

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

import torch

from benchmarks.report import IMAGES, ROOT, write_results
from rdm_scale.checkpoint import load_trained
from rdm_scale.checkpoint.trained_model import Weights
from rdm_scale.config import RunConfig, load_config
from rdm_scale.cost import model_flops, model_parameters
from rdm_scale.data.held_out import HeldOut
from rdm_scale.diffusion import build_objective
from rdm_scale.diffusion.training_draws import draw

CONFIG = "configs/quickstart.yaml"
PICTURE = IMAGES / "growth.png"
DEEP = 24
VALIDATIONS = 8  # of each phase
WARMUP = 50  # steps


@dataclass(frozen=True)
class Arm:
    depths: tuple[int, ...]  # of each phase
    placement: str = ""

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
    write_results(__file__, result)
    plot(curves)
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
        end = folder / "checkpoints" / f"step_{step:08d}"
        phase = {"depth": depth, "steps": step - first, "flops": (step - first) * flops}
        phase |= {
            "seconds": float((folder / "seconds").read_text()),
            "validation_loss": validation_loss(end, "weights"),
        }
        phase |= {"validation_loss_of_averages": validation_loss(end, "ema")}
        grown = grown_for(folder) / f"step_{first:08d}"
        if grown.exists():
            phase["validation_loss_when_grown"] = validation_loss(grown, "weights")
        phases.append(phase)
        if points[-1]["step"] < step:
            points.append({"step": step, "flops": spent, "validation_loss": phase["validation_loss"]})
    return {"phases": phases, "points": points}


def grown_for(folder: Path) -> Path:
    """Where the checkpoint is that a phase begins with after growing."""
    return folder.with_name(folder.name + "-grown")


def validation_loss(checkpoint: Path, weights: Weights) -> float:
    """As a run finds it: on the held-out set, with the noise and timestep that belong to each sample."""
    trained = load_trained(str(checkpoint), weights)
    config = trained.config
    objective = build_objective(config.diffusion, config.model.learned_variance)
    held_out = HeldOut(
        config.data.validation,
        config.monitor.validation_samples,
        batch_size=64,
        dp_rank=0,
        dp_size=1,
        config=config.data,
    )
    total = torch.zeros(2, dtype=torch.float64)
    for latents, weight_B in held_out:
        batch = draw(
            latents,
            objective=objective,
            seed=0,
            num_classes=config.model.num_classes,
            condition_dropout=0.0,
            purpose="validation",
        )
        x_t = objective.noised(batch.latents, batch.noise, batch.t)
        prediction = trained.model(x_t, objective.model_timesteps(batch.t), batch.condition)
        loss_B = objective.loss(prediction, batch.latents, batch.noise, batch.t, x_t)
        total += torch.stack([(loss_B.double() * weight_B).sum(), weight_B.sum()])
    return (total[0] / total[1]).item()


def train(arm: Arm, number: int, first: int, last: int, folder: Path, previous: Path | None) -> None:
    """One phase, from step `first` to `last`, as a user would start it."""
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
    axes.set(xlabel="floating-point operations of training", ylabel="validation loss", yscale="log")
    axes.legend()
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


def report(curves: dict[str, dict[str, Any]]) -> None:
    print("\n| arm | steps | operations (1e12) | validation loss at 1/3 | 2/3 | end | of the averages | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for name, curve in curves.items():
        phases = curve["phases"]
        steps = " + ".join(str(phase["steps"]) for phase in phases)
        operations, minutes = (sum(phase[key] for phase in phases) / n for key, n in (("flops", 1e12), ("seconds", 60)))
        losses = [phase["validation_loss"] for phase in phases] + [phases[-1]["validation_loss_of_averages"]]
        shown = " | ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {name} | {steps} | {operations:.2f} | {shown} | {minutes:.1f} |")
    print("\nvalidation loss before and after growing:")
    for name, curve in curves.items():
        for before, after in itertools.pairwise(curve["phases"]):
            if "validation_loss_when_grown" in after:
                losses = before["validation_loss"], after["validation_loss_when_grown"]
                print(f"  {name}, to {after['depth']}: {losses[0]:.8f}, {losses[1]:.8f}")
    print("\nparameters: " + ", ".join(f"{model_parameters(depth_of(d).model).total:,} ({d})" for d in (6, 12, DEEP)))


if __name__ == "__main__":
    main()
