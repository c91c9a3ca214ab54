"""Nodes, the GCS and Postgres go away under running turns, on a world of processes: two Ray nodes, Redis,
Postgres and `troupe up`, each started as an operator does."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from bench.chaos import Run, options_of, settings_for
from bench.clients import Ear, Line, Talk
from bench.evidence import Evidence
from bench.processes import snapshot
from bench.scripts import Script, script
from bench.support.postgres import Postgres
from bench.world import Victim, World, has
from tests.support.processes import eventually

pytestmark = pytest.mark.timeout(400)

N_SESSIONS = 6
OTHER = 1
"""The node that is lost."""
SOON_S = 60.0
PATIENCE_S = 180.0
"""A stuck turn is stuck for ever; busy cores need more than the command's default."""
SAY = {"say": "After all. " * 20, "chunks": 20, "delay_s": 0.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    settings = settings_for(N_SESSIONS + 3)
    directory = tmp_path_factory.mktemp("world")
    with (
        Postgres() as database,
        World(
            directory,
            nodes=2,
            redis=has("redis-server"),
            database=database,
            settings=settings,
        ) as world,
    ):
        yield world


class Users:
    """Talks over one line, with one evidence."""

    def __init__(self, world: World, evidence: Evidence, stack: AsyncExitStack) -> None:
        self.line = Line(world.url, evidence)
        self._evidence = evidence
        self._stack = stack

    @property
    def n_refused(self) -> int:
        return sum(self._evidence.refusals.values())

    async def opened(self) -> tuple[Talk, Ear]:
        talk = Talk(self.line, self._evidence, random.Random(1), "test")
        return talk, await self._stack.enter_async_context(talk.opened("loader"))


@pytest.fixture
async def users(world: World, tmp_path: Path) -> AsyncIterator[Users]:
    """What they find wrong fails the test; what they opened is deleted."""
    evidence = Evidence(tmp_path / "evidence", patience_s=PATIENCE_S)
    async with AsyncExitStack() as stack:
        users = Users(world, evidence, stack)
        yield users
    for session in await users.line.sessions():
        await users.line.asked("DELETE", f"/v1/sessions/{session['session_id']}")
    await users.line.http.aclose()
    assert evidence.violations == []


def working(seconds: float) -> tuple[Script, str]:
    """A turn in the middle of a command for so long, and what marks the command's process."""
    mark = f"{seconds:.0f}.{uuid4().int % 10**12:012d}"
    act = {"call": "bash", "args": {"command": f"echo up; sleep {mark}"}}
    return Script(script(act, SAY)), mark


def sleeping(mark: str) -> set[int]:
    return {p.pid for p in snapshot().values() if p.title == f"sleep {mark}"}


def of(ear: Ear, kind: str) -> list[dict[str, Any]]:
    return [fact for fact in ear.facts if fact["type"] == kind]


async def begun(world: World, mark: str, talk: Talk) -> Victim:
    """Where the session is, once its command runs."""

    async def runs() -> bool:
        return bool(await asyncio.to_thread(sleeping, mark))

    await eventually(runs, SOON_S)
    host = await asyncio.to_thread(world.host_of, talk.session_id)
    assert host is not None
    return host


async def test_the_turns_of_a_lost_node_go_on_on_another(world: World, users: Users) -> None:
    lost: list[tuple[Talk, Ear, int]] = []
    for _ in range(world_limit(world)):
        talk, ear = await users.opened()
        asked, mark = working(600)
        sent = await talk.say(asked)
        if (await begun(world, mark, talk)).node == OTHER:
            lost.append((talk, ear, sent.turn))
        if len(lost) == 2:
            break
    assert lost, "no session was placed on the other node"
    await asyncio.to_thread(world.kill_node, OTHER)
    try:
        for talk, ear, turn in lost:
            assert (await ear.ended(turn))["reason"] == "done"
            assert [fact["outcome"] for fact in of(ear, "tool_finished")] == ["unknown"]
            assert of(ear, "activated")[-1]["reason"] == "recovered"
            await talk.check_journal(ear)
    finally:
        await asyncio.to_thread(world.start_node, OTHER)


def world_limit(world: World) -> int:
    return world.settings["actors"]["max_sessions"]


async def test_turns_run_on_while_the_gcs_is_away(world: World, users: Users) -> None:
    if not world.redis:
        pytest.skip(
            "NO redis-server ON THIS MACHINE: THE GCS CANNOT COME BACK, SO IT WAS NOT KILLED"
        )
    talk, ear = await users.opened()
    asked, mark = working(5)
    sent = await talk.say(asked)
    await begun(world, mark, talk)
    [gcs] = world.victims()["gcs"]
    assert world.kill(gcs)
    assert (await ear.ended(sent.turn))["reason"] == "done"
    assert [fact["outcome"] for fact in of(ear, "tool_finished")] == ["ok"]
    assert len(of(ear, "activated")) == 1
    await asyncio.to_thread(world.start_gcs)
    other, heard = await users.opened()
    sent = await other.say(Script(script(SAY)))
    assert (await heard.ended(sent.turn))["reason"] == "done"
    await talk.check_journal(ear)
    await other.check_journal(heard)


async def test_what_is_sent_while_postgres_is_away_is_carried_out_once(
    world: World, users: Users
) -> None:
    running, ear = await users.opened()
    asked, mark = working(2)
    first = await running.say(asked)
    await begun(world, mark, running)
    idle, heard = await users.opened()
    await asyncio.to_thread(world.database.stop)
    sending = asyncio.create_task(idle.say(Script(script(SAY))))

    async def refused() -> bool:
        return users.n_refused > 0 or sending.done()

    try:
        await eventually(refused, SOON_S)
        assert not sending.done()
    finally:
        await asyncio.to_thread(world.database.start)
    assert (await heard.ended((await sending).turn))["reason"] == "done"
    assert (await ear.ended(first.turn))["reason"] == "done"
    await running.check_journal(ear)
    await idle.check_journal(heard)


async def test_a_process_that_wakes_after_it_was_replaced_ends(world: World, users: Users) -> None:
    talk, ear = await users.opened()
    asked, mark = working(600)
    sent = await talk.say(asked)
    zombie = await begun(world, mark, talk)
    assert world.pause(zombie)
    try:
        assert (await ear.ended(sent.turn))["reason"] == "done"
    finally:
        world.resume(zombie)

    async def is_gone() -> bool:
        there = await asyncio.to_thread(snapshot)
        return zombie.pid not in there and not await asyncio.to_thread(sleeping, mark)

    await eventually(is_gone, SOON_S)
    assert [fact["reason"] for fact in of(ear, "activated")] == ["opened", "recovered"]
    assert [fact["outcome"] for fact in of(ear, "tool_finished")] == ["unknown"]
    await talk.check_journal(ear)


async def test_nothing_is_violated_by_random_kills(world: World, tmp_path: Path) -> None:
    options = options_of(
        ["--minutes", "0.75", "--sessions", str(N_SESSIONS), "--seed", "7", "--period", "4"]
    )
    evidence = Evidence(tmp_path / "evidence", patience_s=PATIENCE_S)
    run = Run(options, world, evidence)
    try:
        await run.run()
    finally:
        await run.close()
    assert evidence.violations == []
    assert sum(run.monkey.survived.values()) >= 4
    assert sum(evidence.turns.values()) >= N_SESSIONS
