"""Every point of a turn, every process: what a `kill -9` leaves, over real HTTP on the run's cluster.

Points that lie between two lines of one process cannot be met from outside; they are cut there where
they can be: between a commit and its showing, and inside `adopt`, by `tests/actors/test_schedules.py`
and `tests/actors/test_recovery.py` (a crash after every fact, hosts that die in any order), and a
call that may run twice by `test_recovery` as well.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest

from agent.context import UNKNOWN
from serve_app.sse_client import Event
from tests.conftest import SMALL
from tests.support import cluster
from tests.support.house import puppet
from tests.support.http import OUTAGE_S, Heard, User
from tests.support.processes import eventually, wait_for_ends
from tests.support.sandboxes import processes

pytestmark = pytest.mark.timeout(180)

SOON_S = 20.0
SAY = puppet({"say": "Hello there."})
LIVE = {"idle", "running", "waiting_approval"}


class Point(NamedTuple):
    """A place in a turn: how to get there, and how its reader knows."""

    steps: tuple[dict[str, Any], ...]
    is_there: Callable[[Event], bool]
    agent: str = "tester"


def is_type(kind: str) -> Callable[[Event], bool]:
    return lambda event: event.type == kind


def acting(seconds: str) -> tuple[dict[str, Any], ...]:
    return (
        {"call": "bash", "args": {"command": f"echo up; sleep {seconds}"}},
        {"say": "after all"},
    )


POINTS = {
    # Right after the 202: the message's own fact is what is shown first.
    "accepted": Point(({"say": "after all", "delay_s": 1.5},), is_type("user_message")),
    "streaming": Point(
        (
            {
                "say": "so it goes " * 12,
                "chunks": 60,
                "delay_s": 0.05,
                "call": "bash",
                "args": {"command": "true"},
            },
            {"say": "after all"},
        ),
        is_type("text_delta"),
    ),
    "acting": Point(acting("2.{mark}"), is_type("tool_output_delta")),
    "asking": Point(
        (
            {"say": "may I?", "call": "bash", "args": {"command": "echo act {mark}"}},
            {"say": "after all"},
        ),
        is_type("turn_ended"),
        agent="asking",
    ),
}


class Run:
    """A session at a point, and one client that reads all of it."""

    def __init__(self, user: User, session_id: str, mark: str) -> None:
        self.user = user
        self.session_id = session_id
        self.mark = mark
        self.heard = Heard()
        self.turn = 0
        self._reading: asyncio.Task[Heard]

    @classmethod
    async def at(cls, user: User, point: Point, *, seconds: str = "") -> "Run":
        mark = f"{uuid4().int % 10**12:012d}"
        run = cls(user, await user.opened(agent=point.agent), mark)
        script = puppet(*(acting(seconds) if seconds else point.steps))
        run.turn = await user.sent(run.session_id, script.replace("{mark}", mark))
        await user.read(run.session_id, heard=run.heard, until=point.is_there)
        run.read_on()
        return run

    def read_on(self) -> None:
        """Follow what comes, from here to the end of the turn, in the background."""
        self._reading = asyncio.create_task(
            self.user.followed(self.session_id, self.turn, heard=self.heard)
        )

    async def ended(self) -> dict[str, Any]:
        """Wait for the turn, with nobody calling; its `turn_ended`. What was heard is what is there."""
        await self._reading
        await self.check()
        [ended] = [fact for fact in self.heard.of("turn_ended") if fact["turn"] == self.turn]
        return ended

    async def approved(self) -> dict[str, Any]:
        """Answer what waits; the end of the turn that this opens."""
        [ask] = (await self.user.view(self.session_id))["pending_approval"]
        decision = {"tool_call_id": ask["tool_call_id"], "decision": "approve"}
        path, key = f"/v1/sessions/{self.session_id}/approvals", uuid4().hex
        self.turn = (await self.user.insisted(path, key, decisions=[decision]))["turn"]
        self.read_on()
        return await self.ended()

    async def check(self) -> None:
        """Invariants 1 and 5: every fact once, in order, without a hole, for every reader."""
        now = await self.user.all_facts(self.session_id)
        assert [fact["seq"] for fact in now] == list(range(1, len(now) + 1))
        assert self.heard.facts == now[: len(self.heard.facts)]
        turns = [fact["turn"] for fact in now if fact["type"] == "turn_ended"]
        assert turns == sorted(set(turns))
        settled = [fact["tool_call_id"] for fact in now if fact["type"] == "tool_finished"]
        assert len(settled) == len(set(settled))
        for said in (fact for fact in now if fact["type"] == "assistant_message"):
            # Where the preview of an answer was seen to its end, it is the answer.
            preview = self.heard.texts.get(said["part_id"], "")
            assert said["text"].startswith(preview)

    async def activations(self) -> list[str]:
        facts = await self.user.all_facts(self.session_id)
        return [fact["reason"] for fact in facts if fact["type"] == "activated"]


@pytest.fixture
async def quiet(users: dict[str, User]) -> AsyncIterator[None]:
    """Nobody has anything when a test begins, and slots are exact when it ends (invariant 4). Whatever
    a test killed is there again for the next one."""
    await whole(users["alice"])
    await asyncio.gather(*(user.cleared() for user in users.values()))
    yield
    await whole(users["alice"])
    await exact(users)


async def whole(user: User) -> None:
    async def is_whole() -> bool:
        with suppress(httpx.TransportError):
            return (await user.http.get("/readyz")).status_code == 200
        return False

    await eventually(is_whole, OUTAGE_S)


async def exact(users: dict[str, User]) -> None:
    """As many slots are taken as there are sessions that say that they live, each by its owner."""

    async def is_exact() -> bool:
        counted = []
        for user in users.values():
            listed = (await user.get("/v1/sessions", limit=100))["data"]
            n_live = sum(one["status"] in LIVE for one in listed)
            counted.append(((await user.get("/v1/capacity"))["user"]["live"], n_live))
        live = (await users["alice"].get("/v1/capacity"))["live"]
        return all(taken == n for taken, n in counted) and live == sum(n for _, n in counted)

    await eventually(is_exact, SOON_S)


async def no_process_with(mark: str) -> None:
    async def is_gone() -> bool:
        return not await asyncio.to_thread(processes, mark)

    await eventually(is_gone, SOON_S)


# The session's own process


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["accepted", "streaming", "acting"])
async def test_a_turn_goes_on_by_itself_when_its_process_is_killed(alice: User, name: str) -> None:
    seconds = "600.{mark}" if name == "acting" else ""
    run = await Run.at(alice, POINTS[name], seconds=seconds)
    cluster.kill(await cluster.session_pid(run.session_id))
    assert (await run.ended())["reason"] == "done"
    assert run.heard.of("assistant_message")[-1]["text"] == "after all"
    assert await run.activations() == ["opened", "recovered"]
    if name == "acting":
        [finished] = run.heard.of("tool_finished")
        assert (finished["outcome"], finished["text"]) == ("unknown", UNKNOWN)
        await no_process_with(run.mark)
    assert (await alice.view(run.session_id))["status"] == "idle"


@pytest.mark.usefixtures("quiet")
async def test_what_waits_for_approval_waits_on_when_its_process_is_killed(alice: User) -> None:
    run = await Run.at(alice, POINTS["asking"])
    assert (await run.ended())["reason"] == "approval"
    cluster.kill(await cluster.session_pid(run.session_id))

    async def is_free() -> bool:
        return (await alice.get("/v1/capacity"))["live"] == 0

    await eventually(is_free, SOON_S)
    assert (await alice.view(run.session_id))["pending_approval"]
    assert (await run.approved())["reason"] == "done"
    [finished] = run.heard.of("tool_finished")
    assert finished["outcome"] == "ok"


# Another process, under sessions at every point


async def runs_at_every_point(users: dict[str, User]) -> dict[str, Run]:
    alice, bob = users["alice"], users["bob"]
    owners = {"asking": bob, "acting": alice, "streaming": alice, "accepted": alice}
    found = {name: await Run.at(owners[name], POINTS[name]) for name in ("asking", "acting")}
    two = ("streaming", "accepted")
    begun = await asyncio.gather(*(Run.at(owners[name], POINTS[name]) for name in two))
    return found | dict(zip(two, begun, strict=True))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("role", ["manager", "gateway", "edge", "proxy"])
async def test_every_turn_ends_when_another_process_is_killed(
    users: dict[str, User], role: str
) -> None:
    runs = await runs_at_every_point(users)
    victims = await cluster.pids_of(role)
    assert victims
    key = uuid4().hex
    creating = asyncio.create_task(users["bob"].insisted("/v1/sessions", key))
    cluster.kill(*victims)
    ended = {name: (await run.ended())["reason"] for name, run in runs.items()}
    assert ended == {"asking": "approval"} | dict.fromkeys(
        ("acting", "streaming", "accepted"), "done"
    )
    await whole(users["alice"])
    # What was created under the kill was created once, and works.
    created = (await creating)["session_id"]
    assert (await users["bob"].insisted("/v1/sessions", key))["session_id"] == created
    listed = (await users["bob"].get("/v1/sessions"))["data"]
    assert len(listed) == 2
    assert (await runs["asking"].approved())["reason"] == "done"
    assert (await users["bob"].ended(created, SAY)).facts[-1]["reason"] == "done"
    # Nobody's own process died, so nobody was activated again.
    for run in runs.values():
        assert await run.activations() == ["opened"]
        assert (await run.user.view(run.session_id))["status"] == "idle"
        await no_process_with(run.mark)
    assert runs["acting"].heard.of("tool_finished")[0]["outcome"] == "ok"


@pytest.mark.usefixtures("quiet")
async def test_turns_go_on_when_the_manager_and_their_processes_die_together(
    users: dict[str, User],
) -> None:
    runs = await runs_at_every_point(users)
    pids = [await cluster.session_pid(run.session_id) for run in runs.values()]
    cluster.kill(*await cluster.pids_of("manager"), *pids)
    ended = {name: (await run.ended())["reason"] for name, run in runs.items()}
    assert ended == {"asking": "approval"} | dict.fromkeys(
        ("acting", "streaming", "accepted"), "done"
    )
    # A short one may have ended while the pids were asked for, and then nothing is to be taken up.
    taken_up = {name: await run.activations() for name, run in runs.items()}
    assert taken_up["acting"] == ["opened", "recovered"]
    assert taken_up["asking"] == ["opened"]
    assert all(found in (["opened"], ["opened", "recovered"]) for found in taken_up.values())
    for run in runs.values():
        await no_process_with(run.mark)
    assert (await runs["asking"].approved())["reason"] == "done"


# Coming and going


async def opened(user: User) -> str:
    """Asked for again where an earlier test's kill has HAProxy begin anew and drop idle connections."""
    return (await user.insisted("/v1/sessions", uuid4().hex))["session_id"]


