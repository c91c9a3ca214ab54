"""The feed: whatever a reader does, it gets every fact once and text without a gap."""

import asyncio
import json
import random
from datetime import UTC, datetime

import pytest

from actors.feed import MAX_PAGE_FRAMES, Feed, page_of
from agent.events import (
    AssistantMessage,
    Cursor,
    Delta,
    Fact,
    PlanUpdated,
    Record,
    SessionClosed,
    TextDelta,
    ToolFinished,
    ToolOutputDelta,
    TurnEnded,
)
from tests.support.reader import Reader

AT = datetime(2026, 1, 1, tzinfo=UTC)
EPOCH = 3


class Session:
    """A journal and the feed over it, as an activation keeps them."""

    def __init__(self, *, stored: int = 0, ring_events: int = 64) -> None:
        self.records = [Record(n, 1, AT, PlanUpdated(items=())) for n in range(1, stored + 1)]
        self.feed = Feed(EPOCH, stored, ring_events=ring_events)

    def fact(self, fact: Fact) -> None:
        record = Record(len(self.records) + 1, EPOCH, AT, fact)
        self.records.append(record)
        self.feed.show_records((record,))

    def text(self, part: str, offset: int, text: str, turn: int = 1) -> None:
        self.feed.show_delta(TextDelta(turn, part, offset, text))

    def read(self, reader: Reader, turn: int | None = None) -> bool:
        """One page; whether the stream ended."""
        if self.feed.covers(reader.cursor):
            page = self.feed.page(reader.cursor, turn=turn)
        else:
            after = reader.cursor.seq
            page = page_of(tuple(self.records[after : after + 5]), reader.cursor, turn)
        for frame in page.frames:
            reader.take(frame)
            # A client keeps the cursor of the last frame it got.
            reader.cursor = Cursor.parse(frame.cursor)
        reader.cursor = page.cursor
        return page.end

    def read_all(self, reader: Reader, turn: int | None = None) -> bool:
        before = None
        while before != reader.cursor:
            before = reader.cursor
            if self.read(reader, turn):
                return True
        return False


def message(part: str, text: str, turn: int = 1) -> AssistantMessage:
    return AssistantMessage(turn=turn, part_id=part, text=text, finish_reason="stop", model="m")


def finished(call: str, turn: int = 1) -> ToolFinished:
    return ToolFinished(turn=turn, tool_call_id=call, tool="t", outcome="ok", text="")


def test_a_reader_that_keeps_up_sees_facts_and_deltas_in_order() -> None:
    session, reader = Session(), Reader()
    session.text("p", 0, "Hel")
    session.read(reader)
    session.text("p", 3, "lo")
    session.fact(message("p", "Hello"))
    session.read_all(reader)
    assert reader.parts == {"p": "Hello"}
    assert reader.types() == ["assistant_message"]
    assert not reader.gaps


def test_consecutive_deltas_of_a_part_come_as_one() -> None:
    session = Session()
    for n, char in enumerate("abcdef"):
        session.text("p", n, char)
    page = session.feed.page(Cursor(0, EPOCH, 0))
    assert [json.loads(f.data)["text"] for f in page.frames] == ["abcdef"]


def test_a_late_reader_gets_the_missed_facts_and_the_live_text_from_its_start() -> None:
    session, reader = Session(stored=12), Reader()
    session.text("p", 0, "Hel")
    session.fact(finished("c"))
    session.text("p", 3, "lo")
    session.read_all(reader)
    assert [fact["seq"] for fact in reader.facts] == list(range(1, 14))
    assert reader.parts == {"p": "Hello"}
    assert not reader.gaps


def test_a_cursor_of_an_earlier_epoch_gets_the_live_text_again() -> None:
    session, reader = Session(stored=4), Reader()
    reader.cursor = Cursor(4, EPOCH - 1, 977)
    session.text("p", 0, "Hello")
    session.read_all(reader)
    assert reader.parts == {"p": "Hello"}
    assert reader.facts == []


