"""Baseline of the checkpoint benchmarks: one file of raw bytes, without structure or checksums."""

import os
from pathlib import Path

from torch import Tensor


def save_plain(folder: Path, flats: dict[str, Tensor]) -> None:
    """Write all tensors to FOLDER/raw; end with fsync."""
    with (folder / "raw").open("wb") as file:
        for flat in flats.values():
            file.write(flat.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def load_plain(folder: Path, flats: dict[str, Tensor]) -> None:
    with (folder / "raw").open("rb", buffering=0) as file:
        for flat in flats.values():
            view = memoryview(flat.numpy()).cast("B")
            while view:
                view = view[file.readinto(view) :]
