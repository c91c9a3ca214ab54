"""Processes that die under a running house: the manager's, and a session's."""

import os
import signal
from typing import Any

import pytest
import ray

from actors.protocol import Unavailable
from actors.remote import NAMESPACE, answer
from actors.session import MANAGER
from serve_app.sse_client import Event
from tests.support.house import puppet
from tests.support.http import User
from tests.support.processes import eventually, wait_for_ends

pytestmark = pytest.mark.timeout(180)

START_S = 60.0
SOON_S = 15.0
SAY = puppet({"say": "Hello there."})
HANG = puppet({"hang": True})


async def got(reference: Any) -> Any:
    return await answer(reference, Unavailable("no answer"), START_S)


def pid_of(_: Any) -> int:
    return os.getpid()


async def host_of(session_id: str) -> Any:
    """The actor that hosts the session."""
    manager = ray.get_actor(MANAGER, namespace=NAMESPACE)
    route = await got(manager.find.remote(session_id))
    return ray.get_actor(route.host, namespace=NAMESPACE)


async def kill_host_of(session_id: str) -> None:
    pid = await got((await host_of(session_id)).__ray_call__.remote(pid_of))
    os.kill(pid, signal.SIGKILL)
    assert not wait_for_ends([pid], SOON_S)


def is_delta(event: Event) -> bool:
    return event.type in {"text_delta", "tool_output_delta"}


async def reason_of(user: User, session_id: str) -> str:
    return (await user.read(session_id, follow=False)).of("activated")[-1]["reason"]


async def kill_manager(*, process: bool) -> None:
    """Returns when its next incarnation answers."""
    manager: Any = ray.get_actor(MANAGER, namespace=NAMESPACE)
    pid = await got(manager.__ray_call__.remote(pid_of))
    if process:
        os.kill(pid, signal.SIGKILL)
    else:
        ray.kill(manager, no_restart=False)
    assert not wait_for_ends([pid], SOON_S)
    assert await got(manager.ready.options(max_task_retries=-1).remote())


@pytest.mark.parametrize("process", [True, False], ids=["sigkill", "ray_kill"])
async def test_a_restarted_manager_finds_what_lives(
    users: dict[str, User], *, process: bool
) -> None:
    alice, bob = users["alice"], users["bob"]
    idle, ending, hanging = [await alice.opened() for _ in range(3)]
    other = await bob.opened()
    await alice.ended(idle, SAY)
    await alice.sent(hanging, HANG)
    await alice.sent(ending, puppet({"say": "x" * 40, "chunks": 40, "delay_s": 0.02}))
    await alice.read(ending, turn=1, until=is_delta)
    await kill_manager(process=process)
    heard = await alice.read(ending, turn=1)
    assert heard.facts[-1]["reason"] == "done"
    capacity = await alice.get("/v1/capacity")
    assert (capacity["live"], capacity["user"]["live"]) == (4, 3)
    states = {s["session_id"]: s["status"] for s in (await alice.get("/v1/sessions"))["data"]}
    assert states == {idle: "idle", ending: "idle", hanging: "running"}
    # The sessions go on where they were: nobody was activated again.
    for user, session_id in ((alice, idle), (alice, ending), (bob, other)):
        await user.ended(session_id, SAY)
        assert len((await user.read(session_id, follow=False)).of("activated")) == 1
    # And the new manager knows who is idle: two newcomers find room, a third does not.
    newcomers = [await alice.opened() for _ in range(2)]
    for session_id in newcomers:
        await alice.sent(session_id, HANG)
    assert (await alice.http.post("/v1/sessions", json={})).status_code == 429
    assert (await alice.view(hanging))["status"] == "running"


async def test_a_killed_session_process_frees_its_slot_and_the_session_wakes_elsewhere(
    alice: User,
) -> None:
    session_id = await alice.opened()
    await alice.ended(session_id, SAY)
    await kill_host_of(session_id)

    async def is_free() -> bool:
        return (await alice.get("/v1/capacity"))["live"] == 0

    await eventually(is_free, SOON_S)
    assert (await alice.view(session_id))["status"] == "passive"
    assert (await alice.ended(session_id, SAY)).facts[-1]["reason"] == "done"
    assert len(await alice.messages(session_id)) == 4
    assert await reason_of(alice, session_id) == "recovered"
    assert (await alice.get("/v1/capacity"))["live"] == 1


async def test_a_message_right_after_the_kill_is_taken_once(alice: User) -> None:
    session_id = await alice.opened()
    await alice.ended(session_id, SAY)
    await kill_host_of(session_id)
    turn = await alice.sent(session_id, SAY)
    assert (await alice.read(session_id, turn=turn)).facts[-1]["reason"] == "done"
    assert len(await alice.messages(session_id)) == 4


async def test_a_turn_whose_process_was_killed_goes_on_at_the_next_message(alice: User) -> None:
    session_id = await alice.opened()
    act = {"call": "bash", "args": {"command": "echo up; sleep 600"}}
    turn = await alice.sent(session_id, puppet(act, {"say": "after all"}))
    heard = await alice.read(session_id, turn=turn, until=is_delta)
    await kill_host_of(session_id)
    second = await alice.sent(session_id, SAY)
    await alice.read(session_id, turn=turn, heard=heard)
    [finished] = heard.of("tool_finished")
    assert finished["outcome"] == "unknown"
    assert heard.of("assistant_message")[-1]["text"] == "after all"
    assert heard.facts[-1]["reason"] == "done"
    assert (await alice.read(session_id, turn=second)).facts[-1]["reason"] == "done"
    assert await reason_of(alice, session_id) == "recovered"
