"""What readers cost: those that read nothing, and those that are many. Over real HTTP, on a house of its own.

    uv run python -m bench.readers [--proxy serve] [--silent 20] [--mb 50]
    uv run python -m bench.readers --readers 1000 --sessions 40

Silent readers open a stream and never read. The same work is done without them and with them; the
difference in memory, by role, must stay within `BOUND_BYTES` for each of them in any process. Of the
readers that read, each must get every fact once and in order, and the whole text.

Exit code 1: a bound or a reader was missed.
"""

import argparse
import asyncio
import socket
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.world import World, role_of
from serve_app.sse_client import Lines

BUFFERING = ("session", "manager", "gateway", "edge", "proxy", "haproxy", "haproxy manager")
"""The roles on the way from a session to its readers."""
TEXT = "x" * 90_000
TURN_BYTES = 3 * len(TEXT)
"""What one turn of an echo shows: the message, the preview, the answer."""
STREAM_MAX_BYTES = 4 * 1024**2
BOUND_BYTES = 2 * STREAM_MAX_BYTES + 1024**2
"""For one silent reader in one process: a whole stream, once as it came and once encoded, and pages on
the way."""
WAIT_S = 300.0
SAMPLE_S = 0.5
CHUNKS = 20


def main() -> int:
    parser = argparse.ArgumentParser(description="What readers cost.")
    parser.add_argument("--proxy", choices=["haproxy", "serve"], default="haproxy")
    parser.add_argument("--silent", type=int, default=20)
    parser.add_argument("--mb", type=int, default=50, help="shown while they are silent")
    parser.add_argument("--readers", type=int, default=0, help="of one session")
    parser.add_argument("--sessions", type=int, default=0, help="with a reader each")
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="troupe-readers-") as folder,
        World(Path(folder), settings=_settings(asked)) as world,
    ):
        return asyncio.run(_run(world, asked))


def _settings(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    n_sessions = max(10, asked.sessions + 2)
    return {
        "actors": {
            "max_sessions": n_sessions,
            "max_sessions_per_user": n_sessions,
            "max_readers": max(2000, asked.readers),
        },
        "serve": {"stream_max_bytes": STREAM_MAX_BYTES, "proxy": asked.proxy},
    }


async def _run(world: World, asked: argparse.Namespace) -> int:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=world.url, timeout=WAIT_S, limits=limits) as http:
        good = True
        if asked.readers or asked.sessions:
            if asked.readers:
                good &= await _of_one_session(http, asked.readers)
            if asked.sessions:
                good &= await _of_many_sessions(http, asked.sessions)
        else:
            good = await _silent(http, world, asked.silent, asked.mb)
    return 0 if good else 1


# -- readers that do not read ---------------------------------------------------------------------


