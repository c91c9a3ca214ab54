"""The manager alone: a journal of many sessions, many leases, hosts that are simulated.

    uv run python -m bench.scale [--sessions 1000000] [--leases 100000] [--directory DIR]

Real: `Desk` with its ledger, housing, idling and recovery, `RoutedSessions` for lists, `SqliteJournal` and
its file. Simulated: hosts, which answer after `HOST_S` and write nothing; and most of the journal's stock: the
journal itself makes the file and one session of each kind, whose row and records are then inserted again
with other ids and instants by plain SQL, since a million calls of `create` would take ten minutes.

The stock is made in one process and measured in another, which is what a manager's would be, less Ray.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import resource
import sqlite3
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from actors.activation import Report
from actors.desk import Desk, Host, Route
from actors.kit import Kit
from actors.local import LocalSessions
from actors.plane import PlaneAddress
from actors.protocol import Accepted, AnyCommand, AtCapacity, Open, Principal, SendMessage
from actors.recovery import Recovery
from actors.routed import RoutedSessions, Stage
from actors.settings import ActorsSettings
from agent.events import (
    Activated,
    Fact,
    Passivated,
    PassivationReason,
    Record,
    SessionOpened,
    UserMessage,
)
from agent.journal_sqlite import SqliteJournal
from agent.settings import AgentSettings
from agent.spec import AgentSpec
from agent.testing import Reply, ScriptedModel

Figures = dict[str, float]

HOST_S = 0.001
"""A simulated host's answer: a call between two actors takes about as long."""
N_NODES = 1000
HEAVY = "heavy"
N_HEAVY = 10_000
"""Sessions of one user, for the list."""
SESSIONS_PER_USER = 10
BUSY = 0.1
"""Of the leases: turns that run. A session mostly waits for its person."""
PACED_PER_S = 200
PACED_S = 10
N_CALLERS = 32
N_CLOSED_LOOP = 5_000
N_DOOR = 100_000
N_LISTS = 200
SPEC = AgentSpec(name="bench", system_prompt="You are careful.\n" * 4, model="scripted/x")
BEGAN_AT = datetime(2026, 1, 1, tzinfo=UTC)
INSERTS_AT_ONCE = 20_000


# -- the stock -------------------------------------------------------------------------------------


def session_of(n: int) -> str:
    """Spread like random ids, and the same in every process."""
    return f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}{n:016x}"


def user_of(n: int) -> str:
    return HEAVY if n < N_HEAVY else f"user{n // SESSIONS_PER_USER}"


class Kind(NamedTuple):
    """A session as the journal itself wrote it: the columns of its row and of its records."""

    row: dict[str, Any]
    records: list[dict[str, Any]]


async def _written(path: Path, *kinds: list[Fact]) -> None:
    """Sessions with these facts, named by their number, by the journal's own calls."""
    journal = await SqliteJournal.open(path)
    for n, facts in enumerate(kinds):
        await journal.create(
            SessionOpened(
                session_id=str(n), user_id="u", agent=SPEC.name, model=SPEC.model, spec=SPEC
            )
        )
        await journal.append(str(n), await journal.fence(str(n)), facts)
    await journal.close()


def _kind(db: sqlite3.Connection, session_id: str) -> Kind:
    """Taken out of the journal again."""
    rows, records = (
        [
            dict(found)
            for found in db.execute(f"SELECT * FROM {table} WHERE session_id = ?", (session_id,))
        ]
        for table in ("sessions", "records")
    )
    for table in ("sessions", "records"):
        db.execute(f"DELETE FROM {table} WHERE session_id = ?", (session_id,))
    return Kind(rows[0], records)


