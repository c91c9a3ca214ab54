"""Sends idle sessions away: those idle for long, and earlier where a node's memory is short.

Nothing is remembered but which nodes are tight: whoever is due is read off the ledger every time, the
longest idle first. Few leave at a time, so that neither the journal nor a node is overrun; where memory
is short the next are chosen when a report shows what the last ones gave back.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice, takewhile

import structlog

from actors.detached import Detached
from actors.ledger import Lease, Ledger
from actors.memory import NodeMemory
from agent.events import PassivationReason
from agent.faults import Fault

log = structlog.get_logger()

LOOK_S = 2.0
"""Between two looks for sessions that have become due."""
MAX_AT_ONCE = 8
"""Sessions that leave for having been idle, at the same time: each closes a sandbox and saves files."""
MAX_PER_NODE = 4
"""Sessions of one node that leave for want of memory, at the same time and for one report."""
RELIEF = 0.05
"""Below `memory_high` by this much, a node is not tight any more: at the limit itself sessions would
leave and wake in turn."""
SPARED_S = 5.0
"""Idle for less, a session stays even where memory is short: somebody is about to answer it, or it was
asked a moment ago and would not go."""


class Idling:
    """
    Args:
        leave: sends a session away and gives its slot back; defers it in the ledger if it would not
            go. May raise a Fault.
        idle_s: None: nobody leaves for having been idle.
    """

    def __init__(
        self,
        ledger: Ledger,
        leave: Callable[[Lease, PassivationReason], Awaitable[None]],
        *,
        idle_s: float | None,
        memory_high: float,
        now_s: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._leave = leave
        self._idle_s = idle_s
        self._memory_high = memory_high
        self._now_s = now_s
        self._tasks = Detached()
        self._leaving: dict[Lease, PassivationReason] = {}
        self._tight: set[str] = set()
        self._left = asyncio.Event()

    async def run(self) -> None:
        """Send away who has been idle for `idle_s`, until cancelled."""
        look_s = min(LOOK_S, self._idle_s or LOOK_S)
        while True:
            self._send_idle()
            try:
                async with asyncio.timeout(look_s):
                    await self._left.wait()
            except TimeoutError:
                continue

    def note_memory(self, node: str, memory: NodeMemory) -> None:
        """What a node reports of itself: while it is tight, its longest idle sessions leave."""
        is_tight = memory.share >= self._memory_high - RELIEF * (node in self._tight)
        if is_tight != (node in self._tight):
            self._tight ^= {node}
            log.warning("node_memory_short" if is_tight else "node_memory_relieved", node=node)
        if is_tight:
            n_leaving = sum(lease.node == node for lease in self._leaving)
            due = self._due(SPARED_S, on=node)
            self._send(islice(due, max(0, MAX_PER_NODE - n_leaving)), "memory")

    async def close(self, wait_s: float) -> None:
        await self._tasks.close(wait_s)

    def _due(self, idle_s: float, *, on: str | None = None) -> Iterator[Lease]:
        before_s = self._now_s() - idle_s
        resting = self._ledger.longest_idle(on=on)
        due = takewhile(lambda lease: (lease.idle_since_s or 0.0) <= before_s, resting)
        return (lease for lease in due if lease not in self._leaving)

    def _send_idle(self) -> None:
        self._left.clear()
        n_idle = sum(reason == "idle" for reason in self._leaving.values())
        if self._idle_s is not None:
            self._send(islice(self._due(self._idle_s), MAX_AT_ONCE - n_idle), "idle")

    def _send(self, due: Iterator[Lease], reason: PassivationReason) -> None:
        for lease in list(due):
            self._leaving[lease] = reason
            self._tasks.start(self._send_one(lease, reason), name="idle")

    async def _send_one(self, lease: Lease, reason: PassivationReason) -> None:
        try:
            await self._leave(lease, reason)
        except Fault as fault:
            self._ledger.defer(lease)
            log.warning("passivation_put_off", session_id=lease.session_id, code=fault.code)
        except Exception:
            self._ledger.defer(lease)
            log.exception("passivation_put_off", session_id=lease.session_id)
        finally:
            del self._leaving[lease]
            self._left.set()
