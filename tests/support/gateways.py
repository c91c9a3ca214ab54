"""The gateway's data plane over real sockets on loopback: replicas and a session's end, without Ray."""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from actors.gateway_client import GatewayModel
from actors.gateway_plane import ModelGateway, methods
from actors.gateway_wire import Place
from actors.gateways import Gateways
from actors.plane import PlaneServer
from agent.model.contract import Model

APP = "gateway"


class Gateway:
    """Replicas of a gateway and who knows them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.gateways = Gateways(time.monotonic)
        self._stack = stack

    async def replica(self, model: Model, *, node_id: str = "", heartbeat_s: float = 15.0) -> Place:
        """Start one, and have it told of."""
        plane = PlaneServer(methods(ModelGateway(model, heartbeat_s=heartbeat_s)))
        address = await plane.start("127.0.0.1")
        self._stack.push_async_callback(plane.close)
        place = Place(f"replica-{address.port}", APP, address, node_id, 1, 0)
        self.gateways.here(place)
        self.plane = plane
        return place

    def session(self, *, silence_s: float = 5.0, node_id: str = "") -> GatewayModel:
        return GatewayModel(partial(self.gateways.some, APP), silence_s, node_id=node_id)


@asynccontextmanager
async def gateway() -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        yield Gateway(stack)
