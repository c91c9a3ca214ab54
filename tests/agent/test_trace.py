import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.events import (
    AssistantMessage,
    Compacted,
    Fact,
    ModelCalled,
    Record,
    Rewound,
    ToolCall,
    ToolFinished,
    TurnEnded,
    Usage,
    UserMessage,
    wire,
)
from agent.redact import MARK
from agent.trace import trajectory, write_trajectory
from tests.support.golden import JOURNALS, golden
from tests.support.journals import opening

START = datetime(2026, 1, 1, tzinfo=UTC)
TOKEN = "hf_" + "a1B2c3D4e5" * 3
KEYS = [
    "session_id", "user_id", "session_start_time", "session_end_time", "model_name",
    "total_cost_usd", "usage_metrics", "messages", "events", "tools",
]  # fmt: skip


def journal(*facts: Fact) -> list[Record]:
    return [
        Record(seq, 1, START + timedelta(seconds=seq), fact)
        for seq, fact in enumerate((opening("s"), *facts), 1)
    ]


def asked(turn: int, text: str) -> UserMessage:
    return UserMessage(turn=turn, text=text)


def answered(turn: int, text: str, *calls: str) -> AssistantMessage:
    return AssistantMessage(
        turn=turn,
        part_id="p",
        text=text,
        tool_calls=tuple(ToolCall(tool_call_id=c, tool="bash", arguments="{}") for c in calls),
        finish_reason="stop",
        model="m",
    )


def result(turn: int, call: str, text: str) -> ToolFinished:
    return ToolFinished(turn=turn, tool_call_id=call, tool="bash", outcome="ok", text=text)


def called(model: str, cost_usd: float | None) -> ModelCalled:
    usage = Usage(prompt_tokens=10, completion_tokens=2, cached_tokens=4, reasoning_tokens=1)
    return ModelCalled(turn=1, model=model, usage=usage, cost_usd=cost_usd, latency_ms=1)


def contents(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages]


def messages_of(*facts: Fact) -> list[dict[str, Any]]:
    return trajectory(journal(*facts), tools=[])["messages"]


