"""`NodeActor`: one on every node, for what sessions on it share: the reaper and the door to the journal.

A cluster's journal is a server, and each session is a process: if each had a connection, a node would
hold hundreds. So sessions ask their node's actor (`actors.node_journal`), whose one journal needs a few.

Detached and restarted by Ray for ever, but not when its constructor fails: so that asks nobody. Whoever needs one
first starts it; the manager looks again and again, for nodes without sessions and without a reaper.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
import structlog
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.detached import Detached, spawn
from actors.remote import NAMESPACE, names
from actors.settings import ActorsSettings
from agent import logs
from agent.journals import open_journal
from agent.sandbox.reaper import reap
from agent.settings import AgentSettings

log = structlog.get_logger()

PREFIX = "node-"
MAX_CALLS = 10_000
"""At once: a stalled journal lets one wait for every session of the node."""
CLOSE_WAIT_S = 5.0


class Refused(NamedTuple):
    """A ValueError of the journal, which Ray would bring back as an error of its own."""

    detail: str


class NodeActor:
    async def __init__(self, agent: AgentSettings, reap_s: float) -> None:
        logs.configure()
        self._journal = await open_journal(agent.journal, agent.storage_dir, check=False)
        self._reaping = spawn(self._reap(reap_s), name="reaper")

    async def ready(self) -> bool:
        return not self._reaping.done()

    async def journal(self, method: str, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """What the method of the journal returns, or Refused."""
        try:
            return await getattr(self._journal, method)(*args, **options)
        except ValueError as refused:
            return Refused(str(refused))

    @staticmethod
    async def _reap(every_s: float) -> None:
        while True:
            try:
                for ended in await asyncio.to_thread(reap):
                    log.warning("process_reaped", **ended._asdict())
            except Exception:
                log.exception("reap_failed")
            await asyncio.sleep(every_s)


_remote: Any = ray.remote  # its types know neither async constructors nor these options
_NodeActor = _remote(
    num_cpus=0,
    max_restarts=-1,
    # Who asks while it is being restarted waits for that. A call that was under way when it died is made
    # again too, but for those that ask for 0 (`actors.node_journal`).
    max_task_retries=-1,
    max_concurrency=MAX_CALLS,
)(NodeActor)


def node_actor(node_id: str, generation: str, agent: AgentSettings, actors: ActorsSettings) -> Any:
    """The actor of a node for one generation of the code: the one that runs, else a new one. Blocks,
    but not for its start."""
    placed = _NodeActor.options(
        name=f"{PREFIX}{generation}-{node_id}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )
    return placed.remote(agent, actors.reap_s)


class Nodes:
    """Has an actor on every node that lives. For the manager.

    Args:
        is_rolled: whether no session lives on older code: then the older actors have nobody to serve.
    """

    def __init__(
        self,
        agent: AgentSettings,
        actors: ActorsSettings,
        generation: str,
        is_rolled: Callable[[], bool],
    ) -> None:
        self._generation = generation
        self._is_rolled = is_rolled
        self._agent = agent
        self._actors = actors
        self._tasks = Detached()

    def begin(self) -> None:
        self._tasks.start(self._keep(), name="nodes")

    async def close(self) -> None:
        """Start no more. Those that run go with the house."""
        await self._tasks.close(CLOSE_WAIT_S)

    async def _keep(self) -> None:
        while True:
            await asyncio.to_thread(self._ensure)
            if self._is_rolled():
                await asyncio.to_thread(self._end_older)
            await asyncio.sleep(self._actors.reap_s)

    def _ensure(self) -> None:
        try:
            for node in ray.nodes():
                if node["Alive"]:
                    node_actor(node["NodeID"], self._generation, self._agent, self._actors)
        except (RayError, ValueError, ConnectionError) as error:
            # A node that went while it was asked for, or Ray's own store is away: next time.
            log.warning("node_actor_not_started", error=type(error).__name__)

    def _end_older(self) -> None:
        try:
            for name in names(PREFIX):
                if not name.startswith(f"{PREFIX}{self._generation}-"):
                    ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except (RayError, ValueError, ConnectionError) as error:
            log.warning("node_actor_not_ended", error=type(error).__name__)
