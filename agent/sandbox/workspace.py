"""Files of a workspace, from outside the sandbox.

Commands inside may change the tree at any moment, so a path is never checked first and used later:
the kernel resolves it below an open directory (`openat2` with RESOLVE_BENEATH, Linux 5.6), and what
leaves the workspace, by `..`, an absolute path or a symlink, is refused in the same step.
Everything here blocks: call it in a thread.
"""

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from agent.faults import WorkspaceRefused

HIDDEN = ".troupe"
"""Ours inside the workspace: full outputs, and the temporary directory of kinds without a private
/tmp. It carries a .gitignore."""
KEPT_OUTPUTS = 8

_SYS_OPENAT2 = 437  # the same number on every machine
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_RACES = 20
"""EAGAIN says that a rename elsewhere made the kernel unsure about a `..`."""


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def open_beneath(dir_fd: int, path: str, flags: int, *, follow_symlinks: bool = True) -> int:
    """Open a path that, with every symlink on its way, stays below an open directory.

    Raises:
        OSError: EXDEV when it leaves the directory, ELOOP for a symlink that is not to be followed.
    """
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS
    how = _OpenHow(
        flags | os.O_CLOEXEC, 0, resolve if follow_symlinks else resolve | _RESOLVE_NO_SYMLINKS
    )
    for _ in range(_RACES):
        fd = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(dir_fd),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return fd
        if ctypes.get_errno() not in {errno.EAGAIN, errno.EINTR}:
            break
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


@contextmanager
def _refusals(path: str) -> Generator[None]:
    """Turn what the kernel says about a path into the contract's words."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise
    except OSError as cause:
        reason = {
            errno.EXDEV: "it leads out of the workspace",
            errno.ELOOP: "it is a symbolic link, or a chain of them",
            errno.EAGAIN: "it kept changing while it was looked up",
            errno.ENOTDIR: "a part of it is a file, not a directory",
            errno.ENOSYS: "this kernel cannot resolve paths safely (openat2, Linux 5.6)",
        }.get(cause.errno or 0, os.strerror(cause.errno or 0).lower())
        raise WorkspaceRefused(f"{path}: {reason}", path=path) from cause


class Workspace:
    """One workspace directory. `inside` is its path as commands see it."""

    def __init__(
        self, root: Path, *, inside: str, uid: int | None = None, max_file_bytes: int
    ) -> None:
        self.root = root
        self.inside = inside
        self._uid = uid
        self._max_file_bytes = max_file_bytes
        self._root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._root_fd >= 0:
            os.close(self._root_fd)
            self._root_fd = -1

    def read(self, path: str, max_bytes: int) -> bytes:
        """The first `max_bytes` of a regular file."""
        with _refusals(path):
            # O_NONBLOCK: opening a FIFO must not wait for its writer.
            fd = open_beneath(self._root_fd, self._relative(path), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            mode = os.fstat(fd).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if not stat.S_ISREG(mode):
                raise WorkspaceRefused(f"{path}: not a regular file", path=path)
            return file.read(max_bytes)

    def write(self, path: str, content: bytes) -> None:
        """Replace a file whole or not at all."""
        if len(content) > self._max_file_bytes:
            raise WorkspaceRefused(
                f"{path}: {len(content)} bytes, a file may have {self._max_file_bytes}",
                path=path, limit=self._max_file_bytes,
            )  # fmt: skip
        *parents, name = self._parts(path)
        with _refusals(path), self._directory(parents) as directory:
            mode = self._mode_of(directory, name, path)
            temporary = f".{name[:100]}.{secrets.token_hex(8)}.tmp"
            try:
                with self._created(directory, temporary, mode) as file:
                    file.write(content)
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=directory)
                raise

    def spill(self) -> tuple[str, int]:
        """Make a file for a command's full output and forget the oldest of them.

        Returns its path as commands see it, and its file descriptor.
        """
        name = f"output-{secrets.token_hex(6)}.txt"
        with _refusals(HIDDEN), self._directory([HIDDEN, "outputs"]) as directory:
            self._keep_newest(directory)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=directory)
            self._give(fd)
        return f"{self.inside}/{HIDDEN}/outputs/{name}", fd

    def prepare(self) -> None:
        """Make the hidden directory, and give the tree to the session's uid."""
        with _refusals(HIDDEN), self._directory([HIDDEN, "tmp"]):
            pass
        self.write(f"{HIDDEN}/.gitignore", b"*\n")
        if self._uid is not None and self.root.stat().st_uid != self._uid:
            for _, _, files, fd in os.fwalk(self.root, follow_symlinks=False):
                os.chown(fd, self._uid, self._uid)
                for name in files:
                    os.chown(name, self._uid, self._uid, dir_fd=fd, follow_symlinks=False)

    def _parts(self, path: str) -> list[str]:
        parts = [part for part in self._relative(path).split("/") if part not in {"", "."}]
        if not parts:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if ".." in parts:
            raise WorkspaceRefused(f"{path}: a path to write may not hold `..`", path=path)
        return parts

    def _relative(self, path: str) -> str:
        if "\0" in path or not path:
            raise WorkspaceRefused("a path may be neither empty nor hold a NUL", path=path)
        pure = PurePosixPath(path)
        for top in ("/workspace", self.inside):
            if pure.is_relative_to(top):
                return str(pure.relative_to(top))
        if pure.is_absolute():
            raise WorkspaceRefused(
                f"{path}: outside the workspace, which is {self.inside}", path=path
            )
        return path

    @contextmanager
    def _directory(self, parts: list[str]) -> Generator[int]:
        """An open directory; what is missing on the way is made."""
        fd = open_beneath(self._root_fd, ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            for depth, part in enumerate(parts, start=1):
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
                    self._give_name(fd, part)
                # From the top each time: a symlink on the way may point up and still stay inside.
                below = open_beneath(
                    self._root_fd, "/".join(parts[:depth]), os.O_RDONLY | os.O_DIRECTORY
                )
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _mode_of(self, directory: int, name: str, path: str) -> int:
        """The permission bits that a file written as `name` gets."""
        try:
            mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return 0o644
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise WorkspaceRefused(f"{path}: a symbolic link or no regular file", path=path)
        return stat.S_IMODE(mode) & 0o777

    @contextmanager
    def _created(self, directory: int, name: str, mode: int) -> Generator[BinaryIO]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            self._give(fd)
            os.fchmod(fd, mode)

    def _give(self, fd: int) -> None:
        if self._uid is not None:
            os.fchown(fd, self._uid, self._uid)

    def _give_name(self, directory: int, name: str) -> None:
        if self._uid is not None:
            os.chown(name, self._uid, self._uid, dir_fd=directory, follow_symlinks=False)

    @staticmethod
    def _keep_newest(directory: int) -> None:
        found: list[tuple[float, str]] = []
        for name in os.listdir(directory):
            with suppress(FileNotFoundError):
                at = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime
                found.append((at, name))
        for _, name in sorted(found)[: max(0, len(found) - KEPT_OUTPUTS + 1)]:
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)
