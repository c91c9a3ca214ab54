"""What a journal says of a session's workspace: which copy is the current one, and how sure that is."""

from typing import NamedTuple

from agent.events import (
    Fact,
    SandboxClosed,
    SandboxOpened,
    WorkspaceRestored,
    WorkspaceSaved,
)


class Held(NamedTuple):
    saved: WorkspaceSaved | None = None
    """The newest."""
    copy_id: str | None = None
    """The current copy's. None: nobody has named one yet."""
    was_used: bool = False
    """A sandbox was opened before."""
    is_behind: bool = False
    """The current copy may hold more than `saved`, and no sandbox is at it."""

    def after(self, fact: Fact) -> "Held":
        match fact:
            case SandboxOpened():
                return self._replace(was_used=True, is_behind=False)
            case SandboxClosed(unsaved=unsaved):
                return self._replace(is_behind=unsaved)
            case WorkspaceSaved(copy_id=copy_id):
                return self._replace(saved=fact, copy_id=copy_id, is_behind=False)
            case WorkspaceRestored(copy_id=copy_id):
                return self._replace(copy_id=copy_id, is_behind=False)
            case _:
                return self
