"""The rule by which calls of a model are let in: what the provider allows, fair between sessions.

Synchronous, without a clock or a loop: every instant is handed in, in seconds. `agent.model.limits` lets
tasks wait at it.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from agent.events import Usage
from agent.model.retry import MAX_PAUSE_S
from agent.settings import ModelLimits

BURST_S = 10.0
"""What a minute allows comes back evenly, and so much of it is kept. Providers count in spans of seconds too."""
FALL = 0.7
RAISE_S = 15.0
"""Between two attempts to find more room than was refused: each may cost a call an attempt."""
PROBE_S = 2.0
"""Refusals come at once. A call that was not refused for this long is being thought about."""
MAX_BACKOFF_S = 10.0
"""Of a provider that refuses and names no time: one call looks again this often."""
N_HOPELESS = 4
"""Rounds of refusals without a time, after which all that wait are turned away: no quota is left."""
MAX_CLOSED_S = 3600.0
"""So much of a Retry-After is believed: a wrong one must not close a model until the next restart."""
FORGET_S = 600.0
"""A limit that was found is not the provider's for ever."""
FIRST_ANSWER_TOKENS = 500.0
FIRST_TOKENS_PER_CHAR = 0.25
"""Until usage tells: the usual rule of thumb for English."""
NEW_SHARE = 0.2
"""Of the newest usage in the running mean."""
ENOUGH = 1e-6
"""A bucket's level is a float."""


