"""The model gateway's end beside the model: batches of a model's answer.

A batch is what came since the one before was sent. The first leaves at once; while many streams flow they
are paced (`actors.pace`), so that a send carries more the more there is to do. What ends an answer waits
for nothing. An empty batch says at once that the call was taken, and later that it still lives: silence
means a broken way.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from itertools import groupby
from typing import Any

from actors import gateway_wire as wire
from actors.gateway_wire import Item
from actors.pace import Pace
from actors.plane import Method
from agent.faults import ModelFault, boundary
from agent.model.contract import Completion, Model, ModelCard, ModelRequest

BUFFER_ITEMS = 256
"""Chunks that wait for a slow session before the provider's stream is held back."""
HEARTBEAT_S = 15.0
SEND_COST_S = 0.002
"""1 ms of CPU of a send and the page that it becomes on its way to a reader, in all processes together; sends
may take half a core. From `bench/results/`."""


class ModelGateway:
    """Streams a model's answers in batches."""

    def __init__(
        self, model: Model, *, heartbeat_s: float = HEARTBEAT_S, pace: Pace | None = None
    ) -> None:
        self._model = model
        self._heartbeat_s = heartbeat_s
        self._pace = pace or Pace(SEND_COST_S, time.monotonic)

    async def chunks(self, request: ModelRequest) -> AsyncGenerator[wire.Batch]:
        """The items of `Model.stream`; an empty batch at first and at least every `heartbeat_s`.

        Raises:
            ModelFault: without its cause, which may hold words of the provider and would be written
                to the replica's log.
        """
        ready = Ready()
        pump = asyncio.create_task(self._pump(request, ready))
        try:
            yield ()
            while not ready.is_over():
                if not await ready.filled(self._heartbeat_s):
                    yield ()
                    continue
                if wait_s := self._pace.wait_s(pump):
                    await ready.due(wait_s)
                self._pace.sent(pump)
                if items := ready.taken():
                    yield joined(items)
            await pump
        except ModelFault as fault:
            raise fault from None
        finally:
            self._pace.ended(pump)
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def card(self, model: str) -> ModelCard:
        return await self._model.card(model)

    async def _pump(self, request: ModelRequest, ready: "Ready") -> None:
        try:
            with boundary(ModelFault, "The model gateway failed."):
                async with aclosing(self._model.stream(request)) as stream:
                    async for item in stream:
                        await ready.put(item)
        finally:
            ready.end()


class Ready:
    """What has come and was not sent yet."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._ended = False
        self._filled = asyncio.Event()
        self._due = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, item: Item) -> None:
        while len(self._items) >= BUFFER_ITEMS:
            self._due.set()
            self._room.clear()
            await self._room.wait()
        self._items.append(item)
        self._filled.set()
        if isinstance(item, Completion):
            self._due.set()

    def end(self) -> None:
        self._ended = True
        self._filled.set()
        self._due.set()

    def is_over(self) -> bool:
        return self._ended and not self._items

    def taken(self) -> list[Item]:
        items, self._items = self._items, []
        self._room.set()
        if not self._ended:
            self._filled.clear()
            self._due.clear()
        return items

    async def filled(self, wait_s: float) -> bool:
        """Whether something came, or the end, within `wait_s`."""
        return self._filled.is_set() or await _within(self._filled, wait_s)

    async def due(self, wait_s: float) -> None:
        """Wait for `wait_s`, or until no more can be gained by that."""
        if not self._due.is_set():
            await _within(self._due, wait_s)


async def _within(event: asyncio.Event, wait_s: float) -> bool:
    try:
        async with asyncio.timeout(wait_s):
            return await event.wait()
    except TimeoutError:
        return False


def joined(items: Iterable[Item]) -> wire.Batch:
    """The same stream, with neighbouring chunks of one kind as one."""
    batch: list[Item] = []
    for kind, run in groupby(items, type):
        if kind is Completion:
            batch.extend(run)
        else:
            batch.append(kind("".join(item.text for item in run)))
    return tuple(batch)


def methods(gateway: ModelGateway) -> dict[str, Method]:
    """What a replica answers on the data plane."""

    async def chunks(told: Any) -> AsyncGenerator[Any]:
        with boundary(ModelFault, "The model gateway failed."):
            async with aclosing(gateway.chunks(wire.request_of(told))) as batches:
                async for batch in batches:
                    yield wire.told_batch(batch)

    async def card(model: Any) -> AsyncGenerator[Any]:
        with boundary(ModelFault, "The model gateway failed."):
            yield await gateway.card(model)

    return {wire.CHUNKS: chunks, wire.CARD: card}
