"""Capacity at full size, in one process: the same desk and ledger as on Ray."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.local import LocalSessions
from actors.protocol import AtCapacity, Open, Principal, SendMessage, SessionView
from actors.settings import ActorsSettings
from agent.journal_memory import MemoryJournal
from tests.support.house import ALICE, Echo, kit_for, local_house, puppet

pytestmark = pytest.mark.timeout(60)
LIMITS = ActorsSettings(max_sessions=200, max_sessions_per_user=10, close_wait_s=1.0, drain_s=1.0)


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[LocalSessions]:
    kit = kit_for(tmp_path, journal=MemoryJournal(), tools=[Echo()], actors=LIMITS)
    async with local_house(kit) as house:
        yield house


async def burst(sessions: LocalSessions, users: list[Principal]) -> list[SessionView]:
    """Everybody opens at once; the views of those who got in, after checking the others' refusal."""
    answers = await asyncio.gather(
        *(sessions.open(who, Open(agent="tester")) for who in users), return_exceptions=True
    )
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(answer, AtCapacity) for answer in refused)
    return [answer for answer in answers if isinstance(answer, SessionView)]


async def test_300_opens_at_once_end_with_exactly_200_live(sessions: LocalSessions) -> None:
    users = [Principal(f"user{n % 60}") for n in range(300)]
    admitted = await burst(sessions, users)
    assert len(admitted) >= 200
    assert (await sessions.capacity(ALICE)).live == 200


async def test_40_opens_by_one_user_end_with_exactly_10_live(sessions: LocalSessions) -> None:
    await burst(sessions, [ALICE] * 40)
    assert (await sessions.capacity(ALICE)).user.live == 10


async def test_when_all_are_busy_exactly_the_surplus_is_refused(sessions: LocalSessions) -> None:
    users = [Principal(f"user{n % 20}") for n in range(200)]
    for view, who in zip(await burst(sessions, users), users, strict=True):
        await sessions.submit(who, view.session_id, SendMessage(text=puppet({"hang": True})))
    assert await burst(sessions, [Principal(f"new{n}") for n in range(100)]) == []
    assert (await sessions.capacity(ALICE)).live == 200


async def test_idle_sessions_give_way_to_all_newcomers(sessions: LocalSessions) -> None:
    users = [Principal(f"user{n % 20}") for n in range(200)]
    await burst(sessions, users)
    assert len(await burst(sessions, [Principal(f"new{n}") for n in range(100)])) == 100
    assert (await sessions.capacity(ALICE)).live == 200


async def test_wakes_and_seeds_pass_the_same_door(sessions: LocalSessions) -> None:
    views = [await sessions.open(ALICE, Open(agent="tester")) for _ in range(30)]
    assert (await sessions.capacity(ALICE)).user.live == 10
    await asyncio.gather(
        *(
            sessions.submit(ALICE, view.session_id, SendMessage(text=puppet({"hang": True})))
            for view in views
        ),
        return_exceptions=True,
    )
    assert (await sessions.capacity(ALICE)).user.live == 10
    seeds = ({"role": "user", "content": "before"},)
    with pytest.raises(AtCapacity):
        await sessions.open(ALICE, Open(agent="tester", seed_messages=seeds))


async def test_callers_that_leave_at_any_moment_leak_nothing(sessions: LocalSessions) -> None:
    """Cancelled after every possible number of steps of the loop, a session is there or not, and the
    slots say the same."""
    for steps in range(40):
        task = asyncio.create_task(sessions.open(ALICE, Open(agent="tester")))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    views = (await sessions.owned(ALICE, limit=100, after=None)).data
    for view in views:
        await sessions.delete(ALICE, view.session_id)
    capacity = await sessions.capacity(ALICE)
    assert (capacity.live, capacity.user.live) == (0, 0)
