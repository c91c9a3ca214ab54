"""The ledger: exact under any order of calls."""

import uuid
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.ledger import Lease, Ledger, Refusal, Scope

USERS = ("a", "b", "c")


class Clock:
    def __init__(self) -> None:
        self.at_s = 0.0

    def __call__(self) -> float:
        return self.at_s


def ledger(clock: Clock, limit: int = 4, per_user: int = 2) -> Ledger:
    return Ledger(max_sessions=limit, max_sessions_per_user=per_user, reservation_s=10, now_s=clock)


@dataclass
class Slot:
    """What the model knows of a lease."""

    lease: Lease
    user: str
    taken_at_s: float
    lives: bool = False
    idle_since_s: float | None = None
    asked: bool = False
    node: str = ""


class LedgerMachine(RuleBasedStateMachine):
    """Random steps against a model that looks at all slots at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = ledger(self.clock)
        self.slots: dict[str, Slot] = {}
        self.waiting: list[Lease] = []
        self.n = 0

    # -- the model ---------------------------------------------------------------------------

    def _n_of(self, user: str) -> int:
        """Slots, and places of others that the user waits for."""
        held = sum(slot.user == user for slot in self.slots.values())
        return held + sum(
            lease.user_id == user
            and lease.instead_of is not None
            and lease.instead_of.user_id != user
            for lease in self.waiting
        )

    def _resting(self) -> list[Slot]:
        resting = [
            s for s in self.slots.values() if s.lives and not s.asked and s.idle_since_s is not None
        ]
        return sorted(resting, key=lambda slot: slot.idle_since_s or 0.0)

    def _expire(self) -> None:
        before_s = self.clock.at_s - 10
        expired = [sid for sid, s in self.slots.items() if not s.lives and s.taken_at_s < before_s]
        for session_id in expired:
            del self.slots[session_id]

    def _taken(self, taken: Lease | Refusal, user: str) -> None:
        if isinstance(taken, Lease):
            assert len(self.slots) < 4
            assert self._n_of(user) < 2
            self.slots[taken.session_id] = Slot(taken, user, self.clock.at_s)
        elif taken.scope == "per_user":
            assert (taken.live, taken.limit) == (self._n_of(user), 2)
            assert taken.live == 2
        else:
            assert (taken.live, taken.limit) == (len(self.slots), 4)
            assert taken.live == 4

    def _pick(self, data: st.DataObject) -> Slot:
        return self.slots[data.draw(st.sampled_from(sorted(self.slots)))]

    # -- steps -------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1, 4, 11]))
    def time_passes(self, seconds: int) -> None:
        self.clock.at_s += seconds

    @rule(user=st.sampled_from(USERS))
    def take(self, user: str) -> None:
        self.n += 1
        self._expire()
        self._taken(self.ledger.take(f"s{self.n}", user), user)

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), node=st.sampled_from(["", "n1", "n2"]))
    def confirm(self, data: st.DataObject, node: str) -> None:
        slot = self._pick(data)
        if slot.lives:
            return
        self.clock.at_s += 1
        was_busy = slot.lease.noted[1] > 0 and slot.idle_since_s is None
        assert self.ledger.confirm(slot.lease, slot.lease.noted[0], node)
        slot.lives, slot.node = True, node
        slot.idle_since_s = None if was_busy else self.clock.at_s

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), is_busy=st.booleans())
    def note(self, data: st.DataObject, is_busy: bool) -> None:
        self.clock.at_s += 1
        slot = self._pick(data)
        epoch, n = slot.lease.noted
        self.ledger.note(slot.lease, epoch, n + 1, is_busy=is_busy)
        slot.idle_since_s = None if is_busy else self.clock.at_s

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        slot = self._pick(data)
        assert self.ledger.renew(slot.lease)
        slot.taken_at_s = self.clock.at_s

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def its_host_dies(self, data: st.DataObject) -> None:
        slot = self._pick(data)
        self.ledger.keep(slot.lease)
        if slot.lives and not slot.asked:
            slot.lives, slot.taken_at_s = False, self.clock.at_s
        else:
            del self.slots[slot.lease.session_id]

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def release_once(self, data: st.DataObject) -> None:
        lease = self._pick(data).lease
        assert self.ledger.release(lease)
        assert not self.ledger.release(lease)
        del self.slots[lease.session_id]

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def defer(self, data: st.DataObject) -> None:
        slot = self._pick(data)
        self.clock.at_s += 1
        self.ledger.defer(slot.lease)
        if slot.idle_since_s is not None:
            slot.idle_since_s = self.clock.at_s

    @rule(user=st.sampled_from(USERS))
    def ask_one_to_go(self, user: str) -> None:
        """As the desk does: only where the door refused for this reason."""
        self.n += 1
        refusal = self.ledger.take(f"s{self.n}", user)
        self._expire()
        self._taken(refusal, user)
        if isinstance(refusal, Lease):
            return
        waiting = self.ledger.give_way(refusal.scope, f"s{self.n}", user)
        may_go = [s for s in self._resting() if refusal.scope == "global" or s.user == user]
        assert (waiting.instead_of if waiting else None) is (may_go[0].lease if may_go else None)
        if waiting:
            may_go[0].asked = True
            self.waiting.append(waiting)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), goes=st.booleans(), closed_meanwhile=st.booleans())
    def it_answers(self, data: st.DataObject, goes: bool, closed_meanwhile: bool) -> None:
        waiting = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(waiting)
        asked = waiting.instead_of
        assert asked is not None
        slot = self.slots.get(asked.session_id)
        if closed_meanwhile and slot and self.ledger.release(asked):
            del self.slots[asked.session_id]
            slot = None
        self.clock.at_s += 1
        if goes:
            taken = self.ledger.inherit(waiting)
            if slot:
                del self.slots[asked.session_id]
                assert isinstance(taken, Lease)  # nobody is sent away for one who is refused
            else:
                self._expire()
            self._taken(taken, waiting.user_id)
            return
        self.ledger.stay(waiting)
        if slot:
            slot.asked = False
            if slot.idle_since_s is not None:
                slot.idle_since_s = self.clock.at_s

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def counts_are_exact(self) -> None:
        assert self.ledger.n_live == self.ledger.n_live_in("interactive") == len(self.slots) <= 4
        for user in USERS:
            assert self.ledger.n_live_of(user) == self._n_of(user) <= 2

    @invariant()
    def the_longest_idle_come_first(self) -> None:
        resting = self._resting()
        assert list(self.ledger.longest_idle()) == [slot.lease for slot in resting]
        for node in ("n1", "n2"):
            there = [slot.lease for slot in resting if slot.node == node]
            assert list(self.ledger.longest_idle(on=node)) == there


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


def leaving(ledger: Ledger, scope: Scope, user: str) -> Lease | None:
    """Who gives way to one more session of the user."""
    waiting = ledger.give_way(scope, f"new-{uuid.uuid4()}", user)
    return waiting.instead_of if waiting else None


def live(ledger: Ledger, session_id: str, user: str) -> Lease:
    lease = ledger.take(session_id, user)
    assert isinstance(lease, Lease)
    assert ledger.confirm(lease)
    return lease


def test_the_longest_idle_session_gives_way_and_a_busy_one_never() -> None:
    clock = Clock()
    book = ledger(clock)
    first = live(book, "first", "a")
    clock.at_s = 1
    second = live(book, "second", "b")
    clock.at_s = 2
    third = live(book, "third", "c")
    book.note(first, 1, 1, is_busy=True)
    assert leaving(book, "global", "d") is second
    assert leaving(book, "global", "d") is third
    assert leaving(book, "global", "d") is None
    book.note(first, 1, 2, is_busy=False)
    assert leaving(book, "global", "d") is first


def test_within_the_users_limit_only_the_users_own_sessions_give_way() -> None:
    book = ledger(Clock())
    live(book, "first", "a")
    mine = live(book, "second", "b")
    assert leaving(book, "per_user", "b") is mine
    assert leaving(book, "per_user", "b") is None


def test_a_reservation_that_is_never_confirmed_expires() -> None:
    clock = Clock()
    book = ledger(clock, limit=1)
    lost = book.take("lost", "a")
    assert isinstance(lost, Lease)
    assert isinstance(book.take("next", "b"), Refusal)
    clock.at_s = 11
    assert isinstance(book.take("next", "b"), Lease)
    assert not book.confirm(lost)
    assert not book.release(lost)


def test_a_live_lease_never_expires() -> None:
    clock = Clock()
    book = ledger(clock, limit=1)
    live(book, "old", "a")
    clock.at_s = 1000
    assert isinstance(book.take("next", "b"), Refusal)


def test_a_session_holds_one_slot_at_a_time() -> None:
    book = ledger(Clock())
    live(book, "one", "a")
    with pytest.raises(ValueError, match="one"):
        book.take("one", "a")


def test_a_slot_that_the_door_refused_is_not_counted() -> None:
    book = ledger(Clock(), limit=1)
    live(book, "one", "a")
    refused = book.take("two", "b")
    assert refused == Refusal("global", 1, 1)
    assert book.n_live_of("b") == 0


def test_a_report_that_was_overtaken_changes_nothing() -> None:
    book = ledger(Clock())
    lease = live(book, "one", "a")
    book.note(lease, 1, 2, is_busy=False)
    book.note(lease, 1, 1, is_busy=True)
    assert leaving(book, "global", "b") is lease


def test_a_session_that_began_to_work_while_it_started_is_busy() -> None:
    book = ledger(Clock())
    lease = book.take("one", "a")
    assert isinstance(lease, Lease)
    book.note(lease, 3, 1, is_busy=True)
    book.confirm(lease, 3)
    assert leaving(book, "global", "b") is None


def test_a_rest_that_was_told_before_the_refusal_to_go_still_counts() -> None:
    book = ledger(Clock(), limit=1)
    lease = live(book, "one", "a")
    waiting = book.give_way("global", "two", "b")
    assert waiting is not None
    book.note(lease, 1, 1, is_busy=True)
    book.note(lease, 1, 2, is_busy=False)
    book.stay(waiting)
    assert leaving(book, "global", "b") is lease


def test_nothing_is_kept_of_those_who_left() -> None:
    clock = Clock()
    book = ledger(clock, limit=100, per_user=100)
    leases = [live(book, f"s{n}", f"user{n % 7}") for n in range(100)]
    for lease in leases[::2]:
        book.note(lease, 1, 1, is_busy=True)
    for lease in leases:
        book.release(lease)
    kept = (book._leases, book._per_user, book._reserved, book._resting._lines)
    assert [len(each) for each in kept] == [0, 0, 0, 0]
