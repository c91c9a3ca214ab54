"""`RaySessions`: floor 2 as the edge sees it on a cluster; and the manager's beginning and end."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import Any

import ray
from ray import serve

from actors.desk import DRAIN_MARGIN_S, Route
from actors.gateway import APP as GATEWAY_APP
from actors.gateway import gateway_app
from actors.kit import Kit
from actors.manager import session_manager
from actors.protocol import (
    Accepted,
    AnyCommand,
    CapacityView,
    Moved,
    Open,
    Principal,
    Unavailable,
)
from actors.remote import NAMESPACE, answer, names
from actors.routed import RoutedSessions
from actors.session import MANAGER, kit_of, named, session_actor
from actors.session_plane import PlaneStage
from actors.settings import ActorsSettings
from agent.journal import SessionRow
from agent.settings import AgentSettings

LOOK_AGAIN_S = 0.2
"""Between two looks of a roll."""
LOOK_LIMIT_S = 10.0
ANSWER_WAIT_S = 5.0
"""Over the manager's own limit for a drain."""


class ManagerPort:
    """The manager's desk over Ray. Implements `actors.routed.DeskPort`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._manager: Any = None

    async def _ask(self, method: str, *args: Any, extra_s: float = 0.0) -> Any:
        lost = Unavailable("The session manager does not answer.", retry_after_s=2)
        if self._manager is None:
            try:
                self._manager = await asyncio.to_thread(ray.get_actor, MANAGER, namespace=NAMESPACE)
            except ValueError as cause:
                raise lost from cause
        call = getattr(self._manager, method).remote(*args)
        try:
            return await answer(call, lost, self._timeout_s + extra_s)
        except Unavailable:
            self._manager = None  # its name may belong to a new one by now
            raise

    async def open(self, who: Principal, command: Open) -> SessionRow:
        return await self._ask("open", who, command)

    async def wake(self, who: Principal, session_id: str, *, not_at: Route | None = None) -> Route:
        return await self._ask("wake", who, session_id, not_at)

    async def find(self, session_id: str) -> Route | None:
        return await self._ask("find", session_id)

    async def when_live(
        self, session_id: str, wait_s: float, *, not_at: Route | None = None
    ) -> Route | None:
        return await self._ask("when_live", session_id, wait_s, not_at, extra_s=wait_s)

    async def close_session(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        return await self._ask("close_session", who, session_id, command)

    async def delete(self, who: Principal, session_id: str) -> None:
        await self._ask("delete", who, session_id)

    async def live_among(self, session_ids: Iterable[str]) -> frozenset[str]:
        return await self._ask("live_among", list(session_ids))

    async def capacity(self, who: Principal) -> CapacityView:
        return await self._ask("capacity", who)


class RaySessions(RoutedSessions):
    """`actors.protocol.Sessions` on Ray."""

    def __init__(self, kit: Kit) -> None:
        super().__init__(ManagerPort(kit.actors.call_timeout_s), kit)
        self._stages: dict[str, PlaneStage] = {}

    def _stage(self, route: Route) -> PlaneStage:
        if route.address is None:
            raise Moved("The session's process does not listen.")
        stage = self._stages.get(route.host)
        if stage is None:
            while len(self._stages) >= self._kit.actors.max_sessions * 2:
                self._stages.pop(next(iter(self._stages))).close()
            stage = self._stages[route.host] = PlaneStage(route.address, self._kit.actors)
        return stage

    def close(self) -> None:
        """Drop the connections that wait for the next call. One that is in a call ends with that."""
        for stage in self._stages.values():
            stage.close()


async def connect(agent: AgentSettings, actors: ActorsSettings) -> RaySessions:
    """The sessions of the cluster that this process is part of."""
    return RaySessions(await kit_of(agent, actors))


def begin_manager(agent: AgentSettings, actors: ActorsSettings) -> None:
    """Have the manager's process start, which `start_manager` waits for."""
    session_manager(agent, actors)


async def start_manager(agent: AgentSettings, actors: ActorsSettings) -> None:
    """Have the cluster's manager running when this returns. For the process that assembles a house.

    Raises:
        Unavailable: it did not start.
    """
    lost = Unavailable("The session manager did not start.")
    await answer(session_manager(agent, actors).ready.remote(), lost, actors.call_timeout_s)


