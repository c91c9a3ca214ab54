"""Copies of workspaces: what comes back, what may not, and what a broken, hostile or full side does."""

import asyncio
import gzip
import io
import os
import socket
import stat
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import archive
from agent.events import WorkspaceRestored, WorkspaceSaved
from agent.faults import SettingsInvalid, SnapshotFailed
from agent.held import Held
from agent.sandbox.local import open_sandbox
from agent.settings import StorageSettings
from agent.snapshots import BEHIND, BROKEN, GONE, OLD, Snapshots, check_filesystem
from agent.spec import SandboxSpec
from tests.support.sandboxes import need

KB, MB = 1024, 1024**2
LIMITS = archive.Limits(max_bytes=MB, max_files=100)
SOON_S = 5.0


def no_check() -> None:
    pass


class Node:
    """One machine's disk, and the store that all share."""

    def __init__(self, root: Path, url: str, **limits: Any) -> None:
        self.workspace = root / "workspaces" / "s"
        self.snapshots = Snapshots(StorageSettings(url=url, **limits), root)

    async def save(self, saved: WorkspaceSaved | None = None, epoch: int = 1) -> WorkspaceSaved:
        found = await self.snapshots.save("s", self.workspace, saved, epoch=epoch)
        assert found is not None
        return found

    async def restore(self, saved: WorkspaceSaved, **held: Any) -> WorkspaceRestored:
        found = await self.snapshots.restore("s", self.workspace, held_by(saved, **held))
        assert found is not None
        return found

    def write(self, path: str, content: str = "x") -> Path:
        file = self.workspace / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return file


def held_by(saved: WorkspaceSaved, **held: Any) -> Held:
    return Held(saved, **{"copy_id": saved.copy_id, "was_used": True, **held})


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path}/store" if request.param == "file" else "memory://store"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def a(tmp_path: Path, url: str) -> Node:
    return Node(tmp_path / "a", url)


@pytest.fixture
def b(tmp_path: Path, url: str) -> Node:
    return Node(tmp_path / "b", url)


def stored(url: str) -> list[str]:
    """Whatever lies in the store of the session."""
    fs, root = fsspec.core.url_to_fs(url)
    with suppress(FileNotFoundError):
        return sorted(path.rsplit("/", 1)[-1] for path in fs.find(f"{root}/s"))
    return []


