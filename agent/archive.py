"""A workspace as one archive, and back: a gzipped tar, written and read as a stream.

Both sides are other people's: commands of a sandbox change the tree while it is read, and whoever may
write to the store made the archive. So every path is opened below an open directory and through no
symlink, every size is counted while it is read, and what does not fit is left out and told, not followed.

What is kept when there is too much: entries nearest to the top first, up to `max_files` of them; then of
the files the smallest first, up to `max_bytes`, so that sources stay and a huge product goes.
Symlinks are kept as they are, wherever they point. Owners, set-id bits and hard links are not kept.

Everything here blocks, and calls `check` between pieces of work: it raises to stop.
"""

import hashlib
import heapq
import os
import stat
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EEXIST, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, ENXIO, EPERM, EXDEV
from gzip import BadGzipFile, GzipFile
from io import RawIOBase
from tempfile import SpooledTemporaryFile
from typing import IO, Literal, NamedTuple

from agent.sandbox.workspace import HIDDEN, open_beneath

Check = Callable[[], None]

_PIECE_BYTES = 1024**2
_BLOCK_BYTES = tarfile.BLOCKSIZE
_READ_AHEAD_BYTES = tarfile.RECORDSIZE
_HEADER_BYTES = 64 * 1024
"""Of one member: two paths of 4096 bytes, and their blocks, many times over."""
_MAX_TOLD, _MAX_TOLD_CHARS = 20, 200
_FAST = 1
_GONE = {ENOENT, ENOTDIR, ELOOP, ENXIO}
"""What a path says whose file vanished, or became something else, since it was listed."""
_CLOSED = {EACCES, EPERM, ENAMETOOLONG}
_REFUSED = {EEXIST, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EXDEV}
"""What a path says that an archive may not have."""


class Unreadable(Exception):
    """It is no archive, or a broken one."""


class Limits(NamedTuple):
    max_bytes: int
    max_files: int
    """Directories and links count too."""


class LeftOut:
    """What was left out: how many, and the first names."""

    def __init__(self) -> None:
        self.n = 0
        self.names: list[str] = []

    def add(self, path: str, n: int = 1) -> None:
        self.n += n
        if len(self.names) < _MAX_TOLD:
            # A name may be any bytes; who reads it gets text.
            self.names.append(os.fsencode(path).decode(errors="replace")[:_MAX_TOLD_CHARS])


class Entry(NamedTuple):
    path: str
    kind: Literal["directory", "file", "link"]
    mode: int
    size: int = 0
    mtime_ns: int = 0
    target: str = ""


class Listing(NamedTuple):
    entries: list[Entry]
    """A directory comes before what is in it."""
    left_out: LeftOut

    @property
    def digest(self) -> str:
        """Equal for equal listings: a file counts as the same by path, size, time and mode."""
        found = hashlib.sha256()
        for entry in self.entries:
            found.update(os.fsencode("\0".join(map(str, entry))) + b"\0\0")
        found.update(os.fsencode("\0".join([str(self.left_out.n), *self.left_out.names])))
        return found.hexdigest()


class Packed(NamedTuple):
    n_files: int
    n_bytes: int
    left_out: LeftOut


# -- from a tree ---------------------------------------------------------------------------------


def scan(root: int, limits: Limits, check: Check) -> Listing:
    """What of the tree below the open directory `root` an archive gets."""
    left_out = LeftOut()
    entries = list(_walk(root, limits, left_out, check))
    room, kept = limits.max_bytes, set[str]()
    for entry in sorted((e for e in entries if e.kind == "file"), key=lambda e: (e.size, e.path)):
        if entry.size > room:
            left_out.add(entry.path)
        else:
            room -= entry.size
            kept.add(entry.path)
    return Listing([e for e in entries if e.kind != "file" or e.path in kept], left_out)


