"""One incarnation of a session: what it commits, what it survives."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors.activation import MAX_COMMANDS, MAX_STRETCH_CHARS, WATCHED_S, Activation
from actors.feed import MAX_PAGE_CHARS
from actors.protocol import (
    Compact,
    Conflict,
    Decide,
    Interrupt,
    Moved,
    NotFound,
    QueueFull,
    QuotaExceeded,
    Seed,
    SendMessage,
    SwitchModel,
    Truncate,
    Unavailable,
    Undo,
)
from actors.settings import ActorsSettings, Quota
from agent.context import MAX_ANSWERS, MAX_LOST
from agent.events import (
    AssistantMessage,
    Compacted,
    CompactionFailed,
    Cursor,
    Decision,
    InterruptRequested,
    ModelCalled,
    ModelSwitched,
    Record,
    SessionOpened,
    TextDelta,
    ToolFinished,
    ToolStarted,
    TurnEnded,
    UserMessage,
)
from agent.faults import ContextOverflow, Fenced, ModelLost, ModelUnavailable
from agent.journal_memory import MemoryJournal
from agent.spec import ApprovalPolicy, ApprovalRule, Compaction, Limits
from agent.testing import Reply, ScriptedModel
from tests.actors.conftest import MakeStand
from tests.support.house import ALICE, BOB, SOON_S, Echo, FakeOpener, Wait
from tests.support.processes import eventually
from tests.support.stand import ASKING, SAY, SPEC, SlowJournal, call, requests_of


async def whole_turn(stand: MakeStand) -> list[Record]:
    """A turn with two rounds of tools, a failing tool among them, and an answer."""
    made = stand(
        Reply("a", tool_calls=(call("echo"), call("effect"), call("burst"))),
        Reply("b", tool_calls=(call("effect"),)),
        SAY,
    )
    assert (await made.ended(await made.open(), "go")).reason == "done"
    return await made.records()


async def test_a_crash_after_any_fact_still_settles_every_call_once(stand: MakeStand) -> None:
    records = await whole_turn(stand)
    for cut in range(3, len(records)):
        journal = MemoryJournal.holding(records[:cut])
        n_answers = sum(isinstance(r.fact, AssistantMessage) for r in records[:cut])
        replies = [
            Reply("a", tool_calls=(call("echo"), call("effect"), call("burst"))),
            Reply("b", tool_calls=(call("effect"),)),
            SAY,
        ][n_answers:]
        after = stand(*replies, journal=journal)
        await after.rested(await after.wake())
        proposed = [
            c.tool_call_id for m in await after.facts(AssistantMessage) for c in m.tool_calls
        ]
        settled = [f.tool_call_id for f in await after.facts(ToolFinished)]
        assert sorted(settled) == sorted(proposed), cut
        assert [end.reason for end in await after.facts(TurnEnded)] == ["done"], cut


async def test_a_started_call_without_a_result_is_unknown_unless_it_is_idempotent(
    stand: MakeStand,
) -> None:
    records = await whole_turn(stand)
    started = [n for n, r in enumerate(records) if isinstance(r.fact, ToolStarted)]
    cut = records[: started[2] + 1]  # the three calls of the first round have started
    after = stand(SAY, journal=MemoryJournal.holding(cut))
    await after.rested(await after.wake())
    outcomes = {f.tool: f.outcome for f in await after.facts(ToolFinished)}
    assert outcomes == {"echo": "ok", "effect": "unknown", "burst": "error"}
    [request] = requests_of(after)
    told = {m["name"]: m["content"] for m in request.messages if m["role"] == "tool"}
    assert "may" in told["effect"]


async def test_a_call_that_was_lost_on_the_way_is_made_again_under_another_address(
    stand: MakeStand,
) -> None:
    lost = Reply("half of it", fault=ModelLost("gone"))
    made = stand(*[lost] * MAX_LOST, Reply("whole"), *[lost] * MAX_LOST, SAY)
    activation = await made.open()
    for text in ("hello", "again"):  # each turn has its own count
        assert (await made.ended(activation, text)).reason == "done"
    assert [m.text for m in await made.facts(AssistantMessage)] == ["whole", "ok"]
    called = await made.facts(ModelCalled)
    assert [c.fault for c in called] == [*["model_lost"] * MAX_LOST, None] * 2
    [first, _] = await made.facts(AssistantMessage)
    assert first.part_id == f"1.1.{MAX_LOST}"


async def test_a_gateway_that_is_lost_each_time_fails_the_turn(stand: MakeStand) -> None:
    made = stand(*[Reply(fault=ModelLost("gone"))] * (MAX_LOST + 1), SAY)
    activation = await made.open()
    ended = await made.ended(activation, "hello")
    assert (ended.reason, ended.code) == ("failed", "model_lost")
    assert (await made.ended(activation, "again")).reason == "done"


async def test_a_stale_incarnation_cannot_write_and_ends_itself(stand: MakeStand) -> None:
    made = stand(SAY, SAY)
    old = await made.open()
    new = await made.wake()
    with pytest.raises(Fenced):
        await old.submit(ALICE, SendMessage(text="from the grave"))
    with pytest.raises(Moved):
        await old.submit(ALICE, SendMessage(text="again"))
    assert made.reports == ["lost"]
    assert (await made.ended(new, "hello")).reason == "done"
    assert [m.text for m in await made.facts(UserMessage)] == ["hello"]


async def test_a_fenced_turn_stops_and_says_that_it_is_lost(stand: MakeStand) -> None:
    waiting = Wait()
    made = stand(Reply(tool_calls=(call("wait"),)), SAY, tools=[waiting])
    old = await made.open()
    await old.submit(ALICE, SendMessage(text="go"))
    await asyncio.wait_for(waiting.began.wait(), SOON_S)
    new = await made.wake()
    await made.rested(new)
    waiting.go.set()
    await asyncio.wait_for(made.lost.wait(), SOON_S)
    outcomes = [f.outcome for f in await made.facts(ToolFinished)]
    assert outcomes == ["unknown"]


async def test_interrupt_keeps_the_results_that_finished(stand: MakeStand) -> None:
    waiting = Wait()
    made = stand(Reply(tool_calls=(call("echo", "kept"), call("wait"))), SAY, tools=[waiting])
    activation = await made.open()
    await activation.submit(ALICE, SendMessage(text="go"))
    await asyncio.wait_for(waiting.began.wait(), SOON_S)
    while not await made.facts(ToolFinished):
        await activation.feed.changed(SOON_S)
    await activation.submit(ALICE, Interrupt())
    await made.rested(activation)
    outcomes = {f.tool: (f.outcome, f.text) for f in await made.facts(ToolFinished)}
    assert outcomes["echo"] == ("ok", "kept")
    assert outcomes["wait"][0] == "cancelled"
    assert len(requests_of(made)) == 1


async def test_an_interrupt_that_a_crash_cut_short_still_ends_the_turn(stand: MakeStand) -> None:
    records = await whole_turn(stand)
    began = next(n for n, r in enumerate(records) if isinstance(r.fact, ToolStarted))
    journal = MemoryJournal.holding(records[: began + 1])
    epoch = await journal.fence("s")
    await journal.append("s", epoch, [InterruptRequested(turn=1)])
    after = stand(journal=journal)
    await after.rested(await after.wake())
    assert [end.reason for end in await after.facts(TurnEnded)] == ["interrupted"]
    assert requests_of(after) == []


async def test_an_interrupted_answer_keeps_its_text_and_a_crashed_one_is_asked_again(
    stand: MakeStand,
) -> None:
    gate = asyncio.Event()
    made = stand(Reply("half|whole", chunks=2, gate=gate, gate_after=1), SAY)
    activation = await made.open()
    await activation.submit(ALICE, SendMessage(text="go"))
    while not activation.feed.page(activation.feed.now._replace(live=0)).frames[-1:]:
        await activation.feed.changed(SOON_S)
    while "text_delta" not in [
        f.event for f in activation.feed.page(activation.feed.now._replace(live=0)).frames
    ]:
        await activation.feed.changed(SOON_S)
    await activation.end()  # as a shutdown does: without a word from the user
    assert await made.facts(AssistantMessage) == []
    assert [c.fault for c in await made.facts(ModelCalled)] == ["interrupted"]
    await made.rested(await made.wake())
    assert [m.text for m in await made.facts(AssistantMessage)] == ["ok"]


async def test_decisions_survive_a_crash(stand: MakeStand) -> None:
    made = stand(Reply(tool_calls=(call("effect", "one"), call("effect", "two"))), SAY)
    assert (await made.ended(await made.open(ASKING), "go")).reason == "approval"
    woken = await made.wake()
    one, two = woken.context.pending
    edit = Decision(tool_call_id=one, decision="edit", arguments='{"word": "mine"}')
    reject = Decision(tool_call_id=two, decision="reject", feedback="no")
    assert (await made.ended(woken, Decide(decisions=(edit, reject)))).reason == "done"
    texts = [f.text for f in await made.facts(ToolFinished)]
    assert "mine" in texts
    told = [m["content"] for m in requests_of(made)[-1].messages if m["role"] == "tool"]
    assert any("edited" in text and "mine" in text for text in told)


async def test_a_denied_call_is_told_and_never_runs(stand: MakeStand) -> None:
    policy = ApprovalPolicy(rules=(ApprovalRule(tools="eff*", action="deny", reason="Not here."),))
    made = stand(Reply(tool_calls=(call("effect"), call("echo"))), SAY)
    spec = SPEC.model_copy(update={"approval": policy})
    assert (await made.ended(await made.open(spec), "go")).reason == "done"
    assert [s.tool for s in await made.facts(ToolStarted)] == ["echo"]
    denied = next(f for f in await made.facts(ToolFinished) if f.outcome == "denied")
    assert "Not here." in denied.text


async def test_an_edit_cannot_pass_a_rule_that_denies(stand: MakeStand) -> None:
    rules = (
        ApprovalRule(
            tools="effect",
            action="deny",
            when=({"path": "word", "equals": "evil"},),  # type: ignore[arg-type]
        ),
        ApprovalRule(tools="effect", action="ask"),
    )
    made = stand(Reply(tool_calls=(call("effect"),)), SAY)
    activation = await made.open(SPEC.model_copy(update={"approval": ApprovalPolicy(rules=rules)}))
    await made.ended(activation, "go")
    [waiting] = activation.context.pending
    evil = Decision(tool_call_id=waiting, decision="edit", arguments='{"word": "evil"}')
    await made.ended(activation, Decide(decisions=(evil,)))
    assert [f.outcome for f in await made.facts(ToolFinished)] == ["denied"]


LONG = "x" * 4000
"""A thousand tokens, by the rule of thumb."""


async def test_a_run_with_one_user_message_compacts_at_a_tool_call_boundary(
    stand: MakeStand,
) -> None:
    spec = SPEC.model_copy(update={"compaction": Compaction(at_fraction=0.5, keep_fraction=0.25)})
    rounds = [Reply(f"r{n}", tool_calls=(call("echo", LONG),)) for n in range(2)]
    made = stand(*rounds, Reply("the summary"), SAY, window=10_000)
    activation = await made.open(spec)
    assert (await made.ended(activation, "the one task")).reason == "done"
    [compacted] = await made.facts(Compacted)
    assert compacted.summary == "the summary"
    prompt = requests_of(made)[-1].messages
    assert "the summary" in prompt[1]["content"]
    assert "the one task" in prompt[1]["content"]
    asked = {c["id"] for m in prompt for c in m.get("tool_calls", [])}
    assert len(asked) == 1  # the newest round stays as it was
    assert {m["tool_call_id"] for m in prompt if m["role"] == "tool"} == asked
    kinds = [c.kind for c in await made.facts(ModelCalled)]
    assert kinds == ["main", "main", "compaction", "main"]
    assert len(activation.context.messages()) == 1 + 2 * 2 + 1


async def test_an_overflow_that_the_provider_reports_compacts_once(stand: MakeStand) -> None:
    overflow = Reply(fault=ContextOverflow("too long"))
    made = stand(Reply(tool_calls=(call("echo", LONG),)), overflow, Reply("summary"), SAY)
    assert (await made.ended(await made.open(), "go")).reason == "done"
    made = stand(
        Reply(tool_calls=(call("echo", LONG),)),
        overflow,
        Reply("summary"),
        overflow,
        journal=MemoryJournal(),
    )
    end = await made.ended(await made.open(), "go")
    assert (end.reason, end.code) == ("failed", "context_overflow")


async def test_a_failed_compaction_is_a_fact_and_the_turn_goes_on(stand: MakeStand) -> None:
    spec = SPEC.model_copy(update={"compaction": Compaction(at_fraction=0.1, keep_fraction=0.0)})
    broken = Reply(fault=ModelUnavailable("away"))
    made = stand(Reply(tool_calls=(call("echo", LONG),)), broken, SAY, window=8000)
    activation = await made.open(spec)
    assert (await made.ended(activation, "go")).reason == "done"
    assert [f.code for f in await made.facts(CompactionFailed)] == ["model_unavailable"]


async def test_a_failed_compaction_on_demand_ends_its_turn_as_failed(stand: MakeStand) -> None:
    made = stand(SAY, Reply(fault=ModelUnavailable("away")), SAY)
    activation = await made.open()
    await made.ended(activation, "go")
    end = await made.ended(activation, Compact())
    assert (end.reason, end.code) == ("failed", "model_unavailable")
    assert (await made.ended(activation, "still here")).reason == "done"


async def test_undo_of_a_compacted_turn_brings_the_earlier_view_back(stand: MakeStand) -> None:
    made = stand(Reply("one"), Reply("two"), Reply("summary"), Reply("three"))
    activation = await made.open()
    for text in ("a", "b"):
        await made.ended(activation, text)
    await made.ended(activation, Compact())
    await activation.submit(ALICE, Truncate(user_message_index=1))
    await made.ended(activation, "c")
    told = [m["content"] for m in requests_of(made)[-1].messages]
    assert told == ["You are a test.", "a", "one", "c"]


async def test_a_turn_ends_at_its_limit_of_model_calls(stand: MakeStand) -> None:
    spec = SPEC.model_copy(update={"limits": Limits(max_steps=2)})
    rounds = [Reply(tool_calls=(call("echo"),)) for _ in range(4)]
    made = stand(*rounds)
    activation = await made.open(spec)
    end = await made.ended(activation, "go")
    assert (end.reason, end.code) == ("limit", "max_steps")
    assert len(requests_of(made)) == 2
    assert (await made.ended(activation, "more")).reason == "limit"


async def test_call_ids_that_a_provider_repeats_stay_apart(stand: MakeStand) -> None:
    class SameIds(ScriptedModel):
        async def stream(self, request: Any) -> AsyncIterator[Any]:  # type: ignore[override]
            async for item in super().stream(request):
                if hasattr(item, "tool_calls"):
                    calls = [
                        c.model_copy(update={"tool_call_id": f"call_{n}"})
                        for n, c in enumerate(item.tool_calls)
                    ]
                    item = item._replace(tool_calls=tuple(calls))  # noqa: PLW2901
                yield item

    replies = [Reply(tool_calls=(call("echo", w),)) for w in ("one", "two")]
    made = stand(model=SameIds([*replies, SAY]))
    await made.ended(await made.open(), "go")
    ids = [f.tool_call_id for f in await made.facts(ToolFinished)]
    assert len(set(ids)) == 2
    assert [f.text for f in await made.facts(ToolFinished)] == ["one", "two"]


async def test_call_ids_that_one_answer_repeats_stay_apart(stand: MakeStand) -> None:
    class OneId(ScriptedModel):
        async def stream(self, request: Any) -> AsyncIterator[Any]:  # type: ignore[override]
            async for item in super().stream(request):
                if hasattr(item, "tool_calls"):
                    calls = [c.model_copy(update={"tool_call_id": "x"}) for c in item.tool_calls]
                    item = item._replace(tool_calls=tuple(calls))  # noqa: PLW2901
                yield item

    made = stand(model=OneId([Reply(tool_calls=(call("echo", "one"), call("echo", "two"))), SAY]))
    await made.ended(await made.open(), "go")
    assert sorted(f.text for f in await made.facts(ToolFinished)) == ["one", "two"]


async def test_another_user_gets_nothing(stand: MakeStand) -> None:
    activation = await stand(SAY).open()
    with pytest.raises(NotFound):
        await activation.submit(BOB, SendMessage(text="hi"))
    with pytest.raises(NotFound):
        await anext(activation.pages(BOB, activation.feed.now))


async def test_a_reader_that_ended_slows_no_other(stand: MakeStand) -> None:
    """Each message of a client is read by a stream of its own."""
    made = stand(*[SAY] * 20)
    activation = await made.open()
    for turn in range(1, 21):
        await activation.submit(ALICE, SendMessage(text="hi"))
        pages = [page async for page in activation.pages(ALICE, Cursor(), turn=turn)]
        assert pages[-1].end
    assert made.kit.reading.interval_s == 0


async def test_only_an_idle_session_is_passivated_for_others(stand: MakeStand) -> None:
    waiting = Wait()
    made = stand(Reply(tool_calls=(call("wait"),)), SAY, tools=[waiting])
    activation = await made.open()
    await activation.submit(ALICE, SendMessage(text="go"))
    assert not await activation.passivate("capacity")
    await asyncio.wait_for(waiting.began.wait(), SOON_S)
    waiting.go.set()
    await made.rested(activation)
    assert await activation.passivate("capacity")
    with pytest.raises(Moved):
        await activation.submit(ALICE, SendMessage(text="late"))
    assert (await made.wake()).context.rested_by is None


async def test_a_queue_of_turns_has_a_size(stand: MakeStand) -> None:
    waiting = Wait()
    limits = ActorsSettings(max_queued_turns=2)
    made = stand(Reply(tool_calls=(call("wait"),)), *[SAY] * 9, tools=[waiting], actors=limits)
    activation = await made.open()
    for _ in range(3):
        await activation.submit(ALICE, SendMessage(text="go"))
    with pytest.raises(QueueFull) as refused:
        await activation.submit(ALICE, SendMessage(text="one too many"))
    assert (refused.value.limit, refused.value.retry_after_s) == (2, 5)
    waiting.go.set()
    await made.rested(activation)
    assert [end.turn for end in await made.facts(TurnEnded)] == [1, 2, 3]


async def test_a_quota_counts_a_session_once_when_its_model_is_used(stand: MakeStand) -> None:
    limits = ActorsSettings(quotas={"dear": Quota(models="dear/*", per_day=1)})
    journal = MemoryJournal()
    made = stand(*[SAY] * 4, actors=limits, journal=journal)
    activation = await made.open()
    for model in ("dear/a", "cheap/b", "dear/c"):
        await activation.submit(ALICE, SwitchModel(model=model))
        assert (await made.ended(activation, "hi")).reason == "done"
    other = SessionOpened(session_id="o", user_id="alice", agent="t", model="dear/a", spec=SPEC)
    await journal.create(other)
    second = await Activation.open(made.kit, "o", lambda _: None)
    with pytest.raises(QuotaExceeded) as refused:
        await second.submit(ALICE, SendMessage(text="hi"))
    assert (refused.value.group, refused.value.limit) == ("dear", 1)
    assert 0 < refused.value.retry_after_s <= 86_400
    assert [r.fact.type for r in await journal.read("o")] == ["session_opened", "activated"]
    await second.submit(ALICE, SwitchModel(model="cheap/b"))
    await second.submit(ALICE, SendMessage(text="hi"))
    await second.end()


async def test_unpriced_calls_are_counted_as_such(stand: MakeStand) -> None:
    made = stand(Reply("a", cost_usd=None), Reply("b", cost_usd=0.25))
    activation = await made.open()
    await made.ended(activation, "one")
    await made.ended(activation, "two")
    row = await made.kit.journal.row("s")
    assert (row.spend_usd, row.n_unpriced) == (0.25, 1)


async def test_a_defect_of_ours_ends_the_turn_and_the_session_lives(stand: MakeStand) -> None:
    class Broken(ScriptedModel):
        async def card(self, model: str) -> Any:
            raise ZeroDivisionError

    made = stand(model=Broken([SAY]))
    activation = await made.open()
    end = await made.ended(activation, "go")
    assert (end.reason, end.code) == ("failed", "internal")
    assert "Zero" not in (end.detail or "")


async def test_a_caller_that_leaves_after_its_fact_has_begun_leaves_a_turn_that_runs(
    stand: MakeStand,
) -> None:
    journal = SlowJournal()
    made = stand(SAY, journal=journal)
    activation = await made.open()
    journal.gate.clear()
    asked = asyncio.create_task(activation.submit(ALICE, SendMessage(text="hi", message_id="k")))
    await asyncio.wait_for(journal.waiting.wait(), SOON_S)
    asked.cancel()
    journal.gate.set()
    await asyncio.gather(asked, return_exceptions=True)
    repeated = await activation.submit(ALICE, SendMessage(text="hi", message_id="k"))
    assert repeated.turn == 1
    await made.rested(activation)
    assert [end.reason for end in await made.facts(TurnEnded)] == ["done"]


async def test_an_interrupt_counts_though_its_caller_left(stand: MakeStand) -> None:
    journal, waiting = SlowJournal(), Wait()
    made = stand(Reply(tool_calls=(call("wait"),)), SAY, journal=journal, tools=[waiting])
    activation = await made.open()
    await activation.submit(ALICE, SendMessage(text="go"))
    await asyncio.wait_for(waiting.began.wait(), SOON_S)
    journal.gate.clear()
    asked = asyncio.create_task(activation.submit(ALICE, Interrupt()))
    await asyncio.wait_for(journal.waiting.wait(), SOON_S)
    asked.cancel()
    journal.gate.set()
    await made.rested(activation)
    assert [end.reason for end in await made.facts(TurnEnded)] == ["interrupted"]


async def test_a_long_turn_is_compacted_as_often_as_it_needs(stand: MakeStand) -> None:
    spec = SPEC.model_copy(update={"compaction": Compaction(at_fraction=0.5, keep_fraction=0.1)})
    big = Reply(tool_calls=(call("echo", LONG),))
    replies = [big, big, Reply("first"), big, big, Reply("second"), SAY]
    made = stand(*replies, window=9000)
    assert (await made.ended(await made.open(spec), "the task")).reason == "done"
    assert [c.summary for c in await made.facts(Compacted)] == ["first", "second"]


async def test_a_pending_call_is_never_compacted_away(stand: MakeStand) -> None:
    act = Reply(tool_calls=(call("effect", "RESULT-77"),))
    made = stand(act, Reply("about before"), SAY)
    activation = await made.open(ASKING)
    await made.ended(activation, "go")
    [waiting] = activation.context.pending
    await made.ended(activation, Seed(messages=({"role": "user", "content": "old"},)))
    assert activation.context.cut(keep_tokens=0) == 3  # the message before the pending call
    approve = Decision(tool_call_id=waiting, decision="approve")
    await made.ended(activation, Decide(decisions=(approve,)))
    told = [m["content"] for m in requests_of(made)[-1].messages if m["role"] == "tool"]
    assert told == ["RESULT-77"]


async def test_arguments_that_are_nested_too_deep_are_an_error_and_no_poison(
    stand: MakeStand,
) -> None:
    class Deep(ScriptedModel):
        async def stream(self, request: Any) -> AsyncIterator[Any]:  # type: ignore[override]
            async for item in super().stream(request):
                if getattr(item, "tool_calls", ()):
                    deep = item.tool_calls[0].model_copy(update={"arguments": "[" * 100_000})
                    item = item._replace(tool_calls=(deep,))  # noqa: PLW2901
                yield item

    made = stand(model=Deep([Reply(tool_calls=(call("echo"),)), SAY, SAY]))
    activation = await made.open()
    assert (await made.ended(activation, "go")).reason == "done"
    assert [f.outcome for f in await made.facts(ToolFinished)] == ["error"]
    assert (await made.ended(await made.wake(), "again")).reason == "done"


async def test_a_message_that_is_interrupted_at_once_still_denies_what_waited(
    stand: MakeStand,
) -> None:
    journal = MemoryJournal()
    made = stand(Reply(tool_calls=(call("effect"),)), SAY, journal=journal)
    activation = await made.open(ASKING)
    await made.ended(activation, "go")
    await activation.end()
    facts = [UserMessage(turn=2, text="no, this"), InterruptRequested(turn=2)]
    await journal.append("s", activation.context.epoch, facts)
    woken = await made.wake()
    await made.rested(woken)
    assert woken.context.pending == {}
    assert (await journal.row("s")).pending == ()
    assert [f.outcome for f in await made.facts(ToolFinished)] == ["denied"]


async def test_the_time_of_a_turn_is_its_own(stand: MakeStand) -> None:
    waiting, clock = Wait(), [0.0]
    broken = Reply(fault=ModelUnavailable("away"))
    made = stand(
        Reply(tool_calls=(call("wait"),)), broken, SAY, tools=[waiting], now_s=lambda: clock[0]
    )
    activation = await made.open(SPEC.model_copy(update={"limits": Limits(max_turn_s=100)}))
    for text in ("one", "two"):
        await activation.submit(ALICE, SendMessage(text=text))
    await asyncio.wait_for(waiting.began.wait(), SOON_S)
    clock[0] = 99.0
    waiting.go.set()
    while not await made.facts(TurnEnded):
        await activation.feed.changed(SOON_S)
    clock[0] = 101.0
    await made.rested(activation)
    assert [end.reason for end in await made.facts(TurnEnded)] == ["failed", "done"]


async def test_a_turn_that_takes_too_long_ends_at_its_limit(stand: MakeStand) -> None:
    waiting, clock = Wait(), [0.0]
    made = stand(Reply(tool_calls=(call("wait"),)), SAY, tools=[waiting], now_s=lambda: clock[0])
    activation = await made.open(SPEC.model_copy(update={"limits": Limits(max_turn_s=100)}))
    await activation.submit(ALICE, SendMessage(text="go"))
    await asyncio.wait_for(waiting.began.wait(), SOON_S)
    clock[0] = 101.0
    waiting.go.set()
    await made.rested(activation)
    [end] = await made.facts(TurnEnded)
    assert (end.reason, end.code) == ("limit", "max_turn_s")


async def test_a_sandbox_whose_fact_is_refused_is_closed(stand: MakeStand) -> None:
    class Uses(Echo):
        name = "uses"

        async def run(self, arguments: Any, scope: Any) -> Any:
            await scope.sandbox()
            return await super().run(arguments, scope)

    opener = FakeOpener()
    made = stand(Reply(tool_calls=(call("uses"),)), SAY, tools=[Uses()], open_sandbox=opener)
    activation = await made.open()
    opener.gate.clear()
    await activation.submit(ALICE, SendMessage(text="go"))
    await asyncio.wait_for(opener.asked.wait(), SOON_S)
    await made.kit.journal.fence("s")
    opener.gate.set()
    await asyncio.wait_for(made.lost.wait(), SOON_S)
    await activation.end()
    assert [sandbox.closed for sandbox in opener.opened] == [True]


async def test_an_end_does_not_wait_for_ever(stand: MakeStand) -> None:
    class Stubborn(Wait):
        name = "stubborn"

        async def run(self, arguments: Any, scope: Any) -> Any:
            self.began.set()
            while not self.go.is_set():
                try:
                    await self.go.wait()
                except asyncio.CancelledError:
                    continue
            return await Echo().run(arguments, scope)

    tool = Stubborn()
    limits = ActorsSettings(close_wait_s=0.05)
    made = stand(Reply(tool_calls=(call("stubborn"),)), SAY, tools=[tool], actors=limits)
    activation = await made.open()
    await activation.submit(ALICE, SendMessage(text="go"))
    await asyncio.wait_for(tool.began.wait(), SOON_S)
    with pytest.raises(Unavailable):
        await activation.end()
    tool.go.set()


async def test_an_interrupt_does_not_wait_for_the_facts_about_a_model(stand: MakeStand) -> None:
    asked = asyncio.Event()

    class SlowCard(ScriptedModel):
        async def card(self, model: str) -> Any:
            asked.set()
            await asyncio.Event().wait()

    made = stand(model=SlowCard([SAY]))
    activation = await made.open()
    await activation.submit(ALICE, SendMessage(text="go"))
    await asyncio.wait_for(asked.wait(), SOON_S)
    await activation.submit(ALICE, Interrupt())
    await made.rested(activation)
    assert [end.reason for end in await made.facts(TurnEnded)] == ["interrupted"]


async def test_a_reader_of_a_queued_turn_hears_that_the_stream_lives(stand: MakeStand) -> None:
    waiting, clock = Wait(), [0.0]
    made = stand(
        Reply(tool_calls=(call("wait"),)),
        *[SAY] * 2,
        tools=[waiting],
        actors=ActorsSettings(page_wait_s=10),
        now_s=lambda: clock[0],
    )
    activation = await made.open()
    for text in ("one", "two"):
        await activation.submit(ALICE, SendMessage(text=text))
    await asyncio.wait_for(waiting.began.wait(), SOON_S)
    pages = activation.pages(ALICE, Cursor(), turn=2)
    first = await anext(pages)
    assert [frame.event for frame in first.frames] == ["user_message"]
    next_page = asyncio.create_task(anext(pages))
    for n in range(3):  # another turn's text wakes the reader, and is not for it
        await asyncio.sleep(0)
        clock[0] += 4.0
        activation.show(TextDelta(1, "p", n, "x"))
    assert (await asyncio.wait_for(next_page, SOON_S)).frames == ()
    await pages.aclose()
    waiting.go.set()
    await made.rested(activation)


async def test_commands_that_wait_for_the_journal_have_a_limit(stand: MakeStand) -> None:
    journal = SlowJournal()
    made = stand(*[SAY] * 9, journal=journal)
    activation = await made.open()
    journal.gate.clear()
    asking = [
        asyncio.create_task(activation.submit(ALICE, SwitchModel(model=f"scripted/{n}")))
        for n in range(MAX_COMMANDS)
    ]
    await asyncio.wait_for(journal.waiting.wait(), SOON_S)
    asking[0].cancel()  # its command is on the way all the same, and counts
    with pytest.raises(QueueFull):
        await activation.submit(ALICE, SwitchModel(model="scripted/late"))
    journal.gate.set()
    await asyncio.gather(*asking, return_exceptions=True)
    assert len(await made.facts(ModelSwitched)) == MAX_COMMANDS
    await activation.submit(ALICE, SwitchModel(model="scripted/x"))


async def test_one_call_for_pages_ends_after_its_size_and_the_next_goes_on(
    stand: MakeStand,
) -> None:
    text = "x" * 90_000
    made = stand(*[SAY] * 20)
    activation = await made.open()
    for _ in range(20):
        await made.ended(activation, text)
    heard: list[int] = []
    cursor, n_calls = Cursor(), 0
    while cursor.seq < activation.context.head:
        n_calls += 1
        n_chars = 0
        async with asyncio.timeout(SOON_S):
            async for page in activation.pages(ALICE, cursor, follow=False):
                n_chars += sum(len(frame.data) for frame in page.frames)
                heard += [json.loads(frame.data)["seq"] for frame in page.frames]
                cursor = page.cursor
        assert n_chars < MAX_STRETCH_CHARS + MAX_PAGE_CHARS + 2 * len(text)
    assert n_calls >= 2
    assert heard == list(range(1, activation.context.head + 1))


class CountingJournal(SlowJournal):
    """Keeps what each append wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.appends: list[list[str]] = []

    async def append(self, *args: Any) -> Any:
        records = await super().append(*args)
        self.appends.append([record.fact.type for record in records])
        return records


