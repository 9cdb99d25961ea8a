"""An HTTP proxy on loopback that counts requests and injects faults.

    with FaultProxy(server.port) as proxy:
        proxy.add(Fault("drop", after=1000), lambda request: request.path.endswith(".tar"), times=2)

Requests pass unchanged, the Host header included, so that signatures hold: the client signs the proxy's address, and
the server verifies the address that it reads in the request.
"""

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

from tests.support.limits import HANG_S

_CHUNK = 2**18
_LIMIT = 2**20  # of a head
_TICK_S = 0.05

Kind = Literal["status", "reset", "drop", "truncate", "stall", "gather", "rate", "corrupt"]


@dataclass(frozen=True)
class Fault:
    """A fault to inject into one request or its response.

    status: the response is `status` with an S3 error document of `code`; the server does not see the request.
    reset: the connection is reset before any response; the server does not see the request.
    drop: the connection is reset after `after` bytes of the body. truncate: it is closed instead.
    stall: no byte for `seconds` after `after` bytes of the body (or before the response, with `after` None).
    gather: no byte until as many such requests as `after` are waiting for one; so they must overlap.
    rate: the body is sent at `bytes_per_s`, in small chunks.
    corrupt: the byte of the body at `after` has its bits flipped.
    """

    kind: Kind
    after: int | None = 0
    status: int = 503
    code: str = ""
    seconds: float = 3600
    bytes_per_s: float = 2**20


@dataclass
class Request:
    """A request and its outcome. `path` is decoded; `sent` counts the body's bytes sent to the client."""

    method: str
    path: str
    query: str
    range: str  # the header's value, or ""
    headers: dict[str, str]  # names in lower case
    received: int = 0  # bytes of the request's body
    status: int = 0
    sent: int = 0
    fault: Fault | None = None


Predicate = Callable[[Request], bool]

_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    502: "BadGateway",
    503: "SlowDown",
    504: "GatewayTimeout",
}


