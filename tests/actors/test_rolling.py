"""A newer version takes sessions over one by one, in their slots, and no turn notices."""

import asyncio
from pathlib import Path
from typing import Any

from actors.local import LocalSessions
from actors.protocol import Open, SendMessage
from actors.settings import ActorsSettings
from agent.events import Activated, Fact, Passivated, ToolFinished
from agent.journal import Journal, read_all
from agent.journal_memory import MemoryJournal
from agent.testing import Reply, ScriptedModel
from tests.support.house import ALICE, SOON_S, Wait, follow, kit_for, local_house, turn_of
from tests.support.processes import eventually
from tests.support.stand import SAY, call

ONE = ActorsSettings(
    page_wait_s=0.1, close_wait_s=1.0, sweep_s=0.05, drain_s=SOON_S * 10, max_sessions=1
)
WAIT = Reply("let me", tool_calls=(call("wait"),))


def outdate(sessions: LocalSessions) -> None:
    for host in sessions.hosts.by_name.values():
        host.current = False


async def facts(journal: Journal, session_id: str) -> list[Fact]:
    return [record.fact for record in await read_all(journal, session_id)]


async def test_a_running_turn_moves_between_two_steps_and_keeps_its_slot(tmp_path: Path) -> None:
    journal, tool = MemoryJournal(), Wait()
    model = ScriptedModel([WAIT, SAY])
    kit = kit_for(tmp_path, journal=journal, model=model, tools=[tool], actors=ONE)
    async with local_house(kit) as sessions:
        session_id = (await sessions.open(ALICE, Open())).session_id
        await sessions.submit(ALICE, session_id, SendMessage(text="go"))
        await asyncio.wait_for(tool.began.wait(), SOON_S)
        reading = asyncio.create_task(follow(sessions, ALICE, session_id, turn=1))
        before = await sessions.desk.find(session_id)
        outdate(sessions)
        rolling = asyncio.create_task(sessions.desk.roll())
        tool.go.set()
        await asyncio.wait_for(rolling, SOON_S)
        assert sessions.desk.outdated() == []
        assert sessions.desk.ledger.n_live == 1
        heard = await reading
        assert heard.of("turn_ended")[0]["reason"] == "done"
        after = await sessions.desk.find(session_id)
        assert before is not None
        assert after is not None
        assert after.host != before.host
        assert list(sessions.hosts.by_name) == [after.host]
    told = await facts(journal, session_id)
    assert [fact.outcome for fact in told if isinstance(fact, ToolFinished)] == ["ok"]
    assert [fact.reason for fact in told if isinstance(fact, Activated)] == ["opened", "woken"]
    assert [fact.reason for fact in told if isinstance(fact, Passivated)] == ["rolled", "shutdown"]


async def test_a_tool_that_outlasts_the_limit_is_unknown_and_the_turn_goes_on(
    tmp_path: Path,
) -> None:
    journal, tool = MemoryJournal(), Wait()
    hasty = ONE.model_copy(update={"drain_s": 0.05})
    model = ScriptedModel([WAIT, SAY])
    kit = kit_for(tmp_path, journal=journal, model=model, tools=[tool], actors=hasty)
    async with local_house(kit) as sessions:
        session_id = (await sessions.open(ALICE, Open())).session_id
        await sessions.submit(ALICE, session_id, SendMessage(text="go"))
        await asyncio.wait_for(tool.began.wait(), SOON_S)
        outdate(sessions)
        await asyncio.wait_for(sessions.desk.roll(), SOON_S)
        assert (await turn_of(sessions, ALICE, session_id, 1))["reason"] == "done"
    told = await facts(journal, session_id)
    assert [fact.outcome for fact in told if isinstance(fact, ToolFinished)] == ["unknown"]


async def test_an_idle_session_gives_its_slot_back_and_wakes_when_it_is_needed(
    tmp_path: Path,
) -> None:
    kit = kit_for(tmp_path, model=ScriptedModel([SAY, SAY]), actors=ONE)
    async with local_house(kit) as sessions:
        session_id = (await sessions.open(ALICE, Open())).session_id
        await sessions.submit(ALICE, session_id, SendMessage(text="go"))
        await turn_of(sessions, ALICE, session_id, 1)
        outdate(sessions)
        await asyncio.wait_for(sessions.desk.roll(), SOON_S)
        assert await sessions.desk.find(session_id) is None
        assert sessions.desk.ledger.leases == []
        await sessions.submit(ALICE, session_id, SendMessage(text="again"))
        assert (await turn_of(sessions, ALICE, session_id, 2))["reason"] == "done"


async def test_a_house_that_ends_in_the_middle_of_a_roll_leaves_the_turn_open(
    tmp_path: Path,
) -> None:
    journal, tool = MemoryJournal(), Wait()
    model = ScriptedModel([WAIT, SAY])
    kit = kit_for(tmp_path, journal=journal, model=model, tools=[tool], actors=ONE)
    async with local_house(kit) as sessions:
        session_id = (await sessions.open(ALICE, Open())).session_id
        await sessions.submit(ALICE, session_id, SendMessage(text="go"))
        await asyncio.wait_for(tool.began.wait(), SOON_S)
        outdate(sessions)
        sessions.desk.begin()

        async def pausing() -> bool:
            hosts: list[Any] = list(sessions.hosts.by_name.values())
            return hosts[0]._activations[session_id].is_pausing()

        await eventually(pausing, SOON_S)
        draining = asyncio.create_task(sessions.desk.drain())
        tool.go.set()
        await asyncio.wait_for(draining, SOON_S)
        assert sessions.desk.ledger.leases == []
    async with local_house(kit) as again:
        assert (await turn_of(again, ALICE, session_id, 1))["reason"] == "done"
    told = await facts(journal, session_id)
    assert [fact.outcome for fact in told if isinstance(fact, ToolFinished)] == ["ok"]