async def test_facts_that_are_ready_together_are_one_transaction(stand: MakeStand) -> None:
    journal = CountingJournal()
    made = stand(Reply("a", tool_calls=(call("echo"), call("burst"))), SAY, journal=journal)
    activation = await made.open()
    journal.appends.clear()
    assert (await made.ended(activation, "go")).reason == "done"
    first, second, *results, last = journal.appends
    assert first == ["user_message"]
    assert second == ["model_called", "assistant_message", "tool_started", "tool_started"]
    assert [kind for each in results for kind in each] == ["tool_finished"] * 2
    assert last == ["model_called", "assistant_message", "turn_ended"]


async def test_an_answer_that_asks_a_person_ends_its_turn_in_one_transaction(
    stand: MakeStand,
) -> None:
    journal = CountingJournal()
    made = stand(Reply(tool_calls=(call("effect"),)), journal=journal)
    assert (await made.ended(await made.open(ASKING), "go")).reason == "approval"
    asked = ["model_called", "assistant_message", "approval_requested", "turn_ended"]
    assert journal.appends[-1] == asked


async def waiting_for(activation: Activation, n_commits: int) -> None:
    async def are_there() -> bool:
        return len(activation.waiting) == n_commits

    await eventually(are_there, SOON_S)


async def test_commits_that_wait_go_together_and_only_what_is_refused_is_refused(
    stand: MakeStand,
) -> None:
    journal = CountingJournal()
    made = stand(SAY, journal=journal)
    activation = await made.open()
    journal.appends.clear()
    called = ModelCalled(model="m", usage=None, cost_usd=None, latency_ms=0)
    unspeakable = called.model_copy(update={"model": "\ud800"})  # no JSON holds it
    journal.gate.clear()
    first = asyncio.create_task(activation.commit(called))
    await journal.waiting.wait()
    facts = [called, called, unspeakable, called]
    waiting = [asyncio.create_task(activation.commit(fact)) for fact in facts]
    command = asyncio.create_task(activation.submit(ALICE, SwitchModel(model="scripted/y")))
    waiting.append(asyncio.create_task(activation.commit(called)))
    await waiting_for(activation, 6)
    journal.gate.set()
    outcomes = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert [isinstance(each, ValueError) for each in outcomes] == [False] * 3 + [True] + [False] * 2
    await command
    written = [kind for each in journal.appends for kind in each]
    assert written == ["model_called"] * 4 + ["model_switched", "model_called"]
    assert journal.appends[-1] == ["model_switched", "model_called"]


