"""The systems that the bench compares, each in processes of its own that end with it.

- `relay`: the physical floor (`bench.servers.relay`).
- `local`: Troupe's edge over `LocalSessions` in one process (`bench.servers.local`).
- `troupe`: the whole house, by `troupe up`, as a user starts it.

All three ask the same model server over HTTP and are asked over HTTP by the same load.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.processes import Kept, Process

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
PROGRAMS = Path(sys.executable).parent
START_S = 180.0
LOOK_S = 0.02
TICKS = os.sysconf("SC_CLK_TCK")
URL = re.compile(r"^(?:URL: )?(http://\S+)\s*$", re.MULTILINE)


class DidNotStart(Exception):
    """The message ends with what the program printed last."""


class System(NamedTuple):
    name: str
    url: str
    kept: Kept
    took_s: float
    """From the program's start until it said where it listens."""

    def processes(self) -> list[Process]:
        """All of it, the keeper aside."""
        return self.kept.processes()

    def cpu_s(self) -> float:
        """What all its processes used so far, those that ended and were waited for too."""
        return sum(map(cpu_s_of, (process.pid for process in self.processes())))

    def pss_bytes(self, *, of: Callable[[Process], bool] = lambda _: True) -> list[int]:
        """Proportional set size of each of its processes that `of` names."""
        return [pss_bytes_of(process.pid) for process in self.processes() if of(process)]


def is_session(process: Process) -> bool:
    """Whether a session lives in it: an empty one says that it is warm."""
    return "ray::SessionActor" in process.title and not process.title.endswith("warm")


def cpu_s_of(pid: int) -> float:
    """What a process used, and those of its children that it waited for. 0: it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    user, system, waited_user, waited_system = stat.rpartition(")")[2].split()[11:15]
    return (int(user) + int(system) + int(waited_user) + int(waited_system)) / TICKS


def pss_bytes_of(pid: int) -> int:
    """0: it is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    [kib] = re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(kib) * 1024


@contextmanager
def model_server(folder: Path) -> Generator[str]:
    """The URL of `bench.servers.model`."""
    with _started("model", [PYTHON, "-m", "bench.servers.model"], folder) as system:
        yield system.url


@contextmanager
def relay(folder: Path, model_url: str) -> Generator[System]:
    with _started("relay", [PYTHON, "-m", "bench.servers.relay", model_url], folder) as system:
        yield system


@contextmanager
def local(folder: Path, settings: Mapping[str, Any]) -> Generator[System]:
    """`folder` becomes the storage."""
    config = _written(folder, "local", settings)
    with _started("local", [PYTHON, "-m", "bench.servers.local", config], folder) as system:
        yield system


@contextmanager
def troupe(folder: Path, settings: Mapping[str, Any]) -> Generator[System]:
    config = _written(folder, "troupe", settings)
    program = [PROGRAMS / "troupe", "up", "--dev", "--port", "0", "--config", config]
    with _started("troupe", program, folder) as system:
        yield system


def house_settings(folder: Path, model_url: str, **over: Mapping[str, Any]) -> dict[str, Any]:
    """Of a house that asks the bench's model server. `over`: section by section."""
    sections: dict[str, dict[str, Any]] = {
        "agent": {
            "storage_dir": str(folder),
            "default_model": "openai/chunks-1-at-0",
            "model": {"api_base": f"{model_url}/v1"},
        },
        "actors": {"max_sessions": 200, "max_sessions_per_user": 200},
        "serve": {"dev": True},
    }
    for name, section in over.items():
        sections[name] |= section
    return sections


def _written(folder: Path, name: str, settings: Mapping[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(dict(settings)))
    return path


@contextmanager
def _started(name: str, program: Sequence[str | Path], folder: Path) -> Generator[System]:
    log = folder / f"{name}.log"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environ |= {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "bench", "COLUMNS": "200"}
    log.unlink(missing_ok=True)  # of one before it, which said where that one listened
    began_s = time.monotonic()
    kept = Kept(log)
    try:
        kept.run(list(map(str, program)), env=environ, cwd=ROOT)
        url = _said(log, kept)
        yield System(name, url, kept, time.monotonic() - began_s)
    except BaseException:
        # The folder goes, and why a system failed with it.
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        raise
    finally:
        kept.end()


def _said(log: Path, kept: Kept) -> str:
    give_up_s = time.monotonic() + START_S
    began = False
    while True:
        ended = began and not kept.processes()
        began = began or bool(kept.processes())
        text = log.read_text(errors="replace")
        if found := URL.search(text):
            return found[1]
        if ended or time.monotonic() > give_up_s:
            raise DidNotStart(f"{log.name}: {text[-2000:]}")
        time.sleep(LOOK_S)
