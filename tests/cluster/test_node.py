"""The node's actor on the run's cluster: its door to the journal, which keeps the journal's whole
contract, its reaper, and its own death."""

import asyncio
import inspect
import os
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import ray

from actors.node import PREFIX, NodeActor
from actors.node_journal import NodeJournal
from actors.remote import NAMESPACE, answer, names
from agent.faults import Fault, JournalFault
from agent.journal import Journal, read_all
from agent.journals import open_journal
from agent.settings import AgentSettings, JournalSettings
from bench.support.postgres import Postgres
from tests.cluster.test_manager import host_of, is_delta, pid_of
from tests.conftest import House
from tests.contracts import test_journal as contract
from tests.contracts.test_journal import begun, said, texts
from tests.support.house import puppet
from tests.support.http import User
from tests.support.journals import Store, opening
from tests.support.processes import below, eventually, wait_for_ends
from tests.support.sandboxes import processes

pytestmark = pytest.mark.timeout(180)

START_S = 60.0
SOON_S = 20.0
NO_REAP_S = 3600.0
LOST = Fault("no answer")


def agent_with(directory: Path) -> AgentSettings:
    return AgentSettings(storage_dir=directory)


class TurningNode(NodeActor):
    """A node's actor whose door can lead to another journal for each test: a process costs seconds."""

    async def turn_to(self, agent: AgentSettings) -> None:
        await self._journal.close()
        self._journal = await open_journal(agent.journal, agent.storage_dir)


def started(kind: type[NodeActor], directory: Path, **options: Any) -> Any:
    remote: Any = ray.remote  # its types know no async actors
    placed = remote(num_cpus=0, max_concurrency=100, **options)(kind)
    return placed.remote(agent_with(directory), NO_REAP_S)


async def got(call: Any) -> Any:
    return await answer(call, LOST, START_S)


