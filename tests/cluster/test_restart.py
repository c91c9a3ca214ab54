"""The whole house ends, in good order or not, and starts again on the same storage."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Collection, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml

from serve_app.sse_client import Event
from tests.support.house import AGENTS, puppet
from tests.support.http import WAIT_S, User
from tests.support.processes import below, wait_for_ends
from tests.support.sandboxes import processes

pytestmark = pytest.mark.timeout(300)

END_S = 60.0
SAY = puppet({"say": "Hello there."})


class House:
    """`troupe up` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

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


@contextmanager
def house(storage_dir: Path) -> Generator[House]:
    config = storage_dir / "test.yaml"
    settings: dict[str, Any] = {
        "agent": {
            "storage_dir": str(storage_dir),
            "agents_dir": str(AGENTS),
            "default_agent": "tester",
        },
        "actors": {"close_wait_s": 1.0, "page_wait_s": 0.2},
    }
    config.write_text(yaml.safe_dump(settings))
    troupe = Path(sys.executable).with_name("troupe")
    command = [troupe, "up", "--dev", "--port", "0", "--model", "scripted/puppet", "-c", config]
    # Like every worker it would otherwise take the tokens and switches of the run's own cluster.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    errors = (storage_dir / "errors.txt").open("a")
    with (
        errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environ
        ) as process,
    ):
        running = House(process, "")
        try:
            assert process.stdout
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("URL: "):
                    break
            assert lines[-1].startswith("URL: "), lines
            running.url = lines[-1].removeprefix("URL: ").strip()
            yield running
        finally:
            if process.poll() is None:
                running.kill()


def is_delta(event: Event) -> bool:
    return event.type == "tool_output_delta"


async def begun(user: User, mark: str) -> str:
    """A session whose turn is in the middle of a command."""
    session_id = await user.opened(title="working")
    act = {"call": "bash", "args": {"command": f"echo up; sleep {mark}"}}
    await user.sent(session_id, puppet(act, {"say": "after all"}))
    await user.read(session_id, turn=1, until=is_delta)
    return session_id


async def goes_on(user: User, session_id: str) -> None:
    """A message to a session that was begun: the command that had started is `unknown`, the turn
    ends, and the message's own turn follows."""
    assert (await user.ended(session_id, SAY)).facts[-1]["reason"] == "done"
    first = await user.read(session_id, turn=1)
    [finished] = first.of("tool_finished")
    assert finished["outcome"] == "unknown"
    assert first.of("assistant_message")[-1]["text"] == "after all"
    assert first.facts[-1]["reason"] == "done"


async def statuses(user: User) -> dict[str, str]:
    listed = (await user.get("/v1/sessions"))["data"]
    return {session["title"]: session["status"] for session in listed}


async def facts_of(user: User, session_id: str) -> list[dict[str, Any]]:
    return (await user.read(session_id, follow=False)).facts


def new_mark() -> str:
    """Of one `sleep`, for the length of any test."""
    return f"600.{uuid4().int % 10**12:012d}"


async def test_sessions_outlive_a_stop_and_a_kill_of_the_whole_house(tmp_path: Path) -> None:
    """One test, since a house takes half a minute of a small machine to start."""
    mark = new_mark()
    with house(tmp_path) as first:
        async with first.user() as user:
            idle = await user.opened(title="idle")
            write = {"call": "write", "args": {"path": "n.txt", "content": "kept"}}
            await user.ended(idle, puppet(write, {"say": "ok"}))
            closed = await user.opened(title="closed")
            await user.command(closed, "close")
            working = await begun(user, mark)
            messages = [await user.messages(each) for each in (idle, closed)]
            facts = await facts_of(user, idle)
        assert processes(mark)
        first.terminate()
    assert processes(mark) == []
    for session_id in (idle, closed, working):
        made = json.loads((tmp_path / "trajectories" / f"{session_id}.json").read_text())
        assert made["session_id"] == session_id

    mark = new_mark()
    with house(tmp_path) as second:
        async with second.user() as user:
            states = {"working": "passive", "closed": "closed", "idle": "passive"}
            assert await statuses(user) == states
            assert (await user.get("/v1/capacity"))["live"] == 0
            assert [await user.messages(each) for each in (idle, closed)] == messages
            again = await facts_of(user, idle)
            assert again[: len(facts)] == facts
            assert (again[-1]["type"], again[-1]["reason"]) == ("passivated", "shutdown")
            read = {"call": "read", "args": {"path": "n.txt"}}
            heard = await user.ended(idle, puppet(read, {"say": "ok"}))
            assert "kept" in heard.of("tool_finished")[0]["text"]
            await goes_on(user, working)
            killed = await begun(user, mark)
            messages = [await user.messages(each) for each in (idle, working)]
            facts = await facts_of(user, killed)
        # What the sandbox holds is not killed here: it dies with what it belongs to.
        sandboxed = set(processes(mark))
        assert sandboxed
        second.kill(spared=sandboxed)
    assert processes(mark) == []

    with house(tmp_path) as third:
        async with third.user() as user:
            assert [await user.messages(each) for each in (idle, working)] == messages
            assert await facts_of(user, killed) == facts
            assert (await user.view(killed))["status"] == "passive"
            assert (await user.ended(idle, SAY)).facts[-1]["reason"] == "done"
            await goes_on(user, killed)
            reasons = [
                f["reason"] for f in await facts_of(user, killed) if f["type"] == "activated"
            ]
            assert reasons == ["opened", "recovered"]
            reasons = [f["reason"] for f in await facts_of(user, idle) if f["type"] == "activated"]
            assert reasons == ["opened", "woken", "recovered"]
        third.kill()
