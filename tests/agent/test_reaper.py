"""The reaper, against real processes that are stopped and killed. Nothing is said about who ended what:
another house on this machine may reap too."""

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.sandbox.limits import usable_cgroups
from agent.sandbox.local import open_sandbox
from agent.sandbox.marks import INSIDE, WARDEN, Mark, Stat
from agent.sandbox.reaper import evict, reap
from agent.spec import SandboxSpec
from tests.support import sandbox_owner
from tests.support.processes import below, wait_for_ends
from tests.support.sandboxes import need, processes, session_cgroups, until

KINDS = ("bwrap", "sandlock", "process")
GRACE_S = 0.2
WAIT_S = 10.0


class Owner:
    """A process with a sandbox, in which processes run that are named `mark`."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str) -> None:
        self.pid = process.pid
        self.mark = mark

    @property
    def warden(self) -> int:
        [pid] = [p for p in below(self.pid) if Stat.of(p).parent == self.pid]
        return pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def left(self) -> list[int]:
        return [pid for pid in processes(self.mark) if pid != self.pid]

    def is_gone(self) -> bool:
        return not self.left()


@asynccontextmanager
async def owner(
    kind: str, workspace: Path, session_id: str = "", epoch: int = 1
) -> AsyncGenerator[Owner]:
    need(kind)
    mark = f"mark-{secrets.token_hex(8)}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", sandbox_owner.__file__, kind, str(workspace / mark), mark, session_id or mark,
        str(epoch), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S * 2):
            while (line := await process.stdout.readline()) != b"ready\n":  # the rest is its log
                assert line, "the owner ended"
        found = Owner(process, mark)
        assert not found.is_gone()
        yield found
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await asyncio.to_thread(reap, GRACE_S)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_killed_owner_leaves_nothing_though_its_warden_was_stopped(
    kind: str, tmp_path: Path
) -> None:
    before = session_cgroups()
    async with owner(kind, tmp_path) as dead:
        warden = dead.warden
        os.kill(warden, signal.SIGSTOP)
        dead.signal(signal.SIGKILL)
        assert not wait_for_ends([dead.pid], WAIT_S)
        assert not dead.is_gone()
        await asyncio.to_thread(reap, GRACE_S)
        assert not wait_for_ends([warden], WAIT_S)
        await until(dead.is_gone)
        await until(lambda: session_cgroups() <= before)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_killed_warden_leaves_nothing(kind: str, tmp_path: Path) -> None:
    if kind == "process" and not usable_cgroups()[0]:
        pytest.skip(
            "NO CGROUP CAN BE MADE HERE: in the kind 'process' a detached child that cleared its"
            " environment outlives a killed warden; its test did not run"
        )
    before = session_cgroups()
    async with owner(kind, tmp_path) as orphaned:
        warden = orphaned.warden
        os.kill(warden, signal.SIGKILL)
        assert not wait_for_ends([warden], WAIT_S)
        # Nothing else ends them in this kind: the others die with their namespace or supervisor.
        assert kind != "process" or len(orphaned.left()) >= 2
        await asyncio.to_thread(reap, GRACE_S)
        await until(orphaned.is_gone)
        await until(lambda: session_cgroups() <= before)


async def test_a_detached_child_is_known_by_its_environment_too(tmp_path: Path) -> None:
    """Where no cgroup can be made this is what is left."""
    child = await asyncio.create_subprocess_exec(
        "/bin/sleep", "600", env={INSIDE: secrets.token_hex(8)}, start_new_session=True
    )
    await asyncio.to_thread(reap, GRACE_S)
    async with asyncio.timeout(WAIT_S):
        assert await child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kind", KINDS)
async def test_a_live_sandbox_is_not_touched_while_it_works(kind: str, tmp_path: Path) -> None:
    need(kind)
    box = await open_sandbox(
        SandboxSpec.model_validate({"kind": kind}), tmp_path, session_id="live"
    )
    try:
        await box.exec("setsid sleep 600 & setsid env -i /bin/sleep 600 & disown -a", timeout_s=10)
        loop = "for i in {1..60}; do (env -i /bin/true; setsid /bin/true; echo $i) | cat; done"
        working = asyncio.create_task(box.exec(loop, timeout_s=60))
        n_reaps = 0
        while not working.done() or n_reaps < 10:
            await asyncio.to_thread(reap, 0.0)
            n_reaps += 1
        result = await working
        assert (result.exit_code, result.output.split()) == (0, [str(i) for i in range(1, 61)])
        assert (await box.exec("jobs -p | wc -l; pgrep -c sleep", timeout_s=10)).exit_code == 0
    finally:
        await box.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_later_epoch_ends_the_sandbox_of_a_paused_owner_and_no_other(
    kind: str, tmp_path: Path
) -> None:
    session_id = secrets.token_hex(8)
    async with owner(kind, tmp_path, session_id, 1) as old, owner(kind, tmp_path) as other:
        warden = old.warden
        old.signal(signal.SIGSTOP)
        async with owner(kind, tmp_path, session_id, 2) as new:
            assert not wait_for_ends([warden], WAIT_S)
            assert old.is_gone()
            assert await asyncio.to_thread(evict, session_id, 2) == []
            assert not new.is_gone()
            assert not other.is_gone()
            os.kill(new.warden, signal.SIGSTOP)
            new.signal(signal.SIGSTOP)
            [ended] = await asyncio.to_thread(evict, session_id, 3)
            assert (ended.what, ended.session_id) == ("warden", session_id)
            assert new.is_gone()
            assert not other.is_gone()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_warden_that_is_asked_to_end_leaves_nothing(kind: str, tmp_path: Path) -> None:
    before = session_cgroups()
    async with owner(kind, tmp_path) as asked:
        warden = asked.warden
        mine = session_cgroups() - before
        os.kill(warden, signal.SIGTERM)
        assert not wait_for_ends([warden], WAIT_S)
        assert asked.is_gone()
        assert not any(path.exists() for path in mine)


async def test_who_pretends_to_be_of_a_live_sandbox_is_left_alone(tmp_path: Path) -> None:
    box = await open_sandbox(SandboxSpec(kind="process"), tmp_path, session_id="real")
    mark = (await box.exec(f"echo ${INSIDE}", timeout_s=10)).output.strip()
    assert mark
    us = os.getpid()
    warden = Mark("forged", 1, us, Stat.of(us).started, "word")
    for environ in ({INSIDE: mark}, {WARDEN: str(warden)}, {WARDEN: "no mark"}, {INSIDE: ""}):
        foreign = await asyncio.create_subprocess_exec(
            "/bin/sleep", "600", env=environ, start_new_session=True
        )
        await asyncio.to_thread(reap, 0.0)
        assert not Stat.of(foreign.pid).gone
        foreign.kill()
        await foreign.wait()
    await box.close()


async def test_a_shell_that_is_started_again_has_its_own_mark(tmp_path: Path) -> None:
    """It gets the exports of the one before, whose warden is gone."""
    box = await open_sandbox(SandboxSpec(kind="process"), tmp_path, session_id="again")
    first = await box.exec(f"echo ${INSIDE}", timeout_s=10)
    await box.exec("exit 1", timeout_s=10)
    second = await box.exec(f"echo ${INSIDE}", timeout_s=10)
    assert len({first.output, second.output, "\n"}) == 3
    await box.close()
