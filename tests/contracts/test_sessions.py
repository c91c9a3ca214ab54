"""The contract of `actors.protocol.Sessions`, over one process and over Ray.

The tests go through the floor's door only, and assert on what a client can see.
"""

import asyncio
import json
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest

from actors.protocol import (
    AtCapacity,
    Close,
    Compact,
    Conflict,
    Decide,
    Interrupt,
    Invalid,
    NotFound,
    Open,
    Principal,
    QueueFull,
    Seed,
    SendMessage,
    Sessions,
    SwitchModel,
    TooLarge,
    Truncate,
    Undo,
)
from agent.events import Cursor, Decision
from tests.conftest import SMALL
from tests.support.house import ALICE, BOB, SOON_S, follow, puppet, turn_of
from tests.support.processes import eventually

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
SAY = puppet({"say": "Hello there.", "chunks": 3})


async def opened(sessions: Sessions, who: Principal = ALICE, **fields: Any) -> str:
    return (await sessions.open(who, Open(**({"agent": "tester"} | fields)))).session_id


async def said(sessions: Sessions, session_id: str, text: str, who: Principal = ALICE) -> int:
    return (await sessions.submit(who, session_id, SendMessage(text=text))).turn


async def ended(sessions: Sessions, session_id: str, text: str) -> dict[str, Any]:
    return await turn_of(sessions, ALICE, session_id, await said(sessions, session_id, text))


