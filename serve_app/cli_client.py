"""Troupe's HTTP API from the client's side, as the terminal programs use it."""

import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import httpx

from serve_app.sse_client import EventReader, Problem

N_TRIES = 6
"""Of one command, over about 6 s: the time in which a dead actor is noticed and replaced."""
CALL_TIMEOUT_S = 90.0
"""Above the server's own limit of 60 s, so that its answer says what was wrong."""


class Accepted(NamedTuple):
    cursor: str
    turn: int | None
    """None: the command opened none."""


class Troupe:
    """One caller of one house. Not for use by several threads."""

    def __init__(
        self, url: str, key: str | None = None, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=CALL_TIMEOUT_S)
        self._pause = pause

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def open(
        self, *, model: str | None = None, title: str | None = None, agent: str | None = None
    ) -> dict[str, Any]:
        """
        Raises:
            Problem, httpx.TransportError
        """
        return self._command("/v1/sessions", {"model": model, "title": title, "agent": agent})

    def send(self, session_id: str, text: str) -> Accepted:
        return self.command(session_id, "messages", text=text)

    def decide(self, session_id: str, decisions: list[dict[str, Any]]) -> Accepted:
        return self.command(session_id, "approvals", decisions=decisions)

    def command(self, session_id: str, what: str, **body: Any) -> Accepted:
        """
        Raises:
            Problem: refused; nothing was changed.
            httpx.TransportError: the server did not answer; whether it carried it out is not known.
        """
        answer = self._command(f"/v1/sessions/{session_id}/{what}", body)
        return Accepted(answer["cursor"], answer.get("turn"))

    def _command(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Repeated under one message_id until there is an answer: it is carried out once."""
        given = {name: value for name, value in body.items() if value is not None}
        body = given | {"message_id": uuid.uuid4().hex}
        pause_s = 0.2
        for n_left in reversed(range(N_TRIES)):
            try:
                return self._checked(self.http.post(path, json=body))
            except httpx.TransportError:
                if not n_left:
                    raise
            except Problem as problem:
                if problem.status not in (502, 503, 504) or not n_left:
                    raise
            self._pause(pause_s)
            pause_s *= 2
        raise AssertionError("the last try returns or raises")

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """
        Raises:
            Problem, httpx.TransportError
        """
        return self._checked(self.http.get(path, params=params))

    def session(self, session_id: str) -> dict[str, Any]:
        return self.get(f"/v1/sessions/{session_id}")

    def events(self, session_id: str, cursor: str, *, patience_s: float = 60.0) -> EventReader:
        return EventReader(
            self.http, f"/v1/sessions/{session_id}/events", cursor=cursor, patience_s=patience_s
        )

    @staticmethod
    def _checked(response: httpx.Response) -> dict[str, Any]:
        if not response.is_success:
            raise Problem.of(response)
        return response.json()
