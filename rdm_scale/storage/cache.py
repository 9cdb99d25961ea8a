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
_ABANDONED_NS = 3600 * 10**9  # an unfinished file that is older belongs to a process that died
_LOW_WATER = 0.9  # of the limit; evicting down to it makes scans of all files rare


class MemberCache:
    """Least-recently-used cache of byte ranges, by keys that identify their content, such as a checksum and a size.

    Any number of threads and processes may use one folder at the same time. The limit holds to within one range per
    process: what a killed process was about to write is counted until the next eviction.

    Args:
        folder: created if missing; it must contain nothing else.
        limit_bytes: total size of all files. Larger ranges are not cached.

    Raises:
        ConfigError: the folder cannot be created or written to.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._total() as total:
                self._evict(total, 0)
            probe = self.folder / f"probe{_PARTIAL}{os.getpid()}-{threading.get_ident()}"
            probe.write_bytes(bytes(2**16))  # on a full disk, creating an empty file still succeeds
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the cache folder {folder} cannot be used: {error.strerror or error}. Make room or set data.cache_dir "
                "to a folder that can be written to, or to null for no cache"
            ) from None

    def get(self, key: str) -> bytes | None:
        """The content stored under the key, or None. It is not verified: the disk may have damaged it."""
        try:
            with self._path(key).open("rb") as file:
                content = file.read()
                os.utime(file.fileno())  # the time of last use
                return content
        except OSError:
            return None

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Store the content, replacing any under the same key. A failure of the disk is only logged, once."""
        path = self._path(key)
        if len(content) > self.limit_bytes:
            return
        try:
            if not path.exists():
                with self._total() as total:
                    if total.value + len(content) > self.limit_bytes:
                        self._evict(total, len(content))
                    total.value += len(content)
            self._store(path, content)
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning("the cache %s cannot be written to: %s", self.folder, error.strerror or error)

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
        """The total size of all files, under a lock against other processes and threads."""
        descriptor = os.open(self.folder / _TOTAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released when the file is closed, or the process dies
            written = os.read(descriptor, 32)
            total = _Total(int(written) if written.isdigit() else 0)
            yield total
            os.pwrite(descriptor, b"%032d" % total.value, 0)
        finally:
            os.close(descriptor)

    def _evict(self, total: "_Total", room: int) -> None:
        """Count all files, and evict the least recently used until there is room for `room` bytes more."""
        found: list[tuple[int, int, str]] = []  # time of last use, size, path
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process has renamed or removed it
                    if entry.name != _TOTAL:
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        total.value = sum(size for _, size, _ in found)
        if total.value + room <= self.limit_bytes:
            return
        abandoned_ns = time.time_ns() - _ABANDONED_NS
        for used_ns, size, path in sorted(found):
            if total.value + room <= self.limit_bytes * _LOW_WATER:
                break
            if _PARTIAL not in path or used_ns < abandoned_ns:
                Path(path).unlink(missing_ok=True)
                total.value -= size


class _Total:
    """Total size of the cache, in bytes, written back at the end of `MemberCache._total`."""

    def __init__(self, value: int) -> None:
        self.value = value
