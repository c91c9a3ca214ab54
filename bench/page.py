"""Writes the tables of `docs/performance.md` from the newest results, so that no figure is typed.

    uv run python -m bench.page             writes them
    uv run python -m bench.page --check     exit code 1: the page does not say what the results say

A table stands between `<!-- TABLE: from results -->` and `<!-- end -->`. What was not measured is `-`.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.budgets import Judged, budgets
from bench.gateway import WAYS
from bench.growth import series
from bench.roles import EVERYONE
from bench.saved import Kind, Result, latest
from bench.soak import BOUNDS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PLACE = re.compile(r"(?<=<!-- )(\w+): from results -->\n.*?(?=<!-- end -->)", re.DOTALL)
COMMANDS: Mapping[Kind, str] = {
    "targets": "python -m bench --save NAME",
    "growth": "python -m bench.growth --save NAME",
    "soak": "python -m bench.soak --save NAME",
    "ray_floor": "python -m bench.ray_floor --save NAME",
}

Row = Sequence[str]


def table(*rows: Row) -> str:
    """The first is the head."""
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def source(result: Result) -> str:
    return (
        f"`{COMMANDS[result.kind]}`, {result.at[:16].replace('T', ' ')} UTC, commit {result.commit},"
        f" {result.machine.partition(',')[0]}, load average before: {result.load_before:.1f}"
        f" (`bench/results/{result.name}.json`).\n"
    )


def _judged(judged: Sequence[Judged]) -> str:
    def row(one: Judged) -> Row:
        sign = "<=" if one.budget.at_least is None else ">="
        bound = f"{sign} {number(one.bound)}"
        return one.budget.what, f"`{one.budget.figure}`", number(one.value), bound, one.verdict

    return table(("What", "Figure", "Measured", "Bound", ""), *map(row, judged))


def targets(result: Result) -> str:
    return _judged([budget.judged(result.figures) for budget in budgets()])


def soak(result: Result) -> str:
    minutes = number(result.figures.get("soak.minutes"))
    judged = [budget.judged(result.figures) for budget in budgets(BOUNDS)]
    return f"{minutes} minutes.\n\n{_judged(judged)}"


DOES: Mapping[str, str] = {
    "session": "loop, feed, journal",
    "gateway": "asks the provider",
    "edge": "HTTP, pages to server-sent events",
    "haproxy": "stands before the edge",
    "proxy": "Serve's own, where HAProxy is not used",
    "manager": "hears of a turn's begin and end; probes",
    "node actor": "reaper; door to a journal that is a server",
    "controller": "Serve's",
    "gcs": "Ray's",
    "raylet": "Ray's",
    "rest": "see below",
}


def roles(result: Result) -> str:
    of = result.figures.get
    n_streams = number(of("troupe.role_streams"))
    columns = ("us_per_chunk", "us_per_turn", "idle_ms_per_s")
    rows = [
        (role, DOES[role], *(number(of(f"troupe.role_{role}_{column}")) for column in columns))
        for role in EVERYONE
    ]
    head = (
        "Process",
        "What it does",
        f"us a chunk, {n_streams} streams",
        "us a turn of one chunk",
        "idle, ms/s",
    )
    return table(head, *rows)


def gateway(result: Result) -> str:
    def row(way: str) -> Row:
        figure = f"gateway.gateway_{way}_{{}}_cpu_us_per_chunk"
        return way, *(number(result.figures.get(figure.format(at))) for at in ("paced", "full"))

    head = ("Who asks", "us a chunk, 50 a second", "us a chunk, as fast as they come")
    return table(head, *map(row, WAYS))


def journal(result: Result) -> str:
    figures = {
        "append of one fact inside the activation, `journal.sync: full`": "append_full_p50_ms",
        "the same, `normal`": "append_normal_p50_ms",
        "fold of 1,000 records": "fold_1000_p50_ms",
        "what a session of 1,000 records reads to wake": "wake_read_1000_p50_ms",
        "list 100 of 10,000 sessions, 95 of 100": "list_100_p95_ms",
    }
    of = result.figures.get
    rows = [(told, number(of(f"journal.{name}"))) for told, name in figures.items()]
    return table(("What", "ms"), *rows)


def growth(result: Result) -> str:
    def rows(kind: str, what: str, told: str) -> list[Row]:
        found = [
            (told, system, ", ".join(f"{n:,.0f}: {number(value)}" for n, value in line))
            for system in ("relay", "local", "troupe")
            if (line := series(result.figures, system, kind, what))
        ]
        return found or [(told, "-", "-")]

    return table(
        ("What", "System", "By number"),
        *rows("sessions", "p50_ms", "chunk delay by streams, median, ms"),
        *rows("sessions", "p99_ms", "the same, 99 of 100, ms"),
        *rows("sessions", "cpu_us_per_chunk", "CPU of a chunk by streams, us"),
        *rows("readers", "p99_ms", "chunk delay by readers, 99 of 100, ms"),
        *rows("readers", "cpu_us_per_chunk_and_reader", "CPU of a chunk and a reader, us"),
        *rows("turn", "p50_ms", "turn by its number, ms"),
        *rows("records", "turn_p50_ms", "turn by records before it, ms"),
        *rows("records", "wake_turn_p50_ms", "the first of them, which wakes the session, ms"),
    )


def ray(result: Result) -> str:
    of = result.figures.get
    ways = {
        "streaming generator of an async actor": "generator",
        "unary call": "unary",
        "grpc.aio stream": "grpc",
        "asyncio socket": "socket",
    }
    hops = [
        (told, *(number(of(f"ray.{way}_{end}_us_per_page")) for end in ("sender", "reader")))
        for told, way in ways.items()
    ]
    empty = (
        f"An empty actor's process: {number(of('ray.empty_idle_ms_per_s'))} ms CPU a second while idle,"
        f" {number(of('ray.empty_main_idle_ms_per_s'))} of them its main thread, which wakes"
        f" {number(of('ray.empty_main_wakes_per_s'))} times a second;"
        f" {number(of('ray.empty_pss_mb'))} MB PSS; {number(of('ray.empty_start_cpu_s'))} CPU-seconds to start.\n"
    )
    return table(("A page by", "us at the sender", "us at the reader"), *hops) + "\n" + empty


TABLES: Mapping[str, tuple[Kind, Callable[[Result], str]]] = {
    "targets": ("targets", targets),
    "roles": ("growth", roles),
    "gateway": ("targets", gateway),
    "journal": ("targets", journal),
    "growth": ("growth", growth),
    "soak": ("soak", soak),
    "ray": ("ray_floor", ray),
}


def written(text: str) -> str:
    """The page with its tables as the results have them.

    Raises:
        KeyError: a table that nobody makes.
    """

    def fresh(place: re.Match[str]) -> str:
        kind, make = TABLES[place[1]]
        result = latest(kind)
        if result is None:
            body = f"Not measured yet: `{COMMANDS[kind]}`.\n"
        else:
            body = f"{make(result)}\n{source(result)}"
        return f"{place[1]}: from results -->\n\n{body}\n"

    return PLACE.sub(fresh, text)


def main() -> int:
    text = PAGE.read_text()
    fresh = written(text)
    if "--check" in sys.argv[1:]:
        return int(fresh != text)
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
