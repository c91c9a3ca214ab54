"""How cost grows: with sessions, with readers, with history. Relay, one process and the house by the same load.

    uv run --group bench python -m bench.growth [--save NAME]      about ten minutes
    uv run python -m bench.growth --only readers --quick           small sizes, to see that it runs

- `sessions`: so many streams of 50 chunks a second at once. Of the house also by role of its processes, and for a
  turn of one chunk, each less what the role takes when nothing happens: what costs what.
- `readers`: one stream of 50 chunks a second that so many read.
- `history`: turns of one chunk, by their number, and on top of histories that were there before.

`--save NAME` writes bench/results/NAME.json and docs/performance/growth-*.svg.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from bench import plots, stock, systems
from bench.load import Client, Load, Samples, client
from bench.measures import INSTANT, N_WARM_UP, Figures, named, streamed
from bench.roles import EVERYONE, Meter
from bench.saved import save
from bench.systems import System, house_settings

RATE = 50
N_IDLE_S = 5.0
TURN_WINDOW = 2
"""Turns on either side of one, of all sessions, whose median is taken."""

console = Console(width=150)


class Sizes(NamedTuple):
    sessions: Sequence[int]
    readers: Sequence[int]
    n_chunks: int
    turns: Sequence[int]
    """Of a fresh session: which are told. The last is how many there are."""
    records: Sequence[int]
    """Of a session that was there before."""
    n_repeats: int
    """Sessions of each kind, for `turns` and `records`."""
    n_after: int
    """Turns on top of a history."""


FULL = Sizes(
    sessions=(1, 5, 10, 20, 40),
    readers=(1, 10, 50, 200),
    n_chunks=300,
    turns=(3, 10, 25, 50, 100, 150, 200),
    records=(0, 1_000, 10_000),
    n_repeats=3,
    n_after=30,
)
QUICK = Sizes((1, 5), (1, 10), 100, (3, 10), (0, 1_000), 1, 5)


# -- measures --------------------------------------------------------------------------------------


async def warm_up(to: Client, system: System) -> None:
    """One stream that is not counted: what is first, is slow."""
    await streamed(to, system.cpu_s, n_talks=1, rate=RATE, n_chunks=RATE)


async def with_sessions(to: Client, system: System, sizes: Sizes) -> Figures:
    await warm_up(to, system)
    figures: Figures = {}
    for n in sizes.sessions:
        await to.ready()
        load = await streamed(to, system.cpu_s, n_talks=n, rate=RATE, n_chunks=sizes.n_chunks)
        figures |= _of_load(f"sessions_{n}", load, lost=n * sizes.n_chunks - load.n_chunks)
    return figures


def _of_load(name: str, load: Load, *, lost: int) -> Figures:
    delays = Samples.of(load.delays_ms)
    return {
        f"{name}_p50_ms": delays.p50,
        f"{name}_p99_ms": delays.at(0.99),
        f"{name}_cpu_us_per_chunk": load.cpu_ms_per_chunk * 1000,
        f"{name}_lost": lost,
    }


async def by_role(to: Client, system: System, sizes: Sizes) -> Figures:
    """Of the house: CPU by role, less what it takes idle."""
    await to.ready()
    meter = Meter(system)
    meter()
    await asyncio.sleep(N_IDLE_S)
    meter()
    idle = {role: used_s / N_IDLE_S for role, used_s in meter.used_s().items()}
    figures = {f"role_{role}_idle_ms_per_s": idle.get(role, 0) * 1000 for role in EVERYONE}
    n = sizes.sessions[-1]
    load = await streamed(to, meter, n_talks=n, rate=RATE, n_chunks=sizes.n_chunks)
    figures |= _less_idle("us_per_chunk", meter, idle, load.wall_s, load.n_chunks)
    figures["role_streams"] = n
    talk = await to.open(INSTANT)
    for _ in range(N_WARM_UP):
        await talk.say()
    meter()
    n_turns = sizes.turns[-1]
    took_s = sum([(await talk.say()).took_ms / 1000 for _ in range(n_turns)])
    meter()
    await to.delete(talk)
    return figures | _less_idle("us_per_turn", meter, idle, took_s, n_turns)


def _less_idle(
    what: str, meter: Meter, idle: Mapping[str, float], wall_s: float, n: int
) -> Figures:
    used_s = meter.used_s()
    return {
        f"role_{role}_{what}": max(0.0, used_s.get(role, 0) - idle.get(role, 0) * wall_s) / n * 1e6
        for role in EVERYONE
    }


async def with_readers(to: Client, system: System, sizes: Sizes) -> Figures:
    await warm_up(to, system)
    figures: Figures = {}
    for n in sizes.readers:
        talk = await to.open(f"chunks-{sizes.n_chunks}-at-{RATE}")
        heard = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as readers:
            reading = [readers.create_task(to.listen(talk, heard.release)) for _ in range(n)]
            for _ in range(n):
                await heard.acquire()
            before_s = system.cpu_s()
            await to.post(f"/v1/sessions/{talk.session_id}/messages", {"text": "go"})
        used_s = system.cpu_s() - before_s
        await to.delete(talk)
        load = Load(tuple(task.result() for task in reading), used_s, 0)
        name = f"readers_{n}"
        figures |= _of_load(name, load, lost=n * sizes.n_chunks - load.n_chunks)
        # Of a chunk that each reader got: what they share is once in it.
        figures[f"{name}_cpu_us_per_chunk"] = used_s / sizes.n_chunks * 1e6
        figures[f"{name}_cpu_us_per_chunk_and_reader"] = used_s / sizes.n_chunks / n * 1e6
    return figures


async def with_history(to: Client, _: System, sizes: Sizes) -> Figures:
    took_ms: list[list[float]] = []
    for _ in range(sizes.n_repeats):
        talk = await to.open(INSTANT)
        took_ms.append([(await talk.say()).took_ms for _ in range(sizes.turns[-1])])
        await to.delete(talk)
    figures: Figures = {}
    for turn in sizes.turns:
        near = slice(max(1, turn - 1 - TURN_WINDOW), turn + TURN_WINDOW)  # the first is never near
        figures[f"turn_{turn}_p50_ms"] = statistics.median(
            one for series in took_ms for one in series[near]
        )
    await to.ready()  # a wake is told without the start of a process
    for n_records in sizes.records:
        firsts: list[float] = []
        rest: list[float] = []
        for number in range(sizes.n_repeats):
            talk = to.talk(rested(n_records, number))
            first, *others = [(await talk.say()).took_ms for _ in range(sizes.n_after + 1)]
            firsts.append(first)
            rest += others
            await to.delete(talk)
        figures[f"records_{n_records}_wake_turn_p50_ms"] = statistics.median(firsts)
        figures[f"records_{n_records}_turn_p50_ms"] = statistics.median(rest)
    return figures


def rested(n_records: int, number: int) -> str:
    """The id of a session with a history."""
    return f"rested-{n_records}-{number}"


# -- the run ---------------------------------------------------------------------------------------

Measure = Callable[[Client, System, Sizes], Awaitable[Figures]]
MEASURES: Mapping[str, tuple[Measure, frozenset[str]]] = {
    "sessions": (with_sessions, frozenset({"relay", "local", "troupe"})),
    "roles": (by_role, frozenset({"troupe"})),
    "readers": (with_readers, frozenset({"local", "troupe"})),
    "history": (with_history, frozenset({"local", "troupe"})),
}
"""And which systems each is of: the relay has neither readers nor a history."""


def measured(only: frozenset[str], sizes: Sizes, folder: Path) -> Figures:
    """Blocking."""
    n_warm = sizes.sessions[-1] + 1
    with ExitStack() as ends:
        model_url = ends.enter_context(systems.model_server(folder))
        relay = ends.enter_context(systems.relay(folder, model_url))
        storage = _stocked(folder, "local", sizes)
        local = ends.enter_context(systems.local(storage, house_settings(storage, model_url)))
        storage = _stocked(folder, "troupe", sizes)
        settings = house_settings(storage, model_url, actors={"warm": {"spare": n_warm}})
        house = ends.enter_context(systems.troupe(storage, settings))
        return asyncio.run(_measured(only, sizes, n_warm, (relay, local, house)))


def _stocked(folder: Path, name: str, sizes: Sizes) -> Path:
    storage = folder / name
    storage.mkdir()
    of_history = {
        rested(n_records, number): n_records // stock.TURN_RECORDS
        for n_records in sizes.records
        for number in range(sizes.n_repeats)
    }
    stock.rest(storage, of_history)
    return storage


async def _measured(
    only: frozenset[str], sizes: Sizes, n_warm: int, everyone: Sequence[System]
) -> Figures:
    figures: Figures = {}
    for name in (name for name in MEASURES if name in only):
        measure, names = MEASURES[name]
        for system in (system for system in everyone if system.name in names):
            n_warm_here = n_warm if system.name == "troupe" else 0
            has_sessions = system.name != "relay"
            async with client(system.url, has_sessions=has_sessions, n_warm=n_warm_here) as to:
                found = named(system.name, await measure(to, system, sizes))
            for figure, value in found.items():
                console.print(f"{figure} = {value:.4g}")
            figures |= found
    return figures


# -- plots -----------------------------------------------------------------------------------------


def series(figures: Mapping[str, float], system: str, kind: str, what: str) -> plots.Line:
    """The figures `SYSTEM.KIND_NUMBER_WHAT`, by their number."""
    before, after = f"{system}.{kind}_", f"_{what}"
    found = {
        name.removeprefix(before).removesuffix(after): value
        for name, value in figures.items()
        if name.startswith(before) and name.endswith(after)
    }
    return sorted((float(number), value) for number, value in found.items() if number.isdigit())


def draw(figures: Mapping[str, float]) -> list[Path]:
    """Every plot for which there are figures."""

    def panel(title: str, x: str, kind: str, what: str, *, is_log: bool = True) -> plots.Panel:
        lines = {
            system: line
            for system in ("relay", "local", "troupe")
            if (line := series(figures, system, kind, what))
        }
        return plots.Panel(title, x, lines, is_log)

    streams, readers = "streams of 50 chunks/s", "readers of one stream"
    per_reader = "cpu_us_per_chunk_and_reader"
    wanted = {
        "growth-sessions": [
            panel("delay of a chunk, median, ms", streams, "sessions", "p50_ms"),
            panel("delay of a chunk, 99 of 100, ms", streams, "sessions", "p99_ms"),
            panel("CPU of a chunk, all processes, us", streams, "sessions", "cpu_us_per_chunk"),
        ],
        "growth-readers": [
            panel("delay of a chunk, 99 of 100, ms", readers, "readers", "p99_ms"),
            panel("CPU of a chunk and a reader, us", readers, "readers", per_reader),
        ],
        "growth-history": [
            panel("turn n of a session, ms", "turn", "turn", "p50_ms", is_log=False),
            panel("turn on n records, ms", "records", "records", "turn_p50_ms", is_log=False),
        ],
    }
    return [
        plots.draw(name, panels)
        for name, panels in wanted.items()
        if all(panel.lines for panel in panels)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=MEASURES, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes; the figures mean little")
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--draw", metavar="FILE", type=Path, help="only draw what was saved before")
    asked = parser.parse_args()
    if asked.save or asked.draw:
        plots.check()
    if asked.draw:
        drawn = draw(json.loads(asked.draw.read_text())["figures"])
        console.print("\n".join(map(str, drawn)))
        return 0
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="troupe-growth-") as folder:
        only = frozenset(asked.only or MEASURES)
        figures = measured(only, QUICK if asked.quick else FULL, Path(folder))
    if asked.save:
        save(asked.save, "growth", figures, load_before=load_before)
        console.print("\n".join(map(str, draw(figures))))
    lost = {name: n for name, n in figures.items() if name.endswith("_lost") and n}
    if lost:
        console.print(f"[red]lost: {lost}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
