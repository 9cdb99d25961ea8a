"""Webdataset tars of images or videos: indexing the members by one pass over the headers, and packing small tars.

For `key.png` (or another image or video), the class is in `key.cls` and the caption in `key.txt`, or both are in
`key.json`. The key ends at the first dot that is followed by such a suffix: `photo_v1.1.png` is the image `photo_v1.1`.
"""

import json
import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, NamedTuple

from rdm_scale.encoding.left_out import HIDDEN, LeftOutEntry, left_out_file
from rdm_scale.encoding.lists import Columns, parse_caption, parse_group, parse_label
from rdm_scale.encoding.media import KIND_BY_EXTENSION, MAX_CAPTION_BYTES, MediaEntry, decode_text
from rdm_scale.encoding.plain_text import LegacyText
from rdm_scale.encoding.tar_members import read_members
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location, Stat
from rdm_scale.storage.ustar import pack_ustar

_MAX_CLASS_BYTES = 1024
_MAX_JSON_BYTES = 2**20
_ANNOTATIONS = ("cls", "txt", "json")
_MOST_LINKS = 40  # that lead from one to the next
_TAR_READERS = 8  # threads, one tar each, which hide the latency of an object store


def read_tars(tars: Sequence[Location], columns: Columns) -> Iterator[MediaEntry | LeftOutEntry | LegacyText]:
    """Index all images and videos of the tars, in their order.

    Yields:
        Entries, and every member that is neither an image or video nor belongs to one.

    Raises:
        DataError: a tar is damaged or truncated, or a class or caption is invalid.
        OSError: a tar cannot be read.
    """
    with ThreadPoolExecutor(_TAR_READERS) as pool:
        for index in pool.map(partial(_index, columns=columns), tars):
            yield from index.entries
            yield from index.left_out
            yield from index.legacy


def pack_tar(samples: Iterable[Mapping[str, bytes]]) -> bytes:
    """Pack samples into a webdataset tar: `00000.png`, `00000.cls`, `00001.png`, ...

    The same samples give the same bytes.

    Args:
        samples: contents of the files of each sample, by extension.
    """
    files = (
        (f"{index:05d}.{extension}", content)
        for index, sample in enumerate(samples)
        for extension, content in sample.items()
    )
    return pack_ustar(files).content


class _IndexedTar(NamedTuple):
    entries: list[MediaEntry]
    left_out: list[LeftOutEntry]
    legacy: list[LegacyText]


class _Annotation(NamedTuple):
    """Fields of a `key.json`."""

    class_name: str | None = None
    caption: str | None = None
    group: str | None = None


class _MemberRange(NamedTuple):
    """Range of a tar that holds the content of a member."""

    offset: int
    length: int


class _MemberName(NamedTuple):
    """Path of a member, divided into the key of a sample and a suffix."""

    key: str
    suffix: str  # in lower case; empty if no part of the name is a known suffix


def _index(location: Location, columns: Columns) -> _IndexedTar:
    with location.open() as file:
        return _TarIndexer(location, columns, location.stat(), file).index()


