"""`NodeJournal`: the journal as a session's process reaches it, through the actor of its node."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, Self

import ray
from ray.exceptions import RayError

from actors.detached import Detached, kept
from actors.node import Refused, node_actor
from actors.remote import answer
from actors.settings import ActorsSettings
from agent.events import Fact, Record, SessionOpened
from agent.faults import Fault, JournalFault
from agent.journal import Checkpoint, Replay, RowPage, SessionRow
from agent.settings import AgentSettings

MARGIN_S = 5.0
"""For the way to the node's actor and back, and for its restart, beside the journal's own limit."""
CLOSE_WAIT_S = 5.0
ONCE = frozenset({"create", "append", "delete"})
"""Not asked again when the node's actor dies under them: a second try would find the first one's work
and say that it failed. The others may be carried out twice; for `fence` that skips an epoch."""


class NodeJournal:
    """Implements `agent.journal.Journal`.

    Ray runs the calls of one caller on an async actor in any order, so those that concern one session
    are asked one after another; what concerns none waits for all. Each runs to its end though its caller
    is cancelled. A call under way when the node's actor dies is a JournalFault unless it may be
    repeated; later ones wait for the next actor.
    """

    def __init__(self, find: Callable[[], Any], *, timeout_s: float) -> None:
        """`find` gives the handle of the node's actor and may block. `timeout_s` is the limit of each
        call, from when those before it are done."""
        self._find = find
        self._timeout_s = timeout_s
        self._actor: Any = None
        self._tasks = Detached()
        self._last: dict[str, asyncio.Task[Any]] = {}
        """By session: what its next call waits for. Bounded by the callers and, where those left, by
        the calls' limit."""
        self._closed = False

    @classmethod
    def here(cls, generation: str, agent: AgentSettings, actors: ActorsSettings) -> Self:
        """Through the actor of the node that this process runs on, of the same code as this process."""
        node_id: str = ray.get_runtime_context().get_node_id()
        return cls(
            lambda: node_actor(node_id, generation, agent, actors),
            timeout_s=agent.journal.timeout_s + MARGIN_S,
        )

    async def create(
        self, opened: SessionOpened, *more: Fact, epoch: int = 0
    ) -> tuple[Record, ...]:
        return await self._ask("create", opened.session_id, opened, *more, epoch=epoch)

    async def fence(self, session_id: str) -> int:
        return await self._ask("fence", session_id, session_id)

    async def append(
        self,
        session_id: str,
        epoch: int,
        facts: Sequence[Fact],
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Record, ...]:
        return await self._ask("append", session_id, session_id, epoch, facts, checkpoint)

    async def read(
        self, session_id: str, *, after: int = 0, limit: int = 1000
    ) -> tuple[Record, ...]:
        return await self._ask("read", session_id, session_id, after=after, limit=limit)

    async def replay(self, session_id: str, code: str, *, limit: int = 1000) -> Replay:
        return await self._ask("replay", session_id, session_id, code, limit=limit)

    async def command(self, session_id: str, message_id: str) -> Record | None:
        return await self._ask("command", session_id, session_id, message_id)

    async def row(self, session_id: str) -> SessionRow:
        return await self._ask("row", session_id, session_id)

    async def rows(self, user_id: str, *, limit: int, after: str | None = None) -> RowPage:
        return await self._ask("rows", None, user_id, limit=limit, after=after)

    async def unrested(self, *, limit: int, after: str | None = None) -> RowPage:
        return await self._ask("unrested", None, limit=limit, after=after)

    async def keep_secret(self, session_id: str, sealed: bytes | None) -> None:
        await self._ask("keep_secret", session_id, session_id, sealed)

    async def secret(self, session_id: str) -> bytes | None:
        return await self._ask("secret", session_id, session_id)

    async def delete(self, session_id: str) -> None:
        await self._ask("delete", session_id, session_id)

    async def charge_quota(
        self, user_id: str, group: str, session_id: str, *, day: date, limit: int
    ) -> bool:
        return await self._ask(
            "charge_quota", session_id, user_id, group, session_id, day=day, limit=limit
        )

    async def close(self) -> None:
        """The node's journal stays open, for the others."""
        self._closed = True
        if self._last:
            await asyncio.wait(self._last.values())
        await self._tasks.close(CLOSE_WAIT_S)

    async def _ask(self, method: str, session_id: str | None, *args: Any, **options: Any) -> Any:
        if self._closed:
            raise JournalFault("The journal is closed.")
        before = self._last.get(session_id) if session_id else None
        waits_for = [before] if before else [] if session_id else list(self._last.values())
        call = self._tasks.start(self._called(waits_for, method, args, options), name=method)
        if session_id:
            self._last[session_id] = call
            call.add_done_callback(lambda done: self._forget(session_id, done))
        return await kept(call)

    def _forget(self, session_id: str, call: asyncio.Task[Any]) -> None:
        if self._last.get(session_id) is call:
            del self._last[session_id]

    async def _called(
        self, before: list[asyncio.Task[Any]], method: str, args: Any, options: Any
    ) -> Any:
        if before:
            await asyncio.wait(before)
        lost = JournalFault("The journal of this node does not answer.")
        try:
            actor = await self._found(lost)
            way = actor.journal.options(max_task_retries=0 if method in ONCE else -1)
            result = await answer(way.remote(method, args, options), lost, self._timeout_s)
        except JournalFault as fault:
            if fault is lost:
                self._actor = None  # its name may belong to a new one by now
            raise
        except Fault as fault:
            raise lost from fault
        match result:
            case Refused(detail):
                raise ValueError(detail)
            case _:
                return result

    async def _found(self, lost: JournalFault) -> Any:
        if self._actor is None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    self._actor = await asyncio.to_thread(self._find)
            except (RayError, ValueError, TimeoutError) as cause:
                raise lost from cause
        return self._actor
