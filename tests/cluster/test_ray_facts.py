"""What the design leans on in Ray, each fact on the run's cluster with actors of its own."""

import asyncio
import os
import signal
from typing import Any

import pytest
import ray

from actors.detached import Detached
from actors.protocol import AtCapacity, Moved, NotFound, Unavailable
from actors.remote import NAMESPACE, answer
from actors.session import MANAGER
from agent.faults import Fault, ModelRateLimited

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("ray_cluster")]

WAIT_S = 30.0
LOST = Moved("lost")
remote: Any = ray.remote  # its types know no async actors


class Events:
    """What happened, for whoever waits for it."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def _event(self, name: str) -> asyncio.Event:
        return self._events.setdefault(name, asyncio.Event())

    def happened(self, name: str) -> None:
        self._event(name).set()

    async def wait(self, name: str) -> None:
        async with asyncio.timeout(WAIT_S):
            await self._event(name).wait()


@remote(num_cpus=0, max_concurrency=100)
class Leaf:
    """Works until it is let go, and tells how it ended."""

    def __init__(self) -> None:
        self._events = Events()

    async def work(self, tag: str) -> str:
        self._events.happened(f"{tag} began")
        try:
            await self._events.wait(f"{tag} go")
        except asyncio.CancelledError:
            self._events.happened(f"{tag} cancelled")
            raise
        self._events.happened(f"{tag} done")
        return tag

    async def go(self, tag: str) -> None:
        self._events.happened(f"{tag} go")

    async def seen(self, name: str) -> bool:
        await self._events.wait(name)
        return True

    async def raises(self, fault: Fault) -> None:
        raise fault

    async def breaks(self) -> None:
        raise ValueError("a secret of the machine")

    async def pid(self) -> int:
        return os.getpid()


@remote(num_cpus=0, max_concurrency=100)
class Middle:
    """Stands where the manager and the edge stand: calls on, in a request and detached from it."""

    def __init__(self, leaf: Any) -> None:
        self._leaf = leaf
        self._tasks = Detached()

    async def request(self) -> None:
        inside = asyncio.create_task(self._call("inside"))
        detached = self._tasks.start(self._call("detached"), name="detached")
        await asyncio.shield(inside)
        await detached

    async def _call(self, tag: str) -> str:
        return await self._leaf.work.remote(tag)


@pytest.fixture(scope="module")
def leaf(ray_cluster: object) -> Any:
    """Shared, since a process takes seconds to start: tests tell their work apart by tags."""
    return Leaf.remote()


async def got(reference: Any) -> Any:
    return await answer(reference, Unavailable("no answer"), WAIT_S)


async def test_cancelling_a_request_reaches_its_calls_but_not_those_of_a_clean_context(
    leaf: Any,
) -> None:
    middle: Any = Middle.remote(leaf)
    request = middle.request.remote()
    assert await got(leaf.seen.remote("inside began"))
    assert await got(leaf.seen.remote("detached began"))
    ray.cancel(request, recursive=True)
    assert await got(leaf.seen.remote("inside cancelled"))
    await got(leaf.go.remote("detached"))
    assert await got(leaf.seen.remote("detached done"))


@pytest.mark.parametrize(
    "fault",
    [
        AtCapacity("Full.", scope="global", live=5, limit=5, retry_after_s=1.5),
        NotFound("There is no such session."),
        ModelRateLimited("Slow down.", retry_after_s=700.0),
    ],
    ids=lambda fault: fault.code,
)
async def test_a_remote_fault_arrives_as_itself(leaf: Any, fault: Fault) -> None:
    with pytest.raises(Fault) as caught:
        await answer(leaf.raises.remote(fault), LOST, WAIT_S)
    assert type(caught.value) is type(fault)
    assert (caught.value.detail, caught.value.fields) == (fault.detail, fault.fields)
    assert str(caught.value) == fault.detail  # no pid, no address, no traceback


async def test_a_defect_arrives_without_its_words(leaf: Any) -> None:
    with pytest.raises(Unavailable) as caught:
        await answer(leaf.breaks.remote(), LOST, WAIT_S)
    assert "secret" not in str(caught.value)


async def test_an_outstanding_call_fails_when_the_process_is_killed() -> None:
    leaf: Any = Leaf.remote()
    pid = await got(leaf.pid.remote())
    call = leaf.work.remote("never")
    assert await got(leaf.seen.remote("never began"))
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(10):  # far below the limit of the call itself
        with pytest.raises(Moved):
            await answer(call, LOST, 3600)


async def test_a_call_that_takes_too_long_is_lost(leaf: Any) -> None:
    call = leaf.work.remote("slow")
    assert await got(leaf.seen.remote("slow began"))
    with pytest.raises(Moved):
        await answer(call, LOST, 0.05)


async def test_a_name_is_found_in_its_namespace_only() -> None:
    with pytest.raises(ValueError, match=MANAGER):
        ray.get_actor(MANAGER)
    assert await got(ray.get_actor(MANAGER, namespace=NAMESPACE).ready.remote())
