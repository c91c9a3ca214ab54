"""The model gateway: where providers are called from, once per replica instead of once per session.

`ModelGateway` is the plain end beside the model, `GatewayModel` the end in a session actor; between
them lies a Ray Serve deployment. Items travel in batches: what was ready at the same moment, without
waiting for more. An empty batch says that the call still lives, so silence means a broken way.

litellm is loaded by a replica when it has started, never by an importer of this module.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from itertools import groupby
from typing import Any

from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from agent import logs
from agent.faults import ModelFault, ModelLost, boundary
from agent.model.contract import (
    Completion,
    Model,
    ModelCard,
    ModelRequest,
    ReasoningChunk,
    TextChunk,
)
from agent.model.routing import RoutedModel, model_from
from agent.settings import ModelSettings

APP = "troupe-gateway"
DEPLOYMENT = "gateway"
MAX_ONGOING = 5000
"""Calls on one replica, which only waits for providers. An open stream holds one; Serve's own limit is 5."""
BUFFER_ITEMS = 256
"""Chunks that wait for a slow session before the provider's stream is held back."""
HEARTBEAT_S = 15.0
LOST_PAUSE_S = 1.0
"""Before it is told: who asked again at once would be sent to the same dead replica."""

Item = TextChunk | ReasoningChunk | Completion


class ModelGateway:
    """Streams a model's answers in batches."""

    def __init__(self, model: Model, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._model = model
        self._heartbeat_s = heartbeat_s

    async def chunks(self, request: ModelRequest) -> AsyncGenerator[tuple[Item, ...]]:
        """The items of `Model.stream`; an empty batch at least every `heartbeat_s`.

        Raises:
            ModelFault: without its cause, which may hold words of the provider and would be written
                to the replica's log.
        """
        ready: asyncio.Queue[Item | None] = asyncio.Queue(BUFFER_ITEMS)
        pump = asyncio.create_task(self._pump(request, ready))
        try:
            ended = False
            while not ended:
                items = await self._ready(ready)
                ended = None in items
                yield joined(item for item in items if item is not None)
            await pump
        except ModelFault as fault:
            raise fault from None
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def card(self, model: str) -> ModelCard:
        return await self._model.card(model)

    async def _pump(self, request: ModelRequest, ready: asyncio.Queue[Item | None]) -> None:
        try:
            with boundary(ModelFault, "The model gateway failed."):
                async with aclosing(self._model.stream(request)) as stream:
                    async for item in stream:
                        await ready.put(item)
        except ModelFault:
            await ready.put(None)
            raise
        await ready.put(None)

    async def _ready(self, ready: asyncio.Queue[Item | None]) -> list[Item | None]:
        """What is there, or the next to come; nothing after a heartbeat of silence."""
        try:
            async with asyncio.timeout(self._heartbeat_s):
                items = [await ready.get()]
        except TimeoutError:
            return []
        while not ready.empty():
            items.append(ready.get_nowait())
        return items


def joined(items: Iterable[Item]) -> tuple[Item, ...]:
    """The same stream, with neighbouring chunks of one kind as one."""
    batch: list[Item] = []
    for kind, run in groupby(items, type):
        if kind is Completion:
            batch.extend(run)
        else:
            batch.append(kind("".join(item.text for item in run)))
    return tuple(batch)


class GatewayReplica(ModelGateway):
    """`ModelGateway` as Serve runs it."""

    def __init__(self, settings: ModelSettings, default_model: str) -> None:
        logs.configure()
        model: RoutedModel = model_from(settings)
        super().__init__(model)
        # Beside the replica's start, so that scripted models answer at once.
        self._warming = asyncio.create_task(model.warm(default_model))

    async def check_health(self) -> None:
        if self._warming.done():
            self._warming.result()


def gateway_app(
    settings: ModelSettings, default_model: str, *, n_replicas: int = 1
) -> serve.Application:
    """Deploy it with `serve.run(..., name=APP, route_prefix=None)`: it has no HTTP of its own."""
    # Typed as a function by Ray, whose decorator takes classes too.
    deployment: Any = serve.deployment(
        GatewayReplica,
        name=DEPLOYMENT,
        num_replicas=n_replicas,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(settings, default_model)


class GatewayModel:
    """The gateway as a Model, for session actors. Finds the deployment at the first call.

    `silence_s`: a replica that sends nothing, not even its heartbeat, for this long is lost. Also the
    limit for finding one at all.
    """

    def __init__(self, silence_s: float, *, app_name: str = APP) -> None:
        self._app_name = app_name
        self._silence_s = silence_s
        self._handle: DeploymentHandle[Any] | None = None

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Item]:
        handle = await self._found()
        response: Any = handle.options(stream=True).chunks.remote(request)
        try:
            while True:
                batch = await self._answered(anext(response, None))
                if batch is None:
                    return
                for item in batch:
                    yield item
        finally:
            # Dropping a generator does not stop it where it runs.
            response.cancel()

    async def card(self, model: str) -> ModelCard:
        handle = await self._found()
        return await self._answered(handle.card.remote(model))

    async def _found(self) -> DeploymentHandle[Any]:
        if self._handle is None:
            # Asks Serve's controller, and blocks on its answer.
            find = asyncio.to_thread(
                serve.get_deployment_handle, DEPLOYMENT, app_name=self._app_name
            )
            handle: DeploymentHandle[Any] = await self._answered(find)
            self._handle = handle
        return self._handle

    async def _answered(self, answer: Any) -> Any:
        """
        Raises:
            ModelFault: the replica's own, or ModelLost for whatever happened to the way there.
        """
        try:
            async with asyncio.timeout(self._silence_s):
                return await answer
        except RayTaskError as error:
            if isinstance(error.cause, ModelFault):
                raise error.cause from None
            raise ModelFault("The model gateway failed.") from error
        except ModelFault:
            raise
        except Exception as cause:
            # The way broke: next time the deployment is looked for again.
            self._handle = None
            await asyncio.sleep(LOST_PAUSE_S)
            raise ModelLost("The model gateway cannot be reached.") from cause
