"""Sandboxes on this machine.

The workspace is the only host path that commands can write. `/tmp` is private (under sandlock without
the right to mount it is closed, and TMPDIR names a directory of the workspace). Full outputs are kept
in `.troupe/outputs` of the workspace, the newest `KEPT_OUTPUTS`, where `read_file` reaches them too.

A command that is stopped (timeout, cancellation) takes the whole sandbox with it, since only that is
certain to leave nothing: background jobs of earlier commands, shell functions and the contents of a
private /tmp are gone afterwards; the directory and the exported variables are restored.
What a background job prints goes to the command that runs at that moment, and nowhere between.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from agent.faults import SandboxUnavailable, WorkspaceRefused
from agent.sandbox import kinds
from agent.sandbox.capture import Capture
from agent.sandbox.contract import ExecResult, Sandbox
from agent.sandbox.kinds import choose_kind
from agent.sandbox.limits import session_uid
from agent.sandbox.reaper import evict
from agent.sandbox.shell import Launch, Shell, ShellState
from agent.sandbox.workspace import Workspace
from agent.spec import SandboxSpec

__all__ = ["choose_kind", "open_sandbox"]
log = structlog.get_logger(__name__)

TIMED_OUT = 124
"""As coreutils' `timeout` says it."""


async def open_sandbox(
    spec: SandboxSpec, workspace: Path, *, session_id: str, epoch: int = 1
) -> Sandbox:
    """Open a session's sandbox over its workspace, which is made when it is missing.

    Sandboxes that the session's earlier epochs left open on this machine are ended first.

    Raises:
        SandboxUnavailable: the machine cannot do what `spec` asks, or the start failed.
    """
    kind = await asyncio.to_thread(choose_kind, spec)
    if epoch > 1 and (ended := await asyncio.to_thread(evict, session_id, epoch)):
        log.warning("sandbox_evicted", session_id=session_id, epoch=epoch, n_processes=len(ended))
    if kind == "process":
        log.warning("sandbox_without_isolation", session_id=session_id)
    root = await asyncio.to_thread(workspace.absolute)
    uid = None if kind == "process" else await asyncio.to_thread(session_uid, session_id)
    launch = await asyncio.to_thread(kinds.launch, kind, spec, root, session_id, epoch)
    files = await asyncio.to_thread(_opened, root, uid, spec)
    sandbox = LocalSandbox(kind, spec, launch, files)
    try:
        await sandbox.start()
    except BaseException:
        await sandbox.close()
        raise
    return sandbox


def _opened(root: Path, uid: int | None, spec: SandboxSpec) -> Workspace:
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        files = Workspace(root, inside="/workspace", uid=uid, max_file_bytes=spec.max_file_bytes)
    except OSError as cause:
        raise SandboxUnavailable("The workspace directory cannot be made or opened.") from cause
    try:
        files.prepare()
    except WorkspaceRefused:
        # An earlier command put something else in the place of our directory: then full outputs
        # are not kept, which their cut text says.
        log.warning("sandbox_directory_replaced", exc_info=True)
    return files


class LocalSandbox:
    """`agent.sandbox.contract.Sandbox`; made by `open_sandbox`."""

    def __init__(self, kind: str, spec: SandboxSpec, launch: Launch, files: Workspace) -> None:
        self.kind = kind
        self.workspace_path = files.inside
        self._spec = spec
        self._launch = launch
        self._files = files
        self._shell: Shell | None = None
        self._state: ShellState | None = None
        self._closed = False
        # Commands run one at a time in the order they came: there is one shell, and a lock's
        # waiters are served in order.
        self._turns = asyncio.Lock()

    async def start(self) -> None:
        """Start the first shell; its directory is the workspace as commands see it."""
        self._shell = await Shell.start(self._launch, self._scratch(), None)
        where = await self._shell.run(":", self._scratch())
        if where.state is None:
            raise SandboxUnavailable("The sandbox ended while it was being started.")
        self._state = where.state
        self.workspace_path = self._files.inside = where.state.directory

    async def exec(
        self,
        command: str,
        *,
        timeout_s: float,
        max_output_bytes: int = 25_000,
        on_output: Callable[[str], None] | None = None,
    ) -> ExecResult:
        if "\0" in command:
            return ExecResult(2, "a command may not hold a NUL character")
        async with self._turns:
            shell = await self._ready()
            capture = Capture(
                self._files,
                max_bytes=max_output_bytes,
                max_file_bytes=self._spec.max_file_bytes,
                on_output=on_output,
            )
            exit_code = await self._run(shell, command, capture, timeout_s)
            text, truncated, path = await capture.finish()
        timed_out = exit_code is None
        return ExecResult(
            TIMED_OUT if exit_code is None else exit_code, text, truncated, timed_out, path
        )

    async def _run(
        self, shell: Shell, command: str, capture: Capture, timeout_s: float
    ) -> int | None:
        """The exit code; None: it was stopped for its time."""
        try:
            async with asyncio.timeout(timeout_s):
                ended = await shell.run(command, capture)
        except TimeoutError:
            await shell.kill()
            return None
        except BaseException:  # cancelled, or `on_output` raised: the command must not go on
            await shell.kill()
            await capture.finish()
            raise
        if ended.state is None:
            await shell.kill()
        else:
            self._state = ended.state
        return ended.exit_code

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await asyncio.to_thread(self._files.read, path, max_bytes)

    async def write_file(self, path: str, content: bytes) -> None:
        await asyncio.to_thread(self._files.write, path, content)

    async def close(self) -> None:
        self._closed = True
        if self._shell is not None:
            await self._shell.kill()
        async with self._turns:  # a command that ran sees its shell end, and returns first
            await asyncio.to_thread(self._files.close)

    async def _ready(self) -> Shell:
        """The shell, or a new one in the state of the last when that is gone."""
        if self._closed:
            raise SandboxUnavailable("The sandbox is closed.")
        if self._shell is None or not self._shell.alive:
            if self._shell is not None:
                await self._shell.kill()
            self._shell = await Shell.start(self._launch, self._scratch(), self._state)
            if self._closed:  # while it started
                await self._shell.kill()
                raise SandboxUnavailable("The sandbox is closed.")
        return self._shell

    def _scratch(self) -> Capture:
        return Capture(self._files, max_bytes=4096, max_file_bytes=0, on_output=None)
