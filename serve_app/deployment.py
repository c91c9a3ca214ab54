"""R. The edge as a Ray Serve deployment: the app inside each replica, connected to the cluster.

Replicas hold no state: any number of them works. Paths in the settings are absolute by now, since a
replica's working directory is not the operator's.
"""

import asyncio
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.client import connect, gateway_target
from agent import logs
from agent.agents import load_agents
from serve_app.app import create_app
from serve_app.settings import TroupeSettings

APP = "troupe"
HEADROOM = 2
"""Times what the app takes on at once (`serve_app.room`), so that it is the app that refuses, with a
problem. Serve's own limit is 5."""
MAX_QUEUED = 1000
"""Requests that Serve keeps until a replica is there; one more is its own 503."""
SHUTDOWN_WAIT_S = 5.0
"""For streams that are open when a replica ends; their readers come back with their cursors."""


class Edge:
    """The ASGI application, made when its replica's lifespan begins."""

    def __init__(self, settings: TroupeSettings) -> None:
        self._settings = settings
        self._app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            logs.configure()
            sessions = await connect(self._settings.agent, self._settings.actors)
            self._app = await asyncio.to_thread(create_app, sessions, self._settings.serve)
        await self._app(scope, receive, send)


def deploy(settings: TroupeSettings) -> None:
    """Have gateway and edge running when this returns. Blocking, for a driver.

    Raises:
        RuntimeError: Serve says why a deployment did not start.
    """
    # Typed as a function by Ray, whose decorator takes classes too.
    ingress: Any = serve.ingress(lambda: Edge(settings))
    edge: Any = serve.deployment(
        ingress(),
        name="edge",
        num_replicas=settings.serve.replicas,
        max_ongoing_requests=HEADROOM * (settings.serve.max_requests + settings.serve.max_streams),
        max_queued_requests=MAX_QUEUED,
        graceful_shutdown_timeout_s=SHUTDOWN_WAIT_S,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    gateway = gateway_target(settings.agent, default_model(settings))
    # Beside each other: each takes seconds to import what it needs.
    serve.run_many([gateway, serve.RunTarget(edge.bind(), name=APP, route_prefix="/")])


def default_model(settings: TroupeSettings) -> str:
    """What a session gets that names neither a model nor an agent."""
    agents = load_agents([settings.agent.agents_dir] if settings.agent.agents_dir else [])
    return settings.agent.default_model or agents[settings.agent.default_agent].model