async def test_commits_that_wait_behind_one_are_one(stand: MakeStand) -> None:
    journal = CountingJournal()
    made = stand(SAY, journal=journal)
    activation = await made.open()
    journal.appends.clear()
    called = ModelCalled(model="m", usage=None, cost_usd=None, latency_ms=0)
    journal.gate.clear()
    first = asyncio.create_task(activation.commit(called))
    await journal.waiting.wait()
    waiting = [asyncio.create_task(activation.commit(called, called)) for _ in range(3)]
    await waiting_for(activation, 3)
    journal.gate.set()
    await asyncio.gather(first, *waiting)
    assert [len(each) for each in journal.appends] == [1, 6]
    assert activation.context.n_calls == 7


async def test_an_answer_is_streamed_while_somebody_may_watch(stand: MakeStand) -> None:
    clock = [0.0]
    rounds = [Wait() for _ in range(4)]
    for number, waiting in enumerate(rounds):
        waiting.name = f"wait{number}"  # type: ignore[misc]
    replies = [Reply(tool_calls=(call(one.name),)) for one in rounds]
    made = stand(*replies, SAY, tools=rounds, now_s=lambda: clock[0])
    activation = await made.open()

    async def passed(waiting: Wait, time_s: float) -> None:
        await asyncio.wait_for(waiting.began.wait(), SOON_S)
        clock[0] += time_s
        waiting.go.set()

    await activation.submit(ALICE, SendMessage(text="go"))
    await passed(rounds[0], WATCHED_S - 1)
    await passed(rounds[1], 1)  # now the command is too long ago
    await asyncio.wait_for(rounds[2].began.wait(), SOON_S)
    pages = activation.pages(ALICE, Cursor(0))
    await anext(pages)
    await passed(rounds[2], 2 * WATCHED_S)  # a reader is there
    await asyncio.wait_for(rounds[3].began.wait(), SOON_S)
    await pages.aclose()
    await passed(rounds[3], WATCHED_S)  # and has left
    await made.rested(activation)
    assert [r.stream for r in requests_of(made)] == [True, True, False, True, False]


