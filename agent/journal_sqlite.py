"""The embedded journal: one SQLite file in WAL mode, for all processes of one host.

Every process opens the file by itself; SQLite's lock makes each write transaction (BEGIN IMMEDIATE)
the only one. WAL needs shared memory, so the file lives on a local disk: a cluster of several hosts
uses a server. All SQLite work of a journal runs in its one thread. Writes that wait there together
share a transaction, each in a savepoint of its own, so that they also share the disk's flush.
"""

import asyncio
import json
import os
import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

from agent.events import FACT, Command, Fact, Record, SessionOpened
from agent.faults import (
    Fault,
    Fenced,
    JournalFault,
    MessageKnown,
    NoSuchSession,
    SessionExists,
    boundary,
)
from agent.journal import (
    Checkpoint,
    PageKey,
    Replay,
    RowPage,
    SessionRow,
    encoded,
    message_ids,
    page_of,
    utc_now,
)
from agent.migrations import steps
from agent.settings import Sync

BUSY_TIMEOUT_S = 10.0
"""Limit of one wait for another process's transaction. One takes milliseconds; only a stopped
process or a drowning disk holds it for long."""
MAX_GROUP = 64
"""Writes in one transaction: what one waits for the others stays a few milliseconds."""

_COLUMNS = tuple(SessionRow.model_fields)
_INSERT_ROW = (
    f"INSERT INTO sessions ({', '.join(_COLUMNS)})"  # noqa: S608  names of our own
    f" VALUES ({', '.join(f':{name}' for name in _COLUMNS)})"
)
_UPDATE_ROW = (
    f"UPDATE sessions SET {', '.join(f'{name} = :{name}' for name in _COLUMNS)}"  # noqa: S608  the same
    " WHERE session_id = :session_id"
)
_JSON_COLUMNS = ("pending", "usage")
_INSTANTS = ("created_at", "updated_at")
_AFTER_EVERY_INSTANT = "~"
"""In the order of texts."""

T = TypeVar("T")


class _Write(NamedTuple, Generic[T]):
    work: Callable[[sqlite3.Connection], T]
    answer: Future[T]