async def test_a_turn_runs_from_the_message_to_its_end(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    accepted = await sessions.submit(ALICE, session_id, SendMessage(text=SAY))
    assert accepted.turn == 1
    reader = await follow(sessions, ALICE, session_id, turn=1)
    assert reader.types() == ["user_message", "model_called", "assistant_message", "turn_ended"]
    [message] = reader.of("assistant_message")
    assert message["text"] == "Hello there."
    assert reader.of("turn_ended")[0]["reason"] == "done"
    assert [fact["seq"] for fact in reader.facts] == sorted(fact["seq"] for fact in reader.facts)
    assert await sessions.messages(ALICE, session_id) == [
        {"role": "user", "content": SAY},
        {"role": "assistant", "content": "Hello there."},
    ]


def sh(command: str) -> dict[str, Any]:
    return {"call": "bash", "args": {"command": command}}


async def test_parallel_tools_settle_one_by_one_and_a_failing_one_is_only_its_own_error(
    sessions: Sessions,
) -> None:
    session_id = await opened(sessions)
    calls = [sh("echo a"), {"call": "read", "args": {"path": "no-such-file"}}]
    turn = await said(sessions, session_id, puppet({"calls": calls}, {"say": "ok"}))
    reader = await follow(sessions, ALICE, session_id, turn=turn)
    outcomes = {fact["tool"]: fact["outcome"] for fact in reader.of("tool_finished")}
    assert outcomes == {"bash": "ok", "read": "error"}
    assert reader.of("turn_ended")[0]["reason"] == "done"
    roles = [message["role"] for message in await sessions.messages(ALICE, session_id)]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"]


async def test_messages_sent_while_a_turn_runs_are_turns_of_their_own_in_order(
    sessions: Sessions,
) -> None:
    session_id = await opened(sessions)
    slow = puppet({"say": "slow answer", "chunks": 6, "delay_s": 0.05})
    turns = [await said(sessions, session_id, text) for text in (slow, SAY, SAY)]
    assert turns == [1, 2, 3]
    for turn in turns:
        assert (await turn_of(sessions, ALICE, session_id, turn))["reason"] == "done"
    roles = [message["role"] for message in await sessions.messages(ALICE, session_id)]
    assert roles == ["user", "assistant"] * 3


async def test_repeating_a_message_id_returns_the_first_answer(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    command = SendMessage(text=SAY, message_id="m-1")
    first = await sessions.submit(ALICE, session_id, command)
    again = await asyncio.gather(*(sessions.submit(ALICE, session_id, command) for _ in range(5)))
    assert set(again) == {first}
    await turn_of(sessions, ALICE, session_id, first.turn)
    assert len(await sessions.messages(ALICE, session_id)) == 2
    with pytest.raises(Conflict):
        await sessions.submit(ALICE, session_id, Compact(message_id="m-1"))


async def test_opening_twice_with_a_key_is_one_session(sessions: Sessions) -> None:
    command = Open(agent="tester", message_id="open-1")
    views = await asyncio.gather(*(sessions.open(ALICE, command) for _ in range(3)))
    assert len({view.session_id for view in views}) == 1
    other = await sessions.open(BOB, command)
    assert other.session_id != views[0].session_id
    assert (await sessions.capacity(ALICE)).user.live == 1


async def test_a_foreign_session_does_not_exist(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    for attempt in (
        sessions.view(BOB, session_id),
        sessions.messages(BOB, session_id),
        sessions.trajectory(BOB, session_id),
        sessions.submit(BOB, session_id, SendMessage(text="hi")),
        sessions.submit(BOB, session_id, Close()),
        sessions.delete(BOB, session_id),
        follow(sessions, BOB, session_id),
        sessions.view(ALICE, "nobody"),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await sessions.view(ALICE, session_id)).status == "idle"
    assert (await sessions.owned(BOB, limit=10, after=None)).data == ()


async def test_interrupt_reaches_the_model_call_and_keeps_what_was_shown(
    sessions: Sessions,
) -> None:
    session_id = await opened(sessions)
    turn = await said(
        sessions, session_id, puppet({"say": "a" * 400, "chunks": 400, "delay_s": 0.05})
    )
    await follow(sessions, ALICE, session_id, turn=turn, until="text_delta")
    accepted = await sessions.submit(ALICE, session_id, Interrupt())
    assert accepted.turn == turn
    assert (await turn_of(sessions, ALICE, session_id, turn))["reason"] == "interrupted"
    last = (await sessions.messages(ALICE, session_id))[-1]
    assert last["role"] == "assistant"
    assert 0 < len(last["content"]) < 400
    with pytest.raises(Conflict):
        await sessions.submit(ALICE, session_id, Interrupt())
    assert (await ended(sessions, session_id, SAY))["reason"] == "done"


async def test_interrupt_reaches_running_tools_and_keeps_finished_results(
    sessions: Sessions,
) -> None:
    session_id = await opened(sessions)
    plan = {"call": "plan", "args": {"items": [{"id": "1", "content": "wait"}]}}
    calls = [plan, sh("sleep 60")]
    turn = await said(sessions, session_id, puppet({"calls": calls}, {"say": "ok"}))
    await follow(sessions, ALICE, session_id, turn=turn, until="tool_finished")
    await sessions.submit(ALICE, session_id, Interrupt())
    reader = await follow(sessions, ALICE, session_id, turn=turn)
    assert {f["tool"]: f["outcome"] for f in reader.of("tool_finished")} == {
        "plan": "ok",
        "bash": "cancelled",
    }
    assert reader.of("turn_ended")[0]["reason"] == "interrupted"


class TestApprovals:
    ACT = puppet(
        {"calls": [sh("echo free"), sh("echo act one"), sh("echo act two")]}, {"say": "all done"}
    )

    async def asked(self, sessions: Sessions) -> tuple[str, list[str]]:
        session_id = await opened(sessions, agent="asking")
        assert (await ended(sessions, session_id, self.ACT))["reason"] == "approval"
        view = await sessions.view(ALICE, session_id)
        assert view.status == "waiting_approval"
        assert view.pending_approval is not None
        assert [ask.arguments for ask in view.pending_approval] == [
            {"command": "echo act one"},
            {"command": "echo act two"},
        ]
        return session_id, [ask.tool_call_id for ask in view.pending_approval]

    async def results(self, sessions: Sessions, session_id: str) -> list[tuple[str, str]]:
        """Outcome and first line of every settled call."""
        reader = await follow(sessions, ALICE, session_id, live=False)
        return [(f["outcome"], f["text"].splitlines()[0]) for f in reader.of("tool_finished")]

    async def test_what_is_approved_or_edited_runs_and_the_turn_goes_on(
        self, sessions: Sessions
    ) -> None:
        session_id, [one, two] = await self.asked(sessions)
        accepted = await sessions.submit(
            ALICE,
            session_id,
            Decide(
                decisions=(
                    Decision(tool_call_id=one, decision="approve"),
                    Decision(
                        tool_call_id=two, decision="edit", arguments='{"command": "echo mine"}'
                    ),
                )
            ),
        )
        assert (await turn_of(sessions, ALICE, session_id, accepted.turn))["reason"] == "done"
        results = await self.results(sessions, session_id)
        assert sorted(results) == [("ok", "act one"), ("ok", "free"), ("ok", "mine")]
        reader = await follow(sessions, ALICE, session_id, live=False)
        proposed = [
            json.loads(call["arguments"])["command"]
            for message in reader.of("assistant_message")
            for call in message["tool_calls"]
        ]
        assert proposed == ["echo free", "echo act one", "echo act two"]
        ran = [json.loads(fact["arguments"])["command"] for fact in reader.of("tool_started")]
        assert sorted(ran) == ["echo act one", "echo free", "echo mine"]
        assert (await sessions.view(ALICE, session_id)).pending_approval is None

    async def test_a_call_without_a_decision_stays_pending(self, sessions: Sessions) -> None:
        session_id, [one, two] = await self.asked(sessions)
        reject = Decision(tool_call_id=one, decision="reject", feedback="not this")
        accepted = await sessions.submit(ALICE, session_id, Decide(decisions=(reject,)))
        end = await turn_of(sessions, ALICE, session_id, accepted.turn)
        assert end["reason"] == "approval"
        view = await sessions.view(ALICE, session_id)
        assert view.pending_approval is not None
        assert [ask.tool_call_id for ask in view.pending_approval] == [two]
        [denied] = [r for r in await self.results(sessions, session_id) if r[0] == "denied"]
        assert "not this" in denied[1]
        with pytest.raises(Conflict):
            await sessions.submit(ALICE, session_id, Decide(decisions=(reject,)))

    async def test_new_text_denies_what_waits_first(self, sessions: Sessions) -> None:
        session_id, _ = await self.asked(sessions)
        assert (await ended(sessions, session_id, SAY))["reason"] == "done"
        outcomes = [outcome for outcome, _ in await self.results(sessions, session_id)]
        assert sorted(outcomes) == ["denied", "denied", "ok"]
        assert (await sessions.view(ALICE, session_id)).pending_approval is None

    async def test_bad_decisions_change_nothing(self, sessions: Sessions) -> None:
        session_id, [one, two] = await self.asked(sessions)
        for decisions, fault in (
            ([Decision(tool_call_id="other", decision="approve")], Conflict),
            ([Decision(tool_call_id=one, decision="approve")] * 2, Invalid),
            ([Decision(tool_call_id=one, decision="edit")], Invalid),
            ([Decision(tool_call_id=one, decision="edit", arguments="[1]")], Invalid),
        ):
            with pytest.raises(fault):
                await sessions.submit(ALICE, session_id, Decide(decisions=tuple(decisions)))
        with pytest.raises(Conflict):
            await sessions.submit(ALICE, session_id, Interrupt())
        view = await sessions.view(ALICE, session_id)
        assert view.pending_approval is not None
        assert [ask.tool_call_id for ask in view.pending_approval] == [one, two]

    async def test_undo_takes_the_pending_calls_along(self, sessions: Sessions) -> None:
        session_id, _ = await self.asked(sessions)
        await sessions.submit(ALICE, session_id, Undo())
        view = await sessions.view(ALICE, session_id)
        assert (view.status, view.pending_approval, view.n_messages) == ("idle", None, 0)
        assert (await ended(sessions, session_id, SAY))["reason"] == "done"


async def test_undo_and_truncate_count_only_what_the_user_wrote(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    with pytest.raises(Conflict):
        await sessions.submit(ALICE, session_id, Undo())
    for _ in range(3):
        await ended(sessions, session_id, SAY)
    await sessions.submit(ALICE, session_id, Undo())
    assert len(await sessions.messages(ALICE, session_id)) == 4
    for index in (2, -1):
        with pytest.raises(Invalid):
            await sessions.submit(ALICE, session_id, Truncate(user_message_index=index))
    await sessions.submit(ALICE, session_id, Truncate(user_message_index=0))
    assert await sessions.messages(ALICE, session_id) == []
    assert (await sessions.view(ALICE, session_id)).n_messages == 0
    trajectory = await sessions.trajectory(ALICE, session_id)
    assert sum(message["role"] == "user" for message in trajectory["messages"]) == 3


async def test_a_running_turn_is_not_undone(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    await said(sessions, session_id, puppet({"hang": True}))
    for command in (Undo(), Truncate(user_message_index=0)):
        with pytest.raises(Conflict):
            await sessions.submit(ALICE, session_id, command)
    await sessions.submit(ALICE, session_id, Interrupt())


async def test_compaction_on_demand_leaves_the_messages_and_shortens_the_prompt(
    sessions: Sessions,
) -> None:
    session_id = await opened(sessions)
    with pytest.raises(Conflict):
        await sessions.submit(ALICE, session_id, Compact())
    await ended(sessions, session_id, SAY)
    accepted = await sessions.submit(ALICE, session_id, Compact())
    assert (await turn_of(sessions, ALICE, session_id, accepted.turn))["reason"] == "done"
    assert len(await sessions.messages(ALICE, session_id)) == 2
    reader = await follow(sessions, ALICE, session_id, live=False)
    assert len(reader.of("compacted")) == 1
    assert [f["kind"] for f in reader.of("model_called")] == ["main", "compaction"]


async def test_seeds_become_one_message_and_malformed_entries_are_counted(
    sessions: Sessions,
) -> None:
    good = {"role": "user", "content": "We chose blue."}
    session_id = await opened(sessions, seed_messages=(good, {"role": "king"}, 7))
    reader = await follow(sessions, ALICE, session_id, turn=1)
    [seeded] = reader.of("seeded")
    assert (seeded["n_messages"], seeded["n_dropped"]) == (1, 2)
    accepted = await sessions.submit(ALICE, session_id, Seed(messages=(good, good)))
    assert accepted.n_messages == 2
    await turn_of(sessions, ALICE, session_id, accepted.turn)
    roles = [message["role"] for message in await sessions.messages(ALICE, session_id)]
    assert roles == ["user", "user"]
    with pytest.raises(Conflict):
        await sessions.submit(ALICE, session_id, Undo())
    with pytest.raises(Invalid):
        await sessions.submit(ALICE, session_id, Seed(messages=({"role": "king"},)))


async def test_a_model_switch_holds_from_the_next_call(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    await sessions.submit(ALICE, session_id, SwitchModel(model="scripted/echo"))
    await ended(sessions, session_id, "repeat me")
    messages = await sessions.messages(ALICE, session_id)
    assert messages[-1]["content"] == "repeat me"
    assert (await sessions.view(ALICE, session_id)).model == "scripted/echo"


async def test_a_failing_model_ends_the_turn_with_a_reason_and_the_session_lives(
    sessions: Sessions,
) -> None:
    session_id = await opened(sessions)
    end = await ended(sessions, session_id, puppet({"fault": "model_refused"}))
    assert (end["reason"], end["code"]) == ("failed", "model_refused")
    assert end["detail"]
    assert (await ended(sessions, session_id, SAY))["reason"] == "done"


async def test_text_is_checked(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    with pytest.raises(TooLarge):
        await said(sessions, session_id, "x" * 100_001)
    with pytest.raises(Invalid):
        await said(sessions, session_id, "  \n")
    with pytest.raises(Invalid):
        await opened(sessions, agent="no-such-agent")
    assert await sessions.messages(ALICE, session_id) == []


async def test_close_comes_to_rest_frees_the_slot_and_is_for_ever(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    await said(sessions, session_id, puppet({"hang": True}))
    await said(sessions, session_id, SAY)
    close = Close(message_id="bye")
    first = await sessions.submit(ALICE, session_id, close)
    reader = await follow(sessions, ALICE, session_id)
    assert [end["reason"] for end in reader.of("turn_ended")] == ["interrupted"] * 2
    assert reader.types()[-1] == "session_closed"
    assert (await sessions.view(ALICE, session_id)).status == "closed"
    assert (await sessions.capacity(ALICE)).live == 0
    assert (await sessions.submit(ALICE, session_id, close)).turn == first.turn
    with pytest.raises(Conflict):
        await said(sessions, session_id, SAY)
    with pytest.raises(Conflict):
        await sessions.submit(ALICE, session_id, Close())


async def test_delete_ends_everything_and_the_readers(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    turn = await said(sessions, session_id, puppet({"hang": True}))
    reading = asyncio.create_task(follow(sessions, ALICE, session_id))
    await follow(sessions, ALICE, session_id, turn=turn, until="user_message")
    await sessions.delete(ALICE, session_id)
    await reading
    with pytest.raises(NotFound):
        await sessions.view(ALICE, session_id)
    with pytest.raises(NotFound):
        await sessions.delete(ALICE, session_id)
    assert (await sessions.capacity(ALICE)).live == 0


async def test_the_list_is_the_callers_newest_first(sessions: Sessions) -> None:
    mine = [await opened(sessions) for _ in range(3)]
    await opened(sessions, BOB)
    first = await sessions.owned(ALICE, limit=2, after=None)
    rest = await sessions.owned(ALICE, limit=2, after=first.next)
    assert [view.session_id for view in (*first.data, *rest.data)] == mine[::-1]
    assert rest.next is None
    with pytest.raises(Invalid):
        await sessions.owned(ALICE, limit=2, after="garbage")


async def test_an_idle_session_gives_way_and_wakes_again_with_all_it_knew(
    sessions: Sessions,
) -> None:
    """Limits of the fixture: 3 sessions a user, 5 in all."""
    ids = [await opened(sessions) for _ in range(3)]
    await ended(sessions, ids[0], SAY)
    newest = await opened(sessions)
    states = {
        v.session_id: v.status for v in (await sessions.owned(ALICE, limit=9, after=None)).data
    }
    assert sorted(states.values()) == ["idle", "idle", "idle", "passive"]
    assert states[newest] == "idle"
    assert states[ids[1]] == "passive"  # the longest idle one
    assert (await ended(sessions, ids[1], SAY))["reason"] == "done"
    assert (await sessions.capacity(ALICE)).user.live == 3


async def test_a_running_turn_never_gives_way(sessions: Sessions) -> None:
    ids = [await opened(sessions) for _ in range(3)]
    for session_id in ids:
        await said(sessions, session_id, puppet({"hang": True}))
    with pytest.raises(AtCapacity) as refused:
        await opened(sessions)
    assert (refused.value.scope, refused.value.live, refused.value.limit) == ("per_user", 3, 3)
    assert refused.value.retry_after_s > 0
    others = [Principal(user) for user in ("carol", "dave")]
    for who in others:
        await said(sessions, await opened(sessions, who), puppet({"hang": True}), who)
    with pytest.raises(AtCapacity) as refused:
        await opened(sessions, Principal("erin"))
    assert (refused.value.scope, refused.value.live, refused.value.limit) == ("global", 5, 5)
    assert {(await sessions.view(ALICE, session_id)).status for session_id in ids} == {"running"}


async def test_a_burst_of_opens_ends_exactly_at_the_limit(sessions: Sessions) -> None:
    answers = await asyncio.gather(
        *(opened(sessions) for _ in range(8)),
        *(opened(sessions, BOB) for _ in range(8)),
        return_exceptions=True,
    )
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert [fault for fault in refused if not isinstance(fault, AtCapacity)] == []
    capacity = await sessions.capacity(ALICE)
    theirs = (await sessions.capacity(BOB)).user.live
    assert sorted([capacity.user.live, theirs]) == [2, 3]  # who comes first is chance
    assert capacity.live == 5
    assert (capacity.limit, capacity.user.limit) == (5, 3)


async def test_a_turn_goes_on_with_no_reader_and_a_late_one_sees_all_of_it(
    sessions: Sessions,
) -> None:
    session_id = await opened(sessions)
    turn = await said(
        sessions, session_id, puppet({"say": "x" * 60, "chunks": 20, "delay_s": 0.03})
    )
    first = await follow(sessions, ALICE, session_id, turn=turn, until="text_delta")
    assert (await turn_of(sessions, ALICE, session_id, turn))["reason"] == "done"
    resumed = await follow(sessions, ALICE, session_id, turn=turn, reader=first)
    assert resumed.types() == ["user_message", "model_called", "assistant_message", "turn_ended"]
    [message] = resumed.of("assistant_message")
    assert message["text"] == "x" * 60
    assert resumed.parts[message["part_id"]] == "x" * 60
    assert not resumed.gaps


async def test_a_reader_of_a_passive_session_waits_and_wakes_nobody(sessions: Sessions) -> None:
    ids = [await opened(sessions) for _ in range(4)]
    assert (await sessions.view(ALICE, ids[0])).status == "passive"
    reading = asyncio.create_task(follow(sessions, ALICE, ids[0], until="turn_ended"))
    await follow(sessions, ALICE, ids[0], live=False)
    assert (await sessions.view(ALICE, ids[0])).status == "passive"
    await said(sessions, ids[0], SAY)
    reader = await reading
    assert reader.types()[-1] == "turn_ended"
    assert [f["seq"] for f in reader.facts] == list(range(1, len(reader.facts) + 1))


async def test_a_caller_that_leaves_during_open_leaks_nothing(sessions: Sessions) -> None:
    for n in range(6):
        task = asyncio.create_task(sessions.open(ALICE, Open(agent="tester", message_id=f"k{n}")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    for n in range(6):
        session_id = (
            await sessions.open(ALICE, Open(agent="tester", message_id=f"k{n}"))
        ).session_id
        await sessions.delete(ALICE, session_id)
    capacity = await sessions.capacity(ALICE)
    assert (capacity.live, capacity.user.live) == (0, 0)


async def test_no_system_prompt_leaves_by_messages_or_events(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    await ended(sessions, session_id, SAY)
    reader = await follow(sessions, ALICE, session_id, live=False)
    shown = json.dumps([reader.facts, await sessions.messages(ALICE, session_id)])
    assert "You are a test." not in shown
    assert reader.types()[:2] == ["session_opened", "activated"]


async def test_the_trajectory_is_whole(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    await ended(sessions, session_id, SAY)
    made = await sessions.trajectory(ALICE, session_id)
    assert list(made) == [
        "session_id", "user_id", "session_start_time", "session_end_time", "model_name",
        "total_cost_usd", "usage_metrics", "messages", "events", "tools",
    ]  # fmt: skip
    assert made["user_id"] == "alice"
    assert [message["role"] for message in made["messages"]] == ["system", "user", "assistant"]


async def test_a_cursor_from_an_answer_reads_what_follows(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    accepted = await sessions.submit(ALICE, session_id, SendMessage(text=SAY))
    await turn_of(sessions, ALICE, session_id, 1)
    reader = await follow(sessions, ALICE, session_id, after=Cursor.parse(accepted.cursor), turn=1)
    assert reader.types() == ["model_called", "assistant_message", "turn_ended"]
    head = Cursor.parse((await sessions.view(ALICE, session_id)).cursor)
    reader = await follow(sessions, ALICE, session_id, after=head, live=False)
    assert reader.types() == []


async def test_it_is_ready(sessions: Sessions) -> None:
    assert await sessions.ready()


async def test_one_reader_too_many_is_refused_until_another_leaves(sessions: Sessions) -> None:
    session_id = await opened(sessions)
    readers = [sessions.pages(ALICE, session_id, Cursor()) for _ in range(SMALL.max_readers)]
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        for reader in readers:
            await stack.enter_async_context(aclosing(reader))
        # Every first page comes at once, from a session where nothing happens.
        pages = await asyncio.gather(*(anext(reader) for reader in readers))
        assert {page.frames[0].event for page in pages} == {"session_opened"}
        with pytest.raises(QueueFull) as refused:
            await anext(sessions.pages(ALICE, session_id, Cursor()))
        assert refused.value.limit == SMALL.max_readers
        await readers[0].aclose()

        async def is_let_in() -> bool:
            async with aclosing(sessions.pages(ALICE, session_id, pages[0].cursor)) as late:
                try:
                    return (await anext(late)).frames == ()
                except QueueFull:
                    return False

        await eventually(is_let_in, SOON_S)
