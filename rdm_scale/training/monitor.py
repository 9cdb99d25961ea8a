"""Metric logging: metrics.jsonl, the console, image grids and trackers; rank 0 only."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdm_scale.config import RunConfig
from rdm_scale.evaluation.measurements import Measurement
from rdm_scale.evaluation.plots import heat_map
from rdm_scale.training.depth_profiles import DEPTH, Profile, read_profiles
from rdm_scale.training.run_directory import MEASURES
from rdm_scale.training.step import StepResult
from rdm_scale.training.throughput import Throughput, clock_time
from rdm_scale.training.trackers import build_trackers

Record = dict[str, float]  # a line of metrics.jsonl: numbers by name


def metrics_record(config: RunConfig, result: StepResult, throughput: Throughput) -> Record:
    """Metrics of a step."""
    samples, step_s, waited_s = config.train.global_batch_size, result.seconds, result.statistics.data_wait_s
    return {
        "step": result.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "samples": result.step * samples,
        "step_s": step_s,
        "tokens_per_s": samples * config.model.tokens_of(result.size) / step_s,
        "data_wait_s": waited_s,
        "data_wait_share": waited_s / step_s,
        **throughput.rates(result.size, step_s),
    }


class Monitor:
    """Monitor of the ranks that log nothing: all but rank 0."""

    def step(self, record: Record) -> None:
        """Log the metrics of one step."""

    def add(self, step: int, values: Record) -> None:
        """Add metrics to those of the step that was logged last, by name."""

    def depth(self, step: int, profile: Profile) -> None:
        """Log the profile of one step along depth."""

    def image_grid(self, step: int, image: Image.Image) -> None:
        """Log a grid of samples."""

    def measures(self, step: int, measures: Sequence[Measurement]) -> None:
        """Log measures of samples with all that they depend on; their values are metrics of the step, too."""

    def report(self, message: str) -> None:
        """Print a message that is not a metric."""

    def close(self) -> None:
        """Flush and close all files."""


class RunMonitor(Monitor):
    """Monitor that writes to the run's directory, the console and trackers."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        self.config = config
        self.dir = Path(config.run.dir)
        self.first_step = first_step
        self.started = time.monotonic()
        self.metrics: IO[bytes] = (self.dir / "metrics.jsonl").open("ab")
        self.profiles: list[Profile] = read_profiles(self.dir / DEPTH, lambda line: self.report(f"warning: {line}"))[1]
        self.trackers = build_trackers(config, first_step)

    def step(self, record: Record) -> None:
        self.metrics.write(json.dumps(record).encode() + b"\n")
        self.metrics.flush()
        step = int(record["step"])
        for tracker in self.trackers:
            tracker.log_metrics(step, {name: value for name, value in record.items() if name != "step"})
        ends = (self.first_step + 1, self.config.train.steps)
        if step % self.config.monitor.log_every == 0 or step in ends:
            self._print(record)

    def add(self, step: int, values: Record) -> None:
        if not values:
            return
        self.metrics.truncate(self.metrics.tell() - len(b"}\n"))  # the line's end; a kill in between costs that line
        self.metrics.write(b", " + json.dumps(values).encode()[1:] + b"\n")
        self.metrics.flush()
        for tracker in self.trackers:
            tracker.log_metrics(step, values)
        if "validation_loss" in values:
            steps = self.config.train.steps
            print(f"step {step:>{len(str(steps))}}/{steps}  validation {values['validation_loss']:.4f}", flush=True)

    def depth(self, step: int, profile: Profile) -> None:
        with (self.dir / DEPTH).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | profile) + "\n")
        self.profiles.append(profile)
        if self.trackers:
            for name in profile:
                pixels = heat_map([each[name] for each in self.profiles if name in each])
                self._log_image(step, f"depth/{name}", pixels)

    def image_grid(self, step: int, image: Image.Image) -> None:
        folder = self.dir / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step_{step:08d}.png")
        self._log_image(step, "samples", np.asarray(image))

    def measures(self, step: int, measures: Sequence[Measurement]) -> None:
        line = {"step": step} | {measure.name: measure.record() for measure in measures}
        with (self.dir / MEASURES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for measure in measures:
            self.report(f"step {step}  {measure.name} {measure.value:.5g} of {measure.fields['generated']} samples")

    def report(self, message: str) -> None:
        print(message, flush=True)

    def close(self) -> None:
        self.metrics.close()
        for tracker in self.trackers:
            tracker.close()

    def _log_image(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        for tracker in self.trackers:
            tracker.log_image(step, name, pixels)

    def _print(self, record: Record) -> None:
        step, steps = int(record["step"]), self.config.train.steps
        left = (time.monotonic() - self.started) / (step - self.first_step) * (steps - step)
        parts = [
            f"step {step:>{len(str(steps))}}/{steps}",
            f"loss {record['loss']:.4f}",
            f"grad norm {record['grad_norm']:.3f}",
            f"lr {record['lr']:.2e}",
            f"{record['samples_per_s']:.0f} samples/s",
            *([f"{record['tflops_per_rank']:.0f} TFLOP/s a rank, MFU {record['mfu']:.1%}"] if "mfu" in record else []),
            f"left {clock_time(left)}",
        ]
        print("  ".join(parts), flush=True)
