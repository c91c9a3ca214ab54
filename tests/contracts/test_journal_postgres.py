"""What the journal of a server adds to the contract: its limits, its connections, its restarts."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from agent.events import UserMessage
from agent.faults import Fenced, JournalFault, MessageKnown
from agent.journal import Journal, read_all
from agent.journal_postgres import PostgresJournal
from agent.journals import open_journal
from agent.migrations import steps
from agent.settings import JournalSettings
from bench.support.postgres import Postgres
from tests.support.journals import opening
from tests.support.postgres import empty_schema
from tests.support.processes import eventually

SHORT_S = 1.0
"""A call's limit, where a test waits for it."""


@pytest.fixture(scope="module")
def own_server() -> Iterator[Postgres]:
    """Stopped, paused and killed by the tests of this file."""
    with Postgres() as server:
        yield server


@pytest.fixture
async def server(own_server: Postgres) -> AsyncIterator[Postgres]:
    yield own_server
    await asyncio.to_thread(own_server.stop)
    await asyncio.to_thread(own_server.start)


@pytest.fixture
async def url(postgres: Postgres) -> str:
    return await empty_schema(postgres.url)


def said(text: str, message_id: str | None = None) -> UserMessage:
    return UserMessage(text=text, message_id=message_id, turn=1)


async def begun(journal: Journal) -> tuple[str, int]:
    fact = opening()
    await journal.create(fact)
    return fact.session_id, await journal.fence(fact.session_id)


async def texts(journal: Journal, session_id: str) -> list[str]:
    records = await read_all(journal, session_id)
    assert [r.seq for r in records] == list(range(1, len(records) + 1))
    return [r.fact.text for r in records if isinstance(r.fact, UserMessage)]


async def test_a_server_that_was_stopped_and_started_is_found_again(server: Postgres) -> None:
    journal = await PostgresJournal.open(await empty_schema(server.url), timeout_s=SHORT_S)
    session_id, epoch = await begun(journal)
    await journal.append(session_id, epoch, [said("before")])
    await asyncio.to_thread(server.stop)
    with pytest.raises(JournalFault):
        await journal.append(session_id, epoch, [said("meanwhile")])
    await asyncio.to_thread(server.start)
    await journal.append(session_id, epoch, [said("after")])
    assert await texts(journal, session_id) == ["before", "after"]
    await journal.close()


async def test_a_call_waits_for_a_server_that_is_about_to_come_back(server: Postgres) -> None:
    journal = await PostgresJournal.open(await empty_schema(server.url), timeout_s=20)
    session_id, epoch = await begun(journal)
    await asyncio.to_thread(server.kill)
    append = asyncio.create_task(journal.append(session_id, epoch, [said("patient")]))
    await asyncio.to_thread(server.start)
    await append
    assert await texts(journal, session_id) == ["patient"]
    await journal.close()


async def test_a_server_that_stalls_is_a_fault_and_what_it_takes_up_late_lands_in_order(
    server: Postgres,
) -> None:
    journal = await PostgresJournal.open(await empty_schema(server.url), timeout_s=SHORT_S)
    session_id, epoch = await begun(journal)
    server.pause()
    async with asyncio.timeout(10 * SHORT_S):
        stalled = await asyncio.gather(
            journal.append(session_id, epoch, [said("unknown")]),
            journal.append(session_id, epoch, [said("never sent")]),
            *(journal.row(session_id) for _ in range(10)),
            journal.unrested(limit=1),
            journal.create(opening()),
            return_exceptions=True,
        )
    assert [type(each) for each in stalled] == [JournalFault] * 14
    server.resume()
    await journal.append(session_id, epoch, [said("after")])
    assert (await texts(journal, session_id))[-1] == "after"
    assert set(await texts(journal, session_id)) <= {"unknown", "after"}
    assert await journal.fence(session_id) == epoch + 1
    await journal.append(session_id, epoch + 1, [said("at last")])
    assert (await texts(journal, session_id))[-2:] == ["after", "at last"]
    await journal.close()


