"""What holds for every journal, and what SQLite adds: many processes, a kill at any instant."""

import asyncio
import sqlite3
import sys
import threading
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.events import (
    ApprovalDecided,
    ApprovalRequested,
    Ask,
    AssistantMessage,
    CompactionRequested,
    Decision,
    Fact,
    ModelCalled,
    ModelSwitched,
    Record,
    Rewound,
    SessionClosed,
    ToolFinished,
    ToolStarted,
    TurnEnded,
    Usage,
    UserMessage,
)
from agent.faults import (
    Fenced,
    JournalFault,
    MessageKnown,
    NoSuchSession,
    SessionExists,
    SettingsInvalid,
)
from agent.journal import Checkpoint, Journal, SessionRow, read_all, row_of
from agent.journal_memory import MemoryJournal
from agent.journal_sqlite import SqliteJournal
from agent.journals import open_journal
from agent.migrations import steps
from agent.settings import JournalSettings
from tests.support import journals
from tests.support.journals import Clock, Store, opening

store = journals.store
DAY = date(2026, 3, 1)


def said(text: str, message_id: str | None = None) -> UserMessage:
    return UserMessage(text=text, message_id=message_id, turn=1)


async def begun(journal: Journal) -> tuple[str, int]:
    fact = opening()
    await journal.create(fact)
    return fact.session_id, await journal.fence(fact.session_id)


async def texts(journal: Journal, session_id: str) -> list[str]:
    records = await read_all(journal, session_id)
    return [r.fact.text for r in records if isinstance(r.fact, UserMessage)]


async def test_what_was_written_is_read_by_another_in_order_and_without_gap(store: Store) -> None:
    journal = await store()
    fact = opening(title="A task", metadata={"a": [1, {"b": None}]}, message_id="o")
    written = list(await journal.create(fact, said("first")))
    epoch = await journal.fence(fact.session_id)
    written += await journal.append(fact.session_id, epoch, [said("second"), said("third")])
    read = await read_all(await store(), fact.session_id)
    assert read == written
    assert [r.seq for r in read] == [1, 2, 3, 4]
    assert [r.epoch for r in read] == [0, 0, 1, 1]
    assert [r.at for r in read] == sorted(r.at for r in read)
    assert all(r.at.utcoffset() == timedelta(0) for r in read)


async def test_many_appends_at_once_leave_one_order_without_gap(store: Store) -> None:
    journal, other = await store(), await store()
    session_id, epoch = await begun(journal)
    answers = await asyncio.gather(
        *((journal, other)[n % 2].append(session_id, epoch, [said(f"{n}")] * 3) for n in range(40))
    )
    assert sorted(r.seq for records in answers for r in records) == list(range(2, 122))
    assert list(await read_all(other, session_id))[1:] == sorted(
        (r for records in answers for r in records), key=lambda r: r.seq
    )


async def test_reading_is_paged(store: Store) -> None:
    journal = await store()
    session_id, epoch = await begun(journal)
    await journal.append(session_id, epoch, [said(str(n)) for n in range(9)])
    assert [r.seq for r in await journal.read(session_id, after=3, limit=4)] == [4, 5, 6, 7]
    assert [r.seq for r in await journal.read(session_id, after=9)] == [10]
    assert await journal.read(session_id, after=10) == ()
    assert await journal.read(session_id, after=2**62) == ()


async def test_only_the_newest_epoch_writes(store: Store) -> None:
    old, new = await store(), await store()
    session_id, before = await begun(old)
    await old.append(session_id, before, [said("kept")])
    after = await new.fence(session_id)
    assert after == before + 1
    with pytest.raises(Fenced):
        await old.append(session_id, before, [said("lost")])
    with pytest.raises(Fenced):
        await old.append(session_id, before, [])
    with pytest.raises(Fenced):
        await new.append(session_id, after + 1, [said("from the future")])
    assert await new.append(session_id, after, []) == ()
    await new.append(session_id, after, [said("kept too")])
    assert await texts(old, session_id) == ["kept", "kept too"]
    assert (await old.row(session_id)).epoch == after


async def test_each_fence_is_an_epoch_of_its_own(store: Store) -> None:
    journal, other = await store(), await store()
    session_id, epoch = await begun(journal)
    epochs = await asyncio.gather(*((journal, other)[n % 2].fence(session_id) for n in range(20)))
    assert sorted(epochs) == list(range(epoch + 1, epoch + 21))


