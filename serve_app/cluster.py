"""R. Starts and stops what a house needs: Ray, Serve, the manager, the edge.

With `RAY_ADDRESS` in the environment an existing cluster is joined and left as it was, without
Troupe; otherwise a local Ray is started and ends with this process. Ray is imported late: it reads
its switches at import, and `troupe status` should not pay for it.
"""

import asyncio
import contextlib
import io
import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any, NamedTuple

from agent.faults import Fault
from agent.journals import open_journal
from agent.snapshots import check_filesystem
from agent.vault import Vault
from serve_app.settings import ServeSettings, TroupeSettings, with_absolute_paths

HAPROXY_FOLDER = "troupe-haproxy-"
HAPROXY_CONFIG = "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"
REPLICA_PORTS = range(20_000, 32_000, 100)
"""Where a house's replicas begin to look for ports: above those of Ray's workers, below those that the
system gives away."""
CONNECTIONS = 2
"""Times what the replicas take on at once, for those that are kept open."""
FILES = 3
"""That HAProxy may open for a connection: two ends and its pipes."""
SPARE_FILES = 200
"""What HAProxy opens that is no connection."""
OBJECT_STORE_BYTES = 256 * 1024**2
"""Events are small and travel inline; Ray's own default is 30 % of the machine's memory."""


class CannotStart(Fault):
    code = "cannot_start"


class Running(NamedTuple):
    url: str
    dashboard_url: str | None
    """None: the cluster that was joined has none."""
    ray_address: str
    ray_auth_token: str | None
    """None: it came from a file or the cluster has none."""


class Cluster:
    """One house of sessions, from `start` to `stop`."""

    def __init__(self, settings: TroupeSettings) -> None:
        self._settings = settings
        self._ends = ExitStack()

    def start(self) -> Running:
        """Start everything, in order; blocks until sessions can be opened over HTTP.

        Whatever was started is ended again when a later step fails or Ctrl-C comes.

        Raises:
            CannotStart: the port is taken, or no Ray could be had; says which.
            SettingsInvalid: also when the key of `agent.secrets` or the driver of `agent.storage` is not
                to be had.
        """
        Vault.of(self._settings.agent.secrets)  # said here in a line, and not in the manager's log
        check_filesystem(self._settings.agent.storage)  # the same
        port = free_port(self._settings.serve.host, self._settings.serve.port)
        settings = with_absolute_paths(with_port(self._settings, port))
        with ExitStack() as ends:
            running = self._start(settings, ends)
            self._ends = ends.pop_all()
        return running

    def _start(self, settings: TroupeSettings, ends: ExitStack) -> Running:
        prepare_environment(os.environ, settings.serve)
        folder = Path(os.environ.get(HAPROXY_CONFIG, "")).parent
        # Made up here, and not the one of a house in whose environment this one was started.
        if folder.name.startswith(HAPROXY_FOLDER) and not folder.exists():
            ends.callback(shutil.rmtree, folder, ignore_errors=True)
        # After the environment and late for the same reason.
        import ray  # late: see the module
        from ray import serve

        import actors.client
        import serve_app.deployment

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ends.callback(_settle_journal, settings)
        before = signal.getsignal(signal.SIGTERM)
        context = _join_or_start(ray)
        # Ray puts a handler of its own in its place, which aborts the process.
        signal.signal(signal.SIGTERM, before)
        ends.callback(_quietly, ray.shutdown)
        ends.callback(_quietly, serve.shutdown)
        ends.callback(self._drain, settings)
        actors.client.begin_manager(settings.agent, settings.actors)  # beside Serve
        # Serve's HTTP options are those of the first start; a deployment that comes first would
        # settle them on port 8000.
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.serve.host, "port": settings.serve.port},
        )
        serve_app.deployment.deploy(settings)
        asyncio.run(actors.client.start_manager(settings.agent, settings.actors))
        return Running(
            url=f"http://{url_host(settings.serve.host)}:{settings.serve.port}",
            dashboard_url=f"http://{context.dashboard_url}" if context.dashboard_url else None,
            ray_address=context.address_info["gcs_address"],
            ray_auth_token=os.environ.get("RAY_AUTH_TOKEN"),
        )

    @staticmethod
    def _drain(settings: TroupeSettings) -> None:
        import actors.client  # loaded by `_start`

        asyncio.run(actors.client.drain(settings.actors))

    def stop(self) -> None:
        """Sessions come to rest, then actors end, then Serve, then Ray if it is ours. The sessions take
        at most `drain_s`, `close_wait_s` and a constant; what has not left then ends with its process.

        Every step is tried, also after one that failed; Ctrl-C skips to the next.
        """
        self._ends.close()


def roll(settings: TroupeSettings, say: Callable[[str], None]) -> None:
    """Have this process's code and settings take over a running house, which `RAY_ADDRESS` names.
    Blocks until every session that lives is on it. Whoever is killed in the middle may begin again.

    Raises:
        CannotStart: the cluster cannot be reached.
        Unavailable: says how far it came; when the code does not start, nothing was changed.
    """
    prepare_environment(os.environ, settings.serve)
    # After the environment and late, as in `Cluster`.
    import ray
    from ray import serve

    import actors.client
    import serve_app.deployment

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    before = signal.getsignal(signal.SIGTERM)
    _join_or_start(ray, code_environment(os.environ))
    signal.signal(signal.SIGTERM, before)
    with ExitStack() as ends:
        ends.callback(_quietly, ray.shutdown)
        if not serve.status().applications:
            raise CannotStart("No house runs on this cluster: `troupe up` starts one.")
        asyncio.run(actors.client.prove_sessions(settings.agent, settings.actors))
        say("A session's process starts from this code.")
        serve_app.deployment.deploy(settings)
        say("The model gateway and the edge run it.")
        asyncio.run(actors.client.replace_manager(settings.agent, settings.actors))
        say("The manager runs it.")
        asyncio.run(_say_how_far(settings, say))


