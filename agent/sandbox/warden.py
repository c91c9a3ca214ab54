"""The process between us and a sandbox: starts it, outlives it, leaves nothing behind.

Run as a script by `agent.sandbox.shell`, alone (the standard library only), with one argument: the
plan, as JSON. Its standard streams are the sandbox's shell's. It is the subreaper of everything that
the shell starts, so `setsid` children cannot get away, and it waits on the *lifeline*, a pipe whose
other end only its owner holds: when that closes, by `close` or because the owner was killed, it kills
every descendant, removes the cgroups and ends. SIGTERM means the same. It exits as the shell exits,
128+n for a signal. What happens when the warden itself is killed or stopped: `agent.sandbox.reaper`.

The plan: `lifeline` (fd), `cgroups` ([{dir, files}]), `uid` (or null), `workspace`, `tmp_bytes`,
`fds` ({fd: base64}, made readable for the sandbox), `env`, and either `argv` or `sandlock`
({site, options, argv}) with `seccomp` (base64 or null). `{workspace}` in `argv`, `options` and `env` becomes
the path under which the workspace can be reached.
"""

import base64
import ctypes
import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 24, 36, 38
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 1 << 18
_REMOVE_LIMIT_S = 3.0
_MOUNT_POINT = "/mnt"
"""Every Linux has it (FHS), and in the sandbox's own mount namespace nobody else needs it."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: Any) -> None:
    if getattr(_libc, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _prctl(option: int, *args: Any) -> None:
    # prctl is variadic and reads machine words: an int would leave the upper half undefined.
    padded = (*args, 0, 0, 0, 0)[:4]
    words = [a if isinstance(a, ctypes.c_void_p) else ctypes.c_ulong(a) for a in padded]
    _call("prctl", option, *words)


def main() -> int:
    plan = json.loads(sys.argv[1])
    lifeline = plan["lifeline"]
    os.set_inheritable(lifeline, False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # Children that end, and SIGTERM, wake the loop below through this pipe.
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    signal.signal(signal.SIGCHLD, _woken)
    signal.signal(signal.SIGTERM, _woken)
    signal.set_wakeup_fd(wake_w)
    cgroups = [Path(group["dir"]) / _cgroup_name() for group in plan["cgroups"]]
    try:
        for group, path in zip(plan["cgroups"], cgroups, strict=True):
            _sweep(path.parent)
            path.mkdir()
            for name, value in group["files"].items():
                # A kernel that does not account for swap has no file for it.
                if "sw" not in name or (path / name).exists():
                    (path / name).write_text(value)
        # Closed by our end, however it comes: who waits on the other side outlives a kill -9 of us.
        alive_r, alive_w = os.pipe()
        first = os.fork()
        if first == 0:
            os.close(alive_w)
            _become_the_sandbox(plan, cgroups, alive_r)
        # The sandbox's pipes are not ours: their readers must see the end when the sandbox ends.
        _forget_stdio()
        return _watch(first, lifeline, wake_r)
    finally:
        _kill_descendants()
        for path in cgroups:
            _remove(path)


def _cgroup_name() -> str:
    """Of this process alone: pids come again, with another start (field 22 of its stat)."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return f"troupe-{os.getpid()}-{stat[19]}"


def _woken(_number: int, _frame: object) -> None:
    """A handler must be there for the wakeup fd to be written."""


def _forget_stdio() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _watch(first: int, lifeline: int, wake: int) -> int:
    """Until the shell ends, the lifeline closes or SIGTERM comes."""
    while True:
        ready, _, _ = select.select([lifeline, wake], [], [])
        if lifeline in ready:
            return 128 + signal.SIGKILL
        if signal.SIGTERM in os.read(wake, 4096):
            return 128 + signal.SIGTERM
        code = _reap(first)
        if code is not None:
            return code


