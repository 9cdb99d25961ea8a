"""Results of benchmarks and experiments: where they go, and the Markdown tables that are printed of them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"


def results_file(script: str) -> Path:
    """The JSON file of a script, given as its `__file__`: results/NAME.json beside it."""
    path = Path(script).resolve()
    return path.parent / "results" / f"{path.stem}.json"


def read_results(script: str) -> dict[str, Any]:
    """The results that a script wrote before; empty where it has not been run."""
    path = results_file(script)
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write_results(script: str, results: dict[str, Any]) -> None:
    """Write a script's results, for the tables and figures of docs/."""
    results_file(script).write_text(json.dumps(results, indent=1) + "\n")


def print_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table after an empty line."""
    lines = [header, ["---"] * len(header), *rows]
    print("\n" + "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines).replace("| --- ", "|---"))