def fill(path: Path, n_sessions: int, n_busy: int) -> None:
    """Write the sessions. The first `n_busy` behind the heavy user's have a turn open."""
    activated = Activated(epoch=1, reason="opened")
    asyncio.run(
        _written(
            path,
            [activated, Passivated(reason="idle")],
            [activated, UserMessage(turn=1, text="go on")],
        )
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        passive, busy = _kind(db, "0"), _kind(db, "1")
        # For the filling only: what a crash would lose can be made again.
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -200000"):
            db.execute(f"PRAGMA {pragma}")
        db.execute("BEGIN")
        numbers = iter(range(n_sessions))
        while chunk := list(islice(numbers, INSERTS_AT_ONCE)):
            kinds = [busy if N_HEAVY <= n < N_HEAVY + n_busy else passive for n in chunk]
            sessions = list(zip(chunk, kinds, strict=True))
            db.executemany(_insert("sessions", passive.row), (_row_of(*one) for one in sessions))
            db.executemany(
                _insert("records", passive.records[0]),
                (record for one in sessions for record in _records_of(*one)),
            )
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")


def _insert(table: str, columns: dict[str, Any]) -> str:
    return (
        f"INSERT INTO {table} ({', '.join(columns)})"
        f" VALUES ({', '.join(f':{name}' for name in columns)})"
    )


def _at(n: int) -> str:
    return (BEGAN_AT + timedelta(seconds=n)).isoformat(timespec="microseconds")


def _row_of(n: int, kind: Kind) -> dict[str, Any]:
    ids = {"session_id": session_of(n), "user_id": user_of(n)}
    return kind.row | ids | {"created_at": _at(n), "updated_at": _at(n)}


def _records_of(n: int, kind: Kind) -> Iterator[dict[str, Any]]:
    for record in kind.records:
        body = record["body"]
        if record["seq"] == 1:
            template = f'"session_id":"{kind.row["session_id"]}","user_id":"u"'
            body = body.replace(
                template, f'"session_id":"{session_of(n)}","user_id":"{user_of(n)}"'
            )
            if body == record["body"]:
                raise AssertionError("the opening names its session in another way")
        yield record | {"session_id": session_of(n), "at": _at(n), "body": body}


# -- hosts -----------------------------------------------------------------------------------------


class SimulatedHost:
    __slots__ = ("address", "alive", "current", "name", "node")

    def __init__(self, n: int) -> None:
        self.name = f"session-bench-{n:012x}"
        self.node = f"node{n % N_NODES}"
        self.address: PlaneAddress | None = None
        self.alive = True
        self.current = True

    async def adopt(
        self, session_id: str, user_token: str | None = None, begun: Sequence[Record] = ()
    ) -> int:
        del session_id, user_token
        await asyncio.sleep(HOST_S)
        return begun[-1].epoch if begun else 2

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        raise NotImplementedError  # the manager sends no commands but Close

    async def passivate(self, session_id: str, reason: PassivationReason) -> bool:
        del session_id, reason
        await asyncio.sleep(HOST_S)
        return True

    async def end(self, session_id: str, *, deleted: bool = False) -> None:
        del session_id, deleted
        await asyncio.sleep(HOST_S)

    async def hosts(self, session_id: str) -> bool:
        del session_id
        await asyncio.sleep(HOST_S)
        return True


class SimulatedHosts:
    """As many as are asked for; a start takes what an answer takes."""

    def __init__(self) -> None:
        self.n_made = 0

    @property
    def n_warm(self) -> int:
        return 0

    def made(self) -> SimulatedHost:
        self.n_made += 1
        return SimulatedHost(self.n_made)

    async def acquire(self) -> SimulatedHost:
        await asyncio.sleep(HOST_S)
        return self.made()

    async def give_back(self, host: Host, *, clean: bool) -> None:
        del clean
        host.alive = False


class Reads(RoutedSessions):
    """The reads of the edge. Nothing here goes to a host."""

    def _stage(self, route: Route) -> Stage:
        raise NotImplementedError(route)


# -- the measures ----------------------------------------------------------------------------------


class World:
    def __init__(self, path: Path, n_sessions: int, n_leases: int) -> None:
        self.n_sessions = n_sessions
        self.n_leases = n_leases
        self.n_busy = round(n_leases * BUSY)
        self.journal = SqliteJournal(path)
        self.kit = Kit(
            journal=self.journal,
            model=ScriptedModel([]),
            agent=AgentSettings(storage_dir=path.parent, default_agent=SPEC.name),
            actors=ActorsSettings(max_sessions=n_leases, idle_s=None),
        )
        self.hosts = SimulatedHosts()
        self.desk: Desk
        self._passive = iter(range(N_HEAVY + n_leases, n_sessions))

    def passive(self) -> tuple[Principal, str]:
        """One that does not live and did not, of a user with few that do."""
        n = next(self._passive)
        return Principal(user_of(n)), session_of(n)

    async def begun(self) -> Figures:
        """What a manager does when it starts beside hosts that live on."""
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        self.desk = Desk(self.kit, self.hosts, {SPEC.name: SPEC}, default_model=None)
        for k in range(self.n_leases):
            n = N_HEAVY + k
            host, session_id = self.hosts.made(), session_of(n)
            self.desk.take_over(host, Route(host.name, 1), session_id, user_of(n))
            change = "busy" if k < self.n_busy else "rested"
            self.desk.note(Report(session_id, 1, 1, change))
        gc.freeze()  # as `SessionManager` does
        taken_s = time.perf_counter()
        await Recovery(self.journal, self.desk.resume, every_s=1.0).sweep()
        swept_s = time.perf_counter()
        await self.desk.wake(*self.passive())
        served_s = time.perf_counter()
        return {
            "take_over_s": taken_s - began_s,
            "restart_cpu_s": time.process_time() - began_cpu_s,
            "first_sweep_s": swept_s - taken_s,
            "restart_to_serving_s": served_s - began_s,
        }


def _quantile(samples: list[float], share: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))]