async def test_a_known_message_id_writes_nothing_and_says_where_it_is(store: Store) -> None:
    journal, other = await store(), await store()
    session_id, epoch = await begun(journal)
    await journal.append(session_id, epoch, [said("one", "m1"), said("two", "m2")])
    with pytest.raises(MessageKnown) as known:
        await other.append(session_id, epoch, [said("x"), said("again", "m2"), said("y", "m3")])
    assert known.value.seq == 3
    assert await texts(journal, session_id) == ["one", "two"]
    assert (await journal.row(session_id)).head == 3
    await journal.append(session_id, epoch, [said("y", "m3")])
    elsewhere, epoch = await begun(journal)
    await journal.append(elsewhere, epoch, [said("another session", "m1")])


async def test_a_session_may_begin_taken(store: Store) -> None:
    journal = await store()
    opened = opening()
    records = await journal.create(opened, said("first"), epoch=1)
    assert [record.epoch for record in records] == [1, 1]
    assert await read_all(journal, opened.session_id) == list(records)
    assert await journal.row(opened.session_id) == row_of(records)
    with pytest.raises(Fenced):
        await journal.append(opened.session_id, 0, [said("x")])
    await journal.append(opened.session_id, 1, [said("second")])
    assert await journal.fence(opened.session_id) == 2


async def test_the_opening_command_has_a_key_too(store: Store) -> None:
    journal = await store()
    fact = opening(message_id="open")
    await journal.create(fact)
    with pytest.raises(MessageKnown) as known:
        await journal.append(fact.session_id, 0, [said("x", "open")])
    assert known.value.seq == 1


async def test_facts_that_cannot_be_written_are_refused_whole(store: Store) -> None:
    journal = await store()
    session_id, epoch = await begun(journal)
    with pytest.raises(ValueError, match="message_id"):
        await journal.append(session_id, epoch, [said("one", "m"), said("two", "m")])
    with pytest.raises(ValueError):
        await journal.append(session_id, epoch, [said("x"), opening(metadata={"x": object()})])
    with pytest.raises(ValueError, match="message_id"):
        await journal.create(opening("never", message_id="m"), said("x", "m"))
    with pytest.raises(NoSuchSession):
        await journal.row("never")
    assert (await journal.row(session_id)).head == 1


async def test_one_refused_append_among_many_at_once_undoes_only_itself(store: Store) -> None:
    journal = await store()
    session_id, epoch = await begun(journal)
    await journal.append(session_id, epoch, [said("known", "m")])
    answers = await asyncio.gather(
        journal.append(session_id, epoch, [said("a")]),
        journal.append(session_id, epoch, [said("b"), said("c", "m")]),
        journal.append(session_id, epoch + 1, [said("d")]),
        journal.append("nobody", 1, [said("e")]),
        journal.append(session_id, epoch, [said("f")]),
        return_exceptions=True,
    )
    kinds = [type(answer) for answer in answers]
    assert kinds == [tuple, MessageKnown, Fenced, NoSuchSession, tuple]
    assert await texts(journal, session_id) == ["known", "a", "f"]


async def test_a_session_id_is_taken_once_and_for_ever(store: Store) -> None:
    journal, other = await store(), await store()
    attempts = await asyncio.gather(
        *((journal, other)[n % 2].create(opening("s", title=f"{n}")) for n in range(6)),
        return_exceptions=True,
    )
    assert sorted(isinstance(a, SessionExists) for a in attempts) == [False] + [True] * 5
    assert (await journal.row("s")).head == 1
    await journal.delete("s")
    with pytest.raises(SessionExists):
        await other.create(opening("s"))


async def test_a_deleted_session_is_gone_for_everyone(store: Store) -> None:
    journal, other = await store(), await store()
    session_id, epoch = await begun(journal)
    kept, _ = await begun(journal)
    await journal.append(session_id, epoch, [said("x")])
    await other.delete(session_id)
    for refused in (
        journal.row(session_id),
        journal.read(session_id),
        journal.fence(session_id),
        journal.append(session_id, epoch, [said("y")]),
        journal.keep_secret(session_id, b"x"),
        journal.secret(session_id),
        journal.delete(session_id),
    ):
        with pytest.raises(NoSuchSession):
            await refused
    assert [row.session_id for row in (await journal.rows("ann", limit=9)).rows] == [kept]


