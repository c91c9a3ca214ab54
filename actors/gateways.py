"""Which replicas of the model gateway there are, for the manager: what they tell, as long as they go on
telling. So a manager that begins anew knows them all one beat later. Pure."""

import asyncio
from collections.abc import Callable, Mapping

from actors.gateway_wire import Place

BEAT_S = 2.0
"""Between two times that a replica tells."""
FORGET_S = 7.0
"""Three beats that were missed, and the way here."""


class Gateways:
    """
    Args:
        now_s: a monotonic clock.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._known: dict[str, tuple[Place, float]] = {}
        """And when each told last; bounded by the replicas that start within FORGET_S."""
        self._told = asyncio.Event()

    def here(self, place: Place) -> None:
        self._forget()
        self._known[place.replica_id] = (place, self._now_s())
        self._told.set()
        self._told = asyncio.Event()

    def gone(self, replica_id: str) -> None:
        self._known.pop(replica_id, None)

    def of(self, app: str) -> list[Place]:
        self._forget()
        return [place for place, _ in self._known.values() if place.app == app]

    async def some(self, app: str, failed: Mapping[str, int], wait_s: float) -> list[Place]:
        """The gateway's replicas, once one is among them that did not fail, or told since it did; as
        they are after `wait_s`.

        Args:
            failed: the beat of each replica when it failed.
        """
        try:
            async with asyncio.timeout(wait_s):
                while not any(is_usable(place, failed) for place in self.of(app)):
                    await self._told.wait()
        except TimeoutError:
            pass
        return self.of(app)

    def _forget(self) -> None:
        since_s = self._now_s() - FORGET_S
        self._known = {
            replica_id: (place, told_s)
            for replica_id, (place, told_s) in self._known.items()
            if told_s > since_s
        }


def is_usable(place: Place, failed: Mapping[str, int]) -> bool:
    return place.beat > failed.get(place.replica_id, -1)
