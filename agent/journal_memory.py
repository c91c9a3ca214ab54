"""The journal of one process: for tests and throw-away runs. Nothing outlives it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Self

from agent.events import Command, Fact, Record, SessionOpened
from agent.faults import Fenced, JournalFault, MessageKnown, NoSuchSession, SessionExists
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


@dataclass
class _Session:
    row: SessionRow
    records: list[Record] = field(default_factory=list[Record])
    known: dict[str, int] = field(default_factory=dict[str, int])
    """The seq of each message_id."""
    checkpoint: Checkpoint | None = None
    secret: bytes | None = None

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            self.records.append(record)
            self.row = self.row.after(record)
            if isinstance(record.fact, Command) and record.fact.message_id is not None:
                self.known[record.fact.message_id] = record.seq


class MemoryJournal:
    """No method awaits anything between its check and its change, so none can be cut in two."""

    def __init__(self, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._deleted: set[str] = set()
        self._charges: dict[tuple[str, str, str], date] = {}
        """Of (user, group, session)."""
        self._closed = False

    @classmethod
    def holding(cls, records: Sequence[Record], *, clock: Callable[[], datetime] = utc_now) -> Self:
        """A journal as a crash after `records` leaves it: one session's, from its SessionOpened on."""
        opened = records[0].fact
        if not isinstance(opened, SessionOpened):
            raise ValueError("the first record is no SessionOpened")  # noqa: TRY004  the value is wrong
        journal = cls(clock=clock)
        row = SessionRow.opened(opened, records[0].at)
        session = _Session(row.model_copy(update={"epoch": max(r.epoch for r in records)}))
        session.add(records)
        journal._sessions[opened.session_id] = session
        return journal

    async def create(
        self, opened: SessionOpened, *more: Fact, epoch: int = 0
    ) -> tuple[Record, ...]:
        self._check_open()
        facts = (opened, *more)
        encoded(facts)  # refuses here what a store on disk would refuse
        if opened.session_id in self._sessions or opened.session_id in self._deleted:
            raise SessionExists("This session exists already.")
        at = self._clock()
        session = self._sessions[opened.session_id] = _Session(SessionRow.opened(opened, at, epoch))
        return self._added(session, facts, at)

    async def fence(self, session_id: str) -> int:
        session = self._session(session_id)
        session.row = session.row.model_copy(update={"epoch": session.row.epoch + 1})
        return session.row.epoch

    async def append(
        self,
        session_id: str,
        epoch: int,
        facts: Sequence[Fact],
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Record, ...]:
        encoded(facts)
        session = self._session(session_id)
        if epoch != session.row.epoch:
            raise Fenced("Another incarnation owns this session.")
        for message_id in message_ids(facts):
            if message_id in session.known:
                raise MessageKnown(
                    "This message_id was recorded before.", seq=session.known[message_id]
                )
        if facts and checkpoint:
            session.checkpoint = checkpoint
        return self._added(session, facts, self._clock())

    def _added(self, session: _Session, facts: Sequence[Fact], at: datetime) -> tuple[Record, ...]:
        row, at = session.row, max(at, session.row.updated_at)
        records = tuple(
            Record(seq, row.epoch, at, fact) for seq, fact in enumerate(facts, row.head + 1)
        )
        session.add(records)
        return records

    async def read(
        self, session_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[Record, ...]:
        records = self._session(session_id).records
        return tuple(records[max(after, 0) : max(after, 0) + limit])

    async def replay(self, session_id: str, code: str, *, limit: int = 1000) -> Replay:
        checkpoint = self._session(session_id).checkpoint
        if checkpoint is not None and checkpoint.code != code:
            checkpoint = None
        after = checkpoint.seq if checkpoint else 0
        return Replay(checkpoint, await self.read(session_id, after=after, limit=limit))

    async def command(self, session_id: str, message_id: str) -> Record | None:
        self._check_open()
        session = self._sessions.get(session_id)
        seq = session.known.get(message_id) if session else None
        return session.records[seq - 1] if session and seq else None

    async def row(self, session_id: str) -> SessionRow:
        return self._session(session_id).row

    async def rows(self, user_id: str, *, limit: int, after: str | None = None) -> RowPage:
        self._check_open()
        if limit < 1:
            raise ValueError("limit")
        key = PageKey.parse(after) if after is not None else None
        own = (s.row for s in self._sessions.values() if s.row.user_id == user_id)
        rows = [row for row in own if key is None or PageKey.of(row) < key]
        rows.sort(key=PageKey.of, reverse=True)
        return page_of(rows, limit)

    async def unrested(self, *, limit: int, after: str | None = None) -> RowPage:
        self._check_open()
        if limit < 1:
            raise ValueError("limit")
        key = PageKey.parse(after) if after is not None else None
        due = (
            s.row for s in self._sessions.values() if s.row.n_open_turns > 0 and not s.row.closed
        )
        rows = [row for row in due if key is None or PageKey.of(row) > key]
        return page_of(sorted(rows, key=PageKey.of), limit)

    async def keep_secret(self, session_id: str, sealed: bytes | None) -> None:
        self._session(session_id).secret = sealed

    async def secret(self, session_id: str) -> bytes | None:
        return self._session(session_id).secret

    async def delete(self, session_id: str) -> None:
        self._session(session_id)
        del self._sessions[session_id]
        self._deleted.add(session_id)

    async def charge_quota(
        self, user_id: str, group: str, session_id: str, *, day: date, limit: int
    ) -> bool:
        self._check_open()
        if (user_id, group, session_id) in self._charges:
            return True
        n_charged = sum(
            key[:2] == (user_id, group) and charged_on == day
            for key, charged_on in self._charges.items()
        )
        if n_charged >= limit:
            return False
        self._charges[user_id, group, session_id] = day
        return True

    async def close(self) -> None:
        self._closed = True

    def _session(self, session_id: str) -> _Session:
        self._check_open()
        try:
            return self._sessions[session_id]
        except KeyError:
            raise NoSuchSession("There is no such session.") from None

    def _check_open(self) -> None:
        if self._closed:
            raise JournalFault("The journal is closed.")
