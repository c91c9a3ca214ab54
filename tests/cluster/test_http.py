"""The whole table of HTTP v1, through Serve, on real Ray."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import ray

from tests.conftest import House
from tests.serve_app.asking import is_problem
from tests.support.house import puppet
from tests.support.http import Heard, User

pytestmark = pytest.mark.timeout(180)

SESSION = {
    "session_id", "user_id", "title", "model", "agent", "status", "created_at", "updated_at",
    "n_messages", "pending_approval", "usage", "spend_usd", "n_unpriced", "cursor",
}  # fmt: skip
TRAJECTORY = [
    "session_id", "user_id", "session_start_time", "session_end_time", "model_name",
    "total_cost_usd", "usage_metrics", "messages", "events", "tools",
]  # fmt: skip
SAY = puppet({"say": "Hello there.", "chunks": 3})
HANG = puppet({"hang": True})
TURN = ["user_message", "model_called", "assistant_message", "turn_ended"]


def sh(command: str) -> dict[str, Any]:
    return {"call": "bash", "args": {"command": command}}


async def refused(user: User, path: str, body: Any, status: int, code: str) -> dict[str, Any]:
    return is_problem(await user.http.post(path, json=body), status, code)


async def test_open_answers_with_a_session(alice: User) -> None:
    body = {"title": "First", "agent": "tester", "model": "scripted/echo", "metadata": {"k": [1]}}
    answer = await alice.http.post("/v1/sessions", json=body)
    assert answer.status_code == 201
    session = answer.json()
    assert set(session) == SESSION
    assert answer.headers["location"] == f"/v1/sessions/{session['session_id']}"
    told = {name: session[name] for name in ("user_id", "title", "agent", "model", "status")}
    assert told == {
        "user_id": "alice",
        "title": "First",
        "agent": "tester",
        "model": "scripted/echo",
        "status": "idle",
    }
    assert session["n_messages"] == 0
    assert session["pending_approval"] is None
    assert session["spend_usd"] == 0
    assert await alice.view(session["session_id"]) == session


async def test_open_takes_no_body_and_refuses_a_wrong_one(alice: User) -> None:
    answer = await alice.http.post("/v1/sessions")
    assert (answer.status_code, answer.json()["agent"]) == (201, "tester")
    await refused(alice, "/v1/sessions", {"colour": "blue"}, 422, "invalid")
    await refused(alice, "/v1/sessions", {"agent": "nobody"}, 422, "invalid")
    assert len((await alice.get("/v1/sessions"))["data"]) == 1


async def test_open_with_seeds_starts_with_their_summary(alice: User) -> None:
    seeds = [{"role": "user", "content": "We chose blue."}, {"role": "king"}]
    session_id = await alice.opened(seed_messages=seeds)
    [seeded] = (await alice.read(session_id, turn=1)).of("seeded")
    assert (seeded["n_messages"], seeded["n_dropped"]) == (1, 1)


async def test_repeating_a_key_returns_the_first_answer(alice: User) -> None:
    opening: dict[str, Any] = {
        "headers": {"Idempotency-Key": uuid4().hex},
        "json": {"title": "One"},
    }
    first, again = await asyncio.gather(
        *(alice.http.post("/v1/sessions", **opening) for _ in range(2))
    )
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["session_id"] == again.json()["session_id"]
    session_id = first.json()["session_id"]
    sending = f"/v1/sessions/{session_id}/messages"
    in_header: dict[str, Any] = {"headers": {"Idempotency-Key": "m-1"}, "json": {"text": SAY}}
    in_body: dict[str, Any] = {"json": {"text": SAY, "message_id": "m-1"}}
    one, two, three = [await alice.http.post(sending, **q) for q in (in_header, in_header, in_body)]
    assert one.status_code == 202
    assert one.json() == two.json() == three.json()
    await alice.read(session_id, turn=1)
    assert len(await alice.messages(session_id)) == 2
    both: dict[str, Any] = {
        "headers": {"Idempotency-Key": "m-2"},
        "json": {"text": SAY, "message_id": "m-3"},
    }
    is_problem(await alice.http.post(sending, **both), 422, "invalid")
    other = f"/v1/sessions/{session_id}/compact"
    await refused(alice, other, {"message_id": "m-1"}, 409, "conflict")


async def test_the_list_is_paged_newest_first(alice: User) -> None:
    ids = [await alice.opened(title=str(n)) for n in range(3)]
    first = await alice.get("/v1/sessions", limit=2)
    assert set(first) == {"data", "next"}
    assert all(set(session) == SESSION for session in first["data"])
    rest = await alice.get("/v1/sessions", limit=2, after=first["next"])
    assert [s["session_id"] for s in first["data"] + rest["data"]] == ids[::-1]
    assert rest["next"] is None
    wrong = await alice.http.get("/v1/sessions", params={"after": "garbage"})
    is_problem(wrong, 422, "invalid")


async def test_a_message_opens_a_turn_and_its_cursor_reads_on(alice: User) -> None:
    session_id = await alice.opened()
    accepted = await alice.command(session_id, "messages", text=SAY)
    assert set(accepted) == {"turn", "cursor"}
    assert accepted["turn"] == 1
    after = Heard()
    after.cursor = accepted["cursor"]
    assert (await alice.read(session_id, turn=1, heard=after)).types() == TURN[1:]
    assert await alice.messages(session_id) == [
        {"role": "user", "content": SAY},
        {"role": "assistant", "content": "Hello there."},
    ]
    view = await alice.view(session_id)
    assert view["n_messages"] == 2
    assert view["usage"]["prompt_tokens"] > 0


async def test_a_message_is_answered_with_its_turn_when_the_caller_takes_events(
    alice: User,
) -> None:
    session_id = await alice.opened()
    heard = Heard()
    async with alice.events(
        "POST",
        f"/v1/sessions/{session_id}/messages",
        json={"text": SAY},
        headers={"Accept": "text/event-stream"},
    ) as events:
        async for event in events:
            heard.take(event)
    assert heard.types() == TURN
    [message] = heard.of("assistant_message")
    assert heard.texts[message["part_id"]] == message["text"] == "Hello there."
    for fact in heard.facts:
        assert fact["turn"] == 1
        assert {"seq", "turn", "at", "type"} <= set(fact)


async def test_texts_that_cannot_be_are_refused(alice: User) -> None:
    session_id = await alice.opened()
    path = f"/v1/sessions/{session_id}/messages"
    await refused(alice, path, {"text": "x" * 100_001}, 413, "too_large")
    await refused(alice, path, {"text": " \n"}, 422, "invalid")
    await refused(alice, path, {}, 422, "invalid")
    is_problem(await alice.http.post(path, content=b"{"), 415, "unsupported_media_type")
    assert await alice.messages(session_id) == []


async def test_events_read_from_the_cursor_and_the_header_wins(alice: User) -> None:
    session_id = await alice.opened()
    await alice.ended(session_id, SAY)
    await alice.ended(session_id, SAY)
    whole = await alice.read(session_id, follow=False)
    assert whole.types() == ["session_opened", "activated", *TURN, *TURN]
    assert [fact["seq"] for fact in whole.facts] == list(range(1, 11))
    assert "spec" not in whole.facts[0]
    path = f"/v1/sessions/{session_id}/events"

    async def got(headers: dict[str, str], **params: str) -> list[int]:
        heard = Heard()
        async with alice.events("GET", path, params=params, headers=headers) as events:
            async for event in events:
                heard.take(event)
        return [fact["seq"] for fact in heard.facts]

    assert await got({}, after="7.0.0", follow="false") == [8, 9, 10]
    assert await got({"Last-Event-ID": "9.0.0"}, after="2.0.0", follow="false") == [10]
    assert await got({}, turn="1") == [3, 4, 5, 6]
    assert await got({}, turn="2", follow="false") == [7, 8, 9, 10]
    for params in ({"after": "7"}, {"turn": "0"}, {"follow": "maybe"}):
        is_problem(await alice.http.get(path, params=params), 422, "invalid")


async def test_approvals_approve_reject_and_edit(alice: User) -> None:
    session_id = await alice.opened(agent="asking")
    calls = [sh("echo act one"), sh("echo act two"), sh("echo act three"), sh("echo free")]
    heard = await alice.ended(session_id, puppet({"calls": calls}, {"say": "all done"}))
    assert heard.types()[-2:] == ["approval_requested", "turn_ended"]
    assert heard.facts[-1]["reason"] == "approval"
    view = await alice.view(session_id)
    assert view["status"] == "waiting_approval"
    pending = view["pending_approval"]
    assert [set(ask) for ask in pending] == [{"tool_call_id", "tool", "arguments"}] * 3
    assert [ask["arguments"]["command"] for ask in pending] == [
        "echo act one",
        "echo act two",
        "echo act three",
    ]
    one, two, three = (ask["tool_call_id"] for ask in pending)
    path = f"/v1/sessions/{session_id}/approvals"
    for decision, status, code in (
        ({"tool_call_id": "other", "decision": "approve"}, 409, "conflict"),
        ({"tool_call_id": one, "decision": "edit"}, 422, "invalid"),
        ({"tool_call_id": one, "decision": "perhaps"}, 422, "invalid"),
    ):
        await refused(alice, path, {"decisions": [decision]}, status, code)
    accepted = await alice.command(
        session_id,
        "approvals",
        decisions=[
            {"tool_call_id": one, "decision": "approve"},
            {"tool_call_id": two, "decision": "reject", "feedback": "not this"},
            {"tool_call_id": three, "decision": "edit", "arguments": {"command": "echo mine"}},
        ],
    )
    assert set(accepted) == {"turn", "cursor"}
    decided = await alice.read(session_id, turn=accepted["turn"])
    assert decided.facts[-1]["reason"] == "done"
    settled = {f["tool_call_id"]: (f["outcome"], f["text"]) for f in decided.of("tool_finished")}
    assert settled[one][0] == "ok"
    assert "act one" in settled[one][1]
    assert settled[two][0] == "denied"
    assert "not this" in settled[two][1]
    assert settled[three][0] == "ok"
    assert "mine" in settled[three][1]
    assert (await alice.view(session_id))["pending_approval"] is None


async def test_interrupt_ends_the_running_turn_and_refuses_an_idle_session(alice: User) -> None:
    session_id = await alice.opened()
    idle = f"/v1/sessions/{session_id}/interrupt"
    await refused(alice, idle, None, 409, "conflict")
    turn = await alice.sent(session_id, HANG)
    await refused(alice, f"/v1/sessions/{session_id}/undo", None, 409, "conflict")
    assert (await alice.view(session_id))["status"] == "running"
    assert set(await alice.command(session_id, "interrupt")) == {"cursor"}
    heard = await alice.read(session_id, turn=turn)
    assert heard.facts[-1]["reason"] == "interrupted"
    assert (await alice.view(session_id))["status"] == "idle"


async def test_undo_and_truncate_cut_the_view(alice: User) -> None:
    session_id = await alice.opened()
    at = f"/v1/sessions/{session_id}"
    await refused(alice, f"{at}/undo", None, 409, "conflict")
    for _ in range(3):
        await alice.ended(session_id, SAY)
    assert set(await alice.command(session_id, "undo")) == {"cursor"}
    assert len(await alice.messages(session_id)) == 4
    await refused(alice, f"{at}/truncate", {"user_message_index": 2}, 422, "invalid")
    await refused(alice, f"{at}/truncate", {"user_message_index": -1}, 422, "invalid")
    cut = await alice.command(session_id, "truncate", user_message_index=1)
    assert set(cut) == {"cursor"}
    assert len(await alice.messages(session_id)) == 2
    assert (await alice.view(session_id))["n_messages"] == 2


async def test_compact_and_seed_are_turns(alice: User) -> None:
    session_id = await alice.opened()
    at = f"/v1/sessions/{session_id}"
    await refused(alice, f"{at}/compact", None, 409, "conflict")
    await alice.ended(session_id, SAY)
    assert set(await alice.command(session_id, "compact")) == {"cursor"}
    assert (await alice.read(session_id, turn=2)).of("compacted")
    assert len(await alice.messages(session_id)) == 2
    message = {"role": "user", "content": "We chose blue."}
    accepted = await alice.command(session_id, "seed", messages=[message, message, 7])
    assert set(accepted) == {"cursor", "n_messages"}
    assert accepted["n_messages"] == 2
    await alice.read(session_id, turn=3)
    await refused(alice, f"{at}/seed", {"messages": [7]}, 422, "invalid")


async def test_a_model_switch_holds_from_the_next_call(alice: User) -> None:
    session_id = await alice.opened()
    assert set(await alice.command(session_id, "model", model="scripted/echo")) == {"cursor"}
    await alice.ended(session_id, "repeat me")
    assert (await alice.messages(session_id))[-1]["content"] == "repeat me"
    assert (await alice.view(session_id))["model"] == "scripted/echo"
    await refused(alice, f"/v1/sessions/{session_id}/model", {"model": ""}, 422, "invalid")


async def test_close_is_for_ever_and_delete_removes_everything(alice: User, house: House) -> None:
    session_id = await alice.opened()
    await alice.ended(session_id, puppet(sh("echo hello > kept.txt"), {"say": "ok"}))
    storage = house.settings.agent.storage_dir
    assert (storage / "workspaces" / session_id / "kept.txt").read_text() == "hello\n"
    await alice.sent(session_id, HANG)
    assert set(await alice.command(session_id, "close")) == {"cursor"}
    heard = await alice.read(session_id)
    assert heard.types()[-1] == "session_closed"
    assert [end["reason"] for end in heard.of("turn_ended")] == ["done", "interrupted"]
    assert (await alice.view(session_id))["status"] == "closed"
    at = f"/v1/sessions/{session_id}"
    await refused(alice, f"{at}/messages", {"text": SAY}, 409, "conflict")
    await refused(alice, f"{at}/close", None, 409, "conflict")
    written = json.loads((storage / "trajectories" / f"{session_id}.json").read_text())
    assert list(written) == TRAJECTORY
    assert (await alice.http.delete(at)).status_code == 204
    is_problem(await alice.http.get(at), 404, "not_found")
    is_problem(await alice.http.delete(at), 404, "not_found")
    assert not (storage / "workspaces" / session_id).exists()
    assert not (storage / "trajectories" / f"{session_id}.json").exists()


async def test_the_trajectory_has_its_keys_and_keeps_what_the_view_lost(alice: User) -> None:
    session_id = await alice.opened()
    await alice.ended(session_id, SAY)
    await alice.command(session_id, "undo")
    made = await alice.get(f"/v1/sessions/{session_id}/trajectory")
    assert list(made) == TRAJECTORY
    assert (made["session_id"], made["user_id"]) == (session_id, "alice")
    assert [m["role"] for m in made["messages"]] == ["system", "user", "assistant"]
    assert {tool["function"]["name"] for tool in made["tools"]} >= {"bash", "read", "write"}


async def test_capacity_has_its_shape_and_counts(alice: User, bob: User) -> None:
    await alice.opened()
    await bob.opened()
    capacity = await alice.get("/v1/capacity")
    assert isinstance(capacity.pop("warm"), int)
    assert capacity == {
        "live": 2,
        "limit": 5,
        "user": {"live": 1, "limit": 3},
        "lanes": {"interactive": {"live": 2}, "bulk": {"live": 0}},
    }


async def test_it_lives_and_is_ready_and_needs_keys_for_all_else(house: House) -> None:
    async with httpx.AsyncClient(base_url=house.url) as http:
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        assert (await http.get("/readyz")).json() == {"status": "ready"}
        for headers in ({}, {"Authorization": "Bearer troupe_wrong"}):
            answer = await http.get("/v1/sessions", headers=headers)
            is_problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        is_problem(await http.post("/v1/sessions", json={}), 401, "unauthorized")


async def test_two_users_cannot_see_each_other_in_anything(alice: User, bob: User) -> None:
    session_id = await alice.opened(agent="asking", title="Mine")
    await alice.ended(session_id, puppet(sh("echo act"), {"say": "ok"}))
    [ask] = (await alice.view(session_id))["pending_approval"]
    before = await alice.read(session_id, follow=False)
    at = f"/v1/sessions/{session_id}"
    for path in ("", "/messages", "/events", "/trajectory"):
        is_problem(await bob.http.get(at + path), 404, "not_found")
    decision = {"tool_call_id": ask["tool_call_id"], "decision": "approve"}
    commands: dict[str, Any] = {
        "messages": {"text": SAY},
        "approvals": {"decisions": [decision]},
        "truncate": {"user_message_index": 0},
        "model": {"model": "scripted/echo"},
        "seed": {"messages": [{"role": "user", "content": "hi"}]},
        **dict.fromkeys(("interrupt", "undo", "compact", "close")),
    }
    for name, body in commands.items():
        await refused(bob, f"{at}/{name}", body, 404, "not_found")
    is_problem(await bob.http.delete(at), 404, "not_found")
    streaming = {"Accept": "text/event-stream"}
    sent = await bob.http.post(f"{at}/messages", json={"text": SAY}, headers=streaming)
    is_problem(sent, 404, "not_found")
    assert (await bob.get("/v1/sessions"))["data"] == []
    assert (await bob.get("/v1/capacity"))["user"]["live"] == 0
    # Not even a key of one's own reaches another's session.
    key: dict[str, Any] = {"headers": {"Idempotency-Key": uuid4().hex}, "json": {}}
    hers, his = (
        await alice.http.post("/v1/sessions", **key),
        await bob.http.post("/v1/sessions", **key),
    )
    assert hers.json()["session_id"] != his.json()["session_id"]
    assert (await alice.read(session_id, follow=False)).facts == before.facts


async def test_who_has_too_many_running_sessions_is_told_when_to_come_back(
    users: dict[str, User],
) -> None:
    """Limits of the house: 3 sessions a user, 5 in all."""
    alice, carol, dave, erin = (users[name] for name in ("alice", "carol", "dave", "erin"))
    ids = [await alice.opened() for _ in range(3)]
    for session_id in ids:
        await alice.sent(session_id, HANG)
    answer = await alice.http.post("/v1/sessions", json={})
    problem = is_problem(answer, 429, "at_capacity")
    told = (problem["scope"], problem["live"], problem["limit"])
    assert told == ("per_user", 3, 3)
    assert int(answer.headers["retry-after"]) >= problem["retry_after_s"] > 0
    for user in (carol, dave):
        await user.sent(await user.opened(), HANG)
    answer = await erin.http.post("/v1/sessions", json={})
    problem = is_problem(answer, 503, "at_capacity")
    told = (problem["scope"], problem["live"], problem["limit"])
    assert told == ("global", 5, 5)
    assert int(answer.headers["retry-after"]) >= problem["retry_after_s"] > 0
    assert (await erin.get("/v1/sessions"))["data"] == []
    # One turn ends, and there is room: the idle session gives way.
    await alice.command(ids[0], "interrupt")
    await alice.read(ids[0], turn=1)
    assert await erin.opened()
    assert (await alice.view(ids[0]))["status"] == "passive"
    assert (await alice.view(ids[1]))["status"] == "running"


async def test_a_race_for_slots_ends_exactly_at_the_limits(users: dict[str, User]) -> None:
    async def busy(user: User) -> list[int]:
        opened = await user.http.post("/v1/sessions", json={})
        if opened.status_code != 201:
            return [opened.status_code]
        # May be refused as well: idle so far, it can have given way to another.
        at = f"/v1/sessions/{opened.json()['session_id']}/messages"
        sent = await user.http.post(at, json={"text": HANG})
        return [opened.status_code, sent.status_code]

    callers = [users[name] for name in ("alice", "bob", "carol") for _ in range(3)]
    answers = await asyncio.gather(*(busy(user) for user in callers))
    assert {status for statuses in answers for status in statuses} <= {201, 202, 429, 503}
    views = [await user.get("/v1/capacity") for user in users.values()]
    assert views[0]["live"] == 5
    assert sum(view["user"]["live"] for view in views) == 5
    assert max(view["user"]["live"] for view in views) <= 3


def holding(root: Path, needle: bytes) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and needle in path.read_bytes()]


async def test_the_users_token_is_nowhere(alice: User, house: House) -> None:
    token = "plain-words-of-a-user-token-5a1c"  # nothing that is redacted by its shape
    opened = await alice.http.post("/v1/sessions", json={}, headers={"X-HF-Token": token})
    session_id = opened.json()["session_id"]
    steps = puppet(sh("env; cat /proc/self/environ /proc/*/cmdline"), {"say": "ok"})
    sent = await alice.http.post(
        f"/v1/sessions/{session_id}/messages", json={"text": steps}, headers={"X-HF-Token": token}
    )
    heard = await alice.read(session_id, turn=1)
    assert heard.of("tool_finished")[0]["text"]
    answers = [opened.text, sent.text, json.dumps([heard.facts, heard.texts])]
    reads = [f"/v1/sessions/{session_id}{path}" for path in ("", "/messages", "/trajectory")]
    answers += [(await alice.http.get(path)).text for path in reads]
    await alice.command(session_id, "close")
    assert not [answer for answer in answers if token in answer]
    storage = house.settings.agent.storage_dir
    assert holding(storage, session_id.encode())  # the journal at least
    assert holding(storage, token.encode()) == []
    private: Any = ray  # there is no public way to the logs
    logs = Path(private._private.worker._global_node.get_logs_dir_path())
    assert holding(logs, b"SessionActor")
    assert holding(logs, token.encode()) == []
