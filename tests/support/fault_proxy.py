"""An HTTP proxy on loopback that counts what passes, and breaks it on demand.

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

_PIECE = 2**18
_LIMIT = 2**20  # of a head
_TICK_S = 0.05

Kind = Literal["status", "reset", "drop", "truncate", "stall", "rate", "corrupt"]


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    status: answered with `status` and an S3 error document of `code`; the server does not see it.
    reset: the connection is reset before any answer; the server does not see it.
    drop: the connection is reset after `after` bytes of the body. truncate: closed politely instead.
    stall: nothing more for `seconds` after `after` bytes of the body (or before any answer, with `after` None).
    rate: the body comes at `bytes_per_s`, in small pieces.
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
    """One request, and what became of it. `path` is decoded; `sent` counts the body's bytes sent to the client."""

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
    """A proxy before the server at `port` of loopback, in a thread of its own; safe to use from any thread."""

    def __init__(self, port: int) -> None:
        self.upstream, self.port = port, 0
        self.connections = 0  # that were made
        self.requests: list[Request] = []
        self._plan: list[tuple[Fault, Predicate, float]] = []  # and how many times yet
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
        """Applies `fault` to the next `times` requests that match; of several that match the first one acts."""
        with self._lock:
            self._plan.append((fault, where, times))

    def clear(self) -> None:
        """Forgets the plan and the counts."""
        with self._lock:
            self._plan.clear()
            self.requests.clear()
            self.connections = 0

    def matching(self, where: Predicate = lambda request: True) -> list[Request]:
        with self._lock:
            return [request for request in self.requests if where(request)]

    def count(self, method: str | None = None, contains: str = "") -> int:
        """Requests of that method with that text in their path."""
        return len(self._selected(method, contains))

    def sent(self, method: str | None = None, contains: str = "") -> int:
        """Bytes of bodies that went to clients in answer to such requests."""
        return sum(request.sent for request in self._selected(method, contains))

    def _selected(self, method: str | None, contains: str) -> list[Request]:
        return self.matching(lambda request: method in (None, request.method) and contains in request.path)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """While inside, connections are refused, and those that exist are reset."""
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
        asyncio.run_coroutine_threadsafe(what, self._loop).result(timeout=30)

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
        """One request and its answer. Returns whether the connection can take another."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        url, headers = urlsplit(target), _headers(head)
        request = Request(method, unquote(url.path), url.query, headers.get("range", ""), headers)
        fault = request.fault = self._take(request)
        if headers.pop("expect", None):  # the proxy takes every body itself; this header is never signed
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")

        if fault and fault.kind in ("status", "reset"):
            async for piece in _body(reader, headers):
                request.received += len(piece)
            if fault.kind == "reset":
                _reset(writer)
                return False
            request.status = fault.status
            answer = _error(fault)
            writer.write(answer if method != "HEAD" else answer.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n")
            await writer.drain()
            return True

        upstream.write(head)
        async for piece in _body(reader, headers):
            request.received += len(piece)
            upstream.write(piece)
            await upstream.drain()
        answer = await server.readuntil(b"\r\n\r\n")
        request.status = int(answer.split(b" ", 2)[1])
        if fault and fault.kind == "stall" and fault.after is None:
            await asyncio.sleep(fault.seconds)
        writer.write(answer)
        answered = _headers(answer)
        bodiless = method == "HEAD" or request.status in (204, 304)
        whole = await self._deliver(writer, _body(server, {} if bodiless else answered), request, fault)
        return whole and answered.get("connection", "").lower() != "close"

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
        """The body of an answer, as the fault leaves it. Returns whether all of it went out."""
        kind, after = (fault.kind, fault.after or 0) if fault else ("", 0)
        began = time.monotonic()
        async for piece in body:
            if fault and kind in ("drop", "truncate", "stall", "corrupt"):
                before, rest = piece[: max(after - request.sent, 0)], piece[max(after - request.sent, 0) :]
                if rest:
                    await _send(writer, before, request)
                    kind, piece = "", rest  # once
                    if fault.kind == "corrupt":
                        piece = bytes([rest[0] ^ 0xFF]) + rest[1:]
                    elif fault.kind == "stall":
                        await asyncio.sleep(fault.seconds)
                    else:
                        if fault.kind == "drop":
                            await asyncio.sleep(_TICK_S)  # a reset overtakes what was sent just before
                            _reset(writer)
                        return False
            if fault and kind == "rate":
                step = max(int(fault.bytes_per_s * _TICK_S), 1)
                for start in range(0, len(piece), step):
                    await asyncio.sleep(max(began + request.sent / fault.bytes_per_s - time.monotonic(), 0))
                    await _send(writer, piece[start : start + step], request)
            else:
                await _send(writer, piece, request)
        await writer.drain()
        return True


async def _send(writer: asyncio.StreamWriter, piece: bytes, request: Request) -> None:
    request.sent += len(piece)  # before the client can have it, and read this count
    writer.write(piece)
    await writer.drain()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The bytes of a body as they are on the wire."""
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
        piece = await reader.read(min(left, _PIECE))
        if not piece:
            raise EOFError
        left -= len(piece)
        yield piece


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
