"""A session's files on the machines where it lives, one after another."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from actors.activation import Activation
from actors.local import LocalSessions
from actors.protocol import Close, Open, SendMessage, Unavailable
from agent.events import (
    SandboxClosed,
    SandboxOpened,
    ToolFinished,
    WorkspaceRestored,
    WorkspaceSaved,
)
from agent.journal_memory import MemoryJournal
from agent.model.contract import Model
from agent.settings import StorageSettings
from agent.snapshots import BEHIND, GONE, Snapshots
from agent.testing import Reply, ScriptedModel
from agent.tools.contract import ToolResult, ToolScope
from tests.support.house import ALICE, KNOWN, SOON_S, Echo, Wait, kit_for, turn_of
from tests.support.stand import SAY, SPEC, Stand, call, requests_of


class Note(Echo):
    """Writes its word into `note.txt` of the workspace."""

    name: ClassVar[str] = "note"
    idempotent: ClassVar[bool] = False

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        sandbox = await scope.sandbox()
        await sandbox.write_file("note.txt", arguments.word.encode())
        return ToolResult("noted")


class Look(Echo):
    """Reads it."""

    name: ClassVar[str] = "look"

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        sandbox = await scope.sandbox()
        return ToolResult((await sandbox.read_file("note.txt", max_bytes=100)).decode())


class Machines:
    """Nodes with a disk each, one journal, one store."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.journal = MemoryJournal()
        self.stands: list[Stand] = []
        self.wait = Wait()

    @property
    def store(self) -> Path:
        return self.top / "store"

    def kit(self, name: str, model: Model) -> Any:
        storage = StorageSettings(url=f"file://{self.store}")
        return kit_for(
            self.top / name,
            journal=self.journal,
            model=model,
            tools=[Note(), Look(), self.wait],
            snapshots=Snapshots(storage, self.top / name),
        )

    def add(self, name: str, *replies: Reply) -> Stand:
        self.stands.append(Stand(self.kit(name, ScriptedModel(replies))))
        return self.stands[-1]

    async def close(self) -> None:
        for stand in self.stands:
            await stand.close()


@pytest.fixture
async def machines(tmp_path: Path) -> AsyncIterator[Machines]:
    made = Machines(tmp_path)
    yield made
    await made.close()


def tool(name: str, word: str = "w") -> Reply:
    return Reply("", tool_calls=(call(name, word),))


async def until(activation: Activation, holds: Callable[[], bool]) -> None:
    """Wait, by the feed, for what the facts say."""
    async with asyncio.timeout(SOON_S):
        while not holds():
            await activation.feed.changed(SOON_S)


async def saved(activation: Activation, before: WorkspaceSaved | None = None) -> WorkspaceSaved:
    await until(activation, lambda: activation.context.held.saved is not before)
    fact = activation.context.held.saved
    assert fact is not None
    return fact


async def texts(stand: Stand) -> list[str]:
    return [fact.text for fact in await stand.facts(ToolFinished)]


async def test_a_session_finds_its_files_where_it_wakes(machines: Machines) -> None:
    a = machines.add("a", tool("note", "kept"), SAY)
    first = await a.open()
    await a.ended(first, "write")
    assert await first.passivate("idle")
    b = machines.add("b", tool("look"), SAY)
    await b.ended(await b.wake(), "read")
    assert await texts(b) == ["noted", "kept"]
    [restored] = await b.facts(WorkspaceRestored)
    [known] = await b.facts(WorkspaceSaved)
    assert (restored.snapshot_id, restored.n_files) == (known.snapshot_id, 1)
    assert (restored.detail, restored.turn) == (None, 2)
    kinds = [type(record.fact) for record in await b.records()]
    assert kinds.index(WorkspaceRestored) < len(kinds) - kinds[::-1].index(SandboxOpened)


async def test_a_session_that_stays_is_told_nothing(machines: Machines) -> None:
    a = machines.add("a", tool("note", "kept"), SAY, tool("look"), SAY)
    first = await a.open()
    await a.ended(first, "write")
    assert await first.passivate("idle")
    await a.ended(await a.wake(), "read")
    assert await texts(a) == ["noted", "kept"]
    assert await a.facts(WorkspaceRestored) == []


async def test_files_are_saved_at_rest_and_only_when_they_changed(machines: Machines) -> None:
    a = machines.add("a", tool("note", "1"), SAY, tool("look"), SAY, tool("note", "22"), SAY)
    activation = await a.open()
    await a.ended(activation, "write")
    first = await saved(activation)
    await a.ended(activation, "read")
    await a.ended(activation, "write")
    second = await saved(activation, first)
    assert await activation.passivate("idle")
    assert await a.facts(WorkspaceSaved) == [first, second]
    assert [fact.unsaved for fact in await a.facts(SandboxClosed)] == [False]


async def test_after_a_crash_elsewhere_the_model_is_told_what_is_lost(machines: Machines) -> None:
    a = machines.add("a", tool("note", "saved"), SAY, tool("note", "lost"), tool("wait"))  # fmt: skip
    first = await a.open()
    await a.ended(first, "write")
    await saved(first)
    await first.submit(ALICE, SendMessage(text="and again"))
    await asyncio.wait_for(machines.wait.began.wait(), SOON_S)
    # From here on nothing of `a` is asked to leave in order: its process is as good as dead.
    b = machines.add("b", tool("look"), SAY)
    second = await b.wake()
    await until(second, lambda: not second.context.open_turns)
    assert (await texts(b))[-1] == "saved"
    [restored] = await b.facts(WorkspaceRestored)
    assert restored.detail == BEHIND
    last = requests_of(b)[-1].messages
    assert f"[{BEHIND}]" in [message["content"] for message in last]


