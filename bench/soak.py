"""A house that is lived in for a while: what it takes must not grow.

    uv run --group bench python -m bench.soak [--minutes 30] [--sessions 8] [--save NAME]

Each visitor, again and again: opens a session, talks (tools, or a stream of chunks), leaves it idle until it is
passive, wakes it with a message, deletes it. So processes are used again and again, and replaced after
`MAX_USES`. Meanwhile every `--every` seconds what the processes take, by role, and what the GCS and the journal keep.

The first third warms up. Over the rest, growth is the slope of the linear fit times the time fitted, held
against `bench/soak.yaml`. Exit code 1: a bound was missed.

`--save NAME` writes bench/results/NAME.json and docs/performance/soak.svg.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
import httpx
from rich.console import Console

from bench import plots, roles, systems
from bench.__main__ import show
from bench.budgets import budgets
from bench.load import Client, client
from bench.roles import Taken
from bench.saved import save
from bench.systems import System, house_settings
from serve_app.cli_run import RunFile

BOUNDS = Path(__file__).with_name("soak.yaml")
MODELS = ("tools-2", "chunks-40-at-20")
N_TURNS = 3
"""Of a session, before it is left alone."""
PAUSE_S = 2.0
IDLE_S = 3.0
MAX_USES = 20
"""Fewer than the shipped 50, so that half an hour replaces every process several times."""
PASSIVE_LIMIT_S = 60.0
LOOK_S = 0.5
WARM_UP = 1 / 3
MB = 1024**2

console = Console(width=150)


class Sample(NamedTuple):
    at_s: float
    """Since the begin."""
    taken: dict[str, Taken]
    cpu_s: float
    n_dead_actors: int
    journal_bytes: int
    n_homes: int

    @property
    def n_processes(self) -> int:
        return sum(one.n for one in self.taken.values())


class Tally:
    """What the visitors did."""

    def __init__(self) -> None:
        self.n_turns = 0
        self.n_homes = 0
        """Sessions opened or woken: each took a process."""
        self.faults: Counter[str] = Counter()


async def visit(client: Client, models: Iterator[str], tally: Tally) -> None:
    """One session, from its opening to its end."""
    talk = await client.open(next(models))
    tally.n_homes += 1

    async def say() -> None:
        tally.n_turns += 1
        if (await talk.say()).ended_s is None:
            tally.faults["a turn's stream broke off"] += 1

    for _ in range(N_TURNS):
        await say()
        await asyncio.sleep(PAUSE_S)
    async with asyncio.timeout(PASSIVE_LIMIT_S):
        # It is seen from outside, as a client sees it: there is no event to wait for.
        while (await client.get(f"/v1/sessions/{talk.session_id}"))["status"] != "passive":  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
    tally.n_homes += 1
    await say()
    await client.delete(talk)


async def visitor(
    client: Client, models: Iterator[str], tally: Tally, *, is_over: Callable[[], bool]
) -> None:
    while not is_over():
        try:
            await visit(client, models, tally)
        except (aiohttp.ClientError, TimeoutError) as fault:
            tally.faults[f"{type(fault).__name__}: {fault}"] += 1
            await asyncio.sleep(PAUSE_S)


def sampled(house: System, storage: Path, began_s: float, n_homes: int) -> Sample:
    """Blocking."""
    return Sample(
        time.monotonic() - began_s,
        roles.taken(house),
        house.cpu_s(),
        dead_actors(storage),
        sum(file.stat().st_size for file in storage.glob("journal.sqlite3*")),
        n_homes,
    )


def dead_actors(storage: Path) -> int:
    """That the GCS keeps, as Ray's dashboard counts them; it stops at 10,000."""
    run = RunFile(storage).read()
    assert run
    filters = {"filter_keys": "state", "filter_predicates": "=", "filter_values": "DEAD"}
    answer = httpx.get(
        f"{run.dashboard_url}/api/v0/actors",
        params={"limit": 1, "detail": 0, **filters},
        headers={"Authorization": f"Bearer {run.ray_auth_token}"},
        timeout=30,
    )
    return answer.raise_for_status().json()["data"]["result"]["num_filtered"]


async def soaked(
    house: System, storage: Path, asked: argparse.Namespace, tally: Tally
) -> list[Sample]:
    began_s = time.monotonic()
    end_s = began_s + asked.minutes * 60
    models = itertools.cycle(MODELS)
    samples: list[Sample] = []
    async with client(house.url) as to_house, asyncio.TaskGroup() as visitors:
        for _ in range(asked.sessions):
            visitors.create_task(
                visitor(to_house, models, tally, is_over=lambda: time.monotonic() > end_s)
            )
        while time.monotonic() < end_s:
            await asyncio.sleep(asked.every)
            samples.append(await asyncio.to_thread(sampled, house, storage, began_s, tally.n_homes))
            tell(samples[-1], tally)
    return samples


