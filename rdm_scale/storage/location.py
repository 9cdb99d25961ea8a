"""Files anywhere: a thin, typed layer over fsspec, used for shards, manifests and checkpoints alike.

Calls to object stores that fail for a reason that may pass are tried again, see `rdm_scale.storage.retries`.
"""

import io
import os
import posixpath
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from stat import S_ISDIR
from typing import Any, NamedTuple, TypeVar, cast

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from rdm_scale.errors import ConfigError
from rdm_scale.storage.range_file import RangeFile
from rdm_scale.storage.retries import (
    GaveUpError,
    Retry,
    call_with_retries,
    current_retry,
    describe,
    retrying,
    set_retry,
)

__all__ = ["Location", "ReplacedError", "Retry", "Stat", "current_retry", "retrying", "set_retry"]

T = TypeVar("T")
_S3 = ("s3", "s3a")
_BUFFER_BYTES = 2**22  # of files that are read through `Location.open`
_PARTS_BYTES = 100 * 2**20  # from here on, s3fs uploads in parts
_VERSIONS = ("ETag", "etag", "generation", "content_md5", "md5", "LastModified", "last_modified", "created", "mtime")


class Stat(NamedTuple):
    """Size of a file, and what changes when it is replaced: the ETag on S3, mtime_ns of local files."""

    bytes: int
    version: str


class ReplacedError(OSError):
    """A file is no longer the version that was asked for."""