async def test_a_node_that_had_the_session_before_the_crash_is_behind(machines: Machines) -> None:
    """It holds exactly the newest snapshot, and does not hold what another node did with it since."""
    a = machines.add("a", tool("note", "saved"), SAY, tool("look"), SAY)
    first = await a.open()
    await a.ended(first, "write")
    assert await first.passivate("idle")
    b = machines.add("b", tool("note", "lost"), tool("wait"))
    machines.wait.began.clear()
    await (await b.wake()).submit(ALICE, SendMessage(text="go on"))
    await asyncio.wait_for(machines.wait.began.wait(), SOON_S)
    third = await a.wake()
    await until(third, lambda: not third.context.open_turns)
    assert (await texts(a))[-1] == "saved"
    assert [fact.detail for fact in await a.facts(WorkspaceRestored)] == [None, BEHIND]


async def test_a_crash_before_anything_was_saved_is_told(machines: Machines) -> None:
    a = machines.add("a", tool("note", "lost"), tool("wait"))
    await (await a.open()).submit(ALICE, SendMessage(text="write"))
    await asyncio.wait_for(machines.wait.began.wait(), SOON_S)
    b = machines.add("b", tool("look"), SAY)
    second = await b.wake()
    await until(second, lambda: not second.context.open_turns)
    [restored] = await b.facts(WorkspaceRestored)
    assert (restored.snapshot_id, restored.detail) == (None, GONE)


async def test_a_save_that_fails_breaks_nothing_and_is_made_at_the_next_rest(
    machines: Machines,
) -> None:
    machines.store.write_text("no directory")
    a = machines.add("a", tool("note", "1"), SAY, tool("note", "22"), SAY)
    activation = await a.open()
    assert (await a.ended(activation, "write")).reason == "done"
    machines.store.unlink()
    assert (await a.ended(activation, "write more")).reason == "done"
    assert (await saved(activation)).n_bytes == 2


async def test_what_could_not_be_saved_is_known_to_be_missing_elsewhere(machines: Machines) -> None:
    a = machines.add("a", tool("note", "saved"), SAY, tool("note", "unsaved"), SAY)
    first = await a.open()
    await a.ended(first, "write")
    await saved(first)
    kept = machines.store.rename(machines.top / "kept")
    machines.store.write_text("no directory")
    await a.ended(first, "write more")
    assert await first.passivate("idle")
    assert [fact.unsaved for fact in await a.facts(SandboxClosed)] == [True]
    machines.store.unlink()
    kept.rename(machines.store)
    b = machines.add("b", tool("look"), SAY)
    await b.ended(await b.wake(), "read")
    assert [fact.detail for fact in await b.facts(WorkspaceRestored)] == [BEHIND]


async def test_a_store_that_cannot_be_asked_fails_the_call_and_not_the_session(
    machines: Machines,
) -> None:
    a = machines.add("a", tool("note", "kept"), SAY)
    first = await a.open()
    await a.ended(first, "write")
    assert await first.passivate("idle")
    kept = machines.store.rename(machines.top / "kept")
    machines.store.write_text("no directory")
    b = machines.add("b", tool("look"), SAY, tool("look"), SAY)
    second = await b.wake()
    assert (await b.ended(second, "read")).reason == "done"
    assert [fact.outcome for fact in await b.facts(ToolFinished)] == ["ok", "error"]
    machines.store.unlink()
    kept.rename(machines.store)
    await b.ended(second, "read again")
    assert (await texts(b))[-1] == "kept"


async def worked(house: LocalSessions) -> str:
    row = await house.open(ALICE, Open())
    accepted = await house.submit(ALICE, row.session_id, SendMessage(text="write"))
    assert (await turn_of(house, ALICE, row.session_id, accepted.turn))["reason"] == "done"
    await house.submit(ALICE, row.session_id, Close())
    return row.session_id


async def test_a_deleted_session_has_no_snapshots(machines: Machines) -> None:
    kit = machines.kit("a", ScriptedModel([tool("note"), SAY]))
    async with LocalSessions(kit, {**KNOWN, "tester": SPEC}) as house:
        session_id = await worked(house)
        assert len(list((machines.store / session_id).iterdir())) == 1
        await house.delete(ALICE, session_id)
    assert list(machines.store.iterdir()) == []
    assert list(kit.workspace(session_id).parent.iterdir()) == []


async def test_a_session_whose_snapshots_cannot_be_removed_can_be_deleted_later(
    machines: Machines,
) -> None:
    kit = machines.kit("a", ScriptedModel([tool("note"), SAY]))
    async with LocalSessions(kit, {**KNOWN, "tester": SPEC}) as house:
        session_id = await worked(house)
        kept = machines.store.rename(machines.top / "kept")
        machines.store.write_text("no directory")
        with pytest.raises(Unavailable):
            await house.delete(ALICE, session_id)
        machines.store.unlink()
        kept.rename(machines.store)
        await house.delete(ALICE, session_id)
    assert list(machines.store.iterdir()) == []
