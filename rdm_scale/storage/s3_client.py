"""The S3 client: s3fs without its own retries (`storage.retries` does them), and with cheaper GETs.

botocore needs about 3 ms of CPU time per request, as much as receiving 2 MiB. A presigned URL serves many
ranges of its object, so botocore signs it once, and GETs use it with the HTTP client of the standard library.
"""

import functools
import io
import os
import re
import select
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import AioSession  # type: ignore[import-untyped]
from botocore.httpsession import get_cert_path
from fsspec.asyn import sync
from s3fs import S3FileSystem  # type: ignore[import-untyped]

from rdm_scale.storage.retries import ShortBodyError, StatusError

_SIGNED_S = 3600
_RESIGN_S = 300  # sooner than botocore lets temporary credentials expire
_IDLE_S = 15  # servers close idle connections after 20 s or more
_MAX_SIGNED = 100_000
_MAX_ERROR_BYTES = 2**16
_REDIRECTS = {301, 307, 308, 400}  # a bucket of another region: botocore finds it


class Body(NamedTuple):
    """Content of a response, and the version of the object: its ETag without quotes."""

    content: bytes | memoryview
    version: str


class Page(NamedTuple):
    """One page of a listing: entries as fsspec describes them, and the token of the next page ("" after the last)."""

    entries: list[dict[str, Any]]
    next_token: str


class S3Client(S3FileSystem):
    """s3fs with one attempt per request, no cache of listings, and GETs on presigned URLs.

    Args:
        options: of s3fs.
        stall_s: seconds without a byte after which a request of botocore is aborted.

    Raises:
        TypeError: an option that neither s3fs nor botocore knows.
    """

    retries = 1
    cachable = False  # fsspec would keep the client after the environment has changed

    def __init__(self, options: Mapping[str, Any], stall_s: float) -> None:
        settings = {"use_listings_cache": False, **options}
        config = {"max_pool_connections": 64, "signature_version": "s3v4", **(options.get("config_kwargs") or {})}
        client = dict(options.get("client_kwargs") or {})
        if not os.environ.get("AWS_DEFAULT_REGION") and os.environ.get("AWS_REGION") and "region_name" not in config:
            client.setdefault("region_name", os.environ["AWS_REGION"])  # botocore reads AWS_DEFAULT_REGION only
        self._retrying_options = {**settings, "config_kwargs": config, "client_kwargs": client}
        limits = {"read_timeout": stall_s, "connect_timeout": min(5.0, stall_s), "retries": {"total_max_attempts": 1}}
        AioConfig(**config)
        super().__init__(**{**self._retrying_options, "config_kwargs": {**config, **limits}})
        AioSession(**self.kwargs)
        self._needs_botocore = bool(self.s3_additional_kwargs or self.requester_pays or self.version_aware)
        self._needs_botocore |= "verify" in client or self.session is not None
        self._redirected: set[str] = set()  # buckets of another region
        self._signed: dict[str, tuple[SplitResult, float]] = {}
        self._idle: dict[tuple[str, str], list[tuple[HTTPConnection, float]]] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def retrying_client(self) -> S3FileSystem:
        """The same file system with the retries of s3fs and botocore, for uploads in many parts."""
        return S3FileSystem(**self._retrying_options, skip_instance_cache=True)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "r" not in mode:
            return self.retrying_client._open(path, mode, **options)
        return super()._open(path, mode, **options)

    @property
    def endpoint(self) -> str:
        """URL that requests go to, known after the first one."""
        return str(self._s3.meta.endpoint_url) if self._s3 is not None else self.endpoint_url or "its store"

    def list_page(self, path: str, deep: bool, token: str, limit_s: float) -> Page:
        """One page of a folder's listing: the first with token "". With `deep`, sub-folders are listed as well."""
        bucket, key, _ = self.split_path(path)
        options = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
        options |= {} if deep else {"Delimiter": "/"}
        options |= {"ContinuationToken": token} if token else {}
        page = sync(self.loop, self._call_s3, "list_objects_v2", timeout=limit_s, **options)
        entries = [
            {"name": f"{bucket}/{each['Prefix']}", "type": "directory", "size": 0}
            for each in page.get("CommonPrefixes", ())
        ]
        entries += [
            {"name": f"{bucket}/{each['Key']}", "type": "file", "size": each["Size"], "ETag": each["ETag"]}
            for each in page.get("Contents", ())
        ]
        return Page(entries, str(page["NextContinuationToken"]) if page.get("IsTruncated") else "")

    def get_body(
        self,
        path: str,
        start: int,
        length: int | None,
        version: str | None,
        limit_s: float,
        stall_s: float,
        into: memoryview | None = None,
    ) -> Body | None:
        """Send one GET to a presigned URL; None if only botocore can send the request, for instance through a proxy.

        Args:
            start, length: the range; the entire object if `length` is None.
            version: the ETag that the object must have.
            limit_s: seconds until the end of the response, however many bytes have arrived.
            stall_s: seconds without a byte after which the request is aborted.
            into: a buffer of `length` bytes; the returned content is the part of it that was filled.

        Raises:
            StatusError, OSError, HTTPException, ShortBodyError: the request failed; nothing is retried.
        """
        bucket = self.split_path(path)[0]
        if self._needs_botocore or bucket in self._redirected:
            return None
        deadline = time.monotonic() + limit_s
        url = self._sign(path, limit_s)
        if self._needs_botocore:
            return None
        headers = {"Range": f"bytes={start}-{start + length - 1}"} if length is not None else {}
        if version is not None:
            headers["If-Match"] = f'"{version}"'
        connection = self._connection(url)
        keep = False
        try:
            _apply_limits(connection, deadline, stall_s)
            connection.request("GET", f"{url.path}?{url.query}" if url.query else url.path, headers=headers)
            response = connection.getresponse()
            if response.status >= 300:
                document = response.read(_MAX_ERROR_BYTES)
                keep = response.isclosed()
                if response.status in _REDIRECTS:
                    self._redirected.add(bucket)
                    return None
                raise _status_error(response, document)
            expected = _expected(response, start, length)
            content = response.read() if into is None else _read_into(response, into)
            keep = expected in (None, len(content))
        except ssl.SSLCertVerificationError:  # botocore may be configured with another certificate
            self._needs_botocore = True
            return None
        finally:
            if keep and not response.will_close:
                with self._lock:
                    self._idle.setdefault(_origin(url), []).append((connection, time.monotonic()))
            else:
                connection.close()
        if expected is not None and len(content) != expected:
            raise ShortBodyError(f"{len(content)} bytes arrived instead of {expected}")
        return Body(content, (response.getheader("ETag") or "").strip('"'))

    def _sign(self, path: str, limit_s: float) -> SplitResult:
        now = time.monotonic()
        url, until = self._signed.get(path, (None, 0.0))
        if url is None or until < now:
            if len(self._signed) > _MAX_SIGNED:
                self._signed.clear()
            url = urlsplit(sync(self.loop, self._url, path, expires=_SIGNED_S, timeout=limit_s))
            if urllib.request.getproxies().get(url.scheme) and not urllib.request.proxy_bypass(url.netloc):
                self._needs_botocore = True
            self._signed[path] = url, now + _RESIGN_S
        return url

    def _connection(self, url: SplitResult) -> HTTPConnection:
        oldest = time.monotonic() - _IDLE_S
        while True:
            with self._lock:
                idle = self._idle.get(_origin(url))
                connection, since = idle.pop() if idle else (None, 0.0)
            if connection is None:
                if url.scheme == "https":
                    authorities = os.environ.get("AWS_CA_BUNDLE") or get_cert_path(True)
                    return HTTPSConnection(url.netloc, context=_tls(authorities))
                return HTTPConnection(url.netloc)
            if since > oldest and not _readable(connection.sock):  # readable means closed by the server
                return connection
            connection.close()


