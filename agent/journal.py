"""The journal: the only place where a session exists.

`append` is the one way a fact comes into being. It is one transaction: all facts or none, only while
the caller's epoch is the session's current one, numbered without a gap. Whoever activates a session
takes the next epoch with `fence`, and every writer before it is refused from then on.

A session's row is a digest of its facts (`SessionRow.after`), kept in the same transaction so that a
list needs no fold. It holds nothing that the facts do not say.

Every implementation passes `tests/contracts/test_journal.py`.
"""

import base64
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import NamedTuple, Protocol, Self

from agent.events import (
    TURN_OPENERS,
    ApprovalDecided,
    ApprovalRequested,
    Ask,
    AssistantMessage,
    Command,
    Fact,
    Frozen,
    ModelCalled,
    ModelSwitched,
    Record,
    Rewound,
    SessionClosed,
    SessionOpened,
    ToolFinished,
    ToolStarted,
    TurnEnded,
    Usage,
    UserMessage,
)


class SessionRow(Frozen):
    """The digest of one session's facts."""

    session_id: str
    user_id: str
    agent: str
    title: str | None
    model: str
    created_at: datetime
    updated_at: datetime
    """Of the last record."""
    epoch: int = 0
    """0: never activated."""
    head: int = 0
    """The seq of the last record."""
    closed: bool = False
    n_open_turns: int = 0
    """Opened and not ended: running or queued."""
    n_messages: int = 0
    """Visible user and assistant messages in the view."""
    pending: tuple[Ask, ...] = ()
    usage: Usage = Usage()
    spend_usd: float = 0.0
    n_unpriced: int = 0
    """Model calls whose cost is not in `spend_usd`, since no price or no usage is known."""

    def after(self, record: Record) -> Self:
        """The row once `record` is part of the session."""
        change: dict[str, object] = {"updated_at": record.at, "head": record.seq}
        if isinstance(record.fact, TURN_OPENERS):
            change["n_open_turns"] = self.n_open_turns + 1
        match record.fact:
            case UserMessage() | AssistantMessage():
                change["n_messages"] = self.n_messages + 1
            case ModelCalled(usage=usage, cost_usd=cost_usd):
                change["usage"] = self.usage + usage if usage else self.usage
                change["spend_usd"] = self.spend_usd + (cost_usd or 0.0)
                change["n_unpriced"] = self.n_unpriced + (cost_usd is None)
            case ApprovalRequested(asks=asks):
                change["pending"] = asks
            case ApprovalDecided(decisions=decisions):
                change["pending"] = self._pending_without({d.tool_call_id for d in decisions})
            case ToolStarted(tool_call_id=call) | ToolFinished(tool_call_id=call):
                change["pending"] = self._pending_without({call})
            case Rewound(n_messages=n_messages):
                change |= {"n_messages": n_messages, "pending": ()}
            case ModelSwitched(model=model):
                change["model"] = model
            case TurnEnded():
                change["n_open_turns"] = self.n_open_turns - 1
            case SessionClosed():
                change |= {"closed": True, "pending": ()}
            case _:
                pass
        return self.model_copy(update=change)

    def _pending_without(self, calls: set[str]) -> tuple[Ask, ...]:
        return tuple(ask for ask in self.pending if ask.tool_call_id not in calls)

    @classmethod
    def opened(cls, fact: SessionOpened, at: datetime, epoch: int = 0) -> Self:
        return cls(
            epoch=epoch,
            session_id=fact.session_id,
            user_id=fact.user_id,
            agent=fact.agent,
            title=fact.title,
            model=fact.model,
            created_at=at,
            updated_at=at,
        )


class RowPage(NamedTuple):
    rows: tuple[SessionRow, ...]
    next: str | None
    """Pass it as `after` for the next page; None: this was the last."""


class Checkpoint(NamedTuple):
    """What folding a session's records up to `seq` gave. Derived: without it a waking session reads
    all its records, and nothing else is different."""

    seq: int
    code: str
    """What folded it: to another code it says nothing."""
    body: str


class Replay(NamedTuple):
    checkpoint: Checkpoint | None
    records: tuple[Record, ...]
    """What follows it, or the first ones; at most a page."""