async def test_a_list_is_the_owners_newest_first_and_steady_under_new_sessions(
    store: Store,
) -> None:
    journal, other = await store(), await store()
    for n in range(7):
        await journal.create(opening(f"s{n}"))
    await journal.create(opening("foreign", user_id="bob"))
    page = await journal.rows("ann", limit=3)
    assert [row.session_id for row in page.rows] == ["s6", "s5", "s4"]
    await other.create(opening("newer"))
    await other.append("s1", 0, [said("an update moves nothing")])
    await other.delete("s4")
    page = await other.rows("ann", limit=3, after=page.next)
    assert [row.session_id for row in page.rows] == ["s3", "s2", "s1"]
    page = await journal.rows("ann", limit=3, after=page.next)
    assert [row.session_id for row in page.rows] == ["s0"]
    assert page.next is None
    assert (await journal.rows("nobody", limit=3)) == ((), None)
    assert (await journal.rows("ann", limit=7)).next is None


async def test_instants_of_a_session_never_fall(tmp_path: Path) -> None:
    clock = Clock()
    on_disk = SqliteJournal(tmp_path / "j", clock=clock)
    for journal in (MemoryJournal(clock=clock), on_disk):
        await journal.create(opening("s"))
        await journal.append("s", 0, [said("x")])
        clock.now -= timedelta(hours=1)
        await journal.append("s", 0, [said("y"), said("z")])
        instants = [record.at for record in await read_all(journal, "s")]
        assert instants[1] == instants[2] == instants[3] == (await journal.row("s")).updated_at
    await on_disk.close()


async def test_sessions_of_one_instant_are_listed_once_each(tmp_path: Path) -> None:
    now = Clock()()
    on_disk = SqliteJournal(tmp_path / "j", clock=lambda: now)
    for journal in (MemoryJournal(clock=lambda: now), on_disk):
        for n in range(5):
            await journal.create(opening(f"s{n}"))
        seen: list[str] = []
        page = await journal.rows("ann", limit=2)
        seen += [row.session_id for row in page.rows]
        while page.next:
            page = await journal.rows("ann", limit=2, after=page.next)
            seen += [row.session_id for row in page.rows]
        assert seen == ["s4", "s3", "s2", "s1", "s0"]
    await on_disk.close()


@pytest.mark.parametrize(
    "garbage", ["", "x", "0", "é", "bm9uZQ", "WzEsMl0", "WyJ4IiwieSJd", "WyIyMDI2LTAxLTAxIiwieSJd"]
)
async def test_a_garbled_place_in_a_list_is_a_value_error(store: Store, garbage: str) -> None:
    journal = await store()
    with pytest.raises(ValueError):
        await journal.rows("ann", limit=3, after=garbage)
    with pytest.raises(ValueError):
        await journal.rows("ann", limit=0)
    with pytest.raises(ValueError):
        await journal.unrested(limit=3, after=garbage)
    with pytest.raises(ValueError):
        await journal.unrested(limit=0)


async def test_what_has_an_open_turn_is_listed_for_all_users_oldest_first(store: Store) -> None:
    journal, other = await store(), await store()
    for n in range(7):
        await journal.create(opening(f"s{n}", user_id=f"user {n}"), said("go"))
    await journal.create(opening("never asked"))
    await journal.append("s1", 0, [SessionClosed()])
    await journal.append("s2", 0, [said("and this"), TurnEnded(turn=1, reason="done")])
    await journal.append("s3", 0, [TurnEnded(turn=1, reason="done")])
    page = await other.unrested(limit=2)
    assert [row.session_id for row in page.rows] == ["s0", "s2"]
    assert page.rows[0] == await journal.row("s0")
    await other.append("s0", 0, [TurnEnded(turn=1, reason="done")])
    await other.append("s2", 0, [TurnEnded(turn=2, reason="done")])
    page = await journal.unrested(limit=2, after=page.next)
    assert [row.session_id for row in page.rows] == ["s4", "s5"]
    page = await journal.unrested(limit=2, after=page.next)
    assert [row.session_id for row in page.rows] == ["s6"]
    assert page.next is None
    assert len((await journal.unrested(limit=4)).rows) == 3


