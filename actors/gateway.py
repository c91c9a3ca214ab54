"""R. The model gateway: where providers are called from, once per replica instead of once per session.

A Serve deployment, for its health checks, replicas and dashboard. Sessions do not come through Serve: each
replica runs a server of its own (`actors.gateway_plane`) and tells the manager where, again and again.
litellm is loaded by a replica when it has started, never by an importer of this module.
"""

import asyncio
from typing import Any

import ray
import structlog
from ray import serve
from ray.exceptions import RayError

from actors.detached import spawn
from actors.gateway_plane import ModelGateway, methods
from actors.gateway_wire import Place
from actors.gateways import BEAT_S
from actors.plane import MAX_CONNECTIONS, PlaneServer
from actors.protocol import Unavailable
from actors.remote import NAMESPACE, answer
from actors.session import GATEWAY, MANAGER
from agent import logs
from agent.model.routing import RoutedModel, model_from
from agent.settings import ModelSettings

log = structlog.get_logger()

APP = GATEWAY
DEPLOYMENT = "gateway"
GRACE_S = 30.0
"""For calls that run when a replica ends; what is lost is asked again elsewhere."""
GRACE_MARGIN_S = 10.0


class GatewayReplica:
    """`DataPlane` as Serve runs it."""

    async def __init__(self, settings: ModelSettings, default_model: str, n_replicas: int) -> None:
        logs.configure()
        self._model: RoutedModel = model_from(settings, n_replicas=n_replicas)
        # Beside the replica's start, so that scripted models answer at once.
        self._warming = asyncio.create_task(self._model.warm(default_model))
        self._plane = PlaneServer(methods(ModelGateway(self._model)))
        context = serve.get_replica_context()
        self._place = Place(
            replica_id=context.replica_id.unique_id,
            app=context.app_name,
            # Not every address of the machine, as Ray's own parts listen on. Of a Ray on one machine it is
            # that of the network too (2.60), and other nodes may join it.
            address=await self._plane.start(ray.util.get_node_ip_address()),
            node_id=ray.get_runtime_context().get_node_id(),
            beat=0,
            n_calls=0,
        )
        self._manager: Any = None
        await self._tell()
        self._telling = spawn(self._go_on_telling(), name="gateway beats")

    async def check_health(self) -> None:
        if self._warming.done():
            self._warming.result()
        if self._telling.done():
            self._telling.result()

    async def __del__(self) -> None:  # Serve awaits it
        self._telling.cancel()
        await self._to_manager("gateway_gone", self._place.replica_id)
        await self._plane.close(GRACE_S)
        await self._model.close()

    async def _go_on_telling(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self._tell()

    async def _tell(self) -> None:
        self._place = self._place._replace(beat=self._place.beat + 1, n_calls=self._plane.n_calls)
        await self._to_manager("gateway_here", self._place._asdict())

    async def _to_manager(self, method: str, *args: Any) -> None:
        """Best effort: a manager that is away hears the next beat."""
        lost = Unavailable("The session manager does not answer.")
        try:
            if self._manager is None:
                self._manager = await asyncio.to_thread(ray.get_actor, MANAGER, namespace=NAMESPACE)
            await answer(getattr(self._manager, method).remote(*args), lost, BEAT_S)
        except (Unavailable, RayError, ValueError, ConnectionError) as error:
            self._manager = None  # its name may belong to a new one by now
            log.warning("gateway_not_told", method=method, error=type(error).__name__)


def gateway_app(
    settings: ModelSettings, default_model: str, *, n_replicas: int = 1
) -> serve.Application:
    """Deploy it with `serve.run(..., name=APP, route_prefix=None)`: it has no HTTP of its own."""
    # Typed as a function by Ray, whose decorator takes classes too.
    deployment: Any = serve.deployment(
        GatewayReplica,
        name=DEPLOYMENT,
        num_replicas=n_replicas,
        max_ongoing_requests=MAX_CONNECTIONS,
        graceful_shutdown_timeout_s=GRACE_S + GRACE_MARGIN_S,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(settings, default_model, n_replicas)
