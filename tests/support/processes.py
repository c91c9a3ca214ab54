"""Processes of this machine, as /proc tells of them."""

import asyncio
import os
import select
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

LOOK_EVERY_S = 0.05


def below(root: int) -> list[int]:
    """The process and all its descendants, parents first."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def wait_for_ends(pids: list[int], limit_s: float) -> set[int]:
    """Wait until the processes have ended; those that have not within the limit."""
    deadline = time.monotonic() + limit_s
    late: set[int] = set()
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
                late.add(pid)
        finally:
            os.close(handle)
    return late


async def eventually(holds: Callable[[], Awaitable[bool]], limit_s: float) -> None:
    """Look again and again until it holds: for what has no event to wait for.

    Raises:
        TimeoutError
    """
    async with asyncio.timeout(limit_s):
        while not await holds():  # noqa: ASYNC110 - nothing tells, see above
            await asyncio.sleep(LOOK_EVERY_S)
