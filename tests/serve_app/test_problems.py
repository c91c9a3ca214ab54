"""Whatever is wrong becomes a problem that says so, and changes nothing."""

import asyncio
import json
from typing import Any

import httpx
import pytest
import structlog

from actors.protocol import Open, Principal, SessionView, Unavailable
from agent.faults import JournalFault, ModelRefused
from serve_app.bodies import MAX_JSON_DEPTH, MAX_JSON_NODES
from serve_app.settings import ServeSettings
from tests.serve_app.asking import is_problem, opened, sent
from tests.serve_app.conftest import client
from tests.serve_app.serving import served
from tests.support.sessions import MemorySessions

JSON = {"Content-Type": "application/json"}


async def test_a_user_at_the_limit_gets_429(alice: httpx.AsyncClient) -> None:
    for _ in range(3):
        await opened(alice)
    answer = await alice.post("/v1/sessions")
    body = is_problem(answer, 429, "at_capacity")
    assert (body["scope"], body["live"], body["limit"]) == ("per_user", 3, 3)
    assert body["retry_after_s"] == 1.5
    assert answer.headers["retry-after"] == "2"


async def test_a_full_cluster_gets_503(alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    for http in (alice, alice, bob, bob):
        await opened(http)
    answer = await bob.post("/v1/sessions")
    assert is_problem(answer, 503, "at_capacity")["scope"] == "global"
    assert answer.headers["retry-after"] == "2"


async def test_a_text_over_the_limit_is_too_large(
    alice: httpx.AsyncClient, sessions: MemorySessions
) -> None:
    session_id = await opened(alice)
    path = f"/v1/sessions/{session_id}/messages"
    is_problem(await alice.post(path, json={"text": "x" * 100_001}), 413, "too_large")
    assert sessions.all[session_id].records == []
    longest = "\N{GRINNING FACE}" * 100_000
    assert (await alice.post(path, json={"text": longest})).status_code == 202


async def test_a_body_over_the_limit_is_refused_by_its_length(alice: httpx.AsyncClient) -> None:
    answer = await alice.post("/v1/sessions", content=b" " * (5 * 1024**2), headers=JSON)
    is_problem(answer, 413, "too_large")


async def test_a_body_without_a_length_is_refused_while_it_comes(
    url: str, tokens: dict[str, str]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    writer.write(
        b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\nAuthorization: Bearer "
        + tokens["alice"].encode()
        + b"\r\n\r\n"
    )
    async with asyncio.timeout(5):
        for _ in range(5 * 16):
            writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
            await writer.drain()
        # The last chunk has not been sent and never will be.
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.transport.abort()


async def test_a_client_that_leaves_in_its_body_is_no_error(
    settings: ServeSettings, tokens: dict[str, str]
) -> None:
    with structlog.testing.capture_logs() as lines:
        async with served(MemorySessions(), settings) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
            writer.write(
                b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
                b"Expect: 100-continue\r\nAuthorization: Bearer "
                + tokens["alice"].encode()
                + b"\r\n\r\n"
            )
            async with asyncio.timeout(5):
                # The server says this when the handler asks for the body.
                assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
            writer.transport.abort()
    assert [(line["event"], line["status"]) for line in lines] == [("request_answered", None)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not JSON"),
        (b"not json", "not JSON"),
        (b'{"text": NaN}', "not JSON"),
        (b'{"text": "\xff\xfe"}', "not JSON"),
        (b'{"text": "\\ud800"}', "not JSON"),
        (b'{"text": "a\\u0000b"}', "NUL"),
        (b'{"text": "a\x00b"}', "not JSON"),
        (b'{"te\\u0000xt": "a"}', "NUL"),
        (b"[" * 100_000, "not JSON"),
        (b"[" * 100 + b"]" * 100, "nested deeper"),
        (b'{"text": 1e999}', "too large"),
        (b'{"text": ' + b"9" * 5000 + b"}", "body"),
        (b"[]", "body"),
        (b"17", "body"),
        (b"null", "body"),
        (b"", "body"),
        (b'{"text": ""}', "body.text"),
        (b'{"text": 5}', "body.text"),
        (b'{"text": "a", "role": "system"}', "body.role"),
        (b'{"text": "a", "message_id": "with space"}', "body.message_id"),
        (b'{"text": "a", "message_id": ""}', "body.message_id"),
    ],
)
async def test_a_bad_body_is_invalid(
    alice: httpx.AsyncClient, sessions: MemorySessions, content: bytes, says: str
) -> None:
    session_id = await opened(alice)
    answer = await alice.post(f"/v1/sessions/{session_id}/messages", content=content, headers=JSON)
    assert says in is_problem(answer, 422, "invalid")["detail"]
    assert sessions.all[session_id].records == []


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": "x" * 20_000},
        {str(n): n for n in range(65)},
        {"a": [0] * (MAX_JSON_NODES + 1)},
        {"a": json.loads("[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH)},
        {"a": "\0"},
        [],
    ],
)
async def test_metadata_has_limits(alice: httpx.AsyncClient, metadata: Any) -> None:
    answer = await alice.post("/v1/sessions", json={"metadata": metadata})
    is_problem(answer, 422, "invalid")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_a_body_that_is_not_called_json_is_not_read(
    alice: httpx.AsyncClient, kind: str | None
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = await alice.post("/v1/sessions", content=b"{}", headers=headers)
    is_problem(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=ten",
        "limit=",
        "after=" + "x" * 513,
        "after=nowhere",
    ],
)
async def test_a_bad_list_query_is_invalid(alice: httpx.AsyncClient, query: str) -> None:
    is_problem(await alice.get(f"/v1/sessions?{query}"), 422, "invalid")


async def test_an_unknown_query_parameter_is_ignored(alice: httpx.AsyncClient) -> None:
    assert (await alice.get("/v1/sessions?colour=red")).status_code == 200
    session_id = await opened(alice)
    path = f"/v1/sessions/{session_id}/events?follow=false&colour=red"
    assert (await alice.get(path)).status_code == 200


@pytest.mark.parametrize(
    "query",
    [
        "after=",
        "after=1",
        "after=1.2.x",
        "after=-1.0.0",
        "after=1.2.3.4",
        "after=%201.0.0",
        "after=1_0.0.0",
        "after=" + "9" * 30 + ".0.0",
        "after=%D9%A1.0.0",
        "turn=0",
        "turn=x",
        "turn=99999999999999999999",
        "follow=perhaps",
    ],
)
async def test_a_bad_events_query_is_invalid(alice: httpx.AsyncClient, query: str) -> None:
    session_id = await opened(alice)
    answer = await alice.get(f"/v1/sessions/{session_id}/events?{query}")
    name = query.partition("=")[0]
    assert f"query.{name}" in is_problem(answer, 422, "invalid")["detail"]


async def test_a_bad_last_event_id_is_invalid(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    answer = await alice.get(f"/v1/sessions/{session_id}/events", headers={"Last-Event-ID": "17"})
    is_problem(answer, 422, "invalid")


@pytest.mark.parametrize(
    "session_id",
    [
        "x" * 65,
        "a%20b",
        "a%0d%0aX-Injected:%201",
        "a%00",
        "%F0%9F%98%80",
        "..",
        "%2e%2e",
        "a.b",
        "a%2Fb",
        "%ff",
        "a%0a",
    ],
)
async def test_an_id_that_can_be_none_is_not_found(
    alice: httpx.AsyncClient, session_id: str
) -> None:
    for path in (f"/v1/sessions/{session_id}", f"/v1/sessions/{session_id}/events"):
        answer = await alice.get(path)
        is_problem(answer, 404, "not_found")
        assert "x-injected" not in answer.headers


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/sessions", "GET, POST"),
        ("/v1/sessions/s-1", "DELETE, GET"),
        ("/v1/sessions/s-1/messages", "GET, POST"),
        ("/v1/sessions/s-1/undo", "POST"),
        ("/healthz", "GET"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(
    alice: httpx.AsyncClient, path: str, allowed: str
) -> None:
    answer = await alice.request("PUT", path)
    is_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed
    for method in ("OPTIONS", "PATCH", "TRACE"):
        assert (await alice.request(method, path)).status_code == 405


async def test_head_has_no_body(alice: httpx.AsyncClient) -> None:
    answer = await alice.head("/v1/sessions")
    assert (answer.status_code, answer.content) == (405, b"")


@pytest.mark.parametrize("path", ["/", "/v2", "/v1", "/v1/sessions/", "/docs", "/v1/sessions/a/b"])
async def test_an_unknown_path_is_not_found(alice: httpx.AsyncClient, path: str) -> None:
    is_problem(await alice.get(path), 404, "not_found")


async def test_every_answer_has_the_common_headers(alice: httpx.AsyncClient) -> None:
    session_id = await opened(alice)
    for path in ("/healthz", "/nowhere", f"/v1/sessions/{session_id}/events?follow=false"):
        headers = (await alice.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert len(headers["x-request-id"]) == 32
        assert "access-control-allow-origin" not in headers


class Breaking(MemorySessions):
    """Fails in a way of the test's choice."""

    def __init__(self, failure: Exception) -> None:
        super().__init__()
        self.failure = failure

    async def open(self, who: Principal, command: Open) -> SessionView:
        raise self.failure


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (Unavailable("The cluster did not answer."), 503, "unavailable"),
        (JournalFault("disk /var/secret is full"), 503, "unavailable"),
        (ModelRefused("not meant for the edge: secret"), 500, "internal"),
        (RuntimeError("secret"), 500, "internal"),
        (ExceptionGroup("secret", [ValueError("secret")]), 500, "internal"),
    ],
)
async def test_a_failure_shows_nothing_of_its_inside(
    settings: ServeSettings, tokens: dict[str, str], failure: Exception, status: int, code: str
) -> None:
    with structlog.testing.capture_logs() as lines:
        async with served(Breaking(failure), settings) as url, client(url, tokens["bob"]) as bob:
            answer = await bob.post("/v1/sessions")
    body = is_problem(answer, status, code)
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    if status == 500:
        [line] = [line for line in lines if line["event"] == "request_failed"]
        assert line["error_id"] == body["error_id"] == answer.headers["x-request-id"]
        assert line["exc_info"] is failure
    else:
        assert int(answer.headers["retry-after"]) >= 1


async def test_the_log_has_no_text_no_token_and_no_query(url: str, tokens: dict[str, str]) -> None:
    with structlog.testing.capture_logs() as lines:
        async with client(url, tokens["alice"]) as alice:
            alice.headers["X-HF-Token"] = "hf_secret"
            session_id = await opened(alice, title="secret title")
            await sent(alice, session_id, "echo secret text")
            await alice.get("/v1/sessions?after=secret")
    answered = [line for line in lines if line["event"] == "request_answered"]
    assert [line["status"] for line in answered] == [201, 202, 422]
    assert {line["user_id"] for line in answered} == {"alice"}
    assert "secret" not in repr(lines)
    assert tokens["alice"] not in repr(lines)
