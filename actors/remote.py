"""Calls to Ray actors, and the one place where Ray's errors become ours.

A caught remote error's text holds pids, addresses and a traceback; what leaves here is a Fault, the
remote one or `lost`. A fault raised remotely arrives as itself, since every Fault survives pickling.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.util import list_named_actors

from actors.protocol import Unavailable
from agent.faults import Fault

T = TypeVar("T")
NAMESPACE = "troupe"


def names(start: str = "") -> list[str]:
    """The named actors of the house whose names begin so. Blocks."""
    everyone: Any = list_named_actors(all_namespaces=True)
    ours = (named["name"] for named in everyone if named["namespace"] == NAMESPACE)
    return [name for name in ours if name.startswith(start)]


async def answer(ref: Awaitable[T], lost: Fault, timeout_s: float) -> T:
    """The result of a remote call.

    Raises:
        Fault: what the remote raised; `lost` when the actor is dead or unreachable, or the time is
            over: whether the call was carried out is then not known.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await ref
    except TimeoutError as cause:
        raise lost from cause
    except RayError as cause:
        raise unwrapped(cause, lost) from cause


def unwrapped(error: RayError, lost: Fault) -> Fault:
    """The fault inside a Ray error."""
    if isinstance(error, Fault):
        # Ray's error class for a task is made on the fly, a subclass of the cause's class too.
        return error.cause if isinstance(error.cause, Fault) else error
    if isinstance(error, RayTaskError) and isinstance(error.cause, Fault):
        return error.cause
    if isinstance(error, RayTaskError) and isinstance(error.cause, RayActorError):
        return lost
    if isinstance(error, RayActorError | TaskCancelledError):
        return lost
    return Unavailable("Something failed inside the cluster.", retry_after_s=1)
