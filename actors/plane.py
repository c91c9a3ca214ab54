"""The data plane: how a model's answers travel from the gateway to a session's process, and commands and pages
between that and the edge.

Ray places processes, names them and tells of their deaths; what flows all the time goes over sockets of
their own. Measured with Ray 2.60 (`python -m bench.ray_floor`): a page through a streaming
generator of an actor costs some 0.8 ms of CPU in the actor and 0.3 ms where it is read, here a fifth of
that; and a reader that has stopped to read holds the writer back, which a Ray generator does not.

A frame is its length (4 bytes, big endian) and that many bytes of msgpack. A connection begins with the
caller's token and version; then it carries one call after another: `[method, body]`, answered by any number of
`[ITEM, body]` and one `[END]` or `[FAULT, ...]`. Whoever gives a call up closes the connection, which ends
the call on the other side too. No Ray in here.
"""

import asyncio
import contextlib
import hmac
import secrets
import socket
import struct
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

import structlog

from actors import wire
from actors.detached import Detached
from agent.faults import Fault

log = structlog.get_logger()

VERSION = 1
ITEM, END, FAULT = range(3)
MAX_FRAME_BYTES = 64 * 1024**2
"""Above the largest page and command, which are bounded elsewhere; and of a model request, with its whole
conversation, this is the bound."""
HIGH_BYTES = 256 * 1024
"""Unsent in a process: the writer waits. As much unread: the other side is held back."""
CONNECT_S = 5.0
KEEPALIVE_S = 10
HELLO_S = 5.0
HELLO_BYTES = 1024
MAX_IDLE = 4
"""Connections that are kept for the next call, of one client to one server."""
MAX_CONNECTIONS = 10_000
"""Of one server: the next is sent away. A call that runs holds one."""
CLOSE_S = 5.0

_length = struct.Struct(">I")

Method = Callable[[Any], AsyncGenerator[Any]]
"""Takes a body, yields bodies. What it raises, if it is a Fault, is raised by the caller's side again."""


class PlaneAddress(NamedTuple):
    """Where a process listens, and the secret without which it answers nobody. Told through Ray only."""

    host: str
    port: int
    token: str


class PlaneLost(Exception):
    """The way broke. Whether the call was carried out is not known."""