class Location:
    """A file or folder on any fsspec file system (local path, s3://, memory://, ...).

    Every method may be called from several threads at once. Whatever goes wrong at a file system is raised as OSError,
    with a message that says where: PermissionError for refused credentials, FileNotFoundError for a missing file or
    bucket, and for what may pass only after `Retry.attempts` tries or `Retry.budget_s` seconds.

    Args:
        options: of the fsspec file system, or the file system itself. S3 credentials, endpoint and region come from
            the AWS_* environment variables where the options do not give them.

    Raises:
        ConfigError: the URL names a file system that is unknown, or whose library is not installed; or it does not
            have such options.
    """

    def __init__(self, url: str | Path, options: Mapping[str, Any] | fsspec.AbstractFileSystem | None = None) -> None:
        if options is None or isinstance(options, Mapping):
            self.fs, path = _open_file_system(str(url), dict(options or {}))
        else:
            self.fs, path = options, str(url)
        self.path: str = path.rstrip("/") or "/"
        self.is_local: bool = isinstance(self.fs, LocalFileSystem)

    def __truediv__(self, name: str) -> "Location":
        return Location(posixpath.join(self.path, name), self.fs)

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    __repr__ = __str__

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> "Location":
        return Location(posixpath.dirname(self.path), self.fs)

    # ---- what there is

    def exists(self) -> bool:
        return bool(self._call("exists"))

    def is_dir(self) -> bool:
        if not self._is_s3:
            return bool(self._call("isdir"))
        try:  # s3fs's isdir would list all of it
            return bool(self._call("info")["type"] == "directory")
        except FileNotFoundError:
            return False

    def size(self) -> int:
        """Bytes of the file. Raises FileNotFoundError."""
        return self.stat().bytes

    def stat(self) -> Stat:
        """Size and version of the file. Raises FileNotFoundError, IsADirectoryError."""
        if self.is_local:
            found = os.stat(self.path)  # noqa: PTH116
            if not S_ISDIR(found.st_mode):
                return _local_stat(found)
            raise IsADirectoryError(f"{self} is a folder, not a file")
        info = self._call("info")
        if info["type"] == "directory":
            raise IsADirectoryError(f"{self} is a folder, not a file")
        return _stat(info)

    def names(self) -> list[str]:
        """Names of the entries of this folder, sorted; empty when there is no such folder."""
        return sorted(self._entries())

    def stats(self) -> dict[str, Stat]:
        """The files of this folder by name, from one listing; empty when there is no such folder."""
        if self.is_local:
            return self._local_stats()
        return {name: _stat(info) for name, info in self._entries().items() if info["type"] == "file"}

    def find(self) -> dict[str, Stat]:
        """The files below this folder, at any depth, by their path relative to it; empty when there is no such."""
        if self._is_s3:
            return {name: _stat(info) for name, info in self._listing(deep=True).items() if info["type"] == "file"}
        try:
            found = self._call("find", detail=True)
        except FileNotFoundError:
            return {}
        below = {path[len(self.path) :].lstrip("/"): info for path, info in found.items() if path != self.path}
        return {path: _stat(info) for path, info in sorted(below.items())}

    def _entries(self) -> dict[str, Mapping[str, Any]]:
        if self._is_s3:
            return self._listing(deep=False)
        try:
            found = self._call("ls", detail=True)
        except FileNotFoundError:
            return {}
        # a file lists itself
        return {posixpath.basename(e["name"].rstrip("/")): e for e in found if e["name"].rstrip("/") != self.path}

    def _listing(self, deep: bool) -> dict[str, Mapping[str, Any]]:
        """From S3, by paths relative to this folder; each page is a call of its own, since there may be thousands."""
        entries: dict[str, Mapping[str, Any]] = {}
        after, more = "", True
        while more:
            page, after = self._tried("listed", partial(self.fs.list_page, self.path, deep, after))
            entries |= {entry["name"][len(self.path) + 1 :].rstrip("/"): entry for entry in page}
            more = bool(after)
        entries.pop("", None)  # a marker of the folder itself
        return entries

    def _local_stats(self) -> dict[str, Stat]:
        found: dict[str, Stat] = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a link that leads nowhere
                    if entry.is_file():
                        found[entry.name] = _local_stat(entry.stat())
        return found

    # ---- content

    def read(self) -> bytes:
        """All of the file. Raises FileNotFoundError."""
        if self.is_local:
            with open(self.path, "rb") as file:  # noqa: PTH123
                return file.read()
        return bytes(self._get(0, None, None))

    def read_range(self, offset: int, length: int, version: str | None = None) -> bytes:
        """`length` bytes from `offset`; fewer when the file ends before.

        Args:
            version: from `stat`; where the store can tell (S3), another version of the file is not read.

        Raises:
            FileNotFoundError, ReplacedError: there is no such file, or another version of it.
        """
        if self.is_local:
            content = bytearray(min(length, max(0, self.size() - offset)))  # callers may ask for more than there can be
            return bytes(memoryview(content)[: _preadv(self.path, offset, memoryview(content))])
        return bytes(self._get(offset, length, version)) if length else b""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills a buffer from `offset` on, without memory of its own. Returns how much there was, less at the end.

        Raises FileNotFoundError.
        """
        if self.is_local:
            return _preadv(self.path, offset, buffer)
        return len(self._get(offset, len(buffer), None, buffer)) if len(buffer) else 0

    def _get(
        self, offset: int, length: int | None, version: str | None, into: memoryview | None = None
    ) -> bytes | memoryview:
        end = None if length is None else offset + length
        bounds = {} if length is None else {"start": offset, "end": end}

        def attempt(left_s: float) -> bytes | memoryview:
            if self._is_s3 and (body := self.fs.get_body(self.path, offset, length, version, left_s, into)) is not None:
                return cast("bytes | memoryview", body.content)
            content = bytes(self._run("cat_file", left_s, (self.path,), bounds))
            if into is not None:
                into[: len(content)] = content
            return content

        try:
            return self._tried("read", attempt)
        except OSError as error:
            status = describe(error).status
            if status == 416 and length is not None:  # begins at the end of the file or beyond
                return b""
            if status == 412 and version is not None:
                raise ReplacedError(f"{self} is no longer version {version}: it was replaced") from None
            raise

    def open(self, mode: str = "rb") -> Any:
        """A file object. One read from an object store is seekable, and reads in ranges that are tried again."""
        if mode == "rb" and not self.is_local:
            return io.BufferedReader(RangeFile(self), _BUFFER_BYTES)
        try:
            return self.fs.open(self.path, mode)
        except Exception as error:
            raise self._explained("open", error) from error

    def make_dir(self) -> None:
        if not self._is_s3:  # where there are no folders, and s3fs would make a bucket that is missing
            self._call("makedirs", exist_ok=True)

    def write(self, content: bytes) -> None:
        """Writes the whole file or nothing: object stores do so by nature, a local file is renamed into place."""
        if not self.is_local:
            extra_s = len(content) / current_retry().slowest_bytes_s
            fs = self.fs.stubborn if self._is_s3 and len(content) >= _PARTS_BYTES else self.fs
            self._tried("written", lambda left_s: self._run("pipe_file", left_s, (self.path, content), fs=fs), extra_s)
            return
        unfinished = Path(f"{self.path}.partial-{os.getpid()}")
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Removes a file, or a folder with all that is in it."""
        tries = 0

        def attempt(left_s: float) -> None:
            nonlocal tries
            tries += 1
            try:
                self._run("rm", left_s, (self.path,), {"recursive": True})
            except FileNotFoundError:
                if tries == 1:
                    raise  # later: a try before has worked, and its answer was lost

        self._tried("removed", attempt)

    # ---- calls

    @property
    def _is_s3(self) -> bool:
        return hasattr(self.fs, "get_body")

    def _call(self, method: str, **options: Any) -> Any:
        """A method of the file system that reads, never from its cache."""
        if not self.is_local:
            self.fs.invalidate_cache(self.path)
        return self._tried("read", lambda left_s: self._run(method, left_s, (self.path,), options))

    def _run(
        self, method: str, left_s: float, arguments: tuple[Any, ...], options: Mapping[str, Any] = {}, fs: Any = None
    ) -> Any:
        fs = fs or self.fs
        if isinstance(fs, AsyncFileSystem):
            return sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=left_s, **options)
        return getattr(fs, method)(*arguments, **options)

    def _tried(self, done: str, attempt: Callable[[float], T], extra_s: float = 0.0) -> T:
        try:
            return attempt(0) if self.is_local else call_with_retries(str(self), attempt, extra_s)
        except Exception as error:
            if self.is_local and isinstance(error, OSError):
                raise
            raise self._explained(done, error) from error

    def _explained(self, done: str, error: Exception) -> OSError:
        failure = describe(error)
        bucket = self.path.split("/")[0] if self._is_s3 else ""
        if isinstance(error, GaveUpError):
            store = f" at {self.fs.endpoint}" if self._is_s3 else ""
            return OSError(
                f"{self} could not be {done}{store}: {error}. The store or the network to it is failing: "
                "try later, or allow more time with data.read_timeout_s"
            )
        if failure.code == "NoSuchBucket":
            return FileNotFoundError(
                f"there is no bucket {bucket!r} for {self} at {self.fs.endpoint}: check its name and AWS_ENDPOINT_URL"
            )
        if failure.status == 404 or isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"{self} does not exist")
        if failure.status in (401, 403) or isinstance(error, PermissionError):
            return PermissionError(f"{self} could not be {done}: {self._refusal(bucket, failure.code, failure.text)}")
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            return PermissionError(
                f"{self} could not be {done}, there are no credentials for it ({error}): set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or the option anon=true for a public bucket"
            )
        text = failure.text if failure.status or isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return OSError(f"{self} could not be {done}: {text}")

    def _refusal(self, bucket: str, code: str, text: str) -> str:
        if not bucket:
            return text
        checks = {
            "InvalidAccessKeyId": "it does not know this AWS_ACCESS_KEY_ID",
            "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
            "ExpiredToken": "the AWS_SESSION_TOKEN has run out",
            "RequestTimeTooSkewed": "the clock of this machine is wrong",
        }
        reason = checks.get(code, "the credentials are wrong, or have no right to it")
        return (
            f"bucket {bucket!r} at {self.fs.endpoint} refuses it ({text}): {reason}. "
            "Check the AWS_* environment variables, or data.options"
        )


