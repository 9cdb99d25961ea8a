"""Any remote fsspec file system as a storage backend: calls are retried, errors name the object."""

import io
from collections.abc import Callable
from functools import partial
from typing import IO, Any, TypeVar, cast

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync

from rdm_scale.storage.backend import ReplacedError, Stat, StorageBackend, stat_of
from rdm_scale.storage.context import current_retry
from rdm_scale.storage.range_file import RangeFile
from rdm_scale.storage.retries import Failure, GaveUpError, call_with_retries, describe

T = TypeVar("T")
_BUFFER_BYTES = 2**22  # of files that are read through `open`
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # botocore's


class ObjectStore(StorageBackend):
    """Objects of a store, through fsspec. Calls that fail for a transient reason are retried (`storage.retries`)."""

    # ---- reading

    def stat(self, path: str) -> Stat:
        info = self._call(path, "info")
        if info["type"] == "directory":
            raise IsADirectoryError(f"{self.url(path)} is a folder, not a file")
        return stat_of(info)

    def read(self, path: str) -> bytes:
        return bytes(self._get(path, 0, None))

    def read_range(self, path: str, offset: int, length: int, version: str | None) -> bytes:
        return bytes(self._get(path, offset, length, version)) if length else b""

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        return len(self._get(path, offset, len(buffer), into=buffer)) if len(buffer) else 0

    def open(self, path: str, mode: str) -> IO[bytes]:
        if mode == "rb":
            return io.BufferedReader(RangeFile(self, path), _BUFFER_BYTES)
        try:
            return cast(IO[bytes], self.fs.open(path, mode))
        except Exception as error:
            raise self._os_error(path, "opened", error) from error

    def _get(
        self, path: str, offset: int, length: int | None, version: str | None = None, into: memoryview | None = None
    ) -> bytes | memoryview:
        """Read a range of an object, or all of it, into a buffer if one is given."""
        try:
            return self._retried(path, "read", partial(self._get_once, path, offset, length, version, into))
        except OSError as error:
            status = describe(error).status
            if status == 416 and length is not None:  # the range begins at the end of the object or beyond
                return b""
            if status == 412 and version is not None:
                raise ReplacedError(f"{self.url(path)} is no longer version {version}: it was replaced") from None
            raise

    def _get_once(
        self, path: str, offset: int, length: int | None, version: str | None, into: memoryview | None, limit_s: float
    ) -> bytes | memoryview:
        """One request. The version is ignored here: fsspec has no conditional reads."""
        bounds = {} if length is None else {"start": offset, "end": offset + length}
        content = bytes(self._run(self.fs, "cat_file", limit_s, path, **bounds))
        if into is not None:
            into[: len(content)] = content
        return content

    # ---- writing

    def write(self, path: str, content: bytes) -> None:
        extra_s = len(content) / current_retry().slowest_bytes_s
        fs = self._upload_client(len(content))
        self._retried(path, "written", lambda left_s: self._run(fs, "pipe_file", left_s, path, content), extra_s)

    def _upload_client(self, size: int) -> AbstractFileSystem:
        """The file system that uploads an object of `size` bytes."""
        return self.fs

    def remove(self, path: str) -> None:
        attempts = 0

        def attempt(left_s: float) -> None:
            nonlocal attempts
            attempts += 1
            try:
                self._run(self.fs, "rm", left_s, path, recursive=True)
            except FileNotFoundError:
                if attempts == 1:
                    raise  # on a retry, an earlier attempt has removed it and its answer was lost

        self._retried(path, "removed", attempt)

    # ---- calls

    def _call(self, path: str, method: str, **options: Any) -> Any:
        self.fs.invalidate_cache(path)
        return self._retried(path, "read", lambda left_s: self._run(self.fs, method, left_s, path, **options))

    @staticmethod
    def _run(fs: AbstractFileSystem, method: str, limit_s: float, *arguments: Any, **options: Any) -> Any:
        """The result of a method of `fs`, within `limit_s` seconds where the file system is asynchronous."""
        if isinstance(fs, AsyncFileSystem):
            return sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=limit_s, **options)
        return getattr(fs, method)(*arguments, **options)

    def _retried(self, path: str, action: str, attempt: Callable[[float], T], extra_s: float = 0.0) -> T:
        try:
            return call_with_retries(self.url(path), attempt, current_retry(), extra_s)
        except Exception as error:
            raise self._os_error(path, action, error) from error

    # ---- errors

    def _os_error(self, path: str, action: str, error: Exception) -> OSError:
        """The OSError for a client's error. `action` is the participle in "could not be read", "... written" etc."""
        name, failure = self.url(path), describe(error)
        if isinstance(error, GaveUpError):
            return OSError(
                f"{name} could not be {action}{self._at_endpoint()}: {error}. The store or its network is failing: try "
                "later, or allow more time with data.read_timeout_s"
            )
        if failure.code == "NoSuchBucket":
            return FileNotFoundError(self._no_bucket(path))
        if failure.status == 404 or isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"{name} does not exist")
        if failure.status in (401, 403) or isinstance(error, PermissionError):
            return PermissionError(f"{name} could not be {action}: {self._refusal(path, failure)}")
        if type(error).__name__ in _NO_CREDENTIALS:
            return PermissionError(
                f"{name} could not be {action}, there are no credentials for it ({error}): set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or the option anon=true for a public bucket"
            )
        text = failure.text if failure.status or isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return OSError(f"{name} could not be {action}: {text}")

    def _at_endpoint(self) -> str:
        """The address of the store, for messages; empty if it is part of the URL."""
        return ""

    def _no_bucket(self, path: str) -> str:
        return f"{self.url(path)} does not exist: its bucket is missing"

    def _refusal(self, path: str, failure: Failure) -> str:
        """Why access was denied, and what to check."""
        return failure.text
