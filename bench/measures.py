"""What the bench measures over HTTP. Each gives figures by name; units are in the names."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from bench import stock
from bench.load import Client, Load, Samples, Talk, together
from bench.systems import System, is_session

Figures = dict[str, float]

INSTANT = "chunks-1-at-0"
N_WARM_UP = 20
N_TURNS = 200
N_HISTORIES = 10
N_HISTORY_TURNS = 100
WINDOW_TURNS = 5
"""Turns at either end of a history whose median is compared."""
N_SESSIONS = 40
N_AT_ONCE = 50
N_CREATES = 100
N_ROUNDS = 5


async def turns(client: Client) -> Figures:
    """A turn with an instant answer of one chunk, from its POST to its end."""
    talk = await client.open(INSTANT)
    for _ in range(N_WARM_UP):
        await talk.say()
    took_ms = Samples.of([(await talk.say()).took_ms for _ in range(N_TURNS)])
    await client.delete(talk)
    return {"turn_p50_ms": took_ms.p50, "turn_p99_ms": took_ms.at(0.99)}


async def histories(client: Client) -> Figures:
    """How a turn's time grows with the history of its session."""
    early_ms: list[float] = []
    late_ms: list[float] = []
    for _ in range(N_HISTORIES):
        talk = await client.open(INSTANT)
        took_ms = [(await talk.say()).took_ms for _ in range(N_HISTORY_TURNS)]
        early_ms += took_ms[1 : 1 + WINDOW_TURNS]  # the very first also asks what the model can
        late_ms += took_ms[-WINDOW_TURNS:]
        await client.delete(talk)
    early, late = Samples.of(early_ms).p50, Samples.of(late_ms).p50
    return {"turn_early_p50_ms": early, "turn_100_p50_ms": late, "turn_100_ratio": late / early}


async def chunks(client: Client, cpu_s: Callable[[], float]) -> Figures:
    """Streams: one, and forty at once at two speeds."""
    figures: Figures = {}
    for n_talks, rate, n_chunks in ((1, 50, 250), (N_SESSIONS, 50, 300), (N_SESSIONS, 10, 80)):
        load = await streamed(client, cpu_s, n_talks=n_talks, rate=rate, n_chunks=n_chunks)
        delays = Samples.of(load.delays_ms)
        name = f"chunks_{n_talks}x{rate}"
        figures |= {
            f"{name}_p50_ms": delays.p50,
            f"{name}_p99_ms": delays.at(0.99),
            f"{name}_max_ms": delays.values[-1],
            f"{name}_cpu_ms_per_chunk": load.cpu_ms_per_chunk,
            f"{name}_lost": n_talks * n_chunks - load.n_chunks,
        }
    return figures


async def streamed(
    client: Client, cpu_s: Callable[[], float], *, n_talks: int, rate: int, n_chunks: int
) -> Load:
    """Opened, asked once for a word, asked for the stream together, deleted."""
    model = f"chunks-{n_chunks}-at-{rate}"
    talks = await asyncio.gather(*(client.open(model) for _ in range(n_talks)))
    load = await together(talks, cpu_s)
    await asyncio.gather(*map(client.delete, talks))
    return load


async def creates(client: Client) -> Figures:
    """A session, from the POST to its 201; each is deleted again."""
    create_ms: list[float] = []
    first_ms: list[float] = []
    for number in range(N_WARM_UP + N_CREATES):
        began_s = time.monotonic()
        talk = await client.open(INSTANT)
        if number >= N_WARM_UP:
            create_ms.append((time.monotonic() - began_s) * 1000)
        await client.delete(talk)
    for number in range(N_WARM_UP + N_CREATES):
        began_s = time.monotonic()
        talk = await client.open(INSTANT)
        first_s = (await talk.say()).first_s or float("inf")
        if number >= N_WARM_UP:
            first_ms.append((first_s - began_s) * 1000)
        await client.delete(talk)
    create, first = Samples.of(create_ms), Samples.of(first_ms)
    return {
        "create_p50_ms": create.p50,
        "create_p99_ms": create.at(0.99),
        "create_to_first_chunk_p50_ms": first.p50,
        "create_to_first_chunk_p99_ms": first.at(0.99),
    }


