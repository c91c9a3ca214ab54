"""Measures Troupe beside its references and holds the figures against `bench/budgets.yaml`.

    uv run python -m bench                    everything: 10 to 15 minutes on two idle cores
    uv run python -m bench --only chunks      parts by name; budgets of others are not judged
    uv run python -m bench --save NAME        also writes bench/results/NAME.json

Exit code 1: a budget was missed, or not measured in a run of everything. Figures of a machine that does
other work meanwhile mean little; the load average is part of the result.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from bench import gateway, journal, measures, scale, stock, systems
from bench.budgets import Judged, budgets
from bench.load import Samples, client
from bench.measures import Figures, named
from bench.saved import save
from bench.systems import System, house_settings

N_WARM = measures.N_AT_ONCE + 1
OVER_HTTP = {**measures.OF_TROUPE, **measures.OF_ALL, **measures.OF_HOUSES}
PARTS = ("journal", "gateway", "scale", "cold", *OVER_HTTP)

console = Console(width=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--only", action="append", choices=PARTS, help="may be repeated")
    parser.add_argument("--save", metavar="NAME")
    asked = parser.parse_args()
    only = frozenset(asked.only or PARTS)
    load_before = os.getloadavg()[0]
    began_s = time.monotonic()
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="troupe-bench-") as folder:
        for part, measure in _parts(only, Path(folder)):
            console.rule(part)
            found = measure()
            if part != "over HTTP":  # which tells as it goes
                _tell(found)
            figures |= found
    judged = [budget.judged(figures) for budget in budgets()]
    if asked.only:
        judged = [one for one in judged if one.verdict != "not measured"]
    show(judged)
    console.print(f"{time.monotonic() - began_s:.0f} s; load average before: {load_before:.2f}")
    if asked.save:
        missed = [one.budget.what for one in judged if one.verdict != "met"]
        kind = "parts" if asked.only else "targets"
        save(asked.save, kind, figures, load_before=load_before, missed=missed)
    return 0 if all(one.verdict == "met" for one in judged) else 1


def _parts(only: frozenset[str], folder: Path) -> Iterable[tuple[str, Callable[[], Figures]]]:
    if "journal" in only:
        yield "journal", _journal
    if "gateway" in only:
        yield "gateway", lambda: _gateway(folder)
    if "scale" in only:
        yield "manager at scale", lambda: _scale(folder)
    if "cold" in only:
        yield "cold start", lambda: _cold(folder)
    if only & OVER_HTTP.keys():
        yield "over HTTP", lambda: _over_http(only, folder)


def _cold(folder: Path) -> Figures:
    """`troupe up` with the shipped settings, until a first session is there."""
    storage = _below(folder, "cold")
    began_s = time.monotonic()
    settings = {"agent": {"storage_dir": str(storage)}}
    with systems.troupe(storage, settings) as house:
        httpx.post(f"{house.url}/v1/sessions", json={}, timeout=60).raise_for_status()
        return named("cold", {"up_s": house.took_s, "first_session_s": time.monotonic() - began_s})


def _over_http(only: frozenset[str], folder: Path) -> Figures:
    """All systems up at once, one asked at a time: each figure of the house has its reference's beside it."""
    with ExitStack() as ends:
        model_url = ends.enter_context(systems.model_server(folder))
        relay = ends.enter_context(systems.relay(folder, model_url))
        storage = _below(folder, "local")
        local = ends.enter_context(systems.local(storage, house_settings(storage, model_url)))
        storage = _below(folder, "troupe")
        stock.fill(storage)
        settings = house_settings(storage, model_url, actors={"warm": {"spare": N_WARM}})
        house = ends.enter_context(systems.troupe(storage, settings))
        return asyncio.run(_measured(only, relay, local, house))


async def _measured(only: frozenset[str], relay: System, local: System, house: System) -> Figures:
    figures: Figures = {}
    async with (
        client(relay.url, has_sessions=False) as to_relay,
        client(local.url) as to_local,
        client(house.url, n_warm=N_WARM) as to_house,
    ):
        everyone = ((to_relay, relay), (to_local, local), (to_house, house))
        for name, measure in OVER_HTTP.items():
            first = 0 if name in measures.OF_ALL else 1 if name in measures.OF_HOUSES else 2
            for target, system in everyone[first:] if name in only else ():
                await target.ready()
                found = named(system.name, await measure(target, system))
                _tell(found)
                figures |= found
    return figures


def _journal() -> Figures:
    """See `bench.journal`."""

    async def measured() -> Figures:
        return {
            "append_full_p50_ms": Samples.of(await journal.append_ms("full", 500)).p50,
            "append_normal_p50_ms": Samples.of(await journal.append_ms("normal", 500)).p50,
            "fold_1000_p50_ms": Samples.of(journal.fold_ms(1000, 20)).p50,
            "wake_read_1000_p50_ms": Samples.of(await journal.wake_read_ms(1000, 20)).p50,
            "list_100_p95_ms": Samples.of(await journal.list_ms(10_000, 100, 50)).at(0.95),
        }

    return named("journal", asyncio.run(measured()))


def _gateway(folder: Path) -> Figures:
    with systems.model_server(folder) as model_url:
        return named("gateway", gateway.figures(model_url))


def _scale(folder: Path) -> Figures:
    return named("scale", asyncio.run(scale.scale(1_000_000, 100_000, _below(folder, "scale"))))


def _below(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path


def _tell(figures: Figures) -> None:
    for name, value in figures.items():
        console.print(f"{name} = {value:.4g}")


def show(judged: Iterable[Judged]) -> None:
    table = Table("", "figure", "measured", "bound", "verdict")
    colours = {"met": "green", "missed": "red", "not measured": "yellow"}
    for one in judged:
        sign = "<=" if one.budget.at_least is None else ">="
        table.add_row(
            one.budget.what,
            one.budget.figure,
            "" if one.value is None else f"{one.value:.4g}",
            "" if one.bound is None else f"{sign} {one.bound:.4g}",
            f"[{colours[one.verdict]}]{one.verdict}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
