"""The data plane: real sockets on loopback."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from actors import wire
from actors.plane import (
    HIGH_BYTES,
    MAX_FRAME_BYTES,
    PlaneAddress,
    PlaneClient,
    PlaneLost,
    PlaneServer,
)
from actors.protocol import AtCapacity, Moved
from agent.faults import Fault

WAIT_S = 5.0
PIECE = "x" * 1024


class Methods:
    """What a server does, and what became of it."""

    def __init__(self) -> None:
        self.n_made = 0
        self.ended = asyncio.Event()
        self.entered = asyncio.Event()

    async def echo(self, body: Any) -> AsyncGenerator[Any]:
        yield body

    async def count(self, n: Any) -> AsyncGenerator[Any]:
        try:
            for number in range(n):
                self.n_made += 1
                yield [number, PIECE]
        finally:
            self.ended.set()

    async def refuse(self, body: Any) -> AsyncGenerator[Any]:
        yield body
        raise AtCapacity("No room.", scope="global", live=2, limit=2, retry_after_s=5)

    async def break_down(self, body: Any) -> AsyncGenerator[Any]:
        yield body
        raise RuntimeError("a defect")

    async def hang(self, body: Any) -> AsyncGenerator[Any]:
        yield body
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    def by_name(self) -> dict[str, Any]:
        names = ("echo", "count", "refuse", "break_down", "hang")
        return {name: getattr(self, name) for name in names}


class Stand:
    def __init__(self, server: PlaneServer, address: PlaneAddress, methods: Methods) -> None:
        self.server = server
        self.address = address
        self.methods = methods
        self.client = PlaneClient(address)

    async def items(self, method: str, body: Any, silence_s: float = WAIT_S) -> list[Any]:
        stream = self.client.stream(method, body, silence_s=silence_s)
        async with aclosing(stream) as items:
            return [item async for item in items]


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    methods = Methods()
    server = PlaneServer(methods.by_name())
    stand = Stand(server, await server.start("127.0.0.1"), methods)
    async with asyncio.timeout(3 * WAIT_S):
        yield stand
        stand.client.close()
        await server.close()


@pytest.mark.parametrize(
    "body", [None, 1, "half a pair: \ud800", [1, ["a", {"b": 2**70}]], "é" * 9999]
)
async def test_what_is_sent_arrives(stand: Stand, body: Any) -> None:
    [back] = await stand.items("echo", body)
    assert back == (body if body != [1, ["a", {"b": 2**70}]] else [1, ["a", {"b": float(2**70)}]])


async def test_calls_follow_each_other_and_run_beside_each_other(stand: Stand) -> None:
    for _ in range(3):
        assert [number for number, _ in await stand.items("count", 20)] == list(range(20))
    found = await asyncio.gather(*(stand.client.call("echo", n, limit_s=WAIT_S) for n in range(50)))
    assert found == list(range(50))


async def test_a_fault_arrives_as_it_was_raised(stand: Stand) -> None:
    with pytest.raises(AtCapacity, match="No room") as caught:
        await stand.items("refuse", "first")
    assert caught.value.fields == {"scope": "global", "live": 2, "limit": 2, "retry_after_s": 5}
    assert await stand.items("echo", "after") == ["after"]


def test_a_fault_of_a_later_version_is_one_all_the_same() -> None:
    fault = wire.fault_of(["NotYetKnown", "What?", {"n": 1}, "more"], Moved)
    assert type(fault) is Moved
    assert str(fault) == "What?"
    assert type(wire.fault_of(wire.told(Moved("m")), Fault)) is Moved


async def test_a_defect_over_there_is_a_lost_call_and_no_more(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PlaneLost):
        await stand.items("break_down", 1)
    with pytest.raises(PlaneLost):
        await stand.items("no such method", 1)
    assert await stand.items("echo", 2) == [2]
    caplog.clear()  # they are in the log, which is looked at after each test


async def test_who_closes_early_ends_the_call(stand: Stand) -> None:
    async with aclosing(stand.client.stream("hang", 1, silence_s=WAIT_S)) as items:
        assert await anext(items) == 1
        await stand.methods.entered.wait()
    await stand.methods.ended.wait()


async def test_who_is_cancelled_ends_the_call(stand: Stand) -> None:
    reading = asyncio.create_task(stand.items("hang", 1))
    await stand.methods.entered.wait()
    reading.cancel()
    await stand.methods.ended.wait()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_a_server_that_ends_or_is_silent_is_lost(stand: Stand) -> None:
    with pytest.raises(PlaneLost):
        await stand.items("hang", 1, silence_s=0.05)
    reading = asyncio.create_task(stand.items("hang", 1))
    await stand.methods.entered.wait()
    await stand.server.close()
    with pytest.raises(PlaneLost):
        await reading
    with pytest.raises(PlaneLost):
        await stand.items("echo", 1)


async def test_without_the_token_nobody_answers(stand: Stand) -> None:
    stranger = PlaneClient(stand.address._replace(token="0" * 64))
    with pytest.raises(PlaneLost):
        await stranger.call("echo", 1, limit_s=WAIT_S)


@pytest.mark.parametrize("sent", [b"\x00" * 64, b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n"])
async def test_what_is_no_call_ends_the_connection(stand: Stand, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection(stand.address.host, stand.address.port)
    writer.write(sent)
    assert await reader.read() == b""
    writer.close()
    assert await stand.items("echo", 1) == [1]


async def test_a_reader_that_stops_holds_the_writer_back(stand: Stand) -> None:
    n = 64 * HIGH_BYTES // len(PIECE)
    async with aclosing(stand.client.stream("count", n, silence_s=WAIT_S)) as items:
        assert (await anext(items))[0] == 0
        seen = -1
        while seen != stand.methods.n_made:
            seen = stand.methods.n_made
            for _ in range(1000):
                await asyncio.sleep(0)
        assert seen < n
        assert [number async for number, _ in items] == list(range(1, n))


async def test_a_call_that_is_too_large_is_refused_here(stand: Stand) -> None:
    with pytest.raises(ValueError, match="too large"):
        await stand.client.call("echo", "x" * MAX_FRAME_BYTES, limit_s=WAIT_S)