async def _silent(http: httpx.AsyncClient, world: World, n_silent: int, n_mb: int) -> bool:
    await _growth(http, world, 0, max(1, n_mb // 5))  # allocators and caches take their first share
    alone = await _growth(http, world, 0, n_mb)
    beside = await _growth(http, world, n_silent, n_mb)
    print(f"{n_silent} silent readers, {n_mb} MB shown; MiB of memory gained (PSS)")
    print(f"{'role':16}{'without':>10}{'with':>10}{'each':>10}{'bound':>10}")
    worst = 0.0
    for role in BUFFERING:
        if role in beside:
            each = (beside[role] - alone.get(role, 0)) / n_silent
            worst = max(worst, each)
            row = [alone.get(role, 0), beside[role], each, BOUND_BYTES]
            print(f"{role:16}" + "".join(f"{value / 1024**2:10.1f}" for value in row))
    return worst <= BOUND_BYTES


async def _growth(http: httpx.AsyncClient, world: World, n_silent: int, n_mb: int) -> Counter[str]:
    """What the processes of each role gained at most while a session showed so much."""
    session_id = await _opened(http, "scripted/echo")
    before = _memory(world)
    peak: dict[int, int] = dict(before)
    sockets = [_silent_reader(http.base_url, session_id) for _ in range(n_silent)]
    watching = asyncio.create_task(_watch(world, peak))
    try:
        for _ in range(n_mb * 1024**2 // TURN_BYTES):
            turn = await _sent(http, session_id, TEXT)
            await _read(http, session_id, turn)
            # Out of the prompt again: it would grow with every turn.
            (await http.post(f"/v1/sessions/{session_id}/undo")).raise_for_status()
        await asyncio.sleep(2 * SAMPLE_S)  # a last look, with everything shown
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        for one in sockets:
            one.close()
    roles = _roles(world)
    gained: Counter[str] = Counter()
    for pid, at_first in before.items():
        if pid in roles:
            gained[roles[pid]] += peak[pid] - at_first
    (await http.delete(f"/v1/sessions/{session_id}")).raise_for_status()
    return gained


def _silent_reader(url: httpx.URL, session_id: str) -> socket.socket:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect((url.host, url.port or 80))
    one.sendall(
        f"GET /v1/sessions/{session_id}/events HTTP/1.1\r\nHost: {url.host}\r\n\r\n".encode()
    )
    return one


async def _watch(world: World, peak: dict[int, int]) -> None:
    while True:
        for pid, now in (await asyncio.to_thread(_memory, world)).items():
            peak[pid] = max(peak.get(pid, 0), now)
        await asyncio.sleep(SAMPLE_S)


def _memory(world: World) -> dict[int, int]:
    """Proportional set size in bytes of every process that has a role."""
    found: dict[int, int] = {}
    for pid in _roles(world):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        found[pid] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return found


def _roles(world: World) -> dict[int, str]:
    found: dict[int, str] = {}
    for process in world.processes():
        role = role_of(process)
        if role in BUFFERING:
            found[process.pid] = role
    return found


# -- readers that read ----------------------------------------------------------------------------


async def _of_one_session(http: httpx.AsyncClient, n: int) -> bool:
    session_id = await _opened(http, "scripted/puppet")
    began_s = time.monotonic()
    gone = Counter[str]()
    ready = asyncio.Semaphore(0)
    readers = [asyncio.create_task(_read(http, session_id, 1, ready=ready)) for _ in range(n)]
    for _ in range(n):  # all of them are there before anything happens
        await asyncio.wait_for(ready.acquire(), WAIT_S)
    opened_s = time.monotonic() - began_s
    await _sent(http, session_id, _talk())
    for heard in await asyncio.gather(*readers):
        gone[heard] += 1
    print(
        f"{n} readers of one session: {dict(gone)}; all were there after {opened_s:.1f} s, "
        f"all had the whole turn after {time.monotonic() - began_s:.1f} s"
    )
    return gone == {"whole": n}


async def _of_many_sessions(http: httpx.AsyncClient, n: int) -> bool:
    began_s = time.monotonic()

    async def one() -> str:
        session_id = await _opened(http, "scripted/puppet")
        return await _read(http, session_id, await _sent(http, session_id, _talk()))

    gone = Counter(await asyncio.gather(*(one() for _ in range(n))))
    took_s = time.monotonic() - began_s
    print(f"{n} sessions with a reader each: {dict(gone)} after {took_s:.1f} s")
    return gone == {"whole": n}


def _talk() -> str:
    return yaml.safe_dump([{"say": "0123456789" * CHUNKS, "chunks": CHUNKS, "delay_s": 0.2}])


async def _read(
    http: httpx.AsyncClient, session_id: str, turn: int, ready: asyncio.Semaphore | None = None
) -> str:
    """Read a turn to its end: "whole", or what was wrong with it."""
    seqs: list[int] = []
    texts: dict[str, str] = {}
    cursor = ""
    ended: dict[str, Any] = {}
    async with asyncio.timeout(WAIT_S):
        while not ended:
            async with _stream(http, session_id, turn, cursor) as lines:
                if lines is None:
                    continue
                if ready is not None:
                    ready.release()
                    ready = None
                feed = Lines()
                async for line in lines:
                    event = feed.feed(line)
                    if event is None:
                        continue
                    cursor, body = event.cursor, event.data
                    if event.type == "text_delta":
                        known = texts.get(body["part_id"], "")
                        if body["offset"] not in {0, len(known)}:
                            return "gap"
                        texts[body["part_id"]] = known[: body["offset"]] + body["text"]
                        continue
                    seqs.append(body["seq"])
                    if event.type == "assistant_message":
                        shown = texts.get(body["part_id"], "")
                        if not body["text"].startswith(shown):
                            return "text"
                    if event.type == "turn_ended":
                        ended = body
    if seqs != sorted(set(seqs)):
        return "order"
    return "whole" if ended["reason"] == "done" else ended["reason"]


@asynccontextmanager
async def _stream(
    http: httpx.AsyncClient, session_id: str, turn: int, cursor: str
) -> AsyncGenerator[Any]:
    headers = {"Last-Event-ID": cursor} if cursor else {}
    path = f"/v1/sessions/{session_id}/events"
    async with http.stream("GET", path, params={"turn": turn}, headers=headers) as response:
        if response.status_code == 429:  # too many come at once: as a client should
            await asyncio.sleep(float(response.headers["retry-after"]))
            yield None
        else:
            response.raise_for_status()
            yield response.aiter_lines()


async def _opened(http: httpx.AsyncClient, model: str) -> str:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    async with asyncio.timeout(WAIT_S):
        while True:
            answer = await http.post("/v1/sessions", json={"model": model}, headers=key)
            if answer.status_code not in {429, 503}:  # its process did not start in time
                answer.raise_for_status()
                return answer.json()["session_id"]
            await asyncio.sleep(float(answer.headers.get("retry-after", 1)))


async def _sent(http: httpx.AsyncClient, session_id: str, text: str) -> int:
    answer = await http.post(f"/v1/sessions/{session_id}/messages", json={"text": text})
    answer.raise_for_status()
    return answer.json()["turn"]


if __name__ == "__main__":
    sys.exit(main())
