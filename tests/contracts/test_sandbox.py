"""One suite for every kind of sandbox. What isolates is asked of the kinds that isolate only:
`process` promises none of it, and the fake runs nothing."""

import asyncio
import ctypes
import os
import re
import resource
import secrets
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import structlog
import structlog.testing

from agent.faults import SandboxUnavailable, WorkspaceRefused
from agent.sandbox.contract import ExecResult, Sandbox
from agent.sandbox.limits import session_uid
from agent.sandbox.local import choose_kind, open_sandbox
from agent.spec import SandboxSpec
from agent.testing import FakeSandbox
from tests.support import sandbox_owner
from tests.support.sandboxes import children, need, processes, session_cgroups, until

ISOLATING = ("bwrap", "sandlock")
RUNNING = (*ISOLATING, "process")
ALL = (*RUNNING, "fake")
MB = 1024**2

isolating = pytest.mark.parametrize("kind", ISOLATING)
running = pytest.mark.parametrize("kind", RUNNING)
every = pytest.mark.parametrize("kind", ALL)


def spec(kind: str, **changes: object) -> SandboxSpec:
    small = {"memory_bytes": 256 * MB, "max_processes": 64, "max_file_bytes": 64 * MB}
    return SandboxSpec.model_validate({"kind": kind, "tmp_bytes": 32 * MB, **small, **changes})


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "workspace").mkdir()
    return tmp_path / "workspace"


@pytest.fixture
async def box(kind: str, workspace: Path) -> AsyncGenerator[Sandbox]:
    if kind == "fake":
        sandbox: Sandbox = FakeSandbox(workspace, max_file_bytes=64 * MB)
    else:
        need(kind)
        sandbox = await open_sandbox(spec(kind), workspace, session_id=f"test-{kind}")
    yield sandbox
    await sandbox.close()


async def run(box: Sandbox, command: str, timeout_s: float = 15, **options: object) -> ExecResult:
    return await box.exec(command, timeout_s=timeout_s, **options)  # type: ignore[arg-type]


async def says(box: Sandbox, command: str) -> str:
    result = await run(box, command)
    assert result.exit_code == 0, result
    return result.output.strip()


# --- one shell -----------------------------------------------------------------------------------


@running
async def test_directory_exports_functions_and_variables_last(box: Sandbox) -> None:
    await run(
        box, "mkdir -p a/b && cd a/b && export X=1 Y='two\nlines' && z=3 && f() { echo f$1; }"
    )
    assert (
        await says(box, 'echo "$PWD $X $Y $z $(f 4)"')
        == f"{box.workspace_path}/a/b 1 two\nlines 3 f4"
    )


@running
async def test_exit_codes_are_the_shells(box: Sandbox) -> None:
    codes = {
        "true": 0,
        "false": 1,
        "no-such-program-here": 127,
        "bash -c 'kill -9 $$'": 137,
        "(exit 42)": 42,
        "if": 2,
        "": 0,
        "# only a comment": 0,
        "echo 'unclosed": 2,
    }
    for command, code in codes.items():
        assert (await run(box, command)).exit_code in ({code, 1} if code == 2 else {code}), command


@running
async def test_stdout_and_stderr_come_in_order(box: Sandbox) -> None:
    result = await run(box, "for i in 1 2 3; do echo out$i; echo err$i >&2; done")
    assert result.output == "out1\nerr1\nout2\nerr2\nout3\nerr3\n"


@running
async def test_commands_run_one_at_a_time_in_the_order_they_came(box: Sandbox) -> None:
    commands = [f"echo begin{i} >> log; sleep 0.0{9 - i}; echo end{i} >> log" for i in range(8)]
    await asyncio.gather(*(run(box, command) for command in commands))
    expected = "".join(f"begin{i}\nend{i}\n" for i in range(8))
    assert (await box.read_file("log", max_bytes=1000)).decode() == expected


@running
async def test_a_command_that_reads_stdin_does_not_eat_the_next(box: Sandbox) -> None:
    assert (await run(box, "cat; read x; echo got=$x")).output == "got=\n"
    assert await says(box, "echo next") == "next"


