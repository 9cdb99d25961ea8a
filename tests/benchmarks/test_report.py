"""Scripts of benchmarks/ and experiments/: the shared report helper, the help of each script, and the indexes."""

import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.report import ROOT, print_table, read_results, results_file, write_results

SCRIPTS = sorted(
    path
    for folder in ("benchmarks", "experiments")
    for path in (ROOT / folder).glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)


def test_print_table_writes_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("storage", "save s"), [("plain file", 1), ("rdm_scale", "0.50")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["", "| storage | save s |", "|---|---|", "| plain file | 1 |", "| rdm_scale | 0.50 |"]


def test_results_lie_beside_the_script_under_its_name(tmp_path: Path) -> None:
    script = str(tmp_path / "speed.py")
    assert results_file(script) == tmp_path / "results" / "speed.json"
    assert read_results(script) == {}
    write_results(script, {"step_s": 0.5})
    assert read_results(script) == {"step_s": 0.5}
    write_results(tmp_path / "elsewhere.json", {"step_s": 1})
    assert (tmp_path / "elsewhere.json").read_text() == '{\n "step_s": 1\n}\n'


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_script_has_a_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert f"python {script.relative_to(ROOT)}" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["benchmarks", "experiments"])
def test_the_index_names_every_script_and_its_results(folder: str) -> None:
    index = (ROOT / folder / "README.md").read_text()
    missing = [path.name for path in (ROOT / folder).glob("*.py") if f"`{path.name}`" not in index]
    missing += [path.name for path in (ROOT / folder / "results").glob("*.json") if f"results/{path.name}" not in index]
    assert not missing
