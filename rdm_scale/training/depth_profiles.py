"""Depth profiles as a run keeps them in depth.jsonl: one JSON object a measured step, see training.depth_probe."""

from pathlib import Path
from typing import Any

from rdm_scale.storage.json_lines import Report, is_number, read_json_lines, warn

Profile = dict[str, list[float | None]]  # by quantity, a number for each block; None where a block has no such branch
DEPTH = "depth.jsonl"


def read_profiles(path: Path, report: Report = warn) -> tuple[list[int], list[Profile]]:
    """Read steps and profiles; both are empty if the file does not exist.

    Lines that are no profiles, or of another depth than the last one, are left out and reported.

    Raises:
        OSError: the file cannot be read.
    """
    lines = read_json_lines(path, _is_profile, report, "not a profile along depth")
    depth = _depth(lines[-1].record) if lines else 0
    profiles = [line.record for line in lines if _depth(line.record) == depth]
    if len(profiles) < len(lines):
        report(f"{path}: {len(lines) - len(profiles)} profiles of another depth than the last one are left out")
    return [profile.pop("step") for profile in profiles], profiles


def _depth(record: dict[str, Any]) -> int:
    return max((len(values) for name, values in record.items() if name != "step"), default=0)


def _is_profile(record: dict[str, Any]) -> bool:
    lists = [values for name, values in record.items() if name != "step"]
    return (
        type(record.get("step")) is int
        and all(isinstance(values, list) for values in lists)
        and len({len(values) for values in lists}) == 1
        and all(value is None or is_number(value) for values in lists for value in values)
    )
