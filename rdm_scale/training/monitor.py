"""What a run tells: metrics.jsonl, TensorBoard, the console, pictures. Only the first rank's monitor speaks."""

import json
import time
from pathlib import Path
from typing import IO, Any

from rdm_scale.config import RunConfig
from rdm_scale.evaluation.plots import heat_map
from rdm_scale.training.depth_profiles import DEPTH, Profile, read_profiles


class Monitor:
    """A monitor that says nothing; what all ranks but the first hold."""

    def step(self, record: dict[str, Any]) -> None:
        """Takes the metrics of one step."""

    def depth(self, step: int, profile: Profile) -> None:
        """Takes what one step was like along depth."""

    def pictures(self, step: int, image: Any) -> None:
        """Takes a grid of samples (PIL.Image)."""

    def say(self, message: str) -> None:
        """Tells the user something that is not a metric."""

    def close(self) -> None:
        """Flushes what is buffered."""


class RunMonitor(Monitor):
    """Writes to the run's directory and to the console."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        self.config = config
        self.dir = Path(config.run.dir)
        self.first_step = first_step
        self.started = time.monotonic()
        self.metrics: IO[str] = (self.dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.profiles: list[Profile] = read_profiles(self.dir / DEPTH)[1]
        self.board: Any = None
        if config.monitor.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 3 s to import

            self.board = SummaryWriter(str(self.dir / "tensorboard"), purge_step=first_step + 1)

    def step(self, record: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()
        step = record["step"]
        if self.board is not None:
            for name, value in record.items():
                if name != "step":
                    self.board.add_scalar(name, value, step)
        ends = (self.first_step + 1, self.config.train.steps)
        if step % self.config.monitor.log_every == 0 or "validation_loss" in record or step in ends:
            self._print(record)

    def depth(self, step: int, profile: Profile) -> None:
        with (self.dir / DEPTH).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | profile) + "\n")
        self.profiles.append(profile)
        if self.board is not None:
            for name in profile:
                picture = heat_map([each[name] for each in self.profiles if name in each])
                self.board.add_image(f"depth/{name}", picture, step, dataformats="HWC")

    def pictures(self, step: int, image: Any) -> None:
        folder = self.dir / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step_{step:08d}.png")
        if self.board is not None:
            import numpy as np

            self.board.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def say(self, message: str) -> None:
        print(message, flush=True)

    def close(self) -> None:
        self.metrics.close()
        if self.board is not None:
            self.board.close()

    def _print(self, record: dict[str, Any]) -> None:
        step, steps = record["step"], self.config.train.steps
        left = (time.monotonic() - self.started) / (step - self.first_step) * (steps - step)
        parts = [
            f"step {step:>{len(str(steps))}}/{steps}",
            f"loss {record['loss']:.4f}",
            f"grad norm {record['grad_norm']:.3f}",
            f"lr {record['lr']:.2e}",
            f"{self.config.train.global_batch_size / record['step_s']:.0f} samples/s",
            f"left {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}",
        ]
        if "validation_loss" in record:
            parts.insert(2, f"validation {record['validation_loss']:.4f}")
        print("  ".join(parts), flush=True)
