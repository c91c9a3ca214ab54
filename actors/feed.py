"""The feed: where readers wait behind a cursor.

An activation shows facts and deltas here, in order; each gets a live number, rising by one from 1 per
epoch. A bounded ring keeps the newest. A reader asks for the page after its cursor:

- a cursor of this epoch that the ring still covers goes on exactly there;
- any other (from the journal, from an earlier epoch, from too long ago) gets the facts it missed, and
  at the head the live parts' text so far, from offset 0: deltas are addressed, so a repetition is harmless.

Nothing here is lost when nobody reads, and a reader that reads nothing costs nothing: pages are built
when they are asked for. No locks: state changes only between awaits, on the activation's loop.
"""

import asyncio
import json
from collections import deque
from itertools import takewhile
from typing import NamedTuple

from agent.events import (
    AssistantMessage,
    Cursor,
    Delta,
    Frame,
    Page,
    Record,
    SessionClosed,
    TextDelta,
    ToolFinished,
    TurnEnded,
    wire,
)

MAX_PAGE_FRAMES = 256
MAX_PAGE_CHARS = 262_144
"""A page crosses two process borders whole: large enough to be cheap, small enough to be smooth."""
MAX_STORED = 64
"""Records that are read from the journal for a page. Most are small; the longest have 100,000 characters
and more, and what does not fit into the page is read again for the next."""
MAX_RING_CHARS = 4 * 1024 * 1024
"""Of the ring's deltas: what an activation spends on readers that come back."""


class Shown(NamedTuple):
    live: int
    seq: int
    """Of the fact, or of the last fact before the delta."""
    item: Record | Delta


def frame_of(record: Record, cursor: Cursor) -> Frame:
    return Frame(str(cursor), record.fact.type, record.fact.turn, json.dumps(wire(record)))


def delta_frame(delta: Delta, cursor: Cursor) -> Frame:
    event = "text_delta" if isinstance(delta, TextDelta) else "tool_output_delta"
    return Frame(str(cursor), event, delta.turn, json.dumps(delta._asdict()))


def _address(delta: Delta) -> str:
    return delta.part_id if isinstance(delta, TextDelta) else delta.tool_call_id


class _Pieces(NamedTuple):
    """Consecutive deltas of one part: joined when they are read, so that a long part costs its length."""

    first: Delta
    texts: list[str]

    def joined(self) -> Delta:
        return self.first._replace(text="".join(self.texts))


