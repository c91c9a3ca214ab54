"""Pages as server-sent events, bounded in time, in bytes, and in what a silent client may hold."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Self

import structlog
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from actors.protocol import Unavailable
from agent.events import Frame, Page
from agent.faults import Fault
from serve_app.patience import STALL_S, Stalled, in_time
from serve_app.settings import ServeSettings

log = structlog.get_logger()

HEARTBEAT = b": heartbeat\n\n"
RECONNECT = b": reconnect\n\n"
"""The last line of a stream that could go on: come back with the last id."""
OPENING = b"retry: 1000\n\n"
"""Sends the head at once, and tells browsers how many ms to wait before they come back."""
OPEN_WAIT_S = 60.0
"""For the first page, which comes at once from a session that lives."""


class EventStream(StreamingResponse):
    """The answer of every streaming call. Always closes `pages`, also when the client is gone.

    One page is in memory at a time and the next is not asked for before the server took this one,
    so with back-pressure a client that reads nothing costs a page. Proxies between may have none:
    therefore `stream_max_bytes`. Afterwards readers come back with their cursor.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        pages: AsyncGenerator[Page, None],
        first: Page | None,
        settings: ServeSettings,
        *,
        follow: bool = True,
        stall_s: float = STALL_S,
    ) -> None:
        self._pages = pages
        self._stall_s = stall_s
        self._body = encoded(pages, first, settings, follow=follow)
        super().__init__(self._body, headers={"X-Accel-Buffering": "no"})

    @classmethod
    async def opened(
        cls, pages: AsyncGenerator[Page, None], settings: ServeSettings, *, follow: bool = True
    ) -> Self:
        """An answer once there is something to answer: the first page is here.

        Raises:
            Fault: there is nothing to read. Later no status could say so.
        """
        async with AsyncExitStack() as unless_opened:
            await unless_opened.enter_async_context(aclosing(pages))
            try:
                async with asyncio.timeout(OPEN_WAIT_S):
                    first = await anext(pages, None)
            except TimeoutError as cause:
                raise Unavailable("The session does not answer.") from cause
            unless_opened.pop_all()
        return cls(pages, first, settings, follow=follow)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette leaves a generator that was not exhausted to the garbage collector.
        async with aclosing(self._pages), aclosing(self._body):
            try:
                await super().__call__(scope, receive, in_time(send, self._stall_s))
            except Stalled:
                # Returning in the middle of a response makes the server drop the connection.
                log.warning("stream_stalled", limit_s=self._stall_s)


async def encoded(
    pages: AsyncGenerator[Page, None], first: Page | None, settings: ServeSettings, *, follow: bool
) -> AsyncGenerator[bytes, None]:
    """The pages as SSE, after the `first`. Ends with the pages, or with RECONNECT at a limit."""
    deadline = asyncio.get_running_loop().time() + settings.stream_max_s
    room = settings.stream_max_bytes
    yield OPENING
    page = first
    while room > 0:
        if page is None:
            if follow:
                yield RECONNECT
            return
        chunk, whole = _chunk(page, room)
        room -= len(chunk)
        yield chunk
        if page.end and whole:
            return
        page = await _next(pages, deadline) if room > 0 else None
    yield RECONNECT


async def _next(pages: AsyncGenerator[Page, None], deadline: float) -> Page | None:
    """None: time is up, the pages ended, or what makes them failed; the reader finds out which
    when it comes back, as a problem with its own status: this response has its 200 already."""
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(pages, None)
    except TimeoutError:
        return None
    except Fault as fault:
        log.info("stream_ended_early", code=fault.code)
        return None


def _chunk(page: Page, room: int) -> tuple[bytes, bool]:
    """The frames of a page that begin within `room` bytes, and whether these are all."""
    if not page.frames:
        return (b"" if page.end else HEARTBEAT), True
    parts: list[bytes] = []
    for frame in page.frames:
        if room <= 0:
            return b"".join(parts), False
        parts.append(event(frame))
        room -= len(parts[-1])
    return b"".join(parts), True


def event(frame: Frame) -> bytes:
    text = f"id: {frame.cursor}\nevent: {frame.event}\ndata: {frame.data}\n\n"
    # A provider may cut a text between two surrogates; escaped, each half is JSON as good as any.
    return text.encode(errors="backslashreplace")
