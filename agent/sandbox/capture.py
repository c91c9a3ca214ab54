"""The output of one command: the head, the tail, and the whole of it in a file.

Memory stays within a few times `max_bytes` whatever the command prints.
"""

import asyncio
import codecs
import os
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from agent.faults import WorkspaceRefused
from agent.sandbox.workspace import Workspace

_BATCH_BYTES = 1 << 20
"""A thread hop per batch: large enough that 300 MB are 300 hops."""


class Captured(NamedTuple):
    text: str
    truncated: bool
    full_output_path: str | None


class Capture:
    def __init__(
        self,
        workspace: Workspace,
        *,
        max_bytes: int,
        max_file_bytes: int,
        on_output: Callable[[str], None] | None,
    ) -> None:
        self._workspace = workspace
        self._max_bytes = max_bytes
        self._room_bytes = max_file_bytes
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._total_bytes = 0
        self._show = on_output
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._fd = -1
        self._path: str | None = None
        self._spilled = False
        self._batch = bytearray()

    async def feed(self, chunk: bytes) -> None:
        """Take output as it comes. Waits for the disk, so the command is held back by it."""
        self._preview(chunk)
        self._total_bytes += len(chunk)
        if self._spilled:
            self._keep_tail(chunk)
            await self._write(chunk)
            return
        self._head += chunk
        if self._total_bytes > self._max_bytes:
            await self._begin_spill()

    async def finish(self) -> Captured:
        if not self._spilled:
            return Captured(self._head.decode(errors="replace"), False, None)
        await self._flush()
        if self._fd >= 0:
            await asyncio.to_thread(os.close, self._fd)
            self._fd = -1
        return self._cut()

    def _preview(self, chunk: bytes) -> None:
        """Show up to `max_bytes`: readers watch, nobody reads 300 MB as it scrolls by."""
        if self._show is None or not chunk:
            return
        room = self._max_bytes - self._total_bytes
        if room <= 0:
            self._show("\n[more output follows; it is not shown live]\n")
            self._show = None
        elif text := self._decoder.decode(chunk[:room]):
            self._show(text)

    async def _begin_spill(self) -> None:
        self._spilled = True
        try:
            self._path, self._fd = await asyncio.to_thread(self._workspace.spill)
        except (OSError, WorkspaceRefused):
            # The disk is full, or a command replaced the directory: the cut text says that
            # nothing was kept, and the command goes on.
            self._path = None
        head = bytes(self._head)
        half = self._max_bytes // 2
        self._head = bytearray(head[:half])
        self._keep_tail(head[half:])
        await self._write(head)

    def _keep_tail(self, chunk: bytes) -> None:
        keep = self._max_bytes - self._max_bytes // 2
        self._tail.append(chunk[-keep:])
        self._tail_bytes += len(self._tail[-1])
        while self._tail_bytes - len(self._tail[0]) >= keep:
            self._tail_bytes -= len(self._tail.popleft())

    async def _write(self, chunk: bytes) -> None:
        if self._fd < 0 or self._room_bytes <= 0:
            return
        piece = chunk[: self._room_bytes]
        self._room_bytes -= len(piece)
        self._batch += piece
        if len(self._batch) >= _BATCH_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        if self._fd >= 0 and self._batch:
            batch, self._batch = self._batch, bytearray()
            try:
                await asyncio.to_thread(_write_all, self._fd, batch)
            except OSError:
                self._room_bytes = 0  # the disk is full: what is there stays, and is named

    def _cut(self) -> Captured:
        keep = self._max_bytes - self._max_bytes // 2
        tail = b"".join(self._tail)[-keep:]
        missing = self._total_bytes - len(self._head) - len(tail)
        where = f"the full text is in {self._path}" if self._path else "the full text was not kept"
        if self._path and self._room_bytes <= 0:
            where = f"the beginning of the full text is in {self._path}"
        # A cut through a character leaves bytes that are no text: drop them on both sides.
        head = codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(self._head))
        text = tail.lstrip(bytes(range(0x80, 0xC0))) if tail[:1] > b"\x7f" else tail
        return Captured(
            f"{head}\n[... {missing} bytes are missing here; {where} ...]\n"
            f"{text.decode(errors='replace')}",
            True,
            self._path,
        )


def _write_all(fd: int, content: bytearray) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
