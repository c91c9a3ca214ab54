"""A house that ends: turns stop between two steps or at the limit, and go on in the next one alone."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.local import LocalSessions
from actors.protocol import Open, SendMessage, Unavailable
from actors.settings import ActorsSettings
from agent.events import Activated, AssistantMessage, Fact, Passivated, ToolFinished, TurnEnded
from agent.journal import Journal, read_all
from agent.journal_memory import MemoryJournal
from agent.testing import Reply, ScriptedModel
from agent.tools.contract import ToolResult, ToolScope
from tests.support.house import ALICE, SOON_S, Effect, Wait, follow, kit_for, local_house, turn_of
from tests.support.stand import SAY, call

PATIENT = ActorsSettings(page_wait_s=0.1, close_wait_s=1.0, sweep_s=0.05, drain_s=SOON_S * 10)
HASTY = PATIENT.model_copy(update={"drain_s": 0.05})
WAIT = Reply("let me", tool_calls=(call("wait"),))


class Stuck(Wait):
    """Does not end when it is told to, until it is let go."""

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        self.began.set()
        while not self.go.is_set():
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                continue
        raise asyncio.CancelledError


async def begun(sessions: LocalSessions, tool: Wait) -> str:
    """A session whose turn is in the middle of a tool call."""
    session_id = (await sessions.open(ALICE, Open())).session_id
    await sessions.submit(ALICE, session_id, SendMessage(text="go"))
    await asyncio.wait_for(tool.began.wait(), SOON_S)
    return session_id


async def facts(journal: Journal, session_id: str) -> list[Fact]:
    return [record.fact for record in await read_all(journal, session_id)]


async def refused(sessions: LocalSessions) -> None:
    """Wait until the house takes nobody in any more."""
    fault: Unavailable | None = None
    async with asyncio.timeout(SOON_S):
        while fault is None:
            try:
                view = await sessions.open(ALICE, Open())
                await sessions.delete(ALICE, view.session_id)
            except Unavailable as refusal:
                fault = refusal
    assert fault.retry_after_s > 0


async def test_a_turn_stops_between_two_steps_and_the_next_house_ends_it(tmp_path: Path) -> None:
    journal, tool = MemoryJournal(), Wait()
    model = ScriptedModel([WAIT, SAY])
    kit = kit_for(tmp_path, journal=journal, model=model, tools=[tool], actors=PATIENT)
    async with local_house(kit) as sessions:
        session_id = await begun(sessions, tool)
        draining = asyncio.create_task(sessions.desk.drain())
        await refused(sessions)
        tool.go.set()
        await asyncio.wait_for(draining, SOON_S)
    left = await facts(journal, session_id)
    assert [fact.outcome for fact in left if isinstance(fact, ToolFinished)] == ["ok"]
    assert len([fact for fact in left if isinstance(fact, AssistantMessage)]) == 1
    assert not [fact for fact in left if isinstance(fact, TurnEnded)]
    assert isinstance(left[-1], Passivated)
    assert left[-1].reason == "shutdown"
    assert len(model.requests) == 1

    async with local_house(kit) as again:
        assert (await turn_of(again, ALICE, session_id, 1))["reason"] == "done"
    after = await facts(journal, session_id)
    assert after[: len(left)] == left
    assert [fact.outcome for fact in after if isinstance(fact, ToolFinished)] == ["ok"]
    reasons = [fact.reason for fact in after if isinstance(fact, Activated)]
    assert reasons == ["opened", "woken"]


async def test_a_step_that_does_not_end_is_stopped_at_the_limit(tmp_path: Path) -> None:
    journal, tool = MemoryJournal(), Wait()
    model = ScriptedModel([WAIT, SAY])
    kit = kit_for(tmp_path, journal=journal, model=model, tools=[tool], actors=HASTY)
    async with local_house(kit) as sessions:
        session_id = await begun(sessions, tool)
        await asyncio.wait_for(sessions.desk.drain(), SOON_S)
        assert sessions.desk.ledger.leases == []
    left = await facts(journal, session_id)
    assert isinstance(left[-1], Passivated)
    assert not [fact for fact in left if isinstance(fact, ToolFinished)]

    async with local_house(kit) as again:
        assert (await turn_of(again, ALICE, session_id, 1))["reason"] == "done"
    finished = [f for f in await facts(journal, session_id) if isinstance(f, ToolFinished)]
    assert [fact.outcome for fact in finished] == ["unknown"]


@pytest.mark.parametrize("is_forced", [False, True])
async def test_a_model_call_that_was_cut_off_by_the_limit_is_made_again(
    tmp_path: Path,
    is_forced: bool,
) -> None:
    gate, journal = asyncio.Event(), MemoryJournal()
    slow = Reply("Hello there", chunks=2, gate=gate, gate_after=1)
    model = ScriptedModel([slow, SAY] if is_forced else [slow])
    actors = HASTY if is_forced else PATIENT
    kit = kit_for(tmp_path, journal=journal, model=model, tools=[Effect()], actors=actors)
    async with local_house(kit) as sessions:
        session_id = (await sessions.open(ALICE, Open())).session_id
        await sessions.submit(ALICE, session_id, SendMessage(text="go"))
        await follow(sessions, ALICE, session_id, until="text_delta")
        draining = asyncio.create_task(sessions.desk.drain())
        if not is_forced:
            await refused(sessions)
            gate.set()
        await asyncio.wait_for(draining, SOON_S)
    async with local_house(kit) as again:
        assert (await turn_of(again, ALICE, session_id, 1))["reason"] == "done"
    said = [f.text for f in await facts(journal, session_id) if isinstance(f, AssistantMessage)]
    assert said == ["ok" if is_forced else "Hello there"]


async def test_a_session_that_does_not_let_go_does_not_hold_the_house(tmp_path: Path) -> None:
    journal, tool = MemoryJournal(), Stuck()
    hasty = HASTY.model_copy(update={"close_wait_s": 0.05})
    kit = kit_for(
        tmp_path, journal=journal, model=ScriptedModel([WAIT]), tools=[tool], actors=hasty
    )
    async with local_house(kit) as sessions:
        session_id = await begun(sessions, tool)
        await asyncio.wait_for(sessions.desk.drain(), SOON_S)
        assert sessions.desk.ledger.leases == []
        assert await sessions.desk.find(session_id) is None
        tool.go.set()
    row = await journal.row(session_id)
    assert row.n_open_turns == 1