async def idle(user: User) -> str:
    session_id = await opened(user)
    await user.ended(session_id, SAY)
    return session_id


async def n_warm(user: User) -> int:
    return (await user.get("/v1/capacity"))["warm"]


async def stopped_warm(user: User) -> list[int]:
    """Every process that a session could come to live in, stopped: whoever comes now waits inside
    `adopt`. None is there that the manager does not count."""
    pids: list[int] = []

    async def all_are_warm() -> bool:
        pids[:] = await cluster.warm_pids()
        return SMALL.warm.min <= len(pids) == await n_warm(user)

    await eventually(all_are_warm, cluster.START_S)
    cluster.stop(*pids)
    return pids


async def one_is_taken(user: User, n_before: int) -> None:
    async def is_taken() -> bool:
        return await n_warm(user) < n_before

    await eventually(is_taken, SOON_S)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("victim", ["session", "manager"])
async def test_a_message_and_a_newcomer_are_served_though_what_adopts_them_dies(
    users: dict[str, User], victim: str
) -> None:
    """During activation and during create: the place where a session was to live is killed, or who
    sent it there."""
    alice, bob = users["alice"], users["bob"]
    session_id = await idle(alice)
    cluster.kill(await cluster.session_pid(session_id))
    await exact(users)
    warm = await stopped_warm(alice)
    keys = [uuid4().hex for _ in range(2)]
    waking = asyncio.create_task(
        alice.insisted(f"/v1/sessions/{session_id}/messages", keys[0], text=SAY)
    )
    creating = asyncio.create_task(bob.insisted("/v1/sessions", keys[1]))
    await one_is_taken(alice, len(warm))
    if victim == "session":
        cluster.kill(*warm)
    else:
        cluster.kill(*await cluster.pids_of("manager"))
        for pid in warm:
            os.kill(pid, signal.SIGCONT)
    turn = (await waking)["turn"]
    heard = await alice.followed(session_id, turn, heard=Heard())
    assert [fact["reason"] for fact in heard.of("turn_ended")] == ["done"] * 2
    created = (await creating)["session_id"]
    assert [one["session_id"] for one in (await bob.get("/v1/sessions"))["data"]] == [created]
    assert (await bob.ended(created, SAY)).facts[-1]["reason"] == "done"


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("victim", ["session", "manager"])
async def test_a_newcomer_gets_the_place_of_one_that_dies_while_it_leaves(
    users: dict[str, User], victim: str
) -> None:
    """During passivation: the one that is sent away cannot answer, and dies; or the manager does."""
    alice = users["alice"]
    leaving = await idle(alice)
    others = [await opened(alice) for _ in range(2)]
    for session_id in others:
        await alice.sent(session_id, puppet({"hang": True}))
    pid = await cluster.session_pid(leaving)
    cluster.stop(pid)
    coming = asyncio.create_task(alice.insisted("/v1/sessions", uuid4().hex))
    # A refusal of a fourth would come at once: it waits for the place of the one that leaves.
    _, waits = await asyncio.wait({coming}, timeout=0.5)
    assert waits
    if victim == "session":
        cluster.kill(pid)
    else:
        cluster.kill(*await cluster.pids_of("manager"))
        os.kill(pid, signal.SIGCONT)
    new = (await coming)["session_id"]
    assert (await alice.ended(new, SAY)).facts[-1]["reason"] == "done"
    capacity = await alice.get("/v1/capacity")
    assert (capacity["live"], capacity["user"]["live"]) == (3, 3)
    assert (await alice.view(leaving))["status"] == "passive"


