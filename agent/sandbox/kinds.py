"""The kinds of local sandbox: which this machine can do, and how each is started."""

import base64
import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from agent.faults import SandboxUnavailable
from agent.sandbox import limits, seccomp
from agent.sandbox.marks import Mark, Stat
from agent.sandbox.shell import Launch
from agent.sandbox.workspace import HIDDEN
from agent.spec import SandboxSpec

_PROBE_LIMIT_S = 10.0
_SYS_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_ABI = 6
"""What sandlock 0.9 asks for: Linux 6.12, or 6.7 with backports."""
_SECCOMP_FD, _PASSWD_FD = 201, 200  # above what the warden has open by then
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENV = {"PATH": _PATH, "LANG": "C.UTF-8", "TERM": "dumb", "USER": "agent", "LOGNAME": "agent",
        "SHELL": "/bin/bash", "PS1": "", "PS2": ""}  # fmt: skip
_BASH = ["/bin/bash", "--noprofile", "--norc"]

_ETC = (
    "alternatives", "ca-certificates", "ca-certificates.conf", "debian_version", "gai.conf", "host.conf",
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "nsswitch.conf",
    "os-release", "pki", "protocols", "services", "ssl/certs", "ssl/openssl.cnf", "timezone",
)  # fmt: skip
"""Of /etc: what programs need to start and to speak TLS. Nothing with a secret, nothing of the host."""
_ETC_NETWORK = ("hosts", "resolv.conf")


@cache
def bwrap_works() -> bool:
    program = shutil.which("bwrap", path=_PATH)
    if program is None:
        return False
    command = [program, "--ro-bind", "/", "/", "--unshare-all", "--unshare-user", "--", "/bin/true"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PROBE_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@cache
def sandlock_works() -> bool:
    # Asked of the kernel, not of the package: its library is 12 MB that stays out of our process.
    version = ctypes.CDLL(None).syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)
    return version >= _LANDLOCK_ABI and importlib.util.find_spec("sandlock") is not None


def choose_kind(
    spec: SandboxSpec,
    *,
    bwrap: Callable[[], bool] = bwrap_works,
    sandlock: Callable[[], bool] = sandlock_works,
) -> str:
    """The kind that `spec` gets on this machine. Blocks for some milliseconds the first time.

    Raises:
        SandboxUnavailable: it cannot be had here; the sentence says what to install.
    """
    if spec.kind == "process":
        return "process"
    if spec.kind in {"auto", "bwrap"} and bwrap():
        return "bwrap"
    if spec.kind in {"auto", "sandlock"} and sandlock():
        return "sandlock"
    reasons = {
        "bwrap": "bwrap (the system's package bubblewrap) is not installed or may not make namespaces",
        "sandlock": f"sandlock needs a kernel with Landlock ABI {_LANDLOCK_ABI} and the Python package sandlock",
    }
    why = reasons.get(spec.kind) or " and ".join(reasons.values())
    raise SandboxUnavailable(f"No sandbox can be opened on this machine: {why}.", kind=spec.kind)


def launch(kind: str, spec: SandboxSpec, workspace: Path, session_id: str, epoch: int) -> Launch:
    """Blocks for some milliseconds the first time."""
    groups = limits.cgroups(spec)
    uid = limits.session_uid(session_id) if kind != "process" else None
    plan: dict[str, Any] = {
        "cgroups": [{"dir": str(group.parent), "files": group.files} for group in groups],
        "uid": uid,
        "workspace": str(workspace),
        "tmp_bytes": spec.tmp_bytes,
        "mounts": kind == "sandlock" or (kind == "bwrap" and uid is not None),
        "enter_workspace": kind == "process",
        "fds": {},
        "env": _ENV | {"HOME": "{workspace}", "TMPDIR": f"{{workspace}}/{HIDDEN}/tmp"},  # noqa: S108 in the workspace
        "argv": [],
        "sandlock": None,
        "seccomp": None,
    }
    if kind == "bwrap":
        plan |= _bwrap(spec)
    elif kind == "sandlock":
        plan |= _sandlock(spec, cgrouped=bool(groups))
    else:
        plan["argv"] = _BASH
    ulimits = _ulimits(kind, spec, cgrouped=bool(groups), own_uid=uid is not None)
    owner = os.getpid()
    return Launch(plan, ulimits, Mark(session_id, epoch, owner, Stat.of(owner).started, ""))


