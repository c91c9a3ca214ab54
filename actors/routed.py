"""`Sessions` over a desk and the hosts it routes to: what is the same with Ray and without.

Commands go to where the session lives; a route is a hint, so `Moved` asks the desk again. Every command
gets a `message_id`, so asking again is safe even when a host died after it had written.
Reads of rows, messages and trajectories come from the journal; they wake nobody.
"""

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from actors.commands import answered
from actors.desk import Route
from actors.feed import MAX_STORED, page_of
from actors.kit import Kit
from actors.protocol import (
    Accepted,
    AnyCommand,
    CapacityView,
    Close,
    Conflict,
    Invalid,
    Moved,
    NotFound,
    Open,
    PendingApproval,
    Principal,
    SessionList,
    SessionView,
    Status,
    Unavailable,
)
from agent.context import Answer, Context
from agent.events import Cursor, Page
from agent.faults import JournalFault, NoSuchSession
from agent.journal import SessionRow, read_all
from agent.jsontext import parsed
from agent.trace import trajectory

MAX_ROUTES = 4
"""Tries to reach a session that moves while it is called."""
MAX_REMEMBERED = 10_000
"""Routes; the oldest are asked for again."""


class DeskPort(Protocol):
    """The desk as `RoutedSessions` sees it."""

    async def open(self, who: Principal, command: Open) -> SessionRow: ...
    async def wake(
        self, who: Principal, session_id: str, *, not_at: Route | None = None
    ) -> Route: ...
    async def find(self, session_id: str) -> Route | None: ...
    async def when_live(
        self, session_id: str, wait_s: float, *, not_at: Route | None = None
    ) -> Route | None: ...
    async def close_session(
        self, who: Principal, session_id: str, command: AnyCommand
    ) -> Accepted: ...
    async def delete(self, who: Principal, session_id: str) -> None: ...
    async def live_among(self, session_ids: Iterable[str]) -> frozenset[str]: ...
    async def capacity(self, who: Principal) -> CapacityView: ...


class Stage(Protocol):
    """A host as `RoutedSessions` sees it. A call raises Moved when the session is not there, the host
    is dead, or nobody knows whether the call arrived."""

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted: ...

    def pages(
        self,
        who: Principal,
        session_id: str,
        cursor: Cursor,
        *,
        turn: int | None = None,
        follow: bool = True,
    ) -> AsyncGenerator[Page]: ...


