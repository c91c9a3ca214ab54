"""Which nodes have memory for processes that nobody uses yet, by what the nodes report. Pure."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from actors.memory import NodeMemory

TIGHT = 0.8
"""Share of a node's memory from which on none waits there for sessions. Ray kills processes from 0.95 on,
and sessions that live come before those that may."""
ROOMY = 0.75
"""Below it they may again: further down, so that what was ended is not started at once again."""
HOST_BYTES = 65 * 10**6
"""Of a process without a session."""
FORGET_AFTER_S = 60.0
"""A node that is not heard of so long is not counted with."""


@dataclass
class _Node:
    memory: NodeMemory
    heard_at_s: float
    is_tight: bool = False
    n_placed: int = 0
    """Processes that were started there since."""

    @property
    def share(self) -> float:
        return self.memory.share + self.n_placed * HOST_BYTES / self.memory.limit_bytes


class Rooms:
    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._nodes: dict[str, _Node] = {}

    def note(self, node: str, memory: NodeMemory) -> int:
        """Take in a report. How many processes that nobody uses must end there."""
        before = self._nodes.get(node)
        mark = ROOMY if before and before.is_tight else TIGHT
        is_tight = memory.share >= mark
        self._nodes[node] = _Node(memory, self._now_s(), is_tight)
        if not is_tight:
            return 0
        excess_bytes = memory.used_bytes - ROOMY * memory.limit_bytes
        return 1 + int(excess_bytes // HOST_BYTES)

    def _heard(self) -> dict[str, _Node]:
        since_s = self._now_s() - FORGET_AFTER_S
        self._nodes = {name: n for name, n in self._nodes.items() if n.heard_at_s >= since_s}
        return self._nodes

    def has_room(self, node: str | None) -> bool:
        """On this node, or for None on any. A node that says nothing has."""
        nodes = self._heard()
        if node is not None:
            return node not in nodes or not nodes[node].is_tight
        return not nodes or not all(one.is_tight for one in nodes.values())

    def placed(self) -> str | None:
        """The node with the smallest share in use, which takes one process more from here on. None: Ray
        may choose, there is no other or none is known."""
        nodes = self._heard()
        if len(nodes) < 2:
            return None
        name = min(nodes, key=lambda one: nodes[one].share)
        nodes[name].n_placed += 1
        return name
