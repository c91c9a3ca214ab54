"""`Pace`: one stream is never held back, many share."""

import pytest

from actors.pace import FLOWING_S, MAX_WAIT_S, Pace

COST_S = 0.002


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(COST_S, clock)


def test_the_first_send_waits_for_nothing(pace: Pace) -> None:
    for stream in range(100):
        assert pace.wait_s(stream) == 0
        pace.sent(stream)


def test_one_stream_waits_for_the_cost_of_its_own_sends_only(pace: Pace, clock: Clock) -> None:
    pace.sent("a")
    assert pace.wait_s("a") == pytest.approx(COST_S)
    clock.now_s += COST_S
    assert pace.wait_s("a") == 0


def test_many_wait_longer_and_never_too_long(pace: Pace) -> None:
    for stream in range(20):
        pace.sent(stream)
    assert pace.wait_s(19) == pytest.approx(20 * COST_S)
    for stream in range(1000):
        pace.sent(stream)
    assert pace.wait_s(999) == pytest.approx(MAX_WAIT_S)


def test_streams_that_pause_or_end_make_room(pace: Pace, clock: Clock) -> None:
    for stream in range(20):
        pace.sent(stream)
    for stream in range(10):
        pace.ended(stream)
    assert pace.interval_s == pytest.approx(10 * COST_S)
    clock.now_s += FLOWING_S
    assert pace.wait_s(19) == 0
    pace.sent(19)
    assert pace.interval_s == pytest.approx(COST_S)


async def test_turn_waits_and_counts(pace: Pace, clock: Clock) -> None:
    await pace.turn("a")
    assert pace.wait_s("a") == pytest.approx(COST_S)
    await pace.turn("a")
    assert pace.interval_s == pytest.approx(COST_S)
    pace.ended("a")
    assert pace.wait_s("a") == 0
    assert pace.interval_s == 0
    assert clock.now_s == 100
