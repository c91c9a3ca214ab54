"""Sees that every open turn has an activation that works at it.

The journal says what is owed, the desk says what lives; what is owed and does not live is brought to
life. The look is repeated, so nothing needs to be remembered: a death that nobody saw, a manager that
died in the middle and a store that was away all end here. Deaths that are seen are told by `soon`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import structlog

from agent.faults import Fault
from agent.journal import Journal

log = structlog.get_logger()

PAGE = 256
MAX_AT_ONCE = 8
"""Sessions that are brought back at the same time; behind them wait the rest of a page."""


class Recovery:
    """
    Args:
        resume: takes a session whose turn is open to a host, unless it lives; may raise a Fault.
        every_s: between two looks.
    """

    def __init__(
        self, journal: Journal, resume: Callable[[str], Awaitable[None]], *, every_s: float
    ) -> None:
        self._journal = journal
        self._resume = resume
        self._every_s = every_s
        self._nudged = asyncio.Event()

    def nudge(self) -> None:
        """Look again now: a slot was freed, or something was missed."""
        self._nudged.set()

    async def run(self) -> None:
        """Look, wait, look again, until cancelled."""
        while True:
            self._nudged.clear()
            try:
                await self.sweep()
            except Fault as fault:
                log.warning("recovery_sweep_failed", code=fault.code)
            try:
                async with asyncio.timeout(self._every_s):
                    await self._nudged.wait()
            except TimeoutError:
                continue

    async def sweep(self) -> None:
        """Bring back everything that is owed; what cannot be now waits for the next look.

        Raises:
            JournalFault
        """
        after: str | None = None
        while True:
            page = await self._journal.unrested(limit=PAGE, after=after)
            due = iter([row.session_id for row in page.rows])
            async with asyncio.TaskGroup() as group:
                for _ in range(MAX_AT_ONCE):
                    group.create_task(self._bring(due))
            if page.next is None:
                return
            after = page.next

    async def _bring(self, due: Iterator[str]) -> None:
        for session_id in due:
            try:
                await self._resume(session_id)
            except Fault as fault:
                log.warning("recovery_put_off", session_id=session_id, code=fault.code)
            except Exception:
                log.exception("recovery_failed", session_id=session_id)