@running
async def test_exit_ends_the_shell_and_the_next_one_stands_where_it_stood(box: Sandbox) -> None:
    await run(box, "mkdir -p d; cd d; export KEPT='a b'")
    result = await run(box, "echo before; exit 7")
    assert (result.exit_code, result.output, result.timed_out) == (7, "before\n", False)
    assert await says(box, 'echo "$PWD $KEPT"') == f"{box.workspace_path}/d a b"


@running
async def test_options_that_break_shells_do_not_break_the_protocol(box: Sandbox) -> None:
    for setup in (
        "set -x",
        "set -u",
        "exec 3>&1",
        "printf() { :; }",
        "trap 'echo t' DEBUG",
        "exec >/dev/null",
    ):
        await run(box, setup)
        assert "still here" in (await run(box, "echo still here")).output, setup
    assert (await run(box, "set -e; false")).exit_code == 1
    assert await says(box, "echo alive") == "alive"


@running
async def test_output_that_imitates_the_marks_is_only_output(box: Sandbox) -> None:
    fake = rf"printf '\0troupe-{'0' * 32}\0'; printf 'troupe-{'0' * 32}\0000\0/\0\0troupe-{'0' * 32}\n' >&2; exit_me() {{ :; }}"
    result = await run(box, f"{fake}; echo end; (exit 5)")
    assert result.exit_code == 5
    assert result.output.endswith("end\n")
    assert result.output.count("troupe-") == 3


@running
async def test_a_background_job_that_holds_the_output_open_does_not_hold_the_call(
    box: Sandbox,
) -> None:
    assert (await run(box, "sleep 600 & echo started")).output == "started\n"
    assert await says(box, "jobs -r | wc -l") == "1"


@running
async def test_binary_missing_newline_and_long_lines_come_whole(box: Sandbox) -> None:
    assert (await run(box, "printf abc")).output == "abc"
    assert (await run(box, r"printf 'a\0b\xff\xe2\x82\xac'")).output == "a\0b�€"
    long = await run(box, "head -c 200000 /dev/zero | tr '\\0' x", max_output_bytes=300_000)
    assert long.output == "x" * 200_000


@running
async def test_a_command_that_is_long_or_full_of_quotes_arrives_as_it_is(box: Sandbox) -> None:
    body = "line 'with' \"quotes\" $and `ticks` \\ é\n" * 2000
    await run(box, f"cat > big <<'END'\n{body}END")
    assert (await box.read_file("big", max_bytes=MB)).decode() == body
    assert (await run(box, "echo a\0b")).exit_code == 2


@running
async def test_output_is_shown_while_the_command_runs(box: Sandbox, workspace: Path) -> None:
    shown: list[str] = []
    seen = asyncio.Event()

    def show(text: str) -> None:
        shown.append(text)
        seen.set()

    await run(box, "mkfifo gate")
    running_command = asyncio.create_task(
        run(box, "echo first; read _ < gate; echo second", on_output=show)
    )
    await asyncio.wait_for(seen.wait(), 10)
    assert "".join(shown) == "first\n"
    await asyncio.to_thread(_open_gate, workspace / "gate")
    await running_command
    assert "".join(shown) == "first\nsecond\n"


def _open_gate(gate: Path) -> None:
    with gate.open("w") as pipe:
        pipe.write("go\n")


# --- output without end --------------------------------------------------------------------------


@running
async def test_output_is_cut_in_the_middle_and_kept_whole_in_a_file(box: Sandbox) -> None:
    result = await run(box, "seq 100000", max_output_bytes=2000)
    assert result.truncated
    assert result.output.startswith("1\n2\n3\n")
    assert result.output.endswith("99999\n100000\n")
    whole = "".join(f"{i}\n" for i in range(1, 100_001))
    missing = re.search(r"\[\.\.\. (\d+) bytes are missing here; .* (\S+) \.\.\.\]", result.output)
    assert missing is not None
    assert int(missing[1]) == len(whole) - 2000
    assert missing[2] == result.full_output_path
    assert await says(box, f"wc -c < {result.full_output_path}") == str(len(whole))
    assert (await box.read_file(result.full_output_path or "", max_bytes=MB)).decode() == whole


@running
async def test_300_mb_of_output_leave_our_memory_flat(box: Sandbox) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shown: list[str] = []
    result = await run(box, "yes 0123456789 | head -c 300000000", on_output=shown.append)
    assert result.exit_code == 0
    assert 25_000 <= len(result.output) < 25_500
    assert sum(map(len, shown)) < 25_500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB
    # The file ends where the sandbox's limit for files is.
    assert await says(box, f"wc -c < {result.full_output_path}") == str(64 * MB)


