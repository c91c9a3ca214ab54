"""The journal of clusters: a Postgres server, for all processes of all hosts.

Every change is one statement, which the server carries out whole or not at all whatever becomes of
the process that sent it: nothing is ever held open across an answer. A session's change names the
epoch and the head that it follows (compare and set), so it cannot land behind a later one, not even
where it lay in the socket of a server that was stopped meanwhile. The digest that goes with it is
reckoned here, from the row as this journal last saw it; where another process was faster the
statement changes nothing, and the row is read anew.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from datetime import UTC, date, datetime
from typing import Any, Self, TypeVar

import asyncpg

from agent.events import FACT, Command, Fact, Record, SessionOpened
from agent.faults import (
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

MAX_ROWS = 1000
"""Rows that are remembered, some kilobytes each. One that is not costs its next write a look."""
RETRY_CONNECT_S = 0.1
MIGRATION_LOCK = 0x74726F757065
"""Of all processes that bring a schema up; the number means nothing but `troupe`."""

_NEW_FACTS = (
    "unnest({keys}::text[], {bodies}::text[]) WITH ORDINALITY AS fact (message_id, body, n)"
)
_CREATE = f"""
WITH named AS (
    INSERT INTO session_ids VALUES ($1) ON CONFLICT DO NOTHING RETURNING session_id),
opened AS (
    INSERT INTO sessions (session_id, user_id, created_at, epoch, head, closed, n_open_turns, digest)
    SELECT session_id, $2, $3, $10, $4, $5, $6, $7 FROM named),
written AS (
    INSERT INTO records (session_id, seq, epoch, at, message_id, body)
    SELECT session_id, n, $10, $3, message_id, body
    FROM named, {_NEW_FACTS.format(keys="$8", bodies="$9")})
SELECT EXISTS (SELECT FROM named)
"""  # noqa: S608  text of our own
_APPEND = f"""
WITH moved AS (
    UPDATE sessions SET head = $4, closed = $5, n_open_turns = $6, digest = $7
    WHERE session_id = $1 AND epoch = $2 AND head = $3 AND NOT EXISTS (
        SELECT FROM records WHERE session_id = $1 AND message_id = ANY ($8::text[]))
    RETURNING session_id),
written AS (
    INSERT INTO records (session_id, seq, epoch, at, message_id, body)
    SELECT session_id, $3 + n, $2, $9, message_id, body
    FROM moved, {_NEW_FACTS.format(keys="$8", bodies="$10")})
SELECT EXISTS (SELECT FROM moved)
"""  # noqa: S608  the same
_APPEND_CHECKED = _APPEND.replace(
    "written AS",
    """checked AS (
    INSERT INTO checkpoints (session_id, seq, code, body)
    SELECT session_id, $11, $12, $13 FROM moved
    ON CONFLICT (session_id) DO UPDATE
    SET seq = excluded.seq, code = excluded.code, body = excluded.body),
