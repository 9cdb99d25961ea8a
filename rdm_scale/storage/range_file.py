"""A read-only file object over range reads of an object of a store."""

import io
from typing import Any

from rdm_scale.storage.backend import StorageBackend


class RangeFile(io.RawIOBase):
    """An object of a store as a seekable file. All reads are of the version that was current when it was opened.

    Raises OSError, from the constructor and from reads, as `stat` and `read_range` of the backend do.
    """

    def __init__(self, backend: StorageBackend, path: str) -> None:
        self._backend, self._path, self._position = backend, path, 0
        self._stat = backend.stat(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stat.bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._stat.bytes - self._position)
        if length <= 0:
            return 0
        content = self._read(length)
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        # in one request: the inherited method reads 8 KiB at a time
        return self._read(max(self._stat.bytes - self._position, 0))

    def _read(self, length: int) -> bytes:
        content = self._backend.read_range(self._path, self._position, length, self._stat.version or None)
        self._position += len(content)
        return content