class _TarIndexer:
    """Indexer of one tar, from its headers; classes and captions may come before or after their image or video."""

    def __init__(self, location: Location, columns: Columns, stat: Stat, file: IO[bytes]) -> None:
        self._location, self._columns, self._stat, self._file = location, columns, stat, file
        self._contents: dict[str, _MemberRange] = {}  # of all regular files, by path
        self._links: dict[str, str] = {}  # target of each link, by path
        self._media: list[MediaEntry] = []  # without class and caption
        self._classes: dict[str, str] = {}  # by key
        self._captions: dict[str, str] = {}
        self._annotations: dict[str, _Annotation] = {}
        self._others: list[str] = []  # paths of files that are no media or annotations
        self._left_out: list[LeftOutEntry] = []
        self._legacy: list[LegacyText] = []

    def index(self) -> _IndexedTar:
        for member in read_members(self._file, self._location, self._stat.bytes):
            path = posixpath.normpath(member.name)
            if any(part.startswith(".") and part != ".." for part in path.split("/")) and path != ".":
                self._leave_out(HIDDEN, path)
            elif member.issparse():
                raise DataError(
                    f"{self._location}:{path} is stored as a sparse file, which is not supported: write the tar "
                    "without --sparse"
                )
            elif member.isfile():
                self._contents[path] = _MemberRange(member.offset_data, member.size)
                self._add(path, self._contents[path])
            elif member.islnk():
                self._links[path] = posixpath.normpath(member.linkname)
            elif member.issym():
                self._links[path] = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
            elif not member.isdir():
                self._leave_out("special files (pipes, devices)", path)
        self._follow_links()
        return self._result()

    def _follow_links(self) -> None:
        for path in self._links:
            target = path
            for _ in range(_MOST_LINKS):
                target = self._links.get(target, target)
            if target in self._contents:
                self._add(path, self._contents[target])
            else:
                self._leave_out("links to what is not in the tar", path, missed=True)

    def _result(self) -> _IndexedTar:
        keys = {entry.key for entry in self._media}
        fields = [entry for entry in self._media if _is_field(entry.key, keys)]
        for entry in fields:
            self._left_out.append(LeftOutEntry("fields of samples, such as KEY.seg.png", entry.name))
        for path in self._others:
            stem = posixpath.splitext(path)[0]
            known = stem in keys or _is_field(stem, keys)
            if known:
                self._leave_out(f"{posixpath.splitext(path)[1] or 'other'} files of samples", path)
            else:
                self._left_out.append(left_out_file(path, f"{self._location}:{path}"))
        for by_key, suffix in ((self._classes, "cls"), (self._captions, "txt"), (self._annotations, "json")):
            for key in by_key:
                if key not in keys:
                    self._leave_out(f".{suffix} files of no image or video", f"{key}.{suffix}")
        dropped = {entry.name for entry in fields}
        return _IndexedTar(
            [self._annotated(one) for one in self._media if one.name not in dropped], self._left_out, self._legacy
        )

    def _leave_out(self, kind: str, path: str, missed: bool = False) -> None:
        self._left_out.append(LeftOutEntry(kind, f"{self._location}:{path}", missed))

    def _annotated(self, entry: MediaEntry) -> MediaEntry:
        class_name, caption, group = self._annotations.get(entry.key, _Annotation())
        if self._columns.group and group is None:
            raise DataError(
                f"{entry.name} has no {self._columns.group!r} in a .json beside it, as every entry needs one"
            )
        return entry._replace(
            class_name=self._classes.get(entry.key, class_name),
            caption=self._captions.get(entry.key, caption),
            group=group,
        )

    def _add(self, path: str, content: _MemberRange) -> None:
        name = f"{self._location}:{path}"
        key, suffix = _divide(path)
        if kind := KIND_BY_EXTENSION.get(suffix):
            self._media.append(
                MediaEntry(
                    kind,
                    key,
                    None,
                    None,
                    self._location,
                    name,
                    content.offset,
                    content.length,
                    version=self._stat.version,
                    origin=path,
                )
            )
        elif suffix == "cls":
            text = self._text(content, name, _MAX_CLASS_BYTES, "the number or name of a class")
            if not text:
                raise DataError(f"{name} is empty: it must hold the number or name of a class")
            self._classes[key] = text
        elif suffix == "txt":
            self._captions[key] = self._text(content, name, MAX_CAPTION_BYTES, "a caption")
        elif suffix == "json":
            self._annotations[key] = self._annotation(
                self._text(content, name, _MAX_JSON_BYTES, "a label and caption"), name
            )
        else:
            self._others.append(path)

    def _annotation(self, text: str, name: str) -> _Annotation:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is not JSON ({error}): correct it") from None
        if not isinstance(values, dict):
            raise DataError(f"{name} is not a JSON object with fields such as label and caption: correct it")
        label, caption = self._columns.label, self._columns.caption
        return _Annotation(
            parse_label(values.get(label), label, name),
            parse_caption(values.get(caption), caption, name),
            parse_group(values, self._columns, name),
        )

    def _text(self, content: _MemberRange, name: str, limit: int, what: str) -> str:
        text, legacy = decode_text(self._read(content, name, limit, what), limit, name, what)
        if legacy:
            self._legacy.append(LegacyText(name))
        return text

    def _read(self, content: _MemberRange, name: str, limit: int, what: str) -> bytes:
        if content.length > limit:
            raise DataError(f"{name} has {content.length} bytes: too many for {what} (at most {limit})")
        self._file.seek(content.offset)
        return self._file.read(content.length)


def _divide(path: str) -> _MemberName:
    """Divide a path into key and suffix, at the first dot of the base name that only a known suffix follows."""
    stem, _, suffix = path.rpartition(".")
    suffix = suffix.lower()
    if stem and not stem.endswith("/") and (suffix in KIND_BY_EXTENSION or suffix in _ANNOTATIONS):
        return _MemberName(stem, suffix)
    return _MemberName(path, "")


def _is_field(key: str, keys: Collection[str]) -> bool:
    """True if a key is that of another sample and a word behind a dot, as in `key.seg.png`."""
    stem, _, word = key.rpartition(".")
    return word.isalpha() and (stem in keys or _is_field(stem, keys))
