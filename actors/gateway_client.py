"""`GatewayModel`: the model gateway as a Model, for the processes that host sessions. No Ray in here: who
makes it says how replicas are found."""

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from actors import gateway_wire as wire
from actors.detached import spawn
from actors.gateway_wire import Item, Place
from actors.gateways import is_usable
from actors.plane import PlaneClient, PlaneLost
from agent.faults import Fault, ModelFault, ModelLost, ModelRefused
from agent.model.contract import ModelCard, ModelRequest

ACCEPT_S = 10.0
"""For a replica to take a call, which it says at once; then another is asked."""
FRESH_S = 15.0
"""What is known of the replicas serves at once for ever, and is looked up again after this: a new one is
found, and one that is gone is forgotten."""
ASK_S = 5.0
"""Of one wait at the manager for a replica."""
ASK_AGAIN_S = 0.5
"""When who knows the replicas cannot be asked: it is being started again."""
CARD_FRESH_S = 600.0
MAX_CARDS = 256

Ask = Callable[[Mapping[str, int], float], Awaitable[list[Place]]]
"""`actors.gateways.Gateways.some` of one gateway. Raises Fault."""


class GatewayModel:
    """
    Args:
        ask: knows the gateway's replicas.
        silence_s: a replica that sends nothing, not even its heartbeat, for this long is lost. Also the
            limit for finding one at all.
        node_id: where this process runs; a replica there comes first.
    """

    def __init__(self, ask: Ask, silence_s: float, *, node_id: str = "") -> None:
        self._ask = ask
        self._silence_s = silence_s
        self._node_id = node_id
        self._places: list[Place] = []
        self._failed: dict[str, int] = {}
        """The beat of each replica when it failed: one that tells again is asked again."""
        self._planes: dict[str, PlaneClient] = {}
        self._cards: OrderedDict[str, tuple[ModelCard, float]] = OrderedDict()
        self._fresh_until_s = 0.0
        self._looking: asyncio.Task[None] | None = None

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Item]:
        body = request._asdict()
        until_s = time.monotonic() + self._silence_s
        while True:
            place, plane = await self._replica(until_s)
            batches = plane.stream(wire.CHUNKS, body, silence_s=self._silence_s)
            # Closing early also ends the provider's request.
            async with aclosing(batches):
                if not await self._taken(place, batches):
                    continue
                try:
                    async for batch in batches:
                        for item in wire.batch_of(batch):
                            yield item
                except PlaneLost as cause:
                    self._drop(place)
                    raise _lost() from cause
                except Fault as fault:
                    raise _of_a_model(fault) from None
                return

    async def card(self, model: str) -> ModelCard:
        card, fresh_until_s = self._cards.get(model, (None, 0.0))
        if card is None or time.monotonic() > fresh_until_s:
            card = await self._asked_card(model)
            self._cards[model] = (card, time.monotonic() + CARD_FRESH_S)
            while len(self._cards) > MAX_CARDS:
                self._cards.popitem(last=False)
        return card

    async def _asked_card(self, model: str) -> ModelCard:
        until_s = time.monotonic() + self._silence_s
        while True:
            place, plane = await self._replica(until_s)
            try:
                return wire.card_of(await plane.call(wire.CARD, model, limit_s=self._silence_s))
            except PlaneLost:
                self._drop(place)
            except Fault as fault:
                raise _of_a_model(fault) from None

    async def _taken(self, place: Place, batches: AsyncGenerator[Any]) -> bool:
        """Whether the replica takes the call, which it says before the model is asked. False: another
        is to be asked.

        Raises:
            ModelRefused: it is larger than any takes.
        """
        try:
            async with asyncio.timeout(min(ACCEPT_S, self._silence_s)):
                await anext(batches)
        except (PlaneLost, TimeoutError):
            self._drop(place)
            return False
        except ValueError as cause:
            raise ModelRefused(
                "The conversation is larger than the model gateway takes."
            ) from cause
        return True

    # -- replicas ----------------------------------------------------------------------------

    async def _replica(self, until_s: float) -> tuple[Place, PlaneClient]:
        """
        Raises:
            ModelLost: no replica was found in time.
        """
        while not (usable := self._usable()):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise _lost()
            await self._look(min(left_s, ASK_S))
        if time.monotonic() > self._fresh_until_s and self._looking is None:
            self._looking = spawn(self._look_again(), name="gateways")
        place = self._chosen(usable)
        if place.replica_id not in self._planes:
            self._planes[place.replica_id] = PlaneClient(place.address)
        return place, self._planes[place.replica_id]

    def _usable(self) -> list[Place]:
        return [
            place
            for place in self._places
            if is_usable(place, self._failed) and wire.VERSION in place.versions
        ]

    def _chosen(self, usable: list[Place]) -> Place:
        """Of two by chance the one with less to do: what is known of that is seconds old, and whoever
        took the least busy one then would take the same one as all others."""
        near = [place for place in usable if place.node_id == self._node_id] or usable
        return min(random.sample(near, min(2, len(near))), key=lambda place: place.n_calls)

    async def _look_again(self) -> None:
        try:
            await self._look(ASK_S)
        finally:
            self._looking = None

    async def _look(self, wait_s: float) -> None:
        self._fresh_until_s = time.monotonic() + FRESH_S
        try:
            async with asyncio.timeout(wait_s + ASK_S):
                places = await self._ask(self._failed, wait_s)
        except (Fault, TimeoutError):
            await asyncio.sleep(min(wait_s, ASK_AGAIN_S))
            return
        if not places:
            return  # a manager that has just begun; what is known may well be right
        self._places = places
        there = {place.replica_id for place in places}
        self._failed = {name: beat for name, beat in self._failed.items() if name in there}
        for name in self._planes.keys() - there:
            self._planes.pop(name).close()

    def _drop(self, place: Place) -> None:
        """Ask it no more until it tells that it lives. Calls of others that run there go on."""
        name = place.replica_id
        if plane := self._planes.pop(name, None):
            plane.close()
        beats = [known.beat for known in self._places if known.replica_id == name]
        self._failed[name] = max([place.beat, *beats])


def _lost() -> ModelFault:
    return ModelLost("The model gateway cannot be reached.")


def _of_a_model(fault: Fault) -> ModelFault:
    return fault if isinstance(fault, ModelFault) else ModelFault(fault.detail)
