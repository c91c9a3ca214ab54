"""The chaos run's users see what is wrong, and a seed repeats its attacks."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import WEIGHTS, attacks
from bench.clients import Ear, Line
from bench.evidence import Evidence
from serve_app.sse_client import Event


def fact(seq: int, kind: str = "user_message", **more: Any) -> Event:
    return Event(f"{seq}.1.0", kind, {"seq": seq, "type": kind, "turn": 1, **more})


def delta(offset: int, text: str) -> Event:
    return Event("1.1.1", "text_delta", {"part_id": "p", "offset": offset, "text": text})


SAID = fact(2, "assistant_message", part_id="p", text="abcd")
ENDED = fact(3, "turn_ended", reason="done", code=None)


@pytest.mark.parametrize(
    ("events", "kinds"),
    [
        ([fact(1), delta(0, "ab"), delta(2, "cd"), SAID, ENDED], []),
        ([fact(1), delta(0, "ab"), fact(2, "activated", reason="recovered"), delta(0, "abcd")], []),
        ([fact(1), fact(3)], ["fact lost"]),
        ([fact(1), fact(1)], ["fact repeated"]),
        ([fact(2)], ["fact lost"]),
        ([fact(1), delta(0, "ab"), delta(3, "d")], ["text gap"]),
        ([fact(1), delta(0, "ab"), delta(1, "bc")], ["text repeated"]),
        ([fact(1), delta(0, "ax"), SAID], ["text gap"]),
        ([fact(1), SAID, ENDED, fact(4, "turn_ended", reason="done")], ["fact repeated"]),
    ],
)  # fmt: skip
def test_a_reader_finds_what_was_lost_and_what_came_twice(
    tmp_path: Path, events: list[Event], kinds: list[str]
) -> None:
    evidence = Evidence(tmp_path)
    ear = Ear(Line("http://127.0.0.1:1", evidence), evidence, "s")
    for event in events:
        ear.take(event)
    assert [violation.kind for violation in evidence.violations] == kinds
    assert len(list(tmp_path.iterdir())) == len(kinds)


def test_a_seed_repeats_the_attacks() -> None:
    def first(seed: int) -> list[Any]:
        return list(islice(attacks(seed, 5.0, set(WEIGHTS)), 200))

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert {attack.role for attack in first(1)} == set(WEIGHTS)
