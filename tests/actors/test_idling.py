"""Sessions leave when nobody needs them or their room is needed, and come back when somebody does."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from actors.idling import MAX_AT_ONCE, MAX_PER_NODE, SPARED_S, Idling
from actors.ledger import Lease, Ledger
from actors.local import LocalSessions
from actors.memory import NodeMemory
from actors.protocol import Open, Principal, SendMessage
from actors.settings import ActorsSettings
from agent.events import Activated, Passivated, PassivationReason
from agent.faults import JournalFault
from agent.journal import read_all
from agent.journal_memory import MemoryJournal
from agent.testing import Reply, ScriptedModel
from tests.support.house import (
    ALICE,
    BOB,
    SOON_S,
    Echo,
    Wait,
    follow,
    kit_for,
    local_house,
    turn_of,
)
from tests.support.processes import eventually
from tests.support.stand import SAY, call

FULL, RELIEVED, BETWEEN = NodeMemory(90, 100), NodeMemory(79, 100), NodeMemory(82, 100)


class Clock:
    def __init__(self) -> None:
        self.at_s = 100.0

    def __call__(self) -> float:
        return self.at_s


class Leaving:
    """A ledger of idle sessions on nodes, and who was asked to go."""

    def __init__(self, *, idle_s: float | None = None) -> None:
        self.clock = Clock()
        self.ledger = Ledger(
            max_sessions=1000, max_sessions_per_user=1000, reservation_s=60, now_s=self.clock
        )
        self.asked: list[tuple[str, PassivationReason]] = []
        self.gate = asyncio.Event()
        self.answer: Callable[[Lease], None] = lambda lease: self.ledger.release(lease) and None
        self.idling = Idling(
            self.ledger,
            self._leave,
            idle_s=idle_s,
            memory_high=0.85,
            now_s=self.clock,
        )

    async def _leave(self, lease: Lease, reason: PassivationReason) -> None:
        self.asked.append((lease.session_id, reason))
        await self.gate.wait()
        self.answer(lease)

    def live(self, n: int, *, node: str = "n1") -> list[Lease]:
        """That many more, each idle for a second less than the one before."""
        leases: list[Lease] = []
        for k in range(n):
            lease = self.ledger.take(f"{node}-{k}", "u")
            assert isinstance(lease, Lease)
            self.ledger.confirm(lease, 1, node)
            leases.append(lease)
            self.clock.at_s += 1
        return leases

    async def goes(self) -> None:
        """Let those who were asked go, and wait for it."""
        self.gate.set()
        await asyncio.gather(*self.idling._tasks._tasks)
        self.gate.clear()

    async def looked(self) -> None:
        """A look for those who are due."""
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                await self.idling.run()
        await asyncio.sleep(0)


async def reported(stand: Leaving, memory: NodeMemory, node: str = "n1") -> list[str]:
    """Who is asked to go after a report."""
    before = len(stand.asked)
    stand.idling.note_memory(node, memory)
    await asyncio.sleep(0)  # the tasks that it started begin
    return [session_id for session_id, _ in stand.asked[before:]]


async def test_where_memory_is_short_a_few_leave_for_each_report_longest_idle_first() -> None:
    stand = Leaving()
    stand.live(10)
    stand.live(2, node="n2")
    stand.clock.at_s += SPARED_S
    assert await reported(stand, FULL) == ["n1-0", "n1-1", "n1-2", "n1-3"]
    assert await reported(stand, FULL) == [], "the first have not left yet"
    await stand.goes()
    assert len(await reported(stand, FULL)) == MAX_PER_NODE
    assert {reason for _, reason in stand.asked} == {"memory"}
    await stand.goes()
    assert await reported(stand, FULL, node="n3") == [], "nobody lives there"
    assert len(stand.ledger.leases) == 4
    assert sum(lease.node == "n2" for lease in stand.ledger.leases) == 2


async def test_a_node_is_relieved_some_way_below_the_limit() -> None:
    stand = Leaving()
    stand.live(20)
    stand.clock.at_s += SPARED_S
    assert await reported(stand, BETWEEN) == []
    assert await reported(stand, FULL) != []
    await stand.goes()
    assert await reported(stand, BETWEEN) != []
    await stand.goes()
    assert await reported(stand, RELIEVED) == []
    assert await reported(stand, BETWEEN) == []


async def test_busy_sessions_and_those_that_just_rested_stay_where_memory_is_short() -> None:
    stand = Leaving()
    first, second, third = stand.live(3)
    stand.clock.at_s += SPARED_S
    stand.ledger.note(first, 1, 1, is_busy=True)
    stand.ledger.note(second, 1, 1, is_busy=True)
    stand.ledger.note(second, 1, 2, is_busy=False)
    assert await reported(stand, FULL) == [third.session_id]
    await stand.goes()


async def test_one_that_would_not_go_is_not_asked_again_at_once() -> None:
    stand = Leaving()
    stand.live(1)
    stand.clock.at_s += SPARED_S
    stand.answer = stand.ledger.defer
    assert await reported(stand, FULL) == ["n1-0"]
    await stand.goes()
    assert await reported(stand, FULL) == []
    stand.clock.at_s += SPARED_S
    assert await reported(stand, FULL) == ["n1-0"]
    await stand.goes()


async def test_those_idle_for_long_leave_a_few_at_a_time_and_others_stay() -> None:
    stand = Leaving(idle_s=60)
    stand.live(30)
    await stand.looked()
    assert stand.asked == []
    stand.clock.at_s += 60 - 11
    await stand.looked()
    assert len(stand.asked) == MAX_AT_ONCE
    await stand.looked()
    assert len(stand.asked) == MAX_AT_ONCE, "they are still leaving"
    for _ in range(3):
        await stand.goes()
        await stand.looked()
    assert [session_id for session_id, _ in stand.asked] == [f"n1-{n}" for n in range(20)]
    assert {reason for _, reason in stand.asked} == {"idle"}


async def test_a_failure_to_leave_keeps_nobody_else() -> None:
    stand = Leaving(idle_s=60)
    stand.live(2)
    stand.clock.at_s += 60

    def fails(_: Lease) -> None:
        raise JournalFault("The journal did not answer.")

    stand.answer = fails
    await stand.looked()
    await stand.goes()
    assert len(stand.ledger.leases) == 2
    await stand.looked()
    assert len(stand.asked) == 2, "nor are they asked again at once"


# Through the desk


async def passive(sessions: LocalSessions, session_id: str) -> None:
    async def is_passive() -> bool:
        return await sessions.desk.find(session_id) is None

    await eventually(is_passive, SOON_S)


async def reasons(journal: MemoryJournal, session_id: str) -> list[str]:
    facts = [record.fact for record in await read_all(journal, session_id)]
    return [fact.reason for fact in facts if isinstance(fact, Activated | Passivated)]


async def test_an_idle_session_leaves_no_read_wakes_it_and_the_next_command_does(
    tmp_path: Path,
) -> None:
    journal = MemoryJournal()
    actors = ActorsSettings(page_wait_s=0.1, close_wait_s=1.0, idle_s=0.05)
    kit = kit_for(
        tmp_path, journal=journal, model=ScriptedModel([SAY, SAY]), tools=[Echo()], actors=actors
    )
    async with local_house(kit) as sessions:
        session_id = (await sessions.open(ALICE, Open())).session_id
        await sessions.submit(ALICE, session_id, SendMessage(text="hi"))
        await passive(sessions, session_id)
        assert (await sessions.capacity(ALICE)).live == 0
        before = await reasons(journal, session_id)
        assert set(before[1::2]) == {"idle"}

        assert (await sessions.view(ALICE, session_id)).status == "passive"
        assert len((await sessions.owned(ALICE, limit=5, after=None)).data) == 1
        assert (await sessions.messages(ALICE, session_id))[-1]["content"] == "ok"
        assert await sessions.trajectory(ALICE, session_id)
        events = await follow(sessions, ALICE, session_id, live=False)
        assert events.types()[-1] == "passivated"
        reading = asyncio.create_task(follow(sessions, ALICE, session_id, until="turn_ended"))
        assert await sessions.desk.find(session_id) is None
        assert await reasons(journal, session_id) == before

        await sessions.submit(ALICE, session_id, SendMessage(text="again"))
        assert (await turn_of(sessions, ALICE, session_id, 2))["reason"] == "done"
        await reading
        assert (await reasons(journal, session_id))[len(before)] == "woken"


async def test_where_memory_is_short_the_longest_idle_session_leaves_and_a_busy_one_stays(
    tmp_path: Path,
) -> None:
    journal, clock, tool = MemoryJournal(), Clock(), Wait()
    kit = kit_for(
        tmp_path,
        journal=journal,
        model=ScriptedModel([Reply("let me", tool_calls=(call("wait"),)), SAY]),
        tools=[tool],
        actors=ActorsSettings(page_wait_s=0.1, close_wait_s=1.0, idle_s=None),
        now_s=clock,
    )
    async with local_house(kit) as sessions:
        busy, idle = [(await sessions.open(who, Open())).session_id for who in (ALICE, BOB)]
        await sessions.submit(ALICE, busy, SendMessage(text="go"))
        await asyncio.wait_for(tool.began.wait(), SOON_S)
        clock.at_s += SPARED_S
        sessions.desk.note_memory("", FULL)
        await passive(sessions, idle)
        assert await reasons(journal, idle) == ["opened", "memory"]
        assert await sessions.desk.find(busy) is not None
        tool.go.set()
        assert (await turn_of(sessions, ALICE, busy, 1))["reason"] == "done"


async def test_a_newcomer_gets_the_place_of_one_that_is_leaving(tmp_path: Path) -> None:
    clock = Clock()
    actors = ActorsSettings(page_wait_s=0.1, close_wait_s=1.0, idle_s=None, max_sessions=1)
    kit = kit_for(tmp_path, tools=[Echo()], actors=actors, now_s=clock)
    async with local_house(kit) as sessions:
        for n in range(10):
            await sessions.open(Principal(f"user{n}"), Open())
            clock.at_s += SPARED_S
            sessions.desk.note_memory("", FULL)  # the newcomer comes while this one leaves
            assert (await sessions.capacity(ALICE)).live <= 1
        assert sessions.desk.ledger.n_live <= 1


async def test_a_thousand_sessions_are_addressable_with_ten_slots(tmp_path: Path) -> None:
    actors = ActorsSettings(page_wait_s=0.1, close_wait_s=1.0, max_sessions=10)
    kit = kit_for(tmp_path, tools=[Echo()], actors=actors, model=ScriptedModel([SAY] * 100))
    users = [Principal(f"user{n}") for n in range(50)]
    async with local_house(kit) as sessions:
        opened = [(who, (await sessions.open(who, Open())).session_id) for who in users * 20]
        assert sessions.desk.ledger.n_live == 10
        for who, session_id in opened[::10]:
            await sessions.submit(who, session_id, SendMessage(text="hi"))
            assert (await turn_of(sessions, who, session_id, 1))["reason"] == "done"
        assert sessions.desk.ledger.n_live == 10
        views = (await sessions.owned(users[0], limit=100, after=None)).data
        assert len(views) == 20
        assert sum(view.n_messages == 2 for view in views) == 20
