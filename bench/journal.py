"""What the journal costs: an append inside an activation, a fold, what a waking session reads, a list.

    uv run python -m bench.journal

Each function returns its samples, in milliseconds where it does not say otherwise; the table of the
targets takes its rows from here. Files lie in a fresh temporary directory, and its disk is what counts.
"""

import asyncio
import gc
import statistics
import tempfile
import time
import tracemalloc
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from actors.activation import Activation
from actors.kit import Kit
from actors.settings import ActorsSettings
from agent.context import Context
from agent.events import (
    AssistantMessage,
    Fact,
    ModelCalled,
    Record,
    SessionOpened,
    ToolCall,
    ToolFinished,
    ToolStarted,
    TurnEnded,
    Usage,
    UserMessage,
)
from agent.journal import utc_now
from agent.journal_sqlite import SqliteJournal
from agent.settings import AgentSettings, Sync
from agent.spec import AgentSpec
from agent.testing import ScriptedModel

SPEC = AgentSpec(name="bench", system_prompt="You are careful.\n" * 40, model="scripted/x")
WINDOW = 400
"""Characters of a message or a result: what a chat with tools has on the average."""
FACTS_PER_TURN = 8


def opening(session_id: str, user_id: str = "bench") -> SessionOpened:
    return SessionOpened(
        session_id=session_id, user_id=user_id, agent=SPEC.name, model=SPEC.model, spec=SPEC
    )


def history(session_id: str, n_records: int) -> list[Fact]:
    """A session's first facts: its opening, then turns of one tool call each."""
    facts: list[Fact] = [opening(session_id)]
    turn = 0
    while len(facts) < n_records:
        turn += 1
        facts += _turn(turn)
    return facts[:n_records]


def _turn(turn: int) -> list[Fact]:
    text = f"{turn} ".ljust(WINDOW, "x")
    call = ToolCall(tool_call_id=f"c{turn}", tool="bash", arguments='{"command": "ls -l"}')

    def called() -> ModelCalled:
        usage = Usage(prompt_tokens=900, completion_tokens=90)
        return ModelCalled(turn=turn, model=SPEC.model, usage=usage, cost_usd=0.001, latency_ms=700)

    def answer(number: int, calls: tuple[ToolCall, ...], reason: str) -> AssistantMessage:
        return AssistantMessage(
            turn=turn,
            part_id=f"{turn}.1.{number}",
            text=text,
            tool_calls=calls,
            finish_reason=reason,
            model=SPEC.model,
        )

    return [
        UserMessage(turn=turn, message_id=f"m{turn}", text=text),
        called(),
        answer(0, (call,), "tool_calls"),
        ToolStarted(turn=turn, **call.model_dump()),
        ToolFinished(
            turn=turn, tool_call_id=call.tool_call_id, tool=call.tool, outcome="ok", text=text
        ),
        called(),
        answer(1, (), "stop"),
        TurnEnded(turn=turn, reason="done"),
    ]


@asynccontextmanager
async def _journal(sync: Sync) -> AsyncGenerator[SqliteJournal]:
    with tempfile.TemporaryDirectory(prefix="troupe-bench-") as folder:
        journal = await SqliteJournal.open(Path(folder) / "journal.sqlite3", sync=sync)
        try:
            yield journal
        finally:
            await journal.close()


def _kit(journal: SqliteJournal) -> Kit:
    return Kit(
        journal=journal, model=ScriptedModel([]), agent=AgentSettings(), actors=ActorsSettings()
    )


async def append_ms(sync: Sync, n: int) -> list[float]:
    """One fact through `Activation.commit`: encoded, durable, folded, shown."""
    async with _journal(sync) as journal:
        await journal.create(opening("s"))
        activation = await Activation.open(_kit(journal), "s", lambda _: None)
        fact = _turn(0)[1]
        samples: list[float] = []
        for _ in range(n):
            began = time.perf_counter()
            await activation.commit(fact)
            samples.append((time.perf_counter() - began) * 1000)
        await activation.end()
        return samples


