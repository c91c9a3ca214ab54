"""One incarnation of a session: journal, context, turn task and feed on one loop.

`SessionActor` hosts it on Ray, `LocalSessions` in one process; neither adds behaviour. State changes
only in `_commit_in_order`, which is the one place where order is kept across an await: it validates,
writes, folds and shows under one lock. What waits there meanwhile goes with the next write, in one
transaction. Everything else happens between awaits.

The turn task and every commit run detached from requests (`actors.detached`).
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, Literal, NamedTuple, Self

import structlog

from actors.commands import Repeated, answered, fact_of, remembered
from actors.detached import Detached
from actors.feed import MAX_STORED, Feed, page_of
from actors.keeping import Keeping
from actors.kit import Kit
from actors.places import Places
from actors.protocol import (
    Accepted,
    AnyCommand,
    Close,
    Moved,
    NotFound,
    Principal,
    Unavailable,
)
from actors.quotas import charge
from agent.checkpoint import checkpoint_due, replayed
from agent.context import Answer, Context
from agent.events import (
    Activated,
    Command,
    Cursor,
    Delta,
    Fact,
    InterruptRequested,
    ModelSwitched,
    Page,
    Passivated,
    PassivationReason,
    Record,
    SandboxClosed,
    SandboxOpened,
    SeedRequested,
    SessionClosed,
)
from agent.faults import Fault, Fenced, JournalFault, MessageKnown, ModelFault, NoSuchSession
from agent.journal import read_all
from agent.loop import advance
from agent.model.contract import Model
from agent.owed import Rest
from agent.sandbox.contract import Sandbox
from agent.tools.contract import Tools
from agent.trace import trajectory, write_trajectory

Change = Literal["busy", "rested", "lost"]
"""`lost`: it cannot go on (fenced, or the journal failed)."""


class Report(NamedTuple):
    """What an activation tells its desk. Reports may overtake each other: `n` says which is newer."""

    session_id: str
    epoch: int
    n: int
    """Rises by one per activation, from 1."""
    change: Change


log = structlog.get_logger()

MAX_STRETCH_CHARS = 1024 * 1024
"""Pages of one call, plus one page: then the edge looks again where the session lives."""
MAX_COMMANDS = 256
"""Of one session that are being written; whoever asks and leaves is counted until that is done."""
WATCHED_S = 30.0
"""After the last reader left, or a command came, an answer is still streamed: readers come back with their
cursor (`Activation.pages`), and who asks by hand looks next."""
CARD_WAIT_S = 5.0
"""For the facts about a model. Without them a default window stands."""


@dataclass(eq=False)
class Commit:
    """What one caller wants written, and what became of it where another's write took it along."""

    facts_of: Callable[[], Sequence[Fact]]
    """The facts, when their turn has come."""
    joins: bool
    """They are the same whatever is written before them."""
    records: tuple[Record, ...] | None = None
    fault: JournalFault | None = None


