"""An end to waiting for clients that do not read.

Around the edge's streams, where the replica writes to the client itself (HAProxy mode), and inside
Serve's own proxy, which otherwise takes a whole answer from the replica and keeps it for as long as
its client is connected (2.60).
"""

import asyncio

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

STALL_S = 30.0
"""A write that takes longer ends the connection. A few hundred KiB wait at most, so whoever reads
10 KiB a second stays, and an event stream that was cut goes on from its cursor."""


class Stalled(Exception):
    """The client read nothing for too long."""


def in_time(send: Send, stall_s: float = STALL_S) -> Send:
    """The same `send`, which raises Stalled after `stall_s`."""

    async def bounded(message: Message) -> None:
        try:
            async with asyncio.timeout(stall_s):
                await send(message)
        except TimeoutError:
            raise Stalled from None

    return bounded


class Patience:
    """ASGI middleware: `in_time` for every answer. That it raises makes the server hang up."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, in_time(send) if scope["type"] == "http" else send)


def middlewares() -> list[Middleware]:
    """For `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`: what Serve's proxy puts around its answers."""
    return [Middleware(Patience)]
