"""The desk: admits, wakes, passivates and ends sessions. `SessionManager` is its Ray shell.

Plain asyncio over the journal and the housing of sessions. It is off the event path: nobody asks it while
a session runs, beyond the reports "busy" and "rested". What is asked for is a move of the session
(`actors.moves`), so that a caller that leaves breaks nothing off in the middle.
"""

import asyncio
import uuid
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack

import structlog

from actors.activation import Report
from actors.commands import seed_fact
from actors.detached import Detached
from actors.housing import RETRY_AFTER_S, Host, Hosts, Housing, Route
from actors.idling import Idling
from actors.kit import Kit
from actors.ledger import Lease
from actors.memory import NodeMemory
from actors.moves import Moves
from actors.protocol import (
    Accepted,
    AnyCommand,
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
from agent.events import Activated, Fact, PassivationReason, Record, SessionOpened
from agent.faults import Fault, JournalFault, NoSuchSession, SessionExists, SnapshotFailed
from agent.journal import SessionRow, row_of
from agent.spec import AgentSpec
from agent.vault import Vault

log = structlog.get_logger()

DRAIN_MARGIN_S = 10.0
"""Over what the settings give a session to leave: for moves that had begun, and the journal."""
JOURNAL_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
"""Between questions to a journal that does not answer: a database that is restarted is back by then,
and the processes of the sessions that it stopped need not be started anew."""


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
        self._tokens = Tokens(kit.journal, vault)
        self._tasks = Detached()
        self._moves = Moves(self._tasks)
        self._housing = Housing(kit, hosts, self._tokens, self._moves)
        self.ledger = self._housing.ledger
        self._homes = self._housing.homes
        self._recovery = Recovery(kit.journal, self.resume, every_s=kit.actors.sweep_s)
        self._idling = Idling(
            self.ledger,
            self._let_go,
            idle_s=kit.actors.idle_s,
            memory_high=kit.actors.memory_high,
            now_s=kit.now_s,
        )
        self._watches: list[asyncio.Task[None]] = []
        """What goes on for as long as somebody is admitted."""
        self.is_rolled = False
        """Nobody lives on an older version of the code, and nobody will."""

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
            lease = await self._housing.slot(session_id, who.user_id)
            with self.ledger.returned_on_failure(lease):
                if seeds:
                    await charge(self._kit, who.user_id, session_id, opened.model)
                records: list[Record] = []

                async def begin() -> Sequence[Record]:
                    if records:  # a first host died: the next one takes it as any other session
                        return ()
                    records.extend(await self._create(opened, *seeds))
                    await self._tokens.keep(session_id, command.user_token)
                    return records

                route = await self._housing.place(lease, begin=begin)
            row = row_of(records)
            return row if row.epoch == route.epoch else await self._kit.journal.row(session_id)

        return await self._moves.run_asked(session_id, work)

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

    async def _create(self, opened: SessionOpened, *more: Fact) -> tuple[Record, ...]:
        """For a host that waits: one transaction makes the session and its first incarnation."""
        first = Activated(epoch=1, reason="opened")
        try:
            return await self._kit.journal.create(opened, *more, first, epoch=first.epoch)
        except SessionExists:
            raise Conflict("The session that this key opened was deleted.") from None

    async def _row_or_none(self, session_id: str) -> SessionRow | None:
        try:
            return await self._kit.journal.row(session_id)
        except NoSuchSession:
            return None

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
        self._housing.take_over(host, route, session_id, user_id)
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
            if route := await self._housing.checked(session_id, not_at):
                return route
            if (await self._owned(who, session_id)).closed:
                raise Moved("The session was closed meanwhile.")
            lease = await self._housing.slot(session_id, who.user_id)
            with self.ledger.returned_on_failure(lease):
                return await self._housing.place(lease)

        return await self._moves.run_asked(session_id, work)

    async def _owned(self, who: Principal, session_id: str) -> SessionRow:
        row = await self._row_or_none(session_id)
        if row is None or row.user_id != who.user_id:
            raise NotFound("There is no such session.")
        return row

    async def find(self, session_id: str) -> Route | None:
        """Where the session lives now; None: nowhere. Wakes nobody."""
        home = self._homes.get(session_id)
        return home.route if home else None

    async def when_live(
        self, session_id: str, wait_s: float, *, not_at: Route | None = None
    ) -> Route | None:
        """See `Housing.when_live`."""
        return await self._housing.when_live(session_id, wait_s, not_at)

    # -- ends ----------------------------------------------------------------------------------

    async def close_session(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        """Carry out a Close and free the slot.

        Raises:
            Moved: it was closed or left meanwhile.
        """
        await self.wake(who, session_id)

        async def work() -> Accepted:
            home = self._homes.get(session_id)
            if home is None:
                raise Moved("The session left meanwhile.")
            try:
                accepted = await home.host.submit(who, session_id, command)
            finally:
                # Closed, or stuck on the way: in either case it takes no commands any more.
                if not await home.host.hosts(session_id):
                    await self._housing.leave(session_id)
            await self._tokens.forget(session_id)
            return accepted

        return await self._moves.run_asked(session_id, work)

    async def delete(self, who: Principal, session_id: str) -> None:
        await self._owned(who, session_id)

        async def work() -> None:
            await self._housing.leave(session_id, deleted=True)
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
            self._housing.announce(session_id)

        await self._moves.run_asked(session_id, work)

    async def _let_go(self, lease: Lease, reason: PassivationReason) -> None:
        """Send an idle session away, unless it was needed since this was asked for."""
        idle_since_s = lease.idle_since_s

        async def work() -> None:
            if lease.state != "live" or lease.idle_since_s != idle_since_s:
                return
            if await self._housing.let_go(lease, reason):
                log.info("session_passivated", session_id=lease.session_id, reason=reason)

        await self._moves.run(lease.session_id, work)

    async def drain(self) -> None:
        """Bring every session to a place between two steps and send it away; admit nobody any more.

        Takes at most `drain_s`, `close_wait_s` and DRAIN_MARGIN_S together. What has not left by then
        ends with its process, as in a crash.
        """
        self._housing.is_open = False
        for task in self._watches:
            task.cancel()

        async def one(lease: Lease) -> None:
            await self._moves.run(
                lease.session_id, lambda: self._housing.send_away(lease, "shutdown")
            )
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
        await self._idling.close(self._kit.actors.close_wait_s)
        await self._tasks.close(self._kit.actors.close_wait_s)

    # -- reports -------------------------------------------------------------------------------

    def note(self, report: Report) -> None:
        """What an activation says of itself. One of an earlier epoch changes nothing."""
        if report.change == "lost":
            self._tasks.start(self._lost(report.session_id, report.epoch), name="lost")
        elif lease := self.ledger.get(report.session_id):
            self.ledger.note(lease, report.epoch, report.n, is_busy=report.change == "busy")

    def note_memory(self, node: str, memory: NodeMemory) -> None:
        """What a node reports of itself, now and then. Where it is short, idle sessions leave."""
        self._idling.note_memory(node, memory)

    async def _lost(self, session_id: str, epoch: int) -> None:
        """An incarnation cannot go on: another one took its place, or the journal did not answer. Its
        host is as good as before: it takes the session up again once the journal answers."""

        async def work() -> None:
            home, lease = self._homes.get(session_id), self.ledger.get(session_id)
            if home is None or lease is None or home.route.epoch != epoch:
                return
            self._homes.pop(session_id)
            self.ledger.keep(lease)
            with self.ledger.returned_on_failure(lease):
                await self._taken_up_again(lease, home.host)

        try:
            await self._moves.run(session_id, work)
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
            await self._housing.place(lease, on=host)

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
        dead = self._housing.died(name)
        for session_id in dead:
            self._tasks.start(self._revive(session_id), name="revive")
        log.warning("host_died", host=name, n_sessions=len(dead))
        return dead

    # -- recovery ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Look for open turns that nobody works at, now and every `sweep_s`; send idle sessions away;
        move what was taken over on an older version of the code."""
        self._watches = [
            self._tasks.start(self._recovery.run(), name="recovery"),
            self._tasks.start(self._idling.run(), name="idling"),
            self._tasks.start(self.roll(), name="roll"),
        ]

    async def resume(self, session_id: str) -> None:
        """Have a session with an open turn live; the turn goes on by itself. Any other: nothing.

        Raises:
            AtCapacity, Unavailable, JournalFault: not now; the slot that it had kept is free.
        """
        if session_id not in self._homes:
            await self._moves.run(session_id, lambda: self._resumed(session_id))

    async def _resumed(self, session_id: str) -> None:
        if session_id in self._homes:
            return
        with ExitStack() as ends:
            if kept := self.ledger.get(session_id):
                ends.callback(self.ledger.release, kept)
            row = await self._row_or_none(session_id)
            if row is None or row.closed or not row.n_open_turns:
                return
            lease = await self._housing.slot(session_id, row.user_id)
            with self.ledger.returned_on_failure(lease):
                await self._housing.place(lease)
            ends.pop_all()
        log.info("session_recovered", session_id=session_id)
        row = await self._kit.journal.row(session_id)
        # Given up, or over already: it came back for its turn only.
        if not row.n_open_turns and await self._housing.send_away(lease, "idle"):
            self.ledger.release(lease)

    async def _revive(self, session_id: str) -> None:
        try:
            await self.resume(session_id)
        except Fault as fault:  # the next sweep tries again
            log.warning("recovery_put_off", session_id=session_id, code=fault.code)

    # -- a newer version of the code -----------------------------------------------------------

    def outdated(self) -> list[str]:
        """The sessions that live on an older version of the code."""
        return self._homes.outdated()

    async def roll(self) -> None:
        """Move them all to the newer one."""

        async def one(session_id: str) -> None:
            await self._moves.run(session_id, lambda: self._rolled(session_id))

        await roll(self.outdated, one, every_s=self._kit.actors.sweep_s)
        self.is_rolled = True

    async def _rolled(self, session_id: str) -> None:
        """Send a session away between two steps; with an open turn it goes on at once elsewhere, in
        the same slot. An idle one is woken when it is needed."""
        home, lease = self._homes.get(session_id), self.ledger.get(session_id)
        if home is None or lease is None or home.host.current:
            return
        if await self._housing.send_away(lease, "rolled"):
            self.ledger.keep(lease)
            await self._resumed(session_id)
            log.info("session_rolled", session_id=session_id)

    # -- questions -----------------------------------------------------------------------------

    async def live_among(self, session_ids: Iterable[str]) -> frozenset[str]:
        return self._housing.live_among(session_ids)

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
