"""Floor 2 for tests: `LocalSessions` over shipped doubles, and what readers assemble from pages."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict

from actors.kit import Kit
from actors.local import LocalSessions
from actors.protocol import Principal, Sessions
from actors.settings import ActorsSettings
from agent.agents import load_agents
from agent.events import Cursor
from agent.journal import Journal
from agent.journal_memory import MemoryJournal
from agent.model.contract import Model
from agent.sandbox.contract import Sandbox
from agent.sandbox.local import open_sandbox
from agent.settings import AgentSettings, ToolSettings
from agent.spec import AgentSpec, SandboxSpec
from agent.testing import FakeSandbox, NamedScripts
from agent.tools.contract import Tool, ToolResult, ToolScope
from agent.tools.standard import standard_tools
from tests.support.reader import Reader

ALICE, BOB = Principal("alice"), Principal("bob")
SOON_S = 5.0


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")
    word: str = ""


class Echo:
    """Says its word. Free to repeat."""

    name: ClassVar[str] = "echo"
    description: ClassVar[str] = "Says a word."
    Arguments: ClassVar[type[BaseModel]] = _Arguments
    idempotent: ClassVar[bool] = True

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        scope.show(arguments.word)
        return ToolResult(arguments.word)


class Effect(Echo):
    """Says its word, once: not to be repeated."""

    name: ClassVar[str] = "effect"
    idempotent: ClassVar[bool] = False


class Burst(Echo):
    """Raises."""

    name: ClassVar[str] = "burst"

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        raise RuntimeError(arguments.word)


class Wait(Echo):
    """Runs until it is let go, and says when it began."""

    name: ClassVar[str] = "wait"
    idempotent: ClassVar[bool] = False

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.go = asyncio.Event()

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        scope.show("waiting")
        self.began.set()
        await self.go.wait()
        return ToolResult("went on")


AGENTS = Path(__file__).parent / "agents"
KNOWN = load_agents([AGENTS])


class FakeOpener:
    """Opens sandboxes without processes. Holds back while `gate` is clear."""

    def __init__(self) -> None:
        self.opened: list[FakeSandbox] = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(
        self, spec: SandboxSpec, workspace: Path, *, session_id: str, epoch: int
    ) -> Sandbox:
        del spec, session_id, epoch
        self.asked.set()
        await self.gate.wait()
        await asyncio.to_thread(workspace.mkdir, parents=True, exist_ok=True)
        self.opened.append(FakeSandbox(workspace))
        return self.opened[-1]


def kit_for(
    tmp_path: Path,
    *,
    journal: Journal | None = None,
    model: Model | None = None,
    tools: Sequence[Tool] = (),
    actors: ActorsSettings | None = None,
    **more: Any,
) -> Kit:
    """Real sandboxes, unless a test brings its own tools: those need none."""

    def make_tools(settings: ToolSettings) -> Sequence[Tool]:
        return [*standard_tools(settings), *tools]

    return Kit(
        journal=journal or MemoryJournal(),
        model=model or NamedScripts(),
        agent=AgentSettings(storage_dir=tmp_path, default_agent="tester"),
        actors=actors or ActorsSettings(page_wait_s=0.2),
        make_tools=make_tools,
        **{"open_sandbox": FakeOpener() if tools else open_sandbox, **more},
    )


@asynccontextmanager
async def local_house(kit: Kit, *agents: AgentSpec) -> AsyncIterator[LocalSessions]:
    known = KNOWN | {spec.name: spec for spec in agents}
    async with LocalSessions(kit, known) as sessions:
        yield sessions


def puppet(*steps: dict[str, Any]) -> str:
    """A message that makes `scripted/puppet` do these steps."""
    return yaml.safe_dump(list(steps))


async def follow(
    sessions: Sessions,
    who: Principal,
    session_id: str,
    *,
    turn: int | None = None,
    after: Cursor | None = None,
    until: str | None = None,
    live: bool = True,
    reader: Reader | None = None,
) -> Reader:
    """Read until the stream ends, or the first fact of type `until`."""
    reader = reader or Reader()
    pages = sessions.pages(who, session_id, after or reader.cursor, turn=turn, follow=live)
    async with asyncio.timeout(SOON_S * 2):
        async for page in pages:
            for frame in page.frames:
                reader.take(frame)
            reader.cursor = page.cursor
            if page.end or (until and until in [frame.event for frame in page.frames]):
                break
        await pages.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    return reader


async def turn_of(sessions: Sessions, who: Principal, session_id: str, turn: int) -> dict[str, Any]:
    """Wait for a turn's end; its `turn_ended`."""
    reader = await follow(sessions, who, session_id, turn=turn)
    [ended] = reader.of("turn_ended")
    return ended
