"""Ends what dead owners left on this machine, and never touches what a live one has.

A sandbox's warden ends it by itself when its owner dies. This is for what that cannot reach: a warden
that was stopped or hangs, and what outlived a warden that was killed. Judged by /proc alone, so any
process of the same user may do it, for all owners on the machine. Every function here blocks.

Nothing is signalled but through a pidfd that was opened before the last look at the process, so a pid
that was given to another meanwhile is not hit.

What cannot be seen: a process that left its sandbox's tree (`setsid`, and its parents ended), cleared its
environment and is in no cgroup of a sandbox. That takes the kind `process` on a machine where no
cgroup can be made, and the death of the warden. A process that pretends to be in a sandbox that is dead
is ended as if it were; one that pretends to be in a live one is left alone.
"""

import os
import re
import select
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from agent.sandbox.limits import usable_cgroups
from agent.sandbox.marks import INSIDE, WARDEN, Mark, Stat

GRACE_S = 2.0
"""For a warden whose owner has died to end by itself: it takes some 50 ms, more under load."""
END_LIMIT_S = 5.0
"""For a warden to end what it holds, once it was asked."""
MAX_ROUNDS = 20
"""Looks for what outlived a warden; what is left then is found by the next `reap`."""
_ROUND_S = 0.5
_CGROUP = re.compile(rb"/(troupe-\d+-\d+)(?=/|$)", re.MULTILINE)


class Reaped(NamedTuple):
    """Something that was ended."""

    what: Literal["warden", "orphan"]
    pid: int
    session_id: str | None
    """None: an orphan, whose warden is not there to say."""


class Process(NamedTuple):
    pid: int
    started: int
    mark: Mark | None
    """It is a warden."""
    inside: str | None
    """The mark of the sandbox that it is in, or of the one whose warden it was forked from."""
    cgroup: str | None

    @property
    def its_cgroup(self) -> str:
        """Of a warden: the name of the one that it makes."""
        return f"troupe-{self.pid}-{self.started}"


def reap(grace_s: float = GRACE_S) -> list[Reaped]:
    """End the sandboxes whose owner has died, and what outlived its warden; remove their cgroups."""
    lost = [p for p in _everyone() if p.mark and not _owner_lives(p.pid, p.mark)]
    return _ended_wardens(lost, grace_s) + _ended_orphans()


def evict(session_id: str, below_epoch: int) -> list[Reaped]:
    """End a session's sandboxes of earlier epochs, though their owner may live: it was replaced, and
    may be paused, so it does not know."""
    old = [
        p
        for p in _everyone()
        if p.mark and p.mark.session_id == session_id and p.mark.epoch < below_epoch
    ]
    return _ended_wardens(old, 0.0) + _ended_orphans() if old else []


def _everyone() -> list[Process]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [process for pid in pids if (process := _look(pid)) is not None]


def _look(pid: int) -> Process | None:
    """None: it has ended, or is another user's."""
    try:
        stat = Stat.of(pid)
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        cgroups: list[bytes] = _CGROUP.findall(Path(f"/proc/{pid}/cgroup").read_bytes())
    except OSError:
        return None
    if stat.gone:
        return None
    mark = Mark.parse(_value(environ, WARDEN))
    inside = _value(environ, INSIDE) or (mark.inside if mark else None)
    # What a warden forks has the warden's environment until it starts another program. A warden leads a
    # session of its own and is never in the cgroup that it makes.
    is_warden = mark is not None and stat.session == pid and not cgroups
    return Process(
        pid,
        stat.started,
        mark if is_warden else None,
        None if is_warden else inside,
        cgroups[-1].decode() if cgroups else None,
    )


def _value(environ: bytes, name: str) -> str:
    begin = f"{name}=".encode()
    found = (entry for entry in environ.split(b"\0") if entry.startswith(begin))
    return os.fsdecode(next(found, begin)[len(begin) :])


def _owner_lives(pid: int, mark: Mark) -> bool:
    try:
        owner = Stat.of(mark.owner)
        # Of the same user, else anyone could name init as the owner.
        uids = {Path(f"/proc/{one}").stat().st_uid for one in (pid, mark.owner)}
    except OSError:
        return False
    return len(uids) == 1 and not owner.gone and owner.started == mark.owner_started


