"""Images and videos of a user's data set: where each is stored, and how its bytes are read.

The bytes are a separate file or a range of a tar. A video inside a tar is read in place, without unpacking it.
"""

import io
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from rdm_scale.encoding.plain_text import DecodedText, decode_plain_text
from rdm_scale.errors import DataError, StorageError
from rdm_scale.storage.backend import Stat, check_version
from rdm_scale.storage.location import Location, ReplacedError

MediaKind = Literal["image", "video"]
EXTENSIONS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("png", "jpg", "jpeg", "webp", "jpe", "jfif"),
    "video": ("mp4", "avi", "webm", "mkv", "mov", "m4v"),
}
KIND_BY_EXTENSION = {extension: kind for kind, extensions in EXTENSIONS.items() for extension in extensions}
MAX_CAPTION_BYTES = 2**16
_MAX_IMAGE_BYTES = 2**28  # an image within the limit on pixels never needs more
_BUFFER_BYTES = 2**18  # a demuxer reads a few bytes at a time


def media_kind(name: str) -> MediaKind | None:
    """Kind of a file, by the extension of its name; None if it is neither an image nor a video."""
    return KIND_BY_EXTENSION.get(posixpath.splitext(name)[1][1:].lower())


@dataclass(frozen=True, slots=True)
class MediaFile:
    """An image or video that has been found but not read: a file, or `length` bytes at `offset` of a tar."""

    key: str  # unique in its set: the path below the input, or the name in the tar, without the extension
    label: int  # index into the set's class names; -1 without classes
    caption: str | None
    location: Location
    name: str  # path or URL for error messages, with `:member` for a member of a tar
    offset: int = 0
    length: int | None = None  # None: to the end of the file
    version: str = ""  # of the file that holds it, when it was listed; empty: not known
    origin: str = ""  # its place in the input: path below the folder, name in the tar, or path in the list
    group: str | None = None  # the source that it shares with other entries; None: it shares none

    @property
    def source(self) -> str:
        """Name of the source that the held-out split goes by: all that is made of one source lies on one side."""
        return self.key if self.group is None else self.group

    def read(self) -> bytes:
        """Read all bytes.

        Raises:
            StorageError: the file cannot be read, or has changed since it was listed.
            DataError: it is too large for an image.
        """
        try:
            if self.length is None and not self.location.is_local:
                content = self.location.read_range(0, _MAX_IMAGE_BYTES + 1)  # saves the request for the size
                length = len(content)
            else:
                length = self.location.size() if self.length is None else self.length
                version = self.version or None
                content = self.location.read_range(self.offset, length, version) if length <= _MAX_IMAGE_BYTES else b""
        except OSError as error:
            raise _unreadable(self.name, error) from error
        if length > _MAX_IMAGE_BYTES:
            raise DataError(
                f"{self.name} has more than {_MAX_IMAGE_BYTES} bytes: too large for an image file; shrink or remove it"
            )
        if len(content) != length:
            raise _ends_early(self.name, len(content), length)
        return content

    def open(self) -> BinaryIO:
        """Open as a seekable, read-only file of exactly these bytes; any size is allowed.

        Raises:
            StorageError: the file cannot be read, or has changed since it was listed; raised here and by every read.
        """
        try:
            found = self.location.stat() if self.length is None or self.version else None
            if found is not None:
                check_version(str(self.location), found, self.version)
            length = self.length if self.length is not None else cast(Stat, found).bytes
            file = self.location.open()
        except Exception as error:  # clients of object stores have exceptions of their own
            raise _unreadable(self.name, error) from error
        return cast(BinaryIO, io.BufferedReader(_ByteWindow(file, self.offset, length, self.name), _BUFFER_BYTES))

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open as `open` does, for a decoder that may take a failing read for damage, or hide it.

        Raises:
            StorageError: as `open`; also at the end of the `with` block, if any read has failed.
        """
        with self.open() as content:
            window = cast(_ByteWindow, cast(io.BufferedReader, content).raw)
            try:
                yield content
            except DataError:
                if window.failure is not None:
                    raise window.failure from None
                raise
        if window.failure is not None:
            raise window.failure


class MediaEntry(NamedTuple):
    """An image or video as listed by a folder, tar or list, before class names are numbered."""

    kind: MediaKind
    key: str
    class_name: str | None
    caption: str | None
    location: Location
    name: str
    offset: int = 0
    length: int | None = None
    version: str = ""
    origin: str = ""
    group: str | None = None


def decode_text(content: bytes, limit: int, name: str, what: str) -> DecodedText:
    """Decode a small text file and strip white space around the text.

    Args:
        limit: most bytes.
        name: name of the file, for error messages.
        what: expected content, for error messages.

    Raises:
        DataError: it has more than `limit` bytes, or is not text in a known encoding.
    """
    if len(content) > limit:
        raise DataError(f"{name} has {len(content)} bytes: too many for {what} (at most {limit})")
    try:
        text, legacy = decode_plain_text(content)
    except ValueError:
        raise DataError(
            f"{name} cannot be decoded as UTF-8, UTF-16 or Windows-1252: it must hold {what}; convert it to UTF-8"
        ) from None
    return DecodedText(text.strip(), legacy)


class _ByteWindow(io.RawIOBase):
    """Read-only view of `length` bytes of another file, starting at `offset`."""

    def __init__(self, file: Any, offset: int, length: int, name: str) -> None:
        self._file, self._offset, self._length, self._name = file, offset, length, name
        self._position = 0
        self.failure: StorageError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}, before the start of {self._name}")
        self._position = start + offset  # beyond the end is allowed, as in any file: reads return nothing there
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._length - self._position)
        if wanted <= 0:
            return 0
        try:
            self._file.seek(self._offset + self._position)
            content = self._file.read(wanted)
        except Exception as error:  # clients of object stores have exceptions of their own
            self.failure = _unreadable(self._name, error)
            raise self.failure from error
        if not content:
            self.failure = _ends_early(self._name, self._position, self._length)
            raise self.failure
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _unreadable(name: str, error: Exception) -> StorageError:
    if isinstance(error, ReplacedError):
        return StorageError(f"{name} was changed while it was in use")
    return StorageError(f"cannot read {name}: {error}")


def _ends_early(name: str, found: int, expected: int) -> StorageError:
    return StorageError(f"{name} ends after {found} of {expected} bytes: it was changed while it was in use")
