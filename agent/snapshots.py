"""Copies of a session's workspace, from which another node makes it again.

One archive (`agent.archive`) per copy, `<url>/<session_id>/<snapshot_id>.tar.gz`, on any filesystem that
fsspec reaches. It is written under another name and moved when it is whole. Its id begins with the epoch
of the incarnation that made it, which removes none of a later one's: it may have been replaced unseen. The
one before is kept, since the journal names it until it names its successor.

The journal decides which copy is current. Every copy of a workspace has a `copy_id`, which lies beside it
in a marker (`<workspace>.snapshot.json`) and in the facts; what lies on a node under another one is what
the session left behind there, and is replaced.

Blocking work runs in threads. One that ran out of time, or that nobody waits for any more, stops at its next
piece and takes back what it wrote.
"""

import asyncio
import importlib.util
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog

from agent import archive
from agent.events import WorkspaceRestored, WorkspaceSaved
from agent.faults import SettingsInvalid, SnapshotFailed, boundary
from agent.held import Held
from agent.settings import StorageSettings

log = structlog.get_logger()
T = TypeVar("T")

_SUFFIX = ".tar.gz"
_COPY_BYTES = 1024**2

GONE = (
    "The workspace's files are lost: they were on another machine, which no copy of them has left."
)
OLD = (
    "The workspace's files are those of an earlier time: the later ones were on another machine, which no"
    " copy of them has left."
)
BROKEN = "The workspace's files are lost: its copy cannot be read. The workspace is empty."
BEHIND = (
    "The session goes on on another machine. The workspace is as it was when it was last copied, at the end"
    " of an earlier step; what was changed in it after that is lost."
)


class Marker(NamedTuple):
    """Which copy lies here, and what it was like when it was last saved or made."""

    copy_id: str
    snapshot_id: str | None
    """None: none is equal to it."""
    digest: str


class _Stopped(Exception):
    pass


