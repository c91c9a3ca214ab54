"""One bash that lives as long as nothing goes wrong, and the protocol that drives it.

Its stdin carries commands, its stdout the output of all of them, and its stderr is ours: a command's
own stderr goes to stdout. After a command the shell writes a mark with a random token to both: the
mark in the output says where the command's output ends, the one on the control stream carries the
exit code, the directory and the exported variables. Output that looks like a mark does not know the
token. A command gets its stdin from /dev/null, so it cannot eat the next one.

The shell may end at any time (`exit`, `kill`, the OOM killer); `run` then returns its exit code, and
the owner starts another with the state that the last finished command left.
"""

import asyncio
import json
import os
import re
import secrets
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from agent.faults import SandboxUnavailable
from agent.sandbox import marks
from agent.sandbox.capture import Capture

log = structlog.get_logger(__name__)

_START_LIMIT_S = 20.0
"""A shell is there within 0.1 s; a machine under load may need much longer."""
_KILL_LIMIT_S = 10.0
_CHUNK_BYTES = 1 << 18
_CONTROL_BYTES = 1 << 20
"""Exported variables beyond this are not carried over to a new shell."""
_WARDEN = Path(__file__).with_name("warden.py")


class Launch(NamedTuple):
    """How a sandbox of some kind is started."""

    plan: dict[str, Any]
    """For the warden, without `lifeline`."""
    ulimits: tuple[str, ...]
    """Options and values of bash's `ulimit`, set hard before anything else runs."""
    mark: marks.Mark
    """Of the warden, with an `inside` that each start replaces."""


class ShellState(NamedTuple):
    directory: str
    exports: str
    """What `export -p` said: bash code."""


class Ended(NamedTuple):
    exit_code: int
    state: ShellState | None
    """None: the shell is gone."""