class Journal(Protocol):
    """Safe to use from many tasks of one loop; implementations say what holds across processes.

    Any call may raise JournalFault (the store failed, or the journal is closed). A call that was
    cancelled was carried out whole or not at all, and before whatever is asked next of the same
    journal. Facts that one call writes share one instant, and `at` never falls within a session.
    """

    async def create(
        self, opened: SessionOpened, *more: Fact, epoch: int = 0
    ) -> tuple[Record, ...]:
        """Begin a session with its first facts. Durable when it returns. With an `epoch` it is taken at
        the same time, as by `fence`.

        Raises:
            SessionExists: `opened.session_id` is taken, or was deleted: an id never comes back, or
                a writer left over from its first life would find its epoch again. Nothing was
                written.
            ValueError: as for `append`.
        """
        ...

    async def fence(self, session_id: str) -> int:
        """Take the session: its epoch rises by one and is returned. Writers before are out.

        Raises:
            NoSuchSession
        """
        ...

    async def append(
        self,
        session_id: str,
        epoch: int,
        facts: Sequence[Fact],
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Record, ...]:
        """Write facts, all or none. Durable when it returns. Cancelling leaves all or none.

        No facts: a check of the epoch. Epoch 0 is current until the first `fence`. With facts a
        `checkpoint` of records before them takes the place of the session's last one.

        Raises:
            Fenced: `epoch` is not the current one; nothing was written.
            MessageKnown: a command's `message_id` was recorded in this session before; nothing
                was written. Carries `seq`, the earlier record's.
            NoSuchSession
            JournalFault: the store failed; whether the facts were written is not known.
            ValueError: two of the facts share a `message_id`, or one holds what JSON cannot.
        """
        ...

    async def read(
        self, session_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[Record, ...]:
        """Records with `seq > after` in order, at most `limit`. Empty past the head.

        Raises:
            NoSuchSession
        """
        ...

    async def replay(self, session_id: str, code: str, *, limit: int = 1000) -> Replay:
        """What a session that wakes begins with: its checkpoint, if it is of this `code`, and the
        first `limit` records behind it. Go on with `read`.

        Raises:
            NoSuchSession
        """
        ...

    async def command(self, session_id: str, message_id: str) -> Record | None:
        """The record of the command with this key. None: there is none, or no such session."""
        ...

    async def row(self, session_id: str) -> SessionRow:
        """
        Raises:
            NoSuchSession
        """
        ...

    async def rows(self, user_id: str, *, limit: int, after: str | None = None) -> RowPage:
        """A user's sessions, newest created first, closed ones too.

        Sessions that are created while someone pages do not move the pages that follow.

        Raises:
            ValueError: `after` is not a `next` of this method, or `limit` is below 1.
        """
        ...

    async def unrested(self, *, limit: int, after: str | None = None) -> RowPage:
        """Sessions of all users that are not closed and have an open turn, oldest created first.

        A session that comes to rest while someone pages does not move the pages that follow.

        Raises:
            ValueError: as for `rows`.
        """
        ...

    async def keep_secret(self, session_id: str, sealed: bytes | None) -> None:
        """Keep one sealed secret beside a session, in place of the one before; None: none any more.
        It goes with the session. The store never sees it open (`agent.vault`).

        Raises:
            NoSuchSession
        """
        ...

    async def secret(self, session_id: str) -> bytes | None:
        """
        Raises:
            NoSuchSession
        """
        ...

    async def delete(self, session_id: str) -> None:
        """Remove a session, all its records and its secret. Quota charges stay.

        Raises:
            NoSuchSession
        """
        ...

    async def charge_quota(
        self, user_id: str, group: str, session_id: str, *, day: date, limit: int
    ) -> bool:
        """Count a session against a user's daily quota for a group of models, check and take in one.

        A session counts once per group for ever: charging it again is True and changes nothing.
        False: `limit` other sessions were charged on that day; nothing was written.
        """
        ...

    async def close(self) -> None:
        """Let the store go, after what was asked before. Idempotent."""
        ...


PAGE = 1000
"""Records that are read at once where all are wanted."""


async def read_all(journal: Journal, session_id: str, *, after: int = 0) -> list[Record]:
    """Every record after `after`, read in pages.

    Raises:
        NoSuchSession
    """
    records: list[Record] = []
    while page := await journal.read(session_id, after=after, limit=PAGE):
        records.extend(page)
        after = page[-1].seq
        if len(page) < PAGE:
            break
    return records


def row_of(records: Sequence[Record]) -> SessionRow:
    """The row of a session, of all its records.

    Raises:
        ValueError: they do not begin with its opening.
    """
    first = records[0].fact if records else None
    if not isinstance(first, SessionOpened):
        raise ValueError("the first record is no SessionOpened")  # noqa: TRY004  the value is wrong
    row = SessionRow.opened(first, records[0].at, records[-1].epoch)
    for record in records:
        row = row.after(record)
    return row


def utc_now() -> datetime:
    return datetime.now(UTC)


def encoded(facts: Sequence[Fact]) -> list[str]:
    """One line of JSON for each fact, as `FACT.validate_json` reads it.

    Raises:
        ValueError: two of the facts share a `message_id`, or one holds what JSON cannot.
    """
    keys = message_ids(facts)
    if len(set(keys)) < len(keys):
        raise ValueError("two facts of one append share a message_id")
    return [fact.model_dump_json() for fact in facts]


def message_ids(facts: Sequence[Fact]) -> list[str]:
    return [f.message_id for f in facts if isinstance(f, Command) and f.message_id is not None]


class PageKey(NamedTuple):
    """Where a page of `rows` ended: behind `next`."""

    created_at: datetime
    session_id: str

    @classmethod
    def of(cls, row: SessionRow) -> Self:
        return cls(row.created_at, row.session_id)

    def __str__(self) -> str:
        text = json.dumps([self.created_at.isoformat(), self.session_id])
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Raises:
            ValueError: the text is not `str()` of a key.
        """
        padded = text.encode("ascii") + b"=" * (-len(text) % 4)
        match json.loads(base64.b64decode(padded, altchars=b"-_", validate=True)):
            case [str(created_at), str(session_id)]:
                key = cls(datetime.fromisoformat(created_at), session_id)
            case _:
                raise ValueError(text)
        if key.created_at.tzinfo is None:
            raise ValueError(text)
        return key


def page_of(rows: Sequence[SessionRow], limit: int) -> RowPage:
    """The page, of rows that were asked for with one more than `limit`."""
    shown = tuple(rows[:limit])
    return RowPage(shown, str(PageKey.of(shown[-1])) if len(rows) > limit else None)