async def test_a_session_keeps_one_secret_and_takes_it_along(store: Store) -> None:
    journal, other = await store(), await store()
    session_id, _ = await begun(journal)
    elsewhere, _ = await begun(journal)
    assert await journal.secret(session_id) is None
    await journal.keep_secret(session_id, b"one")
    await other.keep_secret(session_id, sealed := bytes(range(256)))
    assert await journal.secret(session_id) == sealed
    assert await journal.secret(elsewhere) is None
    await journal.keep_secret(session_id, None)
    assert await other.secret(session_id) is None
    await journal.keep_secret(session_id, b"to be deleted")
    await journal.delete(session_id)
    with pytest.raises(NoSuchSession):
        await other.secret(session_id)


async def test_quota_is_checked_and_taken_in_one(store: Store) -> None:
    journal, other = await store(), await store()
    taken = await asyncio.gather(
        *(
            (journal, other)[n % 2].charge_quota("ann", "big", f"s{n}", day=DAY, limit=4)
            for n in range(20)
        )
    )
    assert sum(taken) == 4
    assert await journal.charge_quota("ann", "small", "s", day=DAY, limit=1)
    assert await journal.charge_quota("bob", "big", "t", day=DAY, limit=1)
    assert not await journal.charge_quota("eve", "big", "u", day=DAY, limit=0)


async def test_a_session_counts_once_in_a_group_for_ever(store: Store) -> None:
    journal, tomorrow = await store(), DAY + timedelta(days=1)
    session_id, _ = await begun(journal)
    for _ in range(3):
        assert await journal.charge_quota("ann", "big", session_id, day=DAY, limit=1)
    assert await journal.charge_quota("ann", "big", "other", day=tomorrow, limit=1)
    assert await journal.charge_quota("ann", "big", session_id, day=tomorrow, limit=1)
    await journal.delete(session_id)
    assert not await journal.charge_quota("ann", "big", "third", day=DAY, limit=1)


@pytest.mark.parametrize("text", ["", "ünïcödé \U0001f9ea \u2028 \x00 \x1b[0m", "é" * 1_000_000])
async def test_any_text_comes_back_as_it_was(store: Store, text: str) -> None:
    journal = await store()
    session_id, epoch = await begun(journal)
    await journal.append(session_id, epoch, [said(text, text[:20])])
    assert await texts(await store(), session_id) == [text]


async def test_an_append_that_is_cancelled_is_whole_or_nothing_and_settled_at_the_next_call(
    store: Store,
) -> None:
    journal = await store()
    session_id, epoch = await begun(journal)
    for n in range(30):
        append = asyncio.create_task(journal.append(session_id, epoch, [said(f"{n}")] * 5))
        for _ in range(n % 4):
            await asyncio.sleep(0)
        append.cancel()
        await asyncio.wait([append])
        head = (await journal.row(session_id)).head
        records = await read_all(journal, session_id)
        assert len(records) == head
        assert (head - 1) % 5 == 0
        assert [r.seq for r in records] == list(range(1, head + 1))


async def test_a_closed_journal_says_so(store: Store) -> None:
    journal = await store()
    session_id, epoch = await begun(journal)
    await journal.close()
    await journal.close()
    for refused in (
        journal.create(opening()),
        journal.fence(session_id),
        journal.append(session_id, epoch, [said("x")]),
        journal.read(session_id),
        journal.row(session_id),
        journal.rows("ann", limit=1),
        journal.unrested(limit=1),
        journal.keep_secret(session_id, b"x"),
        journal.secret(session_id),
        journal.delete(session_id),
        journal.charge_quota("ann", "g", session_id, day=DAY, limit=1),
    ):
        with pytest.raises(JournalFault, match="closed"):
            await refused


CALLS = st.sampled_from(["a", "b", "c"])
FACTS: st.SearchStrategy[Fact] = st.one_of(
    st.builds(UserMessage, text=st.text()),
    st.builds(
        AssistantMessage,
        part_id=st.just("p"),
        text=st.text(),
        finish_reason=st.just("stop"),
        model=st.just("m"),
    ),
    st.builds(
        ModelCalled,
        model=st.just("m"),
        usage=st.none() | st.builds(Usage, prompt_tokens=st.integers(0, 10**9)),
        cost_usd=st.none() | st.floats(0, 100),
        latency_ms=st.just(1),
    ),
    st.builds(
        ApprovalRequested,
        asks=st.lists(
            st.builds(Ask, tool_call_id=CALLS, tool=st.just("bash"), arguments=st.text())
        ).map(tuple),
    ),
    st.builds(
        ApprovalDecided,
        decisions=st.lists(
            st.builds(Decision, tool_call_id=CALLS, decision=st.just("approve"))
        ).map(tuple),
    ),
    st.builds(ToolStarted, tool_call_id=CALLS, tool=st.just("bash"), arguments=st.just("{}")),
    st.builds(
        ToolFinished,
        tool_call_id=CALLS,
        tool=st.just("bash"),
        outcome=st.just("ok"),
        text=st.text(),
    ),
    st.builds(CompactionRequested),
    st.builds(TurnEnded, reason=st.just("done")),
    st.builds(ModelSwitched, model=st.text(min_size=1)),
    st.builds(Rewound, to=st.just(0), n_messages=st.integers(0, 5)),
    st.builds(SessionClosed),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(st.lists(FACTS, max_size=6), max_size=6))