def tree(root: Path) -> dict[str, Any]:
    """Path to what is there, without following links."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = os.fsencode(path.relative_to(root))
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            found[name] = path.readlink()
        elif stat.S_ISDIR(status.st_mode):
            found[name] = "directory"
        else:
            found[name] = (
                path.read_bytes(),
                stat.S_IMODE(status.st_mode),
                round(status.st_mtime, 3),
            )
    return found


# -- round trips ---------------------------------------------------------------------------------

NAMES = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
    .map(os.fsencode),
    st.binary(min_size=1, max_size=20).filter(lambda name: not {0, 47} & set(name)),
    st.just(b"n" * 255),
).filter(lambda name: name not in {b".", b"..", b".troupe"} and len(name) <= 255)  # fmt: skip
TREES = st.recursive(
    st.one_of(
        st.tuples(st.just("file"), st.binary(max_size=3000), st.sampled_from([0o600, 0o755, 0o444])),
        st.tuples(st.just("link"), st.sampled_from(["x", "../..", "/etc/passwd", "./a b"]), st.none()),
    ),
    lambda below: st.dictionaries(NAMES, below, max_size=4),
    max_leaves=12,
).filter(lambda made: isinstance(made, dict))  # fmt: skip


def make(root: Path, below: dict[bytes, Any]) -> None:
    root.mkdir()
    for name, what in below.items():
        path = root / os.fsdecode(name)
        if isinstance(what, dict):
            make(path, what)
        elif what[0] == "link":
            path.symlink_to(what[1])
        else:
            path.write_bytes(what[1])
            path.chmod(what[2])


@given(below=TREES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_tree_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, below: dict[bytes, Any]
) -> None:
    top = tmp_path_factory.mktemp("tree")
    make(top / "a", below)
    (top / "b").mkdir()
    packed, unpacked = through(top / "a", top / "b")
    assert tree(top / "b") == tree(top / "a")
    assert packed[:2] == unpacked[:2]
    assert packed.left_out.n == unpacked.left_out.n == 0


def through(source: Path, target: Path) -> tuple[archive.Packed, archive.Packed]:
    root = os.open(source, os.O_RDONLY)
    out = io.BytesIO()
    packed = archive.pack(root, archive.scan(root, LIMITS, no_check), LIMITS, out, no_check)
    os.close(root)
    out.seek(0)
    return packed, unpacked(out, target)


def unpacked(source: io.BytesIO, target: Path, limits: archive.Limits = LIMITS) -> archive.Packed:
    root = os.open(target, os.O_RDONLY)
    try:
        return archive.unpack(source, root, limits, no_check)
    finally:
        os.close(root)


async def test_a_workspace_comes_back_on_another_node(a: Node, b: Node) -> None:
    a.write("src/main.py", "print()")
    a.write("big", "x" * 3 * MB)
    saved = await a.save()
    restored = await b.restore(saved)
    assert tree(b.workspace) == tree(a.workspace)
    assert (saved.n_files, saved.n_bytes, saved.n_skipped) == (2, 3 * MB + 7, 0)
    assert restored.snapshot_id == saved.snapshot_id
    assert (restored.n_files, restored.n_bytes, restored.n_missing) == (2, 3 * MB + 7, 0)
    assert restored.detail is None


async def test_an_unchanged_workspace_is_not_saved_again(a: Node, b: Node) -> None:
    file = a.write("f")
    saved = await a.save()
    assert await a.snapshots.save("s", a.workspace, saved, epoch=1) is None
    await b.restore(saved)
    assert await b.snapshots.save("s", b.workspace, saved, epoch=1) is None
    file.chmod(0o700)
    assert await a.snapshots.save("s", a.workspace, saved, epoch=1) is not None


async def test_a_save_that_the_journal_does_not_know_is_made_again(a: Node, url: str) -> None:
    a.write("f")
    known = await a.save()
    a.write("f", "more")
    await a.save(known)  # and then the process died before the fact was written
    again = await a.snapshots.save("s", a.workspace, known, epoch=1)
    assert again is not None
    assert stored(url) == sorted([f"{known.snapshot_id}.tar.gz", f"{again.snapshot_id}.tar.gz"])


async def test_the_two_newest_snapshots_are_kept(a: Node, url: str) -> None:
    saved = None
    seen: list[str] = []
    for content in ("1", "22", "333"):
        a.write("f", content)
        saved = await a.save(saved)
        seen.append(f"{saved.snapshot_id}.tar.gz")
    assert stored(url) == sorted(seen[1:])


async def test_an_incarnation_that_was_replaced_removes_nothing_newer(
    a: Node, b: Node, url: str
) -> None:
    a.write("f")
    saved = await a.save()
    await b.restore(saved)
    b.write("f", "newer")
    newer = await b.save(saved, epoch=2)
    a.write("f", "of one who slept meanwhile")
    unknown = await a.save(saved)
    assert f"{newer.snapshot_id}.tar.gz" in stored(url)
    b.write("f", "newest")
    newest = await b.save(newer, epoch=2)
    assert stored(url) == sorted(f"{one.snapshot_id}.tar.gz" for one in (newer, newest))
    assert unknown.copy_id == saved.copy_id


async def test_no_workspace_makes_no_snapshot(a: Node, url: str) -> None:
    assert await a.snapshots.save("s", a.workspace, None, epoch=1) is None
    assert stored(url) == []


async def test_no_bytes_allowed_means_no_snapshots(tmp_path: Path, url: str) -> None:
    node = Node(tmp_path / "a", url, max_bytes=0)
    node.write("f")
    assert await node.snapshots.save("s", node.workspace, None, epoch=1) is None
    assert stored(url) == []


async def test_full_outputs_travel_and_the_temporary_directory_does_not(a: Node, b: Node) -> None:
    a.write(".troupe/outputs/output-1.txt")
    a.write(".troupe/tmp/scratch")
    a.write(".troupe/.gitignore")
    await b.restore(await a.save())
    assert set(tree(b.workspace)) == {
        b".troupe",
        b".troupe/outputs",
        b".troupe/outputs/output-1.txt",
    }


# -- which copy is the current one -----------------------------------------------------------------


async def test_a_session_that_never_worked_needs_nothing(a: Node) -> None:
    assert await a.snapshots.restore("s", a.workspace, Held()) is None
    assert not a.workspace.exists()


async def test_the_current_copy_stays(a: Node) -> None:
    a.write("f")
    assert await a.snapshots.restore("s", a.workspace, Held(was_used=True)) is None
    saved = await a.save()
    a.write("f", "changed after it")
    assert await a.snapshots.restore("s", a.workspace, held_by(saved)) is None
    assert (a.workspace / "f").read_text() == "changed after it"


async def test_what_was_left_behind_is_replaced(a: Node, b: Node) -> None:
    a.write("old")
    first = await a.save()
    assert (await b.restore(first)).detail is None
    (b.workspace / "old").unlink()
    b.write("new")
    second = await b.save(first)
    assert (await a.restore(second)).detail is None
    assert set(tree(a.workspace)) == {b"new"}
    assert [path.name for path in a.workspace.parent.iterdir() if path.is_dir()] == ["s"]


async def test_a_copy_that_another_node_took_over_is_not_current_again(a: Node, b: Node) -> None:
    """The other node died before it saved: here lies exactly the snapshot, and the model must be told."""
    a.write("f")
    saved = await a.save()
    elsewhere = await b.restore(saved)
    back = await a.restore(saved, copy_id=elsewhere.copy_id, is_behind=True)
    assert back.detail == BEHIND
    assert back.copy_id not in {saved.copy_id, elsewhere.copy_id}


async def test_files_that_no_snapshot_has_are_told_of(a: Node) -> None:
    restored = await a.snapshots.restore("s", a.workspace, Held(was_used=True))
    assert restored is not None
    assert (restored.snapshot_id, restored.detail) == (None, GONE)
    assert tree(a.workspace) == {}


async def test_without_a_snapshot_the_old_copy_here_is_better_than_nothing(a: Node) -> None:
    a.write("f", "four")
    held = Held(was_used=True, copy_id="of another node")
    restored = await a.snapshots.restore("s", a.workspace, held)
    assert restored is not None
    assert (restored.n_files, restored.n_bytes, restored.detail) == (1, 4, OLD)
    held = Held(was_used=True, copy_id=restored.copy_id)
    assert await a.snapshots.restore("s", a.workspace, held) is None


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "nothing of ours"])
async def test_a_snapshot_that_cannot_be_read_leaves_an_empty_workspace(
    a: Node, b: Node, url: str, harm: str
) -> None:
    a.write("f").write_bytes(os.urandom(100_000))  # nothing that a changed bit would not change
    saved = await a.save()
    [name] = stored(url)
    fs, root = fsspec.core.url_to_fs(url)
    whole = fs.cat_file(f"{root}/s/{name}")
    if harm == "missing":
        fs.rm_file(f"{root}/s/{name}")
    else:
        changed = whole[:50_000] + bytes([whole[50_000] ^ 1]) + whole[50_001:]
        broken = {"cut": whole[:-9], "changed": changed, "nothing of ours": b"hello"}[harm]
        fs.pipe_file(f"{root}/s/{name}", broken)
    b.write("left behind")
    restored = await b.restore(saved)
    assert (restored.snapshot_id, restored.n_missing, restored.detail) == (None, 1, BROKEN)
    assert tree(b.workspace) == {}


async def test_a_store_that_does_not_answer_changes_nothing_here(tmp_path: Path) -> None:
    a, b = (Node(tmp_path / name, f"file://{tmp_path}/store") for name in "ab")
    a.write("f")
    saved = await a.save()
    (tmp_path / "store" / "s").rename(tmp_path / "kept")
    (tmp_path / "store" / "s").write_text("no directory")
    b.write("left behind")
    with pytest.raises(SnapshotFailed):
        await b.restore(saved)
    assert set(tree(b.workspace)) == {b"left behind"}
    assert [path.name for path in b.workspace.parent.iterdir()] == ["s"]


# -- what is left out --------------------------------------------------------------------------------


async def test_the_biggest_files_are_left_out_and_told(tmp_path: Path, url: str) -> None:
    a, b = (Node(tmp_path / name, url, max_bytes=10 * KB) for name in "ab")
    for name, size in {"small": 1, "sources": 4 * KB, "product": 9 * KB, "image": 90 * KB}.items():
        a.write(name, "x" * size)
    saved = await a.save()
    assert (saved.n_skipped, set(saved.skipped)) == (2, {"product", "image"})
    restored = await b.restore(saved)
    assert set(tree(b.workspace)) == {b"small", b"sources"}
    assert restored.n_missing == 2
    assert restored.detail is not None
    assert "product" in restored.detail


async def test_the_deepest_files_are_left_out_of_too_many(tmp_path: Path, url: str) -> None:
    a = Node(tmp_path / "a", url, max_files=30)
    for i in range(50):
        a.write(f"modules/{i:02}")
    for i in range(5):
        a.write(f"{i}.py")
    saved = await a.save()
    assert saved.n_files == 29  # and their directory
    assert saved.n_skipped == 26
    assert {name.partition("/")[0] for name in saved.skipped} == {"modules"}


async def test_a_directory_without_end_is_counted_and_not_remembered(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i:03}").touch()
    root = os.open(tmp_path, os.O_RDONLY)
    listing = archive.scan(root, archive.Limits(MB, 10), no_check)
    os.close(root)
    assert [entry.path for entry in listing.entries] == [f"{i:03}" for i in range(10)]
    assert listing.left_out.n == 290


async def test_what_is_no_file_is_left_out_and_told(a: Node, b: Node) -> None:
    a.write("f")
    os.mkfifo(a.workspace / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(a.workspace / "socket"))
    saved = await a.save()
    assert set(saved.skipped) == {"fifo", "socket"}
    await b.restore(saved)
    assert set(tree(b.workspace)) == {b"f"}


async def test_links_stay_links_wherever_they_point(a: Node, b: Node, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not in any archive")
    a.write("f")
    (a.workspace / "file").symlink_to(tmp_path / "secret")
    (a.workspace / "up").symlink_to("../..")
    saved = await a.save()
    assert saved.n_bytes == 1
    await b.restore(saved)
    assert (b.workspace / "file").readlink() == tmp_path / "secret"
    assert (b.workspace / "up").readlink() == Path("../..")


# -- a tree that changes while it is read --------------------------------------------------------------


class Changing:
    """Runs a change between the listing of a tree and its reading: at the first `check` of the reading."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def __call__(self) -> None:
        if self.change:
            change, self.change = self.change, None
            change()


