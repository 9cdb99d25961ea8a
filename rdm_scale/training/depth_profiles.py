"""Profiles along depth, as a run keeps them in depth.jsonl: one object a watched step, see training.depth_probe."""

import json
from pathlib import Path
from typing import Any

Profile = dict[str, list[float | None]]  # by quantity, a number for each block, or None where a block has no such unit
DEPTH = "depth.jsonl"


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