def _open_file_system(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    scheme = url.partition("://")[0]
    try:
        if scheme in _S3:
            fs = _s3(options)
            return fs, str(fs._strip_protocol(url))
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))
    except (ValueError, ImportError, TypeError) as error:
        used = f" with the options {', '.join(options)}" if options else ""
        raise ConfigError(f"{url} cannot be used{used}, give a path or another URL: {error}") from None


_made: dict[tuple[Any, ...], Any] = {}
_made_lock = threading.Lock()


def _s3(options: dict[str, Any]) -> Any:
    """One client for all threads. fsspec would make one for each, and keep it after the environment has changed."""
    from rdm_scale.storage.s3 import S3  # takes half a second

    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    key = os.getpid(), repr(sorted(options.items())), environment, current_retry().stall_s
    with _made_lock:
        if key not in _made:
            _made[key] = S3(options)
        return _made[key]


def _stat(info: Mapping[str, Any]) -> Stat:
    version = next((info[name] for name in _VERSIONS if info.get(name)), "")
    if isinstance(version, datetime):  # one listing gives these where another gives seconds
        version = version.timestamp()
    return Stat(int(info["size"] or 0), str(version).strip('"'))


def _local_stat(found: os.stat_result) -> Stat:
    return Stat(found.st_size, str(found.st_mtime_ns))


def _preadv(path: str, offset: int, buffer: memoryview) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(buffer):  # the system reads less than 2 GiB at once
            more = os.preadv(descriptor, [buffer[done:]], offset + done)
            if not more:
                break
            done += more
        return done
    finally:
        os.close(descriptor)