class FaultProxy:
    """A proxy of the server at `port` of loopback, with its own thread. Its methods may be called from any thread."""

    def __init__(self, port: int) -> None:
        self.upstream, self.port = port, 0
        self.connections = 0  # that were made
        self.requests: list[Request] = []
        self._gathered: asyncio.Queue[None] = asyncio.Queue()  # an item for each waiting request
        self._plan: list[tuple[Fault, Predicate, float]] = []  # with the number of times left
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._listener: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # ---- plan and counts

    def add(self, fault: Fault, where: Predicate = lambda request: True, times: float = float("inf")) -> None:
        """Inject `fault` into the next `times` requests that match. Of several matching faults the first one acts."""
        with self._lock:
            self._plan.append((fault, where, times))

    def clear(self) -> None:
        """Remove all faults, requests and counts."""
        with self._lock:
            self._plan.clear()
            self.requests.clear()
            self.connections = 0
            self._gathered = asyncio.Queue()

    def matching(self, where: Predicate = lambda request: True) -> list[Request]:
        with self._lock:
            return [request for request in self.requests if where(request)]

    def count(self, method: str | None = None, contains: str = "") -> int:
        """The number of requests of a method whose path contains a text."""
        return len(self._selected(method, contains))

    def sent(self, method: str | None = None, contains: str = "") -> int:
        """The bytes of response bodies sent to clients for such requests."""
        return sum(request.sent for request in self._selected(method, contains))

    def _selected(self, method: str | None, contains: str) -> list[Request]:
        return self.matching(lambda request: method in (None, request.method) and contains in request.path)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Refuse new connections and reset existing ones until the end of the `with` block."""
        self._run(self._close())
        try:
            yield
        finally:
            self._run(self._listen())

    # ---- life

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._run(self._close())
        self._run(self._cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(HANG_S)

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, limit=_LIMIT, reuse_address=True, backlog=1024
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for writer in list(self._clients):
            _reset(writer)

    async def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- one connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._clients.add(writer)
        self.connections += 1
        upstream: asyncio.StreamWriter | None = None
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            try:
                server, upstream = await asyncio.open_connection("127.0.0.1", self.upstream, limit=_LIMIT)
                while await self._exchange(reader, writer, server, upstream):
                    pass
            finally:
                for each in (writer, upstream):
                    if each is not None:
                        each.close()
                self._clients.discard(writer)
                self._tasks.discard(task)

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> bool:
        """Pass on a request and its response. Returns True if the connection can take another request."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        url, headers = urlsplit(target), _headers(head)
        request = Request(method, unquote(url.path), url.query, headers.get("range", ""), headers)
        fault = request.fault = self._take(request)
        if headers.pop("expect", None):  # the proxy takes every body itself; this header is never signed
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")

        if fault and fault.kind in ("status", "reset"):
            async for chunk in _body(reader, headers):
                request.received += len(chunk)
            if fault.kind == "reset":
                _reset(writer)
                return False
            request.status = fault.status
            response = _error(fault)
            writer.write(response if method != "HEAD" else response.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n")
            await writer.drain()
            return True

        upstream.write(head)
        async for chunk in _body(reader, headers):
            request.received += len(chunk)
            upstream.write(chunk)
            await upstream.drain()
        response = await server.readuntil(b"\r\n\r\n")
        request.status = int(response.split(b" ", 2)[1])
        if fault and fault.kind == "stall" and fault.after is None:
            await asyncio.sleep(fault.seconds)
        if fault and fault.kind == "gather":
            self._gathered.put_nowait(None)
            while self._gathered.qsize() < (fault.after or 0):
                await asyncio.sleep(_TICK_S)
        writer.write(response)
        response_headers = _headers(response)
        bodiless = method == "HEAD" or request.status in (204, 304)
        complete = await self._deliver(writer, _body(server, {} if bodiless else response_headers), request, fault)
        return complete and response_headers.get("connection", "").lower() != "close"

    def _take(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for index, (fault, where, times) in enumerate(self._plan):
                if where(request):
                    self._plan[index] = (fault, where, times - 1)
                    if times <= 1:
                        del self._plan[index]
                    return fault
        return None

    async def _deliver(
        self, writer: asyncio.StreamWriter, body: AsyncIterator[bytes], request: Request, fault: Fault | None
    ) -> bool:
        """Send the body of a response, modified by the fault. Returns True if all of it was sent."""
        kind, after = (fault.kind, fault.after or 0) if fault else ("", 0)
        began = time.monotonic()
        async for chunk in body:
            if fault and kind in ("drop", "truncate", "stall", "corrupt"):
                before, rest = chunk[: max(after - request.sent, 0)], chunk[max(after - request.sent, 0) :]
                if rest:
                    await _send(writer, before, request)
                    kind, chunk = "", rest  # once
                    if fault.kind == "corrupt":
                        chunk = bytes([rest[0] ^ 0xFF]) + rest[1:]
                    elif fault.kind == "stall":
                        await asyncio.sleep(fault.seconds)
                    else:
                        if fault.kind == "drop":
                            await asyncio.sleep(_TICK_S)  # a reset discards what was sent just before
                            _reset(writer)
                        return False
            if fault and kind == "rate":
                step = max(int(fault.bytes_per_s * _TICK_S), 1)
                for start in range(0, len(chunk), step):
                    await asyncio.sleep(max(began + request.sent / fault.bytes_per_s - time.monotonic(), 0))
                    await _send(writer, chunk[start : start + step], request)
            else:
                await _send(writer, chunk, request)
        await writer.drain()
        return True


async def _send(writer: asyncio.StreamWriter, chunk: bytes, request: Request) -> None:
    request.sent += len(chunk)  # before the client can receive it and look at this count
    writer.write(chunk)
    await writer.drain()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The bytes of a body as transferred, in chunks."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        size = 1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line
            if size:
                yield await reader.readexactly(size + 2)
        while line != b"\r\n":  # trailers
            line = await reader.readuntil(b"\r\n")
            yield line
    left = int(headers.get("content-length", 0))
    while left:
        chunk = await reader.read(min(left, _CHUNK))
        if not chunk:
            raise EOFError
        left -= len(chunk)
        yield chunk


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def _error(fault: Fault) -> bytes:
    code = fault.code or _CODES.get(fault.status, "Error")
    document = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected {fault.status}</Message></Error>"
    head = f"HTTP/1.1 {fault.status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(document)}\r\n\r\n"
    return (head + document).encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # makes closing send RST
    writer.transport.abort()
