"""Webdataset tars of images or videos: their members indexed by one pass over the headers.

Of `key.png` (or another image or video) the class is in `key.cls` and the caption in `key.txt`, or both in `key.json`.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from rdm_scale.encoding.lists import Columns, caption_of, class_of
from rdm_scale.encoding.media import KINDS, MAX_CAPTION_BYTES, Found, Kind, as_text
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

_MAX_CLASS_BYTES = 1024
_MAX_JSON_BYTES = 2**20
_READERS = 8  # tars indexed at a time: an object store answers slowly


def in_tars(tars: Sequence[Location], columns: Columns) -> Iterator[Found | None]:
    """All images and videos of the tars, in their order; None for each file that is neither, nor belongs to one.

    Raises:
        DataError: a damaged tar, or one that is cut short; a class or caption that cannot be one.
        OSError: a tar cannot be read.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        for found, others in pool.map(partial(_index, columns=columns), tars):
            yield from found
            yield from [None] * others


def _index(location: Location, columns: Columns) -> tuple[list[Found], int]:
    try:
        return _Index(location, columns).result()
    except tarfile.TarError as error:
        raise DataError(f"{location} is not a tar file, or a damaged one: {error}") from None


class _Index:
    """What one tar holds: its media, and classes and captions by key, wherever in the tar they are."""

    def __init__(self, location: Location, columns: Columns) -> None:
        self.location, self.columns = location, columns
        self.media: list[tuple[Kind, str, str, int, int]] = []  # kind, key, name, offset, length
        self.classes: dict[str, str] = {}
        self.captions: dict[str, str] = {}
        self.records: dict[str, tuple[str | None, str | None]] = {}  # class and caption of key.json
        self.others = 0
        size = location.size()
        with location.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                self._add(tar, member)
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header it has read
            if tar.offset + tarfile.BLOCKSIZE > size:  # the end-of-archive block is missing
                raise DataError(
                    f"{location} is cut short: it has no end-of-archive mark after {len(self.media)} images or videos"
                )

    def result(self) -> tuple[list[Found], int]:
        """The images and videos, and the number of other files."""
        found = []
        for kind, key, name, offset, length in self.media:
            class_name, caption = self.records.get(key, (None, None))
            class_name = self.classes.get(key, class_name)
            caption = self.captions.get(key, caption)
            found.append(Found(kind, key, class_name, caption, self.location, name, offset, length))
        keys = {file.key for file in found}
        alone = sum(key not in keys for beside in (self.classes, self.captions, self.records) for key in beside)
        return found, self.others + alone

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = posixpath.normpath(member.name)
        if not member.isfile() or any(part.startswith(".") for part in path.split("/")):
            return
        name = f"{self.location}:{path}"
        if member.issparse():
            raise DataError(f"{name} is stored as a sparse file, which is not read: write the tar without --sparse")
        folder, base = posixpath.split(path)
        stem, _, extension = base.partition(".")  # webdataset: a key ends at the first dot of the base name
        key, extension = posixpath.join(folder, stem), extension.lower()
        if kind := KINDS.get(extension):
            self.media.append((kind, key, name, member.offset_data, member.size))
        elif extension == "cls":
            what = "the number or name of a class"
            text = as_text(_content(tar, member, name, _MAX_CLASS_BYTES, what), _MAX_CLASS_BYTES, name, what)
            if not text:
                raise DataError(f"{name} is empty: it must hold {what}")
            self.classes[key] = text
        elif extension == "txt":
            content = _content(tar, member, name, MAX_CAPTION_BYTES, "a caption")
            self.captions[key] = as_text(content, MAX_CAPTION_BYTES, name, "a caption")
        elif extension == "json":
            self.records[key] = self._record(_content(tar, member, name, _MAX_JSON_BYTES, "a label and caption"), name)
        else:
            self.others += 1

    def _record(self, content: bytes, name: str) -> tuple[str | None, str | None]:
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{name} is not a JSON object with fields such as label and caption")
        label, caption = record.get(self.columns.label), record.get(self.columns.caption)
        return class_of(label, self.columns.label, name), caption_of(caption, self.columns.caption, name)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, limit: int, what: str) -> bytes:
    content = tar.extractfile(member) if member.size <= limit else None
    if content is None:
        raise DataError(f"{name} has {member.size} bytes: too many for {what}")
    return content.read()
