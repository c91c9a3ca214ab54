"""Where processes may wait for sessions, by what nodes report."""

from actors.memory import NodeMemory
from actors.rooms import FORGET_AFTER_S, HOST_BYTES, Rooms

GB = 10**9


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def at(share: float, limit: int = 10 * GB) -> NodeMemory:
    return NodeMemory(int(share * limit), limit)


def test_a_node_that_is_tight_is_told_how_many_must_go() -> None:
    rooms = Rooms()
    assert rooms.note("a", at(0.79)) == 0
    assert rooms.has_room("a")
    n_surplus = rooms.note("a", at(0.85))
    assert (n_surplus - 1) * HOST_BYTES <= 0.1 * 10 * GB <= n_surplus * HOST_BYTES
    assert not rooms.has_room("a")


def test_room_that_was_short_is_room_again_only_further_down() -> None:
    rooms = Rooms()
    assert rooms.note("a", at(0.81))
    assert rooms.note("a", at(0.77))
    assert not rooms.has_room("a")
    assert rooms.note("a", at(0.74)) == 0
    assert rooms.has_room("a")
    assert rooms.note("a", at(0.77)) == 0


def test_there_is_room_somewhere_as_long_as_one_node_has_it() -> None:
    rooms = Rooms()
    assert rooms.has_room(None)
    rooms.note("a", at(0.9))
    assert not rooms.has_room(None)
    assert rooms.has_room("unheard of")
    rooms.note("b", at(0.1))
    assert rooms.has_room(None)
    assert not rooms.has_room("a")


def test_a_new_process_comes_where_the_smallest_share_is_used() -> None:
    rooms = Rooms()
    assert rooms.placed() is None
    rooms.note("a", at(0.4))
    assert rooms.placed() is None  # nothing to choose
    rooms.note("b", at(0.5))
    assert rooms.placed() == "a"


def test_processes_that_no_report_counts_yet_are_counted_by_hand() -> None:
    rooms = Rooms()
    rooms.note("a", at(0.40))
    rooms.note("b", at(0.41))
    places = [rooms.placed() for _ in range(8)]
    assert 4 < places.count("a") < 8


def test_a_node_that_is_not_heard_of_any_more_is_forgotten() -> None:
    clock = Clock()
    rooms = Rooms(clock)
    rooms.note("a", at(0.9))
    clock.now_s += FORGET_AFTER_S + 1
    rooms.note("b", at(0.9))
    assert rooms.has_room("a")
    assert not rooms.has_room(None)
