"""`MemorySessions`: the `Sessions` protocol over plain lists, for tests of the edge alone.

No agent and no cluster: a turn is written down at once, as its text says. `echo ...` answers and is
done, `hold ...` runs until it is interrupted, `ask ...` rests on an approval. Owners, queues of
readers, idempotency and conflicts are real.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from actors.protocol import (
    Accepted,
    AnyCommand,
    AtCapacity,
    CapacityView,
    Close,
    Compact,
    Conflict,
    Count,
    Decide,
    Interrupt,
    Invalid,
    LaneCount,
    NotFound,
    Open,
    PendingApproval,
    Principal,
    QueueFull,
    Seed,
    SendMessage,
    SessionList,
    SessionView,
    SwitchModel,
    Truncate,
    Undo,
)
from agent.events import (
    ApprovalDecided,
    ApprovalRequested,
    Ask,
    AssistantMessage,
    CompactionRequested,
    Cursor,
    Fact,
    Frame,
    InterruptRequested,
    ModelSwitched,
    Page,
    Record,
    Rewound,
    SeedRequested,
    SessionClosed,
    ToolFinished,
    TurnEnded,
    Usage,
    UserMessage,
    wire,
)

BEGAN_AT = datetime(2026, 1, 1, tzinfo=UTC)


class MemorySession:
    def __init__(self, session_id: str, user_id: str, command: Open) -> None:
        self.session_id = session_id
        self.user_id = user_id
        self.command = command
        self.model = command.model or "scripted/echo"
        self.records: list[Record] = []
        self.answers: dict[str, tuple[type, Accepted]] = {}
        self.turn = 0
        self.running = False
        self.pending: tuple[Ask, ...] = ()
        self.closed = False
        self.deleted = False
        self.grew = asyncio.Event()
        self.n_readers = 0

    def write(self, *facts: Fact) -> None:
        for fact in facts:
            seq = len(self.records) + 1
            self.records.append(Record(seq, 1, BEGAN_AT + timedelta(seconds=seq), fact))
        self.wake()

    async def readers(self, n: int) -> None:
        """Wait until so many read."""
        async with asyncio.timeout(5):
            while self.n_readers != n:
                await self.grew.wait() if n < self.n_readers else await asyncio.sleep(0)

    def wake(self) -> None:
        self.grew.set()
        self.grew = asyncio.Event()

    @property
    def cursor(self) -> str:
        return str(Cursor(len(self.records), 1, len(self.records)))

    def users(self) -> list[UserMessage]:
        cut = 10**9
        kept: list[UserMessage] = []
        for record in reversed(self.records):
            if isinstance(record.fact, Rewound):
                cut = min(cut, record.fact.to)
            elif isinstance(record.fact, UserMessage) and record.fact.turn <= cut:
                kept.append(record.fact)
        return kept[::-1]

    def carry_out(self, command: AnyCommand) -> Accepted:
        known = self.answers.get(command.message_id or "")
        if known is not None:
            if known[0] is not type(command):
                raise Conflict("This message_id belongs to another command.")
            return known[1]
        if self.closed:
            raise Conflict("The session is closed.")
        turn, seq, n_messages = self._apply(command)
        accepted = Accepted(turn, str(Cursor(seq, 1, seq)), n_messages)
        if command.message_id is not None:
            self.answers[command.message_id] = (type(command), accepted)
        return accepted

    def _apply(self, command: AnyCommand) -> tuple[int, int, int | None]:  # noqa: PLR0911, PLR0912 - a case per command
        """Turn, the seq of the command's own fact, and Seed's count."""
        seq = len(self.records) + 1
        match command:
            case SendMessage(text=text):
                return self._send(text)
            case Decide(decisions=decisions):
                pending = {ask.tool_call_id for ask in self.pending}
                if not {d.tool_call_id for d in decisions} <= pending:
                    raise Conflict("This call is not pending.")
                self.pending = ()
                turn = self._opened(ApprovalDecided, decisions=decisions)
                self.write(TurnEnded(turn=turn, reason="done"))
                return turn, seq, None
            case Interrupt():
                if not self.running:
                    raise Conflict("No turn runs.")
                self.running = False
                self.write(
                    InterruptRequested(turn=self.turn),
                    TurnEnded(turn=self.turn, reason="interrupted"),
                )
                return self.turn, seq, None
            case Undo():
                return self._rewound(len(self.users()) - 1, Conflict), seq, None
            case Truncate(user_message_index=index):
                return self._rewound(index, Invalid), seq, None
            case Compact():
                if not self.users():
                    raise Conflict("There is nothing to compact.")
                turn = self._opened(CompactionRequested)
                self.write(TurnEnded(turn=turn, reason="done"))
                return turn, seq, None
            case SwitchModel(model=model):
                self.model = model
                self.write(ModelSwitched(model=model))
                return 0, seq, None
            case Seed(messages=messages):
                good = tuple(m for m in messages if isinstance(m, dict) and "role" in m)
                if not good:
                    raise Invalid("No message is well-formed.")
                turn = self._opened(
                    SeedRequested, messages=good, n_dropped=len(messages) - len(good)
                )
                self.write(TurnEnded(turn=turn, reason="done"))
                return turn, seq, len(good)
            case Close():
                self.closed = True
                self.write(SessionClosed())
                return 0, seq, None

    def _opened(self, kind: type[Fact], **fields: Any) -> int:
        self.turn += 1
        self.write(kind(turn=self.turn, **fields))
        return self.turn

    def _send(self, text: str) -> tuple[int, int, None]:
        for ask in self.pending:
            self.write(
                ToolFinished(
                    turn=self.turn,
                    tool_call_id=ask.tool_call_id,
                    tool=ask.tool,
                    outcome="denied",
                    text="denied",
                )
            )
        self.pending = ()
        seq = len(self.records) + 1
        turn = self._opened(UserMessage, text=text)
        if text.startswith("hold"):
            self.running = True
        elif text.startswith("ask"):
            self.pending = (Ask(tool_call_id=f"call-{turn}", tool="bash", arguments='{"n": 1}'),)
            self.write(
                ApprovalRequested(turn=turn, asks=self.pending),
                TurnEnded(turn=turn, reason="approval"),
            )
        else:
            self.write(
                AssistantMessage(
                    turn=turn, part_id=f"p{turn}", text=text, finish_reason="stop", model=self.model
                ),
                TurnEnded(turn=turn, reason="done"),
            )
        return turn, seq, None

    def _rewound(self, index: int, refusal: type[Conflict | Invalid]) -> int:
        users = self.users()
        if not 0 <= index < len(users):
            raise refusal("There is no such user message.")
        self.write(Rewound(to=users[index].turn - 1, n_messages=2 * index))
        return 0

    def view(self) -> SessionView:
        status = "closed" if self.closed else "running" if self.running else "idle"
        asks = tuple(
            PendingApproval(tool_call_id=a.tool_call_id, tool=a.tool, arguments={"n": 1})
            for a in self.pending
        )
        return SessionView(
            session_id=self.session_id,
            user_id=self.user_id,
            title=self.command.title,
            model=self.model,
            agent=self.command.agent or "default",
            status="waiting_approval" if asks else status,
            created_at=BEGAN_AT,
            updated_at=BEGAN_AT,
            n_messages=len(self.users()),
            pending_approval=asks or None,
            usage=Usage(),
            spend_usd=0.0,
            n_unpriced=0,
            cursor=self.cursor,
        )


class MemorySessions:
    def __init__(
        self,
        *,
        limit: int = 200,
        limit_per_user: int = 10,
        heartbeat_s: float = 10.0,
        max_readers: int = 100,
    ) -> None:
        self.all: dict[str, MemorySession] = {}
        self.opened: dict[tuple[str, str], str] = {}
        self.limit = limit
        self.limit_per_user = limit_per_user
        self.heartbeat_s = heartbeat_s
        self.max_readers = max_readers
        self.is_ready = True
        self._ids = count(1)

    def _own(self, who: Principal, session_id: str) -> MemorySession:
        session = self.all.get(session_id)
        if session is None or session.user_id != who.user_id:
            raise NotFound("There is no such session.")
        return session

    async def open(self, who: Principal, command: Open) -> SessionView:
        known = self.all.get(self.opened.get((who.user_id, command.message_id or ""), ""))
        if known is not None:
            return known.view()
        live = [s for s in self.all.values() if not s.closed]
        own = [s for s in live if s.user_id == who.user_id]
        if len(own) >= self.limit_per_user:
            raise _full("per_user", len(own), self.limit_per_user)
        if len(live) >= self.limit:
            raise _full("global", len(live), self.limit)
        session = MemorySession(f"s-{next(self._ids)}", who.user_id, command)
        self.all[session.session_id] = session
        if command.message_id is not None:
            self.opened[who.user_id, command.message_id] = session.session_id
        return session.view()

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        return self._own(who, session_id).carry_out(command)

    async def pages(
        self,
        who: Principal,
        session_id: str,
        cursor: Cursor,
        *,
        turn: int | None = None,
        follow: bool = True,
    ) -> AsyncGenerator[Page, None]:
        session = self._own(who, session_id)
        if session.n_readers >= self.max_readers:
            raise QueueFull("Too many readers.", limit=self.max_readers, retry_after_s=5)
        session.n_readers += 1
        seen = cursor.seq
        first = True
        try:
            while True:
                grew = session.grew
                fresh = session.records[seen : seen + 20]
                ended = any(_ends(r.fact, turn) for r in fresh) or session.deleted
                seen += len(fresh)
                frames = tuple(_frame(r) for r in fresh if turn in {None, r.fact.turn})
                if frames or ended or first:
                    first = False
                    yield Page(frames, Cursor(seen, 1, seen), end=ended)
                if ended or (not follow and seen >= len(session.records)):
                    return
                if seen >= len(session.records):
                    try:
                        await asyncio.wait_for(grew.wait(), self.heartbeat_s)
                    except TimeoutError:
                        yield Page((), Cursor(seen, 1, seen))
        finally:
            session.n_readers -= 1
            session.wake()

    async def view(self, who: Principal, session_id: str) -> SessionView:
        return self._own(who, session_id).view()

    async def owned(self, who: Principal, *, limit: int, after: str | None) -> SessionList:
        own = [s.view() for s in reversed(self.all.values()) if s.user_id == who.user_id]
        ids = [view.session_id for view in own]
        if after is not None and after not in ids:
            raise Invalid("`after` is no `next` of this list.")
        start = ids.index(after) + 1 if after is not None else 0
        page = own[start : start + limit]
        more = start + limit < len(own)
        return SessionList(tuple(page), page[-1].session_id if more else None)

    async def messages(self, who: Principal, session_id: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": m.text} for m in self._own(who, session_id).users()]

    async def trajectory(self, who: Principal, session_id: str) -> dict[str, Any]:
        session = self._own(who, session_id)
        return {"session_id": session_id, "events": [wire(record) for record in session.records]}

    async def delete(self, who: Principal, session_id: str) -> None:
        session = self._own(who, session_id)
        del self.all[session_id]
        session.deleted = True
        session.wake()

    async def capacity(self, who: Principal) -> CapacityView:
        live = [s for s in self.all.values() if not s.closed]
        own = [s for s in live if s.user_id == who.user_id]
        return CapacityView(
            live=len(live),
            limit=self.limit,
            warm=0,
            user=Count(live=len(own), limit=self.limit_per_user),
            lanes={"interactive": LaneCount(live=len(live)), "bulk": LaneCount(live=0)},
        )

    async def ready(self) -> bool:
        return self.is_ready


def _full(scope: str, live: int, limit: int) -> AtCapacity:
    return AtCapacity("No slot is free.", scope=scope, live=live, limit=limit, retry_after_s=1.5)


def _ends(fact: Fact, turn: int | None) -> bool:
    return isinstance(fact, SessionClosed) or (
        isinstance(fact, TurnEnded) and turn is not None and fact.turn == turn
    )


def _frame(record: Record) -> Frame:
    place = str(Cursor(record.seq, record.epoch, record.seq))
    return Frame(place, record.fact.type, record.fact.turn, json.dumps(wire(record)))
