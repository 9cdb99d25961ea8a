"""Files and folders by path or URL: the one interface to storage for shards, manifests, checkpoints and media.

A `Location` is a path on a storage backend: the local disk (`local_files`), S3 (`s3_store`), or any other file system
of fsspec (`object_store`). Calls to object stores are retried after transient errors, see `storage.retries`.
"""

import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from rdm_scale.errors import ConfigError
from rdm_scale.storage.backend import ReplacedError, Stat, StorageBackend, Walk
from rdm_scale.storage.context import PROCESS, current_retry, retrying, set_retry
from rdm_scale.storage.local_files import LocalFiles
from rdm_scale.storage.object_store import ObjectStore
from rdm_scale.storage.retries import Retry
from rdm_scale.storage.s3_store import S3Store

__all__ = ["Location", "ReplacedError", "Retry", "Stat", "Walk", "current_retry", "retrying", "set_retry"]

_S3_SCHEMES = ("s3", "s3a")
Options: TypeAlias = Mapping[str, Any] | AbstractFileSystem | StorageBackend | None


class Location:
    """A file or folder on any fsspec file system (local path, s3://, memory://, ...).

    Every method may be called from several threads at once. Any failure of a file system is raised as OSError with a
    message that names the location: PermissionError for refused credentials, FileNotFoundError for a missing file or
    bucket; for a transient failure only after `Retry.attempts` attempts or `Retry.budget_s` seconds.

    Args:
        url: path or URL.
        options: of the fsspec file system; S3 credentials, endpoint and region default to the AWS_* environment
            variables. Or the file system itself, if `url` is a path on it.

    Raises:
        ConfigError: the file system of the URL is unknown, its library is not installed, or it does not have these
            options.
    """

    def __init__(self, url: str | Path, options: Options = None) -> None:
        opened = _open(str(url), options)
        self._backend = opened.backend
        self.path: str = opened.path.rstrip("/") or "/"

    def at(self, path: str) -> "Location":
        """Another location on the same file system, by its path or URL."""
        return Location(self._backend.path_of(path), self._backend)

    def __truediv__(self, name: str) -> "Location":
        return Location(posixpath.join(self.path, name), self._backend)

    def __str__(self) -> str:
        return self._backend.url(self.path)

    __repr__ = __str__

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> "Location":
        return Location(posixpath.dirname(self.path), self._backend)

    @property
    def is_local(self) -> bool:
        """True if the file is on this machine, so that other libraries can open it by its path."""
        return self._backend.is_local

    @property
    def fs(self) -> AbstractFileSystem:
        """The file system of fsspec."""
        return self._backend.fs

    @property
    def schemes(self) -> tuple[str, ...]:
        """The URL schemes of the file system, for instance ("s3", "s3a")."""
        protocol = self.fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    @property
    def resolved(self) -> str:
        """The one path or URL of the place: absolute, without links on the local disk."""
        return os.path.realpath(self.path) if self.is_local else str(self)

    def is_inside(self, folder: "Location") -> bool:
        """True if this is a folder or lies in it, however both are written."""
        return self.resolved == folder.resolved or self.resolved.startswith(posixpath.join(folder.resolved, ""))

    # ---- folders

    def exists(self) -> bool:
        return self._backend.exists(self.path)

    def is_dir(self) -> bool:
        return self._backend.is_dir(self.path)

    def make_dir(self) -> None:
        """Create the folder and its parents, if the store has folders. It may exist."""
        self._backend.make_dir(self.path)

    def names(self) -> list[str]:
        """Names of the entries of this folder, sorted; empty when there is no such folder."""
        return self._backend.names(self.path)

    def stats(self) -> dict[str, Stat]:
        """The files of this folder by name, from one listing; empty when there is no such folder."""
        return self._backend.stats(self.path)

    def find(self) -> dict[str, Stat]:
        """The files below this folder at any depth, see `walk`; empty when there is no such folder."""
        return self.walk().files

    def walk(self) -> Walk:
        """All entries below this folder at any depth, by relative path; empty when there is no such folder.

        Links are followed, and those to a folder that they lie in are noticed. Hidden folders, whose names begin with a
        dot, are not entered. Raises OSError: a folder below cannot be listed.
        """
        return self._backend.walk(self.path)

    def glob(self) -> list["Location"]:
        """The files and folders that match this location, whose path is a pattern with *, ? and [...]; sorted."""
        return [Location(path, self._backend) for path in self._backend.glob(self.path)]

    # ---- files

    def size(self) -> int:
        """Bytes of the file. Raises FileNotFoundError."""
        return self.stat().bytes

    def stat(self) -> Stat:
        """Size and version of the file. Raises FileNotFoundError, IsADirectoryError."""
        return self._backend.stat(self.path)

    def read(self) -> bytes:
        """The content of the file. Raises FileNotFoundError."""
        return self._backend.read(self.path)

    def read_range(self, offset: int, length: int, version: str | None = None) -> bytes:
        """`length` bytes from `offset`; fewer if the file ends earlier.

        Args:
            version: from `stat`. Local files and stores with conditional reads (S3) refuse to read another version.

        Raises:
            FileNotFoundError, ReplacedError: there is no such file, or another version of it.
        """
        return self._backend.read_range(self.path, offset, length, version)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill a buffer with the bytes from `offset` on, without an intermediate copy.

        Returns the number of bytes read, fewer than the buffer has at the end of the file. Raises FileNotFoundError.
        """
        return self._backend.read_into(self.path, offset, buffer)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open as a binary file. Files of an object store are seekable when read, and their range reads are retried."""
        return self._backend.open(self.path, mode)

    def write(self, content: bytes) -> None:
        """Write the file atomically: a reader sees the old content or the new, never a part."""
        self._backend.write(self.path, content)

    def write_if(self, content: bytes, version: str | None) -> None:
        """Write the file if it still has this version, from `stat`; None: if it does not exist.

        On S3 and for new local files this is one operation. Elsewhere another writer may come between the comparison
        and the write: read the file again to find out.

        Raises:
            ReplacedError: it has another version.
        """
        self._backend.write_if(self.path, content, version)

    def modified(self) -> float:
        """Time of the last write by the clock of the store, in seconds since 1970. Raises FileNotFoundError."""
        return self._backend.modified(self.path)

    def remove(self) -> None:
        """Remove a file, or a folder with all its content."""
        self._backend.remove(self.path)


class _Opened(NamedTuple):
    backend: StorageBackend
    path: str


def _open(url: str, options: Options) -> _Opened:
    if isinstance(options, StorageBackend):
        return _Opened(options, url)
    if isinstance(options, AbstractFileSystem):
        return _Opened(_backend_of(options), url)
    given = dict(options or {})
    try:
        if url.partition("://")[0] in _S3_SCHEMES:
            client = PROCESS.s3_client(given)
            backend = S3Store(client)
            return _Opened(backend, backend.path_of(url))
        fs, path = fsspec.core.url_to_fs(url, **given)
    except (ValueError, ImportError, TypeError) as error:
        used = f" with the options {', '.join(given)}" if given else ""
        raise ConfigError(f"{url} cannot be used{used}, give a path or another URL: {error}") from None
    return _Opened(_backend_of(fs), str(path))


def _backend_of(fs: AbstractFileSystem) -> StorageBackend:
    if isinstance(fs, LocalFileSystem):
        return LocalFiles(fs)
    if "s3" in fs.protocol:
        from rdm_scale.storage.s3_client import S3Client  # takes half a second

        if isinstance(fs, S3Client):
            return S3Store(fs)
    return ObjectStore(fs)
