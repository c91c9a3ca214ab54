"""`SessionManager`: the singleton that admits and routes. A thin Ray shell over `Desk`.

Detached and restarted by Ray for ever; a restarted one finds the session actors by their names. What
must go on when a caller leaves runs in the desk's own tasks.
"""

import asyncio
import gc
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ray
import structlog

from actors.activation import Change, Report
from actors.desk import Desk, Route
from actors.detached import spawn
from actors.gateway_wire import place_of
from actors.gateways import Gateways
from actors.host import Hosted
from actors.kit import Kit
from actors.memory import NodeMemory
from actors.node import Nodes
from actors.protocol import (
    Accepted,
    AnyCommand,
    CapacityView,
    Open,
    Principal,
    Unavailable,
)
from actors.rayhost import RayHost, RayHosts
from actors.remote import NAMESPACE
from actors.session import MANAGER, MAX_CONCURRENCY, kit_of
from actors.settings import ActorsSettings
from agent import logs
from agent.agents import load_agents
from agent.faults import JournalFault
from agent.journal import SessionRow
from agent.settings import AgentSettings
from agent.vault import Vault

log = structlog.get_logger()

OPEN_AGAIN_S = 2.0
"""Between two tries to open a journal whose server is away."""


class Rolled(NamedTuple):
    """How far a roll has come."""

    generation: str
    n_outdated: int
    """Sessions that still live on an older one."""


