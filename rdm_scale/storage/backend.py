"""The interface of storage backends: what `Location` needs of a file system."""

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import datetime
from typing import IO, Any, ClassVar, NamedTuple

from fsspec import AbstractFileSystem

_VERSIONS = ("ETag", "etag", "generation", "content_md5", "md5", "LastModified", "last_modified", "created", "mtime")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


class Stat(NamedTuple):
    """Size of a file, and a string that changes when it is replaced: the ETag on S3, mtime_ns of local files."""

    bytes: int
    version: str


class ReplacedError(OSError):
    """The file is no longer the requested version."""


class StorageBackend(ABC):
    """Files and folders of one fsspec file system, by path. `Location` documents each operation.

    Every method may be called from several threads at once, and raises OSError with a message that names the file.
    """

    is_local: ClassVar[bool] = False

    def __init__(self, fs: AbstractFileSystem) -> None:
        self.fs = fs

    def url(self, path: str) -> str:
        """The path or URL as a user would write it."""
        return str(self.fs.unstrip_protocol(path))

    def path_of(self, url: str) -> str:
        """The path in a URL of this file system."""
        return str(self.fs._strip_protocol(url))

    @abstractmethod
    def _call(self, path: str, method: str, **options: Any) -> Any:
        """Call a method of `fs` that only reads, and return its result."""

    # ---- folders

    def exists(self, path: str) -> bool:
        return bool(self._call(path, "exists"))

    def is_dir(self, path: str) -> bool:
        return bool(self._call(path, "isdir"))

    def make_dir(self, path: str) -> None:
        self._call(path, "makedirs", exist_ok=True)

    def names(self, path: str) -> list[str]:
        return sorted(self._entries(path))

    def stats(self, path: str) -> dict[str, Stat]:
        return {name: stat_of(info) for name, info in self._entries(path).items() if info["type"] == "file"}

    def find(self, path: str) -> dict[str, Stat]:
        try:
            found = self._call(path, "find", detail=True)
        except FileNotFoundError:
            return {}
        below = {each[len(path) :].lstrip("/"): info for each, info in found.items() if each != path}
        return {name: stat_of(info) for name, info in sorted(below.items())}

    def glob(self, pattern: str) -> list[str]:
        return sorted(self._call(pattern, "glob"))

    def _entries(self, path: str) -> dict[str, Mapping[str, Any]]:
        """Fsspec's description of each entry of a folder, by name."""
        try:
            found = self._call(path, "ls", detail=True)
        except FileNotFoundError:
            return {}
        # fsspec lists a file as its own only entry
        return {posixpath.basename(e["name"].rstrip("/")): e for e in found if e["name"].rstrip("/") != path}

    # ---- files

    @abstractmethod
    def stat(self, path: str) -> Stat: ...

    @abstractmethod
    def read(self, path: str) -> bytes: ...

    @abstractmethod
    def read_range(self, path: str, offset: int, length: int, version: str | None) -> bytes: ...

    @abstractmethod
    def read_into(self, path: str, offset: int, buffer: memoryview) -> int: ...

    @abstractmethod
    def open(self, path: str, mode: str) -> IO[bytes]: ...

    @abstractmethod
    def write(self, path: str, content: bytes) -> None: ...

    def write_if(self, path: str, content: bytes, version: str | None) -> None:
        """Write if the file has this version; checked before the write, where the store has no conditional writes."""
        try:
            found = self.stat(path).version
        except FileNotFoundError:
            found = None
        if found != version:
            raise ReplacedError(f"{self.url(path)} is no longer version {version}: it was replaced")
        self.write(path, content)

    def modified(self, path: str) -> float:
        info = self._call(path, "info")
        found = next((info[name] for name in _TIMES if info.get(name)), None)
        if found is None:
            raise OSError(f"the store of {self.url(path)} does not say when it was written")
        return found.timestamp() if isinstance(found, datetime) else float(found)

    @abstractmethod
    def remove(self, path: str) -> None: ...


def stat_of(info: Mapping[str, Any]) -> Stat:
    """Size and version from fsspec's description of a file."""
    version = next((info[name] for name in _VERSIONS if info.get(name)), "")
    if isinstance(version, datetime):  # listings of some stores give a datetime where `info` gives seconds
        version = version.timestamp()
    return Stat(int(info["size"] or 0), str(version).strip('"'))
