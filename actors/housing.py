"""Housing: brings sessions to hosts and sends them away, and knows which session lives where.

Every step here belongs to a move of the session (`actors.moves`) and holds its lease, so a slot, a host
and a session are taken and given back together.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import NamedTuple, Protocol

import structlog

from actors.kit import Kit
from actors.ledger import Lease, Ledger, Refusal
from actors.moves import Moves
from actors.plane import PlaneAddress
from actors.protocol import Accepted, AnyCommand, AtCapacity, Principal, Unavailable
from actors.tokens import Tokens
from agent.events import PassivationReason, Record

log = structlog.get_logger()

MAX_GIVE_WAY_TRIES = 16
"""Idle sessions asked to go before a newcomer is refused: each may have become busy meanwhile."""
RETRY_AFTER_S = 5
"""Told to whom is refused: about the length of a short turn."""


Begin = Callable[[], Awaitable[Sequence[Record]]]
"""Has a session exist. All of it, where it was made by this very call, for who comes to host it."""


async def in_the_journal() -> Sequence[Record]:
    """It exists."""
    return ()


class Route(NamedTuple):
    """Where a session lives: a hint, true when it was given."""

    host: str
    epoch: int
    address: PlaneAddress | None = None
    """Where its process listens; None: it is this one."""


class Host(Protocol):
    """One place for activations; `actors.host.SessionHost` or a proxy of one."""

    name: str
    node: str
    """The machine that it is on, as the watch on memory names it."""
    address: PlaneAddress | None
    """Where it listens to the edge; None: in this process."""
    alive: bool
    """False once it is known to be dead, or to be ended."""
    current: bool
    """False: it runs an older version of the code, and nothing new comes to it."""

    async def adopt(
        self, session_id: str, user_token: str | None = None, begun: Sequence[Record] = ()
    ) -> int:
        """Activate a session; its epoch. `begun`: see `actors.activation.Activation.open`."""
        ...

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


class Home(NamedTuple):
    host: Host
    route: Route


class Homes:
    """Which session lives where, found by session and by host."""

    def __init__(self) -> None:
        self._of: dict[str, Home] = {}
        self._at: dict[str, list[str]] = {}
        """Session ids by host name. A list: mostly of one."""

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._of

    def __len__(self) -> int:
        return len(self._of)

    def get(self, session_id: str) -> Home | None:
        return self._of.get(session_id)

    def put(self, session_id: str, home: Home) -> None:
        self.pop(session_id)
        self._of[session_id] = home
        self._at.setdefault(home.host.name, []).append(session_id)

    def pop(self, session_id: str) -> Home | None:
        home = self._of.pop(session_id, None)
        if home is not None:
            there = self._at[home.host.name]
            there.remove(session_id)
            if not there:
                del self._at[home.host.name]
        return home

    def at(self, host: str) -> list[str]:
        return list(self._at.get(host, ()))

    def outdated(self) -> list[str]:
        """Those on an older version of the code. Looks at all."""
        return [session_id for session_id, home in self._of.items() if not home.host.current]


class Arrival:
    """Readers that wait for a session to live."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self.n_waiting = 0