class Activation:
    """Hosts one session while it lives here. Implements `agent.loop.Run`."""

    def __init__(self, kit: Kit, session_id: str, tell: Callable[[Report], None]) -> None:
        self._kit = kit
        self._tell = tell
        self.n_reports = 0
        self.session_id = session_id
        self.model: Model = kit.model
        self.tools: Tools
        self.context: Context
        self.feed: Feed
        self.keeping: Keeping
        self.user_token: str | None = None
        self._tasks = Detached()
        self._commits = asyncio.Lock()
        self._checkpoint_seq = 0
        self.waiting: deque[Commit] = deque()
        """For the lock, in order. Bounded by the callers: each awaits its own."""
        self._turn_task: asyncio.Task[None] | None = None
        self._step: asyncio.Task[None] | None = None
        self._sandbox: asyncio.Task[Sandbox] | None = None
        self._leaving = False
        self._pausing = False
        self._deleted = False
        self._measured_model: str | None = None
        self._readers = Places(kit.actors.max_readers, "readers are here")
        self._commands = Places(MAX_COMMANDS, "commands wait for the journal")
        self._seen_s = kit.now_s()
        """When somebody was here last. Whoever takes a session up does that for somebody."""
        self._log = log.bind(session_id=session_id)

    @classmethod
    async def open(
        cls,
        kit: Kit,
        session_id: str,
        tell: Callable[[Report], None],
        *,
        user_token: str | None = None,
        begun: Sequence[Record] = (),
    ) -> Self:
        """Take the session and settle what the incarnation before left open. `begun` is all of a session
        that was made for this incarnation, in the epoch of its records.

        Raises:
            NoSuchSession, JournalFault
            Moved: the session is closed.
        """
        self = cls(kit, session_id, tell)
        self.user_token = user_token
        epoch = begun[-1].epoch if begun else await kit.journal.fence(session_id)
        if begun:
            self.context = self._new_context()
            self.context.fold(begun)
        else:
            self.context, self._checkpoint_seq = await replayed(
                kit.journal, session_id, self._new_context
            )
        self.tools = kit.tools(self.context.spec)
        if self.context.closed:
            raise Moved("The session is closed.")
        self.context.epoch = epoch
        self.feed = Feed(epoch, self.context.head, ring_events=kit.actors.ring_events)
        self.keeping = Keeping(kit, self.context, self._tasks, self.commit)
        self._log = self._log.bind(epoch=epoch)
        if begun:
            self._kick()
            return self
        was_open = self.context.sandbox_open
        lost = [SandboxClosed(reason="lost", unsaved=True)] if was_open else []
        activated = Activated(epoch=epoch, reason=self._why(epoch))
        await self.commit(*lost, activated, *self._given_up(activated))
        return self

    def _new_context(self) -> Context:
        window_tokens = self._kit.agent.model.default_window_tokens
        return Context(self._is_idempotent, window_tokens)

    def _is_idempotent(self, tool: str) -> bool:
        return self.tools.idempotent(tool)  # which are known when the session's spec is

    def _given_up(self, activated: Activated) -> list[Fact]:
        """The end of a turn under which the process died too often: it may be what kills."""
        limits = self._kit.actors
        since = self._kit.utc_now() - timedelta(seconds=limits.recovery_window_s)
        n_deaths = sum(at > since for at in self.context.recovered_at) + 1
        is_due = activated.reason == "recovered" and self.context.turn is not None
        if not is_due or n_deaths <= limits.max_recoveries:
            return []
        return self.context.abandon(
            "recovery_exhausted",
            f"The process that ran this turn died {n_deaths} times in a short time,"
            " so the turn was not taken up again. It may be what ends the process.",
        )

    def _why(self, epoch: int) -> Literal["opened", "woken", "recovered"]:
        if epoch == 1:
            return "opened"
        return "woken" if self.context.rested_by else "recovered"

    # -- commits -----------------------------------------------------------------------------

    async def commit(self, *facts: Fact) -> None:
        await self._commit(lambda: facts, joins=True)

    async def commit_by(self, facts_of: Callable[[], Sequence[Fact]]) -> None:
        await self._commit(facts_of)

    async def _commit(
        self, facts_of: Callable[[], Sequence[Fact]], *, joins: bool = False
    ) -> tuple[Record, ...]:
        """Commit what `facts_of` says when its turn has come; it may raise to refuse."""
        own = Commit(facts_of, joins)
        self.waiting.append(own)
        work = self._tasks.start(self._commit_in_order(own), name="commit")
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # The facts are on their way, all or none: who goes on after this must see which.
            await asyncio.wait({work})
            raise

    async def _commit_in_order(self, own: Commit) -> tuple[Record, ...]:
        async with self._commits:
            if own.fault is not None:
                raise own.fault
            if own.records is not None:
                return own.records
            self.waiting.remove(own)
            facts = own.facts_of()
            if not facts:
                return ()
            company = self._company()
            try:
                return await self._write(facts, company)
            except (MessageKnown, ValueError):
                # Nothing was written, and it may be one alone that is refused: each for itself.
                if not company:
                    raise
                self.waiting.extendleft(reversed(company))
                return await self._write(facts, [])

    def _company(self) -> list[Commit]:
        """The commits that wait next in line and may go with the one before them."""
        company: list[Commit] = []
        while self.waiting and self.waiting[0].joins:
            company.append(self.waiting.popleft())
        return company

    async def _write(self, facts: Sequence[Fact], company: Sequence[Commit]) -> tuple[Record, ...]:
        """Append, fold and show; the records of `facts`. Those who come along find theirs."""
        parts = [facts, *(each.facts_of() for each in company)]
        together = [fact for part in parts for fact in part]
        try:
            records = await self._append(together)
        except MessageKnown:
            raise
        except JournalFault as fault:
            for each in company:
                each.fault = fault
            self._lose(fault)
            raise
        rest = iter(records)
        own, *others = (tuple(islice(rest, len(part))) for part in parts)
        for each, written in zip(company, others, strict=True):
            each.records = written
        await self._fold(records)
        self.feed.show_records(records)
        # Here and not in the caller: who asked may have left by now, and the facts count.
        if any(isinstance(record.fact, InterruptRequested) for record in records):
            self._interrupt_step()
        self._kick()
        return own

    async def _append(self, facts: Sequence[Fact]) -> tuple[Record, ...]:
        due = checkpoint_due(self.context, self._checkpoint_seq)
        records = await self._kit.journal.append(self.session_id, self.context.epoch, facts, due)
        if due is not None:
            self._checkpoint_seq = due.seq
        return records

    async def _fold(self, records: Sequence[Record]) -> None:
        self.context.fold(records)
        if self.context.is_short:
            try:
                everything = await read_all(self._kit.journal, self.session_id)
            except JournalFault as fault:
                self._lose(fault)
                raise
            self.context.fold_anew(everything)

    def _lose(self, fault: Fault) -> None:
        """This incarnation is over, without a last fact: another one owns the session, or nobody can
        say what the journal holds."""
        if not self._leaving:
            self._leaving = True
            self._log.warning("activation_lost", code=fault.code)
            self._report("lost")
            self._tasks.start(self._stop(), name="lost")

    async def _stop(self) -> None:
        """A lost incarnation ends what it runs at once: another one may be at the same work."""
        try:
            await self._stop_turn()
            await self.keeping.stop()
            await self._close_sandbox()
        except Unavailable:
            self._log.warning("lost_activation_does_not_stop")
        finally:
            self.feed.close()

    async def check_epoch(self) -> None:
        """Find out whether this is still the session's newest incarnation; end if it is not."""
        try:
            row = await self._kit.journal.row(self.session_id)
        except NoSuchSession as fault:
            self._lose(fault)
        except JournalFault as fault:
            self._log.warning("epoch_not_checked", code=fault.code)
        else:
            if row.epoch != self.context.epoch:
                self._lose(Fenced("Another incarnation owns this session."))

    def _report(self, change: Change) -> None:
        self.n_reports += 1
        self._tell(Report(self.session_id, self.context.epoch, self.n_reports, change))

    def show(self, delta: Delta) -> None:
        self.feed.show_delta(delta)

    def now_s(self) -> float:
        return self._kit.now_s()

    def is_pausing(self) -> bool:
        return self._pausing

    def is_watched(self) -> bool:
        return self._readers.n_taken > 0 or self.now_s() - self._seen_s < WATCHED_S

    # -- commands ----------------------------------------------------------------------------

    async def submit(self, who: Principal, command: AnyCommand) -> Accepted:
        """Carry out a command. See `actors.protocol.Sessions.submit`.

        Raises:
            Moved: the session is leaving or has left; nothing was written.
        """
        self._check_owner(who)
        self._seen_s = self.now_s()
        if isinstance(command, Close):
            return await self._tasks.carry_out(lambda: self._close(command), name="close")
        try:
            with self._commands.taken():
                fact = self._fact_of(command)
                await self._charge(fact)
                records = await self._commit(lambda: [self._fact_of(command)])
        except Repeated as repeated:
            return repeated.answer
        except Fault as refused:
            if (earlier := await self._earlier_answer(command, refused)) is None:
                raise
            return earlier
        [record] = records
        return Accepted(record.fact.turn, str(Cursor(record.seq)), _n_messages(record.fact))

    async def _earlier_answer(self, command: AnyCommand, refused: Fault) -> Accepted | None:
        """What a command was answered so long ago that the context does not remember. None: it is new,
        or the journal failed, which says nothing."""
        is_known = isinstance(refused, MessageKnown)
        is_lost = isinstance(refused, JournalFault | Moved) and not is_known
        has_forgotten = self.context.n_answers > len(self.context.answers)
        if command.message_id is None or is_lost or not (is_known or has_forgotten):
            return None
        record = await self._kit.journal.command(self.session_id, command.message_id)
        return answered(Answer.of(record), command) if record else None

    def _check_owner(self, who: Principal) -> None:
        if self._deleted or who.user_id != self.context.opened.user_id:
            raise NotFound("There is no such session.")

    def _fact_of(self, command: AnyCommand) -> Command:
        if self._leaving and not remembered(self.context, command):
            raise Moved("The session is leaving.")
        return fact_of(self.context, command, max_queued=self._kit.actors.max_queued_turns)

    async def _charge(self, fact: Command) -> None:
        """Count the session against the quotas of the model that the command sets to work.

        Raises:
            QuotaExceeded
        """
        opens_turn = fact.turn > self.context.n_turns
        if isinstance(fact, ModelSwitched):
            model, is_due = fact.model, self.context.turn is not None
        else:
            model, is_due = self.context.model, opens_turn
        if is_due:
            await charge(self._kit, self.context.opened.user_id, self.session_id, model)

    # -- the turn ----------------------------------------------------------------------------

    def _kick(self) -> None:
        """Start the turn task if something is owed and nobody is at it."""
        if (
            self._turn_task
            or self._leaving
            or self._pausing
            or isinstance(self.context.owed(), Rest)
        ):
            return
        self._turn_task = self._tasks.start(self._advance(), name="turn")

    async def _advance(self) -> None:
        self._report("busy")
        try:
            await self.interruptible(self._measure_window())
            await advance(self)
        except JournalFault as fault:
            self._lose(fault)
        except Exception:  # noqa: BLE001 - a defect of ours must end the turn, not leave it open
            self._log.exception("turn_failed")
            await self._abandon()
        finally:
            self._turn_task = None
        if not self._leaving:
            self._report("rested")
            if self._sandbox is not None:
                self.keeping.save_soon()
            self._kick()

    async def _abandon(self) -> None:
        """End the turn after a defect of ours: the session stays usable."""
        try:
            await self._commit(
                lambda: self.context.abandon("internal", "Something failed inside Troupe.")
            )
        except JournalFault as fault:
            self._lose(fault)

    async def _measure_window(self) -> None:
        if self._measured_model == self.context.model:
            return
        try:
            async with asyncio.timeout(CARD_WAIT_S):
                card = await self.model.card(self.context.model)
        except (ModelFault, TimeoutError):
            # The default stands; if the model is really out of reach, its call will say so.
            self._log.warning("window_unknown", model=self.context.model)
            return
        self.context.window_tokens = card.window_tokens
        self._measured_model = self.context.model

    async def interruptible(self, step: Coroutine[Any, Any, None]) -> None:
        self._step = self._tasks.start(step, name="step")
        try:
            await self._step
        except asyncio.CancelledError:
            if not self._step.cancelled() or self._is_ending():
                raise
        finally:
            self._step = None

    def _is_ending(self) -> bool:
        """Whether it is the turn task itself that was cancelled, not only its step."""
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    def _interrupt_step(self) -> None:
        if self._step is not None:
            self._step.cancel()

    async def sandbox(self) -> Sandbox:
        if self._sandbox is None or (self._sandbox.done() and self._sandbox.exception()):
            self._sandbox = self._tasks.start(self._open_sandbox(), name="sandbox")
        return await asyncio.shield(self._sandbox)

    async def _open_sandbox(self) -> Sandbox:
        began_s = self.now_s()
        workspace = self._kit.workspace(self.session_id)
        restored = await self.keeping.restore()
        sandbox = await self._kit.open_sandbox(
            self.context.spec.sandbox,
            workspace,
            session_id=self.session_id,
            epoch=self.context.epoch,
        )
        latency_ms = round((self.now_s() - began_s) * 1000)
        async with AsyncExitStack() as unless_told:
            unless_told.push_async_callback(sandbox.close)
            turn = self.context.open_turns[0] if self.context.open_turns else 0
            opened = SandboxOpened(turn=turn, kind=sandbox.kind, latency_ms=latency_ms)
            await self.commit(*restored, opened)
            unless_told.pop_all()
        return sandbox

    # -- the end of an incarnation -----------------------------------------------------------

    @property
    def is_leaving(self) -> bool:
        """Whether commands are refused as Moved from here on."""
        return self._leaving

    def is_busy(self) -> bool:
        return bool(self.context.open_turns) or self._commits.locked()

    async def passivate(self, reason: PassivationReason) -> bool:
        """Leave, so that the session may live elsewhere later. False: it is busy, nothing changed.

        A shutdown or a roll takes a busy one too, between two steps or once `drain_s` is over: an
        open turn goes on in the next incarnation.
        """
        forced = reason in {"shutdown", "rolled"}
        if self._leaving or (not forced and self.is_busy()):
            return False
        self._pausing = forced
        if self._turn_task:
            await asyncio.wait({self._turn_task}, timeout=self._kit.actors.drain_s)
        if self._leaving:
            return False
        self._leaving = True
        await self._stop_turn()
        await self._tasks.carry_out(lambda: self._leave(Passivated(reason=reason)), name="leave")
        if reason == "shutdown":
            await self.write_trajectory()
        return True

    async def _leave(self, *last: Fact) -> None:
        """Close the sandbox, save the workspace, commit the last facts, send the readers away."""
        closed: list[Fact] = []
        if await self._close_sandbox():
            is_saved = await self.keeping.save_last(self._kit.actors.close_wait_s)
            reason = last[-1].model_dump()["reason"]
            closed = [SandboxClosed(reason=reason, unsaved=not is_saved)]
        try:
            await self.commit(*closed, *last)
        finally:
            self.feed.close()

    async def _close_sandbox(self) -> bool:
        """Whether one was open."""
        opening, self._sandbox = self._sandbox, None
        if opening is None:
            return False
        await self._in_time({opening})
        if opening.cancelled() or opening.exception():
            return False
        closing = self._tasks.start(opening.result().close(), name="close sandbox")
        await self._in_time({closing})
        return self.context.sandbox_open

    async def _stop_turn(self) -> None:
        """End the turn task where it is: an open turn stays open in the journal."""
        if self._turn_task is not None:
            self._turn_task.cancel()
            await self._in_time({self._turn_task})

    async def _in_time(self, tasks: set[asyncio.Task[Any]]) -> None:
        """
        Raises:
            Unavailable: they did not end in `close_wait_s`; in a process of its own, the process goes.
        """
        _, late = await asyncio.wait(tasks, timeout=self._kit.actors.close_wait_s)
        if late:
            raise Unavailable("The session does not come to rest.", retry_after_s=5)

    async def _close(self, command: Close) -> Accepted:
        """Interrupt every open turn, come to rest, write the last fact and the trajectory."""

        def interrupts() -> list[Fact]:
            self._fact_of(command)
            return [InterruptRequested(turn=turn) for turn in self.context.open_turns]

        try:
            await self._commit(interrupts)
        except Repeated as repeated:
            return repeated.answer
        if self._turn_task is not None:
            await self._in_time({self._turn_task})
        if self._leaving or self.context.open_turns:
            raise Moved("The session is leaving.")
        self._leaving = True
        await self._leave(SessionClosed(message_id=command.message_id))
        await self.write_trajectory()
        return Accepted(0, str(Cursor(self.context.head)))

    async def write_trajectory(self) -> None:
        """Best effort: everything is in the journal, from which it can be made again."""
        try:
            await self._write_trajectory()
        except (OSError, JournalFault):
            self._log.exception("trajectory_not_written")

    async def _write_trajectory(self) -> None:
        records = await read_all(self._kit.journal, self.session_id)
        secrets = [self.user_token] if self.user_token else []
        made = await asyncio.to_thread(
            trajectory, records, tools=self.tools.schemas(), secrets=secrets
        )
        await asyncio.to_thread(write_trajectory, self._kit.trajectory_path(self.session_id), made)

    async def end(self, *, deleted: bool = False) -> None:
        """End whatever still runs here, at once and without a last fact. Idempotent.

        Raises:
            Unavailable: something does not end; the process must.
        """
        self._leaving = True
        self._deleted = deleted
        try:
            await self._stop_turn()
            await self._close_sandbox()
        finally:
            self.feed.close()
            await self._tasks.close(self._kit.actors.close_wait_s)

    # -- reads -------------------------------------------------------------------------------

    async def pages(
        self,
        who: Principal,
        cursor: Cursor,
        *,
        turn: int | None = None,
        follow: bool = True,
        stretch_s: float = 30.0,
    ) -> AsyncGenerator[Page]:
        """Pages after `cursor` for at most about `stretch_s` and `MAX_STRETCH_CHARS`, or until the
        session leaves: the reader comes back with its cursor. See `actors.protocol.Sessions.pages`.

        Raises:
            NotFound, QueueFull
            Moved: the session has left, and everything that it showed was read.
        """
        self._check_owner(who)
        with self._readers.taken():
            reader = object()
            stretch = self._stretch(reader, cursor, turn, follow=follow, stretch_s=stretch_s)
            try:
                async with aclosing(stretch) as pages:
                    async for page in pages:
                        yield page
            finally:
                self._seen_s = self.now_s()
                self._kit.reading.ended(reader)

    async def _stretch(
        self, reader: object, cursor: Cursor, turn: int | None, *, follow: bool, stretch_s: float
    ) -> AsyncGenerator[Page]:
        until_s = self.now_s() + stretch_s
        room = MAX_STRETCH_CHARS
        silent_since_s = -math.inf
        while room > 0:
            page = await self._page(cursor, turn)
            at_head = page.cursor == cursor and not page.frames
            cursor = page.cursor
            over = turn is not None and self.context.has_ended(turn)
            if self._deleted or (at_head and over):
                page = page._replace(end=True)
            beat_s = self._kit.actors.page_wait_s
            if page.frames or page.end or self.now_s() - silent_since_s >= beat_s:
                silent_since_s = self.now_s()
                room -= sum(len(frame.data) for frame in page.frames)
                yield page
            if page.end:
                return
            if not at_head:
                continue
            if self.feed.closed and follow:
                raise Moved("The session has left.")
            if not follow or self.now_s() >= until_s:
                yield page
                return
            if await self.feed.changed(beat_s):
                await self._kit.reading.turn(reader)

    async def _page(self, cursor: Cursor, turn: int | None) -> Page:
        if self.feed.covers(cursor):
            return self.feed.page(cursor, turn=turn)
        records = await self._kit.journal.read(self.session_id, after=cursor.seq, limit=MAX_STORED)
        return page_of(records, cursor, turn)


def _n_messages(fact: Fact) -> int | None:
    return len(fact.messages) if isinstance(fact, SeedRequested) else None
