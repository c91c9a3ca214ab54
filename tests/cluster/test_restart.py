"""The whole house ends, in good order or not, and starts again on the same storage."""

import json
import signal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from serve_app.sse_client import Event
from tests.support.house import puppet
from tests.support.http import Heard, User
from tests.support.own_house import END_S, OwnHouse, own_house
from tests.support.processes import below, wait_for_ends
from tests.support.sandboxes import processes

pytestmark = pytest.mark.timeout(300)

SAY = puppet({"say": "Hello there."})


def is_delta(event: Event) -> bool:
    return event.type == "tool_output_delta"


async def begun(user: User, mark: str) -> tuple[str, Heard]:
    """A session whose turn is in the middle of a command, and what its reader heard so far."""
    session_id = await user.opened(title=f"working {mark}")
    act = {"call": "bash", "args": {"command": f"echo up; sleep {mark}"}}
    await user.sent(session_id, puppet(act, {"say": "after all"}))
    return session_id, await user.read(session_id, until=is_delta)


async def goes_on(user: User, session_id: str, heard: Heard) -> None:
    """The turn of a session that was begun ends with nobody calling: its reader, who comes back with
    its cursor, hears the rest, once. The command that had started is `unknown`."""

    def is_end(event: Event) -> bool:
        return event.type == "turn_ended"

    await user.read(session_id, heard=heard, until=is_end)
    [finished] = heard.of("tool_finished")
    assert finished["outcome"] == "unknown"
    assert heard.of("assistant_message")[-1]["text"] == "after all"
    assert heard.facts[-1]["reason"] == "done"
    facts = await facts_of(user, session_id)
    assert facts[: len(heard.facts)] == heard.facts


async def statuses(user: User) -> dict[str, str]:
    listed = (await user.get("/v1/sessions"))["data"]
    return {session["title"]: session["status"] for session in listed}


async def facts_of(user: User, session_id: str) -> list[dict[str, Any]]:
    return (await user.read(session_id, follow=False)).facts


def new_mark() -> str:
    """Of one `sleep`, for the length of any test."""
    return f"600.{uuid4().int % 10**12:012d}"


def end_at_the_second_signal(house: OwnHouse) -> None:
    """The second one does not wait for what runs any more."""
    everyone = below(house.process.pid)
    house.process.send_signal(signal.SIGTERM)
    house.said("Stopping")
    house.process.send_signal(signal.SIGTERM)
    house.process.wait(END_S)
    assert wait_for_ends(everyone, END_S) == set()


def left_in_good_order(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Nothing but the session's leaving came to its facts."""
    assert after[: len(before)] == before
    leaving = [f["type"] for f in after[len(before) :] if f["type"] != "workspace_saved"]
    assert leaving == ["sandbox_closed", "passivated"]
    assert after[-1]["reason"] == "shutdown"


async def test_sessions_outlive_a_stop_and_a_kill_of_the_whole_house(tmp_path: Path) -> None:
    """One test, since a house takes half a minute of a small machine to start."""
    mark = new_mark()
    with own_house(tmp_path, drain_s=0.5) as first:
        async with first.user() as user:
            idle = await user.opened(title="idle")
            write = {"call": "write", "args": {"path": "n.txt", "content": "kept"}}
            await user.ended(idle, puppet(write, {"say": "ok"}))
            closed = await user.opened(title="closed")
            await user.command(closed, "close")
            working, heard = await begun(user, mark)
            messages = [await user.messages(each) for each in (idle, closed)]
            facts = await facts_of(user, idle)
        assert processes(mark)
        first.terminate()
    assert processes(mark) == []
    for session_id in (idle, closed, working):
        made = json.loads((tmp_path / "trajectories" / f"{session_id}.json").read_text())
        assert made["session_id"] == session_id

    mark = new_mark()
    # Serve's own proxy once, as every other test has HAProxy.
    with own_house(tmp_path, edge={"proxy": "serve"}) as second:
        async with second.user() as user:
            await goes_on(user, working, heard)
            assert [f["reason"] for f in heard.of("passivated")] == ["shutdown"]
            assert (await user.view(idle))["status"] == "passive"
            assert (await user.view(closed))["status"] == "closed"
            assert (await user.get("/v1/capacity"))["live"] == 1
            assert [await user.messages(each) for each in (idle, closed)] == messages
            left_in_good_order(facts, await facts_of(user, idle))
            read = {"call": "read", "args": {"path": "n.txt"}}
            told = await user.ended(idle, puppet(read, {"say": "ok"}))
            assert "kept" in told.of("tool_finished")[0]["text"]
            killed, heard = await begun(user, mark)
            messages = [await user.messages(each) for each in (idle, working)]
        # What the sandbox holds is not killed here: it dies with what it belongs to.
        sandboxed = set(processes(mark))
        assert sandboxed
        second.kill(spared=sandboxed)
    assert processes(mark) == []

    mark = new_mark()
    with own_house(tmp_path, drain_s=END_S * 10) as third:
        async with third.user() as user:
            await goes_on(user, killed, heard)
            assert [await user.messages(each) for each in (idle, working)] == messages
            assert [f["reason"] for f in heard.of("activated")] == ["opened", "recovered"]
            assert (await user.ended(idle, SAY)).facts[-1]["reason"] == "done"
            facts = await facts_of(user, idle)
            reasons = [f["reason"] for f in facts if f["type"] == "activated"]
            assert reasons == ["opened", "woken", "recovered"]
            await begun(user, mark)
        end_at_the_second_signal(third)
    assert processes(mark) == []