async def _timed(call: Awaitable[object]) -> float:
    began_s = time.perf_counter()
    await call
    return (time.perf_counter() - began_s) * 1000


async def _paced(call: Callable[[], Awaitable[object]]) -> list[float]:
    """Calls at a steady rate whatever they take; how long each took, in ms."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    tasks: list[asyncio.Task[float]] = []
    for k in range(PACED_PER_S * PACED_S):
        await asyncio.sleep(max(0.0, began_s + k / PACED_PER_S - loop.time()))
        tasks.append(asyncio.create_task(_timed(call())))
    return list(await asyncio.gather(*tasks))


class Rate(NamedTuple):
    per_s: float
    cpu_ms: float
    """Of the whole process for each: says the same on a busy machine."""


async def _closed_loop(call: Callable[[], Awaitable[object]]) -> Rate:
    """As many as `N_CALLERS` callers can."""
    rest = iter(range(N_CLOSED_LOOP))

    async def caller() -> None:
        for _ in rest:
            await call()

    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller() for _ in range(N_CALLERS)))
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return Rate(N_CLOSED_LOOP / took_s, cpu_s / N_CLOSED_LOOP * 1000)


async def _rate(what: str, call: Callable[[], Awaitable[object]]) -> Figures:
    rate = await _closed_loop(call)
    return {f"{what}s_per_s": rate.per_s, f"{what}_cpu_ms": rate.cpu_ms}


async def admissions(world: World) -> Figures:
    """All slots are taken, so for each that comes the longest idle one leaves.

    A wake and an open hold three answers of hosts, one after another; a refusal none.
    """
    desk = world.desk

    async def wake() -> None:
        await desk.wake(*world.passive())

    async def opened() -> None:
        who, _ = world.passive()
        await desk.open(who, Open(agent=SPEC.name))

    async def refused() -> None:
        try:
            await desk.wake(Principal(HEAVY), session_of(random.randrange(N_HEAVY // 2, N_HEAVY)))
        except AtCapacity:
            return
        raise AssertionError("the heavy user has all slots that a user may have")

    wakes_ms = await _paced(wake)
    opens_ms = await _paced(opened)
    figures = {
        "wake_p50_ms": _quantile(wakes_ms, 0.5),
        "wake_p99_ms": _quantile(wakes_ms, 0.99),
        "open_p50_ms": _quantile(opens_ms, 0.5),
        "open_p99_ms": _quantile(opens_ms, 0.99),
    }
    before = rss_bytes()
    figures |= await _rate("wake", wake)
    figures["bytes_per_passive_session"] = max(0, rss_bytes() - before) / N_CLOSED_LOOP
    figures |= await _rate("open", opened)
    for n in range(world.kit.actors.max_sessions_per_user):
        await desk.wake(Principal(HEAVY), session_of(n))
        desk.note(Report(session_of(n), 2, 1, "busy"))
    refusals_ms = await _paced(refused)
    figures["refusal_p50_ms"] = _quantile(refusals_ms, 0.5)
    figures["refusal_p99_ms"] = _quantile(refusals_ms, 0.99)
    figures |= await _rate("refusal", refused)
    return figures


def door(world: World) -> Figures:
    """The ledger alone, with all slots taken: refused, given way, confirmed."""
    ledger = world.desk.ledger
    took_us: list[float] = []
    for n in range(N_DOOR):
        began_s = time.perf_counter()
        session_id, user_id = f"door{n}", f"door{n}"
        taken = ledger.take(session_id, user_id)
        waiting = ledger.give_way("global", session_id, user_id)
        lease = ledger.inherit(waiting) if waiting else taken
        confirmed = not isinstance(lease, tuple) and ledger.confirm(lease, 1, "node1")
        took_us.append((time.perf_counter() - began_s) * 1e6)
        if not confirmed:
            raise AssertionError("nobody gave way")
    return {
        "door_p50_us": _quantile(took_us, 0.5),
        "door_p99_us": _quantile(took_us, 0.99),
        "door_per_s": N_DOOR / (sum(took_us) / 1e6),
    }


async def lists(world: World) -> Figures:
    """Pages of 100 of the heavy user's sessions, one after another."""
    reads = Reads(world.desk, world.kit)
    took_ms: list[float] = []
    after: str | None = None
    for _ in range(N_LISTS):
        began_s = time.perf_counter()
        page = await reads.owned(Principal(HEAVY), limit=100, after=after)
        took_ms.append((time.perf_counter() - began_s) * 1000)
        after = page.next
    return {"list_p50_ms": _quantile(took_ms, 0.5), "list_p95_ms": _quantile(took_ms, 0.95)}


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def _measured(path: Path, n_sessions: int, n_leases: int) -> Figures:
    world = World(path, n_sessions, n_leases)
    gc.collect()
    before = rss_bytes()
    figures = await world.begun()
    figures["bytes_per_lease"] = (rss_bytes() - before) / n_leases
    world.desk.begin()  # sweeps go on beside what follows, as they do in a manager
    figures |= await lists(world)
    figures |= await admissions(world)
    figures |= door(world)
    figures["rss_mb"] = rss_bytes() / 1e6
    figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    await world.desk.close()
    await world.journal.close()
    return figures


