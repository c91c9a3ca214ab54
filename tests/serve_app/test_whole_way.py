"""From a socket through the edge to real sessions and back, in one process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.protocol import Sessions
from actors.settings import ActorsSettings
from tests.serve_app.asking import blocks, event, events, is_problem, opened, sent
from tests.support.house import Wait, kit_for, local_house, puppet


@pytest.fixture
def wait() -> Wait:
    return Wait()


@pytest.fixture
async def sessions(tmp_path: Path, wait: Wait) -> AsyncIterator[Sessions]:
    limits = ActorsSettings(page_wait_s=0.1, max_sessions_per_user=2)
    async with local_house(kit_for(tmp_path, tools=[wait], actors=limits)) as sessions:
        yield sessions


SAY = puppet({"say": "Hello there.", "chunks": 3})


def text_of(found: list[Any]) -> str:
    """The deltas put together by their offsets, which leave no gap and repeat nothing."""
    text = ""
    for one in found:
        if one.event == "text_delta":
            assert one.data["offset"] == len(text)
            text += one.data["text"]
    return text


async def test_a_turn_streams_to_its_end_and_replays_the_same(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    path = f"/v1/sessions/{session_id}"
    async with alice.stream(
        "POST", f"{path}/messages", json={"text": SAY}, headers={"Accept": "text/event-stream"}
    ) as response:
        live = [event(b) async for b in blocks(response) if b[0].startswith("id: ")]
    facts = [e for e in live if "seq" in e.data]
    assert facts[0].event == "user_message"
    assert live[-1].event == "turn_ended"
    assert live[-1].data["reason"] == "done"
    assert text_of(live) in {"", "Hello there."}
    again = await events(alice, f"{path}/events?turn=1")
    assert [e.data for e in again if "seq" in e.data] == [e.data for e in facts]
    messages = (await alice.get(f"{path}/messages")).json()["data"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert "spec" not in again[0].data


async def test_a_reader_that_is_cut_off_in_a_turn_comes_back_by_its_cursor(
    alice: httpx.AsyncClient, wait: Wait
) -> None:
    session_id = await opened(alice)
    path = f"/v1/sessions/{session_id}"
    text = puppet({"call": "wait", "args": {"word": "x"}}, {"say": "Done."})
    found = []
    async with alice.stream(
        "POST", f"{path}/messages", json={"text": text}, headers={"Accept": "text/event-stream"}
    ) as response:
        async for block in blocks(response):
            if block[0].startswith("id: "):
                found.append(event(block))
                if found[-1].event == "tool_started":
                    break
    async with asyncio.timeout(5):
        await wait.began.wait()
    assert (await alice.get(path)).json()["status"] == "running"
    wait.go.set()
    found += await events(alice, f"{path}/events?turn=1", **{"Last-Event-ID": found[-1].id})
    seqs = [e.data["seq"] for e in found if "seq" in e.data]
    assert seqs == sorted(set(seqs))
    whole = await events(alice, f"{path}/events?turn=1")
    assert seqs == [e.data["seq"] for e in whole if "seq" in e.data]


async def test_a_running_turn_is_interrupted(alice: httpx.AsyncClient, wait: Wait) -> None:
    session_id = await opened(alice)
    path = f"/v1/sessions/{session_id}"
    await sent(alice, session_id, puppet({"call": "wait", "args": {"word": "x"}}))
    async with asyncio.timeout(5):
        await wait.began.wait()
    assert (await alice.post(f"{path}/interrupt")).status_code == 202
    found = await events(alice, f"{path}/events?turn=1")
    assert found[-1].data["reason"] == "interrupted"
    is_problem(await alice.post(f"{path}/interrupt"), 409, "conflict")


async def test_a_message_sent_twice_is_one_turn(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    first = await sent(alice, session_id, SAY, message_id="m-1")
    assert (await sent(alice, session_id, SAY, message_id="m-1"))["turn"] == first["turn"]
    await events(alice, f"/v1/sessions/{session_id}/events?turn=1")
    assert (await sent(alice, session_id, SAY))["turn"] == 2


async def test_text_that_no_store_could_keep_never_gets_that_far(
    alice: httpx.AsyncClient,
) -> None:
    session_id = await opened(alice)
    path = f"/v1/sessions/{session_id}/messages"
    kind = {"Content-Type": "application/json"}
    for raw in (b'{"text": "\\ud800"}', b'{"text": "\\u0000"}'):
        is_problem(await alice.post(path, content=raw, headers=kind), 422, "invalid")
    assert (await alice.get(path)).json() == {"data": []}


async def test_every_session_a_user_holds_counts_until_it_is_closed(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient, wait: Wait
) -> None:
    """Both of alice's sessions have a running turn, so none can give way."""
    held = [await opened(alice) for _ in range(2)]
    for session_id in held:
        await sent(alice, session_id, puppet({"call": "wait", "args": {"word": "x"}}))
    async with asyncio.timeout(5):
        await wait.began.wait()
    body = is_problem(await alice.post("/v1/sessions"), 429, "at_capacity")
    assert (body["scope"], body["limit"]) == ("per_user", 2)
    await opened(bob)
    assert (await alice.post(f"/v1/sessions/{held[0]}/close")).status_code == 202
    await opened(alice)
    wait.go.set()
