"""Tasks that outlive the request that caused them.

When an HTTP client leaves, Ray cancels the request's actor task and, recursively, every actor call that
was made in its context, also through `create_task` and `shield` (2.60). Work that must go on therefore
runs in a task with an empty context: Ray then counts its calls as the actor's own.
"""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def spawn(work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
    """Start `work` outside any request. The caller owns the task: keep it, end it, await it."""
    return asyncio.get_running_loop().create_task(work, name=name, context=contextvars.Context())


async def kept(task: asyncio.Task[T]) -> T:
    """The task's result. It goes on when we are cancelled; its result is then dropped."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_retrieved)
        raise


class Detached:
    """Owns such tasks until they end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        task = spawn(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def carry_out(self, work: Callable[[], Coroutine[Any, Any, T]], *, name: str) -> T:
        """Run `work` to its end even when the caller is cancelled; its result is then dropped.

        Whatever `work` changes is therefore changed wholly or not at all, as seen from outside.
        """
        return await kept(self.start(work(), name=name))

    async def close(self, wait_s: float) -> bool:
        """Cancel what still runs and wait for it. False: something runs on after `wait_s`."""
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
            task.add_done_callback(_retrieved)
        return not tasks or not (await asyncio.wait(tasks, timeout=wait_s))[1]


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Nobody waits for this result any more: take its exception, so that asyncio does not report it."""
    if not task.cancelled():
        task.exception()