def measure(path: Path, n_sessions: int, n_leases: int) -> Figures:
    return asyncio.run(_measured(path, n_sessions, n_leases))


async def scale(n_sessions: int, n_leases: int, directory: Path) -> Figures:
    """Figures of the manager's process over a journal in `directory`, which is made there and removed.

    Full size: about 1.3 GB of disk.
    """
    if n_sessions < N_HEAVY + n_leases + 4 * (PACED_PER_S * PACED_S + N_CLOSED_LOOP):
        raise ValueError("too few sessions for so many leases and measures")
    loop = asyncio.get_running_loop()
    path = directory / "scale.sqlite3"
    began_s = time.perf_counter()
    try:
        # Each in a process of its own, so that memory is what the measured one needs.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
            await loop.run_in_executor(one, fill, path, n_sessions, round(n_leases * BUSY))
        filled_s = time.perf_counter()
        size_mb = path.stat().st_size / 1e6
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
            figures = await loop.run_in_executor(one, measure, path, n_sessions, n_leases)
    finally:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    took_s = {"fill_s": filled_s - began_s, "whole_s": time.perf_counter() - began_s}
    return figures | took_s | {"journal_mb": size_mb}


# -- many sessions, few slots ----------------------------------------------------------------------


@asynccontextmanager
async def _house(directory: Path, n_slots: int) -> AsyncGenerator[LocalSessions]:
    journal = SqliteJournal(directory / "addressable.sqlite3", sync="normal")
    kit = Kit(
        journal=journal,
        model=ScriptedModel([Reply("ok")] * 2000),
        agent=AgentSettings(storage_dir=directory, default_agent=SPEC.name),
        actors=ActorsSettings(max_sessions=n_slots, max_sessions_per_user=n_slots),
    )
    async with LocalSessions(kit, {SPEC.name: SPEC}) as sessions:
        yield sessions
    await journal.close()


async def addressable(n_sessions: int, n_slots: int, directory: Path) -> Figures:
    """Sessions of one user that outnumber the slots a hundred times: each answers a command and is in
    the list. `LocalSessions` with real activations."""
    who = Principal(HEAVY)
    opens_ms: list[float] = []
    wakes_ms: list[float] = []
    async with _house(directory, n_slots) as sessions:
        ids: list[str] = []
        for _ in range(n_sessions):
            began_s = time.perf_counter()
            ids.append((await sessions.open(who, Open())).session_id)
            opens_ms.append((time.perf_counter() - began_s) * 1000)
        for session_id in random.Random(1).sample(ids, min(1000, n_sessions)):
            say = SendMessage(text="hello")
            wakes_ms.append(await _timed(sessions.submit(who, session_id, say)))
        lists_ms = [
            await _timed(sessions.owned(who, limit=100, after=None)) for _ in range(N_LISTS)
        ]
        n_live = sessions.desk.ledger.n_live
    if n_live > n_slots:
        raise AssertionError(f"{n_live} sessions live in {n_slots} slots")
    return {
        "addressable_sessions": float(n_sessions),
        "addressable_open_p50_ms": _quantile(opens_ms, 0.5),
        "addressable_wake_p50_ms": _quantile(wakes_ms, 0.5),
        "addressable_wake_p99_ms": _quantile(wakes_ms, 0.99),
        "addressable_list_p95_ms": _quantile(lists_ms, 0.95),
    }


async def _all(n_sessions: int, n_leases: int, directory: Path) -> Figures:
    figures = await scale(n_sessions, n_leases, directory)
    return figures | await addressable(10_000, 100, directory)


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--sessions", type=int, default=1_000_000)
    arguments.add_argument("--leases", type=int, default=100_000)
    arguments.add_argument("--directory", type=Path, help="on the disk that counts")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        figures = asyncio.run(_all(given.sessions, given.leases, Path(directory)))
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
