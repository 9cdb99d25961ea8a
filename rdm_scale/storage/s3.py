"""S3 through s3fs, with two changes: nothing is tried twice here (the caller does), and GETs take a short way.

The short way: botocore needs about 3 ms of CPU time for a request, which is what receiving 2 MiB takes. A signed URL
is good for many ranges of its object, so it is made once, by botocore, and used with the standard library's client.
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

from rdm_scale.storage.retries import ShortBodyError, StatusError, current_retry

_SIGNED_S = 3600
_RESIGN_S = 300  # sooner than botocore lets temporary credentials come to their end
_IDLE_S = 15  # servers close idle connections after 20 s or more
_MAX_SIGNED = 100_000
_MAX_ERROR_BYTES = 2**16
_ELSEWHERE = {301, 307, 308, 400}  # a bucket of another region: botocore knows how to find it


class Body(NamedTuple):
    content: bytes | memoryview
    version: str  # the ETag, without quotes


class S3(S3FileSystem):
    """s3fs with one try a request, no cache of listings, and `get`.

    Args:
        options: of s3fs.

    Raises:
        TypeError: an option that neither s3fs nor botocore knows.
    """

    retries = 1
    cachable = False  # by fsspec, which would keep it when the environment has changed

    def __init__(self, options: Mapping[str, Any]) -> None:
        settings = {"use_listings_cache": False, **options}
        config = {"max_pool_connections": 64, "signature_version": "s3v4", **(options.get("config_kwargs") or {})}
        client = dict(options.get("client_kwargs") or {})
        if not os.environ.get("AWS_DEFAULT_REGION") and os.environ.get("AWS_REGION") and "region_name" not in config:
            client.setdefault("region_name", os.environ["AWS_REGION"])  # botocore reads AWS_DEFAULT_REGION only
        self._stubborn_options = {**settings, "config_kwargs": config, "client_kwargs": client}
        stall_s = current_retry().stall_s
        ours = {"read_timeout": stall_s, "connect_timeout": min(5.0, stall_s), "retries": {"total_max_attempts": 1}}
        AioConfig(**config)
        super().__init__(**{**self._stubborn_options, "config_kwargs": {**config, **ours}})
        AioSession(**self.kwargs)
        self._unusual = bool(self.s3_additional_kwargs or self.requester_pays or self.version_aware)
        self._unusual |= "verify" in client or self.session is not None
        self._elsewhere: set[str] = set()  # buckets
        self._signed: dict[str, tuple[SplitResult, float]] = {}
        self._idle: dict[tuple[str, str], list[tuple[HTTPConnection, float]]] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def stubborn(self) -> Any:
        """The same file system with the retries of s3fs and botocore: for uploads in many parts."""
        return S3FileSystem(**self._stubborn_options, skip_instance_cache=True)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "r" not in mode:
            return self.stubborn._open(path, mode, **options)
        return super()._open(path, mode, **options)

    @property
    def endpoint(self) -> str:
        """Where requests go, once there was one."""
        return str(self._s3.meta.endpoint_url) if self._s3 is not None else self.endpoint_url or "its store"

    def list_page(self, path: str, deep: bool, after: str, limit_s: float) -> tuple[list[dict[str, Any]], str]:
        """A page of the entries of a folder, or of all below it, and what the next one comes `after` ("": the last)."""
        bucket, key, _ = self.split_path(path)
        options = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
        options |= {} if deep else {"Delimiter": "/"}
        options |= {"ContinuationToken": after} if after else {}
        page = sync(self.loop, self._call_s3, "list_objects_v2", timeout=limit_s, **options)
        entries = [
            {"name": f"{bucket}/{each['Prefix']}", "type": "directory", "size": 0}
            for each in page.get("CommonPrefixes", ())
        ]
        entries += [
            {"name": f"{bucket}/{each['Key']}", "type": "file", "size": each["Size"], "ETag": each["ETag"]}
            for each in page.get("Contents", ())
        ]
        return entries, str(page["NextContinuationToken"]) if page.get("IsTruncated") else ""

    def get_body(
        self,
        path: str,
        start: int,
        length: int | None,
        version: str | None,
        limit_s: float,
        into: memoryview | None = None,
    ) -> Body | None:
        """One GET, of the whole object with `length` None. None: it takes the long way, for instance through a proxy.

        Args:
            version: the ETag that the object must have.
            into: where `length` bytes go; the content is then the part of it that was filled.

        Raises:
            StatusError, OSError, HTTPException, ShortBodyError: nothing is tried twice.
        """
        bucket = self.split_path(path)[0]
        if self._unusual or bucket in self._elsewhere:
            return None
        deadline = time.monotonic() + limit_s
        url = self._sign(path, limit_s)
        if self._unusual:
            return None
        headers = {"Range": f"bytes={start}-{start + length - 1}"} if length is not None else {}
        if version is not None:
            headers["If-Match"] = f'"{version}"'
        connection = self._connection(url)
        keep = False
        try:
            _limit(connection, deadline, current_retry().stall_s)
            connection.request("GET", f"{url.path}?{url.query}" if url.query else url.path, headers=headers)
            response = connection.getresponse()
            if response.status >= 300:
                document = response.read(_MAX_ERROR_BYTES)
                keep = response.isclosed()
                if response.status in _ELSEWHERE:
                    self._elsewhere.add(bucket)
                    return None
                raise _status_error(response, document)
            expected = _expected(response, start, length)
            content = response.read() if into is None else _read_into(response, into)
            keep = expected in (None, len(content))
        except ssl.SSLCertVerificationError:  # botocore may know of another certificate
            self._unusual = True
            return None
        finally:
            if keep and not response.will_close:
                with self._lock:
                    self._idle.setdefault(_origin(url), []).append((connection, time.monotonic()))
            else:
                connection.close()
        if expected is not None and len(content) != expected:
            raise ShortBodyError(f"{len(content)} bytes came instead of {expected}")
        return Body(content, (response.getheader("ETag") or "").strip('"'))

    def _sign(self, path: str, limit_s: float) -> SplitResult:
        now = time.monotonic()
        url, until = self._signed.get(path, (None, 0.0))
        if url is None or until < now:
            if len(self._signed) > _MAX_SIGNED:
                self._signed.clear()
            url = urlsplit(sync(self.loop, self._url, path, expires=_SIGNED_S, timeout=limit_s))
            if urllib.request.getproxies().get(url.scheme) and not urllib.request.proxy_bypass(url.netloc):
                self._unusual = True
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
            if since > oldest and not _readable(connection.sock):  # what could be read is the server's goodbye
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
    """Bytes that the body must have; None where the server does not say."""
    if length is None:
        return response.length
    if response.status != 206:
        raise OSError("the store sends whole objects where a part is asked for: it cannot be used")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.getheader("Content-Range") or "")
    if found is None or int(found[1]) != start:
        raise OSError(f"the store answers with another part than was asked for: {response.getheader('Content-Range')}")
    expected = length if found[3] == "*" else min(length, int(found[3]) - start)
    if response.length not in (None, expected):
        raise ShortBodyError(f"{response.length} bytes are announced instead of {expected}")
    return expected


def _read_into(response: HTTPResponse, buffer: memoryview) -> memoryview:
    done = 0
    while done < len(buffer) and (more := response.readinto(buffer[done:])):
        done += more
    if surplus := len(response.read()):
        raise ShortBodyError(f"{done + surplus} bytes came instead of {len(buffer)}")
    return buffer[:done]


def _status_error(response: HTTPResponse, document: bytes) -> StatusError:
    text = document.decode(errors="replace")
    code, message = (re.search(f"<{name}>([^<]*)</{name}>", text) for name in ("Code", "Message"))
    return StatusError(response.status, code[1] if code else "", message[1] if message else response.reason)


# ---- time limits


class _Limited(io.RawIOBase):
    """What a socket receives, until it stalls or the time is over, however much has come by then."""

    def __init__(self, sock: socket.socket, deadline: float, stall_s: float) -> None:
        self._sock, self._deadline, self._stall_s = sock, deadline, stall_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_patience(self._deadline, self._stall_s))
        try:
            return self._sock.recv_into(buffer)
        except TimeoutError:
            _patience(self._deadline, self._stall_s)  # raises if the time is over
            raise TimeoutError(f"nothing came for {self._stall_s:g} s") from None


def _patience(deadline: float, stall_s: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the answer was still coming when the time was over")
    return min(left, stall_s)


class _Source:
    """As much of a socket as HTTPResponse wants."""

    def __init__(self, raw: _Limited) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._raw)


def _limit(connection: HTTPConnection, deadline: float, stall_s: float) -> None:
    """Makes connecting, sending and the whole of the next answer keep to the limits."""

    def response(sock: socket.socket, **options: Any) -> HTTPResponse:
        return HTTPResponse(_Source(_Limited(sock, deadline, stall_s)), **options)  # type: ignore[arg-type]

    connection.timeout = _patience(deadline, stall_s)
    if connection.sock is not None:
        connection.sock.settimeout(connection.timeout)
    connection.response_class = response  # type: ignore[assignment]