async def test_the_row_is_the_fold_of_the_records(store: Store, batches: list[list[Fact]]) -> None:
    journal = await store()
    fact = opening()
    await journal.create(fact)
    for n, batch in enumerate(batches):
        epoch = await journal.fence(fact.session_id) if n % 2 else n // 2
        await journal.append(fact.session_id, epoch, batch)
    records = await read_all(journal, fact.session_id)
    row = SessionRow.opened(fact, records[0].at)
    for record in records:
        row = row.after(record)
    n_fences = len(batches) // 2
    assert await journal.row(fact.session_id) == row.model_copy(update={"epoch": n_fences})
    assert [r.fact for r in records[1:]] == [each for batch in batches for each in batch]


async def test_a_journal_of_given_records_goes_on_where_they_end(store: Store) -> None:
    journal = await store()
    session_id, epoch = await begun(journal)
    await journal.append(session_id, epoch, [said("x", "m"), said("y")])
    records = await read_all(journal, session_id)
    again = MemoryJournal.holding(records[:2])
    assert await read_all(again, session_id) == records[:2]
    with pytest.raises(MessageKnown):
        await again.append(session_id, epoch, [said("x", "m")])
    assert await again.fence(session_id) == epoch + 1
    assert (await again.append(session_id, epoch + 1, [said("z")]))[0].seq == 3


# One file, many processes


async def writer(path: Path, session_id: str, n_records: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.support.journal_writer", str(path), session_id, str(n_records)),
        stdout=asyncio.subprocess.PIPE,
    )


async def line(process: asyncio.subprocess.Process) -> tuple[str, int]:
    assert process.stdout is not None
    async with asyncio.timeout(10):
        word, number = (await process.stdout.readline()).split()
    return word.decode(), int(number)


async def lines(process: asyncio.subprocess.Process) -> list[tuple[str, int]]:
    async with asyncio.timeout(10):
        out, _ = await process.communicate()
    return [
        (word, int(number)) for word, number in (each.split() for each in out.decode().splitlines())
    ]


async def test_of_two_processes_only_the_one_with_the_newer_epoch_writes_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.sqlite3"
    journal = await SqliteJournal.open(path)
    await journal.create(opening("s"))
    old = await writer(path, "s", 1_000_000)
    assert await line(old) == ("epoch", 1)
    first = await line(old)
    new = await writer(path, "s", 50)
    told_by_new, told_by_old = await asyncio.gather(lines(new), lines(old))
    assert told_by_new[0] == ("epoch", 2)
    assert told_by_new[-1] == ("finished", 0)
    assert told_by_old[-1] == ("fenced", 0)
    records = await read_all(journal, "s")
    assert [r.seq for r in records] == list(range(1, len(records) + 1))
    assert [r.epoch for r in records] == sorted(r.epoch for r in records)
    acknowledged = {
        1: [seq for word, seq in (first, *told_by_old) if word == "seq"],
        2: [seq for word, seq in told_by_new if word == "seq"],
    }
    for epoch, seqs in acknowledged.items():
        written = [r.seq for r in records if r.epoch == epoch]
        assert written == [seq for last in seqs for seq in (last - 1, last)]
    await journal.close()


@pytest.mark.parametrize("n_acknowledged", [1, 7, 40])
async def test_what_was_acknowledged_before_a_kill_is_there_and_nothing_is_half(
    tmp_path: Path, n_acknowledged: int
) -> None:
    path = tmp_path / "journal.sqlite3"
    journal = await SqliteJournal.open(path)
    await journal.create(opening("s"))
    process = await writer(path, "s", 1_000_000)
    for _ in range(1 + n_acknowledged):
        await line(process)
    process.kill()
    told = await lines(process)
    records = await read_all(journal, "s")
    assert len(records) >= 1 + 2 * (n_acknowledged + len([w for w, _ in told if w == "seq"]))
    assert len(records) % 2 == 1
    assert [r.seq for r in records] == list(range(1, len(records) + 1))
    assert (await journal.row("s")).head == len(records)
    epoch = await journal.fence("s")
    await journal.append("s", epoch, [said("the next one goes on")])
    await journal.close()


