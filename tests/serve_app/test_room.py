"""What a replica takes on at once: one more is told so, and nothing was done for it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from actors.protocol import Accepted, AnyCommand, Principal
from serve_app.patience import Stalled, in_time
from serve_app.settings import ServeSettings
from tests.serve_app.asking import blocks, is_problem, opened, sent
from tests.serve_app.conftest import client
from tests.serve_app.serving import served
from tests.support.sessions import MemorySessions

LIMIT_S = 5
EVENTS = {"Accept": "text/event-stream"}


@asynccontextmanager
async def reading(http: httpx.AsyncClient, session_id: str) -> AsyncGenerator[None]:
    path = f"/v1/sessions/{session_id}/events"
    async with http.stream("GET", path) as response:
        assert response.status_code == 200
        found = blocks(response)  # dropped, it would close the response
        assert await anext(found) == ["retry: 1000"]
        yield


async def test_one_stream_too_many_is_a_problem_until_another_ends(
    settings: ServeSettings, tokens: dict[str, str]
) -> None:
    small = settings.model_copy(update={"max_streams": 2})
    sessions = MemorySessions()
    async with served(sessions, small) as url, client(url, tokens["alice"]) as alice:
        session_id = await opened(alice)
        path = f"/v1/sessions/{session_id}/events"
        async with AsyncExitStack() as first:
            for _ in range(2):
                await first.enter_async_context(reading(alice, session_id))
            body = is_problem(await alice.get(path), 429, "queue_full")
            assert (body["limit"], body["retry_after_s"]) == (2, 2.0)
            # A message that asks for its events is refused before it is taken.
            messages = f"/v1/sessions/{session_id}/messages"
            answer = await alice.post(messages, json={"text": "echo"}, headers=EVENTS)
            is_problem(answer, 429, "queue_full")
            assert sessions.all[session_id].records == []
            # What is no stream has places of its own.
            await sent(alice, session_id, "echo now")
        await sessions.all[session_id].readers(0)
        async with reading(alice, session_id), reading(alice, session_id):
            is_problem(await alice.get(path), 429, "queue_full")


class Slow(MemorySessions):
    """Commands wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.began = asyncio.Semaphore(0)
        self.go = asyncio.Event()

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        self.began.release()
        await self.go.wait()
        return await super().submit(who, session_id, command)


async def test_one_request_too_many_is_a_problem_and_does_nothing(
    settings: ServeSettings, tokens: dict[str, str]
) -> None:
    small = settings.model_copy(update={"max_requests": 2})
    sessions = Slow()
    async with served(sessions, small) as url, client(url, tokens["alice"]) as alice:
        session_id = await opened(alice)
        async with reading(alice, session_id), asyncio.TaskGroup() as group:
            both = [group.create_task(sent(alice, session_id, f"echo {n}")) for n in range(2)]
            async with asyncio.timeout(LIMIT_S):
                for _ in both:
                    await sessions.began.acquire()
            answer = await alice.post(f"/v1/sessions/{session_id}/messages", json={"text": "no"})
            assert is_problem(answer, 429, "queue_full")["limit"] == 2
            assert answer.headers["retry-after"] == "2"
            is_problem(await alice.get("/readyz"), 429, "queue_full")
            assert (await alice.get("/healthz")).status_code == 200
            sessions.go.set()
        assert sorted(one.result()["turn"] for one in both) == [1, 2]
        assert (await sent(alice, session_id, "echo again"))["turn"] == 3


async def test_a_reader_that_the_session_refuses_gets_a_problem(
    settings: ServeSettings, tokens: dict[str, str]
) -> None:
    sessions = MemorySessions(max_readers=1)
    async with served(sessions, settings) as url, client(url, tokens["alice"]) as alice:
        session_id = await opened(alice)
        async with reading(alice, session_id):
            answer = await alice.get(f"/v1/sessions/{session_id}/events")
            assert is_problem(answer, 429, "queue_full")["limit"] == 1
            # Here the message is taken, so the answer says so; its events can be read later.
            path = f"/v1/sessions/{session_id}/messages"
            answer = await alice.post(path, json={"text": "echo hi"}, headers=EVENTS)
            assert (answer.status_code, answer.json()["turn"]) == (202, 1)


async def test_a_write_that_takes_too_long_is_given_up() -> None:
    sent: list[str] = []

    async def send(message: object) -> None:
        sent.append(str(message))
        if len(sent) > 1:
            await asyncio.Event().wait()

    bounded = in_time(send, 0.05)
    await bounded({"type": "a"})
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(Stalled):
            await bounded({"type": "b"})
