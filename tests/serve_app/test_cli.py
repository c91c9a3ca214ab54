"""The commands that need no Ray, as a person runs them: in a process of their own."""

import asyncio
import importlib.util
import json
import os
import socket
import stat
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.fernet import Fernet

from actors.protocol import Close, Open, Principal, Sessions
from serve_app.auth import new_key, read_keys
from serve_app.cli import N_SHOWN
from serve_app.cli_models import PROVIDERS, SCRIPTED, choose
from serve_app.cli_run import AlreadyRunning, Run, RunFile
from serve_app.cluster import CannotStart, free_port, prepare_environment
from serve_app.settings import ServeSettings
from tests.support.own_house import own_environment

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0
"""Of a whole command: the interpreter and its imports take a second on a free core, ten on a busy one."""
pytestmark = pytest.mark.timeout(120)


class Done(NamedTuple):
    code: int
    output: str


class Program:
    """A running `troupe`, with what it wrote so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""

    async def until(self, text: str) -> None:
        """Read on to `text`, which must come."""
        assert self.process.stdout
        while text not in self.output:
            piece = await self.process.stdout.read(4096)
            assert piece, f"{text!r} never came: {self.output}"
            self.output += piece.decode()

    async def type(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n".encode())
        await self.process.stdin.drain()

    async def done(self) -> Done:
        assert self.process.stdout
        self.output += (await self.process.stdout.read()).decode()
        return Done(await self.process.wait(), self.output)


@asynccontextmanager
async def troupe(
    cwd: Path, *arguments: str, limit_s: float = LIMIT_S, n_columns: int = 200
) -> AsyncGenerator[Program, None]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "serve_app.cli", *arguments,
        cwd=cwd,
        env=own_environment() | {"PYTHONPATH": str(ROOT), "COLUMNS": str(n_columns), "PYTHONUNBUFFERED": "1"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(limit_s):
            yield Program(process)
    finally:
        if process.returncode is None:
            process.kill()
        # Not `communicate`: what a killed house leaves for a moment holds the pipe open.
        await process.wait()


async def run(cwd: Path, *arguments: str, limit_s: float = LIMIT_S, n_columns: int = 200) -> Done:
    async with troupe(cwd, *arguments, limit_s=limit_s, n_columns=n_columns) as program:
        return await program.done()


# The run file


def test_the_run_file_is_for_its_owner_only(tmp_path: Path) -> None:
    file = RunFile(tmp_path / "var")
    with file.held() as write:
        write(Run(pid=1, url="http://127.0.0.1:1", ray_auth_token="t"))
        assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
        found = file.read()
        assert found
        assert found.url == "http://127.0.0.1:1"


def test_a_second_house_in_the_same_storage_is_refused_by_name(tmp_path: Path) -> None:
    with RunFile(tmp_path).held() as write:
        write(Run(pid=4711, url="http://127.0.0.1:1"))
        refused = pytest.raises(AlreadyRunning, match=r"http://127\.0\.0\.1:1, pid 4711")
        with refused, RunFile(tmp_path).held():
            pass


def test_a_run_file_that_a_dead_house_left_counts_for_nothing(tmp_path: Path) -> None:
    file = RunFile(tmp_path)
    file.path.write_text(Run(pid=os.getpid(), url="http://127.0.0.1:1").model_dump_json())
    assert file.read() is None
    assert file.wait_until_free(0)
    with file.held():
        found = file.read()
        assert found
        assert found.url is None


def test_the_end_of_a_house_takes_its_token_with_it(tmp_path: Path) -> None:
    file = RunFile(tmp_path)
    with file.held() as write:
        write(Run(pid=1, ray_auth_token="secret"))
    assert file.path.read_text() == ""
    assert file.read() is None


# Settings, ports, environment


@pytest.mark.parametrize(
    ("option", "configured", "environ", "model"),
    [
        ("m/a", "m/b", {"OPENAI_API_KEY": "k"}, "m/a"),
        (None, "m/b", {"OPENAI_API_KEY": "k"}, "m/b"),
        (None, None, {"OPENAI_API_KEY": "k"}, "openai/gpt-5.6"),
        (None, None, {"OPENAI_API_KEY": ""}, SCRIPTED),
        (None, None, {}, SCRIPTED),
    ],
)
def test_the_nearest_wish_picks_the_model(
    option: str | None, configured: str | None, environ: dict[str, str], model: str
) -> None:
    assert choose(option, configured, environ).model == model


def test_the_default_models_are_ones_that_litellm_knows() -> None:
    spec = importlib.util.find_spec("litellm")
    assert spec
    assert spec.origin
    prices = Path(spec.origin).parent / "model_prices_and_context_window_backup.json"
    known = json.loads(prices.read_text())
    for name, model in PROVIDERS:
        if name != "HF_TOKEN":  # its router prices by provider, which litellm does not list
            card = known.get(model) or known[model.partition("/")[2]]
            assert card["supports_function_calling"]


def test_a_local_ray_always_has_a_token() -> None:
    environ: dict[str, str] = {}
    prepare_environment(environ, ServeSettings())
    assert environ["RAY_AUTH_MODE"] == "token"
    assert len(environ["RAY_AUTH_TOKEN"]) == 64
    other: dict[str, str] = {}
    prepare_environment(other, ServeSettings())
    assert other["RAY_AUTH_TOKEN"] != environ["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize(
    "given",
    [
        {"RAY_ADDRESS": "10.0.0.1:6379"},
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_TOKEN_PATH": "/etc/token"},
    ],
)
def test_no_token_is_made_up_where_the_operator_said_something_else(given: dict[str, str]) -> None:
    environ = dict(given)
    prepare_environment(environ, ServeSettings())
    assert "RAY_AUTH_TOKEN" not in environ
    assert environ.items() >= given.items()


def test_a_taken_port_is_refused_by_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=str(port)):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0


# Whole commands


async def test_nothing_running_is_exit_code_1(tmp_path: Path) -> None:
    for command in ("status", "down", "roll", "chat"):
        done = await run(tmp_path, command)
        assert done.code == 1
        assert "Nothing runs" in done.output


async def test_up_refuses_before_it_starts_anything(tmp_path: Path) -> None:
    """Each is told in a sentence, within the seconds in which Ray could not have started."""
    no_keys = await run(tmp_path, "up")
    assert no_keys.code == 1
    assert "troupe key USER" in no_keys.output
    open_dev = await run(tmp_path, "up", "--dev", "--host", "0.0.0.0")
    assert open_dev.code == 1
    assert "loopback" in open_dev.output
    with RunFile(tmp_path / "var").held() as write:
        write(Run(pid=os.getpid(), url="http://127.0.0.1:1"))
        second = await run(tmp_path, "up", "--dev")
    assert second.code == 1
    assert "already running" in second.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        clash = await run(tmp_path, "up", "--dev", "--port", str(port))
    assert clash.code == 1
    assert str(port) in clash.output
    beyond = await run(tmp_path, "up", "--dev", "--port", "70000")
    assert (beyond.code, "--port: " in beyond.output) == (1, True)
    assert "Traceback" not in no_keys.output + open_dev.output + second.output + clash.output


async def test_up_refuses_a_key_for_secrets_that_it_has_not(tmp_path: Path) -> None:
    config = tmp_path / "test.yaml"
    config.write_text("agent: {secrets: {key_env: TROUPE_TEST_NO_SUCH_KEY}}")
    refused = await run(tmp_path, "up", "--dev", "-c", str(config))
    assert refused.code == 1
    assert "no environment variable TROUPE_TEST_NO_SUCH_KEY" in refused.output
    assert "Traceback" not in refused.output


async def test_secrets_key_prints_a_key_and_nothing_else(tmp_path: Path) -> None:
    done = await run(tmp_path, "secrets-key")
    assert done.code == 0
    Fernet(done.output.strip())


async def test_key_appends_a_hash_and_shows_the_key_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.yaml"
    tokens = [
        (await run(tmp_path, "key", user, "--keys-file", str(path))).output.split()[-1]
        for user in ("alice", "bob")
    ]
    assert [entry.user for entry in read_keys(path).keys] == ["alice", "bob"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert all(token.startswith("troupe_") and token not in path.read_text() for token in tokens)


async def test_key_refuses_a_name_that_is_none(tmp_path: Path) -> None:
    done = await run(tmp_path, "key", "a b", "--keys-file", "keys.yaml")
    assert done.code == 1
    assert not (tmp_path / "keys.yaml").exists()


async def test_status_shows_the_callers_sessions(
    tmp_path: Path, url: str, tokens: dict[str, str], sessions: Sessions
) -> None:
    await sessions.open(Principal("alice"), Open(title="hers [bold]"))
    await sessions.open(Principal("bob"), Open(title="his"))
    done = await run(tmp_path, "status", "--url", url, "--key", tokens["alice"])
    assert done.code == 0
    assert "ready" in done.output
    assert "hers [bold]" in done.output
    assert "his" not in done.output


async def test_status_fits_a_terminal_and_says_that_there_are_more(
    tmp_path: Path, url: str, tokens: dict[str, str], sessions: Sessions
) -> None:
    for n in range(N_SHOWN + 1):
        view = await sessions.open(Principal("alice"), Open(title=f"number {n} " + "x" * 100))
        await sessions.submit(Principal("alice"), view.session_id, Close())
    done = await run(tmp_path, "status", "--url", url, "--key", tokens["alice"], n_columns=80)
    assert done.code == 0
    assert f"newest {N_SHOWN}" in done.output
    assert "number 0 " not in done.output
    rows = [line for line in done.output.splitlines() if " closed " in line]
    assert len(rows) == N_SHOWN
    assert all(len(row) <= 80 and "number" in row for row in rows)


@pytest.mark.parametrize(
    "arguments", [("--url", "http://x:port"), ("--url", "http://x", "--key", "schlüssel")]
)
async def test_an_option_that_is_wrong_is_named(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = await run(tmp_path, "status", *arguments)
    assert done.code == 2
    assert f"{arguments[-2]}:" in done.output


async def test_a_wrong_key_is_a_sentence(tmp_path: Path, url: str) -> None:
    done = await run(tmp_path, "status", "--url", url, "--key", new_key("x").token)
    assert done.code == 1
    assert "unauthorized: " in done.output
    assert "--key" in done.output
    assert "Traceback" not in done.output


async def test_a_server_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    port = free_port("127.0.0.1", 0)
    done = await run(tmp_path, "status", "--url", f"http://127.0.0.1:{port}")
    assert done.code == 1
    assert "No answer" in done.output
    assert "Traceback" not in done.output