def read_while(root: Path, target: Path, change: Any) -> archive.Packed:
    fd = os.open(root, os.O_RDONLY)
    listing = archive.scan(fd, LIMITS, no_check)
    out = io.BytesIO()
    packed = archive.pack(fd, listing, LIMITS, out, Changing(change))
    os.close(fd)
    out.seek(0)
    target.mkdir()
    unpacked(out, target)
    return packed


@pytest.mark.parametrize("size", [0, 10, 700 * KB])
def test_a_file_that_shrinks_or_grows_is_kept_as_it_is_then(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "f"
    file.write_bytes(b"x" * 100 * KB)
    (tmp_path / "a" / "z").write_text("after it")
    packed = read_while(tmp_path / "a", tmp_path / "b", lambda: file.write_bytes(b"y" * size))
    assert (tmp_path / "b" / "f").read_bytes() == b"y" * size
    assert (tmp_path / "b" / "z").read_text() == "after it"
    assert packed[:2] == (2, size + 8)


def test_a_file_that_shrinks_under_the_reading_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "f"
    file.write_bytes(bytes(3 * MB))
    n_checks = 0

    def check() -> None:
        nonlocal n_checks
        n_checks += 1
        if n_checks == 2:  # after its first piece was read
            os.truncate(file, MB + 5)

    limits = archive.Limits(4 * MB, 10)
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    out = io.BytesIO()
    packed = archive.pack(fd, archive.scan(fd, limits, no_check), limits, out, check)
    os.close(fd)
    out.seek(0)
    (tmp_path / "b").mkdir()
    assert unpacked(out, tmp_path / "b", limits)[:2] == packed[:2] == (1, MB + 5)


def test_a_file_that_outgrows_the_limit_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "f"
    file.write_text("small")
    packed = read_while(tmp_path / "a", tmp_path / "b", lambda: os.truncate(file, 2 * MB))
    assert (packed.n_files, packed.left_out.names) == (0, ["f"])
    assert tree(tmp_path / "b") == {}


@pytest.mark.parametrize("becomes", ["nothing", "link", "fifo", "directory", "link on the way"])
def test_a_file_that_becomes_something_else_is_left_out(tmp_path: Path, becomes: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "f").write_text("not in any archive")
    inside = tmp_path / "a" / "d"
    inside.mkdir(parents=True)
    file = inside / "f"
    file.write_text("x")

    def change() -> None:
        file.unlink()
        match becomes:
            case "link":
                file.symlink_to(tmp_path / "secret" / "f")
            case "fifo":
                os.mkfifo(file)
            case "directory":
                file.mkdir()
            case "link on the way":
                inside.rmdir()
                inside.symlink_to(tmp_path / "secret")
            case _:
                pass

    packed = read_while(tmp_path / "a", tmp_path / "b", change)
    assert (packed.n_files, packed.left_out.names) == (0, ["d/f"])
    assert set(tree(tmp_path / "b")) == {b"d"}


# -- hostile archives ------------------------------------------------------------------------------------


def made_of(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT) as packed:
        for info, content in members:
            packed.addfile(info, io.BytesIO(content))
    out.seek(0)
    return out


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for key, value in more.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "name", ["/evil", "../evil", "d/../../evil", "..", "/", ".", "d/./evil", "n" * 256, "p/" * 3000 + "x"]
)  # fmt: skip
def test_a_name_outside_is_refused(tmp_path: Path, name: str) -> None:
    target = tmp_path / "in" / "target"
    target.mkdir(parents=True)
    source = made_of((member("d", tarfile.DIRTYPE), b""), (member(name, size=1), b"x"))
    found = unpacked(source, target)
    assert (found.n_files, found.left_out.n) == (0, 1)
    assert set(tree(tmp_path)) == {b"in", b"in/target", b"in/target/d"}


