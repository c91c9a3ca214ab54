"""Which limits a machine can give: worked out over trees that look like its cgroup file system."""

import os
from pathlib import Path

import pytest

from agent.sandbox.limits import Cgroup, cgroups, session_uid, usable_cgroups
from agent.sandbox.seccomp import program
from agent.spec import SandboxSpec

WHOLE_MACHINE = "         0          0 4294967295\n"
SPEC = SandboxSpec(memory_bytes=100 * 1024**2, max_processes=50)


def tree(root: Path, *directories: str, hands_down: dict[str, str] | None = None) -> Path:
    for directory in directories:
        (root / directory).mkdir(parents=True)
        (root / directory / "cgroup.procs").touch()
    for directory, controllers in (hands_down or {}).items():
        (root / directory / "cgroup.subtree_control").write_text(controllers)
    return root


def membership(root: Path, text: str) -> Path:
    path = root / "membership"
    path.write_text(text)
    return path


def test_v2_takes_the_nearest_cgroup_that_hands_its_controllers_down(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "fs", "", "user", "user/app", "user/app/run",
        hands_down={"": "cpu memory pids", "user": "memory pids", "user/app/run": ""},
    )  # fmt: skip
    own = membership(tmp_path, "0::/user/app/run\n")
    assert usable_cgroups(root, own) == (2, (root / "user",))
    (group,) = cgroups(SPEC, root, own)
    assert group.parent == root / "user"
    assert group.files["memory.max"] == str(100 * 1024**2)
    assert group.files["pids.max"] == "50"
    assert sorted(path.name for path in (root / "user").iterdir() if path.is_dir()) == ["app"]


def test_v1_needs_memory_and_pids(tmp_path: Path) -> None:
    root = tree(tmp_path / "fs", "memory/a", "pids/b", "unified")
    own = membership(tmp_path, "5:cpu,memory:/a\n4:pids:/b\n0::/\n")
    memory, pids = cgroups(SPEC, root, own)
    assert (memory.parent, pids.parent) == (root / "memory/a", root / "pids/b")
    assert pids == Cgroup(root / "pids/b", {"pids.max": "50"})


@pytest.mark.parametrize("lines", ["", "0::/\n", "0::/a\n", "4:memory:/\n3:pids:/\n"])
def test_without_a_cgroup_to_write_resource_limits_are_left(tmp_path: Path, lines: str) -> None:
    root = tree(tmp_path / "fs", "a", hands_down={"a": "memory"})
    assert cgroups(SPEC, root, membership(tmp_path, lines)) == ()


def test_a_session_has_one_uid_for_ever_and_no_other_has_it() -> None:
    if os.geteuid() != 0:
        pytest.skip("ONLY ROOT CAN GIVE A SESSION ITS OWN UID: this did not run")
    uids = [session_uid(f"s{i}", WHOLE_MACHINE) for i in range(500)]
    assert uids == [session_uid(f"s{i}", WHOLE_MACHINE) for i in range(500)]
    assert len(set(uids)) == 500
    assert all(uid is not None and 200_000 <= uid < 2**31 for uid in uids)
    container = [session_uid(f"s{i}", "0 100000 65536\n") for i in range(500)]
    assert all(uid is not None and 20_000 <= uid < 65_534 for uid in container)
    assert session_uid("s", "0 1000 1\n") is None


def test_the_filter_is_whole_instructions_within_the_kernels_limit() -> None:
    code = program()
    if code is None:
        pytest.skip("NO SECCOMP TABLE FOR THIS MACHINE: this did not run")
    assert len(code) % 8 == 0
    assert len(code) // 8 <= 4096
