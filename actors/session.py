"""`SessionActor`: a process that hosts sessions. A thin Ray shell over `SessionHost`."""

import asyncio
import gc
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import session_plane
from actors.activation import Report
from actors.detached import spawn
from actors.gateway_client import GatewayModel
from actors.gateway_wire import Place, place_of
from actors.host import Hosted, SessionHost
from actors.kit import Kit
from actors.memory import process_bytes, trim
from actors.node_journal import NodeJournal
from actors.plane import PlaneAddress, PlaneServer
from actors.protocol import Accepted, AnyCommand, Principal, Unavailable
from actors.remote import NAMESPACE, answer
from actors.settings import ActorsSettings
from agent import logs
from agent.events import PassivationReason, Record
from agent.faults import ModelFault
from agent.journal import Journal
from agent.journals import POSTGRES, open_journal
from agent.settings import AgentSettings
from agent.snapshots import Snapshots

MANAGER = "manager"
GATEWAY = "troupe-gateway"
"""The model gateway's name as a Serve application."""
PREFIX = "session-"
TITLE = "SessionActor"
MAX_CONCURRENCY = 10_000
"""Calls at once on one actor's loop: every open reader holds one."""
ASK_MARGIN_S = 5.0
"""For the way to the manager and back."""


async def kit_of(agent: AgentSettings, actors: ActorsSettings, *, node_id: str = "") -> Kit:
    """The parts that a process of the cluster shares, with a journal of its own. `node_id`: where it
    runs, if it asks models."""
    journal = await open_journal(agent.journal, agent.storage_dir)
    return _kit(journal, agent, actors, node_id)


async def _sessions_kit(name: str, agent: AgentSettings, actors: ActorsSettings) -> Kit:
    """The same for a process that hosts sessions: there are hundreds, too many for a server's
    connections."""
    node_id = ray.get_runtime_context().get_node_id()
    if agent.journal.url.startswith(POSTGRES):
        journal = NodeJournal.here(generation_of(name), agent, actors)
        return _kit(journal, agent, actors, node_id)
    return await kit_of(agent, actors, node_id=node_id)


def _kit(journal: Journal, agent: AgentSettings, actors: ActorsSettings, node_id: str) -> Kit:
    return Kit(
        journal=journal,
        model=gateway_model(actors.gateway_silence_s, node_id=node_id),
        agent=agent,
        actors=actors,
        snapshots=Snapshots(agent.storage, agent.storage_dir),
    )


def gateway_model(silence_s: float, *, app: str = GATEWAY, node_id: str = "") -> GatewayModel:
    """The gateway's replicas, of which the manager knows."""
    manager: Any = None

    async def ask(failed: Mapping[str, int], wait_s: float) -> list[Place]:
        nonlocal manager
        lost = Unavailable("The session manager does not answer.")
        try:
            manager = manager or await asyncio.to_thread(
                ray.get_actor, MANAGER, namespace=NAMESPACE
            )
            told = await answer(
                manager.gateways.remote(app, dict(failed), wait_s), lost, wait_s + ASK_MARGIN_S
            )
        except (RayError, ValueError, ConnectionError) as cause:
            raise lost from cause
        except Unavailable:
            manager = None  # its name may belong to a new one by now
            raise
        return [place_of(place) for place in told]

    return GatewayModel(ask, silence_s, node_id=node_id)


def named(generation: str) -> str:
    """A new session actor's name, which tells of which generation of the code it is."""
    return f"{PREFIX}{generation}-{uuid.uuid4().hex[:12]}"


def generation_of(name: str) -> str:
    return name.removeprefix(PREFIX).partition("-")[0]


class SessionActor:
    async def __init__(self, name: str, agent: AgentSettings, actors: ActorsSettings) -> None:
        self._whose: dict[str, Any] = {}
        """Which session lives here, for logs: tasks of many kinds write them."""
        logs.configure(lambda: self._whose)
        self._entitle("warm")
        self._kit = await _sessions_kit(name, agent, actors)
        self._host = SessionHost(self._kit, name, self._tell)
        self._plane = PlaneServer(session_plane.methods(self._host))
        self._address = await self._plane.start(ray.util.get_node_ip_address())
        self._manager: Any = None
        self._checks = spawn(self._host.keep_current(), name="epochs")
        self._meeting = spawn(self._meet_gateway(agent.default_model or ""), name="gateway")
        # What is loaded by now stays: collections need not look at it again.
        gc.collect()
        gc.freeze()

    async def _meet_gateway(self, model: str) -> None:
        """Be connected, and know the usual model, before a first turn waits for it."""
        with suppress(ModelFault):  # a turn will say so
            await self._kit.model.card(model)

    def _entitle(self, what: str) -> None:
        """Have the process's title say it, from the next call on: around every call Ray (2.60) writes
        one of this class's name."""
        type(self).__name__ = f"{TITLE} {what}"

    def _tell(self, report: Report) -> None:
        """Not awaited: a report is a hint, and the manager may be away."""
        if self._manager is None:
            try:
                self._manager = ray.get_actor(MANAGER, namespace=NAMESPACE)
            except ValueError:
                return
        self._manager.note.remote(report)

    async def ready(self) -> tuple[str, PlaneAddress]:
        """Its node, and where it listens to the edge."""
        return ray.get_runtime_context().get_node_id(), self._address

    async def tidy(self) -> int:
        """Drop what the last session left; the bytes of memory that the process then takes."""
        self._whose = {}
        self._entitle("warm")
        await asyncio.to_thread(trim)
        return await asyncio.to_thread(process_bytes)

    async def gone(self) -> None:
        """Never returns: that this call fails tells the manager at once that the process died."""
        await asyncio.Event().wait()

    async def adopt(self, session_id: str, user_token: str | None, begun: Sequence[Record]) -> int:
        self._whose = {"session_id": session_id}
        epoch = await self._host.adopt(session_id, user_token, begun)
        self._whose = {"session_id": session_id, "epoch": epoch}
        self._entitle(session_id)
        return epoch

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        return await self._host.submit(who, session_id, command)

    async def passivate(self, session_id: str, reason: PassivationReason) -> bool:
        return await self._host.passivate(session_id, reason)

    async def end(self, session_id: str, deleted: bool) -> None:  # noqa: FBT001 - Ray passes by position
        await self._host.end(session_id, deleted=deleted)

    async def hosts(self, session_id: str) -> bool:
        return await self._host.hosts(session_id)

    async def hosted(self) -> list[Hosted]:
        return self._host.hosted()


_remote: Any = ray.remote  # its types know neither async constructors nor these options
_SessionActor = _remote(num_cpus=0, max_restarts=0, max_concurrency=MAX_CONCURRENCY)(SessionActor)
"""`max_restarts=0`: a blind restart knows no epoch and holds no slot; the manager decides."""


def session_actor(
    name: str, agent: AgentSettings, actors: ActorsSettings, *, node: str | None = None
) -> Any:
    """Start one, on this node if it can. Detached: it outlives the manager that made it, and is found
    by its name."""
    placed = _SessionActor.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True) if node else None,
    )
    return placed.remote(name, agent, actors)
