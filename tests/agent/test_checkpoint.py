"""A context that begins at a checkpoint is the one that was folded from the first record."""

from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.checkpoint import CODE, EVERY, checkpoint_due, replayed
from agent.context import MAX_ANSWERS, Context, Folded
from agent.events import (
    Activated,
    ApprovalDecided,
    ApprovalRequested,
    Ask,
    AssistantMessage,
    Compacted,
    Decision,
    Fact,
    InterruptRequested,
    ModelCalled,
    Passivated,
    PlanItem,
    PlanUpdated,
    Record,
    Rewound,
    SandboxOpened,
    Seeded,
    SeedRequested,
    ToolCall,
    ToolFinished,
    ToolStarted,
    TurnEnded,
    Usage,
    UserMessage,
    WorkspaceSaved,
)
from agent.journal import Checkpoint, read_all
from agent.journal_memory import MemoryJournal
from tests.support.golden import JOURNALS, golden
from tests.support.journals import opening

AT = datetime(2026, 1, 1, tzinfo=UTC)


def new_context() -> Context:
    return Context(lambda tool: tool == "look")


def records_of(facts: Sequence[Fact]) -> list[Record]:
    return [Record(seq, 1, AT, fact) for seq, fact in enumerate(facts, 1)]


def seen(context: Context) -> dict[str, Any]:
    """All that a session goes on with: what it owes and tells, and the state behind that."""
    state = Context(lambda _: False)
    state.restore(context.checkpointed())
    return {
        "owed": context.owed(),
        "prompt": context.prompt(),
        "turns": context.user_turns,
        "messages": [context.n_messages_upto(turn) for turn in range(context.n_turns + 1)],
        "cut": context.cut(keep_tokens=50),
        "state": {each.name: getattr(state, each.name) for each in fields(Folded)},
    }