def _reap(first: int) -> int | None:
    """Collect everything that has ended; the exit code of `first` if it was among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == first:
            value = os.waitstatus_to_exitcode(status)
            code = 128 - value if value < 0 else value


def _kill_descendants() -> None:
    """Kill and reap until there is no child: what a dead process leaves becomes our child."""
    while True:
        for pid in _descendants():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
            _reap(-1)
        except ChildProcessError:
            return


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            # The command's name stands in parentheses and may hold anything, so count from the last.
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        kids = children.get(todo.pop(), [])
        found += kids
        todo += kids
    return found


def _remove(cgroup: Path) -> None:
    """An empty cgroup may answer EBUSY for a moment after its last process was reaped."""
    give_up_at = time.monotonic() + _REMOVE_LIMIT_S
    while time.monotonic() < give_up_at:
        try:
            cgroup.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
        else:
            return


def _sweep(parent: Path) -> None:
    """Remove the cgroups of wardens that were killed; one with processes in it stays (EBUSY)."""
    for path in parent.glob("troupe-*"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            with suppress(OSError):
                path.rmdir()


def _become_the_sandbox(plan: dict[str, Any], cgroups: list[Path], alive: int) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and that is inherited
        for path in cgroups:
            (path / "cgroup.procs").write_text(str(os.getpid()))
        for fd, content in plan["fds"].items():
            _readable_fd(int(fd), base64.b64decode(content))
        sandlock = plan["sandlock"]
        # Imported as we are: the session's uid may not be allowed to read our interpreter.
        module = _import_sandlock(sandlock["site"]) if sandlock else None
        workspace = _mounted(plan)
        if sandlock or plan["uid"] is not None:
            _drop_capabilities()
        _drop_to(plan["uid"])
        if sandlock and workspace == _MOUNT_POINT:
            sandlock["options"]["fs_writable"].append("/tmp")  # noqa: S108 our own, see _mounted
            del plan["env"]["TMPDIR"]
        text = json.dumps(sandlock or plan["argv"]).replace(
            "{workspace}", json.dumps(workspace)[1:-1]
        )
        env = {name: value.replace("{workspace}", workspace) for name, value in plan["env"].items()}
        if sandlock is None:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # after the uid: a change of it clears this
            argv = json.loads(text)
            if plan["enter_workspace"]:
                os.chdir(workspace)
            os.execve(argv[0], argv, env)  # noqa: S606 a shell is what we start
        _run_sandlock(module, json.loads(text) | {"env": env}, plan["seccomp"], alive)
    except BaseException as cause:  # noqa: BLE001 a forked child must end here, whatever happened
        os.write(2, f"{type(cause).__name__}: {cause}\n".encode())
    os._exit(125)


def _readable_fd(fd: int, content: bytes) -> None:
    memory = os.memfd_create("troupe")
    os.write(memory, content)
    os.lseek(memory, 0, os.SEEK_SET)
    os.dup2(memory, fd)
    os.set_inheritable(fd, True)  # dup2 to itself would have left it closed on exec


def _mounted(plan: dict[str, Any]) -> str:
    """Put the workspace where the session's uid can reach it, and a private /tmp, if we may.

    As root the workspace often lies below a directory that only root may enter. A mount namespace of
    our own solves that; without the right to make one the path stays what it is.
    """
    workspace: str = plan["workspace"]
    if not plan["mounts"]:
        return workspace
    try:
        _own_mounts()
        _call("mount", workspace.encode(), _MOUNT_POINT.encode(), None, _MS_BIND | _MS_REC, None)
        options = f"size={plan['tmp_bytes']},mode=1777".encode()
        _call("mount", b"tmpfs", b"/tmp", b"tmpfs", _MS_NOSUID | _MS_NODEV, options)
    except OSError:
        return workspace
    return _MOUNT_POINT


def _own_mounts() -> None:
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        _call("unshare", _CLONE_NEWNS)
    else:
        _call("unshare", _CLONE_NEWNS | _CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)


def _drop_capabilities() -> None:
    """Nothing that is executed from here on has one, as root of a container neither."""
    for capability in range(64):
        with suppress(OSError):  # the kernel has fewer (EINVAL), or we have none to drop (EPERM)
            _prctl(_PR_CAPBSET_DROP, capability)


def _drop_to(uid: int | None) -> None:
    if uid is None:
        return
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # A change of uid makes /proc/self root's; bwrap writes its uid_map there.
    _prctl(_PR_SET_DUMPABLE, 1)


def _import_sandlock(site: str) -> Any:
    sys.path.append(site)
    import sandlock  # here: only this kind needs the 12 MB library

    return sandlock


def _run_sandlock(module: Any, what: dict[str, Any], seccomp: str | None, alive: int) -> NoReturn:
    """Be the supervisor of a shell under Landlock and seccomp until it or the warden ends.

    There is no PID namespace to end with us, so we end what is in the sandbox when the warden dies.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if seccomp is not None:
        _load_filter(base64.b64decode(seccomp))
    inherit = module.StdioMode.INHERIT
    box = module.Sandbox(**what["options"], env=what["env"])
    process = box.popen(what["argv"], stdin=inherit, stdout=inherit, stderr=inherit)
    _forget_stdio()
    threading.Thread(target=_exit_as, args=(process,), daemon=True).start()
    os.read(alive, 1)
    _kill_descendants()
    os._exit(128 + signal.SIGKILL)


def _exit_as(process: Any) -> None:
    result = process.wait()
    code: int = result.exit_code
    signalled: int = result.signal if result.signal is not None else -1
    os._exit(128 + signalled if signalled > 0 else code if code >= 0 else 128 + signal.SIGKILL)


def _load_filter(program: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    holder = Program(len(program) // 8, program)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.cast(ctypes.byref(holder), ctypes.c_void_p))


if __name__ == "__main__":
    sys.exit(main())