async def test_many_journals_may_make_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "journal.sqlite3"
    opened = await asyncio.gather(*(SqliteJournal.open(path) for _ in range(12)))
    await asyncio.gather(*(j.create(opening(f"s{n}")) for n, j in enumerate(opened)))
    assert len((await opened[0].rows("ann", limit=50)).rows) == 12
    assert (await asyncio.to_thread(path.stat)).st_mode & 0o777 == 0o600
    await asyncio.gather(*(journal.close() for journal in opened))


async def test_a_file_of_another_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    journal = await SqliteJournal.open(path)
    await journal._read(lambda db: db.execute("UPDATE schema_version SET version = 99").fetchone())
    await journal.close()
    with pytest.raises(JournalFault, match="schema 99"):
        await SqliteJournal.open(path)
    await asyncio.to_thread((tmp_path / "text").write_text, "no database at all, " * 100)
    with pytest.raises(JournalFault):
        await SqliteJournal.open(tmp_path / "text")


async def test_a_file_of_an_earlier_version_is_brought_up_by_one_of_those_who_open_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.sqlite3"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(steps("sqlite")[0] + "UPDATE schema_version SET version = 1")
    opened = await asyncio.gather(*(SqliteJournal.open(path) for _ in range(8)))
    await opened[0].create(opening("s"), said("go"))
    await opened[1].keep_secret("s", b"x")
    assert [row.session_id for row in (await opened[2].unrested(limit=9)).rows] == ["s"]
    await asyncio.gather(*(journal.close() for journal in opened))


async def test_a_store_that_is_full_fails_the_write_and_goes_on_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    journal = SqliteJournal(path)
    session_id, epoch = await begun(journal)
    await journal._read(lambda db: db.execute("PRAGMA max_page_count = 40").fetchone())
    with pytest.raises(JournalFault):
        await journal.append(session_id, epoch, [said("x" * 1_000_000)])
    await journal.append(session_id, epoch, [said("small")])
    assert await texts(journal, session_id) == ["small"]
    await journal.close()


