"""A sandbox without processes: files are real, below a directory; commands answer as scripted."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.faults import SandboxUnavailable
from agent.sandbox.contract import ExecResult
from agent.sandbox.workspace import Workspace

Reply = ExecResult | Callable[[str], ExecResult]


class FakeSandbox:
    """`replies` maps a command, whole, to its result or to a function of it; any other command exits
    with 127. A reply's output is shown, too. `commands` lists what was asked, in order."""

    kind = "fake"

    def __init__(
        self,
        workspace: Path,
        replies: Mapping[str, Reply] | None = None,
        *,
        max_file_bytes: int = 1024**2,
    ) -> None:
        self.workspace_path = "/workspace"
        self.commands: list[str] = []
        self.closed = False
        self._replies = dict(replies or {})
        self._files = Workspace(
            workspace, inside=self.workspace_path, max_file_bytes=max_file_bytes
        )

    async def exec(
        self,
        command: str,
        *,
        timeout_s: float,
        max_output_bytes: int = 25_000,
        on_output: Callable[[str], None] | None = None,
    ) -> ExecResult:
        del timeout_s, max_output_bytes
        if self.closed:
            raise SandboxUnavailable("The sandbox is closed.")
        self.commands.append(command)
        reply = self._replies.get(command, ExecResult(127, f"{command}: command not found\n"))
        result = reply if isinstance(reply, ExecResult) else reply(command)
        if on_output is not None and result.output:
            on_output(result.output)
        return result

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await asyncio.to_thread(self._files.read, path, max_bytes)

    async def write_file(self, path: str, content: bytes) -> None:
        await asyncio.to_thread(self._files.write, path, content)

    async def close(self) -> None:
        self.closed = True
        await asyncio.to_thread(self._files.close)
