"""The limiter's rule: random histories on a clock that is handed in."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.events import Usage
from agent.model.limiter import (
    BURST_S,
    FORGET_S,
    MAX_BACKOFF_S,
    MAX_CLOSED_S,
    N_HOPELESS,
    PROBE_S,
    RAISE_S,
    Bucket,
    Call,
    Limiter,
)
from agent.settings import ModelLimits

MOST = 3
SECONDS = st.floats(0, 90, allow_nan=False)


class Crowd(RuleBasedStateMachine):
    """Sessions come, leave, are accepted and refused in any order, and time goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.limiter = Limiter(ModelLimits(concurrency=MOST), self.now)
        self.line: list[Call] = []
        self.inside: list[Call] = []
        self.turned_away = 0
        self.closed_until = 0.0
        self.probing = False

    def woken(self, call: Call) -> None:
        self.line.remove(call)
        if call.inside:
            self.entered(call)
        else:
            self.turned_away += 1

    def entered(self, call: Call) -> None:
        assert self.now >= self.closed_until
        self.inside.append(call)

    @rule(session_id=st.sampled_from("abcd"))
    def comes(self, session_id: str) -> None:
        call = Call(session_id)
        call.wake = lambda: self.woken(call)
        if self.limiter.comes(call, self.now):
            assert not self.line  # nobody goes past those who wait
            self.entered(call)
        else:
            self.line.append(call)

    @rule(s=SECONDS)
    def time_goes_on(self, s: float) -> None:
        self.now += s
        self.limiter.let_in(self.now)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def accepts(self, data: st.DataObject) -> None:
        self.limiter.accepted(data.draw(st.sampled_from(self.inside)), self.now)
        self.limiter.let_in(self.now)

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), retry_after_s=st.none() | SECONDS)
    def refuses(self, data: st.DataObject, retry_after_s: float | None) -> None:
        call = data.draw(st.sampled_from(self.inside))
        self.limiter.refused(call, retry_after_s, self.now)
        self.closed_until = max(self.closed_until, self.now + (retry_after_s or 0))
        self.leaves_inside(call)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        self.leaves_inside(data.draw(st.sampled_from(self.inside)))

    def leaves_inside(self, call: Call) -> None:
        self.inside.remove(call)
        self.limiter.leaves(call, self.now)
        self.limiter.let_in(self.now)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def is_cancelled_in_line(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.line))
        self.line.remove(call)
        self.limiter.leaves(call, self.now)
        self.limiter.let_in(self.now)

    @invariant()
    def counts_are_true_and_never_over_the_limit(self) -> None:
        stats = self.limiter.stats(self.now)
        assert (stats.in_flight, stats.waiting) == (len(self.inside), len(self.line))
        assert len(self.inside) <= MOST
        assert stats.limit is not None
        assert 1 <= stats.limit <= MOST

    @invariant()
    def whoever_waits_waits_for_something(self) -> None:
        if self.line and not self.inside:
            opens_at = self.limiter.let_in(self.now)
            assert opens_at is not None
            assert opens_at > self.now

    def teardown(self) -> None:
        """All places come back, and everybody gets one."""
        while self.inside or self.line:
            n_before = len(self.line)
            for call in tuple(self.inside):
                self.leaves_inside(call)
            self.now += MAX_CLOSED_S
            self.limiter.let_in(self.now)
            assert self.inside or len(self.line) < n_before or not self.line
        assert self.limiter.at_rest(self.now + MAX_CLOSED_S)


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(
    st.integers(60, 6000),
    st.lists(st.tuples(st.floats(0, 30), st.floats(1, 3000)), min_size=1, max_size=60),
)
def test_no_minute_has_more_tokens_than_the_limit_and_one_burst(
    per_minute: int, calls: list[tuple[float, float]]
) -> None:
    bucket = Bucket(per_minute, 0.0)
    now, taken = 0.0, list[tuple[float, float]]()
    for pause_s, amount in calls:
        now = bucket.ready_at(amount, now + pause_s)
        bucket.take(amount, now)
        taken.append((now, amount))
    for began, _ in taken:
        within = [amount for at, amount in taken if began <= at < began + 60]
        assert sum(within) <= per_minute + max(per_minute / 60 * BURST_S, *within) + 1e-3


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=10, max_size=60))
def test_real_usage_holds_the_limit_where_the_estimate_was_wrong(
    calls: list[tuple[int, int]],
) -> None:
    """Estimates are off by anything: what was really used keeps the limit in the long run."""
    per_minute = 3000
    limiter = Limiter(ModelLimits(tokens_per_minute=per_minute), 0.0)
    now, used = 0.0, 0
    for n_chars, n_tokens in calls:
        call = Call("a")
        limiter.expects(call, n_chars, None)
        if not limiter.comes(call, now):
            opens_at = limiter.let_in(now)
            while not call.inside:
                assert opens_at is not None
                assert opens_at > now
                now = opens_at
                opens_at = limiter.let_in(now)
        limiter.leaves(call, now, Usage(prompt_tokens=n_tokens, completion_tokens=0))
        used += n_tokens
    # The last call's usage, and the burst, may stand over.
    assert used <= now / 60 * per_minute + per_minute / 60 * BURST_S + 4000 + 1


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=60), st.integers(1, 4))
def test_a_waiting_call_is_overtaken_by_one_call_of_each_other_session_per_place_in_its_own_line(
    comers: list[str], n_places: int
) -> None:
    limiter = Limiter(ModelLimits(concurrency=n_places), 0.0)
    holders = [Call("holder") for _ in range(n_places)]
    assert all(limiter.comes(call, 0.0) for call in holders)
    order: list[Call] = []
    waiting: list[Call] = []
    for session_id in comers:
        call = Call(session_id)
        call.wake = lambda call=call: order.append(call)
        assert not limiter.comes(call, 0.0)
        waiting.append(call)
    for call in (*holders, *waiting):
        if call in order or call in holders:
            limiter.leaves(call, 0.0)
            limiter.let_in(0.0)
    while len(order) < len(waiting):  # whoever is inside leaves until all were
        for call in [call for call in order if call.inside]:
            limiter.leaves(call, 0.0)
        limiter.let_in(0.0)
    for n, call in enumerate(order):
        earlier = Counter(one.session_id for one in order[:n])
        own = earlier[call.session_id]
        assert all(count <= own + 1 for count in earlier.values())
    for session_id in set(comers):  # each session's own order is kept
        assert [c for c in order if c.session_id == session_id] == [
            c for c in waiting if c.session_id == session_id
        ]