class Feed:
    """What one incarnation shows. Constructed with its epoch and the head it starts from."""

    def __init__(self, epoch: int, head: int, *, ring_events: int) -> None:
        self.epoch = epoch
        self.head = head
        self.closed = False
        self._base = head
        """Every fact after this one is in the ring."""
        self._live = 0
        self._ring: deque[Shown] = deque()
        self._ring_events = ring_events
        self._ring_chars = 0
        self._parts: dict[str, _Pieces] = {}
        """The live parts, each from offset 0."""
        self._changed = asyncio.Event()

    # -- the activation's side ---------------------------------------------------------------

    def show_records(self, records: tuple[Record, ...]) -> None:
        for record in records:
            self.head = record.seq
            self._append(record)
            match record.fact:
                case AssistantMessage(part_id=part) | ToolFinished(tool_call_id=part):
                    self._parts.pop(part, None)
                case TurnEnded(turn=turn):
                    self._parts = {k: p for k, p in self._parts.items() if p.first.turn != turn}
                case _:
                    pass
        self._wake()

    def show_delta(self, delta: Delta) -> None:
        if known := self._parts.get(_address(delta)):
            known.texts.append(delta.text)
        else:
            self._parts[_address(delta)] = _Pieces(delta, [delta.text])
        self._append(delta)
        self._wake()

    def _append(self, item: Record | Delta) -> None:
        self._live += 1
        self._ring.append(Shown(self._live, self.head, item))
        self._ring_chars += 0 if isinstance(item, Record) else len(item.text)
        while len(self._ring) > self._ring_events or self._ring_chars > MAX_RING_CHARS:
            old = self._ring.popleft()
            if isinstance(old.item, Record):
                self._base = old.seq
            else:
                self._ring_chars -= len(old.item.text)

    def close(self) -> None:
        """Wake every reader for the last time: `closed` holds from here on."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- the readers' side -------------------------------------------------------------------

    @property
    def now(self) -> Cursor:
        """The place after everything that was shown."""
        return Cursor(self.head, self.epoch, self._live)

    def covers(self, cursor: Cursor) -> bool:
        """Whether every fact after `cursor` is in here; otherwise read the journal first."""
        return cursor.seq >= self._base

    def page(self, cursor: Cursor, *, turn: int | None = None) -> Page:
        """What was shown after a cursor that the ring covers; empty at the end.

        Consecutive deltas of one part come as one. With `turn`, only that turn's, and `end` with its
        last. A cursor beyond the head waits there: whoever read the journal may have a fact that is
        not shown yet, and would get it again from anywhere before it.
        """
        if cursor.seq > self.head:
            return Page((), cursor)
        exact = self._is_exact(cursor)
        builder = _PageBuilder(cursor, turn)
        for shown in self._after(cursor, exact=exact):
            if builder.full():
                return builder.done()
            if exact:
                builder.add(shown.item, Cursor(shown.seq, self.epoch, shown.live))
            elif isinstance(shown.item, Record):
                # Not an exact place: whoever comes back with it needs the live parts from offset 0.
                builder.add(shown.item, Cursor(shown.seq))
            if builder.end:
                return builder.done()
        if not exact:
            builder.snapshot([part.joined() for part in self._parts.values()], self.now)
        return builder.done()

    def _after(self, cursor: Cursor, *, exact: bool) -> list[Shown]:
        """Of the ring. Looked for from its end, since most readers are near it."""
        newest_first = takewhile(
            lambda shown: shown.live > cursor.live if exact else shown.seq > cursor.seq,
            reversed(self._ring),
        )
        return list(newest_first)[::-1]

    def _is_exact(self, cursor: Cursor) -> bool:
        if cursor.epoch != self.epoch or cursor.live > self._live:
            return False
        oldest = self._ring[0].live if self._ring else self._live + 1
        return cursor.live >= oldest - 1

    async def changed(self, wait_s: float) -> bool:
        """Whether something was shown, or the feed closed, within `wait_s` from now."""
        event = self._changed
        try:
            async with asyncio.timeout(wait_s):
                await event.wait()
        except TimeoutError:
            return False
        return True


class _PageBuilder:
    def __init__(self, cursor: Cursor, turn: int | None) -> None:
        self._cursor = cursor
        self._turn = turn
        self._frames: list[Frame] = []
        self._chars = 0
        self._open: _Pieces | None = None
        """Deltas of one part, not yet a frame."""
        self.end = False

    def full(self) -> bool:
        return len(self._frames) >= MAX_PAGE_FRAMES or self._chars >= MAX_PAGE_CHARS

    def add(self, item: Record | Delta, cursor: Cursor) -> None:
        wanted = self._turn is None or self._turn == _turn_of(item)
        if isinstance(item, Record):
            self._flush()
            if wanted:
                self._push(frame_of(item, cursor))
                self.end = ends(item, self._turn)
        elif wanted:
            self._join(item)
        self._cursor = cursor

    def snapshot(self, parts: list[Delta], now: Cursor) -> None:
        """The live parts. Only the last frame moves the cursor: a reader that lost one before it
        gets them all again."""
        wanted = [part for part in parts if self._turn is None or self._turn == part.turn]
        for part in wanted[:-1]:
            self._push(delta_frame(part, self._cursor))
        self._cursor = now
        for part in wanted[-1:]:
            self._push(delta_frame(part, now))

    def _join(self, delta: Delta) -> None:
        if self._open is not None and _address(self._open.first) == _address(delta):
            self._open.texts.append(delta.text)
        else:
            self._flush()
            self._open = _Pieces(delta, [delta.text])
        self._chars += len(delta.text)

    def _flush(self) -> None:
        if self._open is not None:
            self._push(delta_frame(self._open.joined(), self._cursor))
            self._open = None

    def _push(self, frame: Frame) -> None:
        self._frames.append(frame)
        self._chars += len(frame.data)

    def done(self) -> Page:
        self._flush()
        return Page(tuple(self._frames), self._cursor, self.end)


def _turn_of(item: Record | Delta) -> int:
    return item.fact.turn if isinstance(item, Record) else item.turn


def ends(record: Record, turn: int | None) -> bool:
    """Whether nothing can follow this fact for a reader of `turn` (None: of the session)."""
    match record.fact:
        case SessionClosed():
            return True
        case TurnEnded(turn=ended):
            return ended == turn
        case _:
            return False


def page_of(records: tuple[Record, ...], cursor: Cursor, turn: int | None) -> Page:
    """A page of facts straight from the journal, after `cursor`: of as many of `records` as fit."""
    frames: list[Frame] = []
    n_chars = 0
    for record in records:
        if n_chars >= MAX_PAGE_CHARS:
            break
        cursor = Cursor(record.seq)
        if turn is None or record.fact.turn == turn:
            frames.append(frame_of(record, cursor))
            n_chars += len(frames[-1].data)
        if ends(record, turn):
            return Page(tuple(frames), cursor, end=True)
    return Page(tuple(frames), cursor)
