"""Tally of what an input holds beside its images or videos: every entry is counted by kind, with an example.

Entries that may be images or videos which someone expects in the set count as missed: they are compared with a share
that the caller allows. Annotations, hidden files and the like do not.
"""

import posixpath
import re
from collections.abc import Iterable
from typing import NamedTuple

from rdm_scale.storage.backend import CYCLIC_LINK, HIDDEN_FOLDER, Walk

# Suffixes of images, videos and archives of formats that are not read.
_FOREIGN = """
avif bmp dng gif heic heif ico jp2 jxl pgm ppm psd raw svg tga tif tiff
3gp flv m2ts mpeg mpg mts ogv rm ts vob wmv
7z bz2 gz rar tar tbz tgz txz xz zip zst
"""
# Suffixes of annotations and of what else lies beside data. A file with any other suffix may be an image or a video.
_BESIDE = """
ann bib bin c cfg cls conf cpp csv db dat h h5 hdf5 htm html idx index ini ipynb js json jsonl lock log mat md md5 mp3
npy npz parquet pdf pickle pkl pt pth py rst safetensors sh sha1 sha256 sqlite srt sum tags tex toml tsv txt url vtt wav
xml yaml yml
"""
_FOREIGN_SUFFIXES, _SUFFIXES_BESIDE = frozenset(_FOREIGN.split()), frozenset(_BESIDE.split())
_UPPER = re.compile(r"[A-Z0-9][A-Z0-9_.-]*")  # LICENSE, README, SHA256SUMS
_SUFFIX = re.compile(r"[a-z0-9]{1,9}")
_MOST_KINDS = 50  # suffixes that are told apart
HIDDEN = "hidden files"


class LeftOutEntry(NamedTuple):
    """An entry of an input that is not encoded."""

    kind: str  # a noun in the plural
    name: str
    missed: bool = False  # it may be an image or a video that someone expects in the set


class LeftOutKind(NamedTuple):
    """The entries of one kind that are not encoded."""

    kind: str
    number: int
    example: str  # name of the first
    missed: bool

    def __str__(self) -> str:
        return f"{self.number} {self.kind} ({'' if self.number == 1 else 'the first: '}{self.example})"


class LeftOutTally:
    """Counts of the entries of an input that are not encoded, by kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, LeftOutKind] = {}

    def add(self, entry: LeftOutEntry) -> None:
        kind = entry.kind
        if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            kind = "other files that may be images or videos" if entry.missed else "other files"
        known = self._kinds.get(kind, LeftOutKind(kind, 0, entry.name, entry.missed))
        self._kinds[kind] = known._replace(number=known.number + 1)

    def kinds(self) -> tuple[LeftOutKind, ...]:
        """All kinds: first those that may be missed, then by number."""
        return tuple(sorted(self._kinds.values(), key=lambda one: (not one.missed, -one.number, one.kind)))


def listed(kinds: Iterable[LeftOutKind]) -> str:
    """Enumeration of kinds for a message."""
    return ", ".join(map(str, kinds))


def left_out_file(path: str, name: str) -> LeftOutEntry:
    """Describe a file that is not encoded because of its suffix.

    Args:
        path: of the file; its suffix decides.
        name: for messages.
    """
    base = posixpath.basename(path)
    suffix = posixpath.splitext(base)[1][1:].lower()
    if base.startswith("."):
        return LeftOutEntry(HIDDEN, name)
    if not suffix:
        if _UPPER.fullmatch(base):
            return LeftOutEntry("files without a suffix", name)
        return LeftOutEntry("files without a suffix that may be images or videos", name, missed=True)
    if suffix in _FOREIGN_SUFFIXES:
        return LeftOutEntry(f".{suffix} files, a format that is not read", name, missed=True)
    if suffix in _SUFFIXES_BESIDE:
        return LeftOutEntry(f".{suffix} files", name)
    return LeftOutEntry(
        f".{suffix} files, a suffix that is not known" if _SUFFIX.fullmatch(suffix) else "files with odd suffixes",
        name,
        missed=True,
    )


def left_out_others(walk: Walk, folder: str) -> Iterable[LeftOutEntry]:
    """Describe what the walk through a folder met that are neither files nor folders."""
    for path, kind in walk.others.items():
        yield LeftOutEntry(kind, posixpath.join(folder, path), missed=kind not in (CYCLIC_LINK, HIDDEN_FOLDER))
