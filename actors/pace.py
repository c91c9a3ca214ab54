"""How often a stream that flows may send, by how many flow beside it.

A send costs the same whether it carries one token or fifty. With few streams each token leaves at once;
with many, what came since the last send leaves together, so the cost per token falls as the load grows
and the process keeps most of its time for other work. An idle stream is never held back: its first
token leaves at once, and nothing wakes while nothing comes.
"""

import asyncio
from collections.abc import Callable

FLOWING_S = 0.25
"""After its last send a stream counts as flowing for this long."""
MAX_WAIT_S = 0.1
"""However many flow: what a person still reads as steady."""


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
        self._flowing: dict[object, float] = {}
        """When each stream sent last, the longest ago first."""

    def wait_s(self, stream: object) -> float:
        """How long `stream` should wait with its next send. 0: it may send now."""
        now_s = self._now_s()
        self._forget(now_s)
        sent_s = self._flowing.get(stream)
        if sent_s is None:
            return 0.0
        return max(0.0, sent_s + self.interval_s - now_s)

    @property
    def interval_s(self) -> float:
        """Between two sends of one stream, now."""
        return min(MAX_WAIT_S, len(self._flowing) * self._send_cost_s)

    def sent(self, stream: object) -> None:
        self._flowing.pop(stream, None)
        self._flowing[stream] = self._now_s()

    def ended(self, stream: object) -> None:
        self._flowing.pop(stream, None)

    async def turn(self, stream: object) -> None:
        """Wait until `stream` may send, and count that it does."""
        if wait_s := self.wait_s(stream):
            await asyncio.sleep(wait_s)
        self.sent(stream)

    def _forget(self, now_s: float) -> None:
        while self._flowing:
            stream, sent_s = next(iter(self._flowing.items()))
            if sent_s + FLOWING_S > now_s:
                return
            del self._flowing[stream]
