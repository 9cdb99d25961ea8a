"""docs/extending.md: its edits apply to the package as it is, and its checks pass afterwards."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^( *)```(diff|python)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


class Section(NamedTuple):
    title: str
    edits: list[str]
    checks: list[str]


def sections() -> list[Section]:
    _, *parts = re.split(r"^## ", (ROOT / "docs/extending.md").read_text(), flags=re.MULTILINE)
    found = []
    for part in parts:
        section = Section(part.partition("\n")[0], [], [])
        for indent, kind, code in BLOCK.findall(part):
            lines = [line.removeprefix(indent) for line in code.splitlines(keepends=True)]
            (section.edits if kind == "diff" else section.checks).append("".join(lines))
        found.append(section)
    return found


def apply(edit: str, root: Path) -> None:
    """Apply a diff without line numbers: its old lines must occur exactly once in the file that it names."""
    header, *lines = edit.splitlines()
    path = root / header.removeprefix("--- ")
    old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
    new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert text.count(old) == 1, f"{header}: these lines occur {text.count(old)} times:\n{old}"
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all edits of the page."""
    root = tmp_path_factory.mktemp("extended")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rdm_scale", root / "rdm_scale", symlinks=True, ignore=ignored)
    for section in sections():
        for edit in section.edits:
            apply(edit, root)
    return root


def test_every_section_has_edits_and_a_check() -> None:
    titles = [section.title for section in sections()]
    assert len(titles) == 5
    assert all(section.edits and section.checks for section in sections())


def test_the_checks_of_the_page_pass_after_its_edits(extended: Path) -> None:
    checks = {section.title: "\n".join(section.checks) for section in sections()}
    (extended / "checks.py").write_text(
        "import rdm_scale\n"
        f"assert rdm_scale.__file__.startswith({str(extended)!r}), rdm_scale.__file__\n"
        + "".join(f"print({title!r})\nexec({code!r}, {{}})\n" for title, code in checks.items())
    )
    environment = os.environ | {"PYTHONPATH": str(extended)}
    done = subprocess.run(
        [sys.executable, "checks.py"], cwd=extended, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-len(checks) :] == list(checks)


def test_without_the_edits_the_checks_fail(tmp_path: Path) -> None:
    """The first check, run against the package as it is."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", sections()[0].checks[0]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "skip_init" in done.stderr
