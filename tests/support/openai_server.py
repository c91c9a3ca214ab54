"""A real OpenAI-compatible HTTP server on loopback, in a thread of its own, scripted per test.

It speaks `POST .../chat/completions` and nothing else. Each request takes the next
behaviour of `script`, or what `otherwise` makes of it. What came in and who left is recorded.

    with OpenAIServer() as server:
        server.script(Stream(says("hello")), Refuse(429, headers={"Retry-After": "3"}))
        ... api_base=server.url ...
        server.requests[0].body["messages"]
"""

import asyncio
import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any, NamedTuple, Self


class Mark(Enum):
    """What may stand between the events of a stream."""

    DONE = "the end as OpenAI marks it"
    EOF = "the response ends well-formed here"
    CUT = "the connection ends inside the response"
    RESET = "TCP reset"
    STALL = "nothing more, until the client leaves or the server stops"


Event = dict[str, Any] | Mark | float
"""A chunk, a mark, or a pause in seconds."""


class Stream(NamedTuple):
    events: Sequence[Event]


class Whole(NamedTuple):
    """An answer in one piece."""

    message: dict[str, Any]
    finish_reason: str = "stop"
    usage: dict[str, Any] | None = {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
    }


class Raw(NamedTuple):
    """Bytes as they stand, each piece sent for itself."""

    pieces: Iterable[bytes]
    headers: dict[str, str] = {"Content-Type": "text/event-stream"}
    status: int = 200


class Refuse(NamedTuple):
    status: int
    error: dict[str, Any] = {"message": "the provider's own words", "type": "error"}
    headers: dict[str, str] = {}


class Silence(NamedTuple):
    """Take the request and never answer."""


Behaviour = Stream | Whole | Raw | Refuse | Silence


@dataclass
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    left: threading.Event = field(default_factory=threading.Event)
    """Set when the client closes before the response has ended."""
    answered: threading.Event = field(default_factory=threading.Event)


def chunk(
    delta: dict[str, Any] | None = None, *, finish_reason: str | None = None
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason}
    return _envelope(choices=[choice])


def usage(prompt: int = 7, completion: int = 5, *, cached: int = 0, reasoning: int = 0) -> Event:
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    return _envelope(choices=[], usage=counts)


def _envelope(**fields: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "test",
        **fields,
    }


def ends(finish_reason: str = "stop") -> list[Event]:
    return [chunk(finish_reason=finish_reason), usage(), Mark.DONE]


def words(*texts: str) -> list[Event]:
    return [chunk({"role": "assistant", "content": text}) for text in texts]


def says(*texts: str) -> list[Event]:
    """A whole answer, a chunk per text."""
    return [*words(*texts), *ends()]


def call(
    index: int | None,
    *,
    call_id: str | None = None,
    name: str | None = None,
    arguments: str = "",
) -> dict[str, Any]:
    """A piece of a tool call."""
    function = {"arguments": arguments} | ({"name": name} if name else {})
    piece: dict[str, Any] = {"index": index, "type": "function", "function": function}
    return chunk({"tool_calls": [piece | ({} if call_id is None else {"id": call_id})]})


class OpenAIServer:
    def __init__(self, *, keep_alive: bool = False) -> None:
        """`keep_alive`: connections take one request after another, and `left` is never set."""
        self.keep_alive = keep_alive
        self.n_connections = 0
        self.requests: list[Received] = []
        self.otherwise: Callable[[Received], Behaviour] = lambda _: Stream(says("hello"))
        self._script: deque[Behaviour] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-server")
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def script(self, *behaviours: Behaviour) -> None:
        self._script.extend(behaviours)

    @property
    def url(self) -> str:
        assert self._server
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._connected, "127.0.0.1", 0))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(5)

    async def _stop(self) -> None:
        assert self._server
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        self.n_connections += 1
        try:
            while True:
                received = await _read(reader)
                self.requests.append(received)
                how = self._script.popleft() if self._script else self.otherwise(received)
                if not self.keep_alive:
                    await _answered(received, how, reader, writer)
                    return
                await _answer(how, writer, {})
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the server stops: nobody awaits this task
        finally:
            self._connections.discard(task)
            writer.close()


async def _answered(
    received: Received, how: Behaviour, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    answer = asyncio.ensure_future(_answer(how, writer, {"Connection": "close"}))
    # A connection takes one request, so whatever can be read after it is the client's end.
    gone = asyncio.ensure_future(reader.read(1))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        ended = answer.done() and not answer.exception()
        (received.answered if ended else received.left).set()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Received:
    first = await reader.readuntil()
    headers: dict[str, str] = {}
    while (line := (await reader.readline()).decode().strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(first.decode().split(" ")[1], headers, json.loads(body))


async def _answer(how: Behaviour, writer: asyncio.StreamWriter, common: dict[str, str]) -> None:
    """`common`: headers of every answer."""
    match how:
        case Silence():
            await asyncio.Event().wait()
        case Refuse(status, error, headers):
            await _said(status, {"error": error}, common | headers, writer)
        case Whole(message, finish_reason, counts):
            choice = {
                "index": 0,
                "message": {"role": "assistant"} | message,
                "finish_reason": finish_reason,
            }
            body = _envelope(object="chat.completion", choices=[choice])
            await _said(200, body | ({"usage": counts} if counts else {}), common, writer)
        case Raw(pieces, headers, status):
            writer.write(_head(status, common | headers | {"Transfer-Encoding": "chunked"}))
            for piece in pieces:
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        case Stream(events):
            kind = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}
            writer.write(_head(200, common | kind))
            await _streamed(events, writer)


async def _said(
    status: int, body: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter
) -> None:
    content = json.dumps(body).encode()
    lengths = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    writer.write(_head(status, lengths | headers) + content)
    await writer.drain()


async def _streamed(events: Iterable[Event], writer: asyncio.StreamWriter) -> None:
    for event in events:
        match event:
            case float():
                await asyncio.sleep(event)
            case dict():
                writer.write(_piece(f"data: {json.dumps(event)}\n\n"))
            case Mark.DONE:
                writer.write(_piece("data: [DONE]\n\n"))
            case Mark.EOF:
                break
            case Mark.STALL:
                await writer.drain()
                await asyncio.Event().wait()
            case Mark.CUT:
                await writer.drain()
                return
            case Mark.RESET:
                await writer.drain()
                _reset(writer)
                return
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    # Lingering for no time at all makes the kernel send RST in place of FIN.
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [
        f"HTTP/1.1 {status} Scripted",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _piece(text: str) -> bytes:
    body = text.encode()
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"