class RoutedSessions(ABC):
    """Implements `actors.protocol.Sessions`. Subclasses say how to reach a host."""

    def __init__(self, desk: DeskPort, kit: Kit) -> None:
        self._desk = desk
        self._kit = kit
        self._journal = kit.journal
        self._routes: dict[str, Route] = {}

    @abstractmethod
    def _stage(self, route: Route) -> Stage:
        """The host that a route names; it need not live any more."""

    # -- commands ----------------------------------------------------------------------------

    async def open(self, who: Principal, command: Open) -> SessionView:
        row = await self._desk.open(who, command)
        [view] = await self._views([row])
        return view

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        if command.message_id is None:
            command = command.model_copy(update={"message_id": uuid.uuid4().hex})
        # Who is known to live somewhere is checked there: owner and state, without a look into the journal.
        route = None if isinstance(command, Close) else self._routes.get(session_id)
        wrong: Route | None = None
        for _ in range(MAX_ROUTES):
            try:
                if route is None:
                    if (await self._owned(who, session_id)).closed:
                        return await self._answered_by_closed(session_id, command)
                    if isinstance(command, Close):
                        return await self._desk.close_session(who, session_id, command)
                    route = await self._desk.wake(who, session_id, not_at=wrong)
                    self._remember(session_id, route)
                return await self._stage(route).submit(who, session_id, command)
            except Moved:
                wrong, route = route, None
                self._routes.pop(session_id, None)
        raise Unavailable("The session keeps moving; try again.", retry_after_s=1)

    def _remember(self, session_id: str, route: Route) -> None:
        while len(self._routes) >= MAX_REMEMBERED:
            del self._routes[next(iter(self._routes))]
        self._routes[session_id] = route

    async def _answered_by_closed(self, session_id: str, command: AnyCommand) -> Accepted:
        record = await self._journal.command(session_id, command.message_id or "")
        if record is None:
            raise Conflict("The session is closed.")
        return answered(Answer.of(record), command)

    async def delete(self, who: Principal, session_id: str) -> None:
        await self._desk.delete(who, session_id)

    # -- the stream --------------------------------------------------------------------------

    async def pages(
        self,
        who: Principal,
        session_id: str,
        cursor: Cursor,
        *,
        turn: int | None = None,
        follow: bool = True,
    ) -> AsyncGenerator[Page]:
        route, is_checked = self._routes.get(session_id), False
        wrong: Route | None = None
        while True:
            if route is None and not is_checked:
                await self._owned(who, session_id)
                is_checked = True
                route = None if wrong else await self._desk.find(session_id)
            source = (
                self._stage(route).pages(who, session_id, cursor, turn=turn, follow=follow)
                if route
                else self._stored(session_id, cursor, turn)
            )
            try:
                async with aclosing(source) as pages:
                    async for page in pages:
                        cursor, is_checked = page.cursor, True
                        yield page
                        if page.end:
                            return
            except (Moved, Unavailable):
                wrong, route = route, None  # it left or died: the journal has the facts
                self._routes.pop(session_id, None)
                continue
            except (NotFound, NoSuchSession):
                if not is_checked:
                    raise
                yield Page((), cursor, end=True)  # it was there when we began
                return
            if not follow and await self._is_at_head(session_id, cursor):
                return
            if route is None:
                yield Page((), cursor)
                wait_s = self._kit.actors.page_wait_s
                route = await self._desk.when_live(session_id, wait_s, not_at=wrong)
                if route is not None and route == wrong:
                    return  # it is there and does not answer: the reader comes back later
            else:
                found = await self._desk.find(session_id)
                route = found if found == route else None  # if it moved, the journal first

    async def _stored(
        self, session_id: str, cursor: Cursor, turn: int | None
    ) -> AsyncGenerator[Page]:
        """Pages from the journal, up to its head."""
        row = await self._journal.row(session_id)  # first: what it says is read below
        while records := await self._journal.read(session_id, after=cursor.seq, limit=MAX_STORED):
            page = page_of(records, cursor, turn)
            cursor = page.cursor
            yield page
        if row.closed or (turn is not None and not row.n_open_turns):
            yield Page((), cursor, end=True)

    async def _is_at_head(self, session_id: str, cursor: Cursor) -> bool:
        try:
            return cursor.seq >= (await self._journal.row(session_id)).head
        except NoSuchSession:
            return True

    # -- reads -------------------------------------------------------------------------------

    async def view(self, who: Principal, session_id: str) -> SessionView:
        [view] = await self._views([await self._owned(who, session_id)])
        return view

    async def owned(self, who: Principal, *, limit: int, after: str | None) -> SessionList:
        try:
            page = await self._journal.rows(who.user_id, limit=limit, after=after)
        except ValueError as cause:
            raise Invalid("`after` is no place in this list.") from cause
        return SessionList(tuple(await self._views(page.rows)), page.next)

    async def messages(self, who: Principal, session_id: str) -> list[dict[str, Any]]:
        await self._owned(who, session_id)
        return (await self._folded(session_id)).messages()

    async def trajectory(self, who: Principal, session_id: str) -> dict[str, Any]:
        await self._owned(who, session_id)
        records = await read_all(self._journal, session_id)
        tools = self._kit.tools(records[0].fact.spec).schemas()
        return await asyncio.to_thread(trajectory, records, tools=tools)

    async def capacity(self, who: Principal) -> CapacityView:
        return await self._desk.capacity(who)

    async def ready(self) -> bool:
        try:
            await self._desk.capacity(Principal("readiness"))
            await self._journal.rows("readiness", limit=1)
        except (Unavailable, JournalFault):
            return False
        return True

    async def _owned(self, who: Principal, session_id: str) -> SessionRow:
        try:
            row = await self._journal.row(session_id)
        except NoSuchSession:
            raise NotFound("There is no such session.") from None
        if row.user_id != who.user_id:
            raise NotFound("There is no such session.")
        return row

    async def _folded(self, session_id: str) -> Context:
        context = Context(lambda _: False)
        try:
            context.fold(await read_all(self._journal, session_id))
        except NoSuchSession:
            raise NotFound("There is no such session.") from None
        return context

    async def _views(self, rows: Iterable[SessionRow]) -> list[SessionView]:
        rows = list(rows)
        live = await self._desk.live_among([row.session_id for row in rows])
        return [view_of(row, is_live=row.session_id in live) for row in rows]


def view_of(row: SessionRow, *, is_live: bool) -> SessionView:
    pending = tuple(
        PendingApproval(
            tool_call_id=ask.tool_call_id,
            tool=ask.tool,
            arguments=_parsed(ask.arguments),
            reason=ask.reason,
        )
        for ask in row.pending
    )
    return SessionView(
        session_id=row.session_id,
        user_id=row.user_id,
        title=row.title,
        model=row.model,
        agent=row.agent,
        status=_status(row, is_live=is_live),
        created_at=row.created_at,
        updated_at=row.updated_at,
        n_messages=row.n_messages,
        pending_approval=pending or None,
        usage=row.usage,
        spend_usd=row.spend_usd,
        n_unpriced=row.n_unpriced,
        cursor=str(Cursor(row.head)),
    )


def _status(row: SessionRow, *, is_live: bool) -> Status:
    """Nothing is "running" without an owner."""
    if row.closed:
        return "closed"
    if is_live and row.n_open_turns:
        return "running"
    if row.pending and not row.n_open_turns:
        return "waiting_approval"
    return "idle" if is_live else "passive"


def _parsed(arguments: str) -> Any:
    try:
        return parsed(arguments)
    except ValueError:
        return arguments
