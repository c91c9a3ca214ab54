"""A whole Troupe in processes of its own, as an operator runs it: Ray nodes, `troupe up` joined to
them, and where asked Redis behind the GCS and Postgres behind the journal.

The nodes are of one machine: each is a `ray start` under a keeper of its own, so a node can be lost
whole. Nothing of Ray is imported here; who is who is read from the processes' titles. Everything
ends with the world, also when whoever made it dies.

Blocking throughout: a test or a chaos run calls it from a thread where that matters.
"""

import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from bench.processes import LOOK_EVERY_S, Kept, Process, below, ended, send, snapshot
from serve_app.cluster import HAPROXY_CONFIG, haproxy_environment
from serve_app.settings import ServeSettings

ROOT = Path(__file__).parent.parent
AGENTS = Path(__file__).parent / "agents"
PROGRAMS = Path(sys.executable).parent
START_S = 180.0
"""For a part to say that it is there: half a minute on two idle cores, minutes on busy ones."""
DOWN_S = 120.0
OBJECT_STORE_BYTES = 100_000_000
CPUS = 4
"""Of a node. Actors here need none; a raylet starts as many processes at once."""

ROLES: dict[str, str] = {
    "session": "ray::SessionActor",
    "manager": "ray::SessionManager",
    "gateway": "ray::ServeReplica:troupe-gateway",
    "edge": "ray::ServeReplica:troupe:edge",
    "proxy": "ray::ProxyActor",
    "haproxy manager": "ray::HAProxyManager",
    "controller": "ray::ServeController",
    "node actor": "ray::NodeActor",
}
"""Which role a process has, by the beginning of its title."""
BINARIES = {"gcs": "/gcs/gcs_server ", "raylet": "/raylet/raylet ", "haproxy": "/haproxy -"}
HEAD = 0


class WorldFault(Exception):
    """A part did not start or end in time. The message ends with what it printed last."""


class Victim(NamedTuple):
    role: str
    pid: int
    node: int
    """-1: on none, as Postgres."""
    sessions: frozenset[str] = frozenset()
    """A session actor's, as far as they have opened a sandbox; a raylet's: all of its node."""


class Node:
    """One `ray start` and what came of it."""

    def __init__(self, number: int, kept: Kept, log: Path) -> None:
        self.number = number
        self.kept = kept
        self.log = log


