"""A file object over ranges of an object of a store."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdm_scale.storage.location import Location


class RangeFile(io.RawIOBase):
    """A file of an object store, read in ranges of one and the same version; each is tried again as `Location` does.

    Raises OSError, here and when it is read, as `Location.stat` and `Location.read_range` do.
    """

    def __init__(self, place: "Location") -> None:
        self._place, self._at = place, 0
        self._stat = place.stat()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stat.bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._stat.bytes - self._at)
        if length <= 0:
            return 0
        content = self._read(length)
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._read(max(self._stat.bytes - self._at, 0))  # at once; the inherited one reads 8 KiB at a time

    def _read(self, length: int) -> bytes:
        content = self._place.read_range(self._at, length, self._stat.version or None)
        self._at += len(content)
        return content
