"""The SSE reader against a real HTTP server on loopback that plays scripted responses."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from serve_app.sse_client import MAX_EVENT_CHARS, Event, EventReader, Lines, Lost, Problem


class Seen(NamedTuple):
    last_event_id: str | None
    query: dict[str, list[str]]


class Reply(NamedTuple):
    body: str = ""
    status: int = 200
    torn: bool = False
    """The connection breaks before the announced end of the body."""
    headers: dict[str, str] = {}


class Served(NamedTuple):
    http: httpx.Client
    seen: list[Seen]


@contextmanager
def serving(*replies: Reply) -> Iterator[Served]:
    """Each request takes the next reply; a request too many is answered 410."""
    script, seen = list(replies), list[Seen]()

    class Script(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            seen.append(Seen(self.headers.get("Last-Event-ID"), query))
            reply = script.pop(0) if script else Reply(problem("gone"), 410)
            body = reply.body.encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) + reply.torn))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}") as http:
            yield Served(http, seen)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def sse(cursor: str, kind: str, **data: Any) -> str:
    return f"id: {cursor}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"


def problem(code: str, **fields: Any) -> str:
    return json.dumps({"code": code, "detail": f"{code} it is", **fields})


class Pauses(list[float]):
    """A clock that only writes down how long it was asked to wait."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


ENDED = sse("4.1.9", "turn_ended", turn=1, reason="done")


def test_events_carry_cursor_type_and_data() -> None:
    with serving(Reply(sse("3.1.2", "user_message", turn=1, text="ä\nb") + ENDED)) as (http, _):
        events = list(EventReader(http, "/e").events(turn=1))
    assert events[0] == Event("3.1.2", "user_message", {"turn": 1, "text": "ä\nb"})
    assert [event.type for event in events] == ["user_message", "turn_ended"]


def test_heartbeats_and_unknown_fields_are_no_events() -> None:
    body = ": heartbeat\n\nretry: 50\n\nnonsense\n\n" + ENDED
    with serving(Reply(body)) as (http, _):
        assert [event.type for event in EventReader(http, "/e").events(turn=1)] == ["turn_ended"]


def test_a_torn_stream_is_reopened_from_the_last_cursor() -> None:
    first = Reply(sse("2.1.1", "user_message", turn=1) + "id: 3.1.2\nevent: tool_st", torn=True)
    with serving(first, Reply(ENDED)) as (http, seen):
        events = list(EventReader(http, "/e", cursor="1.1.0", pause=Pauses()).events(turn=1))
    assert [event.cursor for event in events] == ["2.1.1", "4.1.9"]
    assert [request.last_event_id for request in seen] == ["1.1.0", "2.1.1"]
    assert seen[1].query["turn"] == ["1"]


def test_a_response_that_the_server_cut_is_reopened_at_once() -> None:
    cut = Reply(sse("2.1.1", "activated") + ": reconnect\n\n")
    pauses = Pauses()
    with serving(cut, Reply(": reconnect\n\n"), Reply(ENDED)) as (http, seen):
        events = list(EventReader(http, "/e", patience_s=0, pause=pauses).events(turn=1))
    assert len(events) == 2
    assert [request.last_event_id for request in seen] == [None, "2.1.1", "2.1.1"]
    assert pauses == []


def test_a_stream_that_ends_again_and_again_with_nothing_is_over() -> None:
    """The turn had ended before the cursor, or a proxy went away: asking twice more tells."""
    pauses = Pauses()
    with serving(*[Reply("retry: 1000\n\n")] * 9) as (http, seen):
        assert list(EventReader(http, "/e", cursor="9.1.9", pause=pauses).events(turn=1)) == []
    assert len(seen) == 3


def test_a_stream_that_ended_early_once_goes_on() -> None:
    quiet = Reply(": heartbeat\n\n")
    with serving(Reply(sse("2.1.1", "activated")), quiet, Reply(ENDED)) as (http, _):
        events = EventReader(http, "/e", pause=Pauses()).events(turn=1)
        assert [event.cursor for event in events] == ["2.1.1", "4.1.9"]


