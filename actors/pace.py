"""How often a stream that flows may send, by how many flow beside it.

A send costs the same whether it carries one token or fifty. With few streams each token leaves at once;
with many, what came since the last send leaves together, so the cost per token falls as the load grows
and the process keeps most of its time for other work. An idle stream is never held back: its first
token leaves at once, and nothing wakes while nothing comes.
"""

import asyncio
from collections.abc import Callable

FLOWING_S = 1.0
"""After its last send a stream counts as flowing for this long."""
MAX_WAIT_S = 0.5
"""However many flow: what a person still takes for a stream."""


class Pace:
    """Of the streams of one process.

    Args:
        send_cost_s: CPU that one send costs in all processes that it passes, divided by the share of a
            core that sends may take.
        now_s: a monotonic clock.
    """

    def __init__(self, send_cost_s: float, now_s: Callable[[], float]) -> None:
        self._send_cost_s = send_cost_s
        self._now_s = now_s
        self._sent_s: dict[object, float] = {}
        """When each stream that flows sent last, the longest ago first."""

    @property
    def interval_s(self) -> float:
        """Between two sends of one stream, now."""
        before_s = self._now_s() - FLOWING_S
        while self._sent_s and next(iter(self._sent_s.values())) <= before_s:
            del self._sent_s[next(iter(self._sent_s))]
        return min(MAX_WAIT_S, len(self._sent_s) * self._send_cost_s)

    def wait_s(self, stream: object) -> float:
        """How long `stream` should wait with its next send. 0: it may send now."""
        interval_s = self.interval_s
        sent_s = self._sent_s.get(stream)
        return 0.0 if sent_s is None else max(0.0, sent_s + interval_s - self._now_s())

    def sent(self, stream: object) -> None:
        self._sent_s.pop(stream, None)
        self._sent_s[stream] = self._now_s()

    def ended(self, stream: object) -> None:
        self._sent_s.pop(stream, None)

    async def turn(self, stream: object) -> None:
        """Wait until `stream` may send, and count that it does."""
        if wait_s := self.wait_s(stream):
            await asyncio.sleep(wait_s)
        self.sent(stream)