@running
async def test_endless_output_is_stopped_by_the_timeout(box: Sandbox) -> None:
    result = await run(box, "yes", timeout_s=0.5)
    assert (result.exit_code, result.timed_out, result.truncated) == (124, True, True)
    assert await says(box, "echo alive") == "alive"


@running
async def test_only_the_newest_full_outputs_are_kept(box: Sandbox) -> None:
    for _ in range(12):
        last = await run(box, "seq 2000", max_output_bytes=1000)
    assert int(await says(box, f"ls $(dirname {last.full_output_path}) | wc -l")) <= 8


# --- ending things -------------------------------------------------------------------------------


STUBBORN = (
    "trap '' TERM INT HUP; setsid bash -c \"trap '' TERM HUP; exec -a {0} sleep 600\" & "
    "nohup bash -c 'exec -a {0} sleep 600' >/dev/null 2>&1 & "
    "( ( bash -c 'exec -a {0} sleep 600' & ) & ); bash -c 'exec -a {0} sleep 600'"
)


@running
async def test_a_timeout_kills_everything_and_the_shell_is_back_in_its_state(box: Sandbox) -> None:
    mark = f"mark-{secrets.token_hex(6)}"
    await run(box, "mkdir -p d; cd d; export KEPT=1; echo some")
    result = await run(
        box, f"export KEPT=2; cd /; echo begun; {STUBBORN.format(mark)}", timeout_s=1
    )
    assert (result.exit_code, result.timed_out, result.output) == (124, True, "begun\n")
    assert processes(mark) == []
    assert await says(box, "echo $PWD $KEPT") == f"{box.workspace_path}/d 1"


@running
async def test_cancelling_kills_everything_before_it_returns(box: Sandbox) -> None:
    mark = f"mark-{secrets.token_hex(6)}"
    begun = asyncio.Event()
    command = run(box, f"echo begun; {STUBBORN.format(mark)}", 60, on_output=lambda _: begun.set())
    task = asyncio.create_task(command)
    await asyncio.wait_for(begun.wait(), 10)
    await until(lambda: len(processes(mark)) >= 4)
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert processes(mark) == []
    assert await says(box, "echo alive") == "alive"


@running
async def test_a_cancelled_call_that_waited_its_turn_never_runs(box: Sandbox) -> None:
    first = asyncio.create_task(run(box, "sleep 0.3; echo first >> log"))
    second = asyncio.create_task(run(box, "echo second >> log"))
    third = asyncio.create_task(run(box, "echo third >> log"))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(first, third)
    assert (await box.read_file("log", max_bytes=100)) == b"first\nthird\n"


@running
async def test_close_leaves_no_process_and_no_cgroup_and_keeps_the_workspace(
    kind: str, workspace: Path
) -> None:
    need(kind)
    mark = f"mark-{secrets.token_hex(6)}"
    before = session_cgroups()
    box = await open_sandbox(spec(kind), workspace, session_id=mark)
    await run(box, f"echo kept > file; {STUBBORN.format(mark)} & disown")
    await until(lambda: len(processes(mark)) >= 4)
    await box.close()
    assert processes(mark) == []
    assert session_cgroups() <= before
    assert (workspace / "file").read_text() == "kept\n"
    await box.close()
    with pytest.raises(SandboxUnavailable):
        await run(box, "true")


@running
async def test_close_ends_a_command_that_runs(box: Sandbox) -> None:
    begun = asyncio.Event()
    task = asyncio.create_task(run(box, "echo b; sleep 600", 600, on_output=lambda _: begun.set()))
    await asyncio.wait_for(begun.wait(), 10)
    await box.close()
    assert (await task).exit_code == 137


@running
async def test_a_sandbox_dies_with_its_owner(kind: str, workspace: Path) -> None:
    need(kind)
    mark = f"mark-{secrets.token_hex(6)}"
    before = session_cgroups()
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-P", sandbox_owner.__file__, kind, str(workspace), mark,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert owner.stdout is not None
    try:
        async with asyncio.timeout(15):
            while b"ready" not in (line := await owner.stdout.readline()):
                assert line, "the owner ended"
        await until(lambda: len(processes(mark)) >= 3)
    finally:
        if owner.returncode is None:
            owner.send_signal(signal.SIGKILL)
        await owner.communicate()
    await until(lambda: processes(mark) == [])
    await until(lambda: session_cgroups() <= before)