def _ended_wardens(wardens: Iterable[Process], grace_s: float) -> list[Reaped]:
    """Ask those that do not end within `grace_s` to end what they hold, then kill them."""
    with ExitStack() as held:
        alive = {fd: warden for warden in wardens for fd in _handles(warden, held)}
        alive = _waited(alive, grace_s)
        ended = [
            Reaped("warden", warden.pid, warden.mark.session_id)
            for fd, warden in alive.items()
            # Both: a stopped one takes the first only when it goes on.
            if _sent(fd, signal.SIGTERM) and _sent(fd, signal.SIGCONT) and warden.mark
        ]
        alive = _waited(alive, END_LIMIT_S)
        for fd in alive:
            _sent(fd, signal.SIGKILL)
        _waited(alive, END_LIMIT_S)
    return ended


def _ended_orphans() -> list[Reaped]:
    """Kill what no warden holds any more, again until nothing new was forked meanwhile."""
    ended: list[Reaped] = []
    for _ in range(MAX_ROUNDS):
        groups = _dead_cgroups()
        for group in groups:
            with suppress(OSError):  # another reaper was first, or this hierarchy has no such limit
                (group / "pids.max").write_text("0")
        orphans = _orphans()
        with ExitStack() as held:
            alive = {fd: orphan for orphan in orphans for fd in _handles(orphan, held)}
            killed = {fd: orphan for fd, orphan in alive.items() if _sent(fd, signal.SIGKILL)}
            ended += [Reaped("orphan", orphan.pid, None) for orphan in killed.values()]
            _waited(killed, _ROUND_S)
        for group in groups:
            _remove(group)
        if not orphans:
            break
    return ended


def _orphans() -> list[Process]:
    # In this order: a warden is older than what it holds, so each that still lives is seen.
    marked = [p for p in _everyone() if p.inside or p.cgroup]
    if not marked:
        return []
    wardens = [p for p in _everyone() if p.mark]
    # We may ourselves run in a sandbox, whose warden is out of our sight.
    us = _look(os.getpid())
    words = {w.mark.inside for w in wardens if w.mark} | ({us.inside} if us else set())
    groups = {w.its_cgroup for w in wardens} | ({us.cgroup} if us else set())
    pids = {w.pid for w in wardens}
    return [
        p
        for p in marked
        # The cgroup comes first: it is the one that a process cannot write down itself.
        if (p.cgroup not in groups if p.cgroup else p.inside not in words)
        and not _is_below(p.pid, pids)
    ]


def _is_below(pid: int, wardens: Collection[int]) -> bool:
    """Whether a warden is among the ancestors; also when one of them ended while we looked, since the
    process has another parent then: the next look tells."""
    while pid > 1:
        if pid in wardens:
            return True
        try:
            pid = Stat.of(pid).parent
        except OSError:
            return True
    return False


def _dead_cgroups() -> list[Path]:
    found = [group for parent in usable_cgroups()[1] for group in parent.glob("troupe-*-*")]
    if not found:
        return []
    live = {p.its_cgroup for p in _everyone() if p.mark}
    return [
        group
        for group in found
        if _CGROUP.match(f"/{group.name}".encode()) and group.name not in live
    ]


def _remove(group: Path) -> None:
    """With what was made below it. One that still has processes stays (EBUSY) for the next look."""
    for path in sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True):
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        group.rmdir()


def _handles(process: Process, held: ExitStack) -> Iterator[int]:
    """A pidfd of the process, if it is still the one that was looked at."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return
    held.callback(os.close, fd)
    if _look(process.pid) == process:
        yield fd


def _waited(alive: dict[int, Process], limit_s: float) -> dict[int, Process]:
    """Those that have not ended within the limit."""
    deadline = time.monotonic() + limit_s
    poll = select.poll()
    for fd in alive:
        poll.register(fd, select.POLLIN)
    left = dict(alive)
    while left and (events := poll.poll(max(0.0, deadline - time.monotonic()) * 1000)):
        for fd, _ in events:
            poll.unregister(fd)
            del left[fd]
    return left


def _sent(fd: int, number: signal.Signals) -> bool:
    """False: it has ended, or is another user's."""
    try:
        signal.pidfd_send_signal(fd, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
