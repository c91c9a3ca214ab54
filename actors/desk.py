"""The desk: admits, wakes, passivates and ends sessions. `SessionManager` is its Ray shell.

Plain asyncio over the ledger, the journal and the hosts. It is off the event path: nobody asks it while
a session runs, beyond the reports "busy" and "rested". Moves of one session happen one after another,
in tasks of the desk's own, so that a caller that leaves breaks nothing off in the middle.
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, ExitStack
from typing import Any, NamedTuple, Protocol, TypeVar

import structlog

from actors.activation import Report
from actors.commands import seed_fact
from actors.detached import Detached
from actors.kit import Kit
from actors.ledger import Lease, Ledger, Refusal
from actors.places import queue_full
from actors.protocol import (
    Accepted,
    AnyCommand,
    AtCapacity,
    CapacityView,
    Conflict,
    Count,
    Invalid,
    LaneCount,
    Moved,
    NotFound,
    Open,
    Principal,
    Unavailable,
)
from actors.quotas import charge
from actors.recovery import Recovery
from actors.rolling import roll
from actors.tokens import Tokens
from agent.events import Fact, PassivationReason, SessionOpened
from agent.faults import Fault, JournalFault, NoSuchSession, SessionExists, SnapshotFailed
from agent.journal import SessionRow
from agent.spec import AgentSpec
from agent.vault import Vault

log = structlog.get_logger()
T = TypeVar("T")

MAX_MOVES = 64
"""Of one session, the one that runs and those behind it. Every command to a session that wakes is one,
also when its caller has left."""
MAX_GIVE_WAY_TRIES = 16
"""Idle sessions asked to go before a newcomer is refused: each may have become busy meanwhile."""
DRAIN_MARGIN_S = 10.0
"""Over what the settings give a session to leave: for moves that had begun, and the journal."""
JOURNAL_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
"""Between questions to a journal that does not answer: a database that is restarted is back by then,
and the processes of the sessions that it stopped need not be started anew."""
RETRY_AFTER_S = 5
"""Told to whom is refused: about the length of a short turn."""


class Route(NamedTuple):
    """Where a session lives: a hint, true when it was given."""

    host: str
    epoch: int


class Arrival:
    """Readers that wait for a session to live."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self.n_waiting = 0


class Host(Protocol):
    """One place for activations; `actors.host.SessionHost` or a proxy of one."""

    name: str
    alive: bool
    """False once it is known to be dead, or to be ended."""
    current: bool
    """False: it runs an older version of the code, and nothing new comes to it."""

    async def adopt(self, session_id: str, user_token: str | None = None) -> int: ...
    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted: ...
    async def passivate(self, session_id: str, reason: PassivationReason) -> bool: ...
    async def end(self, session_id: str, *, deleted: bool = False) -> None: ...
    async def hosts(self, session_id: str) -> bool:
        """Whether the session lives there and takes commands. False too when the host is dead."""
        ...


class Hosts(Protocol):
    """Where empty hosts come from."""

    @property
    def n_warm(self) -> int: ...

    async def acquire(self) -> Host:
        """An empty host, warm if there is one.

        Raises:
            Unavailable
        """
        ...

    async def give_back(self, host: Host, *, clean: bool) -> None:
        """The host is empty again. Not clean: its process ends."""
        ...


