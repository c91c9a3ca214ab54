"""Server-sent events: their form, their limits, and what a reader that leaves costs."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from actors.protocol import Unavailable
from agent.events import Cursor, Frame, Page
from serve_app.settings import ServeSettings
from serve_app.stream import EventStream, encoded, event
from tests.serve_app.asking import blocks, opened, sent
from tests.serve_app.asking import event as read_event
from tests.serve_app.conftest import client
from tests.serve_app.serving import served
from tests.support.sessions import MemorySessions

LIMIT_S = 5


def page(*texts: str, begin: int = 0, end: bool = False) -> Page:
    frames = tuple(
        Frame(f"{n}.1.{n}", "text_delta", 1, json.dumps({"text": text}))
        for n, text in enumerate(texts, begin + 1)
    )
    return Page(frames, Cursor(begin + len(texts), 1, begin + len(texts)), end)


class Reading:
    """Pages of the test's choice, and whether their reader closed them."""

    def __init__(self, *pages: Page, then: Exception | None = None, wait: bool = False) -> None:
        self.pages = pages
        self.then = then
        self.wait = wait
        self.n_taken = 0
        self.closed = asyncio.Event()

    async def __call__(self) -> AsyncGenerator[Page, None]:
        try:
            for one in self.pages:
                await asyncio.sleep(0)  # as every page that comes from elsewhere
                self.n_taken += 1
                yield one
            if self.wait:
                await asyncio.Event().wait()
            if self.then:
                raise self.then
        finally:
            self.closed.set()


async def text_of(reading: Reading, *, follow: bool = True, **limits: float) -> str:
    settings = ServeSettings.model_construct(**ServeSettings().model_dump() | limits)
    async with asyncio.timeout(LIMIT_S):
        pages = reading()
        first = await anext(pages, None)
        return b"".join([c async for c in encoded(pages, first, settings, follow=follow)]).decode()


async def test_a_frame_is_three_lines() -> None:
    text = await text_of(Reading(page("hi", end=True)))
    assert text == 'retry: 1000\n\nid: 1.1.1\nevent: text_delta\ndata: {"text": "hi"}\n\n'


async def test_an_empty_page_is_a_heartbeat() -> None:
    text = await text_of(Reading(page(), page("x", end=True)))
    assert text.startswith("retry: 1000\n\n: heartbeat\n\nid: ")


async def test_a_stream_ends_without_more_words_when_nothing_will_follow() -> None:
    reading = Reading(page("a", end=True), page("b"))
    assert "reconnect" not in await text_of(reading)
    assert reading.n_taken == 1


async def test_a_stream_that_broke_off_asks_to_come_back() -> None:
    assert (await text_of(Reading(page("a")))).endswith(": reconnect\n\n")
    broken = Reading(page("a"), then=Unavailable("The session's actor died."))
    text = await text_of(broken)
    assert text.endswith(": reconnect\n\n")
    assert "actor" not in text


async def test_a_stream_to_the_head_just_ends() -> None:
    assert "reconnect" not in await text_of(Reading(page("a")), follow=False)


async def test_a_stream_that_is_cut_at_the_head_still_asks_to_come_back() -> None:
    reading = Reading(page("a" * 600), page("b"))
    text = await text_of(reading, follow=False, stream_max_bytes=500)
    assert text.endswith(": reconnect\n\n")
    assert reading.n_taken == 1


async def test_a_stream_ends_after_its_time() -> None:
    text = await text_of(Reading(page("a"), wait=True), stream_max_s=0.05)
    assert text.endswith('data: {"text": "a"}\n\n: reconnect\n\n')


async def test_a_page_is_cut_at_the_limit_of_bytes_and_not_inside_a_frame() -> None:
    text = await text_of(Reading(page(*["x" * 100] * 10, end=True)), stream_max_bytes=300)
    ids = [line for line in text.split("\n") if line.startswith("id: ")]
    assert ids == ["id: 1.1.1", "id: 2.1.2", "id: 3.1.3"]
    assert text.endswith(": reconnect\n\n")


def test_half_a_character_is_sent_as_json_escapes_it() -> None:
    data = json.dumps({"text": "\ud83d"}, ensure_ascii=False)
    line = event(Frame("1.1.1", "text_delta", 1, data)).decode().split("\n")[2]
    assert json.loads(line.removeprefix("data: ")) == {"text": "\ud83d"}