@pytest.mark.parametrize(
    "info",
    [
        member("x", tarfile.LNKTYPE, linkname="/etc/passwd"),
        member("x", tarfile.LNKTYPE, linkname="f"),
        member("x", tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("x", tarfile.BLKTYPE),
        member("x", tarfile.FIFOTYPE),
        member("f", size=0),
        member("f/below"),
        member("missing/below"),
    ],
    ids=lambda info: f"{info.name} {info.type.decode()}",
)
def test_a_kind_or_a_place_that_may_not_be_is_refused(
    tmp_path: Path, info: tarfile.TarInfo
) -> None:
    found = unpacked(made_of((member("f", size=1), b"x"), (info, b"")), tmp_path)
    assert (found.n_files, found.left_out.n) == (1, 1)
    assert (tmp_path / "f").read_bytes() == b"x"
    assert set(tree(tmp_path)) == {b"f"}


@pytest.mark.parametrize("target", ["..", "/tmp", ".", "d"])
def test_nothing_is_written_through_a_link(tmp_path: Path, target: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    source = made_of(
        (member("d", tarfile.DIRTYPE), b""),
        (member("link", tarfile.SYMTYPE, linkname=target), b""),
        (member("link/evil", size=1), b"x"),
        (member("link", tarfile.DIRTYPE), b""),
    )
    found = unpacked(source, root)
    assert (found.n_files, found.left_out.n) == (1, 2)
    assert set(tree(tmp_path)) == {b"root", b"root/d", b"root/link"}


def test_set_id_bits_do_not_come_back(tmp_path: Path) -> None:
    unpacked(made_of((member("f", mode=0o6755), b"")), tmp_path)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o755


def test_more_than_the_limits_is_left_out(tmp_path: Path) -> None:
    members = [(member(f"{i}", size=400), bytes(400)) for i in range(5)]
    (tmp_path / "bytes").mkdir()
    found = unpacked(made_of(*members), tmp_path / "bytes", archive.Limits(1000, 100))
    assert (found.n_files, found.n_bytes, found.left_out.names) == (2, 800, ["2", "3", "4"])
    (tmp_path / "files").mkdir()
    found = unpacked(made_of(*members), tmp_path / "files", archive.Limits(MB, 3))
    assert (found.n_files, found.left_out.n) == (3, 2)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.CONTTYPE])