class Housing:
    def __init__(self, kit: Kit, hosts: Hosts, tokens: Tokens, moves: Moves) -> None:
        self._kit = kit
        self._hosts = hosts
        self._tokens = tokens
        self._moves = moves
        self.homes = Homes()
        self.ledger = Ledger(
            max_sessions=kit.actors.max_sessions,
            max_sessions_per_user=kit.actors.max_sessions_per_user,
            reservation_s=kit.actors.reservation_s,
            now_s=kit.now_s,
        )
        self._arrivals: dict[str, Arrival] = {}
        self.is_open = True
        """False: nobody is admitted any more."""

    # -- in ------------------------------------------------------------------------------------

    async def slot(self, session_id: str, user_id: str) -> Lease:
        """Take a slot; an idle session gives way before the newcomer is refused. A session whose host
        died has kept its slot.

        Raises:
            AtCapacity, Unavailable
        """
        if not self.is_open:
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
            went = await self._moves.run(
                leaving.session_id, lambda: self.send_away(leaving, "capacity")
            )
        if went:
            return self.ledger.inherit(waiting)
        self.ledger.stay(waiting)
        return self.ledger.take(waiting.session_id, waiting.user_id)

    async def place(
        self, lease: Lease, on: Host | None = None, *, begin: Begin = in_the_journal
    ) -> Route:
        """Activate the session of a reserved lease on a host, `on` this empty one if it can. A session
        that is to be begins when there is a host for it.

        Raises:
            Unavailable, Conflict, JournalFault. The lease stays reserved.
        """
        session_id = lease.session_id
        try:
            host, epoch = await self._adopted(lease, begin, on)
        except Unavailable:
            if not self.ledger.holds(lease):
                raise
            # a warm host may have died unseen
            host, epoch = await self._adopted(lease, begin)
        if not host.alive:
            raise Unavailable("The session's process died.", retry_after_s=1)
        if not self.ledger.confirm(lease, epoch, host.node):
            await host.end(session_id)
            await self._hosts.give_back(host, clean=False)
            raise _too_late()
        route = Route(host.name, epoch, host.address)
        self.homes.put(session_id, Home(host, route))
        self.announce(session_id)
        return route

    async def _adopted(
        self, lease: Lease, begin: Begin, on: Host | None = None
    ) -> tuple[Host, int]:
        host = on or await self._hosts.acquire()
        # Where many wait for a process, it may come after the reservation is over. Then it serves the
        # next: were it ended, every process would come too late for as long as the queue is long.
        if not self.ledger.renew(lease):
            await self._hosts.give_back(host, clean=True)
            raise _too_late()
        async with AsyncExitStack() as unless_begun:
            unless_begun.push_async_callback(self._hosts.give_back, host, clean=True)
            begun = await begin()
            token = await self._tokens.find(lease.session_id)
            unless_begun.pop_all()
        async with AsyncExitStack() as unless_adopted:
            unless_adopted.push_async_callback(self._hosts.give_back, host, clean=False)
            epoch = await host.adopt(lease.session_id, token, begun)
            unless_adopted.pop_all()
        return host, epoch

    def take_over(self, host: Host, route: Route, session_id: str, user_id: str) -> None:
        """Count a session that lived before, once. It holds its slot even above a limit that was lowered
        meanwhile."""
        if session_id not in self.homes:
            self.ledger.take_over(session_id, user_id, route.epoch, host.node)
        self.homes.put(session_id, Home(host, route))

    # -- out -----------------------------------------------------------------------------------

    async def send_away(self, lease: Lease, reason: PassivationReason) -> bool:
        """Passivate; the lease stays with the caller. False: it would not go."""
        home = self.homes.get(lease.session_id)
        if home is None or not self.ledger.holds(lease):
            return True
        try:
            went = await home.host.passivate(lease.session_id, reason)
        except Exception:
            log.exception("passivation_failed", session_id=lease.session_id)
            await self._vacate(lease.session_id, clean=False)
            return True
        if went:
            # What was short of memory gets it back only when the process ends.
            await self._vacate(lease.session_id, clean=reason != "memory")
        return went

    async def let_go(self, lease: Lease, reason: PassivationReason) -> bool:
        """Send a session away that has been idle since it was chosen, and free its slot. False: it
        would not go. Inside a move."""
        if not await self.send_away(lease, reason):
            self.ledger.defer(lease)
            return False
        # Not where a newcomer has begun to wait for this very place meanwhile: that one inherits it.
        if lease.state == "live":
            self.ledger.release(lease)
        return True

    async def leave(self, session_id: str, *, deleted: bool = False, clean: bool = True) -> None:
        """End whatever lives of a session, and give its slot back."""
        if home := self.homes.get(session_id):
            try:
                await home.host.end(session_id, deleted=deleted)
                await self._vacate(session_id, clean=clean)
            except Exception:
                log.exception("end_failed", session_id=session_id)
                await self._vacate(session_id, clean=False)
        if lease := self.ledger.get(session_id):
            self.ledger.release(lease)

    async def _vacate(self, session_id: str, *, clean: bool) -> None:
        if home := self.homes.pop(session_id):
            await self._hosts.give_back(home.host, clean=clean)

    def died(self, host: str) -> list[str]:
        """What lived on a host does not any more; its slots are kept for a moment. The ids of all."""
        dead = self.homes.at(host)
        for session_id in dead:
            self.homes.pop(session_id)
            if lease := self.ledger.get(session_id):
                self.ledger.keep(lease)
        return dead

    # -- questions -----------------------------------------------------------------------------

    async def checked(self, session_id: str, not_at: Route | None) -> Route | None:
        """Where the session is. If that is where a caller did not find it, the host is asked, and a
        session that is not there has left. Only inside a move."""
        home = self.homes.get(session_id)
        if home and home.route == not_at and not await home.host.hosts(session_id):
            await self.leave(session_id)
            return None
        return home.route if home else None

    async def when_live(self, session_id: str, wait_s: float, not_at: Route | None) -> Route | None:
        """Wait until the session lives somewhere, or is deleted, or `wait_s` is over."""
        try:
            async with asyncio.timeout(wait_s):
                if not_at is not None:
                    await self._moves.run_or_join(
                        session_id, lambda: self.checked(session_id, not_at)
                    )
                if session_id not in self.homes:
                    await self._arrival(session_id)
        except TimeoutError:
            pass
        home = self.homes.get(session_id)
        return home.route if home else None

    async def _arrival(self, session_id: str) -> None:
        arrival = self._arrivals.setdefault(session_id, Arrival())
        arrival.n_waiting += 1
        try:
            await arrival.came.wait()
        finally:
            arrival.n_waiting -= 1
            if not arrival.n_waiting and self._arrivals.get(session_id) is arrival:
                del self._arrivals[session_id]

    def announce(self, session_id: str) -> None:
        """It lives, or never will again: whoever waits for it looks."""
        if arrival := self._arrivals.pop(session_id, None):
            arrival.came.set()

    def live_among(self, session_ids: Iterable[str]) -> frozenset[str]:
        return frozenset(sid for sid in session_ids if sid in self.homes)


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
