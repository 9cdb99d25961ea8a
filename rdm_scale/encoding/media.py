"""One image or video of a user's data: where it is, and how its bytes are reached.

It may be a file of its own or a part of a tar; a video inside a tar is read in place, without loading or unpacking it.
"""

import io
import posixpath
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

Kind = Literal["image", "video"]
EXTENSIONS: dict[Kind, tuple[str, ...]] = {
    "image": ("png", "jpg", "jpeg", "webp"),
    "video": ("mp4", "avi", "webm", "mkv", "mov"),
}
MAX_CAPTION_BYTES = 2**16
KINDS = {extension: kind for kind, extensions in EXTENSIONS.items() for extension in extensions}
_MAX_IMAGE_BYTES = 2**28  # larger than any image within PIL's limit on pixels has a reason to be
_BUFFER_BYTES = 2**18  # a demuxer reads a few bytes at a time


def kind_of(name: str) -> Kind | None:
    """What a file is by the extension of its name; None for other files."""
    return KINDS.get(posixpath.splitext(name)[1][1:].lower())


@dataclass(frozen=True, slots=True)
class MediaFile:
    """One image or video that has been found but not read: a file, or `length` bytes at `offset` of a tar."""

    key: str  # unique in its set: the path below the input, or the name in the tar, without the extension
    label: int  # index into the set's class names; -1 without classes
    caption: str | None
    location: Location
    name: str  # for messages: where a person finds it
    offset: int = 0
    length: int | None = None  # None: the whole file

    def read(self) -> bytes:
        """All of it. Raises DataError: the file cannot be read, is too large for an image, or ends early."""
        try:
            if self.length is None and not self.location.is_local:
                content = self.location.read_range(0, _MAX_IMAGE_BYTES + 1)  # asking for its size is a request more
                length = len(content)
            else:
                length = self.location.size() if self.length is None else self.length
                content = self.location.read_range(self.offset, length) if length <= _MAX_IMAGE_BYTES else b""
        except OSError as error:
            raise DataError(f"cannot read {self.name}: {error}") from None
        if length > _MAX_IMAGE_BYTES:
            raise DataError(f"{self.name} has more than {_MAX_IMAGE_BYTES} bytes: too large for an image file")
        if len(content) != length:
            raise DataError(_ends_early(self.name, len(content), length))
        return content

    def open(self) -> BinaryIO:
        """A seekable, read-only file of exactly these bytes, of any size.

        Raises DataError, here and when it is read: the file cannot be read, or ends early.
        """
        try:
            length = self.location.size() if self.length is None else self.length
            file = self.location.open()
        except Exception as error:  # clients of object stores have exceptions of their own
            raise DataError(f"cannot read {self.name}: {error}") from None
        return cast(BinaryIO, io.BufferedReader(_Window(file, self.offset, length, self.name), _BUFFER_BYTES))


class Found(NamedTuple):
    """What a source (folder, tar, list) says of one file, before classes are numbered."""

    kind: Kind
    key: str
    class_name: str | None
    caption: str | None
    location: Location
    name: str
    offset: int = 0
    length: int | None = None


def as_text(content: bytes, limit: int, name: str, what: str) -> str:
    """The text of a small file beside an image or video, without white space around it.

    Raises DataError: it is longer than `limit` bytes, or not UTF-8; the message says that `name` must hold `what`.
    """
    if len(content) > limit:
        raise DataError(f"{name} has {len(content)} bytes: too many for {what}")
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text: it must hold {what}") from None


class _Window(io.RawIOBase):
    """`length` bytes of another file from `offset` on, as a file of its own."""

    def __init__(self, file: Any, offset: int, length: int, name: str) -> None:
        self._file, self._offset, self._length, self._name = file, offset, length, name
        self._position = 0

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
        self._position = start + offset  # beyond the end is allowed, as in any file: nothing is read there
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._length - self._position)
        if wanted <= 0:
            return 0
        try:
            self._file.seek(self._offset + self._position)
            content = self._file.read(wanted)
        except Exception as error:  # clients of object stores have exceptions of their own
            raise DataError(f"cannot read {self._name}: {error}") from None
        if not content:
            raise DataError(_ends_early(self._name, self._position, self._length))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _ends_early(name: str, found: int, expected: int) -> str:
    return f"{name} ends after {found} of {expected} bytes: was it changed meanwhile?"
