"""The model gateway's end beside the model: batches of a model's answer, over gRPC.

A batch is what came since the one before was sent. The first leaves at once; while many streams flow they
are paced (`actors.pace`), so that a send carries more the more there is to do. What ends an answer waits
for nothing. An empty batch says at once that the call was taken, and later that it still lives: silence
means a broken way.
"""

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from itertools import groupby
from typing import Any

import grpc
import grpc.aio

from actors import gateway_wire as wire
from actors.gateway_wire import Item
from actors.pace import Pace
from agent.faults import Fault, ModelFault, boundary
from agent.model.contract import Completion, Model, ModelCard, ModelRequest

MAX_CALLS = 5000
"""Of one replica, which only waits for providers; the next is sent elsewhere."""
BUFFER_ITEMS = 256
"""Chunks that wait for a slow session before the provider's stream is held back."""
HEARTBEAT_S = 15.0
SEND_COST_S = 0.001
"""0.15 ms of a send in the gateway and the session, and 0.35 ms of the page that it becomes on its way to a
reader; sends may take half a core."""

Context = grpc.aio.ServicerContext[Any, Any]


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


class DataPlane:
    """A gateway's gRPC server, from `start` to `close`. It takes calls that bring its token."""

    def __init__(self, gateway: ModelGateway) -> None:
        self.token = secrets.token_hex(32)
        self.n_calls = 0
        self._gateway = gateway
        self._server = grpc.aio.server(
            options=[
                *wire.OPTIONS,
                # Two replicas on one port would get each other's calls.
                ("grpc.so_reuseport", 0),
                # Otherwise clients that ask whether it lives are sent away.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        methods = {
            wire.CHUNKS: grpc.unary_stream_rpc_method_handler(self._chunks),
            wire.CARD: grpc.unary_unary_rpc_method_handler(self._card),
        }
        handler = grpc.method_handlers_generic_handler(wire.SERVICE, methods)
        self._server.add_generic_rpc_handlers((handler,))

    async def start(self, host: str) -> str:
        """Listen on a free port of `host`; the address.

        Raises:
            RuntimeError: the address cannot be had.
        """
        host = f"[{host}]" if ":" in host else host
        port = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        return f"{host}:{port}"

    async def close(self, grace_s: float) -> None:
        """Take no more calls; those that run have `grace_s`, then they are lost."""
        await self._server.stop(grace_s)

    async def _chunks(self, body: bytes, context: Context) -> None:
        await self._check(context)
        self.n_calls += 1
        try:
            with boundary(ModelFault, "The model gateway failed."):
                async with aclosing(self._gateway.chunks(wire.request_of(body))) as batches:
                    async for batch in batches:
                        await context.write(wire.batch_body(batch))
        except Fault as fault:
            await context.write(wire.fault_body(fault))
        finally:
            self.n_calls -= 1

    async def _card(self, body: bytes, context: Context) -> bytes:
        await self._check(context)
        try:
            with boundary(ModelFault, "The model gateway failed."):
                return wire.card_body(await self._gateway.card(wire.request_of(body).model))
        except Fault as fault:
            return wire.fault_body(fault)

    async def _check(self, context: Context) -> None:
        told: Any = dict(context.invocation_metadata() or ()).get(wire.TOKEN, "")
        if not hmac.compare_digest(str(told).encode(), self.token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED)