async def test_a_server_that_stalls_before_the_first_call_is_a_fault_too(server: Postgres) -> None:
    url = await empty_schema(server.url)
    server.pause()
    with pytest.raises(JournalFault):
        await PostgresJournal.open(url, timeout_s=SHORT_S)
    server.resume()
    await (await PostgresJournal.open(url)).close()


async def test_a_journal_closes_while_its_server_stalls(server: Postgres) -> None:
    journal = await PostgresJournal.open(await empty_schema(server.url), timeout_s=SHORT_S)
    session_id, _ = await begun(journal)
    server.pause()
    row = asyncio.create_task(journal.row(session_id))
    await asyncio.sleep(0)
    async with asyncio.timeout(10 * SHORT_S):
        await journal.close()
    with pytest.raises(JournalFault):
        await row


@pytest.mark.parametrize("n_acknowledged", [1, 8, 40])
async def test_what_was_acknowledged_before_the_server_was_killed_is_there(
    server: Postgres, n_acknowledged: int
) -> None:
    journal = await PostgresJournal.open(await empty_schema(server.url), timeout_s=20)
    session_id, epoch = await begun(journal)
    acknowledged: list[str] = []
    enough = asyncio.Event()

    async def write(n: int) -> None:
        await journal.append(session_id, epoch, [said(f"{n}"), said(f"{n}")])
        acknowledged.append(str(n))
        if len(acknowledged) == n_acknowledged:
            enough.set()

    writes = [asyncio.create_task(write(n)) for n in range(n_acknowledged + 100)]
    await enough.wait()
    server.kill()  # at once: while a further append is under way
    await asyncio.to_thread(server.start)
    await asyncio.wait(writes)
    told = await texts(journal, session_id)
    assert len(acknowledged) >= n_acknowledged
    assert told[::2] == told[1::2] == sorted(told[::2], key=int)
    assert set(acknowledged) <= set(told)
    assert (await journal.row(session_id)).head == 1 + len(told)
    for failed in writes:
        assert isinstance(failed.exception(), JournalFault | None)
    await journal.close()


async def test_a_cancelled_append_is_whole_or_nothing_whatever_is_asked_next(url: str) -> None:
    journal = await PostgresJournal.open(url)
    session_id, epoch = await begun(journal)
    for n in range(60):
        append = asyncio.create_task(journal.append(session_id, epoch, [said(f"{n}")] * 3))
        for _ in range(n % 12):
            await asyncio.sleep(0)
        append.cancel()
        rows = await journal.rows("ann", limit=1)  # at once, of all sessions
        assert rows.rows[0].head == len(await read_all(journal, session_id))
        assert (rows.rows[0].head - 1) % 3 == 0
    last = asyncio.create_task(journal.append(session_id, epoch, [said("left")]))
    await asyncio.sleep(0)
    last.cancel()
    await journal.append(session_id, epoch, [said("next")])
    assert (await texts(journal, session_id))[-2:] == ["left", "next"]
    await journal.close()


async def test_connections_are_few_while_there_is_work_and_none_afterwards(
    server: Postgres,
) -> None:
    url = await empty_schema(server.url)
    journal = await PostgresJournal.open(url, max_connections=3, idle_s=0.2)
    sessions = [await begun(journal) for _ in range(20)]
    seen = 0
    for n in range(5):
        appends = [journal.append(name, epoch, [said(f"{n}")]) for name, epoch in sessions]
        done = asyncio.gather(*appends)
        while not done.done():
            seen = max(seen, server.n_connections())
            await asyncio.sleep(0)
    assert 1 < seen <= 3

    async def none_left() -> bool:
        return server.n_connections() == 0

    await eventually(none_left, 5)
    name, epoch = sessions[0]
    await journal.append(name, epoch, [said("and again")])
    assert (await texts(journal, name))[-1] == "and again"
    await journal.close()


async def test_of_many_who_open_an_empty_database_one_makes_the_schema(url: str) -> None:
    opened = await asyncio.gather(*(PostgresJournal.open(url) for _ in range(8)))
    await asyncio.gather(*(j.create(opening(f"s{n}")) for n, j in enumerate(opened)))
    assert len((await opened[0].rows("ann", limit=50)).rows) == 8
    db = await asyncpg.connect(url)
    assert await db.fetchval("SELECT array_agg(version) FROM schema_version") == [
        len(steps("postgres"))
    ]
    await db.close()
    await asyncio.gather(*(journal.close() for journal in opened))


