"""Sandboxes for tests, and what the machine shows of them from outside."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.sandbox.kinds import bwrap_works, sandlock_works

DEADLINE_S = 10.0
WORKS: dict[str, Callable[[], bool]] = {
    "bwrap": bwrap_works,
    "sandlock": sandlock_works,
    "process": lambda: True,
}


def need(kind: str) -> None:
    """Skip, loudly, where the machine cannot serve a kind."""
    if not WORKS[kind]():
        pytest.skip(f"THIS MACHINE CANNOT SERVE THE SANDBOX KIND {kind!r}: its tests did not run")


def processes(mark: str) -> list[int]:
    """Pids of this machine whose command line holds `mark`, zombies aside."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if mark.encode() in line:
                found.append(int(entry.name))
    return found


def children(mark: str) -> list[int]:
    """Our own children whose command line holds `mark`."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in processes(mark) if str(pid) in found]


def session_cgroups() -> set[Path]:
    return {path for path in Path("/sys/fs/cgroup").rglob("troupe-*") if path.is_dir()}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what only the kernel can tell, with a deadline."""
    give_up_at = time.monotonic() + DEADLINE_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < give_up_at, "the state did not come"
        await asyncio.sleep(0.02)