class History:
    """Facts as a session writes them, drawn one after another."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.facts: list[Fact] = [opening("s"), Activated(epoch=1, reason="opened")]
        self.turn = 0

    @property
    def context(self) -> Context:
        context = new_context()
        context.fold(records_of(self.facts))
        return context

    def text(self) -> str:
        return self.draw(st.sampled_from(["", "a", "word " * 40, "\0é😀"]))

    def add_turn(self) -> None:
        self.turn += 1
        kind = self.draw(st.sampled_from(["message", "message", "message", "seed", "queued"]))
        message_id = self.draw(st.sampled_from([None, f"m{self.turn}"]))
        if kind == "seed":
            messages = ({"role": "user", "content": "x"},)
            self.facts += [
                SeedRequested(
                    turn=self.turn, message_id=message_id, messages=messages, n_dropped=0
                ),
                Seeded(turn=self.turn, summary=self.text(), n_messages=1, n_dropped=0),
            ]
        else:
            self.facts.append(
                UserMessage(turn=self.turn, message_id=message_id, text=self.text() + "?")
            )
            if kind == "queued":
                self.facts.append(UserMessage(turn=self.turn + 1, text="later"))
            self.add_steps()
        self.end()
        if kind == "queued":
            self.turn += 1
            self.add_answer(())
            self.end()

    def end(self) -> None:
        self.facts.append(TurnEnded(turn=self.turn, reason="done"))

    def add_steps(self) -> None:
        for n in range(self.draw(st.integers(0, 3))):
            step = self.draw(st.sampled_from(["call", "open", "ask", "compact", "odd"]))
            call = ToolCall(tool_call_id=f"c{self.turn}.{n}", tool="bash", arguments="{}")
            started = ToolStarted(turn=self.turn, **call.model_dump())
            finished = ToolFinished(
                turn=self.turn, tool_call_id=call.tool_call_id, tool="bash", outcome="ok", text="r"
            )
            match step:
                case "compact":
                    self.add_compaction()
                case "odd":
                    self.add_odd()
                case "ask":
                    self.add_answer((call,))
                    ask = Ask(**call.model_dump())
                    self.facts.append(ApprovalRequested(turn=self.turn, asks=(ask,)))
                    self.end()
                    self.turn += 1
                    decision = Decision(
                        tool_call_id=call.tool_call_id, decision="edit", arguments='{"a": 1}'
                    )
                    self.facts.append(ApprovalDecided(turn=self.turn, decisions=(decision,)))
                    self.facts += [started.model_copy(update={"turn": self.turn}), finished]
                case "open":
                    self.add_answer((call,))
                    self.facts.append(started)
                    self.facts.append(finished)
                case _:
                    self.add_answer((call,))
                    self.facts += [started, finished]
        self.add_answer(())

    def add_answer(self, calls: tuple[ToolCall, ...]) -> None:
        usage = Usage(prompt_tokens=10, completion_tokens=1)
        self.facts += [
            ModelCalled(turn=self.turn, model="m", usage=usage, cost_usd=None, latency_ms=1),
            AssistantMessage(
                turn=self.turn,
                part_id=f"{self.turn}.1.{len(self.facts)}",
                text=self.text(),
                tool_calls=calls,
                finish_reason="stop",
                model="m",
            ),
        ]

    def add_compaction(self) -> None:
        if upto := self.context.cut(keep_tokens=self.draw(st.sampled_from([0, 20]))):
            self.facts.append(Compacted(turn=self.turn, upto=upto, summary=self.text() or "s"))

    def add_odd(self) -> None:
        odd: Fact = self.draw(
            st.sampled_from(
                [
                    InterruptRequested(turn=self.turn, message_id=f"i{len(self.facts)}"),
                    PlanUpdated(turn=self.turn, items=(PlanItem(id="1", content="x"),)),
                    SandboxOpened(turn=self.turn, kind="local", latency_ms=1),
                    Activated(epoch=2, reason="recovered"),
                    WorkspaceSaved(snapshot_id="w", n_files=1, n_bytes=1, copy_id="n"),
                    Passivated(reason="shutdown"),
                ]
            )
        )
        self.facts.append(odd)

    def rewind(self) -> None:
        to = self.draw(st.integers(0, self.turn))
        n_messages = self.context.n_messages_upto(to)
        self.facts.append(Rewound(message_id=f"r{len(self.facts)}", to=to, n_messages=n_messages))


@st.composite
def histories(draw: st.DrawFn) -> list[Record]:
    history = History(draw)
    for _ in range(draw(st.integers(1, 6))):
        history.add_turn()
        if draw(st.integers(0, 5)) == 0:
            history.rewind()
    return records_of(history.facts)


@settings(max_examples=150)
@given(histories(), st.data())
async def test_a_checkpoint_and_what_follows_it_are_the_whole_history(
    records: list[Record], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(records)))
    whole, first = new_context(), new_context()
    first.fold(records[:cut])
    journal = MemoryJournal.holding(records[:cut])
    checkpoint = Checkpoint(cut, CODE, first.checkpointed())
    await journal.append("s", 1, [record.fact for record in records[cut:]], checkpoint)
    whole.fold(await read_all(journal, "s"))
    found = await replayed(journal, "s", new_context)
    assert found.checkpoint_seq in {0, cut} if cut < len(records) else {0}
    assert seen(found.context) == seen(whole)


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_golden_journals_go_on_from_any_place(path: Any) -> None:
    records = [line.record for line in golden(path)]
    whole = new_context()
    whole.fold(records)
    for cut in range(1, len(records)):
        first, then = new_context(), new_context()
        first.fold(records[:cut])
        then.restore(first.checkpointed())
        then.fold(records[cut:])
        if then.is_short:
            then.fold_anew(records)
        assert seen(then) == seen(whole), cut


async def test_a_rewind_behind_the_checkpoint_brings_the_texts_back() -> None:
    said = AssistantMessage(turn=1, part_id="p", text="answer", finish_reason="stop", model="m")
    facts: list[Fact] = [
        opening("s"),
        UserMessage(turn=1, text="question 1"),
        said,
        TurnEnded(turn=1, reason="done"),
        UserMessage(turn=2, text="question 2"),
        Compacted(turn=2, upto=3, summary="so far"),
        said.model_copy(update={"turn": 2}),
        TurnEnded(turn=2, reason="done"),
    ]
    records = records_of(facts)
    first, then = new_context(), new_context()
    first.fold(records)
    then.restore(first.checkpointed())
    assert "answer" not in str(then.prompt()[:2])
    rewound = Record(len(records) + 1, 1, AT, Rewound(to=1, n_messages=2))
    then.fold([rewound])
    assert then.is_short
    then.fold_anew([*records, rewound])
    assert [m["content"] for m in then.prompt()[1:]] == ["question 1", "answer"]


@pytest.mark.parametrize("body", ["", "[]", "no json", '[{"opened": 1}]'])
async def test_a_checkpoint_that_cannot_be_read_is_as_good_as_none(body: str) -> None:
    facts: list[Fact] = [UserMessage(turn=1, text="x"), TurnEnded(turn=1, reason="done")]
    whole = new_context()
    for code in (CODE, "another"):
        journal = MemoryJournal()
        records = list(await journal.create(opening("s")))
        records += await journal.append("s", 0, facts, Checkpoint(1, code, body))
        whole = new_context()
        whole.fold(records)
        found = await replayed(journal, "s", new_context)
        assert found.checkpoint_seq == 0
        assert seen(found.context) == seen(whole)


def test_a_checkpoint_is_due_behind_a_compaction_and_after_many_records() -> None:
    context = new_context()
    facts: list[Fact] = [opening("s"), UserMessage(turn=1, text="x")]
    context.fold(records_of(facts))
    assert checkpoint_due(context, 0) is None
    context.fold([Record(3, 1, AT, Compacted(turn=1, upto=2, summary="s"))])
    due = checkpoint_due(context, 0)
    assert due is not None
    assert due.seq == 3
    assert checkpoint_due(context, 3) is None
    quiet = PlanUpdated(items=())
    context.fold(Record(seq, 1, AT, quiet) for seq in range(4, EVERY + 3))
    assert checkpoint_due(context, 3) is None
    context.fold([Record(EVERY + 3, 1, AT, quiet)])
    assert checkpoint_due(context, 3) is not None


def test_only_the_newest_answers_are_remembered() -> None:
    context = new_context()
    facts = [UserMessage(turn=n, message_id=f"m{n}", text="x") for n in range(1, 400)]
    context.fold(records_of([opening("s"), *facts]))
    assert len(context.answers) == MAX_ANSWERS
    assert context.n_answers == 399
    assert f"m{399 - MAX_ANSWERS}" not in context.answers
    assert f"m{400 - MAX_ANSWERS}" in context.answers