async def burst(client: Client) -> Figures:
    """Many creates at once, with as many warm."""
    await client.ready()
    began_s = time.monotonic()

    async def one() -> tuple[Talk, float]:
        return await client.open(INSTANT), time.monotonic() - began_s

    opened = await asyncio.gather(*(one() for _ in range(N_AT_ONCE)))
    await asyncio.gather(*(client.delete(talk) for talk, _ in opened))
    took = Samples.of([took_s for _, took_s in opened])
    return {"burst_p50_s": took.p50, "burst_all_s": took.values[-1]}


async def wakes(client: Client, session_ids: Sequence[str]) -> Figures:
    """A message to a passive session, from the POST to its 202."""
    took_ms: list[float] = []
    for session_id in session_ids:
        began_s = time.monotonic()
        await client.post(f"/v1/sessions/{session_id}/messages", {"text": "go on"})
        took_ms.append((time.monotonic() - began_s) * 1000)
    for session_id in session_ids:
        await client.delete(client.talk(session_id))
    took = Samples.of(took_ms)
    return {"wake_p50_ms": took.p50, "wake_max_ms": took.values[-1]}


async def tool_rounds(client: Client) -> Figures:
    """A turn of five model calls that each run a command, by round; the sandbox is open."""
    talk = await client.open(f"tools-{N_ROUNDS}")
    await talk.say()
    took_ms = [(await talk.say()).took_ms / N_ROUNDS for _ in range(N_WARM_UP)]
    await client.delete(talk)
    return {"tool_round_p50_ms": Samples.of(took_ms).p50}


async def lists(client: Client) -> Figures:
    took_ms: list[float] = []
    for _ in range(N_CREATES):
        began_s = time.monotonic()
        page = await client.get("/v1/sessions?limit=100")
        took_ms.append((time.monotonic() - began_s) * 1000)
        assert len(page["data"]) == 100  # otherwise it measures nothing
    took = Samples.of(took_ms)
    return {"list_100_p50_ms": took.p50, "list_100_p95_ms": took.at(0.95)}


async def memory(client: Client, system: System, n_turns: int = 10) -> Figures:
    """Of a live session's process, idle after twenty messages."""
    talks = [await client.open(INSTANT) for _ in range(10)]
    for _ in range(n_turns):
        await asyncio.gather(*(talk.say() for talk in talks))
    hosts = [process.title for process in system.processes() if is_session(process)]
    live = Samples.of([n / 1024**2 for n in system.pss_bytes(of=is_session)])
    whole = sum(system.pss_bytes()) / 1024**2
    await asyncio.gather(*map(client.delete, talks))
    return {
        "session_pss_p50_mb": live.p50,
        "session_pss_max_mb": live.values[-1],
        "session_processes": len(hosts),
        "house_pss_mb": whole,
    }


async def idle(system: System, wait_s: float = 5.0) -> Figures:
    before_s = system.cpu_s()
    await asyncio.sleep(wait_s)
    return {"idle_cpu_share": (system.cpu_s() - before_s) / wait_s}


Measure = Callable[[Client, System], Awaitable[Figures]]
OF_ALL: Mapping[str, Measure] = {
    "turns": lambda client, _: turns(client),
    "chunks": lambda client, system: chunks(client, system.cpu_s),
}
"""Of every system, the relay too."""
OF_HOUSES: Mapping[str, Measure] = {
    "creates": lambda client, _: creates(client),
    "histories": lambda client, _: histories(client),
    "tools": lambda client, _: tool_rounds(client),
}
"""Of those that have sessions."""
OF_TROUPE: Mapping[str, Measure] = {
    "idle": lambda _, system: idle(system),
    "burst": lambda client, _: burst(client),
    "lists": lambda client, _: lists(client),
    "wakes": lambda client, _: wakes(client, stock.LONG),
    "memory": memory,
}
"""Of the house of processes, which opened the journal of `bench.stock`."""


def named(system: str, figures: Mapping[str, float]) -> Figures:
    return {f"{system}.{name}": value for name, value in figures.items()}
