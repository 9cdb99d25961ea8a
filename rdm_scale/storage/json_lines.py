"""Files of one JSON object a line, as runs append to them: a damaged line costs that line, not what follows it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Report = Callable[[str], object]
_SHOWN = 5  # numbers of damaged lines in a message


class JsonLine(NamedTuple):
    """A line that holds an object."""

    number: int  # from 1
    record: dict[str, Any]
    content: bytes  # with its line break


def warn(line: str) -> None:
    """Print a warning to the error stream."""
    print(f"warning: {line}", file=sys.stderr)


def read_json_lines(
    path: Path, is_valid: Callable[[dict[str, Any]], bool], report: Report, what: str = "not a valid record"
) -> list[JsonLine]:
    """Read the lines of a file that hold valid objects; none if there is no such file.

    A last line without a line break that is not valid is being written, or its writing was interrupted: it is left out
    without a word. All other lines that are left out are reported in one message, by number.

    Args:
        is_valid: tells if an object has the expected keys and types.
        report: is given the message.
        what: what a line that is left out is not, for the message.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        *complete, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    found, damaged = [], []
    for number, content in enumerate([*complete, last], start=1):
        record = _parse(content)
        if record is not None and is_valid(record):
            found.append(JsonLine(number, record, content + b"\n"))
        elif content.strip() and number <= len(complete):
            damaged.append(number)
    if damaged:
        numbers = ", ".join(map(str, damaged[:_SHOWN])) + (", ..." if len(damaged) > _SHOWN else "")
        lines = "line" if len(damaged) == 1 else "lines"
        report(f"{path}: {len(damaged)} of {len(complete)} lines are left out, each is {what}: {lines} {numbers}")
    return found


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_number(value: object) -> bool:
    """True for an integer or floating-point number; False for a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)