def tell(sample: Sample, tally: Tally) -> None:
    mb = sum(one.pss_bytes for one in sample.taken.values()) / MB
    console.print(
        f"{sample.at_s:6.0f} s  {tally.n_turns} turns  {sample.n_processes} processes  {mb:.0f} MB"
        f"  {sample.n_dead_actors} dead actors  {sum(tally.faults.values())} faults"
    )


# -- figures ---------------------------------------------------------------------------------------


def growth(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    """By the linear fit, from the first sample to the last."""
    instants = [sample.at_s for sample in samples]
    fit = statistics.linear_regression(instants, [value(sample) for sample in samples])
    return fit.slope * (instants[-1] - instants[0])


def mean_of(role: str, field: str, unit: float = 1) -> Callable[[Sample], float]:
    """Of the processes of a role; 0 where none is there."""

    def value(sample: Sample) -> float:
        one = sample.taken.get(role)
        return getattr(one, field) / one.n / unit if one else 0.0

    return value


def figures_of(samples: Sequence[Sample], tally: Tally) -> dict[str, float]:
    last = samples[-1]
    judged = [sample for sample in samples if sample.at_s >= last.at_s * WARM_UP]
    first = judged[0]
    figures: dict[str, float] = {
        "minutes": last.at_s / 60,
        "turns": tally.n_turns,
        "homes": tally.n_homes,
        "faults": sum(tally.faults.values()),
        "cpu_cores": (last.cpu_s - first.cpu_s) / (last.at_s - first.at_s),
        "processes": last.n_processes,
        "processes_growth": growth(judged, lambda sample: sample.n_processes),
        "processes_replaced": last.n_dead_actors - samples[0].n_dead_actors,
        "dead_actors": last.n_dead_actors,
        "dead_actors_per_100_homes": 100
        * growth(judged, lambda sample: sample.n_dead_actors)
        / max(1, last.n_homes - first.n_homes),
        "journal_mb": last.journal_bytes / MB,
        "journal_mb_growth": growth(judged, lambda sample: sample.journal_bytes / MB),
    }
    for role in roles.EVERYONE:
        name = role.replace(" ", "_")
        for what, value in (
            ("pss_mb", mean_of(role, "pss_bytes", MB)),
            ("fds", mean_of(role, "n_fds")),
            ("threads", mean_of(role, "n_threads")),
        ):
            figures[f"{name}_{what}"] = statistics.fmean(map(value, judged))
            figures[f"{name}_{what}_growth"] = growth(judged, value)
    return {f"soak.{name}": value for name, value in figures.items()}


def draw(samples: Sequence[Sample]) -> Path:
    def lines(field: str, unit: float = 1) -> dict[str, plots.Line]:
        shown = ("session", "manager", "edge", "gateway", "gcs", "raylet")
        return {
            role: [(sample.at_s / 60, mean_of(role, field, unit)(sample)) for sample in samples]
            for role in shown
        }

    def line(value: Callable[[Sample], float]) -> plots.Line:
        return [(sample.at_s / 60, value(sample)) for sample in samples]

    counts = {
        "processes": line(lambda sample: sample.n_processes),
        "dead actors": line(lambda sample: sample.n_dead_actors),
        "journal, MB": line(lambda sample: sample.journal_bytes / MB),
    }
    return plots.draw(
        "soak",
        [
            plots.Panel(
                "memory of a process (PSS), MB", "minutes", lines("pss_bytes", MB), marker=""
            ),
            plots.Panel("descriptors of a process", "minutes", lines("n_fds"), marker=""),
            plots.Panel("threads of a process", "minutes", lines("n_threads"), marker=""),
            plots.Panel("the house", "minutes", counts, marker=""),
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--every", type=float, default=10, help="seconds between two samples")
    parser.add_argument("--save", metavar="NAME")
    asked = parser.parse_args()
    if asked.save:
        plots.check()
    load_before, tally = os.getloadavg()[0], Tally()
    with tempfile.TemporaryDirectory(prefix="troupe-soak-") as below:
        folder = Path(below)
        storage = folder / "troupe"
        storage.mkdir()
        with systems.model_server(folder) as model_url:
            warm = {"spare": asked.sessions, "max_uses": MAX_USES}
            settings = house_settings(storage, model_url, actors={"idle_s": IDLE_S, "warm": warm})
            with systems.troupe(storage, settings) as house:
                samples = asyncio.run(soaked(house, storage, asked, tally))
    figures = figures_of(samples, tally)
    judged = [budget.judged(figures) for budget in budgets(BOUNDS)]
    show(judged)
    console.print(f"{figures['soak.cpu_cores']:.2f} cores; load average before: {load_before:.2f}")
    for fault, n in tally.faults.most_common(10):
        console.print(f"{n} x {fault}")
    missed = [one.budget.what for one in judged if one.verdict != "met"]
    if asked.save:
        save(asked.save, "soak", figures, load_before=load_before, missed=missed)
        console.print(f"{draw(samples)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