def fold_ms(n_records: int, n: int) -> list[float]:
    """A fresh context over `n_records` decoded records."""
    at = utc_now()
    records = [Record(seq, 1, at, fact) for seq, fact in enumerate(history("s", n_records), 1)]

    def fold() -> None:
        Context(lambda _: False).fold(records)

    return _timed(fold, n)


async def wake_read_ms(n_records: int, n: int) -> list[float]:
    """What `Activation.open` does for a passive session of `n_records`: fence, read, decode, fold,
    and the commit of its `Activated`. Another incarnation at each sample."""
    async with _journal("normal") as journal:
        await _written(journal, "s", n_records)
        samples: list[float] = []
        for _ in range(n):
            began = time.perf_counter()
            activation = await Activation.open(_kit(journal), "s", lambda _: None)
            samples.append((time.perf_counter() - began) * 1000)
            await activation.end()
        return samples


async def _written(journal: SqliteJournal, session_id: str, n_records: int) -> None:
    opened, *facts = history(session_id, n_records)
    assert isinstance(opened, SessionOpened)
    await journal.create(opened)
    activation = await Activation.open(_kit(journal), session_id, lambda _: None)
    await activation.end()
    for n in range(0, len(facts), FACTS_PER_TURN):
        await journal.append(session_id, activation.context.epoch, facts[n : n + FACTS_PER_TURN])


async def list_ms(n_sessions: int, page: int, n: int) -> list[float]:
    """Pages of one user's list, one after another, over and over."""
    async with _journal("normal") as journal:
        await _opened(journal, n_sessions)
        samples: list[float] = []
        after: str | None = None
        for _ in range(n):
            began = time.perf_counter()
            found = await journal.rows("bench", limit=page, after=after)
            samples.append((time.perf_counter() - began) * 1000)
            after = found.next
        return samples


async def _opened(journal: SqliteJournal, n_sessions: int) -> None:
    for first in range(0, n_sessions, 500):
        ids = [uuid.uuid4().hex for _ in range(first, min(first + 500, n_sessions))]
        await asyncio.gather(*(journal.create(opening(one)) for one in ids))


async def passive_bytes(n_sessions: int) -> tuple[float, float]:
    """Per passive session: memory that the journal of a process keeps, and disk. Each session has a
    turn behind it."""
    async with _journal("normal") as journal:
        await _opened(journal, 100)  # what the process needs once
        tracemalloc.start()
        for _ in range(n_sessions):
            await _written(journal, uuid.uuid4().hex, 1 + FACTS_PER_TURN)
        gc.collect()
        memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        path = journal.path
        disk = sum(each.stat().st_size for each in (path, Path(f"{path}-wal")))
        return memory / n_sessions, disk / (n_sessions + 100)


def _timed(work: Callable[[], None], n: int) -> list[float]:
    samples: list[float] = []
    for _ in range(n):
        began = time.perf_counter()
        work()
        samples.append((time.perf_counter() - began) * 1000)
    return samples


def told(name: str, samples: Sequence[float]) -> str:
    cuts = statistics.quantiles(samples, n=100)
    return (
        f"{name}: p50 {cuts[49]:.3f} ms, p95 {cuts[94]:.3f} ms, p99 {cuts[98]:.3f} ms,"
        f" n = {len(samples)}"
    )


async def _main() -> None:
    print(told("append one fact (full)", await append_ms("full", 2000)))
    print(told("append one fact (normal)", await append_ms("normal", 2000)))
    print(told("fold 1,000 records", fold_ms(1000, 50)))
    print(told("wake 1,000 records", await wake_read_ms(1000, 50)))
    print(told("wake 10,000 records", await wake_read_ms(10_000, 20)))
    print(told("list 100 of 10,000", await list_ms(10_000, 100, 200)))
    memory, disk = await passive_bytes(1000)
    print(f"passive session: {memory:.0f} bytes of memory, {disk:.0f} bytes of disk")


if __name__ == "__main__":
    asyncio.run(_main())
