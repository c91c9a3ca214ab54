"""A session's incarnations for tests of floor 2: one journal, one activation after another."""

import asyncio
from typing import Any

from actors.activation import Activation
from actors.kit import Kit
from actors.protocol import Accepted, AnyCommand, SendMessage
from agent.events import Record, SessionOpened, TurnEnded
from agent.journal import read_all
from agent.journal_memory import MemoryJournal
from agent.spec import AgentSpec, ApprovalPolicy, ApprovalRule
from agent.testing import Reply, ScriptedModel
from tests.support.house import ALICE, SOON_S

SPEC = AgentSpec(name="t", system_prompt="You are a test.", model="scripted/x", tools=("*",))
ASKING = SPEC.model_copy(
    update={"approval": ApprovalPolicy(rules=(ApprovalRule(tools="effect", action="ask"),))}
)
SAY = Reply("ok")


def call(tool: str, word: str = "w") -> tuple[str, dict[str, Any]]:
    return (tool, {"word": word})


class Stand:
    """A session in a journal, and the incarnations that a test gives it."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.reports: list[str] = []
        self.lost = asyncio.Event()
        self.living: list[Activation] = []

    async def open(self, spec: AgentSpec = SPEC) -> Activation:
        opened = SessionOpened(
            session_id="s", user_id="alice", agent=spec.name, model=spec.model, spec=spec
        )
        await self.kit.journal.create(opened)
        return await self.wake()

    async def wake(self) -> Activation:
        activation = await Activation.open(self.kit, "s", lambda report: self._told(report.change))
        self.living.append(activation)
        return activation

    def _told(self, change: str) -> None:
        self.reports.append(change)
        if change == "lost":
            self.lost.set()

    async def records(self) -> list[Record]:
        return await read_all(self.kit.journal, "s")

    async def facts(self, kind: type[Any]) -> list[Any]:
        return [r.fact for r in await self.records() if isinstance(r.fact, kind)]

    async def rested(self, activation: Activation) -> None:
        """Wait, by the feed, until every open turn has ended."""
        async with asyncio.timeout(SOON_S):
            while activation.context.open_turns:
                await activation.feed.changed(SOON_S)

    async def ended(self, activation: Activation, command: AnyCommand | str) -> TurnEnded:
        """Carry out a command that opens a turn, and wait for the turn's end."""
        command = SendMessage(text=command) if isinstance(command, str) else command
        accepted: Accepted = await activation.submit(ALICE, command)
        await self.rested(activation)
        [end] = [e for e in await self.facts(TurnEnded) if e.turn == accepted.turn]
        return end

    async def close(self) -> None:
        for activation in self.living:
            await activation.end()


class SlowJournal(MemoryJournal):
    """Holds appends back while `gate` is clear."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = asyncio.Event()

    async def append(self, *args: Any) -> Any:
        if not self.gate.is_set():
            self.waiting.set()
            await self.gate.wait()
        return await super().append(*args)


def requests_of(stand: Stand) -> list[Any]:
    assert isinstance(stand.kit.model, ScriptedModel)
    return stand.kit.model.requests
