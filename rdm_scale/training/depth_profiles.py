"""Depth profiles as a run keeps them in depth.jsonl: one JSON object a measured step, see training.depth_probe."""

import json
from pathlib import Path
from typing import Any

Profile = dict[str, list[float | None]]  # by quantity, a number for each block; None where a block has no such branch
DEPTH = "depth.jsonl"


def read_profiles(path: Path) -> tuple[list[int], list[Profile]]:
    """Read steps and profiles; both are empty if the file does not exist.

    Raises:
        ValueError: a line is not a profile; names the line.
    """
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
