"""The contract of a sandbox: one session's shell and workspace.

Paths in file calls are relative to the workspace, or absolute below `/workspace`, which is how the
commands inside see it (every kind makes that path work, or says its real one in `workspace_path`).
One suite, `tests/contracts/test_sandbox.py`, holds for every kind.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol


class ExecResult(NamedTuple):
    exit_code: int
    """As the shell says it: 127 missing program, 128+n killed by signal n; 124 on timeout."""
    output: str
    """stdout and stderr in the order they came, decoded with replacement. Cut in the middle when
    `truncated`, with a line that says how much is missing and where the full text lies."""
    truncated: bool = False
    timed_out: bool = False
    full_output_path: str | None = None
    """Inside the sandbox, when `truncated`: the text, up to the sandbox's file size limit."""


class Sandbox(Protocol):
    kind: str
    workspace_path: str
    """The workspace as commands inside see it."""

    async def exec(
        self,
        command: str,
        *,
        timeout_s: float,
        max_output_bytes: int = 25_000,
        on_output: Callable[[str], None] | None = None,
    ) -> ExecResult:
        """Run a command in the session's one persistent shell: `cd`, exports and functions last.

        Calls run one at a time, in the order they came. `on_output` gets text as it appears. On
        timeout or cancellation everything the command started is killed before this returns, `setsid`
        children too; the shell may be a new one afterwards, in the same directory with the same
        exported variables as before the command.

        Raises:
            SandboxUnavailable: nothing could be run at all. A missing program is not this.
        """
        ...

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        """The first `max_bytes` of a regular file in the workspace.

        Raises:
            FileNotFoundError, IsADirectoryError: as the words say.
            WorkspaceRefused: the path leaves the workspace (`..`, absolute, symlink), or is no file.
        """
        ...

    async def write_file(self, path: str, content: bytes) -> None:
        """Replace a file whole or not at all; parent directories are made; mode is kept.

        Raises:
            IsADirectoryError: the path is one.
            WorkspaceRefused: the path leaves the workspace, or the size is over the limit.
        """
        ...

    async def close(self) -> None:
        """End every process. The workspace stays. Idempotent; never raises for a dead sandbox."""
        ...
