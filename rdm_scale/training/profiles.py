"""Profiles along depth, as a run keeps them in depth.jsonl: one object a watched step, see rdm_scale.training.depth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Profile = dict[str, list[float | None]]  # by quantity, a number for each block, or None where a block has no such unit
DEPTH = "depth.jsonl"
_COLUMNS = 512  # most steps that a heat map shows


def read_profiles(path: Path) -> tuple[list[int], list[Profile]]:
    """Steps and profiles; none where there is no such file. Raises ValueError naming a line that is not a profile."""
    steps: list[int] = []
    profiles: list[Profile] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record: dict[str, Any] = json.loads(line)
            steps.append(int(record.pop("step")))
            profiles.append({name: list(values) for name, values in record.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is not a profile along depth: {error}") from None
    return steps, profiles


def as_array(columns: list[list[float | None]]) -> NDArray[np.float64]:
    """[depth, steps]; absent numbers are nan."""
    return np.array([[np.nan if v is None else v for v in column] for column in columns]).T


def is_logarithmic(values: NDArray[np.float64]) -> bool:
    """Whether the values are better seen on a logarithmic scale: positive, and over more than a factor of 10."""
    there = values[np.isfinite(values)]
    return bool(there.size and there.min() > 0 and there.max() > 10 * there.min())


def heat_map(columns: list[list[float | None]]) -> NDArray[np.uint8]:
    """Picture [height, width, 3]: depth downwards, steps to the right, dark to bright; black where there is nothing."""
    import matplotlib

    values = as_array(columns)
    values = values[:, :: -(-values.shape[1] // _COLUMNS)]
    values = np.log(values) if is_logarithmic(values) else values
    there = values[np.isfinite(values)]
    low, high = (there.min(), there.max()) if there.size else (0.0, 0.0)
    scaled = (values - low) / (high - low) if high > low else np.where(np.isfinite(values), 0.5, np.nan)
    picture = (matplotlib.colormaps["viridis"](np.nan_to_num(scaled))[..., :3] * 255).astype(np.uint8)
    picture[~np.isfinite(values)] = 0
    return np.kron(picture, np.ones((max(1, 256 // len(values)), 4, 1), np.uint8))
