"""How much memory a node has left, and how much this process takes.

A limit of a control group counts like the machine's own: in a container the kernel kills at that one.
Everything here reads a few small files of the kernel, which blocks: off the loop, by `to_thread`.
"""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
_KIB = 1024


class NodeMemory(NamedTuple):
    """Used is what cannot be taken back for others: not the page cache, which fills whatever is free."""

    used_bytes: int
    limit_bytes: int

    @property
    def share(self) -> float:
        """1.0: the next page gets somebody killed."""
        return self.used_bytes / self.limit_bytes


def node_memory(root: Path = ROOT) -> NodeMemory:
    """The memory of this node by the limit that it is nearest to: the machine's, or that of a control
    group (version 1 or 2) that this process is in, directly or further up.

    Raises:
        OSError: it is no Linux.
    """
    total, available = _of_machine(root)
    machine = NodeMemory(total - available, total)
    groups = (group for group in _groups(root) if 0 < group.limit_bytes < total)
    return max([machine, *groups], key=lambda memory: memory.share)


def process_bytes(root: Path = ROOT) -> int:
    """What this process takes: its own pages and its part of those that it shares (PSS). Where the
    kernel does not say, all that it has in memory (RSS).

    Raises:
        OSError: it is no Linux.
    """
    with suppress(OSError):
        rollup = (root / "proc/self/smaps_rollup").read_text()
        return next(_KIB * int(line.split()[1]) for line in _lines(rollup, "Pss:"))
    status = (root / "proc/self/status").read_text()
    return next(_KIB * int(line.split()[1]) for line in _lines(status, "VmRSS:"))


def trim() -> None:
    """Give memory that nothing uses any more back to the system. Blocks for some 10 ms."""
    gc.collect()
    # glibc's own; other C libraries give it back by themselves.
    if give_back := getattr(ctypes.CDLL(None), "malloc_trim", None):
        give_back(0)


def _lines(text: str, start: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.startswith(start))


def _of_machine(root: Path) -> tuple[int, int]:
    text = (root / "proc/meminfo").read_text()
    total, available = (
        next(_KIB * int(line.split()[1]) for line in _lines(text, name))
        for name in ("MemTotal:", "MemAvailable:")
    )
    return total, available


def _groups(root: Path) -> Iterator[NodeMemory]:
    """The control groups with a readable limit that this process is in, up to the outermost."""
    with suppress(FileNotFoundError):  # a kernel without control groups
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                files = ("memory.max", "memory.current", "")
                yield from _upwards(root / "sys/fs/cgroup", path, files)
            elif "memory" in controllers.split(","):
                files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
                yield from _upwards(root / "sys/fs/cgroup/memory", path, files)


def _upwards(mount: Path, path: str, files: tuple[str, str, str]) -> Iterator[NodeMemory]:
    """A container may see only its own group, as the root of the mount: a group that is not there is
    passed over."""
    inner = mount / path.lstrip("/")
    for folder in (inner, *inner.parents):
        if folder == mount.parent:
            return
        # A group without a limit says "max"; the outermost one has no files at all.
        with suppress(OSError, ValueError):
            yield _of_group(folder, *files)


def _of_group(folder: Path, limit: str, usage: str, prefix: str) -> NodeMemory:
    """
    Raises:
        ValueError: it has no limit.
    """
    limit_bytes = int((folder / limit).read_text())
    used_bytes = int((folder / usage).read_text())
    for line in (folder / "memory.stat").read_text().splitlines():
        name, value = line.split()
        if name in {f"{prefix}active_file", f"{prefix}inactive_file"}:
            used_bytes -= int(value)
    return NodeMemory(max(0, used_bytes), limit_bytes)
