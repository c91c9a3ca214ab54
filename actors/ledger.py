"""Who holds which slot since when. Pure and synchronous: the one door of capacity.

`take` checks and takes together; a lease is released exactly once. Whoever must wait for something
holds a lease meanwhile, so a slot is never promised twice. No exempt user, no second way in: new,
woken, seeded and bulk sessions all pass here.

No step looks at all leases: counts are kept, and leases stand in the order in which they expire or came
to rest. Both follow from the clock, which does not run backwards, so each only ever joins at an end.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

Lane = Literal["interactive", "bulk"]
Scope = Literal["global", "per_user"]


@dataclass(eq=False, slots=True)
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
    node: str = ""
    """Where it lives, while it does."""


class Refusal(NamedTuple):
    scope: Scope
    live: int
    limit: int


class Resting:
    """Live leases without a turn, the longest idle first: all of them, those of a user, of a node."""

    def __init__(self) -> None:
        # Not a dict: to find the first of one from which many went from the front takes a walk.
        self._lines: dict[Hashable, OrderedDict[Lease, None]] = {}

    def join(self, lease: Lease) -> None:
        """At the end. One that is here may not join again before it has left."""
        for line in _lines_of(lease):
            self._lines.setdefault(line, OrderedDict())[lease] = None

    def leave(self, lease: Lease) -> None:
        """Nothing, where it is not here."""
        for line in _lines_of(lease):
            there = self._lines.get(line)
            if there is None or lease not in there:
                return
            del there[lease]
            if not there:
                del self._lines[line]

    def of(self, line: Hashable = None) -> Iterator[Lease]:
        return iter(self._lines.get(line, ()))


def _lines_of(lease: Lease) -> tuple[Hashable, ...]:
    return None, ("user", lease.user_id), ("node", lease.node)


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
        self._per_lane: Counter[Lane] = Counter()
        """Without those that wait for a place."""
        self._reserved: OrderedDict[Lease, None] = OrderedDict()
        """The first to expire first."""
        self._resting = Resting()

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

    def take_over(self, session_id: str, user_id: str, epoch: int, node: str = "") -> Lease:
        """Enter a session that already lives: for a ledger that begins anew beside living actors.

        Raises:
            ValueError: the session holds a slot.
        """
        lease = self._enter(Lease(session_id, user_id, "interactive", self._now_s()))
        self.confirm(lease, epoch, node)
        return lease

    def _enter(self, lease: Lease) -> Lease:
        if lease.session_id in self._leases:
            raise ValueError(lease.session_id)
        self._leases[lease.session_id] = lease
        if lease.state == "reserved":
            self._per_lane[lease.lane] += 1
            self._reserved[lease] = None
        if _counts_for_its_user(lease):
            self._per_user[lease.user_id] += 1
        return lease

    def confirm(self, lease: Lease, epoch: int = 0, node: str = "") -> bool:
        """The session lives, in this epoch. False: the reservation expired, the slot may be another's."""
        if not self.holds(lease):
            return False
        is_busy = lease.idle_since_s is None and lease.noted[0] == epoch and lease.noted[1] > 0
        self._reserved.pop(lease, None)
        self._resting.leave(lease)
        lease.state, lease.node = "live", node
        if lease.noted[0] != epoch:
            lease.noted = (epoch, 0)
        self._rest(lease, is_busy=is_busy)
        return True

    def _rest(self, lease: Lease, *, is_busy: bool) -> None:
        """Idle from now on, or not; among those who may give way while it lives."""
        self._resting.leave(lease)
        lease.idle_since_s = None if is_busy else self._now_s()
        if lease.state == "live" and not is_busy:
            self._resting.join(lease)

    def renew(self, lease: Lease) -> bool:
        """A reservation counts from now on. False: it expired, the slot may be another's."""
        if not self.holds(lease):
            return False
        if lease.state == "reserved":
            self._reserve(lease)
        return True

    def _reserve(self, lease: Lease) -> None:
        lease.taken_at_s = self._now_s()
        self._reserved[lease] = None
        self._reserved.move_to_end(lease)

    def keep(self, lease: Lease) -> None:
        """The session died and may come back at once: its slot is reserved for that. One that was
        leaving gives it back."""
        if lease.state == "live" and self.holds(lease):
            self._resting.leave(lease)
            lease.state = "reserved"
            self._reserve(lease)
        else:
            self.release(lease)

    def release(self, lease: Lease) -> bool:
        """Give the slot back. False: it was given back before; nothing changed."""
        if not self.holds(lease):
            return False
        del self._leases[lease.session_id]
        self._reserved.pop(lease, None)
        self._resting.leave(lease)
        if lease.state != "waiting":
            self._per_lane[lease.lane] -= 1
        if _counts_for_its_user(lease):
            self._per_user[lease.user_id] -= 1
            if not self._per_user[lease.user_id]:
                del self._per_user[lease.user_id]
        return True

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
        while (first := next(iter(self._reserved), None)) and first.taken_at_s < before_s:
            self.release(first)

    # -- who gives way -----------------------------------------------------------------------

    def note(self, lease: Lease, epoch: int, n: int, *, is_busy: bool) -> None:
        """Take in report number `n` of an epoch, unless a newer one came before it."""
        if self.holds(lease) and (epoch, n) > lease.noted:
            lease.noted = (epoch, n)
            self._rest(lease, is_busy=is_busy)

    def longest_idle(self, *, on: str | None = None) -> Iterator[Lease]:
        """Live leases without a turn, the longest idle first; with `on`, those of that node. To be
        read before the ledger changes."""
        return self._resting.of(None if on is None else ("node", on))

    def give_way(self, scope: Scope, session_id: str, user_id: str) -> Lease | None:
        """A lease that waits for the place of the longest idle session whose end would help; that one
        is marked as passivating. None: nobody can go.

        The newcomer counts from here on where it will count in the end, so nobody is sent away for one
        who is refused afterwards. The caller passivates `instead_of`, and calls `inherit` or `stay`.
        """
        line = None if scope == "global" else ("user", user_id)
        leaving = next(self._resting.of(line), None)
        if leaving is None:
            return None
        self._resting.leave(leaving)
        leaving.state = "passivating"
        return self._enter(
            Lease(session_id, user_id, "interactive", self._now_s(), "waiting", leaving)
        )

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
        """The session waited for would not go: something is under way there. The waiting lease ends."""
        self.release(lease)
        if (staying := lease.instead_of) is not None and staying.state == "passivating":
            staying.state = "live"
            self.defer(staying)

    def defer(self, lease: Lease) -> None:
        """It was asked to go and would not. Whether a turn is under way there, its reports say; if none
        is, it is the last to be asked again."""
        if self.holds(lease) and lease.idle_since_s is not None:
            self._rest(lease, is_busy=False)

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
        return self._per_lane.total()

    def n_live_of(self, user_id: str) -> int:
        return self._per_user[user_id]

    def n_live_in(self, lane: Lane) -> int:
        return self._per_lane[lane]


def _counts_for_its_user(lease: Lease) -> bool:
    """Who waits for the place of a session of the same user is counted with that."""
    return lease.instead_of is None or lease.instead_of.user_id != lease.user_id