class Shell:
    """Use `start`. Commands run one at a time: the owner sees to that."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int) -> None:
        self._process = process
        self._lifeline = lifeline
        self._token = b""
        self._capture: Capture | None = None
        self._carry = b""
        self._control = bytearray()
        self._output_ended = asyncio.Event()
        self._control_ended = asyncio.Event()
        self._gone = False
        self._pumps = (
            asyncio.create_task(self._pump_output(), name="sandbox-output"),
            asyncio.create_task(self._pump_control(), name="sandbox-control"),
        )

    @classmethod
    async def start(cls, launch: Launch, scratch: Capture, state: ShellState | None) -> "Shell":
        """
        Raises:
            SandboxUnavailable: nothing that answers could be started.
        """
        mark = launch.mark._replace(inside=secrets.token_hex(8))
        plan = launch.plan | {"env": launch.plan["env"] | {marks.INSIDE: mark.inside}}
        read_end, write_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(_WARDEN),
                json.dumps({"lifeline": read_end, **plan}),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(read_end,),
                # HOME: of a uid without a name Python would not find one.
                env={"HOME": "/", marks.WARDEN: str(mark)},
                cwd="/",
                start_new_session=True,  # a Ctrl-C at our terminal is not for the sandbox
                limit=_CHUNK_BYTES,
            )  # fmt: skip
        except BaseException as cause:
            os.close(write_end)
            if isinstance(cause, OSError):
                raise SandboxUnavailable("The sandbox's process could not be started.") from cause
            raise
        finally:
            os.close(read_end)
        shell = cls(process, write_end)
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                ended = await shell.run(_setup(launch.ulimits, state), scratch)
        except BaseException as cause:
            await shell.kill()
            if isinstance(cause, TimeoutError):
                raise SandboxUnavailable("The sandbox did not answer after its start.") from cause
            raise
        if ended.state is None:
            said = shell._control.decode(errors="replace")[-2000:]
            await shell.kill()
            log.error("sandbox_start_failed", exit_code=ended.exit_code, said=said)
            raise SandboxUnavailable("The sandbox ended while it was being started.")
        return shell

    @property
    def alive(self) -> bool:
        return not self._gone

    async def run(self, command: str, capture: Capture) -> Ended:
        """Run a command to its end, or to the shell's. If cancelled, `kill` must follow."""
        self._token = f"troupe-{secrets.token_hex(16)}".encode()
        self._control.clear()
        self._output_ended.clear()
        self._control_ended.clear()
        if self._gone:
            return Ended(self._process.returncode or 0, None)
        self._capture = capture
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 asked for above
        with suppress(BrokenPipeError, ConnectionResetError):  # it ended: the pumps will say so
            stdin.write(_script(command, self._token.decode()))
            await stdin.drain()
        await self._output_ended.wait()
        if self._pumps[0].done():
            self._pumps[0].result()  # raises what `on_output` raised
        await self._control_ended.wait()
        self._capture = None
        state = self._parsed()
        if state is None:
            return Ended(await self._process.wait(), None)
        return state

    async def kill(self) -> None:
        """End everything that runs in the sandbox. Idempotent; completes even when cancelled."""
        killing = asyncio.create_task(self._kill())
        cancelled = False
        while not killing.done():
            try:
                await asyncio.shield(killing)
            except asyncio.CancelledError:
                cancelled = True
        killing.result()
        if cancelled:
            raise asyncio.CancelledError

    async def _kill(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        try:
            # The pumps read to the end meanwhile: `wait` does not return before that.
            async with asyncio.timeout(_KILL_LIMIT_S):
                await self._process.wait()
                await asyncio.gather(*self._pumps, return_exceptions=True)
        except TimeoutError:
            log.exception("sandbox_kill_timed_out", pid=self._process.pid)
            with suppress(ProcessLookupError):
                self._process.kill()
            for pump in self._pumps:
                pump.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)
        stdin = self._process.stdin
        if stdin is not None:
            stdin.close()

    async def _pump_output(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101 asked for above
        try:
            while chunk := await stdout.read(_CHUNK_BYTES):
                await self._route(chunk)
            if self._capture is not None and self._carry:
                await self._capture.feed(self._carry)
        finally:
            self._gone = True
            self._output_ended.set()

    async def _route(self, chunk: bytes) -> None:
        """To the running command, up to its mark. Without one, nobody wants it: background jobs
        that print between commands must not fill the pipe and stop."""
        if self._capture is None or self._output_ended.is_set():
            return
        mark = b"\0" + self._token + b"\0"
        text = self._carry + chunk
        at = text.find(mark)
        end = at if at >= 0 else len(text) - _overlap(text, mark)
        self._carry = text[end:] if at < 0 else b""
        if end:
            await self._capture.feed(text[:end])
        if at >= 0:
            self._output_ended.set()

    async def _pump_control(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None  # noqa: S101 asked for above
        while chunk := await stderr.read(_CHUNK_BYTES):
            self._control += chunk
            del self._control[: -2 * _CONTROL_BYTES]
            if self._token and b"\0" + self._token + b"\n" in self._control[-len(chunk) - 64 :]:
                self._control_ended.set()
        self._control_ended.set()

    def _parsed(self) -> Ended | None:
        token = re.escape(self._token)
        found = re.search(
            token + rb"\0(\d+)\0([^\0]*)\0([^\0]*)\0" + token, bytes(self._control), re.DOTALL
        )
        if found is None:
            return None
        code, directory, exports = (os.fsdecode(part) for part in found.groups())
        return Ended(int(code), ShellState(directory, exports))


def _overlap(text: bytes, mark: bytes) -> int:
    """How many bytes at the end of `text` may be the beginning of `mark`."""
    at = text.rfind(b"\0", max(0, len(text) - len(mark) + 1))
    return len(text) - at if at >= 0 and mark.startswith(text[at:]) else 0


def _script(command: str, token: str) -> bytes:
    """A command, then the marks. `builtin` by name, so that functions of the session do not get
    between; the groups' own redirections undo what `exec` did to the streams inside; the last one keeps
    `set -x` from writing into the state."""
    return os.fsencode(
        f"{{ {{ \\builtin eval {shlex.quote(command)}; }} </dev/null >&250 2>&250 250>&-; }} 250>&1\n"
        f'{{ \\builtin printf \'{token}\\0%d\\0%s\\0\' "$?" "$PWD" >&3; \\builtin export -p >&3;'
        f" \\builtin printf '\\0{token}\\n' >&3; \\builtin printf '\\0{token}\\0'; }} 3>&2 2>/dev/null\n"
    )


def _setup(ulimits: tuple[str, ...], state: ShellState | None) -> str:
    # A hard limit that is lower already cannot be raised, and need not be.
    lines = [f"ulimit {limit} 2>/dev/null" for limit in ulimits]
    lines.append("umask 022")
    if state is not None:
        # The mark of the shell before is among its exports.
        lines += [f"troupe_mark=${marks.INSIDE}", state.exports]
        lines += [f"export {marks.INSIDE}=$troupe_mark", "unset troupe_mark"]
        lines.append(f"cd -- {shlex.quote(state.directory)} 2>/dev/null")
    return "\n".join([*lines, ":"])