class Snapshots:
    """Every method raises SettingsInvalid where `check_filesystem` would."""

    def __init__(self, settings: StorageSettings, storage_dir: Path) -> None:
        self._url = settings.url or str(storage_dir.absolute() / "snapshots")
        self._limits = archive.Limits(settings.max_bytes, settings.max_files)
        self._timeout_s = settings.timeout_s

    async def save(
        self, session_id: str, workspace: Path, saved: WorkspaceSaved | None, *, epoch: int
    ) -> WorkspaceSaved | None:
        """Copy the workspace to where other nodes find it. `saved` is the newest fact of its kind, and
        its snapshot and the new one are kept.

        None: nothing changed since (by path, size, time and mode), or there is nothing to copy. On a fault
        or a cancellation the earlier snapshot stands.

        Raises:
            SnapshotFailed
        """
        if not self._limits.max_bytes:
            return None
        return await self._in_thread(
            "The workspace could not be copied",
            lambda check: self._save(_Store(self._url, session_id), workspace, saved, epoch, check),
        )

    async def restore(
        self, session_id: str, workspace: Path, held: Held
    ) -> WorkspaceRestored | None:
        """Make the workspace here the current one. No sandbox may use it meanwhile.

        None: it is. On a fault or a cancellation it is as it was before, or missing.

        Raises:
            SnapshotFailed: the store could not be asked. That it answers and has no readable snapshot
                is not this: the workspace is empty then, and the fact says so.
        """
        return await self._in_thread(
            "The workspace's copy could not be fetched",
            lambda check: self._restore(session_id, workspace, held, check),
        )

    async def forget(self, session_id: str, workspace: Path) -> None:
        """Remove every snapshot of a session, and this node's marker. Absent ones are fine.

        Raises:
            SnapshotFailed
        """
        await self._in_thread(
            "The workspace's copies could not be removed",
            lambda check: self._forget(session_id, workspace, check),
        )

    async def _in_thread(self, failed: str, work: Callable[[archive.Check], T]) -> T:
        stop = threading.Event()

        def check() -> None:
            if stop.is_set():
                raise _Stopped

        def run() -> T:
            with boundary(SnapshotFailed, f"{failed}."):
                return work(check)

        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.to_thread(run)
        except TimeoutError as cause:
            raise SnapshotFailed(f"{failed} in {self._timeout_s:g} s.") from cause
        finally:
            stop.set()

    # -- save --------------------------------------------------------------------------------

    def _save(
        self,
        store: "_Store",
        workspace: Path,
        saved: WorkspaceSaved | None,
        epoch: int,
        check: archive.Check,
    ) -> WorkspaceSaved | None:
        if not workspace.is_dir():
            return None
        with _directory(workspace) as root:
            listing = archive.scan(root, self._limits, check)
            marker = _marker(workspace)
            last = (marker.snapshot_id, marker.digest) if marker else None
            if saved and last == (saved.snapshot_id, listing.digest):
                return None
            copy_id = marker.copy_id if marker else secrets.token_hex(8)
            new = Marker(copy_id, f"{epoch}-{secrets.token_hex(12)}", listing.digest)
            with store.new(_name(new), check) as out:
                packed = archive.pack(root, listing, self._limits, out, check)
        try:
            check()
            _mark(workspace, new)
        except BaseException:
            store.remove(_name(new))
            raise
        store.keep({_name(new), f"{saved.snapshot_id}{_SUFFIX}" if saved else ""}, epoch)
        return WorkspaceSaved(
            snapshot_id=str(new.snapshot_id),
            n_files=packed.n_files,
            n_bytes=packed.n_bytes,
            n_skipped=packed.left_out.n,
            skipped=tuple(packed.left_out.names),
            copy_id=new.copy_id,
        )

    # -- restore -----------------------------------------------------------------------------

    def _restore(
        self, session_id: str, workspace: Path, held: Held, check: archive.Check
    ) -> WorkspaceRestored | None:
        marker = _marker(workspace)
        is_here = workspace.is_dir()
        if held.copy_id is None and (is_here or not held.was_used):
            return None
        if is_here and marker is not None and marker.copy_id == held.copy_id:
            return None
        if is_here and held.saved is None:
            return self._kept(workspace, check)
        _sweep(workspace)
        made = workspace.with_name(f"{workspace.name}.new-{secrets.token_hex(4)}")
        made.mkdir(parents=True, mode=0o700)
        try:
            packed = self._fetched(session_id, held.saved, made, check)
            with _directory(made) as root:
                digest = archive.scan(root, self._limits, check).digest
            snapshot_id = held.saved.snapshot_id if held.saved and packed else None
            new = Marker(secrets.token_hex(8), snapshot_id, digest)
            check()
            _replace(workspace, made, new)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return _told(held, new, packed)

    def _fetched(
        self, session_id: str, saved: WorkspaceSaved | None, made: Path, check: archive.Check
    ) -> archive.Packed | None:
        """None: there is no snapshot that can be read, and `made` is empty."""
        if saved is None:
            return None
        try:
            with (
                _directory(made) as root,
                _Store(self._url, session_id).open(f"{saved.snapshot_id}{_SUFFIX}") as source,
            ):
                return archive.unpack(source, root, self._limits, check)
        except (FileNotFoundError, archive.Unreadable):
            log.exception("snapshot_unreadable", session_id=session_id)
        shutil.rmtree(made)
        made.mkdir(mode=0o700)
        return None

    def _kept(self, workspace: Path, check: archive.Check) -> WorkspaceRestored:
        """What the session left here before it went on elsewhere: old, and all that there is."""
        with _directory(workspace) as root:
            listing = archive.scan(root, self._limits, check)
        new = Marker(secrets.token_hex(8), None, listing.digest)
        _mark(workspace, new)
        files = [entry for entry in listing.entries if entry.kind != "directory"]
        return WorkspaceRestored(
            snapshot_id=None,
            n_files=len(files),
            n_bytes=sum(entry.size for entry in files),
            detail=OLD,
            copy_id=new.copy_id,
        )

    # -- forget ------------------------------------------------------------------------------

    def _forget(self, session_id: str, workspace: Path, check: archive.Check) -> None:
        _marker_path(workspace).unlink(missing_ok=True)
        _sweep(workspace)
        check()
        _Store(self._url, session_id).clear()


def _told(held: Held, new: Marker, packed: archive.Packed | None) -> WorkspaceRestored:
    """The fact, and in `detail` what is known to be lost."""
    saved = held.saved
    if packed is None or saved is None:
        return WorkspaceRestored(
            snapshot_id=None,
            n_files=0,
            n_bytes=0,
            n_missing=saved.n_files + saved.n_skipped if saved else 0,
            detail=BROKEN if saved else GONE,
            copy_id=new.copy_id,
        )
    n_refused = max(packed.left_out.n, saved.n_files - packed.n_files)
    details = [BEHIND] if held.is_behind else []
    if n_missing := saved.n_skipped + n_refused:
        names = [*saved.skipped, *packed.left_out.names][:20]
        details.append(
            f"Files that the copy does not have (too big or too many, or no regular files): {n_missing},"
            f" among them {', '.join(names)}."
        )
    return WorkspaceRestored(
        snapshot_id=saved.snapshot_id,
        n_files=packed.n_files,
        n_bytes=packed.n_bytes,
        n_missing=n_missing,
        detail=" ".join(details) or None,
        copy_id=new.copy_id,
    )