class Desk:
    def __init__(
        self,
        kit: Kit,
        hosts: Hosts,
        agents: dict[str, AgentSpec],
        *,
        default_model: str | None,
        vault: Vault | None = None,
    ) -> None:
        self._kit = kit
        self._hosts = hosts
        self._agents = agents
        self._default_model = default_model
        self.ledger = Ledger(
            max_sessions=kit.actors.max_sessions,
            max_sessions_per_user=kit.actors.max_sessions_per_user,
            reservation_s=kit.actors.reservation_s,
            now_s=kit.now_s,
        )
        self._placed: dict[str, tuple[Host, Route]] = {}
        self._moves: dict[str, asyncio.Task[Any]] = {}
        """The last move of each session that is moving."""
        self._n_moves: Counter[str] = Counter()
        self._arrivals: dict[str, Arrival] = {}
        self._tokens = Tokens(kit.journal, vault)
        self._tasks = Detached()
        self._draining = False
        self._recovery = Recovery(kit.journal, self.resume, every_s=kit.actors.sweep_s)
        self._sweeps: asyncio.Task[None] | None = None
        self._rolls: asyncio.Task[None] | None = None

    # -- moves, one after another per session --------------------------------------------------

    async def _move(self, session_id: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work` once the session's earlier moves are over, to its end."""
        before = self._moves.get(session_id)

        async def in_turn() -> T:
            if before is not None:
                await asyncio.wait({before})
            return await work()

        task = self._tasks.start(in_turn(), name="move")
        self._moves[session_id] = task
        self._n_moves[session_id] += 1
        task.add_done_callback(lambda done: self._moved(session_id, done))
        return await asyncio.shield(task)

    def _moved(self, session_id: str, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # the waiting caller has it; one that left does not need it
        self._n_moves[session_id] -= 1
        if not self._n_moves[session_id]:
            del self._n_moves[session_id]
        if self._moves.get(session_id) is task:
            del self._moves[session_id]

    async def _move_asked(self, session_id: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A move that somebody outside asks for.

        Raises:
            QueueFull
        """
        if self._n_moves[session_id] >= MAX_MOVES:
            raise queue_full(MAX_MOVES, "commands wait for the session to move")
        return await self._move(session_id, work)

    # -- admission -----------------------------------------------------------------------------

    async def open(self, who: Principal, command: Open) -> SessionRow:
        """See `actors.protocol.Sessions.open`."""
        opened = self._opening(who, command)
        session_id = opened.session_id
        seeds = [seed_fact(command.seed_messages, 1)] if command.seed_messages else []

        async def work() -> SessionRow:
            if command.message_id is not None and (row := await self._row_or_none(session_id)):
                # The first time may have ended between the session and its token.
                if not row.closed:
                    await self._tokens.keep(session_id, command.user_token)
                return row
            lease = await self._slot(session_id, who.user_id)
            with self.ledger.returned_on_failure(lease):
                if seeds:
                    await charge(self._kit, who.user_id, session_id, opened.model)
                await self._create(opened, *seeds)
                await self._tokens.keep(session_id, command.user_token)
                await self._place(lease)
            return await self._kit.journal.row(session_id)

        return await self._move_asked(session_id, work)

    def _opening(self, who: Principal, command: Open) -> SessionOpened:
        name = command.agent or self._kit.agent.default_agent
        spec = self._agents.get(name)
        if spec is None:
            raise Invalid(f"There is no agent {name!r}; known are: {', '.join(self._agents)}.")
        key = command.message_id
        return SessionOpened(
            session_id=_session_id(who, key),
            user_id=who.user_id,
            agent=name,
            model=command.model or self._default_model or spec.model,
            title=command.title,
            metadata=command.metadata,
            spec=spec,
            message_id=key,
        )

    async def _create(self, opened: SessionOpened, *more: Fact) -> None:
        try:
            await self._kit.journal.create(opened, *more)
        except SessionExists:
            raise Conflict("The session that this key opened was deleted.") from None

    async def _row_or_none(self, session_id: str) -> SessionRow | None:
        try:
            return await self._kit.journal.row(session_id)
        except NoSuchSession:
            return None

    async def _slot(self, session_id: str, user_id: str) -> Lease:
        """Take a slot; an idle session gives way before the newcomer is refused. A session whose host
        died has kept its slot.

        Raises:
            AtCapacity, Unavailable
        """
        if self._draining:
            raise Unavailable("Troupe is shutting down.", retry_after_s=RETRY_AFTER_S)
        if kept := self.ledger.get(session_id):
            return kept
        taken = self.ledger.take(session_id, user_id)
        for _ in range(MAX_GIVE_WAY_TRIES):
            if isinstance(taken, Lease):
                return taken
            waiting = self.ledger.give_way(taken.scope, session_id, user_id)
            if waiting is None:
                break
            taken = await self._place_of_another(waiting)
        if isinstance(taken, Lease):
            return taken
        raise _at_capacity(taken)

    async def _place_of_another(self, waiting: Lease) -> Lease | Refusal:
        """Send the session away whose place the lease waits for."""
        leaving = waiting.instead_of or waiting
        with self.ledger.returned_on_failure(waiting):
            went = await self._move(leaving.session_id, lambda: self._send_away(leaving))
        if went:
            return self.ledger.inherit(waiting)
        self.ledger.stay(waiting)
        return self.ledger.take(waiting.session_id, waiting.user_id)

    async def _send_away(self, lease: Lease, reason: PassivationReason = "capacity") -> bool:
        """Passivate; the lease stays with the caller. False: it would not go."""
        placed = self._placed.get(lease.session_id)
        if placed is None or not self.ledger.holds(lease):
            return True
        host, _ = placed
        try:
            went = await host.passivate(lease.session_id, reason)
        except Exception:
            log.exception("passivation_failed", session_id=lease.session_id)
            await self._vacate(lease.session_id, clean=False)
            return True
        if went:
            await self._vacate(lease.session_id, clean=True)
        return went

    async def _place(self, lease: Lease, on: Host | None = None) -> Route:
        """Activate the session of a reserved lease on a host, `on` this empty one if it can.

        Raises:
            Unavailable, Conflict, JournalFault. The lease stays reserved.
        """
        session_id = lease.session_id
        token = await self._tokens.find(session_id)
        try:
            host, epoch = await self._adopted(lease, token, on)
        except Unavailable:
            if not self.ledger.holds(lease):
                raise
            # a warm host may have died unseen
            host, epoch = await self._adopted(lease, token)
        if not host.alive:
            raise Unavailable("The session's process died.", retry_after_s=1)
        if not self.ledger.confirm(lease, epoch):
            await host.end(session_id)
            await self._hosts.give_back(host, clean=False)
            raise _too_late()
        route = Route(host.name, epoch)
        self._placed[session_id] = (host, route)
        self._announce(session_id)
        return route

    async def _adopted(
        self, lease: Lease, token: str | None, on: Host | None = None
    ) -> tuple[Host, int]:
        host = on or await self._hosts.acquire()
        # Where many wait for a process, it may come after the reservation is over. Then it serves the
        # next: were it ended, every process would come too late for as long as the queue is long.
        if not self.ledger.renew(lease):
            await self._hosts.give_back(host, clean=True)
            raise _too_late()
        async with AsyncExitStack() as unless_adopted:
            unless_adopted.push_async_callback(self._hosts.give_back, host, clean=False)
            epoch = await host.adopt(lease.session_id, token)
            unless_adopted.pop_all()
        return host, epoch

    async def _vacate(self, session_id: str, *, clean: bool) -> None:
        placed = self._placed.pop(session_id, None)
        if placed is not None:
            await self._hosts.give_back(placed[0], clean=clean)

    def take_over(
        self,
        host: Host,
        route: Route,
        session_id: str,
        user_id: str,
        *,
        user_token: str | None = None,
    ) -> None:
        """Count a session that lived before this desk did, once. It holds its slot even above a limit
        that was lowered meanwhile."""
        if session_id not in self._placed:
            self.ledger.take_over(session_id, user_id, route.epoch)
        self._placed[session_id] = (host, route)
        if user_token is not None:
            self._tokens.learn(session_id, user_token)

    # -- routes --------------------------------------------------------------------------------

    async def wake(self, who: Principal, session_id: str, *, not_at: Route | None = None) -> Route:
        """Where the caller's session lives, after waking it if need be.

        `not_at` is a route that the caller found wrong: it is checked before it is given again.

        Raises:
            NotFound, AtCapacity, Unavailable
            Moved: the session is closed.
        """
        await self._owned(who, session_id)

        async def work() -> Route:
            if route := await self._checked(session_id, not_at):
                return route
            if (await self._owned(who, session_id)).closed:
                raise Moved("The session was closed meanwhile.")
            lease = await self._slot(session_id, who.user_id)
            with self.ledger.returned_on_failure(lease):
                return await self._place(lease)

        return await self._move_asked(session_id, work)

    async def _owned(self, who: Principal, session_id: str) -> SessionRow:
        row = await self._row_or_none(session_id)
        if row is None or row.user_id != who.user_id:
            raise NotFound("There is no such session.")
        return row

    async def find(self, session_id: str) -> Route | None:
        """Where the session lives now; None: nowhere. Wakes nobody."""
        placed = self._placed.get(session_id)
        return placed[1] if placed else None

    async def _checked(self, session_id: str, not_at: Route | None) -> Route | None:
        """Where the session is. If that is where a caller did not find it, the host is asked, and a
        session that is not there has left. Only inside a move."""
        placed = self._placed.get(session_id)
        if placed and placed[1] == not_at and not await placed[0].hosts(session_id):
            await self._leave(session_id)
            return None
        return placed[1] if placed else None

    async def when_live(
        self, session_id: str, wait_s: float, *, not_at: Route | None = None
    ) -> Route | None:
        """Wait until the session lives somewhere, or is deleted, or `wait_s` is over."""
        try:
            async with asyncio.timeout(wait_s):
                if not_at is not None:
                    await self._rechecked(session_id, not_at)
                if session_id not in self._placed:
                    await self._arrival(session_id)
        except TimeoutError:
            pass
        return await self.find(session_id)

    async def _rechecked(self, session_id: str, not_at: Route) -> None:
        """Have it looked whether the session still is there. A thousand readers need no look each."""
        if self._n_moves[session_id] < MAX_MOVES:
            await self._move(session_id, lambda: self._checked(session_id, not_at))
        else:
            await asyncio.wait({self._moves[session_id]})

    async def _arrival(self, session_id: str) -> None:
        arrival = self._arrivals.setdefault(session_id, Arrival())
        arrival.n_waiting += 1
        try:
            await arrival.came.wait()
        finally:
            arrival.n_waiting -= 1
            if not arrival.n_waiting and self._arrivals.get(session_id) is arrival:
                del self._arrivals[session_id]

    def _announce(self, session_id: str) -> None:
        if arrival := self._arrivals.pop(session_id, None):
            arrival.came.set()

    # -- ends ----------------------------------------------------------------------------------

    async def close_session(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        """Carry out a Close and free the slot.

        Raises:
            Moved: it was closed or left meanwhile.
        """
        await self.wake(who, session_id)

        async def work() -> Accepted:
            placed = self._placed.get(session_id)
            if placed is None:
                raise Moved("The session left meanwhile.")
            try:
                accepted = await placed[0].submit(who, session_id, command)
            finally:
                # Closed, or stuck on the way: in either case it takes no commands any more.
                if not await placed[0].hosts(session_id):
                    await self._leave(session_id)
            await self._tokens.forget(session_id)
            return accepted

        return await self._move_asked(session_id, work)

    async def delete(self, who: Principal, session_id: str) -> None:
        await self._owned(who, session_id)

        async def work() -> None:
            await self._leave(session_id, deleted=True)
            try:
                await self._kit.forget_snapshots(session_id)
            except SnapshotFailed as cause:
                # First of all: with the session gone, nobody could ask for it again.
                raise Unavailable(
                    "The copies of the session's workspace cannot be removed at the moment.",
                    retry_after_s=RETRY_AFTER_S,
                ) from cause
            try:
                await self._kit.journal.delete(session_id)
            except NoSuchSession:
                raise NotFound("There is no such session.") from None
            await asyncio.to_thread(self._kit.remove_files, session_id)
            await self._tokens.forget(session_id)
            self._announce(session_id)

        await self._move_asked(session_id, work)

    async def _leave(self, session_id: str, *, deleted: bool = False, clean: bool = True) -> None:
        """End whatever lives of a session, and give its slot back."""
        if placed := self._placed.get(session_id):
            try:
                await placed[0].end(session_id, deleted=deleted)
                await self._vacate(session_id, clean=clean)
            except Exception:
                log.exception("end_failed", session_id=session_id)
                await self._vacate(session_id, clean=False)
        if lease := self.ledger.get(session_id):
            self.ledger.release(lease)

    async def drain(self) -> None:
        """Bring every session to a place between two steps and send it away; admit nobody any more.

        Takes at most `drain_s`, `close_wait_s` and DRAIN_MARGIN_S together. What has not left by then
        ends with its process, as in a crash.
        """
        self._draining = True
        for task in (self._sweeps, self._rolls):
            if task is not None:
                task.cancel()

        async def one(lease: Lease) -> None:
            await self._move(lease.session_id, lambda: self._send_away(lease, "shutdown"))
            self.ledger.release(lease)

        leaving = {self._tasks.start(one(lease), name="drain") for lease in self.ledger.leases}
        if not leaving:
            return
        limits = self._kit.actors
        limit_s = limits.drain_s + limits.close_wait_s + DRAIN_MARGIN_S
        done, late = await asyncio.wait(leaving, timeout=limit_s)
        for task in done:
            task.result()
        if late:
            log.warning("drain_cut_short", n_sessions=len(late))

    async def close(self) -> None:
        """End the desk's own tasks."""
        await self._tasks.close(self._kit.actors.close_wait_s)

    # -- reports -------------------------------------------------------------------------------

    def note(self, report: Report) -> None:
        """What an activation says of itself. One of an earlier epoch changes nothing."""
        if report.change == "lost":
            self._tasks.start(self._lost(report.session_id, report.epoch), name="lost")
        elif lease := self.ledger.get(report.session_id):
            self.ledger.note(lease, report.epoch, report.n, is_busy=report.change == "busy")

    async def _lost(self, session_id: str, epoch: int) -> None:
        """An incarnation cannot go on: another one took its place, or the journal did not answer. Its
        host is as good as before: it takes the session up again once the journal answers."""

        async def work() -> None:
            placed, lease = self._placed.get(session_id), self.ledger.get(session_id)
            if placed is None or lease is None or placed[1].epoch != epoch:
                return
            host, _ = self._placed.pop(session_id)
            self.ledger.keep(lease)
            with self.ledger.returned_on_failure(lease):
                await self._taken_up_again(lease, host)

        try:
            await self._move(session_id, work)
        except Fault as fault:  # the next sweep tries again
            log.warning("recovery_put_off", session_id=session_id, code=fault.code)

    async def _taken_up_again(self, lease: Lease, host: Host) -> None:
        async with AsyncExitStack() as ends:
            ends.push_async_callback(self._hosts.give_back, host, clean=False)
            await host.end(lease.session_id)
            ends.pop_all()
            ends.push_async_callback(self._hosts.give_back, host, clean=True)
            row = await self._row_in_time(lease.session_id)
            if row is None or row.closed or not row.n_open_turns:
                self.ledger.release(lease)
                return
            ends.pop_all()
            await self._place(lease, on=host)

    async def _row_in_time(self, session_id: str) -> SessionRow | None:
        """The row, also of a journal that is away for a moment.

        Raises:
            JournalFault: it is away for longer.
        """
        for pause_s in JOURNAL_PAUSES_S:
            try:
                return await self._row_or_none(session_id)
            except JournalFault:
                await asyncio.sleep(pause_s)
        return await self._row_or_none(session_id)

    def host_died(self, name: str) -> list[str]:
        """Bring back what lived on a host and has an open turn; the slots of others are free. The ids
        of all."""
        dead = [sid for sid, (host, _) in self._placed.items() if host.name == name]
        for session_id in dead:
            del self._placed[session_id]
            if lease := self.ledger.get(session_id):
                self.ledger.keep(lease)
            self._tasks.start(self._revive(session_id), name="revive")
        log.warning("host_died", host=name, n_sessions=len(dead))
        return dead

    # -- recovery ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Look for open turns that nobody works at, now and every `sweep_s`; move what was taken over
        on an older version of the code."""
        self._sweeps = self._tasks.start(self._recovery.run(), name="recovery")
        self._rolls = self._tasks.start(self.roll(), name="roll")

    async def resume(self, session_id: str) -> None:
        """Have a session with an open turn live; the turn goes on by itself. Any other: nothing.

        Raises:
            AtCapacity, Unavailable, JournalFault: not now; the slot that it had kept is free.
        """
        if session_id not in self._placed:
            await self._move(session_id, lambda: self._resumed(session_id))

    async def _resumed(self, session_id: str) -> None:
        if session_id in self._placed:
            return
        with ExitStack() as ends:
            if kept := self.ledger.get(session_id):
                ends.callback(self.ledger.release, kept)
            row = await self._row_or_none(session_id)
            if row is None or row.closed or not row.n_open_turns:
                return
            lease = await self._slot(session_id, row.user_id)
            with self.ledger.returned_on_failure(lease):
                await self._place(lease)
            ends.pop_all()
        log.info("session_recovered", session_id=session_id)
        row = await self._kit.journal.row(session_id)
        # Given up, or over already: it came back for its turn only.
        if not row.n_open_turns and await self._send_away(lease, "idle"):
            self.ledger.release(lease)

    async def _revive(self, session_id: str) -> None:
        try:
            await self.resume(session_id)
        except Fault as fault:  # the next sweep tries again
            log.warning("recovery_put_off", session_id=session_id, code=fault.code)

    # -- a newer version of the code -----------------------------------------------------------

    def outdated(self) -> list[str]:
        """The sessions that live on an older version of the code."""
        return [sid for sid, (host, _) in self._placed.items() if not host.current]

    async def roll(self) -> None:
        """Move them all to the newer one."""

        async def one(session_id: str) -> None:
            await self._move(session_id, lambda: self._rolled(session_id))

        await roll(self.outdated, one, every_s=self._kit.actors.sweep_s)

    async def _rolled(self, session_id: str) -> None:
        """Send a session away between two steps; with an open turn it goes on at once elsewhere, in
        the same slot. An idle one is woken when it is needed."""
        placed, lease = self._placed.get(session_id), self.ledger.get(session_id)
        if placed is None or lease is None or placed[0].current:
            return
        if await self._send_away(lease, "rolled"):
            self.ledger.keep(lease)
            await self._resumed(session_id)
            log.info("session_rolled", session_id=session_id)

    # -- questions -----------------------------------------------------------------------------

    async def live_among(self, session_ids: Iterable[str]) -> frozenset[str]:
        return frozenset(sid for sid in session_ids if sid in self._placed)

    async def capacity(self, who: Principal) -> CapacityView:
        ledger = self.ledger
        return CapacityView(
            live=ledger.n_live,
            limit=ledger.max_sessions,
            warm=self._hosts.n_warm,
            user=Count(live=ledger.n_live_of(who.user_id), limit=ledger.max_sessions_per_user),
            lanes={
                "interactive": LaneCount(live=ledger.n_live_in("interactive")),
                "bulk": LaneCount(live=ledger.n_live_in("bulk")),
            },
        )


def _session_id(who: Principal, key: str | None) -> str:
    """With a key, the same caller's same key is the same session: that is all idempotency needs."""
    if key is None:
        return uuid.uuid4().hex
    return uuid.uuid5(uuid.NAMESPACE_URL, f"troupe:open:{who.user_id}\n{key}").hex


def _too_late() -> Unavailable:
    return Unavailable("The session took too long to start.", retry_after_s=RETRY_AFTER_S)


def _at_capacity(refusal: Refusal) -> AtCapacity:
    whose = "You have" if refusal.scope == "per_user" else "There are"
    return AtCapacity(
        f"{whose} {refusal.live} live sessions of {refusal.limit}, and none of them is idle.",
        scope=refusal.scope,
        live=refusal.live,
        limit=refusal.limit,
        retry_after_s=RETRY_AFTER_S,
    )