class Bucket:
    """What comes back evenly, with at most `burst` kept.

    In any minute at most `per_minute` leaves it, and the burst; or in place of the burst one amount
    that is more than that: it waits for a full bucket and leaves a debt.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_s = per_minute / 60
        self.burst = max(1.0, self._per_s * BURST_S)
        self._level = self.burst
        self._at = now

    def ready_at(self, amount: float, now: float) -> float:
        missing = min(amount, self.burst) - self._filled(now)
        return now if missing <= ENOUGH else now + missing / self._per_s

    def take(self, amount: float, now: float) -> None:
        """Whether it is there or not; a negative amount goes back."""
        self._level = min(self.burst, self._filled(now) - amount)
        self._at = now

    def _filled(self, now: float) -> float:
        return min(self.burst, self._level + (now - self._at) * self._per_s)


def _bucket(per_minute: int | None, now: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now)


class Call:
    """A call from when it comes until it leaves. `wake` is told when it is inside, or was turned away."""

    __slots__ = ("inside", "n_chars", "n_falls", "n_tokens", "session_id", "wake")

    def __init__(self, session_id: str, wake: Callable[[], object] = lambda: None) -> None:
        self.session_id = session_id
        self.wake = wake
        self.inside = False
        self.n_chars = 0
        self.n_tokens = 0.0
        """An estimate, until usage tells."""
        self.n_falls = 0
        """Of the limit before it went in."""


class LimitStats(NamedTuple):
    in_flight: int
    waiting: int
    limit: int | None
    """Calls at once, as things stand; None: no limit is set, and none was met."""
    n_rate_limited: int
    closed_s: float
    """Until the provider may be asked again."""


class Limiter:
    """Places, tokens and requests. Who waits goes in round-robin over the sessions, each session's calls
    in their order; who comes never goes past those who wait.

    The limit of places falls at a refusal. Each accepted call brings one back, up to what was too many;
    from there on only time does. A refusal also closes the door; the first call afterwards goes ahead
    as a probe.
    """

    def __init__(self, limits: ModelLimits, now: float, *, backoff_s: float = 1.0) -> None:
        self._most = math.inf if limits.concurrency is None else float(limits.concurrency)
        self._tokens = _bucket(limits.tokens_per_minute, now)
        self._requests = _bucket(limits.requests_per_minute, now)
        self._backoff_s = backoff_s
        self._limit = self._most
        self._fast_to = 0.0
        """One less than was refused last."""
        self._raised_at = now
        self._raise_by = 1
        """Doubles until it is too much: the refusal may have been for want of tokens, not of places."""
        self._n_inside = 0
        self._lines: dict[str, deque[Call]] = {}
        """By session, in the order of their turns."""
        self.n_waiting = 0
        self._closed_until = now
        self._probe: Call | None = None
        self._probe_next = False
        self._n_falls = 0
        self._n_refused = 0
        self._n_rounds = 0
        """Of refusals since a call was last accepted."""
        self._refused_at = now
        self._answer_tokens = FIRST_ANSWER_TOKENS
        self._tokens_per_char = FIRST_TOKENS_PER_CHAR

    @property
    def counts_tokens(self) -> bool:
        return bool(self._tokens)

    def closed_s(self, now: float) -> float:
        return max(0.0, self._closed_until - now)

    def at_rest(self, now: float) -> bool:
        return not self._n_inside and not self.n_waiting and now >= self._closed_until

    def stats(self, now: float) -> LimitStats:
        limit = None if math.isinf(self._limit) else int(self._limit)
        return LimitStats(
            self._n_inside, self.n_waiting, limit, self._n_refused, self.closed_s(now)
        )

    def expects(self, call: Call, n_chars: int, max_output_tokens: int | None) -> None:
        """Estimate what a call will use, before it comes."""
        call.n_chars = n_chars
        answer = min(self._answer_tokens, max_output_tokens or math.inf)
        call.n_tokens = n_chars * self._tokens_per_char + answer

    def comes(self, call: Call, now: float) -> bool:
        """Whether it goes in at once; if not it is in line, until it is woken or leaves."""
        if self._n_refused and not self._n_inside and now - self._refused_at > FORGET_S:
            self._limit = self._most
        if not self.n_waiting and self._opens_at(call, now) == now:
            self._goes_in(call, now)
            return True
        self._lines.setdefault(call.session_id, deque()).append(call)
        self.n_waiting += 1
        return False

    def let_in(self, now: float) -> float | None:
        """Let in whoever may; when to look again, if time alone lets the next one in."""
        while self._lines:
            session_id, line = next(iter(self._lines.items()))
            opens_at = self._opens_at(line[0], now)
            if opens_at is None or opens_at > now:
                return opens_at
            del self._lines[session_id]
            call = line.popleft()
            if line:
                self._lines[session_id] = line  # behind the other sessions
            self.n_waiting -= 1
            self._goes_in(call, now)
            call.wake()
        return None

    def accepted(self, call: Call, now: float) -> None:
        """The provider has begun to answer a call that is inside."""
        self._n_rounds = 0
        if call is self._probe:
            self._probe = None
            self._closed_until = now
        # Places that nobody wants prove nothing, nor do calls from before the fall.
        if self._n_inside + 1 > self._limit and call.n_falls == self._n_falls:
            self._limit = min(self._raised(now), self._most)

    def refused(self, call: Call, retry_after_s: float | None, now: float) -> bool:
        """Tell of a call that is inside, before it leaves. Whether this is news: calls that went in
        together and are refused one after another are one refusal."""
        self._n_refused += 1
        self._refused_at = now
        news = call.n_falls == self._n_falls
        if news:
            self._n_falls += 1
            self._n_rounds += 1
        # A call that went alone says nothing of how many at once.
        if call is not self._probe and (self._n_inside > 1 or not news):
            if news:
                self._fast_to = self._n_inside - 1.0
                self._raised_at, self._raise_by = now, 1
                self._limit = min(self._limit, FALL * self._n_inside)
            # What is not refused meanwhile is what the provider takes.
            self._limit = max(1.0, min(self._limit, self._n_inside - 1))
        if self._tokens:
            self._tokens.take(-call.n_tokens, now)
            call.n_tokens = 0.0
        pause_s = self._pause_s(retry_after_s)
        self._closed_until = max(self._closed_until, now + pause_s)
        self._probe, self._probe_next = None, True
        hopeless = retry_after_s is None and self._n_rounds >= N_HOPELESS
        if hopeless or pause_s > MAX_PAUSE_S:
            self._turn_away()
        return news

    def leaves(self, call: Call, now: float, usage: Usage | None = None) -> None:
        """From the line or from inside, once. `let_in` afterwards."""
        if not call.inside:
            self._leaves_line(call)
            return
        call.inside = False
        self._n_inside -= 1
        if call is self._probe:
            # Neither accepted nor refused: the next one tries.
            self._probe, self._probe_next = None, True
            self._closed_until = now
        if self._tokens and usage:
            used = usage.prompt_tokens + usage.completion_tokens
            self._tokens.take(used - call.n_tokens, now)
            self._learn(call, usage)

    def _learn(self, call: Call, usage: Usage) -> None:
        self._answer_tokens += NEW_SHARE * (usage.completion_tokens - self._answer_tokens)
        if call.n_chars:
            per_char = usage.prompt_tokens / call.n_chars
            self._tokens_per_char += NEW_SHARE * (per_char - self._tokens_per_char)

    def _opens_at(self, call: Call, now: float) -> float | None:
        """None: not before somebody leaves."""
        if self._n_inside + 1 > self._limit:
            return None
        at = max(now, self._closed_until)
        if self._tokens:
            at = max(at, self._tokens.ready_at(call.n_tokens, now))
        if self._requests:
            at = max(at, self._requests.ready_at(1, now))
        return at

    def _goes_in(self, call: Call, now: float) -> None:
        call.inside = True
        call.n_falls = self._n_falls
        self._n_inside += 1
        if self._tokens:
            self._tokens.take(call.n_tokens, now)
        if self._requests:
            self._requests.take(1, now)
        if self._probe_next:
            self._probe, self._probe_next = call, False
            self._closed_until = now + PROBE_S

    def _raised(self, now: float) -> float:
        if self._limit < self._fast_to:
            return min(self._limit + 1, self._fast_to)
        if now - self._raised_at < RAISE_S:
            return self._limit
        self._raised_at = now
        raised = self._limit + self._raise_by
        self._raise_by *= 2
        return raised

    def _pause_s(self, retry_after_s: float | None) -> float:
        if retry_after_s is not None:
            return min(MAX_CLOSED_S, retry_after_s)
        return min(MAX_BACKOFF_S, self._backoff_s * 2.0 ** min(self._n_rounds - 1, 10))

    def _leaves_line(self, call: Call) -> None:
        line = self._lines.get(call.session_id)
        if line and call in line:  # else it was turned away
            line.remove(call)
            self.n_waiting -= 1
            if not line:
                del self._lines[call.session_id]

    def _turn_away(self) -> None:
        waiting = [call for line in self._lines.values() for call in line]
        self._lines.clear()
        self.n_waiting = 0
        for call in waiting:
            call.wake()