def test_another_turns_end_does_not_end_the_stream() -> None:
    with serving(Reply(ENDED + sse("9.1.9", "turn_ended", turn=2, reason="done"))) as (http, _):
        assert [event.cursor for event in EventReader(http, "/e").events(turn=2)] == [
            "4.1.9",
            "9.1.9",
        ]


def test_a_closed_session_ends_a_stream_without_a_turn() -> None:
    body = ENDED + sse("7.1.9", "session_closed", reason="asked")
    with serving(Reply(body)) as (http, seen):
        assert len(list(EventReader(http, "/e").events())) == 2
    assert len(seen) == 1


def test_without_follow_the_head_ends_the_stream() -> None:
    with serving(Reply(sse("2.1.1", "activated"))) as (http, seen):
        assert len(list(EventReader(http, "/e").events(follow=False))) == 1
    assert seen[0].query["follow"] == ["false"]


def test_without_follow_a_cut_response_is_still_reopened() -> None:
    cut = Reply(sse("2.1.1", "activated") + ": reconnect\n\n")
    with serving(cut, Reply(sse("3.1.1", "passivated"))) as (http, _):
        assert len(list(EventReader(http, "/e").events(follow=False))) == 2


def test_a_reader_torn_away_inside_an_event_sees_it_again() -> None:
    body = sse("2.1.1", "activated") + ENDED
    with serving(Reply(body), Reply(body)) as (http, _):
        reader = EventReader(http, "/e", cursor="1.1.0")
        stream = reader.events(turn=1)
        next(stream)
        stream.close()
        assert reader.cursor == "1.1.0"
        assert [event.cursor for event in reader.events(turn=1)] == ["2.1.1", "4.1.9"]
        assert reader.cursor == "4.1.9"


def test_a_refusal_is_a_problem_with_its_code() -> None:
    refusal = Reply(problem("not_found"), 404)
    with serving(refusal) as (http, seen), pytest.raises(Problem) as caught:
        list(EventReader(http, "/e").events())
    assert (caught.value.status, caught.value.code) == (404, "not_found")
    assert caught.value.detail == "not_found it is"
    assert len(seen) == 1


def test_an_answer_that_is_no_problem_document_still_says_something() -> None:
    with serving(Reply("<html>", 404)) as (http, _), pytest.raises(Problem) as caught:
        list(EventReader(http, "/e").events())
    assert caught.value.code == "http_404"
    assert caught.value.detail


def test_a_busy_server_is_asked_again_when_it_says() -> None:
    busy = Reply(problem("unavailable", retry_after_s=2.5), 503)
    pauses = Pauses()
    with serving(busy, Reply(ENDED)) as (http, _):
        assert len(list(EventReader(http, "/e", pause=pauses).events(turn=1))) == 1
    assert pauses == [2.5]


def test_a_proxy_without_routes_is_asked_again() -> None:
    said = "Path '/e' not found. Ping http://.../-/routes for available routes."
    pauses = Pauses()
    with serving(Reply(said, 404), Reply(ENDED)) as (http, _):
        assert len(list(EventReader(http, "/e", pause=pauses).events(turn=1))) == 1
    assert pauses == [0.1]


def test_patience_ends_when_nothing_is_heard() -> None:
    busy = Reply(problem("unavailable"), 503)
    pauses = Pauses()
    with serving(*[busy] * 20) as (http, seen), pytest.raises(Lost):
        list(EventReader(http, "/e", patience_s=3, pause=pauses).events())
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert len(seen) == 6


def test_an_event_without_end_is_refused() -> None:
    lines = Lines()
    half = "data: " + "x" * (MAX_EVENT_CHARS // 2)
    assert lines.feed(half) is None
    assert lines.feed(half) is None
    with pytest.raises(Lost):
        lines.feed("data: x")


def test_data_that_is_no_json_is_refused() -> None:
    lines = Lines()
    lines.feed("data: <html>")
    with pytest.raises(Lost):
        lines.feed("")