def inside(limiter: Limiter, n: int, now: float = 0.0) -> list[Call]:
    calls = [Call(str(k)) for k in range(n)]
    for call in calls:
        limiter.comes(call, now)
    assert all(call.inside for call in calls)
    return calls


def gone(limiter: Limiter, calls: list[Call], now: float) -> None:
    for call in calls:
        limiter.leaves(call, now)
    limiter.let_in(now)


def test_refusals_of_calls_that_went_in_together_teach_what_the_provider_takes() -> None:
    limiter = Limiter(ModelLimits(), 0.0)
    calls = inside(limiter, 40)
    assert limiter.stats(0.0).limit is None
    news = []
    for call in calls[10:]:
        news.append(limiter.refused(call, 1.0, 0.1))
        limiter.leaves(call, 0.1)
    assert news == [True] + [False] * 29
    assert limiter.stats(0.1).limit == 10
    assert limiter.stats(0.1).n_rate_limited == 30


def test_a_call_that_is_refused_alone_says_nothing_of_how_many_at_once() -> None:
    limiter = Limiter(ModelLimits(concurrency=9), 0.0)
    (call,) = inside(limiter, 1)
    limiter.refused(call, 1.0, 0.0)
    gone(limiter, [call], 0.0)
    assert limiter.stats(0.0).limit == 9


def test_after_a_refusal_one_call_goes_ahead_and_the_others_follow_when_it_is_accepted() -> None:
    limiter = Limiter(ModelLimits(concurrency=4), 0.0)
    calls = inside(limiter, 4)
    limiter.refused(calls[0], 3.0, 0.0)
    gone(limiter, calls, 0.0)
    waiting = [Call(name) for name in "abc"]
    assert not any(limiter.comes(call, 1.0) for call in waiting)
    assert limiter.let_in(2.9) == 3.0
    limiter.let_in(3.0)
    assert [call.inside for call in waiting] == [True, False, False]
    assert limiter.let_in(3.5) == 3.0 + PROBE_S
    limiter.accepted(waiting[0], 3.6)
    limiter.let_in(3.6)
    assert [call.inside for call in waiting] == [True, True, False]  # 4 fell to 2


def test_a_probe_that_is_not_refused_for_a_while_is_followed_too() -> None:
    limiter = Limiter(ModelLimits(), 0.0)
    calls = inside(limiter, 8)
    limiter.refused(calls[0], 1.0, 0.0)
    gone(limiter, calls, 0.0)
    waiting = [Call(name) for name in "ab"]
    assert [limiter.comes(call, 1.0) for call in waiting] == [True, False]
    limiter.let_in(1.0 + PROBE_S)
    assert waiting[1].inside


