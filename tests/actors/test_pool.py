"""The pool of empty hosts, over hosts that start when a test says so."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from actors.pool import FAILED_PAUSE_S, MAX_AHEAD, MAX_STARTING, MB, SETTLE_S, Pool
from actors.protocol import Unavailable
from actors.settings import WarmSettings

SOON_S = 5.0


class Place:
    def __init__(self, number: int, node: str = "a") -> None:
        self.name = f"host {number}"
        self.alive = True
        self.node = node
        self.n_uses = 0

    def __repr__(self) -> str:
        return self.name


class Yard:
    """Hosts start, one for each permit, and take `memory_mb` once they were tidied."""

    def __init__(self) -> None:
        self.permits = asyncio.Semaphore(0)
        self.tidying = asyncio.Event()
        self.tidying.set()
        self.fails = False
        self.memory_mb = 60
        self.node = "a"
        self.n_begun = 0
        self.n_starting = 0
        self.most_starting = 0
        self.started: list[Place] = []
        self.ended: list[Place] = []

    async def start(self) -> Place:
        self.n_begun += 1
        self.n_starting += 1
        self.most_starting = max(self.most_starting, self.n_starting)
        try:
            await self.permits.acquire()
            if self.fails:
                raise Unavailable("It did not start.")
        finally:
            self.n_starting -= 1
            host = Place(len(self.started), self.node)
        self.started.append(host)
        return host

    async def tidy(self, host: Place) -> int:
        await self.tidying.wait()
        if not host.alive:
            raise Unavailable("It is gone.")
        return self.memory_mb * MB

    def end(self, host: Place) -> None:
        host.alive = False
        self.ended.append(host)

    def let_start(self, n_hosts: int = 1000) -> None:
        for _ in range(n_hosts):
            self.permits.release()

    @property
    def living(self) -> list[Place]:
        return [host for host in self.started if host.alive]


class Stage:
    """A pool, its yard, and what the world around it is like."""

    def __init__(self) -> None:
        self.yard = Yard()
        self.pool: Pool[Place]
        self.tight: set[str] = set()
        self.quiet = True
        self.pauses: list[float] = []
        self.now_s = 0.0

    def make(self, **settings: Any) -> Pool[Place]:
        self.pool = Pool(
            WarmSettings(**settings),
            self.yard,
            has_room=lambda node: (node or self.yard.node) not in self.tight,
            is_quiet=lambda: self.quiet,
            pause=self._pause,
            now_s=lambda: self.now_s,
        )
        return self.pool

    async def _pause(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        await asyncio.sleep(0)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(SOON_S):
            while not is_so():  # noqa: ASYNC110 - a step of the loop is what is waited for
                await asyncio.sleep(0)

    async def settled(self) -> None:
        """Until everything that can go on without a permit has."""
        for _ in range(50):
            await asyncio.sleep(0)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    yield made
    await made.pool.close()


async def filled(stage: Stage, **settings: Any) -> Pool[Place]:
    """With what it keeps ready."""
    pool = stage.make(**settings)
    stage.yard.let_start()
    pool.keep_warm()
    await stage.until(lambda: pool.n_warm == settings["min"])
    return pool


async def test_it_keeps_as_many_ready_as_it_should(stage: Stage) -> None:
    pool = await filled(stage, min=3)
    await stage.settled()
    assert len(stage.yard.living) == 3
    host = await pool.acquire()
    assert host.alive
    await stage.until(lambda: pool.n_warm == 3)
    await stage.settled()
    assert len(stage.yard.living) == 4


async def test_a_burst_on_warm_hosts_waits_for_no_start(stage: Stage) -> None:
    pool = await filled(stage, min=5)
    stage.yard.permits = asyncio.Semaphore(0)
    hosts = await asyncio.gather(*(pool.acquire() for _ in range(5)))
    assert len({host.name for host in hosts}) == 5


async def test_who_finds_none_has_one_started(stage: Stage) -> None:
    pool = stage.make(min=0)
    waiting = asyncio.create_task(pool.acquire())
    await stage.until(lambda: stage.yard.n_starting == 1)
    stage.yard.let_start(1)
    assert (await waiting).alive
    assert pool.n_warm == 0


async def test_only_so_many_start_at_once(stage: Stage) -> None:
    pool = stage.make(min=2)
    waiting = [asyncio.create_task(pool.acquire()) for _ in range(3 * MAX_STARTING)]
    await stage.settled()
    stage.yard.let_start()
    hosts = await asyncio.gather(*waiting)
    assert len({host.name for host in hosts}) == len(waiting)
    await stage.until(lambda: pool.n_warm == 2)
    assert stage.yard.most_starting <= MAX_STARTING


async def test_one_given_back_meanwhile_is_as_good_as_one_started(stage: Stage) -> None:
    pool = stage.make(min=0, spare=0)
    stage.yard.let_start(1)
    lent = await pool.acquire()
    waiting = asyncio.create_task(pool.acquire())
    await stage.until(lambda: stage.yard.n_starting == 1)
    pool.give_back(lent)
    assert await waiting is lent
    # The start that nobody needs any more leaves nothing behind.
    stage.yard.let_start(1)
    await stage.until(lambda: len(stage.yard.ended) == 1)
    assert stage.yard.living == [lent]


async def test_nothing_is_started_for_whom_a_host_is_being_tidied(stage: Stage) -> None:
    pool = stage.make(min=0)
    stage.yard.let_start()
    lent = await pool.acquire()
    stage.yard.tidying.clear()
    pool.give_back(lent)
    waiting = asyncio.create_task(pool.acquire())
    await stage.settled()
    stage.yard.tidying.set()
    assert await waiting is lent
    assert stage.yard.n_begun == 1


async def test_a_host_that_does_not_tidy_up_ends_and_another_is_started(stage: Stage) -> None:
    pool = stage.make(min=0)
    stage.yard.let_start()
    lent = await pool.acquire()
    stage.yard.tidying.clear()
    pool.give_back(lent)
    waiting = asyncio.create_task(pool.acquire())
    await stage.settled()
    lent.alive = False
    stage.yard.tidying.set()
    assert (await waiting).alive
    assert lent in stage.yard.ended


async def test_a_give_back_during_a_background_start_leaves_none_too_many(stage: Stage) -> None:
    pool = await filled(stage, min=1, spare=0)
    stage.yard.permits = asyncio.Semaphore(0)
    lent = await pool.acquire()
    await stage.until(lambda: stage.yard.n_starting == 1)
    pool.give_back(lent)
    await stage.until(lambda: pool.n_warm == 1)
    stage.yard.let_start(1)
    await stage.until(lambda: len(stage.yard.ended) == 1)
    await stage.settled()
    assert (pool.n_warm, len(stage.yard.living), stage.yard.n_starting) == (1, 1, 0)


async def test_more_than_it_starts_are_kept_when_sessions_leave(stage: Stage) -> None:
    pool = await filled(stage, min=1, spare=2)
    lent = [await pool.acquire() for _ in range(5)]
    for host in lent:
        pool.give_back(host)
    await stage.settled()
    assert pool.n_warm == 3
    assert len(stage.yard.living) == 3


async def test_a_host_that_was_used_often_is_replaced_before_it_ends(stage: Stage) -> None:
    pool = await filled(stage, min=1, max_uses=2)
    stage.yard.permits = asyncio.Semaphore(0)
    old = await pool.acquire()
    old.n_uses = 2
    pool.give_back(old)
    await stage.until(lambda: pool.n_warm == 1 and stage.yard.n_starting == 1)
    assert old.alive
    stage.yard.let_start(1)
    await stage.until(lambda: not old.alive)
    assert pool.n_warm == 1
    assert await pool.acquire() is not old


async def test_a_worn_host_serves_while_there_is_no_fresh_one(stage: Stage) -> None:
    pool = await filled(stage, min=1, max_memory_mb=100)
    stage.yard.permits = asyncio.Semaphore(0)
    old = await pool.acquire()
    stage.yard.memory_mb = 101
    pool.give_back(old)
    await stage.until(lambda: pool.n_warm == 1)
    assert await pool.acquire() is old


async def test_a_host_that_took_too_much_memory_is_not_kept(stage: Stage) -> None:
    pool = stage.make(min=0, spare=4, max_memory_mb=100)
    stage.yard.let_start()
    lent = await pool.acquire()
    stage.yard.memory_mb = 101
    pool.give_back(lent)
    await stage.until(lambda: not lent.alive)
    assert pool.n_warm == 0


async def test_a_tight_node_keeps_none_and_gets_them_again(stage: Stage) -> None:
    pool = await filled(stage, min=3)
    lent = await pool.acquire()
    await stage.until(lambda: pool.n_warm == 3)
    stage.tight = {"a"}
    pool.shrink("a", 2)
    assert pool.n_warm == 1
    pool.shrink("a", 2)
    pool.shrink("a", 2)
    pool.give_back(lent)
    pool.keep_warm()
    await stage.settled()
    assert (pool.n_warm, stage.yard.living) == (0, [])
    waiting = await pool.acquire()  # a session is started all the same
    assert waiting.alive
    stage.tight = set()
    pool.keep_warm()
    await stage.until(lambda: pool.n_warm == 3)


async def test_another_nodes_hosts_stay(stage: Stage) -> None:
    pool = await filled(stage, min=2)
    stage.yard.node = "b"
    await pool.acquire()
    await stage.until(lambda: pool.n_warm == 2)
    pool.shrink("a", 5)
    assert pool.n_warm == 1
    assert [host.node for host in stage.yard.ended] == ["a"]


async def test_where_sessions_live_hosts_start_one_by_one_and_as_slow_as_they_start(
    stage: Stage,
) -> None:
    stage.quiet = False
    pool = stage.make(min=2, start_rate=2)
    pool.keep_warm()
    await stage.settled()
    assert stage.yard.n_starting == 1
    stage.now_s += 7.0
    stage.yard.let_start(1)
    await stage.until(lambda: stage.yard.n_starting == 1 and pool.n_warm == 1)
    assert stage.pauses == [SETTLE_S, 7.0]
    stage.now_s += 0.1
    stage.yard.let_start(1)
    await stage.until(lambda: pool.n_warm == 2)
    await stage.settled()
    await pool.acquire()
    await stage.until(lambda: len(stage.pauses) == 3)
    assert stage.pauses == [SETTLE_S, 7.0, SETTLE_S]
    assert stage.yard.most_starting == 1


async def test_an_empty_house_fills_faster_but_not_all_at_once(stage: Stage) -> None:
    pool = stage.make(min=10, start_rate=4)
    pool.keep_warm()
    await stage.settled()
    assert stage.yard.n_starting == MAX_AHEAD
    stage.yard.let_start()
    await stage.until(lambda: pool.n_warm == 10)
    assert stage.yard.most_starting == MAX_AHEAD
    assert stage.pauses == [SETTLE_S] + 9 * [0.25]


async def test_who_waits_hears_of_a_start_that_failed_and_the_next_one_does_not(
    stage: Stage,
) -> None:
    pool = stage.make(min=0)
    first, second = asyncio.create_task(pool.acquire()), asyncio.create_task(pool.acquire())
    await stage.until(lambda: stage.yard.n_starting == 2)
    stage.yard.fails = True
    stage.yard.let_start(1)
    with pytest.raises(Unavailable):
        await first
    stage.yard.fails = False
    stage.yard.let_start(1)
    assert (await second).alive


async def test_a_background_start_that_failed_is_made_again_later(stage: Stage) -> None:
    pool = stage.make(min=1, start_rate=2)
    stage.yard.fails = True
    pool.keep_warm()
    stage.yard.let_start(1)
    await stage.until(lambda: FAILED_PAUSE_S in stage.pauses and stage.yard.n_starting == 1)
    stage.yard.fails = False
    stage.yard.let_start(1)
    await stage.until(lambda: pool.n_warm == 1)


async def test_a_host_for_whom_nobody_waits_any_more_is_kept(stage: Stage) -> None:
    pool = stage.make(min=0)
    waiting = asyncio.create_task(pool.acquire())
    await stage.until(lambda: stage.yard.n_starting == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    stage.yard.let_start(1)
    await stage.until(lambda: pool.n_warm == 1)


async def test_a_host_that_came_as_its_caller_left_is_not_lost(stage: Stage) -> None:
    pool = stage.make(min=0)
    waiting = asyncio.create_task(pool.acquire())
    await stage.until(lambda: stage.yard.n_starting == 1)
    stage.yard.let_start(1)
    await stage.until(lambda: bool(stage.yard.started))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await stage.until(lambda: pool.n_warm == 1)


async def test_a_dead_host_is_replaced_and_never_given(stage: Stage) -> None:
    pool = await filled(stage, min=1)
    [dead] = stage.yard.living
    dead.alive = False
    pool.forget(dead)
    await stage.until(lambda: pool.n_warm == 1)
    assert (await pool.acquire()).alive


async def test_the_end_sends_away_who_waits(stage: Stage) -> None:
    pool = stage.make(min=0)
    waiting = asyncio.create_task(pool.acquire())
    await stage.until(lambda: stage.yard.n_starting == 1)
    await pool.close()
    with pytest.raises(Unavailable):
        await waiting
    assert stage.yard.n_starting == 0
