"""Every row of the API's table, over a socket."""

from typing import Any

import httpx
import pytest

from tests.serve_app.asking import event, events, is_problem, opened, sent
from tests.support.sessions import MemorySessions

SESSION_FIELDS = {
    "session_id", "user_id", "title", "model", "agent", "status", "created_at", "updated_at",
    "n_messages", "pending_approval", "usage", "spend_usd", "n_unpriced", "cursor",
}  # fmt: skip


async def test_a_session_is_opened_with_all_it_may_be_given(
    alice: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    seed = [{"role": "user", "content": "hi"}]
    answer = await alice.post(
        "/v1/sessions",
        json={
            "model": "scripted/demo",
            "agent": "default",
            "title": "A title",
            "seed_messages": seed,
            "metadata": {"deep": {"list": [1, 2.5, None]}},
        },
        headers={"X-HF-Token": "hf_secret"},
    )
    assert answer.status_code == 201
    session = answer.json()
    assert set(session) == SESSION_FIELDS
    assert session["user_id"] == "alice"
    assert session["title"] == "A title"
    assert answer.headers["location"] == f"/v1/sessions/{session['session_id']}"
    command = sessions.all[session["session_id"]].command
    assert command.user_token == "hf_secret"
    assert command.seed_messages == tuple(seed)
    assert command.metadata == {"deep": {"list": [1, 2.5, None]}}
    assert "hf_secret" not in answer.text


async def test_a_session_needs_no_body(alice: httpx.AsyncClient) -> None:
    assert (await alice.post("/v1/sessions")).status_code == 201


async def test_sessions_are_listed_newest_first_in_pages(alice: httpx.AsyncClient) -> None:
    ids = [await opened(alice) for _ in range(3)]
    first = (await alice.get("/v1/sessions", params={"limit": 2})).json()
    second = (await alice.get("/v1/sessions", params={"after": first["next"]})).json()
    assert [s["session_id"] for s in first["data"] + second["data"]] == ids[::-1]
    assert second["next"] is None


async def test_a_session_is_shown_and_then_deleted(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    shown = await alice.get(f"/v1/sessions/{session_id}")
    assert set(shown.json()) == SESSION_FIELDS
    deleted = await alice.delete(f"/v1/sessions/{session_id}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    is_problem(await alice.get(f"/v1/sessions/{session_id}"), 404, "not_found")
    is_problem(await alice.delete(f"/v1/sessions/{session_id}"), 404, "not_found")


async def test_a_message_is_accepted_and_shows_up(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    accepted = await sent(alice, session_id, "echo hello")
    assert set(accepted) == {"turn", "cursor"}
    assert accepted["turn"] == 1
    messages = (await alice.get(f"/v1/sessions/{session_id}/messages")).json()
    assert messages == {"data": [{"role": "user", "content": "echo hello"}]}


async def test_a_message_may_be_answered_with_its_turns_events(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    await sent(alice, session_id, "echo one")
    answer = await alice.post(
        f"/v1/sessions/{session_id}/messages",
        json={"text": "echo two"},
        headers={"Accept": "text/event-stream"},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = [event(b.split("\n")) for b in answer.text.strip().split("\n\n") if b[:3] == "id:"]
    assert [e.event for e in found] == ["user_message", "assistant_message", "turn_ended"]
    assert {e.data["turn"] for e in found} == {2}
    assert found[0].data["text"] == "echo two"


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "text/event-stream;q=0, */*", "text/html, text/*"]
)
async def test_events_come_only_to_who_names_them(alice: httpx.AsyncClient, accept: str) -> None:
    session_id = await opened(alice)
    answer = await alice.post(
        f"/v1/sessions/{session_id}/messages", json={"text": "echo"}, headers={"Accept": accept}
    )
    assert (answer.status_code, answer.json()["turn"]) == (202, 1)


async def test_events_are_read_from_a_cursor_to_the_head(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    await sent(alice, session_id, "echo one")
    await sent(alice, session_id, "echo two")
    path = f"/v1/sessions/{session_id}/events?follow=false"
    whole = await events(alice, path)
    assert [e.data["seq"] for e in whole] == [1, 2, 3, 4, 5, 6]
    assert {"seq", "turn", "at", "type"} <= set(whole[0].data)
    assert await events(alice, f"{path}&after={whole[2].id}") == whole[3:]
    assert await events(alice, f"{path}&turn=2") == whole[3:]


async def test_the_last_event_id_wins_over_after(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    await sent(alice, session_id, "echo one")
    path = f"/v1/sessions/{session_id}/events?follow=false&after=0.0.0"
    found = await events(alice, path, **{"Last-Event-ID": "2.1.2"})
    assert [e.data["seq"] for e in found] == [3]


async def test_an_approval_is_shown_and_decided(
    alice: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    session_id = await opened(alice)
    await sent(alice, session_id, "ask me")
    session = (await alice.get(f"/v1/sessions/{session_id}")).json()
    assert session["status"] == "waiting_approval"
    assert session["pending_approval"] == [
        {"tool_call_id": "call-1", "tool": "bash", "arguments": {"n": 1}}
    ]
    answer = await alice.post(
        f"/v1/sessions/{session_id}/approvals",
        json={
            "decisions": [
                {"tool_call_id": "call-1", "decision": "edit", "arguments": {"n": 2}},
            ]
        },
    )
    assert (answer.status_code, answer.json()["turn"]) == (202, 2)
    decided = sessions.all[session_id].records[3].fact.decisions[0]
    assert decided.arguments == '{"n": 2}'


@pytest.mark.parametrize(
    "decision",
    [
        {"decision": "approve", "arguments": {"n": 2}},
        {"decision": "edit"},
        {"decision": "edit", "arguments": "n=2"},
        {"decision": "perhaps"},
    ],
)
async def test_a_decision_that_contradicts_itself_is_invalid(
    alice: httpx.AsyncClient, decision: dict[str, Any]
) -> None:
    session_id = await opened(alice)
    await sent(alice, session_id, "ask me")
    body = {"decisions": [{"tool_call_id": "call-1", **decision}]}
    is_problem(await alice.post(f"/v1/sessions/{session_id}/approvals", json=body), 422, "invalid")


@pytest.mark.parametrize(
    ("before", "call", "body", "fact"),
    [
        ("hold on", "interrupt", None, "turn_ended"),
        ("echo", "undo", None, "rewound"),
        ("echo", "compact", None, "turn_ended"),
        ("echo", "close", None, "session_closed"),
        ("echo", "truncate", {"user_message_index": 0}, "rewound"),
        ("echo", "model", {"model": "scripted/other"}, "model_switched"),
    ],
)
async def test_a_command_is_accepted_with_its_cursor(
    alice: httpx.AsyncClient, before: str, call: str, body: dict[str, Any] | None, fact: str
) -> None:
    session_id = await opened(alice)
    await sent(alice, session_id, before)
    answer = await alice.post(f"/v1/sessions/{session_id}/{call}", json=body)
    assert answer.status_code == 202, answer.text
    assert set(answer.json()) == {"cursor"}
    found = await events(alice, f"/v1/sessions/{session_id}/events?follow=false")
    assert found[-1].event == fact


@pytest.mark.parametrize("call", ["interrupt", "undo", "compact"])
async def test_what_cannot_be_in_this_state_is_a_conflict(
    alice: httpx.AsyncClient, call: str
) -> None:
    session_id = await opened(alice)
    is_problem(await alice.post(f"/v1/sessions/{session_id}/{call}"), 409, "conflict")
    assert await events(alice, f"/v1/sessions/{session_id}/events?follow=false") == []


async def test_an_index_out_of_range_is_invalid(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    answer = await alice.post(f"/v1/sessions/{session_id}/truncate", json={"user_message_index": 5})
    is_problem(answer, 422, "invalid")


async def test_a_seed_says_how_many_messages_were_well_formed(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    answer = await alice.post(
        f"/v1/sessions/{session_id}/seed",
        json={"messages": [{"role": "user", "content": "x"}, 17, None]},
    )
    assert (answer.status_code, answer.json()["n_messages"]) == (202, 1)
    assert set(answer.json()) == {"cursor", "n_messages"}


async def test_the_trajectory_is_json(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    await sent(alice, session_id, "echo \N{GRINNING FACE}")
    answer = await alice.get(f"/v1/sessions/{session_id}/trajectory")
    assert answer.json()["session_id"] == session_id
    assert answer.json()["events"][0]["text"] == "echo \N{GRINNING FACE}"


async def test_capacity_counts_all_and_the_callers_own(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    await opened(alice)
    await opened(bob)
    assert (await alice.get("/v1/capacity")).json() == {
        "live": 2,
        "limit": 4,
        "warm": 0,
        "user": {"live": 1, "limit": 3},
        "lanes": {"interactive": {"live": 2}, "bulk": {"live": 0}},
    }


async def test_health_needs_no_key(url: str, sessions: MemorySessions) -> None:
    async with httpx.AsyncClient(base_url=url) as anyone:
        assert (await anyone.get("/healthz")).json() == {"status": "ok"}
        assert (await anyone.get("/readyz")).json() == {"status": "ready"}
        sessions.is_ready = False
        body = is_problem(await anyone.get("/readyz"), 503, "unavailable")
        assert body["retry_after_s"] > 0
        assert (await anyone.get("/healthz")).status_code == 200


async def test_the_same_key_is_the_same_answer(
    alice: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    session_id = await opened(alice, message_id="open-1")
    assert await opened(alice, message_id="open-1") == session_id
    again = await alice.post("/v1/sessions", headers={"Idempotency-Key": "open-1"})
    assert again.json()["session_id"] == session_id
    first = await sent(alice, session_id, "echo", message_id="m-1")
    assert await sent(alice, session_id, "echo", message_id="m-1") == first
    other = await alice.post(f"/v1/sessions/{session_id}/undo", headers={"Idempotency-Key": "m-1"})
    is_problem(other, 409, "conflict")
    assert len(sessions.all[session_id].users()) == 1


async def test_two_keys_that_differ_are_invalid(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    for path, body in (("sessions", {}), (f"sessions/{session_id}/messages", {"text": "echo"})):
        answer = await alice.post(
            f"/v1/{path}", json={"message_id": "a", **body}, headers={"Idempotency-Key": "b"}
        )
        is_problem(answer, 422, "invalid")
        same = await alice.post(
            f"/v1/{path}", json={"message_id": "a", **body}, headers={"Idempotency-Key": "a"}
        )
        assert same.is_success


async def test_a_repeated_message_may_be_followed_again(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    request = {"text": "echo once", "message_id": "m-1"}
    accept = {"Accept": "text/event-stream"}
    path = f"/v1/sessions/{session_id}/messages"
    first = await alice.post(path, json=request, headers=accept)
    assert (await alice.post(path, json=request, headers=accept)).text == first.text


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/messages", {"text": "mine"}),
        ("GET", "/messages", None),
        ("GET", "/events", None),
        ("GET", "/events?follow=false", None),
        ("POST", "/approvals", {"decisions": [{"tool_call_id": "c", "decision": "approve"}]}),
        ("POST", "/interrupt", None),
        ("POST", "/undo", None),
        ("POST", "/compact", None),
        ("POST", "/close", None),
        ("POST", "/truncate", {"user_message_index": 0}),
        ("POST", "/model", {"model": "x"}),
        ("POST", "/seed", {"messages": [{"role": "user", "content": "x"}]}),
        ("GET", "/trajectory", None),
    ],
)
async def test_a_foreign_session_is_not_found(
    alice: httpx.AsyncClient,
    bob: httpx.AsyncClient,
    sessions: MemorySessions,
    method: str,
    path: str,
    body: dict[str, Any] | None,
) -> None:
    session_id = await opened(alice)
    await sent(alice, session_id, "echo secret")
    before = list(sessions.all[session_id].records)
    foreign = await bob.request(method, f"/v1/sessions/{session_id}{path}", json=body)
    unknown = await bob.request(method, f"/v1/sessions/nobody{path}", json=body)
    assert is_problem(foreign, 404, "not_found") == is_problem(unknown, 404, "not_found")
    assert sessions.all[session_id].records == before
    assert (await bob.get("/v1/sessions")).json()["data"] == []


async def test_a_cursor_ahead_of_the_session_is_invalid(alice: httpx.AsyncClient) -> None:
    session_id = (await alice.post("/v1/sessions", json={})).json()["session_id"]
    answer = await alice.get(f"/v1/sessions/{session_id}/events?after=99999.1.0&follow=false")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