def test_a_probe_that_was_cancelled_lets_the_next_one_try_at_once() -> None:
    limiter = Limiter(ModelLimits(), 0.0)
    calls = inside(limiter, 8)
    limiter.refused(calls[0], 1.0, 0.0)
    gone(limiter, calls, 0.0)
    waiting = [Call(name) for name in "abc"]
    assert [limiter.comes(call, 1.0) for call in waiting] == [True, False, False]
    gone(limiter, [waiting[0]], 1.1)
    assert [call.inside for call in waiting] == [False, True, False]


def test_the_limit_comes_back_fast_to_where_it_fell_and_slowly_above() -> None:
    limiter = Limiter(ModelLimits(concurrency=100), 0.0)
    first = inside(limiter, 20)
    for call in first:  # a burst of requests was too much, not their number at once
        limiter.refused(call, 0.0, 0.0)
        limiter.leaves(call, 0.0)
    assert limiter.stats(0.0).limit == 1
    seen = []
    for now in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, RAISE_S, RAISE_S + 1, 2 * RAISE_S, 3 * RAISE_S):
        calls = [Call(str(k)) for k in range(100)]
        for call in calls:
            limiter.comes(call, now)
        limiter.let_in(now)
        for call in [call for call in calls if call.inside]:
            limiter.accepted(call, now)
            limiter.let_in(now)
        seen.append(limiter.stats(now).limit)
        gone(limiter, [call for call in calls if not call.inside], now)
        gone(limiter, [call for call in calls if call.inside], now)
    assert seen == [2, 4, 8, 16, 19, 19, 20, 20, 22, 26]


def test_without_a_time_a_provider_is_asked_by_one_call_at_growing_distance() -> None:
    limiter = Limiter(ModelLimits(), 0.0, backoff_s=1.0)
    now, pauses = 0.0, []
    for _ in range(6):
        call = Call("a")
        assert limiter.comes(call, now)
        limiter.refused(call, None, now)
        limiter.leaves(call, now)
        pauses.append(limiter.closed_s(now))
        now += limiter.closed_s(now)
    assert pauses == [1.0, 2.0, 4.0, 8.0, MAX_BACKOFF_S, MAX_BACKOFF_S]


def test_when_nothing_is_left_those_who_wait_are_told() -> None:
    limiter = Limiter(ModelLimits(), 0.0)
    now, told = 0.0, []
    waiter = Call("waiter", wake=lambda: told.append(1))
    for n in range(N_HOPELESS):
        call = Call("a")
        limiter.comes(call, now)
        limiter.let_in(now)
        assert call.inside
        assert not told
        if n == N_HOPELESS - 1:
            assert not limiter.comes(waiter, now)
        limiter.refused(call, None, now)
        limiter.leaves(call, now)
        now += limiter.closed_s(now)
    assert told
    assert not waiter.inside
    limiter.leaves(waiter, now)
    assert limiter.at_rest(now)


def test_a_retry_after_that_cannot_be_is_believed_for_an_hour() -> None:
    limiter = Limiter(ModelLimits(), 0.0)
    (call,) = inside(limiter, 1)
    limiter.refused(call, 1e9, 0.0)
    assert limiter.closed_s(0.0) == MAX_CLOSED_S


def test_a_limit_that_was_found_is_forgotten_when_the_model_was_at_rest() -> None:
    limiter = Limiter(ModelLimits(), 0.0)
    calls = inside(limiter, 4)
    limiter.refused(calls[0], 1.0, 0.0)
    gone(limiter, calls, 0.0)
    assert limiter.stats(FORGET_S).limit == 2
    inside(limiter, 1, FORGET_S + 1)
    assert limiter.stats(FORGET_S + 1).limit is None


def test_requests_per_minute_hold_calls_back() -> None:
    limiter = Limiter(ModelLimits(requests_per_minute=12), 0.0)  # two are kept, one each 5 s
    calls = [Call("a") for _ in range(4)]
    assert [limiter.comes(call, 0.0) for call in calls] == [True, True, False, False]
    assert limiter.let_in(0.0) == 5.0
    assert limiter.let_in(5.0) == 10.0
    assert [call.inside for call in calls] == [True, True, True, False]


def test_a_small_call_does_not_pass_a_large_one_that_waits() -> None:
    limiter = Limiter(ModelLimits(tokens_per_minute=6000), 0.0)  # 1000 are kept
    large, small = Call("a"), Call("b")
    limiter.expects(large, 8000, 1)
    limiter.expects(small, 4, 1)
    first = Call("c")
    limiter.expects(first, 400, 1)
    assert [limiter.comes(call, 0.0) for call in (first, large, small)] == [True, False, False]
    assert limiter.let_in(0.0) == 1.01
    limiter.let_in(1.01)
    assert large.inside
    assert not small.inside
    assert limiter.let_in(1.01) > 11.0  # the debt of the large one comes first
