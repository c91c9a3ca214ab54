"""Many readers of one session, one too many, and one that never reads, over real HTTP."""

import asyncio
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import AsyncExitStack, contextmanager

import httpx
import pytest

from tests.conftest import SMALL, House
from tests.support.house import puppet
from tests.support.http import AGAIN_S, WAIT_S, Heard, Stream, User

pytestmark = pytest.mark.timeout(180)

TEXT = "".join(f"{n:03d} " for n in range(40))
TALK = puppet({"say": TEXT, "chunks": 40, "delay_s": 0.05})
LONG_TEXT = "x" * 90_000
N_LONG_TURNS = 12
"""Each shows LONG_TEXT three times: 3 MB together, more than all buffers of a connection hold."""


@pytest.fixture
async def crowd(house: House, alice: User) -> AsyncIterator[User]:
    """Alice with as many connections as she likes."""
    async with httpx.AsyncClient(
        base_url=house.url,
        headers={"Authorization": alice.http.headers["authorization"]},
        timeout=WAIT_S,
        limits=httpx.Limits(max_connections=None),
    ) as http:
        yield User("alice", http)


async def entered(stack: AsyncExitStack, user: User, path: str, n: int) -> list[Stream]:
    """So many streams, all of them open."""
    events = (user.events("GET", path) for _ in range(n))
    return await asyncio.gather(*(stack.enter_async_context(one) for one in events))


async def heard_of(stream: Stream) -> Heard:
    heard = Heard()  # a fact twice or a text with a gap is an error there
    async with asyncio.timeout(WAIT_S):
        async for event in stream:
            heard.take(event)
    return heard


async def test_as_many_readers_as_may_hear_everything_and_one_more_is_told_to_come_back(
    crowd: User,
) -> None:
    session_id = await crowd.opened()
    path = f"/v1/sessions/{session_id}/events"
    async with AsyncExitStack() as stack:
        streams = await entered(stack, crowd, f"{path}?turn=1", SMALL.max_readers)
        refused = await crowd.http.get(path)
        assert refused.status_code == 429
        body = refused.json()
        assert (body["code"], body["limit"]) == ("queue_full", SMALL.max_readers)
        assert float(refused.headers["retry-after"]) > 0
        await crowd.sent(session_id, TALK)
        everyone = await asyncio.gather(*(heard_of(stream) for stream in streams))
    for heard in everyone:
        assert heard.types() == ["user_message", "model_called", "assistant_message", "turn_ended"]
        assert heard.facts == everyone[0].facts
        [message] = heard.of("assistant_message")
        assert heard.texts[message["part_id"]] == message["text"] == TEXT


async def test_a_reader_that_breaks_off_leaves_its_place_to_the_next(crowd: User) -> None:
    session_id = await crowd.opened()
    path = f"/v1/sessions/{session_id}/events"
    async with AsyncExitStack() as stack:
        async with crowd.events("GET", path):
            await entered(stack, crowd, path, SMALL.max_readers - 1)
            assert (await crowd.http.get(path)).status_code == 429
        async with asyncio.timeout(WAIT_S):
            while True:
                async with crowd.http.stream("GET", path) as answer:
                    if answer.status_code == 200:
                        return
                await asyncio.sleep(AGAIN_S)


@contextmanager
def silent_reader(user: User, session_id: str) -> Generator[socket.socket]:
    """Opens a stream and takes nothing of it."""
    url = user.http.base_url
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(WAIT_S)
        line.connect((url.host, url.port))
        head = (
            f"GET /v1/sessions/{session_id}/events HTTP/1.1\r\nHost: {url.host}\r\n"
            f"Authorization: {user.http.headers['authorization']}\r\n\r\n"
        )
        line.sendall(head.encode())
        yield line


async def test_a_client_that_reads_nothing_holds_up_nobody(alice: User, bob: User) -> None:
    session_id = await alice.opened(model="scripted/echo")
    other = await bob.opened()
    with silent_reader(alice, session_id) as line:
        for n in range(1, N_LONG_TURNS + 1):
            heard = await alice.ended(session_id, LONG_TEXT)
            [message] = heard.of("assistant_message")
            assert (message["turn"], message["text"]) == (n, LONG_TEXT)
            # Out of the prompt again: it would grow with every turn.
            await alice.command(session_id, "undo")
        assert (await bob.ended(other, TALK)).facts[-1]["reason"] == "done"
        assert (await asyncio.to_thread(line.recv, 15)) == b"HTTP/1.1 200 OK"
