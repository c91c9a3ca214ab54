"""Hosts on Ray: session actors, a few of them warm, each watched for its death."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import structlog
from ray.exceptions import RayError

from actors.desk import Host
from actors.detached import Detached
from actors.host import Hosted
from actors.protocol import Accepted, AnyCommand, Principal, Unavailable
from actors.remote import NAMESPACE, answer, names
from actors.session import PREFIX, generation_of, named, session_actor
from actors.settings import ActorsSettings
from agent.events import PassivationReason
from agent.settings import AgentSettings

log = structlog.get_logger()

CLOSE_WAIT_S = 5.0
PROBE_WAIT_S = 5.0
"""For a question that an actor answers at once if it lives."""
MAX_SILENT = 2
"""Probes without an answer before a process is replaced: one may fall into a busy moment."""
LEAVE_MARGIN_S = 5.0
"""Over what a session may take to leave; one that takes longer is stuck, and its process goes."""
MAX_STARTING = 4
"""Actor processes that start at once: each costs 1 to 2 CPU-seconds, which running turns need too."""


class RayHost:
    """A session actor as the desk sees it. Implements `actors.desk.Host`."""

    def __init__(self, name: str, handle: Any, actors: ActorsSettings, *, current: bool) -> None:
        self.name = name
        self.handle = handle
        self.alive = True
        self.current = current
        self.started = False
        self.n_uses = 0
        self._timeout_s = actors.call_timeout_s
        self._leave_limit_s = actors.drain_s + actors.close_wait_s + LEAVE_MARGIN_S

    def _lost(self) -> Unavailable:
        return Unavailable("The session's process does not answer.", retry_after_s=1)

    async def ready(self) -> None:
        await answer(self.handle.ready.remote(), self._lost(), self._timeout_s)
        self.started = True

    async def answers(self, wait_s: float) -> bool:
        """Whether its loop turns: a process that is stopped or stuck is not dead to Ray."""
        try:
            return await answer(self.handle.ready.remote(), self._lost(), wait_s)
        except Unavailable:
            return False

    async def gone(self) -> None:
        """Wait for its death; Ray tells within milliseconds, by the failure of this call."""
        with suppress(RayError):
            await self.handle.gone.remote()

    async def adopt(self, session_id: str, user_token: str | None = None) -> int:
        self.n_uses += 1
        call = self.handle.adopt.remote(session_id, user_token)
        return await answer(call, self._lost(), self._timeout_s)

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        call = self.handle.submit.remote(who, session_id, command)
        return await answer(call, self._lost(), self._timeout_s)

    async def passivate(self, session_id: str, reason: PassivationReason) -> bool:
        call = self.handle.passivate.remote(session_id, reason)
        return await answer(call, self._lost(), self._leave_limit_s)

    async def end(self, session_id: str, *, deleted: bool = False) -> None:
        await answer(self.handle.end.remote(session_id, deleted), self._lost(), self._timeout_s)

    async def hosts(self, session_id: str) -> bool:
        try:
            return await answer(self.handle.hosts.remote(session_id), self._lost(), PROBE_WAIT_S)
        except Unavailable:
            return False

    async def hosted(self) -> list[Hosted]:
        found = await answer(self.handle.hosted.remote(), self._lost(), PROBE_WAIT_S)
        self.started = True  # it was taken over, so nobody waits for it to be ready
        return found


class RayHosts:
    """Implements `actors.desk.Hosts`.

    Args:
        generation: of the code that new actors run; it is in their names, without a dash.
        died: called once for every actor that ends unasked.
    """

    def __init__(
        self,
        agent: AgentSettings,
        actors: ActorsSettings,
        generation: str,
        died: Callable[[str], None],
    ) -> None:
        self._agent = agent
        self._actors = actors
        self._generation = generation
        self._died = died
        self._warm: deque[RayHost] = deque()
        self._starting = asyncio.Semaphore(MAX_STARTING)
        self._tasks = Detached()
        self._refill: asyncio.Task[None] | None = None
        self._all: dict[str, RayHost] = {}
        self._closing = False

    @property
    def n_warm(self) -> int:
        return len(self._warm)

    async def acquire(self) -> RayHost:
        host = await self._warm_or_new()
        self.keep_warm()
        return host

    async def _warm_or_new(self) -> RayHost:
        """A host that was given back while this waited for its start is as good."""
        if not self._warm:
            async with self._starting:
                if not self._warm:
                    return await self._started()
        return self._warm.popleft()

    def keep_warm(self) -> None:
        """Have the pool filled in the background, one at a time."""
        if self._refill is None and not self._closing:
            self._refill = self._tasks.start(self._fill(), name="warm")

    async def _fill(self) -> None:
        try:
            while len(self._warm) < self._actors.warm.min and not self._closing:
                # First: a death meanwhile puts another pool in the place of this one.
                async with self._starting:
                    host = await self._started()
                if host.alive:
                    self._warm.append(host)
        except Unavailable as fault:
            log.warning("warm_actor_failed", code=fault.code)
        finally:
            self._refill = None

    async def _started(self) -> RayHost:
        name = named(self._generation)
        host = self._known(name, session_actor(name, self._agent, self._actors))
        try:
            await host.ready()
        except Unavailable:
            self._kill(host)
            raise
        return host

    def _known(self, name: str, handle: Any) -> RayHost:
        host = RayHost(name, handle, self._actors, current=generation_of(name) == self._generation)
        self._all[name] = host
        self._tasks.start(self._watch(host), name=f"watch {name}")
        return host

    async def _watch(self, host: RayHost) -> None:
        """Learn of a death, or that the process does not answer any more: then it is ended."""
        gone = self._tasks.start(host.gone(), name="gone")
        n_silent = 0
        while not gone.done() and n_silent < MAX_SILENT:
            await asyncio.wait({gone}, timeout=self._actors.probe_s)
            if not gone.done() and host.started:
                n_silent = 0 if await host.answers(self._actors.probe_s) else n_silent + 1
        if self._all.get(host.name) is host:
            self._warm = deque(warm for warm in self._warm if warm is not host)
            self._kill(host)
            self._died(host.name)
            self.keep_warm()

    async def give_back(self, host: Host, *, clean: bool) -> None:
        known = self._all.get(host.name)
        if known is None:
            return
        fresh = clean and known.current and known.n_uses < self._actors.warm.max_uses
        if fresh and len(self._warm) < max(1, self._actors.warm.min) and not self._closing:
            self._warm.append(known)
        else:
            self._kill(known)

    def _kill(self, host: RayHost) -> None:
        """End a process of ours; its watcher stays quiet."""
        self._all.pop(host.name, None)
        host.alive = False
        try:
            ray.kill(host.handle)
        except (RayError, ValueError, ConnectionError) as error:
            # Ray's own store is away. Slots must be given back all the same; what lives on is found by
            # the next manager, and can write nothing.
            log.warning("host_not_killed", host=host.name, error=type(error).__name__)

    def survivors(self) -> list[RayHost]:
        """The session actors that a manager before this one left, now watched by this one."""
        hosts: list[RayHost] = []
        for name in names(PREFIX):
            if name not in self._all:
                with suppress(ValueError):  # it died since the list was made
                    hosts.append(self._known(name, ray.get_actor(name, namespace=NAMESPACE)))
        return hosts

    async def close(self) -> None:
        """End every actor."""
        self._closing = True
        for host in list(self._all.values()):
            self._kill(host)
        await self._tasks.close(CLOSE_WAIT_S)