class SqliteJournal:
    """A kill of any process, at any instant, loses nothing that a call had returned.

    `sync="full"` flushes at every commit, so the same holds for a loss of power: "202 Accepted"
    promises it. `sync="normal"` flushes at checkpoints of the WAL only: a loss of power may take
    the last commits (never the file, never half a commit).
    """

    def __init__(
        self,
        path: Path | str,
        *,
        sync: Sync = "full",
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """Opens the file at the first use."""
        self.path = Path(path)
        self._sync = sync
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._waiting: deque[_Write[Any]] = deque()
        """Bounded by the callers: each awaits its answer."""
        self._db: sqlite3.Connection | None = None
        self._closed = False

    @classmethod
    async def open(cls, path: Path | str, *, sync: Sync = "full") -> Self:
        """The journal, its file made if need be and its schema checked.

        Raises:
            JournalFault: the file cannot be opened, or has the schema of another version.
        """
        return await cls(path, sync=sync).checked()

    async def checked(self) -> Self:
        """Itself, as `open` gives it; closed when it raises."""
        try:
            await self._read(lambda _: None)
        except JournalFault:
            await self.close()
            raise
        return self

    async def create(
        self, opened: SessionOpened, *more: Fact, epoch: int = 0
    ) -> tuple[Record, ...]:
        facts, at = (opened, *more), self._clock().astimezone(UTC)
        bodies = encoded(facts)

        def work(db: sqlite3.Connection) -> tuple[Record, ...]:
            taken = (
                "SELECT 1 FROM sessions WHERE session_id = :id"
                " UNION ALL SELECT 1 FROM deleted WHERE session_id = :id"
            )
            if db.execute(taken, {"id": opened.session_id}).fetchone():
                raise SessionExists("This session exists already.")
            row = SessionRow.opened(opened, at, epoch)
            db.execute(_INSERT_ROW, _dump(row))
            return _add(db, row, facts, bodies, at)

        return await self._write(work)

    async def fence(self, session_id: str) -> int:
        def work(db: sqlite3.Connection) -> int:
            epoch = _row(db, session_id).epoch + 1
            db.execute("UPDATE sessions SET epoch = ? WHERE session_id = ?", (epoch, session_id))
            return epoch

        return await self._write(work)

    async def append(
        self,
        session_id: str,
        epoch: int,
        facts: Sequence[Fact],
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Record, ...]:
        facts, at = tuple(facts), self._clock().astimezone(UTC)
        bodies = encoded(facts)

        def work(db: sqlite3.Connection) -> tuple[Record, ...]:
            row = _row(db, session_id)
            if epoch != row.epoch:
                raise Fenced("Another incarnation owns this session.")
            known = "SELECT seq FROM records WHERE session_id = ? AND message_id = ?"
            for message_id in message_ids(facts):
                if found := db.execute(known, (session_id, message_id)).fetchone():
                    raise MessageKnown("This message_id was recorded before.", seq=found[0])
            if facts and checkpoint:
                keep = "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)"
                db.execute(keep, (session_id, *checkpoint))
            return _add(db, row, facts, bodies, at)

        return await self._write(work)

    async def read(
        self, session_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[Record, ...]:
        return await self._read(lambda db: _records(db, session_id, after, limit))

    async def replay(self, session_id: str, code: str, *, limit: int = 1000) -> Replay:
        def work(db: sqlite3.Connection) -> Replay:
            found = db.execute(
                "SELECT seq, code, body FROM checkpoints WHERE session_id = ? AND code = ?",
                (session_id, code),
            ).fetchone()
            checkpoint = Checkpoint(*found) if found else None
            after = checkpoint.seq if checkpoint else 0
            return Replay(checkpoint, _records(db, session_id, after, limit))

        return await self._read(work)

    async def command(self, session_id: str, message_id: str) -> Record | None:
        def work(db: sqlite3.Connection) -> Record | None:
            found = db.execute(
                "SELECT seq, epoch, at, body FROM records WHERE session_id = ? AND message_id = ?",
                (session_id, message_id),
            ).fetchone()
            return _record(*found) if found else None

        return await self._read(work)

    async def row(self, session_id: str) -> SessionRow:
        return await self._read(lambda db: _row(db, session_id))

    async def rows(self, user_id: str, *, limit: int, after: str | None = None) -> RowPage:
        if limit < 1:
            raise ValueError("limit")
        bound = (_AFTER_EVERY_INSTANT, "")
        if after is not None:
            key = PageKey.parse(after)
            bound = (_instant(key.created_at), key.session_id)

        def work(db: sqlite3.Connection) -> RowPage:
            found = db.execute(
                "SELECT * FROM sessions WHERE user_id = ? AND (created_at, session_id) < (?, ?)"
                " ORDER BY created_at DESC, session_id DESC LIMIT ?",
                (user_id, *bound, limit + 1),
            )
            return page_of([_loaded(each) for each in found], limit)

        return await self._read(work)

    async def unrested(self, *, limit: int, after: str | None = None) -> RowPage:
        if limit < 1:
            raise ValueError("limit")
        key = PageKey.parse(after) if after is not None else None
        bound = (_instant(key.created_at), key.session_id) if key else ("", "")

        def work(db: sqlite3.Connection) -> RowPage:
            found = db.execute(
                "SELECT * FROM sessions WHERE n_open_turns > 0 AND closed = 0"
                " AND (created_at, session_id) > (?, ?) ORDER BY created_at, session_id LIMIT ?",
                (*bound, limit + 1),
            )
            return page_of([_loaded(each) for each in found], limit)

        return await self._read(work)

    async def keep_secret(self, session_id: str, sealed: bytes | None) -> None:
        def work(db: sqlite3.Connection) -> None:
            _row(db, session_id)
            db.execute("DELETE FROM secrets WHERE session_id = ?", (session_id,))
            if sealed is not None:
                db.execute("INSERT INTO secrets VALUES (?, ?)", (session_id, sealed))

        await self._write(work)

    async def secret(self, session_id: str) -> bytes | None:
        def work(db: sqlite3.Connection) -> bytes | None:
            found = db.execute(
                "SELECT sealed FROM sessions LEFT JOIN secrets USING (session_id)"
                " WHERE session_id = ?",
                (session_id,),
            ).fetchone()
            if found is None:
                raise NoSuchSession("There is no such session.")
            return found[0]

        return await self._read(work)

    async def delete(self, session_id: str) -> None:
        def work(db: sqlite3.Connection) -> None:
            _row(db, session_id)
            for table in ("records", "checkpoints", "secrets", "sessions"):
                db.execute(f"DELETE FROM {table} WHERE session_id = ?", (session_id,))  # noqa: S608  names of our own
            db.execute("INSERT INTO deleted VALUES (?)", (session_id,))

        await self._write(work)

    async def charge_quota(
        self, user_id: str, group: str, session_id: str, *, day: date, limit: int
    ) -> bool:
        whose = "FROM quota WHERE user_id = ? AND quota_group = ?"

        def work(db: sqlite3.Connection) -> bool:
            counted = f"SELECT 1 {whose} AND session_id = ?"
            if db.execute(counted, (user_id, group, session_id)).fetchone():
                return True
            today = f"SELECT count(*) {whose} AND day = ?"
            if db.execute(today, (user_id, group, day.isoformat())).fetchone()[0] >= limit:
                return False
            charge = (user_id, group, session_id, day.isoformat())
            db.execute("INSERT INTO quota VALUES (?, ?, ?, ?)", charge)
            return True

        return await self._write(work)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._thread.submit(self._disconnect)
            self._thread.shutdown(wait=False)
        await asyncio.to_thread(self._thread.shutdown)

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def guarded() -> T:
            with boundary(JournalFault, "The journal did not answer."):
                return work(self._connection())

        self._check_open()
        return await asyncio.wrap_future(self._thread.submit(guarded))

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Cancelled before the thread came to it: nothing. Later: all, as if it had not been."""
        self._check_open()
        write = _Write(work, Future[T]())
        self._waiting.append(write)
        self._thread.submit(self._settle_waiting)
        return await asyncio.wrap_future(write.answer)

    # From here on everything runs in the journal's thread.

    def _settle_waiting(self) -> None:
        """Carry out the writes that wait, in one transaction. One call follows every write, so the
        later calls of a group find nothing left to do."""
        group: list[_Write[Any]] = []
        while self._waiting and len(group) < MAX_GROUP:
            write = self._waiting.popleft()
            if write.answer.set_running_or_notify_cancel():
                group.append(write)
        if not group:
            return
        results: list[object]
        try:
            with boundary(JournalFault, "The journal did not answer."):
                results = self._committed(group)
        except JournalFault as fault:
            results = [fault] * len(group)
        for write, result in zip(group, results, strict=True):
            if isinstance(result, Fault):
                write.answer.set_exception(result)
            else:
                write.answer.set_result(result)

    def _committed(self, group: Sequence[_Write[Any]]) -> list[object]:
        db = self._connection()
        db.execute("BEGIN IMMEDIATE")
        try:
            results = [_attempted(db, write) for write in group]
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
        return results

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = _connected(self.path, self._sync)
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):  # what was committed is on disk whatever this says
                self._db.close()

    def _check_open(self) -> None:
        if self._closed:
            raise JournalFault("The journal is closed.")


def _attempted(db: sqlite3.Connection, write: _Write[Any]) -> object:
    """The result of one write, or the fault that undid it and nothing else."""
    db.execute("SAVEPOINT one")
    try:
        with boundary(JournalFault, "The journal did not take the write."):
            result = write.work(db)
    except Fault as fault:
        # Where SQLite gave the whole transaction up this fails, and with it the group.
        db.execute("ROLLBACK TO one")
        result = fault
    db.execute("RELEASE one")
    return result


def _connected(path: Path, sync: str) -> sqlite3.Connection:
    if not path.exists():
        _make(path)
    with ExitStack() as failing:
        db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        failing.callback(db.close)
        db.row_factory = sqlite3.Row
        db.execute(f"PRAGMA synchronous = {sync}")
        _migrate(db)
        failing.pop_all()
    return db


def _migrate(db: sqlite3.Connection) -> None:
    """Bring the schema up to ours, all steps or none; of many processes one does it.

    Raises:
        JournalFault: a newer version than this one made the file.
    """
    ours = steps("sqlite")
    if _schema_version(db) == len(ours):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        if (found := _schema_version(db)) > len(ours):
            raise JournalFault(
                f"The journal file has schema {found}; this version reads {len(ours)}.",
                found=found,
                expected=len(ours),
            )
        for step in ours[found:]:
            # Not executescript, which would commit first. No statement of ours has a ; inside.
            for statement in step.split(";"):
                db.execute(statement)
        db.execute("UPDATE schema_version SET version = ?", (len(ours),))
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _schema_version(db: sqlite3.Connection) -> int:
    """0: an empty file."""
    if not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'schema_version'").fetchone():
        return 0
    return db.execute("SELECT version FROM schema_version").fetchone()[0]


def _make(path: Path) -> None:
    """Put an empty journal at `path`, complete at once, unless somebody else was first.

    Two processes that switch one file to WAL at the same time get "locked" at once, whatever the
    busy timeout; so the file gets its name when it is done. Its mode, which SQLite gives the side
    files too, is 0600: people's conversations.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(descriptor)
    try:
        with closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            _migrate(db)
        with suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        Path(draft).unlink()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # else a loss of power may take the file's name
    finally:
        os.close(directory)


def _add(
    db: sqlite3.Connection,
    row: SessionRow,
    facts: Sequence[Fact],
    bodies: Sequence[str],
    at: datetime,
) -> tuple[Record, ...]:
    """Write the facts behind the row's head, and the row after them."""
    at = max(at, row.updated_at)
    records = tuple(
        Record(seq, row.epoch, at, fact) for seq, fact in enumerate(facts, row.head + 1)
    )
    db.executemany(
        "INSERT INTO records (session_id, seq, epoch, at, message_id, body)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        [
            (
                row.session_id,
                record.seq,
                record.epoch,
                _instant(at),
                record.fact.message_id if isinstance(record.fact, Command) else None,
                body,
            )
            for record, body in zip(records, bodies, strict=True)
        ],
    )
    for record in records:
        row = row.after(record)
    db.execute(_UPDATE_ROW, _dump(row))
    return records


def _records(db: sqlite3.Connection, session_id: str, after: int, limit: int) -> tuple[Record, ...]:
    found = db.execute(
        "SELECT seq, epoch, at, body FROM records WHERE session_id = ? AND seq > ?"
        " ORDER BY seq LIMIT ?",
        (session_id, after, limit),
    ).fetchall()
    if not found:
        _row(db, session_id)
    return tuple(_record(*each) for each in found)


def _record(seq: int, epoch: int, at: str, body: str) -> Record:
    return Record(seq, epoch, datetime.fromisoformat(at), FACT.validate_json(body))


def _row(db: sqlite3.Connection, session_id: str) -> SessionRow:
    found = db.execute("SELECT * FROM sessions WHERE session_id = ?", (session_id,)).fetchone()
    if found is None:
        raise NoSuchSession("There is no such session.")
    return _loaded(found)


def _dump(row: SessionRow) -> dict[str, Any]:
    values = row.model_dump(mode="json")
    values |= {name: json.dumps(values[name]) for name in _JSON_COLUMNS}
    return values | {name: _instant(getattr(row, name)) for name in _INSTANTS}


def _loaded(found: sqlite3.Row) -> SessionRow:
    values: dict[str, Any] = dict(found)
    return SessionRow.model_validate(
        values | {name: json.loads(values[name]) for name in _JSON_COLUMNS}
    )


def _instant(at: datetime) -> str:
    """Of one width and zone, so that the order of the texts is the order of the instants."""
    return at.astimezone(UTC).isoformat(timespec="microseconds")