def _origin(url: SplitResult) -> tuple[str, str]:
    return url.scheme, url.netloc


@functools.cache
def _tls(authorities: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authorities)


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _expected(response: HTTPResponse, start: int, length: int | None) -> int | None:
    """Expected length of the body, in bytes; None if the server does not state it."""
    if length is None:
        return response.length
    if response.status != 206:
        raise OSError("the store ignores range requests and sends entire objects: use a store with range requests")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.getheader("Content-Range") or "")
    if found is None or int(found[1]) != start:
        raise OSError(f"the store sent another range than requested: {response.getheader('Content-Range')}")
    expected = length if found[3] == "*" else min(length, int(found[3]) - start)
    if response.length not in (None, expected):
        raise ShortBodyError(f"{response.length} bytes were announced instead of {expected}")
    return expected


def _read_into(response: HTTPResponse, buffer: memoryview) -> memoryview:
    done = 0
    while done < len(buffer) and (more := response.readinto(buffer[done:])):
        done += more
    if surplus := len(response.read()):
        raise ShortBodyError(f"{done + surplus} bytes arrived instead of {len(buffer)}")
    return buffer[:done]


def _status_error(response: HTTPResponse, document: bytes) -> StatusError:
    text = document.decode(errors="replace")
    code, message = (re.search(f"<{name}>([^<]*)</{name}>", text) for name in ("Code", "Message"))
    return StatusError(response.status, code[1] if code else "", message[1] if message else response.reason)


# ---- time limits


class _LimitedSocketFile(io.RawIOBase):
    """Bytes received by a socket. Reading fails if it stalls, or at the deadline even while bytes arrive."""

    def __init__(self, sock: socket.socket, deadline: float, stall_s: float) -> None:
        self._sock, self._deadline, self._stall_s = sock, deadline, stall_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_timeout(self._deadline, self._stall_s))
        try:
            return self._sock.recv_into(buffer)
        except TimeoutError:
            _timeout(self._deadline, self._stall_s)  # raises if the deadline has passed
            raise TimeoutError(f"no byte arrived for {self._stall_s:g} s") from None


def _timeout(deadline: float, stall_s: float) -> float:
    """Timeout of the next socket operation, in seconds. Raises TimeoutError: the deadline has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the response was incomplete at the deadline")
    return min(left, stall_s)


class _SocketAdapter:
    """The part of a socket's interface that HTTPResponse uses."""

    def __init__(self, raw: _LimitedSocketFile) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._raw)


def _apply_limits(connection: HTTPConnection, deadline: float, stall_s: float) -> None:
    """Apply the limits to connecting, sending and receiving the next response."""

    def response(sock: socket.socket, **options: Any) -> HTTPResponse:
        return HTTPResponse(_SocketAdapter(_LimitedSocketFile(sock, deadline, stall_s)), **options)  # type: ignore[arg-type]

    connection.timeout = _timeout(deadline, stall_s)
    if connection.sock is not None:
        connection.sock.settimeout(connection.timeout)
    connection.response_class = response  # type: ignore[assignment]