async def test_a_command_of_long_ago_is_answered_as_it_was(stand: MakeStand) -> None:
    made = stand(SAY)
    activation = await made.open()
    await made.ended(activation, "hello")
    undo = Undo(message_id="undo")
    first = [
        await activation.submit(ALICE, undo),
        await activation.submit(ALICE, SwitchModel(model="a", message_id="switch")),
    ]
    for n in range(MAX_ANSWERS):
        await activation.submit(ALICE, SwitchModel(model="b", message_id=f"{n}"))
    head = activation.context.head
    for _ in range(2):
        again = [
            await activation.submit(ALICE, undo),  # which could not be now
            await activation.submit(ALICE, SwitchModel(model="a", message_id="switch")),
        ]
        assert again == first
        with pytest.raises(Conflict, match="another command"):
            await activation.submit(ALICE, Undo(message_id="switch"))
        with pytest.raises(Conflict, match="no user message"):
            await activation.submit(ALICE, Undo(message_id="new"))
        assert activation.context.head == head
        assert await activation.passivate("idle")
        activation = await made.wake()
        head = activation.context.head
    assert activation.context.model == "b"


async def test_a_compacted_session_wakes_from_its_checkpoint_and_can_go_behind_it(
    stand: MakeStand,
) -> None:
    made = stand(SAY, SAY, Reply("a summary"), SAY, SAY)
    activation = await made.open()
    await made.ended(activation, "first")
    await made.ended(activation, "second")
    assert (await made.ended(activation, Compact())).reason == "done"
    await made.ended(activation, "third")
    assert await activation.passivate("idle")
    woken = await made.wake()
    assert woken.context.faded
    assert woken.context.prompt() == activation.context.prompt()
    assert woken.context.user_turns == activation.context.user_turns
    await woken.submit(ALICE, Truncate(user_message_index=1))
    assert [m["content"] for m in woken.context.prompt()[1:]] == ["first", "ok"]
    assert (await made.ended(woken, "fourth")).reason == "done"