class _Framed(asyncio.Protocol):
    """Frames in both directions, and no more of them in memory than `HIGH_BYTES` and one."""

    def __init__(self, first_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = first_bytes
        """Of the next frame."""
        self.transport: asyncio.Transport  # uvloop's is one by its methods only
        self.is_lost = False
        self._buffer = bytearray()
        self._frames: deque[Any] = deque()
        self._n_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        """Of who wants the next frame."""
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(HIGH_BYTES)
        # A machine that is gone sends no end.
        opened: socket.socket = transport.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            n_used = self._taken_in()
        except ValueError:
            self.transport.abort()
            return
        if n_used:
            del self._buffer[:n_used]
            self._wake()
        if self._n_bytes > HIGH_BYTES:
            self.transport.pause_reading()

    def _taken_in(self) -> int:
        """Take the whole frames from the buffer; how many of its bytes they were.

        Raises:
            ValueError: it holds no frames, or one that is too large.
        """
        at = 0
        while len(self._buffer) - at >= _length.size:
            (n_bytes,) = _length.unpack_from(self._buffer, at)
            if n_bytes > self.max_bytes:
                raise ValueError("too large for a frame")
            begin = at + _length.size
            if len(self._buffer) < begin + n_bytes:
                break
            at = begin + n_bytes
            self._frames.append(wire.unpacked(bytes(self._buffer[begin:at])))
            self._n_bytes += n_bytes
            self.max_bytes = MAX_FRAME_BYTES
        return at

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc  # however it broke, it is lost
        self.is_lost = True
        self._wake()
        self._writable.set()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def send(self, value: Any) -> None:
        """
        Raises:
            PlaneLost
        """
        body = wire.packed(value)
        if len(body) > MAX_FRAME_BYTES:
            raise ValueError("too large for a frame")
        self.transport.write(_length.pack(len(body)) + body)
        await self._writable.wait()
        if self.is_lost:
            raise PlaneLost

    async def receive(self, limit_s: float | None = None) -> Any:
        """
        Raises:
            PlaneLost: the other side ended, and everything that it sent was received; or nothing came
                for `limit_s`.
        """
        while not self._frames:
            if self.is_lost:
                raise PlaneLost
            await self._next(limit_s)
        frame = self._frames.popleft()
        if not self._frames and self._n_bytes:
            if self._n_bytes > HIGH_BYTES and not self.is_lost:
                self.transport.resume_reading()
            self._n_bytes = 0
        return frame

    async def _next(self, limit_s: float | None) -> None:
        # A timer by hand: this runs for every page, and `asyncio.timeout` would be a third of it.
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if limit_s is None else loop.call_later(limit_s, self._give_up)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer:
                timer.cancel()

    def _give_up(self) -> None:
        self.transport.abort()


class _Served(_Framed):
    """The server's end of a connection."""

    def __init__(self, server: "PlaneServer") -> None:
        super().__init__(HELLO_BYTES)
        self._server = server
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._task = self._server.took(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._task:
            self._task.cancel()  # also a call that runs: nobody waits for it


class PlaneServer:
    """Of one process, from `start` to `close`.

    Args:
        methods: by name.
    """

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self._methods = methods
        self._token = secrets.token_hex(32)
        self._tasks = Detached()
        self._open: set[_Served] = set()
        self.n_calls = 0
        """That run now."""
        self._rested = asyncio.Event()
        self._rested.set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> PlaneAddress:
        """Listen on a free port of `host`.

        Raises:
            OSError: the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Served(self), host, 0)
        return PlaneAddress(host, self._server.sockets[0].getsockname()[1], self._token)

    def took(self, connection: _Served) -> asyncio.Task[None] | None:
        if len(self._open) >= MAX_CONNECTIONS:
            connection.transport.abort()
            return None
        self._open.add(connection)
        return self._tasks.start(self._serve(connection), name="plane")

    async def _serve(self, connection: _Served) -> None:
        try:
            if await self._welcomed(connection):
                while True:
                    method, body = await connection.receive()
                    await self._call(connection, method, body)
        except PlaneLost:
            pass
        finally:
            self._open.discard(connection)
            connection.transport.abort()

    async def _welcomed(self, connection: _Served) -> bool:
        try:
            token, version = await connection.receive(HELLO_S)
        except (ValueError, TypeError):
            return False
        return version == VERSION and hmac.compare_digest(str(token), self._token)

    async def _call(self, connection: _Served, method: str, body: Any) -> None:
        self.n_calls += 1
        self._rested.clear()
        try:
            await self._carried_out(connection, method, body)
        finally:
            self.n_calls -= 1
            if not self.n_calls:
                self._rested.set()

    async def _carried_out(self, connection: _Served, method: str, body: Any) -> None:
        try:
            async with aclosing(self._methods[method](body)) as items:
                async for item in items:
                    await connection.send([ITEM, item])
        except Fault as fault:
            await connection.send([FAULT, *wire.told(fault)])
        except PlaneLost:
            raise
        except Exception:
            # A defect of ours. The caller learns that the way is lost; the process lives on.
            log.exception("plane_call_failed", method=method)
            raise PlaneLost from None
        else:
            await connection.send([END])

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more connections; calls that run have `grace_s`, then they are broken off."""
        if self._server:
            self._server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._rested.wait()
        await self._tasks.close(CLOSE_S)


class PlaneClient:
    """Calls one server. Connections are kept for the next call."""

    def __init__(self, address: PlaneAddress) -> None:
        self._address = address
        self._idle: list[_Framed] = []

    async def stream(self, method: str, body: Any, *, silence_s: float) -> AsyncGenerator[Any]:
        """The items of a call. Closing this early ends the call over there.

        Raises:
            Fault: what the method raised there.
            PlaneLost: also when nothing was heard for `silence_s`.
        """
        connection = await self._connected()
        over = False
        try:
            async with _limited(silence_s):
                await connection.send([method, body])
            while not over:
                kind, *rest = await connection.receive(silence_s)
                match kind:
                    case _ if kind == ITEM:
                        yield rest[0]
                    case _ if kind == FAULT:
                        over = True
                        raise wire.fault_of(rest, Fault)
                    case _:
                        over = True
        finally:
            if over and not connection.is_lost and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
            else:
                connection.transport.abort()

    async def call(self, method: str, body: Any, *, limit_s: float) -> Any:
        """The one item of a call that has one.

        Raises:
            Fault, PlaneLost: as in `stream`.
        """
        found: Any = None
        async with aclosing(self.stream(method, body, silence_s=limit_s)) as items:
            async for item in items:
                found = item
        return found

    async def _connected(self) -> _Framed:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_lost:
                return connection
        host, port, token = self._address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(_Framed, host, port)
        except (OSError, TimeoutError) as cause:
            raise PlaneLost from cause
        await connection.send([token, VERSION])
        return connection

    def close(self) -> None:
        while self._idle:
            self._idle.pop().transport.abort()


@contextlib.asynccontextmanager
async def _limited(limit_s: float) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as cause:
        raise PlaneLost from cause
