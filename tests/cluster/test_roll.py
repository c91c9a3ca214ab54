"""A newer version takes a running house over while its sessions work and its readers read."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.sse_client import Event, EventReader
from tests.support.house import puppet
from tests.support.http import Heard, User
from tests.support.own_house import OwnHouse, own_environment, own_house
from tests.support.processes import below, eventually, wait_for_ends

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
PACKAGES = ("agent", "actors", "serve_app", "configs")
CHANGES = (
    ("agent/tools/files.py", 'f"Wrote {', 'f"B wrote {'),
    ("serve_app/app.py", 'version="1"', 'version="B"'),
)
ROLL_S = 120.0
SOON_S = 30.0
WRITE = {"call": "write", "args": {"path": "n.txt", "content": "kept"}}
DONE = {"say": "done"}


def version_b(folder: Path) -> Path:
    """The code with a change that a session's facts tell of, and one that the edge tells of."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package)
    for path, old, new in CHANGES:
        text = (folder / path).read_text()
        assert text.count(old) == 1, path
        (folder / path).write_text(text.replace(old, new))
    return folder


def waits_for(file: str) -> dict[str, Any]:
    command = f"echo up; while [ ! -e {file} ]; do sleep 0.05; done"
    return {"call": "bash", "args": {"command": command}}


class Listener:
    """A reader as `troupe chat` is one: it comes back by itself, and must hear everything once."""

    def __init__(self, url: str, session_id: str, *, turn: int) -> None:
        self.heard = Heard()
        self.session_id = session_id
        self._url = url
        self._turn = turn
        self._begun = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.task = asyncio.create_task(asyncio.to_thread(self._read))

    def _read(self) -> None:
        with httpx.Client(base_url=self._url) as http:
            path = f"/v1/sessions/{self.session_id}/events"
            for event in EventReader(http, path, cursor="0.0.0").events():
                self.heard.take(event)
                if event.type.endswith("_delta"):
                    self._loop.call_soon_threadsafe(self._begun.set)
                if self._is_end(event):
                    return

    def _is_end(self, event: Event) -> bool:
        return event.type == "turn_ended" and event.data["turn"] == self._turn

    async def begun(self) -> None:
        await asyncio.wait_for(self._begun.wait(), SOON_S)

    async def ended(self) -> Heard:
        await asyncio.wait_for(self.task, SOON_S * 2)
        assert self.heard.facts[-1]["reason"] == "done"
        return self.heard


class Roll:
    """`troupe roll` from other code, in a process of its own."""

    def __init__(self, house: OwnHouse, code: Path) -> None:
        environ = own_environment() | {"PYTHONPATH": str(code)}
        command = [sys.executable, "-m", "serve_app.cli", "roll", "-c", str(house.config)]
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environ, cwd=code
        )

    async def says(self, start: str) -> None:
        async with asyncio.timeout(ROLL_S):
            while not (self.lines and self.lines[-1].startswith(start)):
                line = await asyncio.to_thread(self._line)
                assert line, self.lines
                self.lines.append(line)

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()

    async def ended(self) -> int:
        try:
            rest, _ = await asyncio.to_thread(self._process.communicate, None, ROLL_S)
        finally:
            self._process.kill()
        self.lines += rest.splitlines(keepends=True)
        return self._process.returncode


async def begun(house: OwnHouse, user: User, *steps: dict[str, Any]) -> Listener:
    session_id = await user.opened()
    await user.sent(session_id, puppet(*steps))
    listener = Listener(house.url, session_id, turn=1)
    await listener.begun()
    return listener


async def asking(house: OwnHouse, user: User) -> Listener:
    """A session that waits for a person, and a reader of what comes after the answer."""
    session_id = await user.opened(agent="asking")
    act = {"call": "bash", "args": {"command": "echo act"}}
    heard = await user.ended(session_id, puppet(act, WRITE, DONE))
    assert heard.facts[-1]["reason"] == "approval"
    return Listener(house.url, session_id, turn=2)


async def decided(user: User, session_id: str) -> None:
    [ask] = (await user.view(session_id))["pending_approval"]
    decision = {"tool_call_id": ask["tool_call_id"], "decision": "approve"}
    await user.command(session_id, "approvals", decisions=[decision])


def kill_manager(house: OwnHouse) -> None:
    """It is restarted from what the roll's driver, which is gone, had said."""
    for pid in below(house.process.pid):
        if b"ray::SessionManager" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            assert not wait_for_ends([pid], SOON_S)
            return
    raise AssertionError("there is no manager")


async def opened_in_time(user: User) -> str:
    found: list[str] = []

    async def opened() -> bool:
        answer = await user.http.post("/v1/sessions", json={})
        if answer.status_code != 503:
            assert answer.status_code == 201, answer.text
            found.append(answer.json()["session_id"])
        return bool(found)

    await eventually(opened, SOON_S)
    return found[0]


def written(heard: Heard) -> list[str]:
    return [f["text"][:7] for f in heard.of("tool_finished") if f["tool"] == "write"]


def outcomes(heard: Heard) -> set[str]:
    return {fact["outcome"] for fact in heard.of("tool_finished")}


async def n_live(user: User) -> int:
    return (await user.get("/v1/capacity"))["live"]


async def test_turns_run_through_a_roll(tmp_path: Path) -> None:
    storage = tmp_path / "house"
    storage.mkdir()
    code = version_b(tmp_path / "b")
    # No replica of the edge may hold anything: with two, every request meets the one or the other.
    with own_house(storage, edge={"replicas": 2}) as house:
        async with house.user() as user:
            idle = await user.opened()
            await user.ended(idle, puppet(WRITE, DONE))
            person = await asking(house, user)
            slow = {"say": "word " * 60, "chunks": 60, "delay_s": 0.3} | WRITE
            steps = (slow, waits_for("go"), slow | {"chunks": 6}, DONE)
            streaming = await begun(house, user, *steps)
            working = await begun(house, user, waits_for("go"), WRITE, DONE)
            assert await n_live(user) == 4

            roll = Roll(house, code)
            await roll.says("The manager runs it.")
            for listener in (streaming, working):
                go = storage / "workspaces" / listener.session_id / "go"
                await asyncio.to_thread(go.touch)
            assert await roll.ended() == 0, roll.lines
            assert (await user.get("/openapi.json"))["info"]["version"] == "B"

            for listener in (streaming, working):
                heard = await listener.ended()
                assert written(heard)[-1] == "B wrote"
                assert outcomes(heard) == {"ok"}
                [rolled] = heard.of("passivated")
                assert rolled["reason"] == "rolled"
                assert [f["reason"] for f in heard.of("activated")] == ["opened", "woken"]
            assert await n_live(user) == 2
            again = await user.ended(idle, puppet(WRITE, DONE))
            assert written(again) == ["B wrote"]
            await decided(user, person.session_id)
            assert written(await person.ended()) == ["B wrote"]
            assert await n_live(user) == 4

            kill_manager(house)
            fresh = await opened_in_time(user)
            assert written(await user.ended(fresh, puppet(WRITE, DONE))) == ["B wrote"]

            for listener in (person, streaming, working):
                facts = (await user.read(listener.session_id, follow=False)).facts
                assert facts[: len(listener.heard.facts)] == listener.heard.facts
            followed = (one.session_id for one in (person, streaming, working))
            for session_id in (idle, fresh, *followed):
                await user.command(session_id, "close")

            async def none_lives() -> bool:
                return await n_live(user) == 0

            await eventually(none_lives, SOON_S)
        house.terminate()
