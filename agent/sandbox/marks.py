"""How a sandbox's processes are known from outside: two marks in environments, and a cgroup's name.

The warden carries a `Mark`: whose it is. Everything inside carries the mark's `inside`, a random word
that says nothing to the model and names the warden to us. A cgroup is named after its warden, and holds
those too that cleared their environment. Processes are told apart by pid and start: pids come again.
"""

from pathlib import Path
from typing import NamedTuple, Self

WARDEN = "TROUPE_SANDBOX"
INSIDE = "TROUPE_INSIDE"


class Stat(NamedTuple):
    """Of one process, from /proc."""

    gone: bool
    """It has ended and was not yet waited for."""
    parent: int
    session: int
    started: int
    """In clock ticks since the boot."""

    @classmethod
    def of(cls, pid: int) -> Self:
        """
        Raises:
            OSError: there is no such process.
        """
        # The command's name stands in parentheses and may hold anything, so count from the last.
        rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return cls(rest[0] in b"ZX", int(rest[1]), int(rest[3]), int(rest[19]))


class Mark(NamedTuple):
    """In the environment of a warden."""

    session_id: str
    epoch: int
    owner: int
    """The pid that holds the lifeline."""
    owner_started: int
    inside: str

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None: no mark of ours."""
        parts = text.rsplit(" ", 4)
        if len(parts) != len(cls._fields) or not all(part.isdecimal() for part in parts[1:4]):
            return None
        session_id, epoch, owner, owner_started, inside = parts
        return cls(session_id, int(epoch), int(owner), int(owner_started), inside)