def test_a_header_of_gigabytes_is_not_read(tmp_path: Path, kind: bytes) -> None:
    """A few kilobytes of gzip hold it."""
    head = member("x", kind, size=64 * MB).tobuf(tarfile.USTAR_FORMAT)
    source = io.BytesIO(gzip.compress(head + bytes(64 * MB + 1024), 9))
    n_read = 0

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal n_read
            found = super().read(size)
            n_read += len(found)
            return found

    if kind == tarfile.CONTTYPE:  # an ordinary file, by another name: over the limit
        assert unpacked(source, tmp_path).left_out.n == 1
    else:
        with pytest.raises(archive.Unreadable):
            unpacked(Counted(source.getvalue()), tmp_path)
        assert n_read < len(source.getvalue())


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_the_bytes_nothing_else_than_unreadable_comes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = made_of(
        (member("d", tarfile.DIRTYPE), b""),
        (member("é" * 120, size=700), b"x" * 700),
        (member("link", tarfile.SYMTYPE, linkname="d"), b""),
    )
    plain = bytearray(gzip.decompress(whole.read()))
    for _ in range(data.draw(st.integers(1, 6))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    target = tmp_path_factory.mktemp("target")
    with suppress(archive.Unreadable):
        unpacked(io.BytesIO(gzip.compress(bytes(plain))), target / ".")
    assert list(target.parent.glob("evil")) == []


# -- whole or not at all -------------------------------------------------------------------------------------


class FullStore(MemoryFileSystem):
    """Fails where it is told to."""

    protocol = "fullmemory"
    cachable = False
    fails_in = ""

    def mv(self, path1: str, path2: str, **more: Any) -> None:
        if self.fails_in == "mv":
            raise OSError(28, "No space left")
        super().mv(path1, path2, **more)

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if self.fails_in == mode:
            raise PermissionError(path)
        return super()._open(path, mode, **more)


class HeldStore(MemoryFileSystem):
    """Waits in the move until it is let go."""

    protocol = "heldmemory"
    cachable = False
    came = threading.Event()
    go_on = threading.Event()
    left = threading.Event()

    def mv(self, path1: str, path2: str, **more: Any) -> None:
        self.came.set()
        assert self.go_on.wait(SOON_S)
        super().mv(path1, path2, **more)

    def rm_file(self, path: str) -> None:
        super().rm_file(path)
        if path.endswith(".tar.gz"):
            self.left.set()


async def test_the_held_store_holds_what_is_looked_for(tmp_path: Path, stores: None) -> None:
    HeldStore.go_on.set()
    node = Node(tmp_path / "a", "heldmemory://store")
    node.write("f")
    saved = await node.save()
    assert stored("heldmemory://store") == [f"{saved.snapshot_id}.tar.gz"]


@pytest.fixture
def stores() -> Iterator[None]:
    for kind in (FullStore, HeldStore):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    FullStore.fails_in = ""
    for event in (HeldStore.came, HeldStore.go_on, HeldStore.left):
        event.clear()
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("place", ["wb", "mv"])
async def test_a_failed_save_leaves_the_earlier_one(
    tmp_path: Path, stores: None, place: str
) -> None:
    a, b = (Node(tmp_path / name, "fullmemory://store") for name in "ab")
    a.write("f", "first")
    saved = await a.save()
    a.write("f", "second, longer")
    FullStore.fails_in = place
    with pytest.raises(SnapshotFailed):
        await a.snapshots.save("s", a.workspace, saved, epoch=1)
    FullStore.fails_in = ""
    assert stored("fullmemory://store") == [f"{saved.snapshot_id}.tar.gz"]
    assert (await b.restore(saved)).n_bytes == 5
    again = await a.save(saved)
    assert again.n_bytes == len("second, longer")


async def test_a_save_that_takes_too_long_is_given_up_and_taken_back(
    tmp_path: Path, stores: None
) -> None:
    node = Node(tmp_path / "a", "heldmemory://store", timeout_s=0.2)
    node.write("f")
    with pytest.raises(SnapshotFailed, match=r"0\.2 s"):
        await node.snapshots.save("s", node.workspace, None, epoch=1)
    assert HeldStore.came.is_set()
    HeldStore.go_on.set()
    assert await asyncio.to_thread(HeldStore.left.wait, SOON_S)
    assert stored("heldmemory://store") == []
    assert not list(node.workspace.parent.glob("*.json"))


async def test_a_cancelled_save_is_taken_back(tmp_path: Path, stores: None) -> None:
    node = Node(tmp_path / "a", "heldmemory://store")
    node.write("f")
    saving = asyncio.create_task(node.snapshots.save("s", node.workspace, None, epoch=1))
    assert await asyncio.to_thread(HeldStore.came.wait, SOON_S)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    HeldStore.go_on.set()
    assert await asyncio.to_thread(HeldStore.left.wait, SOON_S)
    assert stored("heldmemory://store") == []


def test_reading_stops_between_pieces(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}").write_text("x")
    n_left = 3

    def check() -> None:
        nonlocal n_left
        n_left -= 1
        if not n_left:
            raise InterruptedError

    fd = os.open(tmp_path, os.O_RDONLY)
    out = io.BytesIO()
    with pytest.raises(InterruptedError):
        archive.pack(fd, archive.scan(fd, LIMITS, no_check), LIMITS, out, check)
    os.close(fd)


# -- ends and settings -----------------------------------------------------------------------------------------


async def test_forgetting_leaves_nothing(a: Node, url: str) -> None:
    a.write("f")
    saved = await a.save()
    a.write("f", "more")
    await a.save(saved)
    await a.snapshots.forget("s", a.workspace)
    assert stored(url) == []
    assert [path.name for path in a.workspace.parent.iterdir()] == ["s"]
    await a.snapshots.forget("s", a.workspace)


async def test_copies_are_closed_to_other_users(tmp_path: Path) -> None:
    node = Node(tmp_path / "a", f"file://{tmp_path}/store")
    node.write("f")
    await node.save()
    assert stat.S_IMODE((tmp_path / "store" / "s").stat().st_mode) == 0o700


async def test_without_a_url_copies_lie_in_the_storage_directory(tmp_path: Path) -> None:
    node = Node(tmp_path / "a b%20c", "")
    node.snapshots = Snapshots(StorageSettings(), tmp_path / "a b%20c")
    node.write("f")
    await node.save()
    assert len(list((tmp_path / "a b%20c" / "snapshots" / "s").iterdir())) == 1


@pytest.mark.parametrize("url", ["nosuch://x", "oss://bucket"])
async def test_a_filesystem_that_is_not_there_is_said(tmp_path: Path, url: str) -> None:
    with pytest.raises(SettingsInvalid, match=url.split(":", maxsplit=1)[0]):
        check_filesystem(StorageSettings(url=url))
    node = Node(tmp_path / "a", url)
    node.write("f")
    with pytest.raises(SettingsInvalid, match="driver"):
        await node.save()


def test_a_relative_path_is_not_the_same_on_two_nodes() -> None:
    with pytest.raises(SettingsInvalid):
        check_filesystem(StorageSettings(url="snapshots"))


@pytest.mark.parametrize("url", [None, "memory://x", "/mnt/x", "file:///mnt/x"])
def test_a_filesystem_that_is_there_is_fine(url: str | None) -> None:
    check_filesystem(StorageSettings(url=url))


# -- real sandboxes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bwrap", "sandlock", "process"])
async def test_a_new_sandbox_reads_and_overwrites_what_came_back(tmp_path: Path, kind: str) -> None:
    need(kind)
    spec = SandboxSpec.model_validate({"kind": kind})
    a, b = (Node(tmp_path / name, f"file://{tmp_path}/store") for name in "ab")
    script = "mkdir -p d && echo one > d/f && chmod 600 d/f && ln -s d/f link && seq 100000"
    first = await open_sandbox(spec, a.workspace, session_id="s")
    done = await first.exec(script, timeout_s=30)
    await first.close()
    assert done.exit_code == 0
    assert done.full_output_path is not None
    saved = await a.save()
    await b.restore(saved)
    second = await open_sandbox(spec, b.workspace, session_id="s")
    try:
        again = "cat link && echo two >> d/f && touch d/g new && rm link && cat d/f"
        done = await second.exec(again, timeout_s=30)
        assert (done.exit_code, done.output) == (0, "one\none\ntwo\n")
        await second.write_file("d/f", b"three")
        outputs = ".troupe/outputs/"
        [name] = [path.name for path in (b.workspace / outputs).iterdir()]
        assert (await second.read_file(outputs + name, max_bytes=4)) == b"1\n2\n"
        tail = await second.exec(f"tail -n1 {outputs}{name}", timeout_s=30)
        assert tail.output == "100000\n"
    finally:
        await second.close()
    changed = await b.save(saved)
    assert changed.n_skipped == 0
