"""Hosts die: every open turn is taken up again with nobody calling, and slots stay exact."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from actors.local import LocalSessions
from actors.protocol import AtCapacity, Close, Conflict, Open, SendMessage, Unavailable
from actors.recovery import Recovery
from actors.settings import ActorsSettings
from agent.context import UNKNOWN
from agent.events import TURN_OPENERS, Cursor, TurnEnded, UserMessage
from agent.faults import JournalFault
from agent.journal import Journal, read_all
from agent.journal_memory import MemoryJournal
from agent.testing import Reply, ScriptedModel
from tests.support.house import (
    ALICE,
    BOB,
    SOON_S,
    Effect,
    FakeOpener,
    Wait,
    follow,
    kit_for,
    local_house,
    puppet,
    turn_of,
)
from tests.support.journals import opening
from tests.support.processes import eventually
from tests.support.stand import SAY, call

Make = Callable[..., Any]
QUICK = ActorsSettings(page_wait_s=0.1, close_wait_s=1.0, sweep_s=0.05, drain_s=1.0)
NEVER = QUICK.model_copy(update={"sweep_s": 3600.0})
"""No sweep helps: what is seen must be told."""
WAIT = Reply("let me", tool_calls=(call("wait"),))


class WaitAgain(Wait):
    """May run twice."""

    idempotent: ClassVar[bool] = True


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Make]:
    begun: list[Any] = []

    async def make(*replies: Reply, actors: ActorsSettings = NEVER, **kit: Any) -> LocalSessions:
        if replies:
            kit["model"] = ScriptedModel(replies)
        context = local_house(kit_for(tmp_path, actors=actors, **kit))
        begun.append(context)
        return await context.__aenter__()

    yield make
    for context in begun:
        await context.__aexit__(None, None, None)


async def died(sessions: LocalSessions, session_id: str) -> Any:
    """The session's host is dead to the desk. It is not ended: what it does late is a zombie's work."""
    route = await sessions.desk.find(session_id)
    assert route is not None
    host = sessions.hosts.by_name.pop(route.host)
    host.alive = False
    sessions.desk.host_died(route.host)
    return host


async def waiting(sessions: LocalSessions, tool: Wait) -> str:
    """A session whose turn is in the middle of a tool call."""
    session_id = (await sessions.open(ALICE, Open())).session_id
    await sessions.submit(ALICE, session_id, SendMessage(text="go"))
    await asyncio.wait_for(tool.began.wait(), SOON_S)
    tool.began.clear()
    return session_id


async def test_an_open_turn_goes_on_by_itself_and_the_late_result_of_the_dead_does_not_count(
    house: Make,
) -> None:
    tool = Wait()
    sessions = await house(WAIT, SAY, tools=[tool])
    session_id = await waiting(sessions, tool)
    zombie = await died(sessions, session_id)
    assert await sessions.desk.when_live(session_id, SOON_S)  # before, the result would not be late
    tool.go.set()
    heard = await follow(sessions, ALICE, session_id, turn=1)
    [finished] = heard.of("tool_finished")
    assert (finished["outcome"], finished["text"]) == ("unknown", UNKNOWN)
    assert heard.of("turn_ended")[0]["reason"] == "done"
    assert [f["reason"] for f in (await follow(sessions, ALICE, session_id, live=False)).of("activated")] == ["opened", "recovered"]  # fmt: skip
    assert (await sessions.capacity(ALICE)).live == 1
    await zombie.end(session_id)


async def test_a_call_that_may_run_twice_runs_again(house: Make) -> None:
    tool = WaitAgain()
    sessions = await house(WAIT, SAY, tools=[tool])
    session_id = await waiting(sessions, tool)
    zombie = await died(sessions, session_id)
    await asyncio.wait_for(tool.began.wait(), SOON_S)
    tool.go.set()
    heard = await follow(sessions, ALICE, session_id, turn=1)
    assert [f["outcome"] for f in heard.of("tool_finished")] == ["ok"]
    assert len(heard.of("tool_started")) == 2
    await zombie.end(session_id)


async def test_a_replaced_incarnation_finds_out_and_ends_its_sandbox(house: Make) -> None:
    """It was paused, so it heard nothing; nobody tells it but the journal."""
    tool, opener = Wait(), FakeOpener()
    sessions = await house(
        WAIT, SAY, tools=[tool], open_sandbox=opener,
        actors=NEVER.model_copy(update={"probe_s": 0.05}),
    )  # fmt: skip
    session_id = await waiting(sessions, tool)
    route = await sessions.desk.find(session_id)
    activation = sessions.hosts.by_name[route.host]._activations[session_id]
    await activation.sandbox()
    zombie = await died(sessions, session_id)
    checks = asyncio.create_task(zombie.keep_current())
    await turn_of(sessions, ALICE, session_id, 1)

    async def is_over() -> bool:
        return activation.is_leaving and opener.opened[0].closed

    await eventually(is_over, SOON_S)
    checks.cancel()
    assert not await zombie.hosts(session_id)
    await zombie.end(session_id)


async def test_a_turn_that_kills_its_process_each_time_is_given_up(house: Make) -> None:
    tool = WaitAgain()
    sessions = await house(WAIT, tools=[tool])
    session_id = await waiting(sessions, tool)
    zombies = [await died(sessions, session_id)]
    for _ in range(NEVER.max_recoveries):
        await asyncio.wait_for(tool.began.wait(), SOON_S)
        tool.began.clear()
        zombies.append(await died(sessions, session_id))
    ended = await turn_of(sessions, ALICE, session_id, 1)
    assert (ended["reason"], ended["code"]) == ("failed", "recovery_exhausted")
    assert "died 4 times" in ended["detail"]

    async def is_free() -> bool:
        return (await sessions.capacity(ALICE)).live == 0

    await eventually(is_free, SOON_S)
    assert (await sessions.view(ALICE, session_id)).status == "passive"
    for zombie in zombies:
        await zombie.end(session_id)


async def test_what_had_started_in_a_turn_that_is_given_up_may_have_happened(house: Make) -> None:
    tool = Wait()
    never = NEVER.model_copy(update={"max_recoveries": 0})
    sessions = await house(WAIT, tools=[tool], actors=never)
    session_id = await waiting(sessions, tool)
    zombie = await died(sessions, session_id)
    assert (await turn_of(sessions, ALICE, session_id, 1))["code"] == "recovery_exhausted"
    [finished] = (await follow(sessions, ALICE, session_id, turn=1)).of("tool_finished")
    assert (finished["outcome"], finished["text"]) == ("unknown", UNKNOWN)
    await zombie.end(session_id)


async def test_the_count_of_deaths_outlives_the_desk(house: Make) -> None:
    """A desk that begins anew counts on: the journal does."""
    tool, journal = WaitAgain(), MemoryJournal()
    for n in range(NEVER.max_recoveries + 1):
        sessions = await house(WAIT, tools=[tool], journal=journal)
        if n == 0:
            session_id = await waiting(sessions, tool)
        else:
            await asyncio.wait_for(tool.began.wait(), SOON_S)
            tool.began.clear()
        await sessions.desk.close()  # it dies with everything that it hosts
    sessions = await house(WAIT, tools=[tool], journal=journal)
    assert (await turn_of(sessions, ALICE, session_id, 1))["code"] == "recovery_exhausted"


async def test_the_next_turn_has_a_count_of_its_own(house: Make) -> None:
    tool = WaitAgain()
    once = NEVER.model_copy(update={"max_recoveries": 0})
    sessions = await house(WAIT, SAY, tools=[tool], actors=once)
    session_id = await waiting(sessions, tool)
    await sessions.submit(ALICE, session_id, SendMessage(text="and then"))
    zombie = await died(sessions, session_id)
    assert (await turn_of(sessions, ALICE, session_id, 1))["reason"] == "failed"
    assert (await turn_of(sessions, ALICE, session_id, 2))["reason"] == "done"
    await zombie.end(session_id)


async def test_a_desk_that_begins_takes_up_what_another_left(house: Make) -> None:
    tool, journal = Wait(), MemoryJournal()
    first = await house(WAIT, SAY, tools=[tool], journal=journal)
    session_id = await waiting(first, tool)
    second = await house(SAY, tools=[Wait()], journal=journal)
    assert (await turn_of(second, ALICE, session_id, 1))["reason"] == "done"


class Away(MemoryJournal):
    """A journal whose server is away while `away`."""

    away = False

    async def row(self, session_id: str) -> Any:
        self._answer()
        return await super().row(session_id)

    async def unrested(self, **bounds: Any) -> Any:
        self._answer()
        return await super().unrested(**bounds)

    def _answer(self) -> None:
        if self.away:
            raise JournalFault("The journal did not answer.")


async def test_what_cannot_be_brought_back_now_is_tried_again(house: Make) -> None:
    tool, journal = Wait(), Away()
    sessions = await house(WAIT, SAY, tools=[tool], journal=journal, actors=QUICK)
    session_id = await waiting(sessions, tool)
    journal.away = True
    zombie = await died(sessions, session_id)

    async def is_free() -> bool:
        return (await sessions.capacity(ALICE)).live == 0

    await eventually(is_free, SOON_S)
    journal.away = False
    assert (await turn_of(sessions, ALICE, session_id, 1))["reason"] == "done"
    await zombie.end(session_id)


class Stalling(Away):
    """Appends fail too while it is away."""

    async def append(self, *args: Any) -> Any:
        self._answer()
        return await super().append(*args)


async def test_a_journal_that_comes_back_finds_the_session_in_the_same_process(house: Make) -> None:
    tool, journal = Wait(), Stalling()
    sessions = await house(WAIT, SAY, tools=[tool], journal=journal)
    session_id = await waiting(sessions, tool)
    before = await sessions.desk.find(session_id)
    journal.away = True
    tool.go.set()

    async def is_lost() -> bool:
        return await sessions.desk.find(session_id) is None

    await eventually(is_lost, SOON_S)
    journal.away = False
    heard = await follow(sessions, ALICE, session_id, turn=1)
    assert [f["outcome"] for f in heard.of("tool_finished")] == ["unknown"]
    assert heard.of("turn_ended")[0]["reason"] == "done"
    after = await sessions.desk.find(session_id)
    assert (after.host, after.epoch) == (before.host, before.epoch + 1)
    assert (await sessions.capacity(ALICE)).live == 1


async def test_open_turns_beyond_the_limit_wait_for_slots(house: Make) -> None:
    journal = MemoryJournal()
    first = await house(actors=NEVER, journal=journal)
    ids = [(await first.open(ALICE, Open())).session_id for _ in range(6)]
    for session_id in ids:
        await first.submit(ALICE, session_id, SendMessage(text=puppet({"hang": True})))
    await first.close()
    few = QUICK.model_copy(update={"max_sessions": 2})
    second = await house(*[SAY] * len(ids), actors=few, journal=journal)
    for session_id in ids:
        assert (await turn_of(second, ALICE, session_id, 1))["reason"] == "done"
    assert (await second.capacity(ALICE)).live <= 2


async def test_a_death_that_falls_between_adoption_and_placing_is_not_overlooked(
    house: Make,
) -> None:
    sessions = await house(SAY, actors=QUICK)
    acquire, dying = sessions.hosts.acquire, [True]

    async def one_that_dies() -> Any:
        host = await acquire()
        if not dying:
            return host
        dying.clear()
        adopt = host.adopt

        async def adopt_and_die(*args: Any) -> int:
            epoch = await adopt(*args)
            host.alive = False
            sessions.desk.host_died(host.name)
            return epoch

        host.adopt = adopt_and_die
        return host

    sessions.hosts.acquire = one_that_dies
    with suppress(Unavailable):
        await sessions.open(ALICE, Open(message_id="m"))
    session_id = (await sessions.open(ALICE, Open(message_id="m"))).session_id
    await sessions.submit(ALICE, session_id, SendMessage(text="go"))
    assert (await turn_of(sessions, ALICE, session_id, 1))["reason"] == "done"


async def test_a_defect_with_one_session_does_not_keep_the_others_from_coming_back() -> None:
    journal = MemoryJournal()
    brought: list[str] = []

    async def resume(session_id: str) -> None:
        if session_id == "s1":
            raise KeyError(session_id)
        brought.append(session_id)

    recovery = Recovery(journal, resume, every_s=60)
    for n in range(3):
        await _open_turn(journal, f"s{n}")
    await recovery.sweep()
    assert sorted(brought) == ["s0", "s2"]


async def _open_turn(journal: Journal, session_id: str) -> None:
    await journal.create(opening(session_id), UserMessage(turn=1, text="go"))


@pytest.mark.parametrize("seed", range(25))
async def test_any_schedule_of_deaths_leaves_exact_slots_and_ended_turns(
    house: Make, seed: int
) -> None:
    """Sessions of two users come and go while hosts die at random; when the dying ends, every turn that
    was accepted ends, and what the desk counts is what lives."""
    rng = random.Random(seed)
    few = QUICK.model_copy(update={"max_sessions": 3, "max_recoveries": 1000})
    journal = MemoryJournal()
    sessions = await house(actors=few, tools=[Effect()], journal=journal)
    accepted: dict[str, int] = {}
    closed: set[str] = set()
    zombies: list[tuple[Any, str]] = []
    for n in range(60):
        who = rng.choice([ALICE, BOB])
        own = [sid for sid in accepted if sid.startswith(who.user_id)]
        act = rng.random()
        with suppress(AtCapacity, Unavailable, Conflict):
            if act < 0.2 or not own:
                view = await sessions.open(who, Open(model="scripted/puppet", message_id=str(n)))
                accepted.setdefault(f"{who.user_id} {view.session_id}", 0)
            elif act < 0.6:
                say = puppet({"call": "effect", "args": {"word": "w"}}, {"say": "ok", "chunks": 3})
                key = rng.choice(own)
                taken = await sessions.submit(who, key.split()[1], SendMessage(text=say))
                accepted[key] = max(accepted[key], taken.turn)
            elif act < 0.65:
                key = rng.choice(own)
                await sessions.submit(who, key.split()[1], Close())
                closed.add(key)
            else:
                session_id = rng.choice(own).split()[1]
                if await sessions.desk.find(session_id):
                    zombies.append((await died(sessions, session_id), session_id))
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)
    for key, n_turns in accepted.items():
        user, session_id = key.split()
        who = ALICE if user == "alice" else BOB
        if key not in closed:
            for turn in range(1, n_turns + 1):
                await follow(sessions, who, session_id, turn=turn)
        facts = [record.fact for record in await read_all(journal, session_id)]
        opened = [fact.turn for fact in facts if isinstance(fact, TURN_OPENERS)]
        assert opened == [fact.turn for fact in facts if isinstance(fact, TurnEnded)]
        assert len(opened) >= n_turns
        heard = await follow(sessions, who, session_id, live=False, after=Cursor())
        assert [fact["seq"] for fact in heard.facts] == list(range(1, len(facts) + 1))
    live = {lease.session_id for lease in sessions.desk.ledger.leases}
    assert live == set(sessions.desk._homes._of)
    assert (await sessions.capacity(ALICE)).live == len(live) <= 3
    for zombie, session_id in zombies:
        await zombie.end(session_id)