def test_a_trajectory_has_exactly_its_keys_and_the_system_prompt_first() -> None:
    tools = [{"type": "function", "function": {"name": "bash"}}]
    records = journal(asked(1, "hi"), answered(1, "ho"), TurnEnded(turn=1, reason="done"))
    found = trajectory(records, tools=tools)
    assert list(found) == KEYS
    assert found["session_id"] == "s"
    assert found["user_id"] == "ann"
    assert found["model_name"] == "scripted/demo"
    assert found["session_start_time"] == "2026-01-01T00:00:01+00:00"
    assert found["session_end_time"] == "2026-01-01T00:00:04+00:00"
    assert found["messages"] == [
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
    assert found["tools"] == tools
    later = trajectory(records, tools=[], ended_at=datetime(2027, 1, 1, tzinfo=UTC))
    assert later["session_end_time"] == "2027-01-01T00:00:00+00:00"


def test_events_are_the_facts_as_the_wire_shows_them_with_their_epoch() -> None:
    records = journal(asked(1, "hi"), TurnEnded(turn=1, reason="done"))
    events = trajectory(records, tools=[])["events"]
    assert events == [{"epoch": 1, **wire(record)} for record in records]
    assert [event["seq"] for event in events] == [1, 2, 3]
    assert "You are careful." not in json.dumps(events)


def test_a_message_that_waited_stands_where_its_turn_begins() -> None:
    found = messages_of(
        asked(1, "one"),
        answered(1, "looking", "a"),
        asked(2, "two"),
        asked(3, "three"),
        result(1, "a", "seen"),
        answered(1, "first answer"),
        TurnEnded(turn=1, reason="done"),
        answered(2, "second answer"),
        TurnEnded(turn=2, reason="done"),
        answered(3, "third answer"),
    )
    assert contents(found)[1:] == [
        *("one", "looking", "seen", "first answer"),
        *("two", "second answer", "three", "third answer"),
    ]


def test_results_follow_their_calls_in_the_order_of_the_calls() -> None:
    found = messages_of(
        asked(1, "go"),
        answered(1, "", "a", "b", "c"),
        result(1, "c", "C"),
        result(1, "a", "A"),
        answered(1, "end"),
    )
    assert [m.get("tool_call_id") for m in found] == [None, None, None, "a", "b", "c", None]
    assert contents(found)[3] == "A"
    assert "not executed" in contents(found)[4]
    assert contents(found)[5] == "C"


def test_undo_and_compaction_mark_messages_and_destroy_none() -> None:
    found = messages_of(
        asked(1, "one"),
        answered(1, "answer one"),
        asked(2, "two"),
        answered(2, "answer two", "a"),
        result(2, "a", "seen"),
        Rewound(to=1, n_messages=2),
        asked(3, "three"),
        Compacted(turn=3, upto=3, summary="One was asked."),
        answered(3, "answer three"),
    )
    marks = {m["content"]: (m.get("rewound"), m.get("compacted")) for m in found}
    assert marks == {
        "You are careful.": (None, None),
        "one": (None, True),
        "answer one": (None, True),
        "two": (True, None),
        "answer two": (True, None),
        "seen": (True, None),
        "three": (None, None),
        "answer three": (None, None),
    }
    assert len(found) == len(marks)


def test_cost_is_the_sum_of_the_priced_calls_and_says_what_it_leaves_out() -> None:
    failed = ModelCalled(turn=1, model="b", usage=None, cost_usd=None, latency_ms=1, fault="x")
    found = trajectory(
        journal(called("a", 0.1), called("a", 0.2), called("b", None), failed), tools=[]
    )
    metrics = found["usage_metrics"]
    assert found["total_cost_usd"] == pytest.approx(0.3)
    assert metrics["n_model_calls"] == 4
    assert metrics["n_unpriced"] == 2
    assert metrics["prompt_tokens"] == 30
    assert metrics["reasoning_tokens"] == 3
    assert metrics["models"]["a"]["cost_usd"] == pytest.approx(0.3)
    assert metrics["models"]["b"]["cost_usd"] is None
    assert metrics["models"]["b"]["n_unpriced"] == 2


@pytest.mark.parametrize(
    ("costs", "total"), [([None, None], None), ([], 0.0), ([0.0], 0.0), ([None, 0.0], 0.0)]
)
def test_an_unpriced_session_costs_null_never_zero(
    costs: list[float | None], total: float | None
) -> None:
    facts = [called("a", cost) for cost in costs]
    assert trajectory(journal(*facts), tools=[])["total_cost_usd"] == total


def test_no_secret_is_in_a_trajectory() -> None:
    records = journal(
        asked(1, f"my token is {TOKEN}"),
        answered(1, f"export HF_TOKEN={TOKEN}", "a"),
        result(1, "a", "the horse battery staple"),
    )
    tools = [{"function": {"description": f"uses {TOKEN}"}}]
    found = trajectory(records, tools=tools, secrets=["horse battery"])
    text = json.dumps(found)
    assert TOKEN not in text
    assert "horse battery" not in text
    assert text.count(MARK) == 7  # each of three messages and its event, and the tool
    assert TOKEN in records[1].fact.text


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_any_beginning_of_a_golden_journal_has_a_whole_trajectory(path: Path) -> None:
    records = [line.record for line in golden(path)]
    for cut in range(1, len(records) + 1):
        found = trajectory(records[:cut], tools=[])
        facts = [record.fact for record in records[:cut]]
        messages = found["messages"]
        said = [f.text for f in facts if isinstance(f, UserMessage | AssistantMessage)]
        assert sorted(said) == sorted(
            m["content"]
            for m in messages
            if m["role"] in ("user", "assistant") and m["content"] != "I counted three files."
        )
        for n, message in enumerate(messages):
            calls = [call["id"] for call in message.get("tool_calls", [])]
            assert [m.get("tool_call_id") for m in messages[n + 1 : n + 1 + len(calls)]] == calls
        assert len(found["events"]) == cut
        assert json.loads(json.dumps(found)) == found


def test_the_golden_session_is_counted() -> None:
    found = trajectory([line.record for line in golden(JOURNALS[0])], tools=[])
    metrics = found["usage_metrics"]
    assert found["model_name"] == "openai/other"
    assert found["total_cost_usd"] == pytest.approx(0.4)
    assert metrics["n_turns"] == 8
    assert metrics["n_tool_calls"] == 4
    assert metrics["n_tool_errors"] == 1
    assert metrics["turns_by_reason"] == {
        "done": 3, "approval": 2, "interrupted": 1, "failed": 1, "limit": 1,
    }  # fmt: skip


def test_records_that_do_not_begin_with_the_opening_are_no_session() -> None:
    with pytest.raises(ValueError):
        trajectory(journal()[1:] + journal(asked(1, "x"))[1:], tools=[])


def test_a_file_is_written_whole_for_its_owner_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.json"
    first = trajectory(journal(asked(1, "grüße \u2028")), tools=[])
    write_trajectory(path, first)
    assert json.loads(path.read_text(encoding="utf-8")) == first
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TypeError):
        write_trajectory(path, {"messages": [1, 2, object()]})
    assert json.loads(path.read_text(encoding="utf-8")) == first
    write_trajectory(path, {})
    assert path.read_text() == "{}"
    assert list(path.parent.iterdir()) == [path]
