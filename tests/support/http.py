"""A user of HTTP v1 over a real server: commands, streams, and lines that break."""

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

from serve_app.sse_client import Event, Lines

WAIT_S = 30.0
"""Limit of every wait for a stream: a process may have to start meanwhile."""
OUTAGE_S = 50.0
"""Limit of every wait over the death of a process of Serve's: its controller looks every 10 s."""
AGAIN_S = 0.1
DELTAS = {"text_delta", "tool_output_delta"}


class Heard:
    """What a client has put together over any number of connections. A fact that comes twice or out
    of order, and a text with a gap or a repeat, is an error here."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []
        self.texts: dict[str, str] = {}
        self.cursor = ""

    def take(self, event: Event) -> None:
        self.cursor = event.cursor
        body = event.data
        if event.type in DELTAS:
            part = body.get("part_id") or body["tool_call_id"]
            assert body["offset"] == len(self.texts.get(part, "")), body
            self.texts[part] = self.texts.get(part, "") + body["text"]
        else:
            assert event.type == body["type"]
            assert not self.facts or body["seq"] > self.facts[-1]["seq"], body
            self.facts.append(body)

    def has_ended(self, turn: int) -> bool:
        return any(fact["turn"] == turn for fact in self.of("turn_ended"))

    def types(self) -> list[str]:
        return [fact["type"] for fact in self.facts]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fact for fact in self.facts if fact["type"] == kind]


class Away(AssertionError):
    """Nobody answered for Troupe: a process died, and its successor is not there yet."""


class User:
    """One caller. What it asks for must be granted; refusals are looked at through `http`."""

    def __init__(self, name: str, http: httpx.AsyncClient) -> None:
        self.name = name
        self.http = http

    async def get(self, path: str, **params: Any) -> Any:
        answer = await self.http.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def opened(self, **body: Any) -> str:
        answer = await self.http.post("/v1/sessions", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()["session_id"]

    async def command(self, session_id: str, name: str, **body: Any) -> dict[str, Any]:
        answer = await self.http.post(f"/v1/sessions/{session_id}/{name}", json=body)
        assert answer.status_code == 202, answer.text
        return answer.json()

    async def sent(self, session_id: str, text: str, **more: Any) -> int:
        """The number of the turn that the message opens."""
        return (await self.command(session_id, "messages", text=text, **more))["turn"]

    async def insisted(self, path: str, key: str, **body: Any) -> dict[str, Any]:
        """POST again and again, under one key, until it is taken."""
        async with asyncio.timeout(OUTAGE_S):
            while True:
                with suppress(httpx.TransportError):
                    headers = {"Idempotency-Key": key}
                    answer = await self.http.post(path, json=body, headers=headers)
                    if answer.status_code < 500:
                        assert answer.is_success, answer.text
                        return answer.json()
                await asyncio.sleep(AGAIN_S)

    async def view(self, session_id: str) -> dict[str, Any]:
        return await self.get(f"/v1/sessions/{session_id}")

    async def messages(self, session_id: str) -> list[dict[str, Any]]:
        return (await self.get(f"/v1/sessions/{session_id}/messages"))["data"]

    async def read(
        self,
        session_id: str,
        *,
        turn: int | None = None,
        follow: bool = True,
        heard: Heard | None = None,
        until: Callable[[Event], bool] | None = None,
    ) -> Heard:
        """Read to the end of the stream, or until the first event that `until` says yes to."""
        heard = heard or Heard()
        params = {"follow": str(follow).lower()} | ({"turn": str(turn)} if turn else {})
        path = f"/v1/sessions/{session_id}/events"
        async with asyncio.timeout(WAIT_S):
            while True:
                headers = {"Last-Event-ID": heard.cursor} if heard.cursor else {}
                async with self.events("GET", path, params=params, headers=headers) as events:
                    async for event in events:
                        heard.take(event)
                        if until and until(event):
                            return heard
                    if not events.may_go_on:
                        return heard

    async def all_facts(self, session_id: str) -> list[dict[str, Any]]:
        """Every fact there is, in one reading from the beginning, as soon as it can be had."""
        async with asyncio.timeout(OUTAGE_S):
            while True:
                with suppress(httpx.TransportError, Away):
                    return (await self.read(session_id, follow=False)).facts
                await asyncio.sleep(AGAIN_S)

    async def followed(self, session_id: str, turn: int, *, heard: Heard) -> Heard:
        """Read to the end of a turn, whatever breaks on the way, as a browser does: again with the
        last id."""

        def is_end(event: Event) -> bool:
            return event.type == "turn_ended" and event.data["turn"] == turn

        async with asyncio.timeout(OUTAGE_S):
            while not heard.has_ended(turn):
                with suppress(httpx.TransportError, Away):
                    await self.read(session_id, heard=heard, until=is_end)
                if not heard.has_ended(turn):
                    await asyncio.sleep(AGAIN_S)
        return heard

    @asynccontextmanager
    async def events(self, method: str, path: str, **options: Any) -> AsyncGenerator["Stream"]:
        """One response, as long as it lasts. Leaving earlier resets the connection."""
        async with self.http.stream(method, path, **options) as response:
            if response.status_code >= 500:
                raise Away(await response.aread())
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            stream = Stream(response)
            try:
                yield stream
            finally:
                if not stream.ended:
                    line = response.extensions["network_stream"].get_extra_info("socket")
                    if line.fileno() != -1:  # it may have gone by itself
                        reset_on_close(line)

    async def ended(self, session_id: str, text: str) -> Heard:
        """A whole turn."""
        return await self.read(session_id, turn=await self.sent(session_id, text))

    async def cleared(self) -> None:
        """Delete all that the user has."""
        while found := (await self.get("/v1/sessions", limit=100))["data"]:
            for session in found:
                answer = await self.http.delete(f"/v1/sessions/{session['session_id']}")
                assert answer.status_code == 204, answer.text


class Stream:
    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._lines = Lines()
        self.ended = False

    @property
    def may_go_on(self) -> bool:
        """The server ended the response on purpose: come back with the last id."""
        return self._lines.may_go_on

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for line in self._response.aiter_lines():
            if event := self._lines.feed(line):
                yield event
        self.ended = True


def reset_on_close(line: socket.socket) -> None:
    """Have the connection end as when a machine goes away: at once, unread data and all."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def sent_and_left(user: User, path: str, body: bytes, *, key: str, after_s: float) -> None:
    """POST `body` and reset the connection without having read anything."""
    url = user.http.base_url
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\n"
        f"Authorization: {user.http.headers['authorization']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Idempotency-Key: {key}\r\n\r\n"
    )
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(after_s)  # not a wait: when the client leaves is what the test varies
    writer.transport.abort()
