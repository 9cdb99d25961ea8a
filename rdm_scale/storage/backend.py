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


class Walk(NamedTuple):
    """All entries below a folder, at any depth, by their paths relative to it."""

    files: dict[str, Stat]
    others: dict[str, str]  # what is neither a file nor a folder that was entered, and what it is instead


HIDDEN_FOLDER = "hidden folders"
BROKEN_LINK = "links that lead to nothing"
CYCLIC_LINK = "links to a folder that they lie in"
SPECIAL_FILE = "special files (pipes, sockets, devices)"


class ReplacedError(OSError):
    """The file is no longer the requested version."""


def check_version(name: str, found: Stat, version: str | None) -> None:
    """Raise ReplacedError if a file is not of the version that was requested, if one was."""
    if version and found.version != version:
        raise ReplacedError(f"{name} is no longer version {version}: it was replaced")


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

    def walk(self, path: str) -> Walk:
        """Folder by folder: fsspec's own `find` leaves out, without a word, folders that cannot be listed."""
        files: dict[str, Stat] = {}
        others: dict[str, str] = {}
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            entries = self._entries(posixpath.join(path, folder).rstrip("/") or "/", missing=bool(folder))
            for name, info in entries.items():
                below = f"{folder}/{name}".lstrip("/")
                if info["type"] == "file":
                    files[below] = stat_of(info)
                elif info["type"] != "directory":
                    others[below] = SPECIAL_FILE
                elif name.startswith("."):
                    others[below] = HIDDEN_FOLDER
                else:
                    waiting.append(below)
        return Walk(dict(sorted(files.items())), dict(sorted(others.items())))

    def glob(self, pattern: str) -> list[str]:
        return sorted(self._call(pattern, "glob"))

    def _entries(self, path: str, *, missing: bool = False) -> dict[str, Mapping[str, Any]]:
        """Fsspec's description of each entry of a folder, by name.

        Args:
            missing: raise FileNotFoundError if there is no such folder; otherwise it is as an empty one.
        """
        try:
            found = self._call(path, "ls", detail=True)
        except FileNotFoundError:
            if missing:
                raise
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
