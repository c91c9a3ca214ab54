"""Readers and callers that come and go, over real HTTP: nothing is lost, twice, or left behind."""

import asyncio
import json
import uuid
from typing import Any

import pytest

from serve_app.sse_client import Event
from tests.support.house import puppet
from tests.support.http import Heard, User, sent_and_left
from tests.support.sandboxes import processes

pytestmark = pytest.mark.timeout(180)

TEXT = "".join(f"{n:03d} " for n in range(60))
TALK = {"say": TEXT, "chunks": 60, "delay_s": 0.01}
COUNT = {
    "call": "bash",
    "args": {"command": "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.05; done"},
}
LONG = puppet({**TALK, **COUNT}, TALK)
"""Two model calls and a tool between them, all of which show what they do for about a second."""
TALKS = puppet(TALK)
LONG_TURN = [
    "user_message", "model_called", "assistant_message", "tool_started",
    "sandbox_opened", "tool_finished", "model_called", "assistant_message", "turn_ended",
]  # fmt: skip


def told_whole(heard: Heard) -> None:
    """Every fact of LONG once, and both texts without gap or repeat."""
    assert heard.types() == LONG_TURN
    for message in heard.of("assistant_message"):
        assert message["text"] == heard.texts[message["part_id"]] == TEXT
    [finished] = heard.of("tool_finished")
    shown = heard.texts[finished["tool_call_id"]]
    assert shown.split() == [str(n) for n in range(1, 9)]
    assert shown in finished["text"]


@pytest.mark.parametrize("every", [1, 5])
async def test_a_client_that_is_cut_off_again_and_again_reads_on_from_its_cursor(
    alice: User, every: int
) -> None:
    session_id = await alice.opened()
    turn = await alice.sent(session_id, LONG)
    heard = Heard()
    n_connections = 0
    while "turn_ended" not in heard.types():
        left = every
        n_connections += 1

        def enough(_: Event) -> bool:
            nonlocal left
            left -= 1
            return left <= 0

        await alice.read(session_id, turn=turn, heard=heard, until=enough)
    assert n_connections >= len(LONG_TURN) / every
    told_whole(heard)


async def test_a_stream_that_answered_a_message_is_taken_up_elsewhere(alice: User) -> None:
    session_id = await alice.opened()
    heard = Heard()
    async with alice.events(
        "POST",
        f"/v1/sessions/{session_id}/messages",
        json={"text": LONG},
        headers={"Accept": "text/event-stream"},
    ) as events:
        async for event in events:
            heard.take(event)
            if event.type == "text_delta":
                break
    assert "turn_ended" not in heard.types()
    told_whole(await alice.read(session_id, turn=1, heard=heard))


async def test_a_turn_goes_on_with_no_reader(alice: User) -> None:
    session_id = await alice.opened()
    turn = await alice.sent(session_id, LONG)
    await alice.read(session_id, turn=turn, until=lambda event: event.type == "text_delta")
    # Nobody reads any more; a turn that is queued behind this one tells of its end.
    await alice.ended(session_id, puppet({"say": "second"}))
    heard = await alice.read(session_id, turn=turn)
    assert heard.types() == LONG_TURN
    assert heard.texts == {}  # previews are not stored: the messages have it all
    assert [message["text"] for message in heard.of("assistant_message")] == [TEXT, TEXT]


async def test_a_caller_that_leaves_after_the_message_was_taken_has_its_turn(alice: User) -> None:
    session_id = await alice.opened()
    body = json.dumps({"text": TALKS}).encode()
    path = f"/v1/sessions/{session_id}/messages"
    for n, after_s in enumerate((0.0, 0.002, 0.01, 0.05)):
        await sent_and_left(alice, path, body, key=f"m{n}", after_s=after_s)
    # Whether each arrived before its caller left is not known, so each is repeated, once.
    turns = [await alice.sent(session_id, TALKS, message_id=f"m{n}") for n in range(4)]
    assert sorted(turns) == [1, 2, 3, 4]
    heard = await alice.read(session_id, turn=4)
    assert heard.facts[-1]["reason"] == "done"
    whole = await alice.read(session_id, follow=False)
    assert [end["reason"] for end in whole.of("turn_ended")] == ["done"] * 4
    assert len(whole.of("user_message")) == 4


async def test_a_caller_that_leaves_while_a_session_opens_leaks_no_slot(alice: User) -> None:
    key = uuid.uuid4().hex
    for n, after_s in enumerate((0.0, 0.0, 0.001, 0.003, 0.01, 0.03)):
        await sent_and_left(alice, "/v1/sessions", b"{}", key=f"{key}-{n}", after_s=after_s)
    # The same keys lead to the sessions that were opened, and to new ones for the rest.
    for n in range(6):
        answer = await alice.http.post("/v1/sessions", json={"message_id": f"{key}-{n}"})
        assert answer.status_code == 201
    assert len((await alice.get("/v1/sessions"))["data"]) == 6
    capacity = await alice.get("/v1/capacity")
    assert (capacity["live"], capacity["user"]["live"]) == (3, 3)
    await alice.cleared()
    capacity = await alice.get("/v1/capacity")
    assert (capacity["live"], capacity["user"]["live"]) == (0, 0)
    for _ in range(3):
        session_id = await alice.opened()
        await alice.sent(session_id, puppet({"hang": True}))


async def test_parallel_sessions_stream_at_once(users: dict[str, User]) -> None:
    callers = [users[name] for name in ("alice", "alice", "bob", "bob", "carol")]
    ids = await asyncio.gather(*(user.opened() for user in callers))
    heard = await asyncio.gather(
        *(user.ended(sid, LONG) for user, sid in zip(callers, ids, strict=True))
    )
    for one in heard:
        told_whole(one)
    parts = [part for one in heard for part in one.texts]
    assert len(parts) == len(callers) * 3


async def test_twenty_readers_of_one_session_hear_the_same(alice: User) -> None:
    session_id = await alice.opened()
    readers = [asyncio.create_task(alice.read(session_id, turn=1)) for _ in range(20)]
    await alice.sent(session_id, LONG)
    heard = await asyncio.gather(*readers)
    for one in heard:
        told_whole(one)
        assert (one.facts, one.texts) == (heard[0].facts, heard[0].texts)


async def test_interrupt_in_a_running_command_ends_its_processes_and_keeps_finished_results(
    alice: User,
) -> None:
    mark = f"600.{uuid.uuid4().int % 10**12:012d}"
    calls: list[dict[str, Any]] = [
        {"call": "write", "args": {"path": "note.txt", "content": "kept"}},
        {"call": "bash", "args": {"command": f"bash -c 'echo up; sleep {mark}; :'"}},
    ]
    session_id = await alice.opened()
    turn = await alice.sent(session_id, puppet({"calls": calls}, {"say": "not reached"}))
    seen: set[str] = set()

    def both(event: Event) -> bool:
        seen.add(event.type)
        return {"tool_output_delta", "tool_finished"} <= seen

    heard = await alice.read(session_id, turn=turn, until=both)
    assert processes(mark)
    await alice.command(session_id, "interrupt")
    await alice.read(session_id, turn=turn, heard=heard)
    assert processes(mark) == []
    outcomes = {fact["tool"]: fact["outcome"] for fact in heard.of("tool_finished")}
    assert outcomes == {"write": "ok", "bash": "cancelled"}
    assert heard.facts[-1]["reason"] == "interrupted"
    # The session is usable, and what was written is there.
    after = await alice.ended(
        session_id, puppet({"call": "read", "args": {"path": "note.txt"}}, {"say": "ok"})
    )
    assert "kept" in after.of("tool_finished")[0]["text"]