class _Store:
    """The archives of one session."""

    def __init__(self, url: str, session_id: str) -> None:
        # Here and not above: a driver of an object store takes a second and tens of megabytes, and
        # most processes come to this line late or never.
        from fsspec.core import url_to_fs

        self._fs: Any
        try:
            self._fs, root = url_to_fs(url)
        except (ImportError, ValueError) as cause:
            raise SettingsInvalid("storage.url: its filesystem's driver cannot be had.") from cause
        self._directory = f"{root.rstrip('/')}/{session_id}"

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}"

    @contextmanager
    def new(self, name: str, check: archive.Check) -> Generator[Any]:
        """A file to write, which is there under its name when the block ends well, else not at all."""
        part = f"{name}.part"
        self._make_directory()
        try:
            with self._fs.open(self._path(part), "wb") as out:
                yield out
            # Closing an fsspec file makes it whole even when the block failed: hence the other name.
            check()
            self._fs.mv(self._path(part), self._path(name))
        except BaseException:
            self.remove(part)
            raise

    def _make_directory(self) -> None:
        from fsspec.implementations.local import LocalFileSystem  # with the rest of fsspec

        if isinstance(self._fs, LocalFileSystem):
            # Other users of the machine may read neither workspaces nor their copies.
            Path(self._directory).mkdir(parents=True, exist_ok=True, mode=0o700)
        else:
            self._fs.makedirs(self._directory, exist_ok=True)

    def open(self, name: str) -> Any:
        return self._fs.open(self._path(name), "rb")

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _names(self) -> list[str]:
        self._fs.invalidate_cache(self._directory)
        try:
            found = self._fs.ls(self._directory, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def keep(self, names: set[str], epoch: int) -> None:
        """Remove all others up to an epoch, halves that a killed process left too."""
        try:
            for name in set(self._names()) - names:
                made_in, dash, _ = name.partition("-")
                if dash and made_in.isdecimal() and int(made_in) <= epoch:
                    self.remove(name)
        except OSError:
            # What was to be done is done; the next save tries again.
            log.warning("old_snapshots_kept", exc_info=True)

    def clear(self) -> None:
        for name in self._names():
            self.remove(name)
        with suppress(FileNotFoundError):
            self._fs.rmdir(self._directory)


def check_filesystem(settings: StorageSettings) -> None:
    """Find out before anything needs it whether `storage.url` can be one.

    Raises:
        SettingsInvalid: no such filesystem, a driver that is not installed, or a relative path.
    """
    from fsspec.registry import known_implementations, registry  # late, as in _Store
    from fsspec.utils import get_protocol

    url = settings.url
    if url is None:
        return
    if "://" not in url and not Path(url).is_absolute():
        raise SettingsInvalid("storage.url: neither a URL nor an absolute path.")
    protocol = get_protocol(url)
    known = known_implementations.get(protocol)
    if known is None and protocol not in registry:
        raise SettingsInvalid(f"storage.url: no filesystem is known for {protocol}://.")
    package = known["class"].split(".")[0] if known else "fsspec"
    if importlib.util.find_spec(package) is None:
        raise SettingsInvalid(
            f"storage.url: {protocol}:// needs the Python package {package}, on every node."
        )


def _name(marker: Marker) -> str:
    return f"{marker.snapshot_id}{_SUFFIX}"


@contextmanager
def _directory(path: Path) -> Generator[int]:
    """The directory, open."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _marker_path(workspace: Path) -> Path:
    return workspace.with_name(f"{workspace.name}.snapshot.json")


def _marker(workspace: Path) -> Marker | None:
    try:
        return Marker(**json.loads(_marker_path(workspace).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        log.warning("snapshot_marker_unreadable", workspace=workspace.name)
        return None


def _mark(workspace: Path, marker: Marker) -> None:
    path = _marker_path(workspace)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(json.dumps(marker._asdict()), encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(workspace: Path, made: Path, marker: Marker) -> None:
    """Put what was made in the workspace's place. Without its marker, after a crash in the middle, it
    does not count as current."""
    _marker_path(workspace).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        workspace.rename(made.with_name(f"{workspace.name}.old-{secrets.token_hex(4)}"))
    made.rename(workspace)
    _mark(workspace, marker)
    _sweep(workspace)


def _sweep(workspace: Path) -> None:
    """Remove what an earlier restore left beside the workspace."""
    for kind in ("new", "old"):
        for path in workspace.parent.glob(f"{workspace.name}.{kind}-*"):
            shutil.rmtree(path, ignore_errors=True)
