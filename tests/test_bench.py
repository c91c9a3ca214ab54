"""The chaos run's users see what is wrong, a seed repeats its attacks, and results become figures and a page."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bench import page, soak
from bench.budgets import budgets
from bench.chaos import WEIGHTS, attacks
from bench.clients import Ear, Line
from bench.evidence import Evidence
from bench.roles import Taken
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


def test_the_performance_page_says_what_the_newest_results_say() -> None:
    text = page.PAGE.read_text()
    assert set(page.PLACE.findall(text)) == set(page.TABLES)
    assert page.written(text) == text, "python -m bench.page writes it"


def sample(at_s: float, pss_mb: int) -> soak.Sample:
    manager = Taken(n=2, pss_bytes=2 * pss_mb * soak.MB, n_fds=2, n_threads=2)
    return soak.Sample(at_s, {"manager": manager}, 0.1 * at_s, 0, 0, int(at_s))


def test_a_soak_tells_a_leak_from_a_warm_up_and_from_noise() -> None:
    def growth(*mb: int) -> float:
        samples = [sample(10.0 * number, each) for number, each in enumerate(mb, 1)]
        return soak.figures_of(samples, soak.Tally())["soak.manager_pss_mb_growth"]

    assert growth(50, 60, 70, 80, 90, 100) == pytest.approx(40)
    assert growth(10, 60, 60, 60, 60, 60) == pytest.approx(0)
    assert growth(60, 61, 60, 61, 60, 61) < 1


def test_every_bound_of_a_soak_is_on_a_figure_that_it_makes() -> None:
    figures = soak.figures_of([sample(10.0 * n, 60) for n in range(1, 7)], soak.Tally())
    judged = [budget.judged(figures) for budget in budgets(soak.BOUNDS)]
    assert judged
    assert [one.budget.what for one in judged if one.verdict == "not measured"] == []
