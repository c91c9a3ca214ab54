"""The system calls that no sandbox needs, as a classic BPF program.

A network namespace does not cover AF_VSOCK (on a virtual machine it leads to the host's agent), and
AF_NETLINK and AF_PACKET are kernel surface, so only UNIX and IP sockets may be made. `io_uring` goes
because it makes sockets without `socket(2)`; namespaces and mounts go because they are the way to
kernel bugs. `clone3` hides its flags behind a pointer, so it answers ENOSYS and libc uses `clone`.
"""

import errno
import platform
import struct
from typing import NamedTuple

# BPF opcodes: load a word, jump if equal / any bit set / greater or equal, return.
_LOAD, _JEQ, _JSET, _JGE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
# Offsets in struct seccomp_data; arguments are 64 bits, their low half comes first on both machines.
_NR, _ARCH, _ARG0 = 0, 4, 16
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000

_CLONE_NEW = 0x7E020080
"""CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} and NEWTIME."""
_X32_BIT = 0x40000000
_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6."""


class _Machine(NamedTuple):
    audit_arch: int
    socket: int
    socketpair: int
    clone: int
    denied: tuple[int, ...]
    """EPERM, in the order of `_DENIED`."""


# unshare setns mount umount2 pivot_root swapon swapoff reboot sethostname setdomainname init_module
# delete_module finit_module kexec_load kexec_file_load quotactl acct settimeofday clock_settime
# adjtimex clock_adjtime add_key request_key keyctl bpf perf_event_open userfaultfd
# open_by_handle_at syslog personality
_X86_64 = _Machine(
    0xC000003E, 41, 53, 56,
    (272, 308, 165, 166, 155, 167, 168, 169, 170, 171, 175, 176, 313, 246, 320, 179, 163, 164, 227,
     159, 305, 248, 249, 250, 321, 298, 323, 304, 103, 135),
)  # fmt: skip
_AARCH64 = _Machine(
    0xC00000B7, 198, 199, 220,
    (97, 268, 40, 39, 41, 224, 225, 142, 161, 162, 105, 106, 273, 104, 294, 60, 89, 170, 112, 171,
     266, 217, 218, 219, 280, 241, 282, 265, 116, 92),
)  # fmt: skip
# Numbers from 424 on are the same on every machine: io_uring_*, open_tree, move_mount, fsopen,
# fsconfig, fsmount, fspick, mount_setattr.
_DENIED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 442)
_CLONE3 = 435

_MACHINES = {"x86_64": _X86_64, "aarch64": _AARCH64}


def _op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, k)


def _return_errno(number: int) -> bytes:
    return _op(_RETURN, _ERRNO | number)


def program() -> bytes | None:
    """An array of `struct sock_filter`; None: no table for this machine."""
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return None
    ops = [
        _op(_LOAD, _ARCH),
        _op(_JEQ, machine.audit_arch, 1, 0),
        _op(_RETURN, _KILL),  # i386 calls have other numbers and would pass the table below
        _op(_LOAD, _NR),
        _op(_JGE, _X32_BIT, 0, 1),
        _return_errno(errno.ENOSYS),
        _op(_JEQ, _CLONE3, 0, 1),
        _return_errno(errno.ENOSYS),
    ]
    for number in (*machine.denied, *_DENIED_EVERYWHERE):
        ops += [_op(_JEQ, number, 0, 1), _return_errno(errno.EPERM)]
    ops += [
        _op(_JEQ, machine.clone, 0, 4),
        _op(_LOAD, _ARG0),
        _op(_JSET, _CLONE_NEW, 0, 1),
        _return_errno(errno.EPERM),
        _op(_RETURN, _ALLOW),
        _op(_JEQ, machine.socket, 1, 0),
        _op(_JEQ, machine.socketpair, 0, len(_FAMILIES) + 2),
        _op(_LOAD, _ARG0),
    ]
    for index, family in enumerate(_FAMILIES):
        ops.append(_op(_JEQ, family, len(_FAMILIES) - index, 0))
    ops += [_return_errno(errno.EAFNOSUPPORT), _op(_RETURN, _ALLOW)]
    return b"".join(ops)
