"""Webdataset tars of images or videos: indexing the members by one pass over the headers, and packing small tars.

For `key.png` (or another image or video), the class is in `key.cls` and the caption in `key.txt`, or both are in
`key.json`.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from rdm_scale.encoding.lists import Columns, parse_caption, parse_label
from rdm_scale.encoding.media import KIND_BY_EXTENSION, MAX_CAPTION_BYTES, MediaEntry, decode_text
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from rdm_scale.storage.ustar import pack_ustar

_MAX_CLASS_BYTES = 1024
_MAX_JSON_BYTES = 2**20
_TAR_READERS = 8  # threads, one tar each, which hide the latency of an object store


def read_tars(tars: Sequence[Location], columns: Columns) -> Iterator[MediaEntry | None]:
    """Index all images and videos of the tars, in their order.

    Yields:
        Entries, and None for every member that is neither an image or video nor belongs to one.

    Raises:
        DataError: a tar is damaged or truncated, or a class or caption is invalid.
        OSError: a tar cannot be read.
    """
    with ThreadPoolExecutor(_TAR_READERS) as pool:
        for index in pool.map(partial(_index, columns=columns), tars):
            yield from index.entries
            yield from [None] * index.others


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
    others: int  # number of members that are neither images or videos nor belong to one


class _Annotation(NamedTuple):
    """Fields of a `key.json`."""

    class_name: str | None = None
    caption: str | None = None


def _index(location: Location, columns: Columns) -> _IndexedTar:
    try:
        return _TarIndexer(location, columns).index()
    except tarfile.TarError as error:
        raise DataError(f"{location} is not a tar file, or is damaged ({error}): copy it again") from None


class _TarIndexer:
    """Indexer of one tar, from its headers; classes and captions may come before or after their image or video."""

    def __init__(self, location: Location, columns: Columns) -> None:
        self._location, self._columns = location, columns
        self._media: list[MediaEntry] = []  # without class and caption
        self._classes: dict[str, str] = {}  # by key
        self._captions: dict[str, str] = {}
        self._annotations: dict[str, _Annotation] = {}
        self._others = 0

    def index(self) -> _IndexedTar:
        size = self._location.size()
        with self._location.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                self._add(tar, member)
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header it has read
            if tar.offset + tarfile.BLOCKSIZE > size:
                raise DataError(
                    f"{self._location} is truncated: it has no end-of-archive mark after {len(self._media)} images or "
                    "videos; copy it again"
                )
        entries = [self._annotated(entry) for entry in self._media]
        keys = {entry.key for entry in entries}
        annotated = (self._classes, self._captions, self._annotations)
        return _IndexedTar(entries, self._others + sum(key not in keys for by_key in annotated for key in by_key))

    def _annotated(self, entry: MediaEntry) -> MediaEntry:
        class_name, caption = self._annotations.get(entry.key, _Annotation())
        return entry._replace(
            class_name=self._classes.get(entry.key, class_name), caption=self._captions.get(entry.key, caption)
        )

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = posixpath.normpath(member.name)
        if not member.isfile() or any(part.startswith(".") for part in path.split("/")):
            return
        name = f"{self._location}:{path}"
        if member.issparse():
            raise DataError(
                f"{name} is stored as a sparse file, which is not supported: write the tar without --sparse"
            )
        folder, base = posixpath.split(path)
        stem, _, extension = base.partition(".")  # webdataset: a key ends at the first dot of the base name
        key, extension = posixpath.join(folder, stem), extension.lower()
        if kind := KIND_BY_EXTENSION.get(extension):
            self._media.append(MediaEntry(kind, key, None, None, self._location, name, member.offset_data, member.size))
        elif extension == "cls":
            text = _text(tar, member, name, _MAX_CLASS_BYTES, "the number or name of a class")
            if not text:
                raise DataError(f"{name} is empty: it must hold the number or name of a class")
            self._classes[key] = text
        elif extension == "txt":
            self._captions[key] = _text(tar, member, name, MAX_CAPTION_BYTES, "a caption")
        elif extension == "json":
            self._annotations[key] = self._annotation(
                _content(tar, member, name, _MAX_JSON_BYTES, "a label and caption"), name
            )
        else:
            self._others += 1

    def _annotation(self, content: bytes, name: str) -> _Annotation:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is not JSON ({error}): correct it") from None
        if not isinstance(values, dict):
            raise DataError(f"{name} is not a JSON object with fields such as label and caption: correct it")
        label, caption = self._columns.label, self._columns.caption
        return _Annotation(
            parse_label(values.get(label), label, name), parse_caption(values.get(caption), caption, name)
        )


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, limit: int, what: str) -> str:
    return decode_text(_content(tar, member, name, limit, what), limit, name, what)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, limit: int, what: str) -> bytes:
    content = tar.extractfile(member) if member.size <= limit else None
    if content is None:
        raise DataError(f"{name} has {member.size} bytes: too many for {what} (at most {limit})")
    return content.read()
