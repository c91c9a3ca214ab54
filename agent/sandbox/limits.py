"""Who a session runs as, and what bounds it: cgroup v2, cgroup v1, or resource limits alone."""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from agent.spec import SandboxSpec

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
_FIRST_UID = 200_000
"""Above the users of a machine and the usual subuid ranges' begin; below 2**31."""


def session_uid(session_id: str, uid_map: str | None = None) -> int | None:
    """The uid of a session: the same for ever. None: we are not root, or may not take another uid.

    `uid_map` is the text of /proc/self/uid_map: in a container few uids may exist.
    """
    if os.geteuid() != 0:
        return None
    text = Path("/proc/self/uid_map").read_text() if uid_map is None else uid_map
    number = int.from_bytes(hashlib.sha256(session_id.encode()).digest()[:8])
    inside = [(int(a), int(n)) for a, _, n in (line.split() for line in text.splitlines())]
    first, n_uids = max(inside, key=lambda pair: pair[1])
    if n_uids > 2**31:
        return _FIRST_UID + number % 1_000_000_000
    # A container's usual 65,536: the upper part is nobody's, but for nobody itself.
    return first + 20_000 + number % 40_000 if n_uids >= 65_536 else None


class Cgroup(NamedTuple):
    """A cgroup to be made below `parent`."""

    parent: Path
    files: dict[str, str]


def cgroups(
    spec: SandboxSpec, root: Path = CGROUPS, membership: Path = MEMBERSHIP
) -> tuple[Cgroup, ...]:
    """What to make for a sandbox; empty: no cgroup can be made here, use resource limits."""
    version, parents = usable_cgroups(root, membership)
    memory, pids = str(spec.memory_bytes), str(spec.max_processes)
    if version == 2:
        files = {"memory.max": memory, "memory.swap.max": "0", "pids.max": pids}
        return (Cgroup(parents[0], files),)
    if version == 1:
        # The limit with swap may not be under the one without, so it comes second.
        files = {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory}
        return (Cgroup(parents[0], files), Cgroup(parents[1], {"pids.max": pids}))
    return ()


@cache
def usable_cgroups(
    root: Path = CGROUPS, membership: Path = MEMBERSHIP
) -> tuple[int, tuple[Path, ...]]:
    """The version (0: none) and the directories below which we may make cgroups.

    v1: one for memory and one for pids. v2: one whose children get both controllers; that is our own
    cgroup or one above it, since a cgroup with processes cannot hand controllers down.
    """
    own = _own_cgroups(membership)
    for mount in (root, root / "unified"):
        path = mount / own.get("", "/").lstrip("/")
        for parent in (path, *path.parents):
            if not parent.is_relative_to(mount):
                break
            if _hands_down(parent) and _may_create(parent):
                return 2, (parent,)
    v1 = tuple(root / name / own.get(name, "/").lstrip("/") for name in ("memory", "pids"))
    if all(_may_create(path) for path in v1):
        return 1, v1
    return 0, ()


def _own_cgroups(membership: Path) -> dict[str, str]:
    """Controller -> our path; "" is the v2 hierarchy."""
    found: dict[str, str] = {}
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _hands_down(parent: Path) -> bool:
    try:
        return {"memory", "pids"} <= set((parent / "cgroup.subtree_control").read_text().split())
    except OSError:
        return False


def _may_create(parent: Path) -> bool:
    """Try it: a read-only mount and a lost capability look writable."""
    if not os.access(parent / "cgroup.procs", os.W_OK):
        return False
    probe = parent / f"troupe-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True