class Scripted(MemorySessions):
    """Shows the pages of a `Reading` to whoever reads."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.reading = reading

    def pages(self, *_: object, **__: object) -> AsyncGenerator[Page, None]:
        return self.reading()


async def test_an_unforeseen_failure_drops_the_connection_and_says_nothing(
    settings: ServeSettings, tokens: dict[str, str]
) -> None:
    reading = Reading(page("a"), then=RuntimeError("secret"))
    async with served(Scripted(reading), settings) as url, client(url, tokens["bob"]) as bob:
        session_id = await opened(bob)
        async with bob.stream("GET", f"/v1/sessions/{session_id}/events") as response:
            lines = response.aiter_lines()
            received = [await anext(lines) for _ in range(6)]
            with pytest.raises(httpx.RemoteProtocolError):
                received.append(await anext(lines))
    assert received[4] == 'data: {"text": "a"}'
    assert "secret" not in str(received)
    assert reading.closed.is_set()


async def test_leaving_closes_the_pages(
    url: str, alice: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    session_id = await opened(alice)
    session = sessions.all[session_id]
    async with alice.stream("GET", f"/v1/sessions/{session_id}/events") as response:
        assert (await anext(response.aiter_lines())) == "retry: 1000"
        await session.readers(1)
    await session.readers(0)


async def test_a_client_that_reads_nothing_costs_a_page_and_is_dropped(
    settings: ServeSettings, tokens: dict[str, str]
) -> None:
    """2000 pages of 64 KiB wait; the sockets between take a few MiB, the server no more."""
    reading = Reading(*[page("x" * 65536)] * 2000)
    patient = settings.model_copy(update={"stream_max_bytes": 2**30})
    async with served(Scripted(reading), patient) as url, client(url, tokens["bob"]) as bob:
        session_id = await opened(bob)
        port = httpx.URL(url).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(
            f"GET /v1/sessions/{session_id}/events HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {tokens['bob']}\r\n\r\n".encode()
        )
        await reader.readline()
        taken = await settled(reading)
        assert 0 < taken < 500
        writer.transport.abort()
        await asyncio.wait_for(reading.closed.wait(), LIMIT_S)
        assert reading.n_taken <= taken + 5


async def settled(reading: Reading) -> int:
    """How many pages were taken once no more are: the same number through many turns of the loop."""
    quiet, taken = 0, -1
    async with asyncio.timeout(LIMIT_S):
        while quiet < 2000:
            quiet = quiet + 1 if reading.n_taken == taken else 0
            taken = reading.n_taken
            await asyncio.sleep(0)
    return taken


async def test_a_silent_client_is_dropped_when_a_write_takes_too_long() -> None:
    reading = Reading(page("a"), wait=True)

    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        if b"data:" in message.get("body", b""):
            await asyncio.Event().wait()

    async with asyncio.timeout(LIMIT_S):
        pages = reading()
        answer = EventStream(pages, await anext(pages), ServeSettings(), stall_s=0.05)
        await answer({"type": "http"}, receive, send)
    assert reading.closed.is_set()


async def test_a_stream_survives_a_cut_by_its_cursor(
    settings: ServeSettings, tokens: dict[str, str]
) -> None:
    """The edge ends responses again and again; the reader misses nothing and sees nothing twice."""
    short = settings.model_copy(update={"stream_max_bytes": 1500})
    sessions = MemorySessions()
    async with served(sessions, short) as url, client(url, tokens["alice"]) as alice:
        session_id = await opened(alice)
        for n in range(20):
            await sent(alice, session_id, f"echo {n}")
        await alice.post(f"/v1/sessions/{session_id}/close")
        seqs: list[int] = []
        cursor, n_responses = "0.0.0", 0
        while not seqs or seqs[-1] < 61:
            n_responses += 1
            async with alice.stream(
                "GET", f"/v1/sessions/{session_id}/events", headers={"Last-Event-ID": cursor}
            ) as response:
                async for block in blocks(response):
                    if block[0].startswith("id: "):
                        found = read_event(block)
                        cursor = found.id
                        seqs.append(found.data["seq"])
    assert seqs == list(range(1, 62))
    assert n_responses > 5


async def test_heartbeats_come_while_nothing_happens(
    settings: ServeSettings, tokens: dict[str, str]
) -> None:
    sessions = MemorySessions(heartbeat_s=0.02)
    async with served(sessions, settings) as url, client(url, tokens["alice"]) as alice:
        session_id = await opened(alice)
        path = f"/v1/sessions/{session_id}/events"
        async with alice.stream("GET", path) as response, asyncio.timeout(LIMIT_S):
            found = blocks(response)
            assert await anext(found) == ["retry: 1000"]
            for _ in range(3):  # the first is the first page
                assert await anext(found) == [": heartbeat"]
            await sent(alice, session_id, "echo now")
            async for block in found:
                if block != [": heartbeat"]:
                    assert read_event(block).event == "user_message"
                    break


async def test_deleting_a_session_ends_its_streams(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    async with alice.stream("GET", f"/v1/sessions/{session_id}/events") as response:
        found = blocks(response)
        assert [await anext(found) for _ in range(2)] == [["retry: 1000"], [": heartbeat"]]
        await alice.delete(f"/v1/sessions/{session_id}")
        async with asyncio.timeout(LIMIT_S):
            assert [block async for block in found] == []