async def test_a_fact_that_the_store_refuses_undoes_its_own_append_and_no_other(
    tmp_path: Path,
) -> None:
    journal = SqliteJournal(tmp_path / "journal.sqlite3")
    session_id, epoch = await begun(journal)
    await journal._read(lambda db: db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000))
    answers = await asyncio.gather(
        journal.append(session_id, epoch, [said("a")]),
        journal.append(session_id, epoch, [said("b"), said("c" * 20_000), said("d")]),
        journal.append(session_id, epoch, [said("e")]),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [tuple, JournalFault, tuple]
    assert await texts(journal, session_id) == ["a", "e"]
    assert (await journal.row(session_id)).n_messages == 2
    await journal.close()


async def test_a_file_that_stays_locked_is_a_fault_and_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    journal = SqliteJournal(path)
    session_id, epoch = await begun(journal)
    await journal._read(lambda db: db.execute("PRAGMA busy_timeout = 20").fetchone())
    other = await SqliteJournal.open(path)
    await other._read(lambda db: db.execute("BEGIN IMMEDIATE").fetchone())
    answers = await asyncio.gather(
        *(journal.append(session_id, epoch, [said(f"{n}")]) for n in range(3)),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [JournalFault] * 3
    assert (await journal.row(session_id)).head == 1  # readers do not wait for writers
    await other._read(lambda db: db.execute("ROLLBACK").fetchone())
    await other.close()
    await journal.append(session_id, epoch, [said("again")])
    assert await texts(journal, session_id) == ["again"]
    await journal.close()


async def test_writes_that_are_cancelled_while_they_wait_leave_the_others_alone(
    tmp_path: Path,
) -> None:
    journal = SqliteJournal(tmp_path / "journal.sqlite3")
    session_id, epoch = await begun(journal)
    busy = threading.Event()
    blocking = asyncio.create_task(journal._read(lambda _: busy.wait(10)))
    appends = [
        asyncio.create_task(journal.append(session_id, epoch, [said(f"{n}")])) for n in range(200)
    ]
    await asyncio.sleep(0)
    for append in appends[::2]:
        append.cancel()
    await asyncio.sleep(0)
    busy.set()
    await asyncio.wait([blocking, *appends])
    assert sorted(await texts(journal, session_id), key=int) == [str(n) for n in range(1, 200, 2)]
    await journal.close()


async def test_a_url_says_which_journal(tmp_path: Path) -> None:
    assert isinstance(await open_journal(JournalSettings(url="memory:"), tmp_path), MemoryJournal)
    relative = await open_journal(JournalSettings(url="sqlite:///sub/j.sqlite3"), tmp_path)
    absolute = await open_journal(
        JournalSettings(url=f"sqlite:///{tmp_path}/k.sqlite3"), tmp_path / "elsewhere"
    )
    await relative.close()
    await absolute.close()
    assert await asyncio.to_thread((tmp_path / "sub" / "j.sqlite3").exists)
    assert await asyncio.to_thread((tmp_path / "k.sqlite3").exists)
    assert not await asyncio.to_thread((tmp_path / "elsewhere").exists)
    for url in ("", "memory", "sqlite://j", "sqlite:///", "sqlite:///j?x=1", "mysql://h/d"):
        with pytest.raises(SettingsInvalid):
            await open_journal(JournalSettings(url=url), tmp_path)


async def test_the_settings_say_whether_commits_wait_for_the_disk(tmp_path: Path) -> None:
    for sync, pragma in (("full", 2), ("normal", 1)):
        settings = JournalSettings.model_validate({"sync": sync})
        journal = await open_journal(settings, tmp_path)
        assert isinstance(journal, SqliteJournal)
        found = await journal._read(lambda db: db.execute("PRAGMA synchronous").fetchone()[0])
        assert found == pragma
        await journal.close()


def test_given_records_begin_with_the_opening() -> None:
    with pytest.raises(ValueError):
        MemoryJournal.holding([Record(1, 0, Clock()(), said("x"))])


async def test_a_replay_begins_at_the_checkpoint_that_this_code_made(store: Store) -> None:
    journal, other = await store(), await store()
    session_id, epoch = await begun(journal)
    whole = await journal.append(session_id, epoch, [said("1"), said("2"), said("3")])
    none = await other.replay(session_id, "this")
    assert (none.checkpoint, none.records[1:]) == (None, whole)
    body = '{"odd": "\\u0000 \U0001f600"}'
    tail = await journal.append(session_id, epoch, [said("4")], Checkpoint(3, "this", body))
    assert await other.replay(session_id, "this") == (
        Checkpoint(3, "this", body),
        (whole[-1], *tail),
    )
    assert (await other.replay(session_id, "that")).checkpoint is None
    assert (await other.replay(session_id, "this", limit=1)).records == whole[-1:]
    later = Checkpoint(5, "this", "later")
    tail = await journal.append(session_id, epoch, [said("5")], later)
    assert await other.replay(session_id, "this") == (later, tail)
    assert len(await read_all(other, session_id)) == 6
    with pytest.raises(NoSuchSession):
        await journal.replay("nobody", "this")


async def test_a_write_that_is_refused_leaves_the_checkpoint_as_it_was(store: Store) -> None:
    journal = await store()
    session_id, epoch = await begun(journal)
    first = Checkpoint(1, "this", "first")
    await journal.append(session_id, epoch, [said("a", "m")], first)
    with pytest.raises(MessageKnown):
        await journal.append(session_id, epoch, [said("b", "m")], Checkpoint(2, "this", "second"))
    with pytest.raises(Fenced):
        await journal.append(session_id, epoch + 1, [said("c")], Checkpoint(2, "this", "third"))
    assert await journal.append(session_id, epoch, [], Checkpoint(2, "this", "fourth")) == ()
    assert (await journal.replay(session_id, "this")).checkpoint == first
    await journal.delete(session_id)
    with pytest.raises(NoSuchSession):
        await journal.replay(session_id, "this")


async def test_a_command_is_found_by_its_key(store: Store) -> None:
    journal = await store()
    session_id, epoch = await begun(journal)
    [_, record] = await journal.append(session_id, epoch, [said("a"), said("b", "odd\0\\0key")])
    assert await journal.command(session_id, "odd\0\\0key") == record
    assert await journal.command(session_id, "another") is None
    assert await journal.command("nobody", "odd\0\\0key") is None
