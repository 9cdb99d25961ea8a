"""Result files and Markdown tables of benchmarks/ and experiments/."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"


def results_file(script: str) -> Path:
    """Path of a script's results: results/NAME.json beside it, `script` being its `__file__`."""
    path = Path(script).resolve()
    return path.parent / "results" / f"{path.stem}.json"


def read_results(script: str) -> dict[str, Any]:
    """Results that a script wrote before; empty if there are none."""
    path = results_file(script)
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write_results(script: str | Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON: to the results file of a script (given as its `__file__`), or to a .json path."""
    path = Path(script) if Path(script).suffix == ".json" else results_file(str(script))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def print_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table after an empty line."""
    lines = [header, ["---"] * len(header), *rows]
    print("\n" + "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines).replace("| --- ", "|---"))