written AS""",
)
_FENCE = "UPDATE sessions SET epoch = epoch + 1 WHERE session_id = $1 AND epoch = $2"
_SEAL = """
INSERT INTO secrets SELECT session_id, $2 FROM sessions WHERE session_id = $1 FOR KEY SHARE
ON CONFLICT (session_id) DO UPDATE SET sealed = excluded.sealed
"""
_ROWS = """
SELECT epoch, digest FROM sessions
WHERE user_id = $1 AND (created_at, session_id) < ($2, $3)
ORDER BY created_at DESC, session_id DESC LIMIT $4
"""
_UNRESTED = """
SELECT epoch, digest FROM sessions
WHERE n_open_turns > 0 AND NOT closed AND (created_at, session_id) > ($1, $2)
ORDER BY created_at, session_id LIMIT $3
"""
_FIRST = PageKey(datetime.min.replace(tzinfo=UTC), "")
_LAST = PageKey(datetime.max.replace(tzinfo=UTC), "")

T = TypeVar("T")
Work = Callable[[Any], Awaitable[T]]
"""What is asked of a connection of asyncpg, which has no types."""


class PostgresJournal:
    """What a call had returned outlives a kill of any process of ours. With `sync="full"` commits are
    waited for, so it outlives a kill of the server too, and with the server's `fsync` on (its
    default) a loss of power. With `normal` a crash of the server takes what it had not written yet,
    some tenths of a second (three times its `wal_writer_delay`), never half a commit.

    Connections are made when there is work, at most `max_connections` at once, and closed
    `idle_s` after the last of it, so that a journal whose sessions wait holds none. A server that
    is away or starting is tried again until the call's `timeout_s` is over.

    Writes to one session are carried out in the order in which they were asked, and go on to
    their end when the caller is cancelled; reads wait for the writes that were asked before.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 10.0,
        max_connections: int = 4,
        idle_s: float = 5.0,
        sync: Sync = "full",
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """Connects, checks the schema and brings it up at the first use.

        `timeout_s` is the limit of each call. Afterwards whether a write was carried out is not
        known, as with any JournalFault.
        """
        self._url = url
        self._timeout_s = timeout_s
        self._max_connections = max_connections
        self._idle_s = idle_s
        self._sync_commits = "on" if sync == "full" else "off"
        self._clock = clock
        self._pool: Any = None
        self._checked = False
        self._rows: OrderedDict[str, SessionRow] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()
        """The work under way: bounded by the callers and, where those left, by `timeout_s`."""
        self._writing: dict[Hashable, asyncio.Task[Any]] = {}
        """The last write under way to each session or quota: what is asked of it next waits."""
        self._closed = False

    @classmethod
    async def open(
        cls, url: str, *, timeout_s: float = 10.0, max_connections: int = 4, idle_s: float = 5.0
    ) -> Self:
        """The journal, the server asked and its schema brought up to ours.

        Raises:
            JournalFault: the server cannot be reached, or has the schema of a newer version.
        """
        journal = cls(url, timeout_s=timeout_s, max_connections=max_connections, idle_s=idle_s)
        return await journal.checked()

    async def checked(self) -> Self:
        """Itself, as `open` gives it; closed when it raises."""
        try:
            await self._read(None, lambda db: db.fetchval("SELECT 1"))
        except JournalFault:
            await self.close()
            raise
        return self

    async def create(
        self, opened: SessionOpened, *more: Fact, epoch: int = 0
    ) -> tuple[Record, ...]:
        facts, at = (opened, *more), self._clock().astimezone(UTC)
        bodies = encoded(facts)
        row, records = _grown(SessionRow.opened(opened, at, epoch), facts, at)

        async def work(db: Any) -> tuple[Record, ...]:
            done = await db.fetchval(
                *(_CREATE, _key(row.session_id), _key(row.user_id), at),
                *_state(row),
                *(_keys(facts), bodies, epoch),
            )
            if not done:
                raise SessionExists("This session exists already.")
            self._remember(row)
            return records

        return await self._write(row.session_id, work)

    async def fence(self, session_id: str) -> int:
        async def work(db: Any) -> int:
            row = self._rows.get(session_id) or await _fresh(db, session_id)
            while await db.execute(_FENCE, _key(session_id), row.epoch) != "UPDATE 1":
                row = await _fresh(db, session_id)
            self._remember(row.model_copy(update={"epoch": row.epoch + 1}))
            return row.epoch + 1

        return await self._write(session_id, work)

    async def append(
        self,
        session_id: str,
        epoch: int,
        facts: Sequence[Fact],
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Record, ...]:
        facts, at = tuple(facts), self._clock().astimezone(UTC)
        bodies, keys = encoded(facts), _keys(facts)
        statement, more = (_APPEND_CHECKED, checkpoint) if checkpoint else (_APPEND, ())

        async def work(db: Any) -> tuple[Record, ...]:
            before = self._rows.get(session_id)
            if before is None or before.epoch != epoch or not facts:
                before = await _owned(db, session_id, epoch)
            while facts:
                row, records = _grown(before, facts, max(at, before.updated_at))
                done = await db.fetchval(
                    *(statement, _key(session_id), epoch, before.head),
                    *_state(row),
                    *(keys, row.updated_at, bodies, *more),
                )
                if done:
                    self._remember(row)
                    return records
                before = await _owned(db, session_id, epoch)
                await _check_unknown(db, session_id, message_ids(facts))
            return ()

        return await self._write(session_id, work)

    async def read(
        self, session_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[Record, ...]:
        return await self._read(session_id, lambda db: _records(db, session_id, after, limit))

    async def replay(self, session_id: str, code: str, *, limit: int = 1000) -> Replay:
        async def work(db: Any) -> Replay:
            found = await db.fetchrow(
                "SELECT seq, code, body FROM checkpoints WHERE session_id = $1 AND code = $2",
                *(_key(session_id), code),
            )
            checkpoint = Checkpoint(*found) if found else None
            after = checkpoint.seq if checkpoint else 0
            return Replay(checkpoint, await _records(db, session_id, after, limit))

        return await self._read(session_id, work)

    async def command(self, session_id: str, message_id: str) -> Record | None:
        async def work(db: Any) -> Record | None:
            found = await db.fetchrow(
                "SELECT seq, epoch, at, body FROM records"
                " WHERE session_id = $1 AND message_id = $2",
                *(_key(session_id), _key(message_id)),
            )
            return _record(*found) if found else None

        return await self._read(session_id, work)

    async def row(self, session_id: str) -> SessionRow:
        return await self._read(session_id, lambda db: _fresh(db, session_id))

    async def rows(self, user_id: str, *, limit: int, after: str | None = None) -> RowPage:
        return await self._page(_ROWS, [_key(user_id)], _LAST, limit, after)

    async def unrested(self, *, limit: int, after: str | None = None) -> RowPage:
        return await self._page(_UNRESTED, [], _FIRST, limit, after)

    async def _page(
        self, query: str, of: Sequence[str], first: PageKey, limit: int, after: str | None
    ) -> RowPage:
        if limit < 1:
            raise ValueError("limit")
        key = PageKey.parse(after) if after is not None else first
        bound = (key.created_at, _key(key.session_id))

        async def work(db: Any) -> RowPage:
            found = await db.fetch(query, *of, *bound, limit + 1)
            return page_of([_loaded(*each) for each in found], limit)

        return await self._read(None, work)

    async def keep_secret(self, session_id: str, sealed: bytes | None) -> None:
        async def work(db: Any) -> None:
            if sealed is None:
                await _fresh(db, session_id)
                await db.execute("DELETE FROM secrets WHERE session_id = $1", _key(session_id))
            elif await db.execute(_SEAL, _key(session_id), sealed) != "INSERT 0 1":
                raise NoSuchSession("There is no such session.")

        await self._write(session_id, work)

    async def secret(self, session_id: str) -> bytes | None:
        async def work(db: Any) -> bytes | None:
            found = await db.fetchrow(
                "SELECT sealed FROM sessions LEFT JOIN secrets USING (session_id)"
                " WHERE session_id = $1",
                _key(session_id),
            )
            if found is None:
                raise NoSuchSession("There is no such session.")
            return found["sealed"]

        return await self._read(session_id, work)

    async def delete(self, session_id: str) -> None:
        async def work(db: Any) -> None:
            self._rows.pop(session_id, None)
            if not await db.fetchval("SELECT delete_session($1)", _key(session_id)):
                raise NoSuchSession("There is no such session.")

        await self._write(session_id, work)

    async def charge_quota(
        self, user_id: str, group: str, session_id: str, *, day: date, limit: int
    ) -> bool:
        async def work(db: Any) -> bool:
            return await db.fetchval(
                "SELECT charge_quota($1, $2, $3, $4, $5)",
                *(_key(user_id), _key(group), _key(session_id), day, limit),
            )

        return await self._write((user_id, group), work)

    async def close(self) -> None:
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._pool is not None:
            # Nothing is under way. An orderly goodbye would wait for a server that may not answer.
            self._pool.terminate()
            self._pool = None
            await asyncio.sleep(0)  # in which the loop lets the sockets go

    async def _read(self, session_id: str | None, work: Work[T]) -> T:
        """None: of many sessions."""
        self._check_open()
        keys = list(self._writing) if session_id is None else [session_id]
        return await asyncio.shield(self._begun(work, after=keys))

    async def _write(self, key: Hashable, work: Work[T]) -> T:
        self._check_open()
        task = self._begun(work, after=[key])
        self._writing[key] = task

        def ended(_: object) -> None:
            if self._writing.get(key) is task:
                del self._writing[key]

        task.add_done_callback(ended)
        return await asyncio.shield(task)

    def _begun(self, work: Work[T], *, after: Sequence[Hashable]) -> asyncio.Task[T]:
        """A task of the journal's own, which its caller's cancellation does not reach."""
        before = {self._writing[key] for key in after if key in self._writing}
        task = asyncio.create_task(self._settled(work, before))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _settled(self, work: Work[T], before: set[asyncio.Task[Any]]) -> T:
        with boundary(JournalFault, "The journal did not answer."):
            deadline = asyncio.get_running_loop().time() + self._timeout_s
            async with asyncio.timeout_at(deadline):
                if before:
                    await asyncio.wait(before)
                db = await self._connection()
            # asyncpg meets cancellation with a request over a further connection, which a server
            # that does not answer does not answer either; a closed connection ends the work at once.
            limit = asyncio.get_running_loop().call_at(deadline, db.terminate)
            try:
                if not self._checked:
                    await _migrate(db)
                    self._checked = True
                return await work(db)
            finally:
                limit.cancel()
                await self._pool.release(db, timeout=self._timeout_s)

    async def _connection(self) -> Any:
        """A connection, waited for: the caller sets the limit."""
        if self._pool is None:
            self._pool = asyncpg.create_pool(
                self._url,
                min_size=0,
                max_size=self._max_connections,
                max_inactive_connection_lifetime=self._idle_s,
                timeout=self._timeout_s,
                reset=_nothing_to_reset,
                server_settings={
                    "application_name": "troupe",
                    "synchronous_commit": self._sync_commits,
                    # What a client no longer waits for, the server does not go on with.
                    "statement_timeout": str(max(1, int(self._timeout_s * 1000))),
                },
            )
        await self._pool
        while True:
            try:
                return await self._pool.acquire()
            except (
                OSError,
                asyncpg.PostgresConnectionError,
                asyncpg.CannotConnectNowError,
                asyncpg.TooManyConnectionsError,
            ):
                await asyncio.sleep(RETRY_CONNECT_S)

    def _remember(self, row: SessionRow) -> None:
        self._rows[row.session_id] = row
        self._rows.move_to_end(row.session_id)
        if len(self._rows) > MAX_ROWS:
            self._rows.popitem(last=False)

    def _check_open(self) -> None:
        if self._closed:
            raise JournalFault("The journal is closed.")


async def _nothing_to_reset(_: object) -> None:
    """No statement of ours leaves a trace in a connection: asyncpg's own way costs a round trip."""


async def _migrate(db: Any) -> None:
    """Bring the schema up to ours, all steps or none; of many processes one does it.

    Raises:
        JournalFault: a newer version than this one made the schema, or the database is not UTF-8.
    """
    ours = await asyncio.to_thread(steps, "postgres")
    if await _schema_version(db) == len(ours):
        return
    if (encoding := await db.fetchval("SHOW server_encoding")) != "UTF8":
        raise JournalFault("The journal's database is not UTF8.", encoding=encoding)
    async with db.transaction():
        await db.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
        if (found := await _schema_version(db)) > len(ours):
            raise JournalFault(
                f"The journal's database has schema {found}; this version reads {len(ours)}.",
                found=found,
                expected=len(ours),
            )
        for step in ours[found:]:
            await db.execute(step)
        await db.execute("UPDATE schema_version SET version = $1", len(ours))


async def _schema_version(db: Any) -> int:
    """0: an empty database."""
    # Not to_regclass, which may answer from what this connection knew before it got the lock.
    made = (
        "SELECT EXISTS (SELECT FROM pg_tables WHERE tablename = 'schema_version'"
        " AND schemaname = ANY (current_schemas(false)))"
    )
    if not await db.fetchval(made):
        return 0
    return await db.fetchval("SELECT version FROM schema_version")


async def _fresh(db: Any, session_id: str) -> SessionRow:
    found = await db.fetchrow(
        "SELECT epoch, digest FROM sessions WHERE session_id = $1", _key(session_id)
    )
    if found is None:
        raise NoSuchSession("There is no such session.")
    return _loaded(*found)


async def _records(db: Any, session_id: str, after: int, limit: int) -> tuple[Record, ...]:
    found = await db.fetch(
        "SELECT seq, epoch, at, body FROM records WHERE session_id = $1 AND seq > $2"
        " ORDER BY seq LIMIT $3",
        *(_key(session_id), after, limit),
    )
    if not found:
        await _fresh(db, session_id)
    return tuple(_record(*each) for each in found)


def _record(seq: int, epoch: int, at: datetime, body: str) -> Record:
    return Record(seq, epoch, at, FACT.validate_json(body))


async def _owned(db: Any, session_id: str, epoch: int) -> SessionRow:
    row = await _fresh(db, session_id)
    if row.epoch != epoch:
        raise Fenced("Another incarnation owns this session.")
    return row


async def _check_unknown(db: Any, session_id: str, keys: Sequence[str]) -> None:
    for key in keys:
        seq = await db.fetchval(
            "SELECT seq FROM records WHERE session_id = $1 AND message_id = $2",
            *(_key(session_id), _key(key)),
        )
        if seq is not None:
            raise MessageKnown("This message_id was recorded before.", seq=seq)


def _grown(
    row: SessionRow, facts: Sequence[Fact], at: datetime
) -> tuple[SessionRow, tuple[Record, ...]]:
    """The row once the facts stand behind its head, and their records."""
    records = tuple(
        Record(seq, row.epoch, at, fact) for seq, fact in enumerate(facts, row.head + 1)
    )
    for record in records:
        row = row.after(record)
    return row, records


def _state(row: SessionRow) -> tuple[int, bool, int, str]:
    return row.head, row.closed, row.n_open_turns, row.model_dump_json()


def _loaded(epoch: int, digest: str) -> SessionRow:
    """A fence moves the epoch's column only."""
    return SessionRow.model_validate_json(digest).model_copy(update={"epoch": epoch})


def _keys(facts: Sequence[Fact]) -> list[str | None]:
    return [
        _key(fact.message_id) if isinstance(fact, Command) and fact.message_id is not None else None
        for fact in facts
    ]


def _key(text: str) -> str:
    """As the columns hold it: Postgres takes no NUL. JSON writes it as an escape by itself."""
    return text.replace("\\", r"\\").replace("\0", r"\0")