@isolating
async def test_a_sandbox_dies_with_its_warden(box: Sandbox) -> None:
    """Whoever kills all our children, as a cluster does, kills the warden first."""
    mark = f"mark-{secrets.token_hex(6)}"
    begun = asyncio.Event()
    command = run(box, f"echo b; {STUBBORN.format(mark)}", 60, on_output=lambda _: begun.set())
    task = asyncio.create_task(command)
    await asyncio.wait_for(begun.wait(), 10)
    await until(lambda: len(processes(mark)) >= 4)
    (warden,) = children("warden.py")
    os.kill(warden, signal.SIGKILL)
    assert (await task).exit_code != 0
    await until(lambda: processes(mark) == [])
    assert await says(box, "echo alive") == "alive"


# --- bombs ---------------------------------------------------------------------------------------


@isolating
async def test_a_fork_bomb_is_contained(box: Sandbox) -> None:
    mark = f"mark-{secrets.token_hex(6)}"
    bomb = f"bash -c 'for i in $(seq 300); do bash -c \"exec -a {mark} sleep 600\" & done; wait'"
    task = asyncio.create_task(run(box, bomb, timeout_s=3))
    most = 0
    while not task.done():
        most = max(most, len(await asyncio.to_thread(processes, mark)))
        await asyncio.sleep(0.02)
    assert (await task).timed_out or (await task).exit_code != 0
    assert 0 < most <= 70
    assert processes(mark) == []
    assert await says(box, "echo alive") == "alive"


@isolating
async def test_a_recursive_fork_bomb_dies_with_its_timeout(box: Sandbox) -> None:
    await run(box, "bomb() { bomb | bomb & }; bomb; sleep 600", timeout_s=2)
    assert await says(box, "echo alive") == "alive"


@isolating
async def test_a_memory_bomb_is_contained(box: Sandbox) -> None:
    eat = "x = []\nwhile len(x) < 64: x.append(bytearray(16 * 1024 * 1024)); print(len(x), flush=True)"
    result = await run(box, f"/usr/bin/python3 -c '{eat}'")
    assert result.exit_code != 0
    assert "64" not in result.output.split()
    assert await says(box, "echo alive") == "alive"


@running
async def test_a_file_grows_to_the_limit_only(box: Sandbox) -> None:
    result = await run(box, "head -c 100000000 /dev/zero > big")
    assert result.exit_code != 0
    assert await says(box, "wc -c < big") == str(64 * MB)


@isolating
async def test_tmp_is_private_and_bounded(box: Sandbox) -> None:
    name = f"private-{secrets.token_hex(6)}"
    await run(box, f"echo x > ${{TMPDIR:-/tmp}}/{name}; echo y > /tmp/{name}-2")
    assert await says(box, f"cat ${{TMPDIR:-/tmp}}/{name}") == "x"
    assert not _there(Path("/tmp", name), Path("/tmp", f"{name}-2"))
    await run(box, "head -c 50000000 /dev/zero > /tmp/big")
    assert int(await says(box, "cat /tmp/big 2>/dev/null | wc -c")) <= 32 * MB


# --- isolation -----------------------------------------------------------------------------------


def _there(*paths: Path) -> list[Path]:
    return [path for path in paths if os.path.lexists(path)]


def _home() -> Path:
    return Path.home()