def _walk(root: int, limits: Limits, left_out: LeftOut, check: Check) -> Iterator[Entry]:
    """At most `max_files` entries, those nearest to the top first; memory is bounded by their number."""
    room = limits.max_files
    queue = deque([""])
    while queue:
        check()
        directory = queue.popleft()
        try:
            fd = _open(root, directory or ".", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno not in _GONE | _CLOSED:
                raise
            if error.errno in _CLOSED:
                left_out.add(f"{directory}/...")
            continue
        try:
            names, n_more = _names(fd, limits.max_files)
            if n_more:
                left_out.add(f"{directory}/...", n_more)
            for name in names:
                path = f"{directory}/{name}" if directory else name
                if _is_ours(path):
                    continue
                try:
                    entry = _entry(fd, name, path)
                except FileNotFoundError:
                    continue
                if entry is None or room == 0:
                    left_out.add(path)
                    continue
                room -= 1
                if entry.kind == "directory":
                    queue.append(path)
                yield entry
        finally:
            os.close(fd)


def _names(directory: int, limit: int) -> tuple[list[str], int]:
    """The first names in order, and how many more there are."""
    n_names = 0

    def counted() -> Iterator[str]:
        nonlocal n_names
        with os.scandir(directory) as found:
            for each in found:
                n_names += 1
                yield each.name

    first = heapq.nsmallest(limit, counted())
    return first, n_names - len(first)


def _is_ours(path: str) -> bool:
    """Made anew by the next sandbox. Full outputs stay: results of tools name them."""
    top, _, rest = path.partition("/")
    return top == HIDDEN and bool(rest) and rest.split("/")[0] != "outputs"


def _entry(directory: int, name: str, path: str) -> Entry | None:
    """None: of a kind that is not kept, or not to be looked at."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        mode = stat.S_IMODE(found.st_mode) & 0o777
        if stat.S_ISDIR(found.st_mode):
            return Entry(path, "directory", mode)
        if stat.S_ISREG(found.st_mode):
            return Entry(path, "file", mode, found.st_size, found.st_mtime_ns)
        if stat.S_ISLNK(found.st_mode):
            target = os.readlink(name, dir_fd=directory)
            return Entry(path, "link", 0o777, target=target)
    except OSError as error:
        if error.errno not in _CLOSED:
            raise
    return None


def pack(root: int, listing: Listing, limits: Limits, out: IO[bytes], check: Check) -> Packed:
    """Write the archive of a listing of `root` to `out`.

    A file gets the size that it has when it is opened, and no more than could be read of it; one that is
    gone by then, or grew beyond what is left of the limit, is left out.
    """
    n_files, n_bytes, left_out = 0, 0, listing.left_out
    slack = limits.max_bytes - sum(entry.size for entry in listing.entries)
    with GzipFile(fileobj=out, mode="wb", compresslevel=_FAST, mtime=0) as packed:
        for entry in listing.entries:
            check()
            if entry.kind != "file":
                packed.write(_header(entry))
                n_files += entry.kind == "link"
                continue
            with SpooledTemporaryFile[bytes](max_size=_PIECE_BYTES) as content:
                size = _read(root, entry, entry.size + slack, content, check)
                if size is None:
                    left_out.add(entry.path)
                    continue
                slack -= max(0, size - entry.size)
                content.seek(0)
                packed.write(_header(entry._replace(size=size)))
                for piece in _pieces(content):
                    packed.write(piece)
                packed.write(bytes(-size % _BLOCK_BYTES))
            n_files, n_bytes = n_files + 1, n_bytes + size
        packed.write(bytes(2 * _BLOCK_BYTES))
    return Packed(n_files, n_bytes, left_out)


def _read(root: int, entry: Entry, limit: int, content: IO[bytes], check: Check) -> int | None:
    """Copy a file aside: its header, which comes before it, has its size. None: it cannot be had."""
    try:
        # O_NONBLOCK: a FIFO that came in its place must not wait for a writer.
        fd = _open(root, entry.path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _GONE | _CLOSED:
            return None
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            return None
        left = found.st_size
        while left and (piece := os.read(fd, min(left, _PIECE_BYTES))):
            check()
            content.write(piece)
            left -= len(piece)
    finally:
        os.close(fd)
    return found.st_size - left


def _header(entry: Entry) -> bytes:
    info = tarfile.TarInfo(entry.path)
    info.mode, info.size, info.mtime = entry.mode, entry.size, entry.mtime_ns / 1e9
    info.type = {"directory": tarfile.DIRTYPE, "file": tarfile.REGTYPE, "link": tarfile.SYMTYPE}[
        entry.kind
    ]
    info.linkname = entry.target
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _open(root: int, path: str, flags: int) -> int:
    return open_beneath(root, path, flags, follow_symlinks=False)


@contextmanager
def _opened(root: int, path: str) -> Generator[int]:
    """An open directory below `root`."""
    fd = _open(root, path or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


# -- to a tree -----------------------------------------------------------------------------------


def unpack(source: IO[bytes], root: int, limits: Limits, check: Check) -> Packed:
    """Make the archive's content below the empty directory `root`. Not atomic.

    Members that name a place outside, go through a link, repeat a path, are neither files, directories
    nor symlinks, or go over a limit are left out.

    Raises:
        Unreadable
    """
    n_files, n_bytes, left_out = 0, 0, LeftOut()
    directories: list[tuple[str, int]] = []
    for n_entries, (member, content) in enumerate(_members(source, check), start=1):
        path = member.name
        size = member.size if member.isreg() else 0
        fits = n_entries <= limits.max_files and n_bytes + size <= limits.max_bytes
        if not fits or not _may_be(path) or not _made(root, member, content):
            left_out.add(path)
        elif member.isdir():
            directories.append((path, member.mode))
        else:
            n_files, n_bytes = n_files + 1, n_bytes + size
    for path, mode in reversed(directories):
        # Not before: a directory that may not be written takes no files. Ours to enter, in any case.
        with _opened(root, path) as fd:
            os.fchmod(fd, mode & 0o777 | 0o700)
    return Packed(n_files, n_bytes, left_out)


def _may_be(path: str) -> bool:
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


def _made(root: int, member: tarfile.TarInfo, content: Iterable[bytes]) -> bool:
    """Make one member. False: its place or its kind is refused, and nothing was made."""
    parent, _, name = member.name.rpartition("/")
    try:
        with _opened(root, parent) as directory:
            if member.isdir():
                os.mkdir(name, 0o700, dir_fd=directory)
            elif member.issym():
                os.symlink(member.linkname, name, dir_fd=directory)
            elif member.isreg() and not member.issparse():
                _write(directory, name, member, content)
            else:
                return False
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    except ValueError:  # a NUL in a link's target
        return False
    return True


def _write(directory: int, name: str, member: tarfile.TarInfo, content: Iterable[bytes]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
        for piece in content:
            file.write(piece)
        file.flush()
        os.fchmod(file.fileno(), member.mode & 0o777)
        with suppress(ValueError, OverflowError, OSError):  # a time that no file can have
            at_ns = round(member.mtime * 1e9)
            os.utime(file.fileno(), ns=(at_ns, at_ns))


def _members(source: IO[bytes], check: Check) -> Iterator[tuple[tarfile.TarInfo, Iterable[bytes]]]:
    """Each member with its content, which must be read, if at all, before the next one.

    Raises:
        Unreadable
    """
    with _readable(), GzipFile(fileobj=source) as plain:
        metered = _Metered(plain, check)
        metered.left = _HEADER_BYTES
        with tarfile.open(fileobj=metered, mode="r|", errorlevel=2) as archive:
            while member := archive.next():
                metered.left = member.size + _READ_AHEAD_BYTES
                # What a sparse file is without may be endless.
                is_plain = member.isreg() and not member.issparse()
                content = archive.extractfile(member) if is_plain else None
                pieces = _pieces(content)
                yield member, pieces
                for _ in pieces:
                    pass
                metered.left = _HEADER_BYTES
                # It would remember every member.
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - typeshed leaves it out
        # To the end, where the checksum is.
        metered.left = _HEADER_BYTES
        while metered.read(_READ_AHEAD_BYTES):
            pass


def _pieces(content: IO[bytes] | None) -> Iterator[bytes]:
    while content is not None and (piece := content.read(_PIECE_BYTES)):
        yield piece


@contextmanager
def _readable() -> Generator[None]:
    try:
        yield
    except (
        tarfile.TarError,
        BadGzipFile,
        EOFError,
        zlib.error,
        ValueError,
        OverflowError,
    ) as cause:
        raise Unreadable(type(cause).__name__) from cause


class _Metered(RawIOBase):
    """Gives no more than is `left`: a few bytes of gzip may say that a header has gigabytes."""

    def __init__(self, source: GzipFile, check: Check) -> None:
        self._source = source
        self._check = check
        self.left = 0

    def read(self, size: int = -1, /) -> bytes:
        self._check()
        if self.left <= 0:
            raise tarfile.ReadError("a header without an end")
        found = self._source.read(min(size, _READ_AHEAD_BYTES) if size >= 0 else _READ_AHEAD_BYTES)
        self.left -= len(found)
        return found
