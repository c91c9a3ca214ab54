"""Who holds which slot since when. Pure and synchronous: the one door of capacity.

`take` checks and takes together; a lease is released exactly once. Whoever must wait for something
holds a lease meanwhile, so a slot is never promised twice. No exempt user, no second way in: new,
woken, seeded and bulk sessions all pass here.
"""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

Lane = Literal["interactive", "bulk"]
Scope = Literal["global", "per_user"]


@dataclass(eq=False)
class Lease:
    """A slot that is taken. Compared by identity: a session's next lease is another one."""

    session_id: str
    user_id: str
    lane: Lane
    taken_at_s: float
    state: Literal["waiting", "reserved", "live", "passivating"] = "reserved"
    """`waiting`: for the place of another session, which it counts in until that has left."""
    instead_of: "Lease | None" = None
    """Whose place, while waiting."""
    idle_since_s: float | None = None
    """None: a turn runs."""
    noted: tuple[int, int] = (0, 0)
    """Epoch and number of the newest report that was taken in: older ones, that came later, are
    passed over."""


class Refusal(NamedTuple):
    scope: Scope
    live: int
    limit: int


class Ledger:
    """
    Args:
        reservation_s: a lease that was taken and not confirmed is void after this.
        now_s: a monotonic clock.
    """

    def __init__(
        self,
        *,
        max_sessions: int,
        max_sessions_per_user: int,
        reservation_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self.max_sessions = max_sessions
        self.max_sessions_per_user = max_sessions_per_user
        self._reservation_s = reservation_s
        self._now_s = now_s
        self._leases: dict[str, Lease] = {}
        self._per_user: Counter[str] = Counter()

    # -- the door ----------------------------------------------------------------------------

    def take(self, session_id: str, user_id: str, lane: Lane = "interactive") -> Lease | Refusal:
        """Take a slot for a session, or say which limit is in the way.

        Raises:
            ValueError: the session holds one.
        """
        self._expire()
        if session_id in self._leases:
            raise ValueError(session_id)
        if self._per_user[user_id] >= self.max_sessions_per_user:
            return Refusal("per_user", self._per_user[user_id], self.max_sessions_per_user)
        if self.n_live >= self.max_sessions:
            return Refusal("global", self.n_live, self.max_sessions)
        return self._enter(Lease(session_id, user_id, lane, self._now_s()))

    def take_over(self, session_id: str, user_id: str, epoch: int) -> Lease:
        """Enter a session that already lives: for a ledger that begins anew beside living actors."""
        lease = self._enter(Lease(session_id, user_id, "interactive", self._now_s()))
        self.confirm(lease, epoch)
        return lease

    def _enter(self, lease: Lease) -> Lease:
        self._leases[lease.session_id] = lease
        self._count(lease.user_id, +1)
        return lease

    def confirm(self, lease: Lease, epoch: int = 0) -> bool:
        """The session lives, in this epoch. False: the reservation expired, the slot may be another's."""
        if not self.holds(lease):
            return False
        lease.state = "live"
        if lease.noted[0] != epoch or lease.noted == (0, 0):
            lease.noted, lease.idle_since_s = (epoch, 0), self._now_s()
        return True

    def renew(self, lease: Lease) -> bool:
        """A reservation counts from now on. False: it expired, the slot may be another's."""
        if not self.holds(lease):
            return False
        lease.taken_at_s = self._now_s()
        return True

    def keep(self, lease: Lease) -> None:
        """The session died and may come back at once: its slot is reserved for that. One that was
        leaving gives it back."""
        if lease.state == "live" and self.holds(lease):
            lease.state, lease.taken_at_s = "reserved", self._now_s()
        else:
            self.release(lease)

    def release(self, lease: Lease) -> bool:
        """Give the slot back. False: it was given back before; nothing changed."""
        if not self.holds(lease):
            return False
        del self._leases[lease.session_id]
        if lease.instead_of is None or lease.instead_of.user_id != lease.user_id:
            self._count(lease.user_id, -1)
        return True

    def _count(self, user_id: str, change: int) -> None:
        self._per_user[user_id] += change
        if not self._per_user[user_id]:
            del self._per_user[user_id]

    @contextmanager
    def returned_on_failure(self, lease: Lease) -> Generator[None]:
        """Give the slot back unless the block comes to its end."""
        reached_end = False
        try:
            yield
            reached_end = True
        finally:
            if not reached_end:
                self.release(lease)

    def _expire(self) -> None:
        before_s = self._now_s() - self._reservation_s
        for lease in list(self._leases.values()):
            if lease.state == "reserved" and lease.taken_at_s < before_s:
                self.release(lease)

    # -- who gives way -----------------------------------------------------------------------

    def note(self, lease: Lease, epoch: int, n: int, *, is_busy: bool) -> None:
        """Take in report number `n` of an epoch, unless a newer one came before it."""
        if (epoch, n) > lease.noted:
            lease.noted = (epoch, n)
            lease.idle_since_s = None if is_busy else self._now_s()

    def give_way(self, scope: Scope, session_id: str, user_id: str) -> Lease | None:
        """A lease that waits for the place of the longest idle session whose end would help; that one
        is marked as passivating. None: nobody can go.

        The newcomer counts from here on where it will count in the end, so nobody is sent away for one
        who is refused afterwards. The caller passivates `instead_of`, and calls `inherit` or `stay`.
        """
        idle = [
            lease
            for lease in self._leases.values()
            if lease.state == "live"
            and lease.idle_since_s is not None
            and (scope == "global" or lease.user_id == user_id)
        ]
        if not idle:
            return None
        leaving = min(idle, key=lambda lease: lease.idle_since_s or 0.0)
        leaving.state = "passivating"
        lease = Lease(session_id, user_id, "interactive", self._now_s(), "waiting", leaving)
        self._leases[session_id] = lease
        if leaving.user_id != user_id:
            self._count(user_id, +1)
        return lease

    def inherit(self, lease: Lease) -> Lease | Refusal:
        """The session waited for has left: its place is the waiting lease's, in the same step."""
        leaving = lease.instead_of
        if leaving is None or not self.holds(leaving):
            # It was closed or died meanwhile, and its place may be another's by now.
            self.release(lease)
            return self.take(lease.session_id, lease.user_id, lease.lane)
        self.release(lease)
        self.release(leaving)
        return self._enter(Lease(lease.session_id, lease.user_id, lease.lane, self._now_s()))

    def stay(self, lease: Lease) -> None:
        """The session waited for would not go: something is under way there. Whether a turn is, its
        reports say; if none is, it is the last to be asked again. The waiting lease ends."""
        self.release(lease)
        if (staying := lease.instead_of) is not None:
            staying.state = "live"
            if staying.idle_since_s is not None:
                staying.idle_since_s = self._now_s()

    # -- questions ---------------------------------------------------------------------------

    def holds(self, lease: Lease) -> bool:
        return self._leases.get(lease.session_id) is lease

    def get(self, session_id: str) -> Lease | None:
        return self._leases.get(session_id)

    @property
    def leases(self) -> list[Lease]:
        return list(self._leases.values())

    @property
    def n_live(self) -> int:
        """Every slot that is taken, in whatever state. Who waits for a place has none yet."""
        return sum(lease.state != "waiting" for lease in self._leases.values())

    def n_live_of(self, user_id: str) -> int:
        return self._per_user[user_id]

    def n_live_in(self, lane: Lane) -> int:
        return sum(
            lease.lane == lane and lease.state != "waiting" for lease in self._leases.values()
        )
