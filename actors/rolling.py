"""Moves what lives on hosts of an older version of the code to new ones, a few at a time.

What is outdated is asked for again and again and never remembered, so a manager that died in the middle
goes on where it was.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator

import structlog

from agent.faults import Fault

log = structlog.get_logger()

MAX_AT_ONCE = 8
"""Sessions that move at the same time: each may wait `drain_s` for its step, and each that goes on
starts a process."""


async def roll(
    outdated: Callable[[], Iterable[str]], move: Callable[[str], Awaitable[None]], *, every_s: float
) -> None:
    """Move session after session until none is outdated; one that would not go is asked again after
    `every_s`."""
    while due := list(outdated()):
        rest = iter(due)
        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_AT_ONCE):
                group.create_task(_move_all(rest, move))
        if list(outdated()):
            await asyncio.sleep(every_s)


async def _move_all(due: Iterator[str], move: Callable[[str], Awaitable[None]]) -> None:
    for session_id in due:
        try:
            await move(session_id)
        except Fault as fault:
            log.warning("roll_put_off", session_id=session_id, code=fault.code)
        except Exception:
            log.exception("roll_failed", session_id=session_id)
