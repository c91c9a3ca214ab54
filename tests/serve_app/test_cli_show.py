"""What a terminal shows of a session's events."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from serve_app.cli_show import Screen
from serve_app.sse_client import Event


def shown(*events: tuple[str, dict[str, Any]], every_fact: bool = False) -> str:
    out = StringIO()
    screen = Screen(Console(file=out, width=200, soft_wrap=True), every_fact=every_fact)
    for kind, data in events:
        screen.show(Event("1.1.1", kind, data))
    return out.getvalue()


def delta(offset: int, text: str) -> tuple[str, dict[str, Any]]:
    return "text_delta", {"turn": 1, "part_id": "p1", "offset": offset, "text": text}


def said(text: str) -> tuple[str, dict[str, Any]]:
    return "assistant_message", {"seq": 5, "turn": 1, "part_id": "p1", "text": text}


@pytest.mark.parametrize(
    "events",
    [
        [said("hello world")],
        [delta(0, "hello "), delta(6, "world"), said("hello world")],
        [delta(0, "hello "), delta(0, "hello "), delta(3, "lo wo"), said("hello world")],
        [delta(0, "hel"), said("hello world"), said("hello world")],
    ],
)
def test_text_is_shown_once_however_it_comes(events: list[tuple[str, dict[str, Any]]]) -> None:
    assert shown(*events) == "hello world\n"


def test_live_output_stands_for_the_result() -> None:
    started = {"seq": 1, "tool": "bash", "arguments": '{"command": "ls"}'}
    finished = {
        "seq": 2, "tool": "bash", "tool_call_id": "c", "outcome": "ok", "text": "a.txt",
        "duration_ms": 3,
    }  # fmt: skip
    live = {"turn": 1, "tool_call_id": "c", "offset": 0, "text": "a.txt"}
    without = shown(("tool_started", started), ("tool_finished", finished))
    streamed = shown(
        ("tool_started", started), ("tool_output_delta", live), ("tool_finished", finished)
    )
    assert without.count("a.txt") == streamed.count("a.txt") == 1
    assert '{"command": "ls"}' in without


def test_foreign_text_cannot_drive_the_terminal() -> None:
    nasty = "\x1b]0;title\x07\x9b2J[red]x[/] :smile:"
    output = shown(
        delta(0, nasty),
        ("tool_started", {"seq": 1, "tool": nasty, "arguments": nasty}),
        ("turn_ended", {"seq": 2, "reason": "failed", "detail": nasty}),
        ("activated", {"seq": 3, "epoch": 1, "reason": nasty}),
        every_fact=True,
    )
    assert not set(output) & {"\x1b", "\x07", "\x9b"}
    assert output.count("[red]x[/] :smile:") == 5


def test_a_call_that_waits_says_why() -> None:
    ask = {"tool_call_id": "c", "tool": "bash", "arguments": '{"n": 1}', "reason": "it [deletes]"}
    output = shown(("approval_requested", {"seq": 1, "asks": [ask]}))
    assert output.splitlines() == ['? bash {"n": 1}', "  because: it [deletes]"]


def test_a_turn_that_went_wrong_says_so() -> None:
    assert "no key" in shown(("turn_ended", {"seq": 1, "reason": "failed", "detail": "no key"}))
    assert shown(("turn_ended", {"seq": 1, "reason": "done", "detail": None})) == ""
