"""The reading half of Troupe's SSE, for terminal clients and tests.

A stream is read until the reader stops, the server says that nothing will ever follow, or patience
ends. The server bounds each response in time and size on purpose and marks such an end with the
comment `reconnect`: the reader comes back with the last cursor it was given, and no event is missed.
An event may come twice only when the reader was torn away in the middle of one; facts carry `seq`
and deltas an offset, so it can be recognised.
"""

import json
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, NamedTuple

import httpx

MAX_EVENT_CHARS = 8 * 1024 * 1024
"""Of one event's data. A message is at most 100,000 characters and tool output far less; above this
the other side is no Troupe."""
MAX_EMPTY_ENDS = 3
"""Ends in good order, without the mark and with nothing heard, that mean that nothing will follow.
More than one, since a proxy on its way out may end a response as well."""
IDLE_LIMIT_S = 45.0
"""The server sends at least a heartbeat every 15 s; three missed ones are a dead connection."""


NO_ROUTES = "/-/routes for available routes"
"""In the 404 of a proxy of Ray Serve that was started again and knows no routes yet (2.60)."""


class Problem(Exception):
    """An `application/problem+json` answer, or what stands for one when the body is something else."""

    def __init__(self, status: int, code: str, detail: str, retry_after_s: float | None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, response: httpx.Response) -> "Problem":
        """Read the body of an answer that is not a success; the body must have been read."""
        try:
            body: Any = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            body = {}
        if response.status_code == 404 and NO_ROUTES in response.text:
            return cls(503, "unavailable", "The proxy has just started.", None)
        return cls(
            response.status_code,
            str(body.get("code", f"http_{response.status_code}")),
            str(body.get("detail", response.reason_phrase or "no reason given")),
            _seconds(body.get("retry_after_s", response.headers.get("retry-after"))),
        )


class Lost(Exception):
    """The stream could not be reopened for as long as the reader was willing to wait."""


class Event(NamedTuple):
    cursor: str
    """The `id:` line: pass it as the cursor to read on from here."""
    type: str
    data: dict[str, Any]


class Lines:
    """Server-sent events out of lines of text, by the WHATWG rules that Troupe uses."""

    def __init__(self) -> None:
        self.may_go_on = False
        """The last line was the server's mark of a stream that it cut on purpose."""
        self._cursor = ""
        self._type = ""
        self._data: list[str] = []
        self._n_chars = 0

    def feed(self, line: str) -> Event | None:
        """Take one line without its end; the event that an empty line completes."""
        if not line:
            return self._complete()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        self.may_go_on = not name and value == "reconnect"
        match name:
            case "id":
                self._cursor = value
            case "event":
                self._type = value
            case "data":
                self._n_chars += len(value)
                if self._n_chars > MAX_EVENT_CHARS:
                    raise Lost("an event is larger than any that Troupe sends")
                self._data.append(value)
            case _:
                pass  # a comment (the heartbeat), or a field that the standard says to ignore
        return None

    def _complete(self) -> Event | None:
        data, kind = "\n".join(self._data), self._type
        self._data, self._type, self._n_chars = [], "", 0
        if not data:
            return None
        try:
            body = json.loads(data)
        except ValueError as cause:
            raise Lost("an event holds no JSON: this is not a Troupe server") from cause
        return Event(self._cursor, kind, body)


class EventReader:
    """Follows one session's events over any number of connections.

    `cursor` is the place up to which the caller has taken events: another reader may go on there.
    """

    def __init__(
        self,
        http: httpx.Client,
        path: str,
        *,
        cursor: str = "",
        patience_s: float = 60.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = http
        self._path = path
        self._patience_s = patience_s
        self._pause = pause
        self.cursor = cursor

    def events(self, *, turn: int | None = None, follow: bool = True) -> Generator[Event]:
        """Events after `cursor`: to the end of `turn`, or to the head, or for ever.

        `turn`: only that turn's, ending after its `turn_ended`. `follow=False`: ends at the head as
        it is when the server reaches it.

        Raises:
            Problem: the server refused (unknown session, bad key); reconnecting would not help.
            Lost: the server did not answer for `patience_s`.
        """
        params: dict[str, str] = {"follow": "true" if follow else "false"}
        if turn is not None:
            params["turn"] = str(turn)
        retry = _Patience(self._patience_s, self._pause)
        while True:
            lines = Lines()
            try:
                with closing(self._one_response(params, lines)) as response:
                    for event in response:
                        retry.heard()
                        yield event
                        # After the yield: a reader torn away inside it sees the event again.
                        self.cursor = event.cursor or self.cursor
                        if _is_last(event, turn):
                            return
                if not lines.may_go_on and (not follow or retry.ended()):
                    return
            except httpx.TransportError as cause:
                retry.failed(cause)
            except Problem as problem:
                if problem.status not in (429, 502, 503, 504):
                    raise
                retry.failed(problem, problem.retry_after_s)

    def _one_response(self, params: dict[str, str], lines: Lines) -> Generator[Event]:
        headers = {"accept": "text/event-stream"}
        if self.cursor:
            headers["last-event-id"] = self.cursor
        timeout = httpx.Timeout(10.0, read=IDLE_LIMIT_S)
        with self._http.stream(
            "GET", self._path, params=params, headers=headers, timeout=timeout
        ) as response:
            if response.status_code != 200:
                response.read()
                raise Problem.of(response)
            for line in response.iter_lines():
                event = lines.feed(line)
                if event is not None:
                    yield event


def _is_last(event: Event, turn: int | None) -> bool:
    """Whether nothing can follow for this reader, so that coming back would be in vain."""
    if event.type == "session_closed":
        return True
    return turn is not None and event.type == "turn_ended" and event.data.get("turn") == turn


class _Patience:
    """Pauses between connections, longer while nothing is heard, up to a limit."""

    def __init__(self, limit_s: float, pause: Callable[[float], None]) -> None:
        self._limit_s = limit_s
        self._pause = pause
        self._waited_s = 0.0
        self._next_s = 0.1
        self._n_empty = 0

    def heard(self) -> None:
        self._waited_s, self._next_s, self._n_empty = 0.0, 0.1, 0

    def ended(self) -> bool:
        """Count an end in good order. True: it was one too many."""
        self._n_empty += 1
        if self._n_empty >= MAX_EMPTY_ENDS:
            return True
        self._pause(self._next_s)
        return False

    def failed(self, cause: Exception, wait_s: float | None = None) -> None:
        if self._waited_s >= self._limit_s:
            raise Lost(
                f"no events for {self._limit_s:.0f} s: is the server still there?"
            ) from cause
        pause_s = min(wait_s or self._next_s, 5.0, self._limit_s)
        self._pause(pause_s)
        self._waited_s += pause_s
        self._next_s = min(self._next_s * 2, 5.0)


def _seconds(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
