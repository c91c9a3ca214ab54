"""An activation's part in the copies of its workspace: made at each rest, fetched where it wakes."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from actors.detached import Detached
from actors.kit import Kit
from agent.context import Context
from agent.events import Fact
from agent.faults import JournalFault, SettingsInvalid, SnapshotFailed

log = structlog.get_logger()


class Keeping:
    """Saves one after another, in a task of its own: neither a turn nor a report waits for it."""

    def __init__(
        self, kit: Kit, context: Context, tasks: Detached, commit: Callable[[Fact], Awaitable[None]]
    ) -> None:
        self._snapshots = kit.snapshots
        self._session_id = context.opened.session_id
        self._workspace = kit.workspace(self._session_id)
        self._context = context
        self._tasks = tasks
        self._commit = commit
        self._task: asyncio.Task[None] | None = None
        self._is_due = False

    async def restore(self) -> list[Fact]:
        """Make the workspace here the current one, before a sandbox opens; the fact, if it was not.

        Raises:
            SnapshotFailed, SettingsInvalid
        """
        if self._snapshots is None:
            return []
        restored = await self._snapshots.restore(
            self._session_id, self._workspace, self._context.held
        )
        if restored is None:
            return []
        turn = self._context.open_turns[0] if self._context.open_turns else 0
        return [restored.model_copy(update={"turn": turn})]

    def save_soon(self) -> None:
        """Save what changed; once more if a save is under way, which may have missed it."""
        self._is_due = True
        if self._task is None:
            self._task = self._tasks.start(self._save_while_due(), name="save")

    async def _save_while_due(self) -> None:
        try:
            while self._is_due:
                self._is_due = False
                await self._save()
        finally:
            self._task = None

    async def save_last(self, wait_s: float) -> bool:
        """Save what changed since, when nothing changes it any more. False: it could not be, in time."""
        try:
            async with asyncio.timeout(wait_s):
                if self._task is not None:
                    await asyncio.wait({self._task})
                return await self._save()
        except TimeoutError:
            log.warning("workspace_not_saved", session_id=self._session_id, reason="time")
            await self.stop()
            return False

    async def _save(self) -> bool:
        if self._snapshots is None:
            return True
        held, epoch = self._context.held, self._context.epoch
        try:
            saved = await self._snapshots.save(
                self._session_id, self._workspace, held.saved, epoch=epoch
            )
            if saved is not None:
                await self._commit(saved)
        except (SnapshotFailed, SettingsInvalid):
            log.warning("workspace_not_saved", session_id=self._session_id, exc_info=True)
            return False
        except JournalFault:
            return False  # the activation knows: it made the commit, and is lost
        return True

    async def stop(self) -> None:
        """Break a save off. The earlier snapshot stands."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