async def _say_how_far(settings: TroupeSettings, say: Callable[[str], None]) -> None:
    import actors.client  # loaded by `roll`

    async with aclosing(actors.client.rolled(settings.actors)) as counts:
        async for n_left in counts:
            say(f"Sessions that still live on older code: {n_left}")


def code_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Has the processes of a job import what this one does, on every node where the same paths hold it.
    A job's actors start from it as long as they live, also after the job's driver ended."""
    paths = [str(Path(__file__).parents[1]), environ.get("PYTHONPATH", "")]
    return {
        "py_executable": sys.executable,
        "env_vars": {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    }


def prepare_environment(environ: MutableMapping[str, str], edge: ServeSettings) -> None:
    """Ray's switches, for this process and every one that Ray starts from it. What is set, stays.

    A local Ray listens on every address of the machine (`ray.init` has no way to keep it on
    loopback), so it always has a token. When a cluster is joined, the token is that cluster's.
    """
    environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Otherwise every worker starts through `uv run` and resolves the environment again.
    environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Ray's own is 15, for batch work beside a person's: our workers are what the machine is for.
    environ.setdefault("RAY_worker_niceness", "0")
    environ.setdefault(
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve_app.patience.middlewares"
    )
    if "RAY_ADDRESS" in environ:
        return
    if edge.proxy == "haproxy":
        for name, value in haproxy_environment(edge).items():
            environ.setdefault(name, value)
    environ.setdefault("RAY_AUTH_MODE", "token")
    if environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in environ:
        environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def haproxy_environment(edge: ServeSettings) -> dict[str, str]:
    """Serve's switches that put HAProxy before the replicas, which then run the app on their own event
    loop. Nothing in it is shared with another house of the machine: Serve's own defaults are fixed
    ports and one folder."""
    n_connections = CONNECTIONS * edge.replicas * (edge.max_requests + edge.max_streams)
    _, n_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if n_files != resource.RLIM_INFINITY:
        n_connections = min(n_connections, (n_files - SPARE_FILES) // FILES)
    lowest = secrets.choice(REPLICA_PORTS)
    folder = Path(tempfile.gettempdir()) / f"{HAPROXY_FOLDER}{secrets.token_hex(4)}"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name("troupe-haproxy")),
        HAPROXY_CONFIG: str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        # A line per request, read in Python.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # HAProxy does not start when it may not open the files for them.
        "RAY_SERVE_HAPROXY_MAXCONN": str(n_connections),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port("127.0.0.1", 0)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(lowest),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(lowest + REPLICA_PORTS.step - 1),
        # Serve's 30 s are for load balancers that look rarely; HAProxy is told.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def _join_or_start(ray: Any, runtime_env: dict[str, Any] | None = None) -> Any:
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": runtime_env,
    }
    if "RAY_ADDRESS" not in os.environ:
        options |= {
            # "local" and not None: a cluster that somebody left on this machine is not joined.
            "address": "local",
            # Serve's data path and its Python API need no dashboard (2.60, tried: requests are
            # answered with False). What does: the page that `troupe up` prints, and the REST and
            # state API behind `serve status`, `ray list actors` and `ray job`, since False starts
            # the head process with the usage module only. True also makes a dashboard that cannot
            # start an error here and not a surprise later.
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        # A driver's working directory comes first where its workers look for modules (2.60): one that
        # holds Troupe's packages would shadow those of a later roll.
        with contextlib.chdir("/"):
            return ray.init(**options)
    except Exception as cause:  # a bare one says that a node was not there in time (2.60)
        what = os.environ.get("RAY_ADDRESS", "a local Ray")
        raise CannotStart(f"Ray: {what} could not be reached or started.") from cause


def _settle_journal(settings: TroupeSettings) -> None:
    """Leave the embedded journal in one file. The processes that wrote it were killed, as is their
    way of ending; the last connection that closes in good order folds the -wal in."""
    if not settings.agent.journal.url.startswith("sqlite:"):
        return

    async def opened_and_closed() -> None:
        journal = await open_journal(settings.agent.journal, settings.agent.storage_dir)
        await journal.close()

    asyncio.run(opened_and_closed())


def _quietly(step: Any) -> None:
    """Run a step of Ray's shutdown without the news that it prints of actors ending as they should."""
    with contextlib.redirect_stdout(io.StringIO()):
        step()


def free_port(host: str, port: int) -> int:
    """The port, if it can be had; for 0 one that was free a moment ago.

    Serve finds a taken port out half a minute later, in a process of its own.

    Raises:
        CannotStart
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as cause:
        raise CannotStart(
            f"Port {port} of {host} cannot be had ({cause.strerror}). Choose another with --port."
        ) from cause


def with_port(settings: TroupeSettings, port: int) -> TroupeSettings:
    return settings.model_copy(update={"serve": settings.serve.model_copy(update={"port": port})})


def url_host(host: str) -> str:
    """The name to call a listening address by from this machine."""
    if host in {"0.0.0.0", "::"}:  # noqa: S104  compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
