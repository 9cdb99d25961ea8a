"""A cache of immutable byte ranges on the local disk, shared by the processes of a machine."""

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rdm_scale.errors import ConfigError

_log = logging.getLogger(__name__)
_TOTAL, _PARTIAL = ".total", ".partial-"
_ABANDONED_NS = 3600 * 10**9  # after which an unfinished file belongs to a process that died
_LEAVE = 0.9  # of the limit, when there is too much: looking at every file is rare then


class MemberCache:
    """Byte ranges by keys that name their content for ever, such as a checksum and a size.

    Any number of threads and processes may use one folder at the same time. Those used least recently go first. The
    limit holds to within one range a process: what a process that is killed was about to write is counted until the
    next clearing.

    Args:
        folder: made if missing; nothing else may be in it.
        limit_bytes: how large all files may become together. Ranges larger than that are not kept.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._total() as total:
                self._clear(total, 0)
            probe = self.folder / f"probe{_PARTIAL}{os.getpid()}-{threading.get_ident()}"
            probe.write_bytes(bytes(2**16))  # a full disk takes names, but no content
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the cache folder {folder} cannot be used: {error.strerror or error}. Make room or set data.cache_dir "
                "to a folder that can be written to, or to null for no cache"
            ) from None

    def get(self, key: str) -> bytes | None:
        """What was put under the key, or None. Not checked: the disk may have damaged it."""
        try:
            with self._path(key).open("rb") as file:
                content = file.read()
                os.utime(file.fileno())  # used now
                return content
        except OSError:
            return None

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Keeps the content, if it can, in place of what is there. A disk that fails is warned of once."""
        path = self._path(key)
        if len(content) > self.limit_bytes:
            return
        try:
            if not path.exists():
                with self._total() as total:
                    if total.value + len(content) > self.limit_bytes:
                        self._clear(total, len(content))
                    total.value += len(content)
            self._store(path, content)
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning("the cache %s keeps nothing more: %s", self.folder, error.strerror or error)

    def _path(self, key: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", key):
            raise ValueError(f"{key!r} cannot be the name of a file of the cache")
        return self.folder / key

    def _store(self, path: Path, content: bytes | memoryview) -> None:
        unfinished = path.with_name(f"{path.name}{_PARTIAL}{os.getpid()}-{threading.get_ident()}")
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    @contextmanager
    def _total(self) -> Iterator["_Total"]:
        """The bytes of all files, while no other process or thread changes it."""
        descriptor = os.open(self.folder / _TOTAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # is given back when the file is closed, or the process dies
            written = os.read(descriptor, 32)
            total = _Total(int(written) if written.isdigit() else 0)
            yield total
            os.pwrite(descriptor, b"%032d" % total.value, 0)
        finally:
            os.close(descriptor)

    def _clear(self, total: "_Total", room: int) -> None:
        """Counts the files, and removes the oldest until there is room for `room` bytes more."""
        found: list[tuple[int, int, str]] = []  # time of last use, size, path
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process has renamed or removed it
                    if entry.name != _TOTAL:
                        seen = entry.stat()
                        found.append((seen.st_mtime_ns, seen.st_size, entry.path))
        total.value = sum(size for _, size, _ in found)
        if total.value + room <= self.limit_bytes:
            return
        abandoned_ns = time.time_ns() - _ABANDONED_NS
        for used_ns, size, path in sorted(found):
            if total.value + room <= self.limit_bytes * _LEAVE:
                break
            if _PARTIAL not in path or used_ns < abandoned_ns:
                Path(path).unlink(missing_ok=True)
                total.value -= size


class _Total:
    def __init__(self, value: int) -> None:
        self.value = value
