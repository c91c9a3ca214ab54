"""Load over real HTTP, the same for all systems, and what its clients saw.

The client is lean (aiohttp), since it shares two cores with what it measures. Delays are those of single
chunks: each carries the instant at which the model server sent it.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self

import aiohttp

TIMEOUT_S = 120.0
READY_S = 240.0
N_OPENING = 4
"""Sessions that are opened at once where no process waits for them: each start costs a CPU-second."""
SSE = {"Accept": "text/event-stream"}


class Answer(NamedTuple):
    """One turn as its reader saw it; instants are `time.monotonic()`."""

    sent_s: float
    first_s: float | None
    """The first chunk of text."""
    ended_s: float | None
    """The turn's end. None: the stream broke off."""
    delays_ms: tuple[float, ...]
    """Of each chunk, from the model server to here."""

    @property
    def took_ms(self) -> float:
        return ((self.ended_s or float("inf")) - self.sent_s) * 1000

    @property
    def first_ms(self) -> float:
        return ((self.first_s or float("inf")) - self.sent_s) * 1000


class Talk(NamedTuple):
    """One conversation with one system."""

    session_id: str
    say: Callable[[], Awaitable[Answer]]


class Client:
    """Of one system."""

    def __init__(self, http: aiohttp.ClientSession, *, has_sessions: bool, n_warm: int) -> None:
        self._http = http
        self._has_sessions = has_sessions
        self._n_warm = n_warm

    async def ready(self) -> None:
        """Have as many processes wait for a session as there should: by sessions that come and go.

        Raises:
            TimeoutError
        """
        gate = asyncio.Semaphore(N_OPENING)

        async def opened() -> Talk:
            async with gate:
                return await self.open("chunks-1-at-0")

        async with asyncio.timeout(READY_S):
            while self._n_warm and (await self.get("/v1/capacity"))["warm"] < self._n_warm:
                talks = await asyncio.gather(*(opened() for _ in range(self._n_warm)))
                await asyncio.gather(*map(self.delete, talks))

    async def open(self, model: str, agent: str | None = None) -> Talk:
        if not self._has_sessions:
            asked = {"model": model, "messages": [{"role": "user", "content": "go"}]}
            return Talk("", lambda: self._ask("/chat", asked))
        body = {"model": f"openai/{model}"} | ({"agent": agent} if agent else {})
        session_id = (await self.post("/v1/sessions", body))["session_id"]
        return self.talk(session_id)

    def talk(self, session_id: str) -> Talk:
        path = f"/v1/sessions/{session_id}/messages"
        return Talk(session_id, lambda: self._ask(path, {"text": "go"}))

    async def post(self, path: str, body: Any) -> Any:
        async with self._http.post(path, json=body) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def get(self, path: str) -> Any:
        async with self._http.get(path) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def delete(self, talk: Talk) -> None:
        if talk.session_id:
            async with self._http.delete(f"/v1/sessions/{talk.session_id}") as answer:
                answer.raise_for_status()

    async def listen(self, talk: Talk, heard: Callable[[], None]) -> Answer:
        """Read a session from its beginning to the end of its first turn, beside whoever talks to it.
        `heard` is called when the stream is there."""
        sent_s = time.monotonic()
        path = f"/v1/sessions/{talk.session_id}/events"
        async with self._http.get(path, headers=SSE) as answer:
            answer.raise_for_status()
            heard()
            return await _turn(answer.content, sent_s)

    async def _ask(self, path: str, body: Any) -> Answer:
        sent_s = time.monotonic()
        async with self._http.post(path, json=body, headers=SSE) as answer:
            answer.raise_for_status()
            return await _turn(answer.content, sent_s)


async def _turn(content: aiohttp.StreamReader, sent_s: float) -> Answer:
    first_s, ended_s = None, None
    delays_ms: list[float] = []
    async for event, data in _events(content):
        if event == b"text_delta":
            now_ns = time.monotonic_ns()
            first_s = first_s or now_ns / 1e9
            stamps = json.loads(data)["text"].split(",")
            delays_ms += [(now_ns - int(stamp)) / 1e6 for stamp in stamps if stamp]
        elif event == b"turn_ended":
            ended_s = time.monotonic()
            break
    if not delays_ms:
        raise RuntimeError("a turn ended without a word: it failed, and its time means nothing")
    return Answer(sent_s, first_s, ended_s, tuple(delays_ms))


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[tuple[bytes, bytes]]:
    """Names and data; other lines carry nothing that is measured."""
    left = b""
    async for piece in content.iter_any():
        *blocks, left = (left + piece).split(b"\n\n")
        for block in blocks:
            fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if b": " in line)
            yield fields.get(b"event", b""), fields.get(b"data", b"")


@asynccontextmanager
async def client(url: str, *, has_sessions: bool = True, n_warm: int = 0) -> AsyncGenerator[Client]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as http:
        yield Client(http, has_sessions=has_sessions, n_warm=n_warm)


class Load(NamedTuple):
    """What many conversations at once saw, and what the system used meanwhile."""

    answers: tuple[Answer, ...]
    cpu_s: float
    wall_s: float

    @property
    def delays_ms(self) -> list[float]:
        return [delay for answer in self.answers for delay in answer.delays_ms]

    @property
    def n_chunks(self) -> int:
        return sum(len(answer.delays_ms) for answer in self.answers)

    @property
    def cpu_ms_per_chunk(self) -> float:
        return self.cpu_s * 1000 / self.n_chunks


async def together(talks: Sequence[Talk], cpu_s: Callable[[], float]) -> Load:
    """One turn of each at once."""
    before_s, began_s = cpu_s(), time.monotonic()
    answers = await asyncio.gather(*(talk.say() for talk in talks))
    return Load(tuple(answers), cpu_s() - before_s, time.monotonic() - began_s)


class Samples(NamedTuple):
    """Of one figure, sorted."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(tuple(sorted(values)))

    def at(self, share: float) -> float:
        """The value below which a `share` of the samples lie (nearest rank)."""
        return self.values[min(len(self.values) - 1, int(share * len(self.values)))]

    @property
    def p50(self) -> float:
        return self.at(0.5)
