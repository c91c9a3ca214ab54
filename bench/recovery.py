"""How long a turn stands still when the process of its session is killed. Over real HTTP, on a house of its own.

    uv run python -m bench.recovery [--kills 20]

A session's turn is in the middle of a command; a process waits warm; the session's is killed with
SIGKILL. Until the first new fact is counted by the clock of a reader that comes back with its cursor,
and so is the way to the turn's next answer of the model.

Exit code 1: the median to the first new fact is above `TARGET_S`, or a turn did not go on.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import yaml

from bench.world import World, wait_until
from serve_app.sse_client import EventReader

TARGET_S = 1.0
WAIT_S = 60.0
STEPS = [{"call": "bash", "args": {"command": "echo up; sleep 600"}}, {"say": "after all"}]


class Recovery(NamedTuple):
    first_fact_s: float
    answer_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description="How fast a killed session's turn goes on.")
    parser.add_argument("--kills", type=int, default=20)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="troupe-recovery-") as folder,
        World(Path(folder), settings={"actors": {"warm": {"min": 1}}}) as world,
        httpx.Client(base_url=world.url, timeout=WAIT_S) as http,
    ):
        found = [_killed(world, http) for _ in range(asked.kills)]
    for name, values in (
        ("first new fact", [one.first_fact_s for one in found]),
        ("model's answer", [one.answer_s for one in found]),
    ):
        p50, p90 = statistics.median(values), statistics.quantiles(values, n=10)[-1]
        print(
            f"{name}: p50 {p50:.2f} s, p90 {p90:.2f} s, max {max(values):.2f} s, n = {len(values)}"
        )
    return 0 if statistics.median(one.first_fact_s for one in found) <= TARGET_S else 1


def _killed(world: World, http: httpx.Client) -> Recovery:
    """One session from its opening to its close."""
    session_id = http.post("/v1/sessions", json={}).raise_for_status().json()["session_id"]
    path = f"/v1/sessions/{session_id}"
    sent = http.post(f"{path}/messages", json={"text": yaml.safe_dump(STEPS)})
    reader = EventReader(http, f"{path}/events", patience_s=WAIT_S)
    killed_at = first_at = answer_at = 0.0
    for event in reader.events(turn=sent.raise_for_status().json()["turn"]):
        now = time.monotonic()
        if event.type == "tool_output_delta" and not killed_at:
            _wait_for_a_warm_one(http)
            victim = world.host_of(session_id)
            if victim is None or not world.kill(victim):
                raise SystemExit("the session's process was not found")
            killed_at = time.monotonic()
        elif killed_at and event.type == "tool_finished" and not first_at:
            first_at = now
        elif event.type == "assistant_message" and first_at:
            answer_at = now
    http.post(f"{path}/close").raise_for_status()
    return Recovery(first_at - killed_at, answer_at - killed_at)


def _wait_for_a_warm_one(http: httpx.Client) -> None:
    wait_until(
        lambda: http.get("/v1/capacity").raise_for_status().json()["warm"] > 0, WAIT_S, "warm"
    )


if __name__ == "__main__":
    sys.exit(main())
