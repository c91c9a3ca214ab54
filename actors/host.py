"""A place where activations live. `SessionActor` is one in a process of its own, `LocalSessions` uses
one directly; neither adds behaviour."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple

from actors.activation import Activation, Report
from actors.kit import Kit
from actors.plane import PlaneAddress
from actors.protocol import Accepted, AnyCommand, Moved, Principal
from agent.events import Cursor, Page, PassivationReason, Record


class Hosted(NamedTuple):
    """A session that lives in a host, for a desk that begins anew beside it."""

    session_id: str
    user_id: str
    epoch: int
    is_busy: bool
    n_reports: int
    """How many reports it made: later ones are newer than this."""
    user_token: str | None = None


class SessionHost:
    def __init__(self, kit: Kit, name: str, tell: Callable[[Report], None]) -> None:
        self.name = name
        self.node = ""
        self.address: PlaneAddress | None = None
        self.alive = True
        self.current = True
        self._kit = kit
        self._tell = tell
        self._activations: dict[str, Activation] = {}

    async def adopt(
        self, session_id: str, user_token: str | None = None, begun: Sequence[Record] = ()
    ) -> int:
        """Activate a session here; its epoch. See `Activation.open`."""
        activation = await Activation.open(
            self._kit, session_id, self._tell, user_token=user_token, begun=begun
        )
        self._activations[session_id] = activation
        return activation.context.epoch

    def hosted(self) -> list[Hosted]:
        return [
            Hosted(
                session_id,
                one.context.opened.user_id,
                one.context.epoch,
                is_busy=one.is_busy(),
                n_reports=one.n_reports,
                user_token=one.user_token,
            )
            for session_id, one in self._activations.items()
            if not one.is_leaving
        ]

    async def hosts(self, session_id: str) -> bool:
        activation = self._activations.get(session_id)
        return activation is not None and not activation.is_leaving

    def _at(self, session_id: str) -> Activation:
        try:
            return self._activations[session_id]
        except KeyError:
            raise Moved("The session is not here.") from None

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        return await self._at(session_id).submit(who, command)

    async def pages(
        self,
        who: Principal,
        session_id: str,
        cursor: Cursor,
        *,
        turn: int | None = None,
        follow: bool = True,
    ) -> AsyncGenerator[Page]:
        source = self._at(session_id).pages(who, cursor, turn=turn, follow=follow)
        async with aclosing(source) as pages:
            async for page in pages:
                yield page

    async def passivate(self, session_id: str, reason: PassivationReason) -> bool:
        """See `Activation.passivate`. True also when the session is not here (any more)."""
        activation = self._activations.get(session_id)
        if activation is None:
            return True
        if activation.is_leaving:  # it could not leave in good order before
            await self.end(session_id)
            return True
        if not await activation.passivate(reason):
            return False
        await self.end(session_id)
        return True

    async def keep_current(self) -> None:
        """Ask now and then whether what lives here is still the newest incarnation, until cancelled:
        one that was paused or cut off may have been replaced, and would not hear of it."""
        while True:
            await asyncio.sleep(self._kit.actors.probe_s)
            for activation in list(self._activations.values()):
                await activation.check_epoch()

    async def end(self, session_id: str, *, deleted: bool = False) -> None:
        """Drop an activation whole. Idempotent."""
        activation = self._activations.pop(session_id, None)
        if activation is not None:
            await activation.end(deleted=deleted)
