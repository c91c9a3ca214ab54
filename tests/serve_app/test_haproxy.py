"""What becomes of Serve's configuration of HAProxy before HAProxy reads it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from serve_app.cluster import HAPROXY_FOLDER, free_port, haproxy_environment
from serve_app.haproxy import binary, corrected, unavailable
from serve_app.problems import TITLES, Problem
from serve_app.settings import ServeSettings
from tests.support.processes import wait_for_ends

FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
END_S = 15.0
STAND_IN = (
    "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
)
"""For the actor of Serve that starts HAProxy."""


def written(folder: Path, port: int, backends: dict[str, BackendConfig] | None = None) -> Path:
    """A configuration file as Serve makes it."""
    config = folder / "haproxy.cfg"
    options = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_enabled=False,
        is_head=True,
        has_received_routes=True,
    )
    api = HAProxyApi(options, backends or {}, str(config))
    api._generate_config_file_internal()  # pyright: ignore[reportPrivateUsage]  there is no other way
    return config


def test_there_is_one_listener_and_no_log_of_queries(tmp_path: Path) -> None:
    port = free_port("127.0.0.1", 0)
    servers = [ServerConfig(name="one", host="127.0.0.1", port=29_000)]
    edge = BackendConfig(name="http-troupe", path_prefix="/", servers=servers, app_name="troupe")
    config = written(tmp_path, port, {"http-troupe": edge})
    before = config.read_text()
    assert before.count("\n    bind ") + before.count("\n  bind ") == 3
    answer = tmp_path / "unavailable.http"
    answer.write_bytes(unavailable())
    config.write_text(after := corrected(before, answer))
    binds = [line.strip() for line in after.splitlines() if line.split()[:1] == ["bind"]]
    assert binds == [f"bind 127.0.0.1:{port}"]
    assert " local0 " not in after
    assert " mode 600 level admin" in after
    assert "500.http" not in after
    assert "server one 127.0.0.1:29000 check" in after
    checked = subprocess.run([binary(), "-c", "-f", config], check=False, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not know"):
        corrected("global\n    maxconn 1\nlisten all\n    bind :80\n", tmp_path / "answer")


def test_what_it_answers_itself_is_a_problem_and_it_ends_with_whoever_started_it(
    tmp_path: Path,
) -> None:
    port = free_port("127.0.0.1", 0)
    config = written(tmp_path, port)
    program = Path(sys.executable).with_name("troupe-haproxy")
    command = [sys.executable, "-c", STAND_IN, str(program), "-db", "-f", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout
        pid = int(starter.stdout.readline())
        with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as http:
            got = http.get(f"http://127.0.0.1:{port}/v1/sessions")
        os.kill(starter.pid, signal.SIGKILL)
    assert wait_for_ends([pid], END_S) == set()
    assert got.status_code == 503
    assert got.headers["content-type"] == "application/problem+json"
    assert got.headers["retry-after"] == "2"
    problem = Problem.model_validate(got.json())
    assert problem.status == 503
    assert problem.title == TITLES[problem.code]


def test_two_houses_share_no_folder_and_no_port_that_serve_fixes() -> None:
    one, other = haproxy_environment(ServeSettings()), haproxy_environment(ServeSettings())
    own = {name for name in one if HAPROXY_FOLDER in one[name]} | {FALLBACK_PORT}
    assert len(own) == 6
    assert {name for name in own if one[name] == other[name]} == set()
    assert Path(one["RAY_SERVE_HAPROXY_BINARY_PATH"]).is_file()