class SessionManager:
    """
    Args:
        generation: names the version of the code and the settings that new session actors get. Older
            ones that this manager finds are replaced one by one.
    """

    async def __init__(self, agent: AgentSettings, actors: ActorsSettings, generation: str) -> None:
        logs.configure()
        self._generation = generation
        self._gateways = Gateways(time.monotonic)
        self._hosts = RayHosts(
            agent, actors, generation, died=self._host_died, is_quiet=self._is_quiet
        )
        self._nodes = Nodes(
            agent, actors, generation, is_rolled=self._is_rolled, seen=self._note_memory
        )
        self._nodes.begin()
        # Not here: Ray does not restart an actor whose constructor failed, and the journal may be away.
        self._beginning = spawn(self._begin(agent, actors), name="begin")

    async def _begin(self, agent: AgentSettings, actors: ActorsSettings) -> Desk:
        vault = Vault.of(agent.secrets)  # here and in no other process of the house
        dirs = [agent.agents_dir] if agent.agents_dir else []
        agents = await asyncio.to_thread(load_agents, dirs)
        kit = await self._kit(agent, actors)
        desk = Desk(kit, self._hosts, agents, default_model=agent.default_model, vault=vault)
        survivors = self._hosts.survivors()
        await self._take_over(desk, survivors)
        for host in survivors:
            if not host.alive:  # it died meanwhile, when there was no desk to tell
                desk.host_died(host.name)
        # Leases last for hours. Were they looked at for garbage again and again, each look at 100,000 would
        # hold everybody up for 0.2 to 0.3 s.
        gc.freeze()
        desk.begin()
        self._hosts.begin()
        return desk

    def _is_rolled(self) -> bool:
        return self._beginning.done() and self._beginning.result().is_rolled

    def _note_memory(self, node: str, memory: NodeMemory) -> None:
        self._hosts.note_memory(node, memory)
        if self._beginning.done():
            self._beginning.result().note_memory(node, memory)

    def _is_quiet(self) -> bool:
        return not self._beginning.done() or not self._beginning.result().ledger.n_live

    @staticmethod
    async def _kit(agent: AgentSettings, actors: ActorsSettings) -> Kit:
        while True:
            try:
                return await kit_of(agent, actors)
            except JournalFault as fault:
                log.warning("journal_not_opened", code=fault.code, detail=fault.detail)
                await asyncio.sleep(OPEN_AGAIN_S)

    async def _desk(self) -> Desk:
        """
        Raises:
            SettingsInvalid: there will be none.
        """
        return await asyncio.shield(self._beginning)

    async def _take_over(self, desk: Desk, hosts: list[RayHost]) -> None:
        """Hosts that lived before this manager: a session counts where its newest epoch is, and a host
        that hosts none, or does not answer, ends."""
        hosted = await asyncio.gather(*(_hosted(host) for host in hosts))
        newest: dict[str, int] = {}
        for session in (session for sessions in hosted for session in sessions):
            newest[session.session_id] = max(session.epoch, newest.get(session.session_id, 0))
        for host, sessions in zip(hosts, hosted, strict=True):
            current = [s for s in sessions if s.epoch == newest[s.session_id]]
            for session in current:
                route = Route(host.name, session.epoch, host.address)
                desk.take_over(
                    host,
                    route,
                    session.session_id,
                    session.user_id,
                    user_token=session.user_token,
                )
                change: Change = "busy" if session.is_busy else "rested"
                desk.note(Report(session.session_id, session.epoch, session.n_reports, change))
            if not current:
                await self._hosts.give_back(host, clean=False)

    def _host_died(self, name: str) -> None:
        # Before, it is not taken over, and the first sweep sees what it left.
        if self._beginning.done():
            self._beginning.result().host_died(name)

    async def ready(self) -> bool:
        await self._desk()
        return True

    async def open(self, who: Principal, command: Open) -> SessionRow:
        return await (await self._desk()).open(who, command)

    async def wake(self, who: Principal, session_id: str, not_at: Route | None) -> Route:
        return await (await self._desk()).wake(who, session_id, not_at=not_at)

    async def find(self, session_id: str) -> Route | None:
        return await (await self._desk()).find(session_id)

    async def when_live(self, session_id: str, wait_s: float, not_at: Route | None) -> Route | None:
        return await (await self._desk()).when_live(session_id, wait_s, not_at=not_at)

    async def close_session(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        return await (await self._desk()).close_session(who, session_id, command)

    async def delete(self, who: Principal, session_id: str) -> None:
        await (await self._desk()).delete(who, session_id)

    async def live_among(self, session_ids: Iterable[str]) -> frozenset[str]:
        return await (await self._desk()).live_among(session_ids)

    async def capacity(self, who: Principal) -> CapacityView:
        return await (await self._desk()).capacity(who)

    async def note(self, report: Report) -> None:
        if self._beginning.done():
            self._beginning.result().note(report)

    async def gateway_here(self, place: dict[str, Any]) -> None:
        """From a replica of the model gateway, every `actors.gateways.BEAT_S`."""
        self._gateways.here(place_of(place))

    async def gateway_gone(self, replica_id: str) -> None:
        self._gateways.gone(replica_id)

    async def gateways(
        self, app: str, failed: Mapping[str, int], wait_s: float
    ) -> list[dict[str, Any]]:
        """See `actors.gateways.Gateways.some`. As plain values: who asks may be of older code."""
        places = await self._gateways.some(app, failed, wait_s)
        return [place._asdict() for place in places]

    async def rolled(self) -> Rolled:
        return Rolled(self._generation, len((await self._desk()).outdated()))

    async def drain(self) -> None:
        """Bring every session to rest, then end every session actor."""
        await (await self._desk()).drain()
        await self._nodes.close()
        await self._hosts.close()


async def _hosted(host: RayHost) -> list[Hosted]:
    try:
        return await host.hosted()
    except Unavailable:
        return []


_remote: Any = ray.remote  # its types know neither async constructors nor these options
_SessionManager = _remote(num_cpus=0, max_restarts=-1, max_concurrency=MAX_CONCURRENCY)(
    SessionManager
)


def session_manager(agent: AgentSettings, actors: ActorsSettings, *, replace: bool = False) -> Any:
    """The manager of this cluster: the one that runs, else a new one.

    Raises:
        ValueError: `replace`, and there still is one.
    """
    placed = _SessionManager.options(
        name=MANAGER, namespace=NAMESPACE, lifetime="detached", get_if_exists=not replace
    )
    return placed.remote(agent, actors, uuid.uuid4().hex[:8])
