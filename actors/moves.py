"""Moves of one session happen one after another, in tasks of their own, so that a caller that leaves
breaks nothing off in the middle."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from actors.detached import Detached
from actors.places import queue_full

T = TypeVar("T")

MAX_MOVES = 64
"""Of one session, the one that runs and those behind it. Every command to a session that wakes is one,
also when its caller has left."""


class Moves:
    def __init__(self, tasks: Detached) -> None:
        self._tasks = tasks
        self._last: dict[str, asyncio.Task[Any]] = {}
        """Of each session that is moving."""
        self._n: Counter[str] = Counter()

    def __len__(self) -> int:
        """Sessions that are moving."""
        return len(self._last)

    async def run(self, session_id: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work` once the session's earlier moves are over, to its end."""
        before = self._last.get(session_id)

        async def in_turn() -> T:
            if before is not None:
                await asyncio.wait({before})
            return await work()

        task = self._tasks.start(in_turn(), name="move")
        self._last[session_id] = task
        self._n[session_id] += 1
        task.add_done_callback(lambda done: self._over(session_id, done))
        return await asyncio.shield(task)

    def _over(self, session_id: str, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # the waiting caller has it; one that left does not need it
        self._n[session_id] -= 1
        if not self._n[session_id]:
            del self._n[session_id]
        if self._last.get(session_id) is task:
            del self._last[session_id]

    async def run_asked(self, session_id: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A move that somebody outside asks for.

        Raises:
            QueueFull
        """
        if self._n[session_id] >= MAX_MOVES:
            raise queue_full(MAX_MOVES, "commands wait for the session to move")
        return await self.run(session_id, work)

    async def run_or_join(
        self, session_id: str, work: Callable[[], Coroutine[Any, Any, Any]]
    ) -> None:
        """A move whose result nobody needs: where too many wait, it is enough to wait for the last."""
        if self._n[session_id] < MAX_MOVES:
            await self.run(session_id, work)
        else:
            await asyncio.wait({self._last[session_id]})
