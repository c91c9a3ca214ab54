"""The pool of empty hosts: how many wait, who gets the next one, which are replaced. Free of Ray.

Whoever needs a host takes the one that is ready first: one that waits, that a session leaves meanwhile,
or that is started. Up to `warm.min` wait for them: what is missing is started in the background, at a
pace that leaves the CPU to running turns. More than that wait only after sessions left, `warm.spare` at
most, and none on a node that is short of memory. A host that is worn out goes when a fresh one has
come in its place.

All state changes between awaits, so there is no lock.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

import structlog

from actors.detached import Detached
from actors.protocol import Unavailable
from actors.settings import WarmSettings

log = structlog.get_logger()

MAX_STARTING = 4
"""Hosts that start at once because somebody waits: each costs about a CPU-second, which running turns
need too."""
MAX_AHEAD = 2
"""Hosts that start at once for nobody, while no session lives."""
SETTLE_S = 1.0
"""Before the first start in the background after a host was taken."""
FAILED_PAUSE_S = 5.0
"""After a start in the background that failed."""
CLOSE_WAIT_S = 5.0
MB = 10**6


class Empty(Protocol):
    """A host without a session, as the pool sees it."""

    name: str
    alive: bool
    node: str
    n_uses: int


H = TypeVar("H", bound=Empty)


class Source(Protocol[H]):
    """Where hosts come from and go to."""

    def start(self) -> Coroutine[Any, Any, H]:
        """A new host, ready for a session.

        Raises:
            Unavailable
        """
        ...

    async def tidy(self, host: H) -> int:
        """Have a host drop what its session left. The bytes of memory that it then takes.

        Raises:
            Unavailable: it must go.
        """
        ...

    def end(self, host: H) -> None: ...


class Pool(Generic[H]):
    """
    Args:
        has_room: whether a node has memory for hosts that nobody uses; None: any node.
        is_quiet: whether no session lives.
    """

    def __init__(
        self,
        settings: WarmSettings,
        source: Source[H],
        *,
        has_room: Callable[[str | None], bool],
        is_quiet: Callable[[], bool],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._source = source
        self._has_room = has_room
        self._is_quiet = is_quiet
        self._pause = pause
        self._now_s = now_s
        self._fresh: deque[H] = deque()
        self._worn: deque[H] = deque()
        """To be used only while no fresh one waits."""
        self._wanted: deque[asyncio.Future[H]] = deque()
        """By those who wait, the first first."""
        self._starts: set[asyncio.Task[H]] = set()
        self._n_tidied = 0
        """Being tidied: as good as started."""
        self._is_failing = False
        """A start failed since the filling last paused for one."""
        self._filling: asyncio.Task[None] | None = None
        self._tasks = Detached()
        self._closing = False

    @property
    def n_warm(self) -> int:
        return len(self._fresh) + len(self._worn)

    # -- taking --------------------------------------------------------------------------------

    async def acquire(self) -> H:
        """
        Raises:
            Unavailable: a start failed, while this one waited the longest.
        """
        if self._fresh or self._worn:
            # The last that came: its pages are the likeliest to be in the CPU's caches.
            host = (self._fresh or self._worn).pop()
            self.keep_warm()
            return host
        place: asyncio.Future[H] = asyncio.get_running_loop().create_future()
        self._wanted.append(place)
        self.keep_warm()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and not place.exception():
                self._offer(place.result())  # it came, and we left, in the same step
            raise
        finally:
            if place in self._wanted:
                self._wanted.remove(place)

    def keep_warm(self) -> None:
        """Have what is missing started: at once what somebody waits for, the rest in the background."""
        if self._closing:
            return
        while self._n_coming < len(self._wanted) and len(self._starts) < MAX_STARTING:
            self._begin_start()
        if self._filling is None and self._n_missing > 0:
            self._filling = self._tasks.start(self._fill(), name="fill")

    @property
    def _n_coming(self) -> int:
        return len(self._starts) + self._n_tidied

    @property
    def _min(self) -> int:
        return self._settings.min if self._has_room(None) else 0

    @property
    def _n_missing(self) -> int:
        """To be started for nobody, once those who wait have theirs."""
        n_ahead = max(0, self._n_coming - len(self._wanted))
        return 0 if self._closing else self._min - len(self._fresh) - n_ahead

    def _begin_start(self) -> asyncio.Task[H]:
        start = self._tasks.start(self._source.start(), name="start")
        self._starts.add(start)
        start.add_done_callback(self._started)
        return start

    def _started(self, start: asyncio.Task[H]) -> None:
        self._starts.discard(start)
        if start.cancelled():
            return
        if (fault := start.exception()) is None:
            self._offer(start.result())
        else:
            is_expected = isinstance(fault, Unavailable)
            log.warning("host_not_started", exc_info=None if is_expected else fault)
            self._is_failing = True
            if place := self._next():
                place.set_exception(fault)
        self.keep_warm()

    async def _fill(self) -> None:
        """Start what is missing, one by one where sessions live. First of all it pauses: a burst of
        sessions that took hosts has the CPU before those that may come."""
        pause_s = SETTLE_S
        try:
            while self._n_missing > 0:
                pause_s = FAILED_PAUSE_S if self._is_failing else pause_s
                self._is_failing = False
                await self._pause(max(1 / self._settings.start_rate, pause_s))
                pause_s = 0.0
                is_quiet = self._is_quiet()
                while len(self._starts) >= (MAX_AHEAD if is_quiet else 1):
                    await asyncio.wait(self._starts, return_when=asyncio.FIRST_COMPLETED)
                if self._n_missing > 0:
                    began_s = self._now_s()
                    start = self._begin_start()
                    if not is_quiet:
                        # As long as a start took, nothing starts: that leaves the CPU to the turns, and
                        # the less there is of it, the longer a start takes.
                        await asyncio.wait({start})
                        pause_s = self._now_s() - began_s
        finally:
            self._filling = None

    # -- giving back ---------------------------------------------------------------------------

    def give_back(self, host: H) -> None:
        """Take a host that a session left in good order. It is tidied first, so it comes later."""
        if self._closing:
            self._source.end(host)
            return
        self._n_tidied += 1
        self._tasks.start(self._tidy(host), name="tidy")

    async def _tidy(self, host: H) -> None:
        try:
            memory_bytes = await self._source.tidy(host)
        except Unavailable:
            self._source.end(host)
        else:
            limits = self._settings
            is_worn = host.n_uses >= limits.max_uses or memory_bytes > limits.max_memory_mb * MB
            if is_worn:
                mb = memory_bytes // MB
                log.info("host_worn", host=host.name, n_uses=host.n_uses, memory_mb=mb)
            self._offer(host, is_worn=is_worn)
        finally:
            self._n_tidied -= 1
            self.keep_warm()

    def _offer(self, host: H, *, is_worn: bool = False) -> None:
        """A host is free: for whoever waits the longest, else for the next."""
        if not host.alive:
            return
        if place := self._next():
            place.set_result(host)
            return
        if self._closing or not self._has_room(host.node):
            self._source.end(host)
            return
        (self._worn if is_worn else self._fresh).append(host)
        self._end_surplus()

    def _next(self) -> asyncio.Future[H] | None:
        """Who waits the longest, and has not left."""
        while self._wanted:
            place = self._wanted.popleft()
            if not place.done():
                return place
        return None

    def _end_surplus(self) -> None:
        most = self._settings.min + self._settings.spare
        while self._worn and (len(self._fresh) >= self._min or self.n_warm > most):
            self._source.end(self._worn.popleft())
        while len(self._fresh) > most:
            self._source.end(self._fresh.popleft())

    def shrink(self, node: str, n_hosts: int) -> None:
        """End up to so many hosts that wait on a node, the worn and the oldest first."""
        for line in (self._worn, self._fresh):
            for host in [host for host in line if host.node == node][:n_hosts]:
                line.remove(host)
                self._source.end(host)
                n_hosts -= 1

    def forget(self, host: H) -> None:
        """A host died."""
        for line in (self._fresh, self._worn):
            if host in line:
                line.remove(host)
        self.keep_warm()

    async def close(self) -> None:
        """Start no more, and send away who waits. The hosts that wait are the source's to end."""
        self._closing = True
        while place := self._next():
            place.set_exception(Unavailable("Troupe is shutting down.", retry_after_s=1))
        await self._tasks.close(CLOSE_WAIT_S)
