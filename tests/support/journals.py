"""Every kind of journal behind one fixture: `store`, a place that any number of journals may open."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.events import SessionOpened
from agent.journal import Journal
from agent.journal_memory import MemoryJournal
from agent.journal_postgres import PostgresJournal
from agent.journal_sqlite import SqliteJournal
from agent.spec import AgentSpec
from tests.support.postgres import empty_schema

SPEC = AgentSpec(name="default", system_prompt="You are careful.", model="scripted/demo")


class Clock:
    """A second later at each look."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


Store = Callable[[], Awaitable[Journal]]
"""Another journal over the same records, as another process would have it."""


@asynccontextmanager
async def memory(_: Path) -> AsyncIterator[Store]:
    journal = MemoryJournal(clock=Clock())

    async def the_same() -> Journal:
        return journal

    yield the_same
    await journal.close()


@asynccontextmanager
async def sqlite(directory: Path) -> AsyncIterator[Store]:
    clock = Clock()
    async with AsyncExitStack() as opened:

        async def another() -> Journal:
            journal = SqliteJournal(directory / "journal.sqlite3", clock=clock)
            opened.push_async_callback(journal.close)
            return journal

        yield another


@asynccontextmanager
async def postgres(url: str) -> AsyncIterator[Store]:
    clock = Clock()
    async with AsyncExitStack() as opened:

        async def another() -> Journal:
            journal = PostgresJournal(url, idle_s=0.5, clock=clock)
            opened.push_async_callback(journal.close)
            return journal

        yield another


@pytest.fixture(params=["memory", "postgres", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    match request.param:
        case "memory":
            opening_store = memory(tmp_path)
        case "sqlite":
            opening_store = sqlite(tmp_path)
        case _:
            opening_store = postgres(await empty_schema(request.getfixturevalue("postgres").url))
    async with opening_store as opened:
        yield opened


def opening(session_id: str | None = None, **changes: Any) -> SessionOpened:
    values: dict[str, Any] = {
        "user_id": "ann",
        "agent": "default",
        "model": "scripted/demo",
        "spec": SPEC,
    }
    return SessionOpened(session_id=session_id or uuid.uuid4().hex, **{**values, **changes})
