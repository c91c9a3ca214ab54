"""Comings and goings: whatever fails or leaves half-way, slots are exact and readers go on."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from actors.desk import Desk, Host, Route
from actors.gateway_plane import ModelGateway
from actors.host import SessionHost
from actors.kit import Kit
from actors.local import LocalHosts, LocalSessions
from actors.moves import MAX_MOVES
from actors.protocol import (
    AtCapacity,
    Close,
    Open,
    QueueFull,
    QuotaExceeded,
    SendMessage,
    SwitchModel,
    Unavailable,
)
from actors.settings import ActorsSettings, Quota
from agent.events import Cursor
from agent.faults import Fenced, JournalFault, ModelFault
from agent.journal_memory import MemoryJournal
from agent.model.contract import ModelRequest
from agent.transcript import render
from tests.support.house import ALICE, BOB, KNOWN, SOON_S, Echo, follow, kit_for, local_house
from tests.support.processes import eventually
from tests.support.stand import SlowJournal

Make = Callable[..., Any]
ONE_EACH = ActorsSettings(page_wait_s=0.1, close_wait_s=1.0, max_sessions_per_user=1)
ONE = ActorsSettings(page_wait_s=0.1, close_wait_s=1.0, max_sessions=1)


class FailingJournal(MemoryJournal):
    """Fails every append while `fails`."""

    fails = False

    async def append(self, *args: Any) -> Any:
        if self.fails:
            raise JournalFault("The journal did not answer.")
        return await super().append(*args)


class LateHosts(LocalHosts):
    """Hosts come when `gate` is open, one at a time; an empty one serves again."""

    def __init__(self, kit: Kit) -> None:
        super().__init__(kit)
        self.gate = asyncio.Event()
        self.n_waiting = 0
        self.n_started = 0
        self._one = asyncio.Lock()
        self._warm: list[SessionHost] = []

    async def acquire(self) -> SessionHost:
        self.n_waiting += 1
        await self.gate.wait()
        async with self._one:
            if self._warm:
                return self._warm.pop()
            self.n_started += 1
            return await super().acquire()

    async def give_back(self, host: Host, *, clean: bool) -> None:
        if clean:
            self._warm.append(self.by_name[host.name])
        else:
            await super().give_back(host, clean=False)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Make]:
    begun: list[Any] = []

    async def make(actors: ActorsSettings = ONE_EACH, **kit: Any) -> LocalSessions:
        context = local_house(kit_for(tmp_path, tools=[Echo()], actors=actors, **kit))
        begun.append(context)
        return await context.__aenter__()

    yield make
    for context in begun:
        await context.__aexit__(None, None, None)


async def opened(sessions: LocalSessions, who: Any = ALICE, **fields: Any) -> str:
    return (await sessions.open(who, Open(**fields))).session_id


async def activation_of(sessions: LocalSessions, session_id: str) -> Any:
    route = await sessions.desk.find(session_id)
    assert route is not None
    return sessions.hosts.by_name[route.host]._activations[session_id]


class Following:
    """A reader in the background that counts its pages."""

    def __init__(self, sessions: LocalSessions, session_id: str) -> None:
        self.n_pages = 0
        self.begun = asyncio.Event()
        self._task = asyncio.create_task(self._read(sessions, session_id))

    async def _read(self, sessions: LocalSessions, session_id: str) -> None:
        async for _ in sessions.pages(ALICE, session_id, Cursor()):
            self.n_pages += 1
            self.begun.set()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.mark.parametrize("leaves", ["by capacity", "by drain"])
async def test_a_reader_does_not_spin_while_its_session_leaves(house: Make, leaves: str) -> None:
    sessions = await house(ONE)
    session_id = await opened(sessions)
    reader = Following(sessions, session_id)
    await asyncio.wait_for(reader.begun.wait(), SOON_S)
    async with asyncio.timeout(SOON_S):
        if leaves == "by capacity":
            await opened(sessions, BOB)
        else:
            await sessions.desk.drain()
    assert reader.n_pages < 20
    await reader.stop()


async def test_a_close_whose_trajectory_cannot_be_written_is_a_close(
    house: Make, tmp_path: Path
) -> None:
    (tmp_path / "trajectories").write_text("no directory")
    sessions = await house()
    session_id = await opened(sessions)
    await sessions.submit(ALICE, session_id, Close())
    assert (await sessions.capacity(ALICE)).live == 0
    assert (await sessions.view(ALICE, session_id)).status == "closed"


async def test_a_close_that_the_journal_refuses_gives_the_slot_back_and_works_later(
    house: Make,
) -> None:
    journal = FailingJournal()
    sessions = await house(journal=journal)
    session_id = await opened(sessions)
    reader = Following(sessions, session_id)
    await asyncio.wait_for(reader.begun.wait(), SOON_S)
    journal.fails = True
    with pytest.raises(JournalFault):
        await sessions.submit(ALICE, session_id, Close())
    assert (await sessions.capacity(ALICE)).live == 0
    assert reader.n_pages < 20
    journal.fails = False
    await sessions.submit(ALICE, session_id, Close())
    await opened(sessions)
    await reader.stop()


async def test_a_lost_activation_whose_report_got_lost_too_still_gives_way(house: Make) -> None:
    journal = FailingJournal()
    sessions = await house(journal=journal)
    session_id = await opened(sessions)
    (await activation_of(sessions, session_id))._tell = lambda _: None
    journal.fails = True
    with pytest.raises(JournalFault):
        await sessions.submit(ALICE, session_id, SwitchModel(model="m"))
    journal.fails = False
    await opened(sessions)
    assert (await sessions.capacity(ALICE)).user.live == 1


async def test_a_session_that_was_busy_for_a_moment_gives_way_afterwards(house: Make) -> None:
    journal = SlowJournal()
    sessions = await house(journal=journal)
    session_id = await opened(sessions)
    journal.gate.clear()
    switching = asyncio.create_task(
        sessions.submit(ALICE, session_id, SwitchModel(model="scripted/echo"))
    )
    await asyncio.wait_for(journal.waiting.wait(), SOON_S)
    with pytest.raises(AtCapacity):
        await opened(sessions)
    journal.gate.set()
    await switching
    await opened(sessions)


async def test_seeds_at_open_count_against_the_quota(house: Make) -> None:
    quota = {"all": Quota(models="scripted/*", per_day=1)}
    sessions = await house(ActorsSettings(page_wait_s=0.1, quotas=quota))
    seeds = ({"role": "user", "content": "before"},)
    await opened(sessions, seed_messages=seeds)
    with pytest.raises(QuotaExceeded):
        await opened(sessions, seed_messages=seeds)
    assert (await sessions.capacity(ALICE)).live == 1


async def test_two_closes_with_one_key_get_one_answer(house: Make) -> None:
    sessions = await house()
    session_id = await opened(sessions)
    close = Close(message_id="bye")
    first, second = await asyncio.gather(
        *(sessions.submit(ALICE, session_id, close) for _ in range(2))
    )
    assert first == second


async def test_a_stored_reader_gets_facts_that_land_while_it_looks_for_the_end(
    house: Make,
) -> None:
    class Interrupting(MemoryJournal):
        then: Any = None

        async def read(self, session_id: str, **bounds: Any) -> Any:
            records = await super().read(session_id, **bounds)
            if not records and self.then is not None:
                then, self.then = self.then, None
                await then()
            return records

    journal = Interrupting()
    sessions = await house(ONE, journal=journal)
    session_id = await opened(sessions)
    await opened(sessions, BOB)
    journal.then = lambda: sessions.submit(ALICE, session_id, Close())
    reader = await follow(sessions, ALICE, session_id)
    assert reader.types()[-1] == "session_closed"


async def test_the_word_of_an_old_incarnation_does_not_end_the_new_one(house: Make) -> None:
    sessions = await house()
    session_id = await opened(sessions)
    old = await activation_of(sessions, session_id)
    sessions.desk.host_died(old_host := (await sessions.desk.find(session_id)).host)
    adopting = sessions.hosts.acquire

    async def acquire() -> Any:
        host = await adopting()
        adopt = host.adopt

        async def adopt_and_fence(*args: Any) -> int:
            epoch = await adopt(*args)
            with pytest.raises(Fenced):
                await old.submit(ALICE, SendMessage(text="late"))
            return epoch

        host.adopt = adopt_and_fence
        return host

    sessions.hosts.acquire = acquire
    route = await sessions.desk.wake(ALICE, session_id)
    await sessions.submit(ALICE, session_id, SwitchModel(model="scripted/echo"))
    assert await sessions.desk.find(session_id) == route
    assert route.host != old_host
    await old.end()


async def test_a_session_that_two_hosts_claim_is_counted_once(house: Make) -> None:
    sessions = await house()
    host = await sessions.hosts.acquire()
    for epoch in (1, 2):
        sessions.desk.take_over(host, Route(host.name, epoch), "s", "alice")
    assert (await sessions.capacity(ALICE)).user.live == 1


async def test_a_warm_host_that_died_unseen_is_passed_over(house: Make) -> None:
    sessions = await house()
    acquire, dead = sessions.hosts.acquire, []

    async def first_a_dead_one() -> Any:
        host = await acquire()
        if not dead:
            dead.append(host)

            async def adopt(*_: Any) -> int:
                raise Unavailable("The session's process does not answer.")

            host.adopt = adopt
        return host

    sessions.hosts.acquire = first_a_dead_one
    await opened(sessions)
    assert (await sessions.capacity(ALICE)).live == 1
    assert dead[0].name not in sessions.hosts.by_name


async def test_nothing_is_kept_of_who_left(house: Make) -> None:
    sessions = await house()
    session_id = await opened(sessions, user_token="hf_secret")
    assert await sessions.desk.when_live("nobody", 0.01) is None
    await sessions.submit(ALICE, session_id, Close())
    desk = sessions.desk
    kept = (
        desk._tokens._remembered,
        desk._housing._arrivals,
        desk._moves,
        desk._homes,
        desk._homes._at,
    )
    assert [len(each) for each in kept] == [0, 0, 0, 0, 0]


async def test_a_gateway_call_that_dies_of_a_defect_ends() -> None:
    class Broken:
        async def stream(self, request: ModelRequest) -> AsyncIterator[Any]:
            raise KeyError("choices")
            yield

    gateway = ModelGateway(Broken(), heartbeat_s=0.01)  # type: ignore[arg-type]
    with pytest.raises(ModelFault):
        async for _ in gateway.chunks(ModelRequest("m", [])):
            pass


def test_a_transcript_keeps_to_its_size() -> None:
    many = [{"role": "user", "content": "x" * 60}] * 2000
    text = render(many, max_chars=8000)
    assert len(text) < 16_000
    assert "1900 messages left out" in text


async def test_commands_to_a_session_that_wakes_have_a_limit(house: Make) -> None:
    """Callers that have left count too: what they asked for is still to be done."""
    journal = SlowJournal()
    sessions = await house(ONE, journal=journal)
    session_id = (await sessions.open(ALICE, Open())).session_id
    other = await sessions.open(BOB, Open())  # alice's gives way
    await sessions.delete(BOB, other.session_id)
    journal.gate.clear()
    asking = [
        asyncio.create_task(sessions.submit(ALICE, session_id, SwitchModel(model=f"scripted/{n}")))
        for n in range(MAX_MOVES)
    ]
    await asyncio.wait_for(journal.waiting.wait(), SOON_S)
    for one in asking[: MAX_MOVES // 2]:
        one.cancel()
    with pytest.raises(QueueFull) as refused:
        await sessions.submit(ALICE, session_id, SwitchModel(model="scripted/late"))
    assert refused.value.limit == MAX_MOVES
    journal.gate.set()
    done = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(not isinstance(one, BaseException) for one in done) == MAX_MOVES // 2
    await sessions.submit(ALICE, session_id, SwitchModel(model="scripted/echo"))


async def test_a_process_that_comes_too_late_for_one_serves_the_next(tmp_path: Path) -> None:
    """Were it ended, every process would come too late for as long as the queue is long."""
    now_s = 0.0
    kit = kit_for(tmp_path, tools=[Echo()], actors=ONE, now_s=lambda: now_s)
    hosts = LateHosts(kit)
    desk = hosts.desk = Desk(kit, hosts, KNOWN, default_model=None)
    late = asyncio.create_task(desk.open(ALICE, Open(agent="tester", message_id="late")))

    async def waits(n: int) -> bool:
        return hosts.n_waiting == n

    await eventually(lambda: waits(1), SOON_S)
    now_s += ONE.reservation_s + 1
    next_one = asyncio.create_task(desk.open(BOB, Open(agent="tester")))
    await eventually(lambda: waits(2), SOON_S)
    hosts.gate.set()
    with pytest.raises(Unavailable):
        await late
    view = await next_one
    assert hosts.n_started == 1
    assert (await desk.capacity(BOB)).live == 1
    assert await desk.live_among([view.session_id]) == {view.session_id}
    assert (await kit.journal.rows("alice", limit=5)).rows == (), "nothing began in vain"
    await desk.drain()
    await desk.close()