def _ulimits(kind: str, spec: SandboxSpec, *, cgrouped: bool, own_uid: bool) -> tuple[str, ...]:
    """NPROC counts per uid and user namespace: without one of its own a session would be stopped by
    the processes of others, so there it is left to the other means."""
    found = ["-c 0", f"-f {spec.max_file_bytes // 1024}", "-n 4096"]
    if kind == "bwrap" or own_uid:
        found.append(f"-u {spec.max_processes}")
    if not cgrouped:
        # Data, not address space: Go, Java and Node reserve far more addresses than they use.
        found.append(f"-d {spec.memory_bytes // 1024}")
    return tuple(found)


def _bwrap(spec: SandboxSpec) -> dict[str, Any]:
    program = shutil.which("bwrap", path=_PATH)
    if program is None:
        raise SandboxUnavailable("bwrap is not installed.")
    argv = [program, "--unshare-all", "--unshare-user", "--disable-userns"]
    argv += ["--share-net"] if spec.network else []
    argv += ["--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--die-with-parent"]
    argv += ["--new-session", "--cap-drop", "ALL", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        top = Path("/") / name
        if top.is_symlink():
            argv += ["--symlink", str(top.readlink()), str(top)]
        elif top.is_dir():
            argv += ["--ro-bind", str(top), str(top)]
    for name in (*_ETC, *(_ETC_NETWORK if spec.network else ())):
        argv += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    argv += ["--ro-bind-data", str(_PASSWD_FD), "/etc/passwd", "--dev", "/dev", "--proc", "/proc"]
    argv += ["--perms", "1777", "--size", str(spec.tmp_bytes), "--tmpfs", "/tmp"]  # noqa: S108 the sandbox's own
    argv += ["--perms", "1777", "--size", str(spec.tmp_bytes), "--tmpfs", "/dev/shm"]  # noqa: S108 the same
    argv += ["--bind", "{workspace}", "/workspace", "--remount-ro", "/"]
    argv += ["--chdir", "/workspace"]
    fds = {str(_PASSWD_FD): _encoded(b"agent:x:1000:1000:agent:/workspace:/bin/bash\n")}
    filter_program = seccomp.program()
    if filter_program is not None:
        argv += ["--seccomp", str(_SECCOMP_FD)]
        fds[str(_SECCOMP_FD)] = _encoded(filter_program)
    env = _ENV | {"HOME": "/workspace"}
    return {"argv": [*argv, "--", *_BASH], "fds": fds, "env": env}


def _sandlock(spec: SandboxSpec, *, cgrouped: bool) -> dict[str, Any]:
    found = importlib.util.find_spec("sandlock")
    if found is None or found.origin is None:
        raise SandboxUnavailable("The Python package sandlock is not installed.")
    readable = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/proc"]
    readable += ["/dev/zero", "/dev/random", "/dev/urandom"]
    readable += [f"/etc/{name}" for name in (*_ETC, "passwd", "group")]
    readable += [f"/etc/{name}" for name in _ETC_NETWORK if spec.network]
    options: dict[str, Any] = {
        "fs_readable": [path for path in readable if Path(path).exists()],
        "fs_writable": ["{workspace}", "/dev/null"],
        "cwd": "{workspace}",
        "clean_env": True,
        "max_processes": spec.max_processes,
    }
    if not cgrouped:
        # Above it sandlock ends the whole sandbox, a cgroup only the process that grew.
        options["max_memory"] = spec.memory_bytes
    if spec.network:
        options |= {"net_allow": ["*:*", "udp://*:*"], "net_allow_bind": ["*"]}
    filter_program = seccomp.program()
    return {
        "sandlock": {
            "site": str(Path(found.origin).parent.parent),
            "options": options,
            "argv": _BASH,
        },
        "seccomp": _encoded(filter_program) if filter_program is not None else None,
    }


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()
