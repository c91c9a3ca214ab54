"""Processes of the run's cluster: found by what they are, and ended as a crash ends them."""

import asyncio
import os
import signal
from typing import Any

import ray
from ray.util import list_named_actors

from actors.protocol import Unavailable
from actors.rayhost import PREFIX
from actors.remote import NAMESPACE, answer
from actors.session import MANAGER
from tests.support.processes import wait_for_ends

START_S = 60.0
END_S = 15.0
SERVE_ROLES = {
    "gateway": "SERVE_REPLICA::troupe-gateway#",
    "edge": "SERVE_REPLICA::troupe#edge#",
    "proxy": "SERVE_PROXY_ACTOR-",
}
"""How Serve (2.60) names the actors of a role."""


async def got(reference: Any) -> Any:
    return await answer(reference, Unavailable("no answer"), START_S)


def _pid(_: Any) -> int:
    return os.getpid()


async def pid_of(actor: Any) -> int:
    return await got(actor.__ray_call__.remote(_pid))


def manager() -> Any:
    return ray.get_actor(MANAGER, namespace=NAMESPACE)


async def manager_answers() -> None:
    """Wait for the incarnation that is to come, if need be."""
    assert await got(manager().ready.options(max_task_retries=-1).remote())


async def host_of(session_id: str) -> Any:
    """The actor that hosts the session."""
    route = await got(manager().find.remote(session_id))
    return ray.get_actor(route.host, namespace=NAMESPACE)


async def session_pid(session_id: str) -> int:
    return await pid_of(await host_of(session_id))


def _named(start: str) -> list[tuple[str, str]]:
    everyone: Any = list_named_actors(all_namespaces=True)
    return [(a["name"], a["namespace"]) for a in everyone if a["name"].startswith(start)]


async def pids_of(role: str) -> list[int]:
    """Every process of a role: `manager`, `session`, or one of Serve's."""
    start = {"manager": MANAGER, "session": PREFIX}.get(role) or SERVE_ROLES[role]
    actors = [ray.get_actor(name, namespace=namespace) for name, namespace in _named(start)]
    return list(await asyncio.gather(*(pid_of(actor) for actor in actors)))


async def warm_pids() -> list[int]:
    """Session processes that host nobody."""
    found: list[int] = []
    for name, namespace in _named(PREFIX):
        actor = ray.get_actor(name, namespace=namespace)
        if not await got(actor.hosted.remote()):
            found.append(await pid_of(actor))
    return found


def kill(*pids: int) -> None:
    """SIGKILL, all at once. Returns when they are gone."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert not wait_for_ends(list(pids), END_S)


def stop(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
