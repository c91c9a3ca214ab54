"""Results of the bench as files, `bench/results/*.json`: what `docs/performance.md` takes its figures from."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

RESULTS = Path(__file__).parent / "results"

Kind = Literal["targets", "parts", "growth", "soak", "ray_floor"]
"""`parts`: some of the targets."""


class Result(NamedTuple):
    name: str
    kind: Kind
    at: str
    commit: str
    machine: str
    load_before: float
    figures: Mapping[str, float]


def save(
    name: str, kind: Kind, figures: Mapping[str, float], *, load_before: float, **more: Any
) -> Path:
    RESULTS.mkdir(exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    whole = {
        "kind": kind,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "load_before": load_before,
        "figures": dict(sorted(figures.items())),
        **more,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return path


def latest(kind: Kind) -> Result | None:
    """The newest of a kind, by the instant that it holds."""
    found = [result for path in RESULTS.glob("*.json") if (result := _read(path)).kind == kind]
    return max(found, key=lambda result: result.at, default=None)


def _read(path: Path) -> Result:
    whole = json.loads(path.read_text())
    fields = {field: whole[field] for field in Result._fields if field != "name"}
    return Result(name=path.stem, **fields)