@pytest.fixture(scope="module")
def turning(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    del house
    actor = started(TurningNode, tmp_path_factory.mktemp("node"))
    yield actor
    ray.kill(actor)


@pytest.fixture
async def store(turning: Any, tmp_path: Path) -> AsyncIterator[Store]:
    await got(turning.turn_to.remote(agent_with(tmp_path)))
    async with AsyncExitStack() as opened:

        async def another() -> Journal:
            journal = NodeJournal(lambda: turning, timeout_s=START_S)
            opened.push_async_callback(journal.close)
            return journal

        yield another


# The contract's own tests, with the fixture above for theirs.
globals().update(
    {
        name: test
        for name, test in vars(contract).items()
        if name.startswith("test_") and "store" in inspect.signature(test).parameters
    }
)


def test_the_door_is_asked_the_whole_contract() -> None:
    taken = [name for name in globals() if name.startswith("test_") and hasattr(contract, name)]
    assert len(taken) > 20


async def test_many_sessions_at_once_share_the_few_connections_of_their_node(
    turning: Any, tmp_path: Path, postgres: Postgres
) -> None:
    """Each journal here is what a session's process has."""
    db: Any = await asyncpg.connect(postgres.url)  # it has no types
    name = f"node_{secrets.token_hex(4)}"  # of its own, to count its connections
    await db.execute(f"CREATE DATABASE {name}")
    url = postgres.url.removesuffix("/postgres") + f"/{name}"
    agent = AgentSettings(journal=JournalSettings(url=url), storage_dir=tmp_path)
    await got(turning.turn_to.remote(agent))
    sessions = [NodeJournal(lambda: turning, timeout_s=START_S) for _ in range(40)]
    owned = await asyncio.gather(*(begun(journal) for journal in sessions))
    writing = asyncio.gather(
        *(
            journal.append(session_id, epoch, [said(str(n))])
            for journal, (session_id, epoch) in zip(sessions, owned, strict=True)
            for n in range(20)
        )
    )
    counting = "SELECT count(*) FROM pg_stat_activity"
    counts: list[int] = []
    while not writing.done():
        counts.append(await db.fetchval(f"{counting} WHERE datname = $1", name))
    await db.close()
    await writing
    assert 1 <= max(counts) <= 4
    heads = [(await j.row(s)).head for j, (s, _) in zip(sessions, owned, strict=True)]
    assert heads == [21] * 40


@pytest.fixture
async def mortal(house: House, tmp_path: Path) -> AsyncIterator[tuple[Journal, int]]:
    """A journal through a node's actor that may die, and the actor's pid."""
    del house
    actor = started(NodeActor, tmp_path, max_restarts=-1, max_task_retries=-1)
    journal = NodeJournal(lambda: actor, timeout_s=START_S)
    yield journal, await got(actor.__ray_call__.remote(pid_of))
    await journal.close()
    ray.kill(actor)


async def test_calls_after_the_death_of_the_nodes_actor_wait_for_the_next(
    mortal: tuple[Journal, int],
) -> None:
    journal, pid = mortal
    session_id, epoch = await begun(journal)
    os.kill(pid, signal.SIGKILL)
    assert not wait_for_ends([pid], SOON_S)

    async def is_written() -> bool:
        # Ray learns of a death some time after us, and fails what was sent meanwhile.
        try:
            return bool(await journal.append(session_id, epoch, [said("after")]))
        except JournalFault:
            return False

    await eventually(is_written, START_S)
    assert (await texts(journal, session_id))[-1] == "after"
    assert await journal.fence(session_id) == epoch + 1


async def test_an_append_under_way_when_the_nodes_actor_dies_is_a_fault_and_a_read_is_asked_again(
    mortal: tuple[Journal, int],
) -> None:
    journal, pid = mortal
    session_id, epoch = await begun(journal)
    other = opening()
    await journal.create(other)
    os.kill(pid, signal.SIGSTOP)
    append = asyncio.create_task(journal.append(session_id, epoch, [said("a"), said("b")]))
    read = asyncio.create_task(journal.row(other.session_id))
    done, _ = await asyncio.wait({append, read}, timeout=1.0)
    assert not done
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(JournalFault):
        await append
    assert (await read).head == 1
    # Whole or not at all, and once.
    assert len(await read_all(journal, session_id)) in {1, 3}


async def test_every_node_has_its_actor_and_has_it_again_after_a_kill(house: House) -> None:
    del house
    [node_id] = [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    async def pid_of_actor() -> int:
        [name] = await asyncio.to_thread(names, PREFIX)
        assert name.endswith(node_id)
        actor = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
        return await got(actor.__ray_call__.remote(pid_of))

    pid = await pid_of_actor()
    os.kill(pid, signal.SIGKILL)
    assert not wait_for_ends([pid], SOON_S)

    async def is_back() -> bool:
        try:
            return await pid_of_actor() != pid
        except Fault:
            return False

    await eventually(is_back, START_S)


@pytest.mark.parametrize("stopped", [False, True], ids=["warden_runs", "warden_stopped"])
async def test_a_killed_session_process_leaves_no_process_of_its_sandbox(
    alice: User, *, stopped: bool
) -> None:
    """A warden that was stopped cannot end anything: then it is the node's reaper."""
    session_id = await alice.opened()
    mark = f"mark-{secrets.token_hex(8)}"
    sleep = f"/bin/bash -c 'exec -a {mark} /bin/sleep 600'"
    command = f"setsid nohup env -i {sleep} >/dev/null & echo up; {sleep}"
    turn = await alice.sent(
        session_id, puppet({"call": "bash", "args": {"command": command}}, {"say": "after all"})
    )
    await alice.read(session_id, turn=turn, until=is_delta)
    pid = await got((await host_of(session_id)).__ray_call__.remote(pid_of))
    inside = [child for child in below(pid) if child in processes(mark)]
    assert len(inside) >= 2
    if stopped:
        [warden] = [child for child in below(pid) if child in processes("sandbox/warden.py")][:1]
        os.kill(warden, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    assert not wait_for_ends(inside, SOON_S)
    assert (await alice.read(session_id, turn=turn)).facts[-1]["reason"] == "done"
    assert not processes(mark)
