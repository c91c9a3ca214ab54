"""Fills a journal with sessions that rest, through the journal's own calls, before a house opens it."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

from agent.agents import load_agents
from agent.events import (
    Activated,
    AssistantMessage,
    Fact,
    ModelCalled,
    Passivated,
    SessionOpened,
    TurnEnded,
    Usage,
    UserMessage,
)
from agent.journals import open_journal
from agent.settings import AgentSettings

MODEL = "openai/chunks-1-at-0"
USAGE = Usage(prompt_tokens=10, completion_tokens=1)
N_SHORT = 10_000
LONG = tuple(f"long-{number}" for number in range(20))
TURN_RECORDS = 4
LONG_TURNS = 250
PAGE = 50
"""Turns written together."""


def fill(folder: Path) -> None:
    """The default journal of a storage directory: `N_SHORT` sessions of one turn, and the `LONG` ones.
    Blocking."""
    rest(folder, dict.fromkeys(LONG, LONG_TURNS) | {f"short-{n}": 1 for n in range(N_SHORT)})


def rest(folder: Path, n_turns: Mapping[str, int]) -> None:
    """Sessions by their ids, each of so many turns. Blocking."""
    asyncio.run(_rest(AgentSettings(storage_dir=folder), n_turns))


async def _rest(settings: AgentSettings, n_turns: Mapping[str, int]) -> None:
    journal = await open_journal(settings.journal, settings.storage_dir)
    spec = load_agents([])["default"]
    for session_id, n in n_turns.items():
        opened = SessionOpened(
            session_id=session_id, user_id="dev", agent="default", model=MODEL, spec=spec
        )
        await journal.create(opened)
        epoch = await journal.fence(session_id)
        await journal.append(session_id, epoch, [Activated(epoch=epoch, reason="opened")])
        for first in range(1, n + 1, PAGE):
            turns = range(first, min(first + PAGE, n + 1))
            facts = [fact for turn in turns for fact in _turn(turn, epoch)]
            await journal.append(session_id, epoch, facts)
        await journal.append(session_id, epoch, [Passivated(reason="idle")])
    await journal.close()


def _turn(turn: int, epoch: int) -> Iterator[Fact]:
    yield UserMessage(turn=turn, text="What does the bench say? " * 4)
    yield ModelCalled(turn=turn, model=MODEL, usage=USAGE, cost_usd=None, latency_ms=5)
    yield AssistantMessage(
        turn=turn,
        part_id=f"{turn}.{epoch}.0",
        text="It says what it measured. " * 8,
        finish_reason="stop",
        model=MODEL,
    )
    yield TurnEnded(turn=turn, reason="done")