async def test_a_newer_schema_is_refused_and_left_alone(url: str) -> None:
    await (await PostgresJournal.open(url)).close()
    db = await asyncpg.connect(url)
    await db.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(JournalFault, match="schema 99"):
        await PostgresJournal.open(url)
    journal = PostgresJournal(url)
    with pytest.raises(JournalFault, match="schema 99"):
        await journal.create(opening())
    await journal.close()
    assert await db.fetchval("SELECT count(*) FROM sessions") == 0
    await db.close()


async def test_commits_are_waited_for_whatever_the_server_is_set_to(url: str) -> None:
    db = await asyncpg.connect(url)
    await db.execute("ALTER ROLE postgres SET synchronous_commit = off")
    try:
        journal = await PostgresJournal.open(url)
        assert await journal._read(None, lambda db: db.fetchval("SHOW synchronous_commit")) == "on"
        await journal.close()
    finally:
        await db.execute("ALTER ROLE postgres RESET synchronous_commit")
        await db.close()


async def test_commits_are_not_waited_for_where_the_settings_say_so(
    url: str, tmp_path: Path
) -> None:
    journal = await open_journal(JournalSettings(url=url, sync="normal"), tmp_path)
    assert isinstance(journal, PostgresJournal)
    assert await journal._read(None, lambda db: db.fetchval("SHOW synchronous_commit")) == "off"
    await journal.close()


async def test_a_row_that_another_process_moved_on_is_read_anew(url: str) -> None:
    """What one journal remembers is behind what the other wrote."""
    one, other = await PostgresJournal.open(url), await PostgresJournal.open(url)
    session_id, epoch = await begun(one)
    for n in range(6):
        await (one, other)[n % 2].append(session_id, epoch, [said(f"{n}", f"m{n}")])
    with pytest.raises(MessageKnown) as known:
        await one.append(session_id, epoch, [said("again", "m5")])
    assert known.value.seq == 7
    await other.fence(session_id)
    with pytest.raises(Fenced):
        await one.append(session_id, epoch, [said("again", "m5")])
    assert await texts(one, session_id) == [f"{n}" for n in range(6)]
    assert (await one.row(session_id)).n_messages == 6
    await asyncio.gather(one.close(), other.close())


async def test_a_delete_leaves_nothing_of_an_append_that_was_under_way(url: str) -> None:
    one, other = await PostgresJournal.open(url), await PostgresJournal.open(url)
    db = await asyncpg.connect(url)
    for _ in range(10):
        session_id, epoch = await begun(one)
        await one.keep_secret(session_id, b"x")
        await asyncio.gather(
            *(one.append(session_id, epoch, [said("x")]) for _ in range(3)),
            one.keep_secret(session_id, b"y"),
            other.delete(session_id),
            return_exceptions=True,
        )
    for table in ("sessions", "records", "secrets"):
        assert await db.fetchval(f"SELECT count(*) FROM {table}") == 0
    await db.close()
    await asyncio.gather(one.close(), other.close())


async def test_a_url_opens_it_with_or_without_a_server(
    url: str, server: Postgres, tmp_path: Path
) -> None:
    journal = await open_journal(JournalSettings(url=url), tmp_path)
    assert isinstance(journal, PostgresJournal)
    await journal.close()
    away = await empty_schema(server.url)
    await asyncio.to_thread(server.stop)
    with pytest.raises(JournalFault):
        await open_journal(JournalSettings(url=away, timeout_s=SHORT_S), tmp_path)
    journal = await open_journal(JournalSettings(url=away), tmp_path, check=False)
    await asyncio.to_thread(server.start)
    await begun(journal)
    await journal.close()


async def test_a_refused_login_is_a_fault_at_once(url: str) -> None:
    with pytest.raises(JournalFault) as refused:
        await PostgresJournal.open(url.replace("/postgres?", "/no_such_database?"), timeout_s=60)
    assert isinstance(refused.value.__cause__, asyncpg.InvalidCatalogNameError)
