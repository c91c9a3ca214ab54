"""Hosts on Ray: session actors, each watched for its death. Which of them wait for sessions, and how
many, is `actors.pool`'s; where they start, `actors.rooms` says."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
import structlog
from ray.exceptions import RayError

from actors.desk import Host
from actors.detached import Detached
from actors.host import Hosted
from actors.memory import NodeMemory
from actors.plane import PlaneAddress
from actors.pool import Pool
from actors.protocol import Accepted, AnyCommand, Principal, Unavailable
from actors.remote import NAMESPACE, answer, names
from actors.rooms import Rooms
from actors.session import PREFIX, generation_of, named, session_actor
from actors.settings import ActorsSettings
from agent.events import PassivationReason, Record
from agent.settings import AgentSettings

log = structlog.get_logger()

CLOSE_WAIT_S = 5.0
PROBE_WAIT_S = 5.0
"""For a question that an actor answers at once if it lives."""
MAX_SILENT = 2
"""Probes without an answer before a process is replaced: one may fall into a busy moment."""
LEAVE_MARGIN_S = 5.0
"""Over what a session may take to leave; one that takes longer is stuck, and its process goes."""


class RayHost:
    """A session actor as the desk sees it. Implements `actors.desk.Host`."""

    def __init__(self, name: str, handle: Any, actors: ActorsSettings, *, current: bool) -> None:
        self.name = name
        self.handle = handle
        self.alive = True
        self.current = current
        self.node = ""
        """Empty: not known (yet)."""
        self.address: PlaneAddress | None = None
        self.started = False
        self.n_uses = 0
        self._timeout_s = actors.call_timeout_s
        self._leave_limit_s = actors.drain_s + actors.close_wait_s + LEAVE_MARGIN_S

    def _lost(self) -> Unavailable:
        return Unavailable("The session's process does not answer.", retry_after_s=1)

    async def ready(self) -> None:
        await self._met(self._timeout_s)

    async def _met(self, limit_s: float) -> None:
        self.node, self.address = await answer(self.handle.ready.remote(), self._lost(), limit_s)
        self.started = True

    async def answers(self, wait_s: float) -> bool:
        """Whether its loop turns: a process that is stopped or stuck is not dead to Ray."""
        try:
            await answer(self.handle.ready.remote(), self._lost(), wait_s)
        except Unavailable:
            return False
        return True

    async def tidy(self) -> int:
        """Drop what the last session left; the bytes of memory that its process then takes."""
        memory_bytes = await answer(self.handle.tidy.remote(), self._lost(), PROBE_WAIT_S)
        self.handle.ready.remote()  # as in `adopt`
        return memory_bytes

    async def gone(self) -> None:
        """Wait for its death; Ray tells within milliseconds, by the failure of this call."""
        with suppress(RayError):
            await self.handle.gone.remote()

    async def adopt(
        self, session_id: str, user_token: str | None = None, begun: Sequence[Record] = ()
    ) -> int:
        self.n_uses += 1
        call = self.handle.adopt.remote(session_id, user_token, begun)
        epoch = await answer(call, self._lost(), self._timeout_s)
        self.handle.ready.remote()  # one more call, so that its title tells (`SessionActor`)
        return epoch

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
        await self._met(PROBE_WAIT_S)  # it was taken over, so nobody waits for it to be ready
        return found


class RayHosts:
    """Implements `actors.desk.Hosts`, and `actors.pool.Source` for the pool inside.

    Args:
        generation: of the code that new actors run; it is in their names, without a dash.
        died: called once for every actor that ends unasked.
        is_quiet: whether no session lives.
    """

    def __init__(
        self,
        agent: AgentSettings,
        actors: ActorsSettings,
        generation: str,
        *,
        died: Callable[[str], None],
        is_quiet: Callable[[], bool],
    ) -> None:
        self._agent = agent
        self._actors = actors
        self._generation = generation
        self._died = died
        self._rooms = Rooms()
        self._pool: Pool[RayHost] = Pool(
            actors.warm, self, has_room=self._rooms.has_room, is_quiet=is_quiet
        )
        self._tasks = Detached()
        self._all: dict[str, RayHost] = {}
        self._begun = False

    @property
    def n_warm(self) -> int:
        return self._pool.n_warm

    async def acquire(self) -> RayHost:
        return await self._pool.acquire()

    def begin(self) -> None:
        """From here on hosts are kept ready."""
        self._begun = True
        self._pool.keep_warm()

    def note_memory(self, node: str, memory: NodeMemory) -> None:
        """What a node reports of itself, now and then."""
        if n_surplus := self._rooms.note(node, memory):
            self._pool.shrink(node, n_surplus)
        if self._begun:
            self._pool.keep_warm()

    async def start(self) -> RayHost:
        name = named(self._generation)
        placed = session_actor(name, self._agent, self._actors, node=self._rooms.placed())
        host = self._known(name, placed)
        try:
            await host.ready()
        except (Unavailable, asyncio.CancelledError):
            self.end(host)
            raise
        return host

    async def tidy(self, host: RayHost) -> int:
        return await host.tidy()

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
            self.end(host)
            self._died(host.name)
            self._pool.forget(host)

    async def give_back(self, host: Host, *, clean: bool) -> None:
        known = self._all.get(host.name)
        if known is None:
            return
        if clean and known.current:
            self._pool.give_back(known)
        else:
            self.end(known)

    def end(self, host: RayHost) -> None:
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
        await self._pool.close()
        for host in list(self._all.values()):
            self.end(host)
        await self._tasks.close(CLOSE_WAIT_S)
