"""What tests of the edge ask, and how they read the answers."""

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx


class Event(NamedTuple):
    id: str
    event: str
    data: dict[str, Any]


async def opened(http: httpx.AsyncClient, **body: Any) -> str:
    answer = await http.post("/v1/sessions", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()["session_id"]


async def sent(http: httpx.AsyncClient, session_id: str, text: str, **more: Any) -> dict[str, Any]:
    answer = await http.post(f"/v1/sessions/{session_id}/messages", json={"text": text, **more})
    assert answer.status_code == 202, answer.text
    return answer.json()


def is_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem, after a look at everything that every problem has."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["code"] == code
    assert body["type"] == f"urn:troupe:problem:{code}"
    assert body["title"]
    assert body["detail"]
    return body


async def blocks(response: httpx.Response) -> AsyncIterator[list[str]]:
    """The lines between empty lines."""
    block: list[str] = []
    async for line in response.aiter_lines():
        if line:
            block.append(line)
        elif block:
            yield block
            block = []


def event(block: list[str]) -> Event:
    """Exactly `id`, `event`, `data`, a line each."""
    names = [line.split(": ", 1)[0] for line in block]
    assert names == ["id", "event", "data"], block
    place, kind, data = (line.split(": ", 1)[1] for line in block)
    return Event(place, kind, json.loads(data))


async def events(http: httpx.AsyncClient, path: str, **headers: str) -> list[Event]:
    """A stream to its end, without comments."""
    async with http.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        return [event(b) async for b in blocks(response) if b[0].startswith("id: ")]
