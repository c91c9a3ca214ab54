"""What one replica takes on at once. What is over it is told to come back, before anything was done.

Serve would queue instead: its own limit lies above these (`serve_app.deployment`), and answers without
a problem. Counted between awaits: a place is looked for and taken in one step.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from actors.protocol import QueueFull
from serve_app import problems
from serve_app.settings import ServeSettings

RETRY_AFTER_S = 2.0
"""Requests are over within milliseconds, unless a process has to start."""


class Room:
    """The middleware. Every request has a `Place` in its state until its answer is over."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app = app
        self._settings = settings
        self.n_requests = 0
        self.n_streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Whether the process lives is a question that must be answered when all places are taken.
        if scope["type"] != "http" or scope["path"] == "/healthz":
            await self._app(scope, receive, send)
            return
        limit = self._settings.max_requests
        if self.n_requests >= limit:
            fault = _full(f"{limit} requests are being answered already.", limit)
            answer = problems.of_fault(fault, scope["state"]["request_id"])
            await answer(scope, receive, send)
            return
        self.n_requests += 1
        place = scope["state"]["place"] = Place(self)
        try:
            await self._app(scope, receive, send)
        finally:
            if place.is_stream:
                self.n_streams -= 1
            else:
                self.n_requests -= 1

    def to_streams(self) -> None:
        limit = self._settings.max_streams
        if self.n_streams >= limit:
            raise _full(f"{limit} event streams are open here already.", limit)
        self.n_streams += 1
        self.n_requests -= 1


class Place:
    def __init__(self, room: Room) -> None:
        self._room = room
        self.is_stream = False

    def becomes_stream(self) -> None:
        """Count among the streams from here on, which last for minutes.

        Raises:
            QueueFull
        """
        self._room.to_streams()
        self.is_stream = True


def _full(detail: str, limit: int) -> QueueFull:
    return QueueFull(detail, limit=limit, retry_after_s=RETRY_AFTER_S)
