"""Owns processes that leave their parents. Run as a script, with the standard library only.

It is the subreaper of all that it starts, so daemons stay its descendants. Each line of its standard
input is a program to start, as JSON: `argv`, `env`, `cwd`. At the end of its input, which comes when
its owner closes it or dies, it kills every descendant and ends.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    signal.signal(signal.SIGCHLD, _reap)
    for line in sys.stdin:
        order = json.loads(line)
        # Reaped by the handler, whichever comes first: the object is of no use afterwards.
        subprocess.Popen(
            order["argv"], env=order["env"], cwd=order["cwd"], stdin=subprocess.DEVNULL
        )
    _end_all()


def _reap(*_: object) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _end_all() -> None:
    """A descendant may fork between two looks, so look until there is none."""
    while children := _descendants():
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.01)


def _descendants() -> list[int]:
    found = [os.getpid()]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
    return found[1:]


if __name__ == "__main__":
    main()
