"""Documentation: links resolve, commands name what exists, and the site builds offline."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
LINK = re.compile(r"""(?:\]\(|src=")([^)"\s]+)[)"]""")
REFERENCED = re.compile(  # files of the checkout, in commands and in prose
    r"(?<![\w/.])((?:tools|benchmarks|experiments|launch|configs|tests|docs|rdm_scale)/[\w/.-]*\.(?:py|sh|ya?ml|md|json|sbatch))\b"
)
MODULE = re.compile(r"python -m (rdm_scale[\w.]*)")
TARGET = re.compile(r"`make ([a-z][a-z0-9-]*)|^ *make ([a-z][a-z0-9-]+) +#", re.MULTILINE)
COMMAND = re.compile(r"\brdm-[a-z0-9-]+")


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub and MkDocs make them from its headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title)).strip().lower().replace(" ", "-") for title in titles}


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def dead_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve_to_files_and_headings(page: Path) -> None:
    assert not list(dead_links(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_prose_name_what_exists(page: Path) -> None:
    text = page.read_text()
    placeholders = re.compile(r"NAME|ROOM|MODULE")  # tools/NAME.py
    files = [name for name in REFERENCED.findall(text) if not placeholders.search(name)]
    missing = [name for name in files if not (ROOT / name).exists()]
    modules = [ROOT / name.replace(".", "/") for name in MODULE.findall(text)]
    missing += [str(path) for path in modules if not path.with_suffix(".py").exists() and not path.is_dir()]
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing += [f"make {a or b}" for a, b in TARGET.findall(text) if (a or b) not in targets]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    missing += [command for command in COMMAND.findall(text) if command not in scripts]
    assert not missing


def test_the_index_links_every_page() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "docs/index.md").read_text())}
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    api = {link.partition("#")[0] for link in LINK.findall((ROOT / "docs/api/index.md").read_text())}
    assert pages <= linked
    assert {page.name for page in (ROOT / "docs/api").glob("*.md")} - {"index.md"} == api


def test_the_site_builds_offline_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    html = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://(?!squidfunk)[^"]+\.(?:js|css)', html)
    assert 'id="rdm_scale.config.load_config"' in html
    assert "model.hidden_size = " in html
