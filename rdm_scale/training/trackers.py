"""Trackers: destinations of a run's metrics and images, such as TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rdm_scale.config import RunConfig
from rdm_scale.errors import ConfigError


class Tracker:
    """Destination of metrics and images; a method that is not overridden drops what it is given."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step by name."""

    def log_image(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Log an image, uint8 [H, W, 3]."""

    def close(self) -> None:
        """Flush and close all files and connections."""


class TensorBoardTracker(Tracker):
    """Tracker that writes event files to `folder` and hides events of steps after `first_step` in earlier files."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # 3 s to import
        except ImportError:
            raise ConfigError(
                "monitor.tensorboard=true needs the package tensorboard, which cannot be imported: install it, or set "
                "monitor.tensorboard=false"
            ) from None

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def build_trackers(config: RunConfig, first_step: int) -> list[Tracker]:
    """Trackers that `config.monitor` asks for; `first_step` steps are complete."""
    trackers: list[Tracker] = []
    if config.monitor.tensorboard:
        trackers.append(TensorBoardTracker(Path(config.run.dir) / "tensorboard", first_step))
    return trackers
