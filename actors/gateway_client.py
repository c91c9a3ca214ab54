"""`GatewayModel`: the model gateway as a Model, for the processes that host sessions. No Ray in here: who
makes it says how replicas are found."""

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from actors import gateway_wire as wire
from actors.detached import spawn
from actors.gateway_wire import Item, Place
from actors.gateways import is_usable
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
EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue] - its types do not name it
MAX_CARDS = 256

T = TypeVar("T")
Ask = Callable[[Mapping[str, int], float], Awaitable[list[Place]]]
"""`actors.gateways.Gateways.some` of one gateway. Raises Fault."""


class Line:
    """The connection to a replica. It closes when nothing runs on it any more: closing it earlier would
    cancel the calls of others."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.is_dropped = False
        self._n_calls = 0
        self._channel = grpc.aio.insecure_channel(
            place.address,
            options=[
                *wire.OPTIONS,
                ("grpc.enable_http_proxy", 0),
                # Otherwise a new line to a replica that failed waits out the old one's pauses.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.chunks: Any = self._channel.unary_stream(f"/{wire.SERVICE}/{wire.CHUNKS}")
        self.card: Any = self._channel.unary_unary(f"/{wire.SERVICE}/{wire.CARD}")
        self.metadata = ((wire.TOKEN, place.token),)

    async def __aenter__(self) -> Self:
        self._n_calls += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._n_calls -= 1
        await self.close_if_unused()

    async def close_if_unused(self) -> None:
        if self.is_dropped and not self._n_calls:
            await self._channel.close()


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
        self._lines: dict[str, Line] = {}
        self._cards: OrderedDict[str, tuple[ModelCard, float]] = OrderedDict()
        self._fresh_until_s = 0.0
        self._looking: asyncio.Task[None] | None = None

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Item]:
        body = _body(request)
        until_s = time.monotonic() + self._silence_s
        while True:
            line = await self._line(until_s)
            async with line:
                call = line.chunks(body, metadata=line.metadata)
                try:
                    frame = await self._accepted(line, call)
                    if frame is None:
                        continue
                    while frame is not EOF:
                        for item in wire.batch_of(frame):
                            yield item
                        frame = await self._of(line, call.read(), self._silence_s)
                    return
                finally:
                    call.cancel()  # also the provider's request

    async def card(self, model: str) -> ModelCard:
        card, fresh_until_s = self._cards.get(model, (None, 0.0))
        if card is None or time.monotonic() > fresh_until_s:
            card = await self._asked_card(model)
            self._cards[model] = (card, time.monotonic() + CARD_FRESH_S)
            while len(self._cards) > MAX_CARDS:
                self._cards.popitem(last=False)
        return card

    async def _asked_card(self, model: str) -> ModelCard:
        body = _body(ModelRequest(model, []))
        until_s = time.monotonic() + self._silence_s
        while True:
            line = await self._line(until_s)
            async with line:
                try:
                    answer = await self._of(
                        line, line.card(body, metadata=line.metadata), self._silence_s
                    )
                except ModelLost:
                    continue
                return wire.card_of(answer)

    async def _accepted(self, line: Line, call: Any) -> Any:
        """The first frame, which comes before the model is asked; None: ask another replica."""
        try:
            return await self._of(line, call.read(), min(ACCEPT_S, self._silence_s))
        except ModelLost:
            return None

    async def _of(self, line: Line, step: Awaitable[T], limit_s: float) -> T:
        """A step of a call.

        Raises:
            ModelLost: the way broke; the replica is asked no more until it tells that it lives.
        """
        try:
            async with asyncio.timeout(limit_s):
                return await step
        except (grpc.RpcError, TimeoutError) as cause:
            self._drop(line)
            raise _lost() from cause
        except asyncio.CancelledError as cause:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled us: gRPC says so of a call that ended from within.
            self._drop(line)
            raise _lost() from cause

    # -- replicas ----------------------------------------------------------------------------

    async def _line(self, until_s: float) -> Line:
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
        if place.replica_id not in self._lines:
            self._lines[place.replica_id] = Line(place)
        return self._lines[place.replica_id]

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
        for name in self._lines.keys() - there:
            self._lines[name].is_dropped = True
            await self._lines.pop(name).close_if_unused()

    def _drop(self, line: Line) -> None:
        name = line.place.replica_id
        line.is_dropped = True
        if self._lines.get(name) is line:
            del self._lines[name]
            beats = [place.beat for place in self._places if place.replica_id == name]
            self._failed[name] = max([line.place.beat, *beats])


def _body(request: ModelRequest) -> bytes:
    body = wire.request_body(request)
    if len(body) > wire.MAX_BODY_BYTES:
        raise ModelRefused("The conversation is larger than the model gateway takes.")
    return body


def _lost() -> ModelFault:
    return ModelLost("The model gateway cannot be reached.")
