"""MkDocs hooks: add files outside docs/ that pages link to, under repository/, and list the configuration keys."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from rdm_scale.config import describe_keys

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PREFIX = "repository/"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "experiments/README.md")  # in the nav
KEYS = "<!-- configuration keys -->"
LINK = re.compile(r'(\]\(|src=")([^)"\s#:]+)')  # destination of a link or image, without its fragment


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the nav and, recursively, whatever files they and the other pages link to."""
    waiting = [ROOT / page for page in PAGES]
    waiting += [DOCS / file.src_uri for file in files.documentation_pages()]
    while waiting:
        path = waiting.pop()
        uri = site_uri(path)
        if uri.startswith(PREFIX) and uri not in files.src_uris:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        if path.suffix == ".md":
            targets = ((path.parent / match[2]).resolve() for match in LINK.finditer(path.read_text()))
            waiting += [t for t in targets if t.is_file() and ROOT in t.parents and site_uri(t) not in files.src_uris]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links between docs/ and the rest of the repository to where the site has the files."""
    uri = page.file.src_uri
    source = ROOT / uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else DOCS / uri

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if not target.is_file() or ROOT not in target.parents:
            return match[0]
        return match[1] + posixpath.relpath(site_uri(target), posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown).replace(KEYS, f"```text\n{describe_keys()}\n```")


def site_uri(path: Path) -> str:
    """Path of a file of the repository within the site's sources."""
    return (path.relative_to(DOCS) if DOCS in path.parents else PREFIX / path.relative_to(ROOT)).as_posix()