async def prove_sessions(agent: AgentSettings, actors: ActorsSettings) -> None:
    """Start one session actor from this process's code and settings, and end it again. One that is left
    behind hosts nothing, and the next manager ends it.

    Raises:
        Unavailable: that code does not start here.
    """
    lost = Unavailable("A session's process does not start from this code. Ray's logs say why.")
    actor = session_actor(named("proof"), agent, actors)
    try:
        await answer(actor.ready.remote(), lost, actors.call_timeout_s)
    finally:
        ray.kill(actor)


async def replace_manager(agent: AgentSettings, actors: ActorsSettings) -> None:
    """End the manager and have a new one running when this returns, with this process's code and
    settings. Sessions go on meanwhile; who asks for one that does not live is told to come back.

    Raises:
        Unavailable: it did not start, or another took the name.
    """
    with suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(MANAGER, namespace=NAMESPACE))
    lost = Unavailable("The new session manager did not start.")
    try:
        async with asyncio.timeout(actors.call_timeout_s):
            manager = await _new_manager(agent, actors)
    except TimeoutError as cause:
        raise lost from cause
    await answer(manager.ready.remote(), lost, actors.call_timeout_s)


async def _new_manager(agent: AgentSettings, actors: ActorsSettings) -> Any:
    """Once the name is free: nothing tells when Ray has forgotten the one before."""
    while True:
        try:
            return await asyncio.to_thread(session_manager, agent, actors, replace=True)
        except ValueError:
            await asyncio.sleep(LOOK_AGAIN_S)


async def rolled(actors: ActorsSettings) -> AsyncGenerator[int]:
    """How many sessions still live on older code, now and whenever that changed. Ends at none.

    Raises:
        Unavailable: nothing changed for longer than a session takes to leave.
    """
    limit_s = actors.drain_s + actors.close_wait_s + actors.call_timeout_s + actors.sweep_s
    n_left = -1
    while n_left != 0:
        try:
            async with asyncio.timeout(limit_s):
                n_left = await _other_than(n_left)
        except TimeoutError as cause:
            left = "Nobody knows how many" if n_left < 0 else str(n_left)
            raise Unavailable(
                f"{left} sessions still live on older code; a manager that lives goes on trying."
            ) from cause
        yield n_left


async def _other_than(n_left: int) -> int:
    """The number of outdated sessions, once it is another one. Nothing tells of that."""
    lost = Unavailable("The session manager does not answer.")
    while True:
        try:
            manager = await asyncio.to_thread(ray.get_actor, MANAGER, namespace=NAMESPACE)
            n_outdated = (await answer(manager.rolled.remote(), lost, LOOK_LIMIT_S)).n_outdated
        except (Unavailable, ValueError):
            n_outdated = n_left  # it is being restarted
        if n_outdated != n_left:
            return n_outdated
        await asyncio.sleep(LOOK_AGAIN_S)


def gateway_target(agent: AgentSettings, default_model: str) -> serve.RunTarget:
    """The model gateway, for `serve.run_many`."""
    app = gateway_app(agent.model, default_model)
    return serve.RunTarget(app, name=GATEWAY_APP, route_prefix=None)


async def drain(actors: ActorsSettings) -> None:
    """Sessions come to rest, then the manager ends and every actor of the house with it, whatever
    comes between: what has not left by then is as after a crash.

    Raises:
        Unavailable: not in time, or the manager died meanwhile.
    """
    try:
        manager = ray.get_actor(MANAGER, namespace=NAMESPACE)
    except ValueError:
        return
    lost = Unavailable("The sessions did not come to rest in time.")
    limit_s = actors.drain_s + actors.close_wait_s + DRAIN_MARGIN_S + ANSWER_WAIT_S
    try:
        await answer(manager.drain.remote(), lost, limit_s)
    finally:
        ray.kill(manager)  # first, so that it replaces none of the others
        _end_actors()


def _end_actors() -> None:
    for name in names():
        with suppress(ValueError):  # it ended since the list was made
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
