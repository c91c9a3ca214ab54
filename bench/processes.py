"""Processes of this machine, as /proc tells of them, and an owner for those that leave their parents."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench import keeper

LOOK_EVERY_S = 0.05
END_S = 20.0


class Process(NamedTuple):
    pid: int
    parent: int
    title: str
    """The command line, its arguments joined by blanks: programs write titles of their own there."""


def snapshot() -> dict[int, Process]:
    """Every process by its id, zombies aside."""
    found: dict[int, Process] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        # The command's name stands in parentheses and may hold anything.
        state, parent = stat.rpartition(")")[2].split()[:2]
        if state not in {"Z", "X"}:
            title = line.replace(b"\0", b" ").decode(errors="replace").strip()
            found[int(entry.name)] = Process(int(entry.name), int(parent), title)
    return found


def below(root: int, everyone: Mapping[int, Process]) -> list[Process]:
    """The descendants of a process."""
    children: dict[int, list[Process]] = {}
    for process in everyone.values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    todo = [root]
    while todo:
        kids = children.get(todo.pop(), [])
        found += kids
        todo += [kid.pid for kid in kids]
    return found


def ended(pids: Iterable[int], limit_s: float) -> bool:
    """Wait until none of the processes is there."""
    give_up_at = time.monotonic() + limit_s
    left = set(pids)
    while left := left & snapshot().keys():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(LOOK_EVERY_S)
    return True


def send(pid: int, number: signal.Signals) -> bool:
    """Whether the process was there to get it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Kept:
    """What was started here and all that came of it, daemons too; ends with its owner, however that
    ends, or by `end`. Signals of the terminal do not reach it."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab")
        self._keeper = subprocess.Popen(
            [sys.executable, keeper.__file__],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self.pid = self._keeper.pid

    def run(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> None:
        """Start a program; its output goes to the log."""
        assert self._keeper.stdin
        order = json.dumps({"argv": [str(a) for a in argv], "env": dict(env), "cwd": str(cwd)})
        self._keeper.stdin.write(order.encode() + b"\n")
        self._keeper.stdin.flush()

    def processes(self) -> list[Process]:
        return below(self.pid, snapshot())

    def kill(self) -> None:
        """Kill all of it at once, as when a machine goes away. The keeper stays."""
        give_up_at = time.monotonic() + END_S
        while found := self.processes():
            for process in found:
                send(process.pid, signal.SIGKILL)
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"These do not end: {found}")
            time.sleep(LOOK_EVERY_S)

    def end(self) -> None:
        self._log.close()
        assert self._keeper.stdin
        with suppress(BrokenPipeError):
            self._keeper.stdin.close()
        self._keeper.wait(END_S)
