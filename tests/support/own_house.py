"""A house of its own, by `troupe up` in a process, to be ended in good order or not."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Collection, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.house import AGENTS
from tests.support.http import WAIT_S, User
from tests.support.processes import below, wait_for_ends

END_S = 60.0
TROUPE = Path(sys.executable).with_name("troupe")


class OwnHouse:
    """What runs."""

    def __init__(self, process: subprocess.Popen[str], url: str, config: Path) -> None:
        self.process = process
        self.url = url
        self.config = config

    def said(self, start: str) -> str:
        """Read its output up to a line that begins so: the rest of that line."""
        assert self.process.stdout
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(lines)

    def terminate(self) -> None:
        """Stop it in good order."""
        everyone = below(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(END_S) == 0
        assert wait_for_ends(everyone, END_S) == set()

    def kill(self, *, spared: Collection[int] = ()) -> None:
        """Kill every process of it at once. The `spared` must end by themselves."""
        everyone = below(self.process.pid)
        for pid in everyone:
            if pid not in spared:
                with suppress(ProcessLookupError):  # some end with those before them
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(END_S)
        assert wait_for_ends(everyone, END_S) == set()

    @asynccontextmanager
    async def user(self) -> AsyncGenerator[User]:
        async with httpx.AsyncClient(base_url=self.url, timeout=WAIT_S) as http:
            yield User("dev", http)


def own_environment() -> dict[str, str]:
    """Without the tokens and switches of the run's own cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@contextmanager
def own_house(
    storage_dir: Path, *, edge: dict[str, Any] | None = None, **actors: Any
) -> Generator[OwnHouse]:
    config = storage_dir / "test.yaml"
    settings: dict[str, Any] = {
        "agent": {
            "storage_dir": str(storage_dir),
            "agents_dir": str(AGENTS),
            "default_agent": "tester",
        },
        "actors": {"close_wait_s": 20.0, "page_wait_s": 0.2, **actors},
        "serve": edge or {},
    }
    config.write_text(yaml.safe_dump(settings))
    command = [TROUPE, "up", "--dev", "--port", "0", "--model", "scripted/puppet", "-c", config]
    environ = own_environment()
    errors = (storage_dir / "errors.txt").open("a")
    with (
        errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ
        ) as process,
    ):
        running = OwnHouse(process, "", config)
        try:
            running.url = running.said("URL: ")
            yield running
        finally:
            if process.poll() is None:
                running.kill()
