"""Files anywhere: a thin, typed layer over fsspec, used for shards, manifests and checkpoints alike."""

import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rdm_scale.errors import ConfigError


class Location:
    """A file or folder on any fsspec file system (local path, s3://, memory://, ...).

    Whatever goes wrong at a file system is raised as OSError.

    Raises:
        ConfigError: the URL names a file system that is unknown, or whose library is not installed.
    """

    def __init__(self, url: str | Path, _fs: fsspec.AbstractFileSystem | None = None) -> None:
        if _fs is None:
            try:
                _fs, path = fsspec.core.url_to_fs(str(url))
            except (ValueError, ImportError) as error:
                raise ConfigError(f"{url} cannot be used, give a path or another URL: {error}") from None
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
        return isinstance(self.fs, LocalFileSystem)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> "Location":
        return Location(posixpath.dirname(self.path), self.fs)

    def exists(self) -> bool:
        with _os_errors():
            return bool(self.fs.exists(self.path))

    def is_dir(self) -> bool:
        with _os_errors():
            return bool(self.fs.isdir(self.path))

    def size(self) -> int:
        """Bytes of the file. Raises FileNotFoundError."""
        with _os_errors():
            return int(self.fs.info(self.path)["size"])

    def names(self) -> list[str]:
        """Names of the entries of this folder, sorted; empty when there is no such folder."""
        try:
            with _os_errors():
                self.fs.invalidate_cache(self.path)
                paths = [path.rstrip("/") for path in self.fs.ls(self.path, detail=False)]
        except FileNotFoundError:
            return []
        # A file lists itself, and so does a folder of an object store that has a marker.
        return sorted(posixpath.basename(path) for path in paths if path != self.path)

    def read(self) -> bytes:
        with _os_errors():
            return bytes(self.fs.cat_file(self.path))

    def read_range(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer when the file ends before."""
        with _os_errors():
            return bytes(self.fs.cat_file(self.path, start=offset, end=offset + length))

    def open(self, mode: str = "rb") -> Any:
        return self.fs.open(self.path, mode)

    def make_dir(self) -> None:
        with _os_errors():
            self.fs.makedirs(self.path, exist_ok=True)

    def write(self, content: bytes) -> None:
        """Writes the whole file or nothing: object stores do so by nature, a local file is renamed into place."""
        if not self.is_local:
            with _os_errors():
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
        with _os_errors():
            self.fs.rm(self.path, recursive=True)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Clients of object stores have exceptions of their own, for instance botocore's for missing credentials."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
