"""Files anywhere: a thin, typed layer over fsspec, used for shards, manifests and checkpoints alike."""

import os
import posixpath
from pathlib import Path
from typing import Any

import fsspec


class Location:
    """A file or folder on any fsspec file system (local path, s3://, memory://, ...)."""

    def __init__(self, url: str | Path, _fs: fsspec.AbstractFileSystem | None = None) -> None:
        if _fs is None:
            _fs, path = fsspec.core.url_to_fs(str(url))
        else:
            path = str(url)
        self.fs: Any = _fs
        self.path: str = path.rstrip("/") or "/"

    def __truediv__(self, name: str) -> "Location":
        return Location(posixpath.join(self.path, name), self.fs)

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    __repr__ = __str__

    @property
    def is_local(self) -> bool:
        return "file" in self.fs.protocol

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> "Location":
        return Location(posixpath.dirname(self.path), self.fs)

    def exists(self) -> bool:
        return bool(self.fs.exists(self.path))

    def is_dir(self) -> bool:
        return bool(self.fs.isdir(self.path))

    def size(self) -> int:
        """Bytes of the file. Raises FileNotFoundError."""
        return int(self.fs.info(self.path)["size"])

    def names(self) -> list[str]:
        """Names of the entries of this folder, sorted; empty when there is no such folder."""
        try:
            self.fs.invalidate_cache(self.path)
            return sorted(posixpath.basename(p.rstrip("/")) for p in self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []

    def read(self) -> bytes:
        return bytes(self.fs.cat_file(self.path))

    def read_range(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer when the file ends before."""
        return bytes(self.fs.cat_file(self.path, start=offset, end=offset + length))

    def open(self, mode: str = "rb") -> Any:
        return self.fs.open(self.path, mode)

    def make_dir(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)

    def write(self, content: bytes) -> None:
        """Writes the whole file or nothing: object stores do so by nature, a local file is renamed into place."""
        if not self.is_local:
            self.fs.pipe_file(self.path, content)
            return
        partial = Path(f"{self.path}.partial-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Removes a file, or a folder with all that is in it."""
        self.fs.rm(self.path, recursive=True)