def test_who_read_a_fact_in_the_journal_before_it_was_shown_does_not_get_it_again() -> None:
    session, reader = Session(stored=1), Reader()
    session.read_all(reader)
    record = Record(2, EPOCH, AT, PlanUpdated(items=()))
    session.records.append(record)
    for frame in page_of((record,), reader.cursor, None).frames:
        reader.take(frame)
    reader.cursor = Cursor(2)
    session.read_all(reader)
    session.feed.show_records((record,))
    session.text("p", 0, "and on")
    session.read_all(reader)
    session.fact(TurnEnded(turn=1, reason="done"))
    session.read_all(reader)
    assert [fact["seq"] for fact in reader.facts] == [1, 2, 3]
    assert reader.parts == {"p": "and on"}


def test_a_reader_of_one_turn_sees_that_turn_to_its_end() -> None:
    session, reader = Session(), Reader()
    reader.cursor = Cursor(0, EPOCH, 0)
    session.text("a", 0, "one", turn=1)
    session.fact(message("a", "one", turn=1))
    session.fact(TurnEnded(turn=1, reason="done"))
    session.text("b", 0, "two", turn=2)
    session.fact(message("b", "two", turn=2))
    session.fact(TurnEnded(turn=2, reason="done"))
    session.fact(PlanUpdated(turn=3, items=()))
    assert session.read_all(reader, turn=2)
    assert reader.parts == {"b": "two"}
    assert reader.types() == ["assistant_message", "turn_ended"]


def test_the_stream_of_a_closed_session_ends() -> None:
    session, reader = Session(), Reader()
    session.fact(SessionClosed())
    assert session.read_all(reader)


def test_an_abandoned_part_is_not_shown_to_newcomers() -> None:
    session, reader = Session(), Reader()
    session.text("lost", 0, "Hel")
    session.fact(TurnEnded(turn=1, reason="failed"))
    session.read_all(reader)
    assert reader.parts == {}


def test_a_page_is_bounded() -> None:
    session = Session(ring_events=5000)
    for _ in range(MAX_PAGE_FRAMES * 2):
        session.fact(PlanUpdated(items=()))
    page = session.feed.page(Cursor(0, EPOCH, 0))
    assert len(page.frames) == MAX_PAGE_FRAMES
    assert page.cursor.seq == MAX_PAGE_FRAMES


async def test_a_waiting_reader_is_woken_by_a_delta_and_by_the_end() -> None:
    session = Session()
    waiting = asyncio.create_task(session.feed.changed(5))
    await asyncio.sleep(0)
    session.text("p", 0, "x")
    assert await waiting
    waiting = asyncio.create_task(session.feed.changed(5))
    await asyncio.sleep(0)
    session.feed.close()
    assert await waiting
    assert not await session.feed.changed(0.01)


@pytest.mark.parametrize("seed", range(60))
def test_readers_that_come_and_go_at_random_lose_nothing(seed: int) -> None:
    """Seeded schedules: a writer with several live parts, readers that read at any time, drop the
    rest of a page and come back with the last cursor they got."""
    rng = random.Random(seed)
    session = Session(stored=rng.randrange(12), ring_events=rng.choice([16, 40, 4096]))
    readers = [Reader() for _ in range(3)]
    live: dict[str, str] = {}
    done: dict[str, str] = {}
    for step in range(300):
        action = rng.random()
        if action < 0.5:
            part = rng.choice([*live, f"p{step}", f"c{step}"][:4])
            piece = rng.choice("abcdefgh") * rng.randrange(1, 4)
            old = live.get(part, "")
            delta: Delta = (
                TextDelta(1, part, len(old), piece)
                if part.startswith("p")
                else ToolOutputDelta(1, part, len(old), piece)
            )
            session.feed.show_delta(delta)
            live[part] = old + piece
        elif action < 0.7 and live:
            part = rng.choice(list(live))
            done[part] = live.pop(part)
            session.fact(message(part, done[part]) if part.startswith("p") else finished(part))
        else:
            reader = rng.choice(readers)
            if session.feed.covers(reader.cursor):
                page = session.feed.page(reader.cursor)
            else:
                after = reader.cursor.seq
                page = page_of(tuple(session.records[after : after + 5]), reader.cursor, None)
            kept = rng.randrange(len(page.frames) + 1)
            for frame in page.frames[:kept]:
                reader.take(frame)
                reader.cursor = Cursor.parse(frame.cursor)
            if kept == len(page.frames):
                reader.cursor = page.cursor
    for reader in readers:
        session.read_all(reader)
        assert [fact["seq"] for fact in reader.facts] == [r.seq for r in session.records]
        assert not reader.gaps
        for part, text in live.items():
            assert reader.parts[part] == text
