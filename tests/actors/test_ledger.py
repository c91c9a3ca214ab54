"""The ledger: exact under any order of calls."""

import uuid

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


class LedgerMachine(RuleBasedStateMachine):
    """Random takes, confirmations, releases and handovers against a plain model of the slots."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = ledger(self.clock)
        self.held: dict[str, Lease] = {}
        self.waiting: list[Lease] = []
        self.n = 0

    def _enter(self, taken: Lease | Refusal, user: str) -> None:
        per_user = self._count_of(user)
        if isinstance(taken, Lease):
            assert len(self.held) < 4
            assert per_user < 2
            self.held[taken.session_id] = taken
        elif taken.scope == "per_user":
            assert (taken.live, taken.limit) == (per_user, 2)
            assert per_user == 2
        else:
            assert (taken.live, taken.limit) == (len(self.held), 4)
            assert len(self.held) == 4

    @rule(user=st.sampled_from(USERS))
    def take(self, user: str) -> None:
        self.n += 1
        self._enter(self.ledger.take(f"s{self.n}", user), user)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        assert self.ledger.confirm(self._pick(data))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release_once(self, data: st.DataObject) -> None:
        lease = self._pick(data)
        assert self.ledger.release(lease)
        assert not self.ledger.release(lease)
        del self.held[lease.session_id]

    @rule(user=st.sampled_from(USERS))
    def ask_one_to_go(self, user: str) -> None:
        """As the desk does: only where the door refused for this reason."""
        self.n += 1
        refusal = self.ledger.take(f"s{self.n}", user)
        if isinstance(refusal, Lease):
            self._enter(refusal, user)
        elif waiting := self.ledger.give_way(refusal.scope, f"s{self.n}", user):
            self.waiting.append(waiting)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), goes=st.booleans(), closed_meanwhile=st.booleans())
    def it_answers(self, data: st.DataObject, goes: bool, closed_meanwhile: bool) -> None:
        waiting = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(waiting)
        asked = waiting.instead_of
        assert asked is not None
        if closed_meanwhile and self.ledger.release(asked):
            del self.held[asked.session_id]
        if not goes:
            self.ledger.stay(waiting)
            return
        taken = self.ledger.inherit(waiting)
        if self.held.get(asked.session_id) is asked:
            del self.held[asked.session_id]
            assert isinstance(taken, Lease)  # nobody is sent away for one who is refused
        if isinstance(taken, Lease):
            self.held[taken.session_id] = taken

    def _pick(self, data: st.DataObject) -> Lease:
        return self.held[data.draw(st.sampled_from(sorted(self.held)))]

    @invariant()
    def counts_are_exact(self) -> None:
        assert self.ledger.n_live == len(self.held) <= 4
        for user in USERS:
            assert self.ledger.n_live_of(user) == self._count_of(user) <= 2

    def _count_of(self, user: str) -> int:
        """Slots, and places of others that it waits for."""
        held = sum(lease.user_id == user for lease in self.held.values())
        return held + sum(
            lease.user_id == user
            and lease.instead_of is not None
            and lease.instead_of.user_id != user
            for lease in self.waiting
        )


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


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