@isolating
async def test_the_environment_holds_no_host_secret(
    kind: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(kind)
    secret = f"secret-{secrets.token_hex(8)}"
    monkeypatch.setenv("PROVIDER_API_KEY", secret)
    box = await open_sandbox(spec(kind), workspace, session_id="env")
    try:
        found = await run(
            box, "env; export -p; set; cat /proc/*/environ | tr '\\0' '\\n'", max_output_bytes=MB
        )
        assert secret not in found.output
        names = set((await says(box, "env | cut -d= -f1")).split())
        assert names <= {
            "TROUPE_INSIDE",
            "PATH",
            "HOME",
            "LANG",
            "TERM",
            "USER",
            "LOGNAME",
            "SHELL",
            "PWD",
            "OLDPWD",
            "SHLVL",
            "_",
            "TMPDIR",
        }
        assert await says(box, "echo $HOME") == box.workspace_path
    finally:
        await box.close()


@isolating
async def test_the_host_is_neither_readable_nor_writable(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host-secret")
    await asyncio.to_thread(tmp_path.chmod, 0o777)
    (tmp_path / "secret").chmod(0o666)
    assert (await run(box, f"cat {tmp_path}/secret; ls {tmp_path}")).exit_code != 0
    for place in (
        tmp_path,
        _home(),
        "/root",
        "/etc",
        "/usr",
        "/usr/bin",
        "/var/tmp",
        "/opt",
        "/",
    ):
        name = f"written-{secrets.token_hex(6)}"
        await run(box, f"mkdir -p {place} 2>/dev/null; echo x > {place}/{name}")
        assert not _there(Path(place, name)), place
    assert (await run(box, f"ls {_home()}; cat /etc/shadow")).exit_code != 0
    assert (await run(box, "ls -A /root")).output.count("\n") <= 1


@isolating
async def test_only_own_processes_are_seen_and_reached(box: Sandbox) -> None:
    victim = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        assert int(await says(box, "ls /proc | grep -c '^[0-9]'")) <= 10
        await run(
            box,
            f"kill -9 {victim.pid}; kill -9 -{victim.pid}; kill -9 {os.getpid()}; kill -9 {os.getppid()}",
        )
        assert victim.returncode is None
        assert processes("sleep\x00600").count(victim.pid) == 1
        if box.kind == "bwrap":
            inside = await says(box, "readlink /proc/self/ns/pid")
            assert inside != str(await asyncio.to_thread(Path("/proc/self/ns/pid").readlink))
    finally:
        victim.kill()
        await victim.wait()


@isolating
async def test_there_are_no_capabilities_and_none_to_gain(box: Sandbox) -> None:
    status = await says(box, "cat /proc/self/status")
    for line in ("CapPrm", "CapEff", "CapAmb"):
        assert re.search(rf"{line}:\s+0+\n", status), line
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    if os.geteuid() == 0:
        assert re.search(r"CapBnd:\s+0+\n", status)
    for command in ("unshare -U true", "unshare -r true", "mount -t tmpfs none /mnt", "su -c true"):
        assert (await run(box, command)).exit_code != 0, command


SOCKET_PROBE = """
import socket, sys
def attempt(name, f):
    try: f(); print(name, "open")
    except OSError as e: print(name, "closed")
def connect(family, address):
    s = socket.socket(family); s.settimeout(2); s.connect(address)
attempt("tcp", lambda: connect(socket.AF_INET, ("127.0.0.1", int(sys.argv[1]))))
attempt("unix", lambda: connect(socket.AF_UNIX, sys.argv[2]))
attempt("abstract", lambda: connect(socket.AF_UNIX, "\\0" + sys.argv[3]))
attempt("vsock", lambda: socket.socket(40, socket.SOCK_STREAM))
attempt("netlink", lambda: socket.socket(16, socket.SOCK_RAW))
attempt("packet", lambda: socket.socket(17, socket.SOCK_RAW))
attempt("pair", lambda: socket.socketpair())
"""


class Server:
    """Something on the host that must not be reached: it accepts on TCP and on UNIX sockets."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "s"
        self.name = f"troupe-{secrets.token_hex(6)}"
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.path))
        self.path.chmod(0o777)
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0{self.name}")
        for listening in (self.unix, self.abstract):
            listening.listen()

    def close(self) -> None:
        for listening in (self.tcp, self.unix, self.abstract):
            listening.close()


async def _sockets(box: Sandbox, directory: Path) -> dict[str, str]:
    server = Server(directory)
    try:
        await box.write_file("probe.py", SOCKET_PROBE.encode())
        arguments = f"{server.tcp.getsockname()[1]} {server.path} {server.name}"
        said = await says(box, f"/usr/bin/python3 probe.py {arguments}")
    finally:
        server.close()
    return dict(line.split() for line in said.splitlines())  # type: ignore[misc]


@isolating
async def test_no_socket_leads_out(box: Sandbox, short_directory: Path) -> None:
    assert await _sockets(box, short_directory) == {
        "tcp": "closed", "unix": "closed", "abstract": "closed",
        "vsock": "closed", "netlink": "closed", "packet": "closed", "pair": "open",
    }  # fmt: skip


@isolating
async def test_the_network_is_there_when_the_spec_says_so(
    kind: str, workspace: Path, short_directory: Path
) -> None:
    need(kind)
    box = await open_sandbox(spec(kind, network=True), workspace, session_id="net")
    try:
        found = await _sockets(box, short_directory)
    finally:
        await box.close()
    assert found["tcp"] == "open"
    assert {found["vsock"], found["netlink"], found["packet"], found["unix"]} == {"closed"}


@pytest.fixture
def short_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNIX socket's path has at most 107 characters. World-open, so only the sandbox is in the way."""
    directory = tmp_path_factory.mktemp("s")
    directory.chmod(0o777)
    return directory


@isolating
async def test_files_belong_to_a_uid_of_the_session(box: Sandbox, workspace: Path) -> None:
    if session_uid("any") is None:
        pytest.skip("ONLY ROOT CAN GIVE A SESSION ITS OWN UID: this did not run")
    await run(box, "echo x > by-command")
    await box.write_file("new/dir/by-call", b"x")
    owners = {
        (workspace / name).stat().st_uid
        for name in (".", "by-command", "new", "new/dir", "new/dir/by-call")
    }
    assert len(owners) == 1
    assert owners.pop() >= 20_000
    assert await says(box, "echo more >> new/dir/by-call && cat new/dir/by-call") == "xmore"


# --- files ---------------------------------------------------------------------------------------


@every
async def test_files_are_written_and_read_back(box: Sandbox, workspace: Path) -> None:
    content = bytes(range(256)) * 100
    await box.write_file("a/b/c.bin", content)
    assert await box.read_file("a/b/c.bin", max_bytes=MB) == content
    assert await box.read_file("/workspace/a/b/c.bin", max_bytes=10) == content[:10]
    assert await box.read_file(f"{box.workspace_path}/a/./b/c.bin", max_bytes=3) == content[:3]
    await box.write_file("a/b/c.bin", b"")
    assert await box.read_file("a/b/../b/c.bin", max_bytes=3) == b""
    assert [path.name for path in (workspace / "a/b").iterdir()] == ["c.bin"]


@every
async def test_a_written_file_keeps_its_mode(box: Sandbox, workspace: Path) -> None:
    await box.write_file("tool.sh", b"one")
    (workspace / "tool.sh").chmod(0o754)
    await box.write_file("tool.sh", b"two")
    assert (workspace / "tool.sh").stat().st_mode & 0o7777 == 0o754


@every
async def test_what_is_not_there_or_no_file_says_so(box: Sandbox, workspace: Path) -> None:
    (workspace / "dir").mkdir()
    os.mkfifo(workspace / "fifo")
    with pytest.raises(FileNotFoundError):
        await box.read_file("none", max_bytes=1)
    for path in ("dir", ".", "/workspace"):
        with pytest.raises(IsADirectoryError):
            await box.read_file(path, max_bytes=1)
        with pytest.raises(IsADirectoryError):
            await box.write_file(path, b"")
    for path in ("fifo", "/dev/null"):
        with pytest.raises(WorkspaceRefused):
            await box.read_file(path, max_bytes=1)
        with pytest.raises(WorkspaceRefused):
            await box.write_file(path, b"")


@every
async def test_no_path_leaves_the_workspace(box: Sandbox, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("host")
    (workspace / "up").symlink_to("../outside")
    (workspace / "absolute").symlink_to(tmp_path / "outside")
    (workspace / "file").symlink_to(tmp_path / "outside/file")
    (workspace / "loop").symlink_to("loop")
    (workspace / "proc").symlink_to("/proc/self/root")
    ways = (
        "../outside/file", "/workspace/../outside/file", "up/file", "absolute/file", "file", "loop",
        f"{tmp_path}/outside/file", "/etc/passwd", "a/../../outside/file", "proc/etc/passwd", "", "a\0b",
        f"proc{tmp_path}/outside/file", "x" * 5000,
    )  # fmt: skip
    for path in ways:
        with pytest.raises((WorkspaceRefused, FileNotFoundError)):
            await box.read_file(path, max_bytes=10)
        with pytest.raises(WorkspaceRefused):
            await box.write_file(path, b"overwritten")
    assert (tmp_path / "outside/file").read_text() == "host"
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["file"]


@every
async def test_symlinks_that_stay_inside_may_be_read(box: Sandbox, workspace: Path) -> None:
    await box.write_file("real/file", b"inside")
    (workspace / "link").symlink_to("real")
    assert await box.read_file("link/file", max_bytes=10) == b"inside"
    await box.write_file("link/other", b"too")
    assert (workspace / "real/other").read_bytes() == b"too"


@every
async def test_a_symlink_that_is_swapped_in_never_wins(
    box: Sandbox, workspace: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    (outside / "file").write_text("host")
    (workspace / "dir").mkdir()
    (workspace / "dir/file").write_text("mine")
    (workspace / "link").symlink_to(outside)
    stop = threading.Event()
    swapping = threading.Thread(target=_swap, args=(workspace / "dir", workspace / "link", stop))
    swapping.start()
    outcomes = set()
    try:
        for _ in range(300):
            try:
                outcomes.add(await box.read_file("dir/file", max_bytes=10))
                await box.write_file("dir/file", b"mine")
            except (WorkspaceRefused, FileNotFoundError):
                outcomes.add(b"refused")
    finally:
        stop.set()
        await asyncio.to_thread(swapping.join)
    assert b"host" not in outcomes
    assert b"mine" in outcomes
    assert (outside / "file").read_text() == "host"
    assert [path.name for path in outside.iterdir()] == ["file"]


def _swap(directory: Path, link: Path, stop: threading.Event) -> None:
    exchange, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
    rename = ctypes.CDLL(None).renameat2
    while not stop.is_set():
        rename(here, os.fsencode(directory), here, os.fsencode(link), exchange)


@every
async def test_a_file_over_the_limit_is_refused_and_changes_nothing(box: Sandbox) -> None:
    await box.write_file("file", b"old")
    with pytest.raises(WorkspaceRefused):
        await box.write_file("file", b"x" * (64 * MB + 1))
    assert await box.read_file("file", max_bytes=10) == b"old"


@every
async def test_a_reader_never_sees_half_a_file(box: Sandbox) -> None:
    contents = {letter.encode() * 500_000 for letter in "abcd"}
    await box.write_file("file", b"a" * 500_000)

    async def write() -> None:
        for content in sorted(contents) * 5:
            await box.write_file("file", content)

    writing = asyncio.create_task(write())
    while not writing.done():
        assert await box.read_file("file", max_bytes=MB) in contents
    await writing


# --- choosing ------------------------------------------------------------------------------------


def test_auto_takes_bwrap_then_sandlock_then_refuses_and_names_both() -> None:
    def there() -> bool:
        return True

    def missing() -> bool:
        return False

    auto = SandboxSpec()
    assert choose_kind(auto, bwrap=there, sandlock=there) == "bwrap"
    assert choose_kind(auto, bwrap=missing, sandlock=there) == "sandlock"
    with pytest.raises(SandboxUnavailable, match=r"bwrap.*sandlock"):
        choose_kind(auto, bwrap=missing, sandlock=missing)
    for kind in ISOLATING:
        with pytest.raises(SandboxUnavailable, match=kind):
            choose_kind(SandboxSpec(kind=kind), bwrap=missing, sandlock=missing)
    assert choose_kind(SandboxSpec(kind="process"), bwrap=missing, sandlock=missing) == "process"


@running
async def test_a_session_comes_back_to_its_workspace(kind: str, workspace: Path) -> None:
    need(kind)
    for expected in ("", "one\n", "one\none\n"):
        box = await open_sandbox(spec(kind), workspace, session_id="same")
        assert (await run(box, "cat log 2>/dev/null; echo one >> log")).output == expected
        await box.close()


@running
async def test_a_sandbox_opens_whatever_descriptors_its_owner_has(
    kind: str, workspace: Path
) -> None:
    need(kind)
    taken: list[int] = []
    try:
        for _ in range(10):
            box = await open_sandbox(spec(kind), workspace, session_id="descriptors")
            await box.close()
            taken.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for descriptor in taken:
            os.close(descriptor)


async def test_process_warns_that_it_does_not_isolate(workspace: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        box = await open_sandbox(spec("process"), workspace, session_id="warned")
    await box.close()
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("warning", "sandbox_without_isolation")
    ]
