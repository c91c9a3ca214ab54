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
from actors.memory import NodeMemory, node_memory
from actors.protocol import Unavailable
from actors.remote import NAMESPACE, answer, names
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
LOOK_S = 2.0
"""Between two readings of the nodes' memory: what takes it does so within seconds."""
LOOK_LIMIT_S = 2.0
MAX_LOOKS_PER_S = 100
"""Of all nodes together, which each cost the manager about 0.5 ms: with more than 200 nodes a reading is made
less often."""


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

    async def memory(self) -> NodeMemory:
        return await asyncio.to_thread(node_memory)

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
        seen: called with a node's id and memory, every `LOOK_S` for every node.
    """

    def __init__(
        self,
        agent: AgentSettings,
        actors: ActorsSettings,
        generation: str,
        is_rolled: Callable[[], bool],
        seen: Callable[[str, NodeMemory], None],
    ) -> None:
        self._seen = seen
        self._by_node: dict[str, Any] = {}
        """The actors of the nodes that live."""
        self._generation = generation
        self._is_rolled = is_rolled
        self._agent = agent
        self._actors = actors
        self._tasks = Detached()

    def begin(self) -> None:
        self._tasks.start(self._keep(), name="nodes")
        self._tasks.start(self._look(), name="memory")

    async def close(self) -> None:
        """Start no more. Those that run go with the house."""
        await self._tasks.close(CLOSE_WAIT_S)

    async def _keep(self) -> None:
        while True:
            await asyncio.to_thread(self._ensure)
            if self._is_rolled():
                await asyncio.to_thread(self._end_older)
            await asyncio.sleep(self._actors.reap_s)

    async def _look(self) -> None:
        while True:
            nodes = self._by_node
            await asyncio.gather(*(self._look_at(*node) for node in nodes.items()))
            await asyncio.sleep(max(LOOK_S, len(nodes) / MAX_LOOKS_PER_S))

    async def _look_at(self, node: str, actor: Any) -> None:
        lost = Unavailable("The node's actor does not answer.")
        try:
            # Not again when it dies: a reading is for now.
            call = actor.memory.options(max_task_retries=0).remote()
            self._seen(node, await answer(call, lost, LOOK_LIMIT_S))
        except Unavailable:
            return  # it starts, or the node is away: the next reading will tell

    def _ensure(self) -> None:
        try:
            self._by_node = {
                node["NodeID"]: node_actor(
                    node["NodeID"], self._generation, self._agent, self._actors
                )
                for node in ray.nodes()
                if node["Alive"]
            }
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
