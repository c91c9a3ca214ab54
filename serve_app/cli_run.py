"""The run file: how `down`, `status` and `chat` find the house that `up` started.

`<storage_dir>/troupe.run.json` is locked (flock) as long as its house runs, so that whether one runs
never depends on a process id that somebody else may have by now: no lock, no house.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from agent.faults import Fault
from agent.settings import Section

NAME = "troupe.run.json"
LOOK_AGAIN_S = 0.05
N_LOOKS = 10
"""A reader holds the lock for microseconds; half a second of it is a house."""


class AlreadyRunning(Fault):
    code = "already_running"


class Run(Section):
    pid: int
    url: str | None = None
    """None: still starting."""
    dashboard_url: str | None = None
    ray_address: str | None = None
    auth: Literal["dev", "keys"] = "keys"
    model: str | None = None
    ray_auth_token: str | None = None
    """Opens Ray's dashboard and API, which means running any code: hence mode 0600."""


class RunFile:
    def __init__(self, storage_dir: Path) -> None:
        self.path = storage_dir / NAME

    @contextlib.contextmanager
    def held(self) -> Generator[Callable[[Run], None]]:
        """Be the house of this storage directory; yields what writes the file's content.

        Raises:
            AlreadyRunning: another process is, and its file says where.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fchmod(fd, 0o600)
            if not _locked(fd):
                raise AlreadyRunning(self._who())

            def write(run: Run) -> None:
                text = run.model_dump_json(indent=2).encode()
                os.pwrite(fd, text, 0)
                os.truncate(fd, len(text))

            write(Run(pid=os.getpid()))
            try:
                yield write
            finally:
                os.truncate(fd, 0)
        finally:
            os.close(fd)

    def _who(self) -> str:
        run = self.read()
        where = run and (run.url or "still starting")
        return (
            f"Troupe is already running for {self.path.parent}"
            f" ({where or 'starting'}, pid {run.pid if run else 'unknown'})."
            " End it with `troupe down`, or use another agent.storage_dir."
        )

    def read(self) -> Run | None:
        """What the running house wrote; None: none runs."""
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if not _is_locked(fd):
                return None
            return Run.model_validate_json(os.pread(fd, 1024**2, 0))
        except ValidationError:
            return None  # between its first moment and its first word, or its last
        finally:
            os.close(fd)

    def wait_until_free(self, limit_s: float) -> bool:
        """Whether the house ended within the limit. A lock has no event to wait for across processes
        that could be bounded in time, so this looks again and again."""
        deadline = time.monotonic() + limit_s
        while self.read() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_AGAIN_S)
        return True


def _locked(fd: int) -> bool:
    for _ in range(N_LOOKS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOOK_AGAIN_S)
    return False


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False  # closing the descriptor gives it back
