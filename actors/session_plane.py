"""What the edge asks a session's process on the data plane: commands and pages."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, get_args

from actors import protocol
from actors.host import SessionHost
from actors.plane import Method, PlaneAddress, PlaneClient, PlaneLost
from actors.protocol import Accepted, AnyCommand, Moved, Principal
from actors.settings import ActorsSettings
from agent.events import Cursor, Frame, Page

SUBMIT = "submit"
PAGES = "pages"
COMMANDS: dict[str, type[protocol.SessionCommand]] = {
    kind.__name__: kind for kind in get_args(AnyCommand)
}
SILENT_BEATS = 3
"""Heartbeats of a stream that may fail to come before its process counts as lost."""


def methods(host: SessionHost) -> dict[str, Method]:
    """What a process answers for the sessions that live in it. Owners are checked there."""

    async def submit(body: Any) -> AsyncGenerator[Any]:
        user_id, session_id, kind, command = body
        asked: Any = COMMANDS[kind].model_validate_json(command)
        yield await host.submit(Principal(user_id), session_id, asked)

    async def pages(body: Any) -> AsyncGenerator[Any]:
        user_id, session_id, cursor, turn, follow = body
        source = host.pages(
            Principal(user_id), session_id, Cursor(*cursor), turn=turn, follow=follow
        )
        async with aclosing(source) as found:
            async for page in found:
                yield page

    return {SUBMIT: submit, PAGES: pages}


class PlaneStage:
    """A session's process as the edge sees it. Implements `actors.routed.Stage`."""

    def __init__(self, address: PlaneAddress, actors: ActorsSettings) -> None:
        self._plane = PlaneClient(address)
        self._limit_s = actors.call_timeout_s
        self._silence_s = actors.call_timeout_s + SILENT_BEATS * actors.page_wait_s

    async def submit(self, who: Principal, session_id: str, command: AnyCommand) -> Accepted:
        body = [who.user_id, session_id, type(command).__name__, command.model_dump_json()]
        try:
            return Accepted(*await self._plane.call(SUBMIT, body, limit_s=self._limit_s))
        except PlaneLost as cause:
            raise _gone() from cause

    async def pages(
        self,
        who: Principal,
        session_id: str,
        cursor: Cursor,
        *,
        turn: int | None = None,
        follow: bool = True,
    ) -> AsyncGenerator[Page]:
        body = [who.user_id, session_id, cursor, turn, follow]
        stream = self._plane.stream(PAGES, body, silence_s=self._silence_s)
        try:
            async with aclosing(stream) as items:
                async for frames, at, end in items:
                    yield Page(tuple(Frame(*frame) for frame in frames), Cursor(*at), end)
        except PlaneLost as cause:
            raise _gone() from cause

    def close(self) -> None:
        self._plane.close()


def _gone() -> Moved:
    return Moved("The session's process is gone.")
