"""The commands that start a house, on real Ray, in processes of their own as a person runs them."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from serve_app.cli_run import RunFile
from tests.serve_app.test_cli import Program, run, troupe

HOUSE_LIMIT_S = 200.0
"""Ray and Serve start about ten processes: 20 s on two free cores, a minute on busy ones."""
pytestmark = pytest.mark.timeout(HOUSE_LIMIT_S + 20)


@asynccontextmanager
async def house(cwd: Path, *arguments: str) -> AsyncIterator[Program]:
    async with troupe(cwd, "up", "--dev", "--port", "0", *arguments, limit_s=HOUSE_LIMIT_S) as up:
        await up.until("ends it")
        yield up


async def test_the_demo_does_its_task_and_leaves_a_trajectory(tmp_path: Path) -> None:
    async with troupe(tmp_path, "demo", "--storage-dir", "d", limit_s=HOUSE_LIMIT_S) as program:
        done = await program.done()
    assert done.code == 0, done.output
    assert "scripted model plays" in done.output
    (path,) = (tmp_path / "d" / "trajectories").glob("*.json")
    assert str(path) in done.output
    trajectory = json.loads(path.read_text())
    assert [event["type"] for event in trajectory["events"]][-1] == "session_closed"
    outcomes = {
        e["tool"]: e["outcome"] for e in trajectory["events"] if e["type"] == "tool_finished"
    }
    assert outcomes == {"plan": "ok", "write": "ok", "bash": "ok", "read": "ok"}
    assert RunFile(tmp_path / "d").read() is None


async def test_up_status_chat_down(tmp_path: Path) -> None:
    async with house(tmp_path, "--model", "scripted/echo") as up:
        for line in ("scripted/echo", "dev: no keys", "http://127.0.0.1:"):
            assert line in up.output
        second = await run(tmp_path, "up", "--dev")
        assert (second.code, "already running" in second.output) == (1, True)
        async with troupe(tmp_path, "chat", limit_s=60) as chat:
            await chat.until("/help")
            await chat.type("is anybody there?")
            await chat.until("is anybody there?")
            await chat.type("/quit")
            assert (await chat.done()).code == 0
        status = await run(tmp_path, "status")
        assert (status.code, "yours 1 of 10" in status.output) == (0, True), status.output
        down = await run(tmp_path, "down", limit_s=100)
        assert (down.code, "Stopped." in down.output) == (0, True), down.output
        assert (await up.done()).code == 0
    assert (await run(tmp_path, "status")).code == 1


async def test_a_killed_house_can_be_started_again_with_its_sessions(tmp_path: Path) -> None:
    async with house(tmp_path, "--model", "scripted/echo") as up:
        async with troupe(tmp_path, "chat", limit_s=60) as chat:
            await chat.until("/help")
            await chat.type("remember")
            await chat.until("remember")
            await chat.type("/quit")
            session_id = (await chat.done()).output.split("--session ")[1].split()[0]
        up.process.send_signal(signal.SIGKILL)
        await up.process.wait()
    async with house(tmp_path, "--model", "scripted/echo") as up:
        async with troupe(tmp_path, "chat", "--session", session_id, limit_s=60) as chat:
            await chat.until("/help")
            await chat.type("and again")
            await chat.until("and again")
            await chat.type("/close")
            assert (await chat.done()).code == 0
        up.process.send_signal(signal.SIGINT)
        assert (await up.done()).code == 0
    path = tmp_path / "var" / "trajectories" / f"{session_id}.json"
    said = [m["content"] for m in json.loads(path.read_text())["messages"] if m["role"] == "user"]
    assert said == ["remember", "and again"]


async def test_a_signal_while_starting_leaves_nothing(tmp_path: Path) -> None:
    async with troupe(tmp_path, "up", "--dev", "--port", "0", limit_s=HOUSE_LIMIT_S) as up:
        await up.until("Model:")
        up.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            done = await up.done()
    assert done.code == 130
    assert RunFile(tmp_path / "var").read() is None