# What kills, and what is late

SUICIDE = """\
pid=$$
until tr '\\0' ' ' < /proc/$pid/cmdline | grep -q '^ray::SessionActor'; do
    pid=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$pid/status)
done
kill -9 $pid
sleep 600
"""
"""Kills the process that the session lives in."""


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("also", ["nobody", "manager"])
async def test_a_turn_that_kills_its_process_each_time_is_given_up(alice: User, also: str) -> None:
    """Invariant 6; with the manager killed in the middle of the series."""
    session_id = await alice.opened(agent="bare")
    kill = {"call": "bash", "args": {"command": SUICIDE}}
    turn = await alice.sent(session_id, puppet(*[kill] * 9))
    heard = Heard()
    if also == "manager":

        def is_second(event: Event) -> bool:
            return event.type == "activated" and len(heard.of("activated")) == 3

        await alice.read(session_id, heard=heard, until=is_second)
        cluster.kill(*await cluster.pids_of("manager"))
    await alice.followed(session_id, turn, heard=heard)
    [ended] = heard.of("turn_ended")
    assert (ended["reason"], ended["code"]) == ("failed", "recovery_exhausted")
    assert "4 times" in ended["detail"]
    assert len(heard.of("tool_started")) == SMALL.max_recoveries + 1

    async def is_free() -> bool:
        return (await alice.get("/v1/capacity"))["live"] == 0

    await eventually(is_free, SOON_S)
    # The session itself is sound.
    assert (await alice.ended(session_id, SAY)).facts[-1]["reason"] == "done"


@pytest.mark.usefixtures("quiet")
async def test_a_process_that_was_paused_and_replaced_ends_and_writes_nothing(alice: User) -> None:
    """Under a manager that began after it: what was taken over is watched as what was started."""
    run = await Run.at(alice, POINTS["acting"], seconds="600.{mark}")
    cluster.kill(*await cluster.pids_of("manager"))
    await cluster.manager_answers()
    pid = await cluster.session_pid(run.session_id)
    [*old] = await asyncio.to_thread(processes, run.mark)
    assert old
    cluster.stop(pid)
    assert (await run.ended())["reason"] == "done"
    with suppress(ProcessLookupError):  # Ray may have ended it already
        os.kill(pid, signal.SIGCONT)
    assert not await asyncio.to_thread(wait_for_ends, [pid, *old], SOON_S)
    await run.check()
    [finished] = run.heard.of("tool_finished")
    assert finished["outcome"] == "unknown"
    assert await run.activations() == ["opened", "recovered"]