class World:
    """Up from `start` to `stop`; a context manager does both.

    `settings` go over Troupe's defaults, section by section.
    """

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 1,
        redis: bool = False,
        database: Any = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.directory = directory
        self.storage = directory / "storage"
        self.url = ""
        self.database = database
        """A started Postgres with `url`, `start`, `stop`, `kill`, `pause` and `resume`; None: SQLite."""
        self.redis = redis
        self.nodes: list[Node] = []
        self._n_nodes = nodes
        self.settings = settings or {}
        self._ends = ExitStack()
        self._ray_port, self._redis_port = free_ports(2)
        self._env = _environment() | self._proxy_environment()
        self._address = ""
        self._ray_dir = Path(f"/tmp/troupe-world-{self._ray_port}")
        self._gcs: tuple[list[str], dict[str, str]] | None = None
        self._door: Kept | None = None

    def _proxy_environment(self) -> dict[str, str]:
        """What `troupe up` would set for a Ray of its own; one that it joins has it from its nodes."""
        edge = ServeSettings(**self.settings.get("serve", {}))
        return haproxy_environment(edge) if edge.proxy == "haproxy" else {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- up and down ---------------------------------------------------------------------------

    def start(self) -> None:
        """Have everything running.

        Raises:
            WorldFault
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as ends:
            ends.callback(self._keep_logs)
            if self.redis:
                self._start_redis(ends)
            for number in range(self._n_nodes):
                log = self.directory / f"node{number}.log"
                kept = Kept(log)
                ends.callback(kept.end)
                self.nodes.append(Node(number, kept, log))
                self.start_node(number)
            self._start_troupe(ends)
            self._ends = ends.pop_all()

    def stop(self) -> None:
        """Kill all of it. Ray's logs stay, in `ray` of the directory."""
        self._ends.close()

    def _keep_logs(self) -> None:
        for logs in self._ray_dir.glob("session_2*/logs"):
            shutil.copytree(logs, self.directory / "ray", dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(self._ray_dir, ignore_errors=True)
        if HAPROXY_CONFIG in self._env:
            shutil.rmtree(Path(self._env[HAPROXY_CONFIG]).parent, ignore_errors=True)

    def _start_redis(self, ends: ExitStack) -> None:
        log = self.directory / "redis.log"
        kept = Kept(log)
        ends.callback(kept.end)
        argv = ["redis-server", "--port", self._redis_port, "--bind", "127.0.0.1"]
        kept.run([*argv, "--save", "", "--dir", self.directory], env=self._env, cwd=self.directory)
        said(log, "Ready to accept connections")

    def start_node(self, number: int) -> None:
        """`ray start` on a node that has no processes."""
        node = self.nodes[number]
        client, metrics, agent, agent_grpc, dashboard = free_ports(5)
        argv = [str(PROGRAMS / "ray"), "start", f"--num-cpus={CPUS}", "--node-ip-address=127.0.0.1"]
        argv += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--metrics-export-port={metrics}"]
        argv += [f"--dashboard-agent-listen-port={agent}"]
        argv += [f"--dashboard-agent-grpc-port={agent_grpc}"]
        env = dict(self._env)
        if number == HEAD:
            argv += ["--head", f"--port={self._ray_port}", f"--ray-client-server-port={client}"]
            # AF_UNIX paths are short, so not below our own directory, whose path may be long.
            # The head process of the dashboard takes its port even then.
            argv += ["--include-dashboard=false", f"--dashboard-port={dashboard}"]
            argv += [f"--temp-dir={self._ray_dir}"]
            if self.redis:
                env["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{self._redis_port}"
                env["RAY_external_storage_namespace"] = f"world{self._ray_port}"
        else:
            argv += [f"--address={self._address}"]
        text = self._node_started(node, argv, env)
        if number == HEAD:
            self._address = text.partition("ray start --address='")[2].partition("'")[0]
            self._gcs = None

    def _node_started(self, node: Node, argv: list[str], env: dict[str, str]) -> str:
        """What `ray start` said. It is tried again when the raylet gave up: it waits 15 s for its own
        helpers (2.60), which is too short on busy cores, and `ray start` gives up after 30 s."""
        give_up_at = time.monotonic() + START_S
        while time.monotonic() < give_up_at:
            before = node.log.stat().st_size
            node.kept.run(argv, env=env, cwd=self.directory)
            before_it = set[str]()
            while time.monotonic() < give_up_at:
                there = {_part_of_start(process) for process in node.kept.processes()} - {""}
                if "Ray runtime started." in (text := since(node.log, before)):
                    return text
                if before_it - there:
                    break
                before_it = there
                time.sleep(LOOK_EVERY_S)
            node.kept.kill()
        raise WorldFault(f"Node {node.number} did not start:\n{tail(node.log)}")

    def _start_troupe(self, ends: ExitStack) -> None:
        log = self.directory / "troupe.log"
        kept = Kept(log)
        ends.callback(kept.end)
        self._door = kept
        config = self.directory / "world.yaml"
        config.write_text(yaml.safe_dump(self._config()))
        env = self._env | {"RAY_ADDRESS": self._address}
        argv = [str(PROGRAMS / "troupe"), "up", "--dev", "--port", "0", "-c", str(config)]
        kept.run([*argv, "--model", "scripted/puppet"], env=env, cwd=self.directory)
        text = said(log, "Talk to it with")
        self.url = text.partition("URL: ")[2].split()[0]

    def _config(self) -> dict[str, Any]:
        agent: dict[str, Any] = {
            "storage_dir": str(self.storage),
            "agents_dir": str(AGENTS),
            "default_agent": "loader",
        }
        if self.database is not None:
            agent["journal"] = {"url": self.database.url}
        return {
            "agent": agent | dict(self.settings.get("agent", {})),
            "actors": dict(self.settings.get("actors", {})),
            "serve": dict(self.settings.get("serve", {})),
        }

    def down(self) -> None:
        """`troupe down` in its own words: SIGTERM to `troupe up`, then the end of it."""
        assert self._door
        pids = [process.pid for process in self._door.processes()]
        for pid in pids:
            send(pid, signal.SIGTERM)
        if not ended(pids, DOWN_S):
            raise WorldFault(f"`troupe up` has not ended:\n{tail(self.directory / 'troupe.log')}")

    # -- who is there --------------------------------------------------------------------------

    def processes(self) -> list[Process]:
        """Of all nodes."""
        everyone = snapshot()
        return [process for node in self.nodes for process in below(node.kept.pid, everyone)]

    def victims(self) -> dict[str, list[Victim]]:
        """Live processes by role."""
        found: dict[str, list[Victim]] = {}
        everyone = snapshot()
        for node in self.nodes:
            here = below(node.kept.pid, everyone)
            hosted = self._hosted(here)
            for process in here:
                role = role_of(process)
                if role is None:
                    continue
                whose = frozenset[str]()
                if role == "session":
                    whose = frozenset(hosted.get(process.pid, ()))
                elif role == "raylet":
                    whose = frozenset(s for found in hosted.values() for s in found)
                victim = Victim(role, process.pid, node.number, whose)
                found.setdefault(role, []).append(victim)
        return found

    def _hosted(self, processes: list[Process]) -> dict[int, set[str]]:
        """The sessions with a sandbox, by the process that owns it: a warden's plan names its
        workspace."""
        found: dict[int, set[str]] = {}
        for process in processes:
            if "sandbox/warden.py" in process.title and role_of(process) is None:
                place = process.title.partition(f'"{self.storage}/workspaces/')[2]
                session_id = place.partition('"')[0]
                if session_id:
                    found.setdefault(process.parent, set()).add(session_id)
        return found

    def host_of(self, session_id: str) -> Victim | None:
        """The process where a session lives that has opened its sandbox."""
        for victim in self.victims().get("session", []):
            if session_id in victim.sessions:
                return victim
        return None

    # -- what goes wrong -----------------------------------------------------------------------

    def kill(self, victim: Victim) -> bool:
        """SIGKILL; whether it was there. What nothing else starts again, the caller does."""
        if victim.role == "gcs":
            self._remember_gcs(victim.pid)
        return send(victim.pid, signal.SIGKILL)

    def pause(self, victim: Victim) -> bool:
        return send(victim.pid, signal.SIGSTOP)

    def resume(self, victim: Victim) -> bool:
        """Let it go on; whether it was still there. Its number may be another's by now."""
        process = snapshot().get(victim.pid)
        is_it = process is not None and role_of(process) == victim.role
        return is_it and send(victim.pid, signal.SIGCONT)

    def kill_node(self, number: int) -> None:
        """Every process of it at once."""
        self.nodes[number].kept.kill()

    def _remember_gcs(self, pid: int) -> None:
        if self._gcs is None:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            environ = Path(f"/proc/{pid}/environ").read_bytes().decode()
            pairs = [pair.split("=", 1) for pair in environ.split("\0") if "=" in pair]
            self._gcs = (line.split("\0")[:-1], dict(pairs))

    def start_gcs(self) -> None:
        """The GCS that was killed, again at its place, with what Redis holds."""
        assert self._gcs
        argv, env = self._gcs
        self.nodes[HEAD].kept.run(argv, env=env, cwd=self.directory)
        wait_until(lambda: accepts(self._ray_port), START_S, "the GCS is back")


def _environment() -> dict[str, str]:
    """Of every process here: this checkout's code, and nothing of another Ray or Troupe."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "TROUPE__", "PG"))
    }
    return env | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Ray's is 15, behind everything else here: the users of the load and other people's tests.
        "RAY_worker_niceness": "0",
        "NO_COLOR": "1",
    }


def role_of(process: Process) -> str | None:
    for role, title in ROLES.items():
        if process.title.startswith(title):
            return role
    for role, binary in BINARIES.items():
        if binary in process.title[:300]:
            return role
    return None


def _part_of_start(process: Process) -> str:
    if " start --num-cpus=" in process.title:
        return "ray start"
    return "raylet" if role_of(process) == "raylet" else ""


def free_ports(n: int) -> list[int]:
    """Below the range that systems hand out by themselves, so that nobody gets them meanwhile."""
    found: list[int] = []
    while len(found) < n:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(holds: Callable[[], bool], limit_s: float, what: str) -> None:
    """
    Raises:
        WorldFault
    """
    give_up_at = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > give_up_at:
            raise WorldFault(f"Not within {limit_s:.0f} s: {what}.")
        time.sleep(LOOK_EVERY_S)


def said(log: Path, words: str) -> str:
    """Wait until a log holds the words; all that it holds.

    Raises:
        WorldFault
    """

    try:
        wait_until(lambda: words in since(log, 0), START_S, words)
    except WorldFault as fault:
        raise WorldFault(f"{fault}\n{tail(log)}") from None
    return since(log, 0)


def since(log: Path, n_bytes: int) -> str:
    with log.open("rb") as file:
        file.seek(n_bytes)
        return file.read().decode(errors="replace")


def tail(log: Path, n_lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-n_lines:])


def has(program: str) -> bool:
    return shutil.which(program) is not None
