"""Memory as the kernel tells it: machines, containers, groups within groups. The files are real ones
in a folder of the test's."""

from pathlib import Path

import pytest

from actors.memory import NodeMemory, node_memory, process_bytes

GIB = 1024**3


def machine(root: Path, *, total: int = 16 * GIB, available: int = 12 * GIB) -> Path:
    write(
        root / "proc/meminfo",
        f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n",
    )
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group_2(root: Path, path: str, limit: str, used: int, *, cache: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / path
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used + cache}\n")
    half = cache // 2
    write(folder / "memory.stat", f"anon 1\ninactive_file {half}\nactive_file {cache - half}\n")


def group_1(root: Path, path: str, limit: int, used: int, *, cache: int = 0) -> None:
    folder = root / "sys/fs/cgroup/memory" / path
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", f"{used + cache}\n")
    stat = f"inactive_file 7\nactive_file 7\ntotal_inactive_file {cache}\ntotal_active_file 0\n"
    write(folder / "memory.stat", stat)


def test_without_a_group_it_is_the_machines(tmp_path: Path) -> None:
    found = node_memory(machine(tmp_path))
    assert found == NodeMemory(4 * GIB, 16 * GIB)
    assert found.share == 0.25


@pytest.mark.parametrize("is_hidden", [False, True], ids=["seen", "own group is the mount's root"])
def test_a_containers_limit_counts_without_its_page_cache(
    tmp_path: Path, *, is_hidden: bool
) -> None:
    machine(tmp_path)
    write(tmp_path / "proc/self/cgroup", "0::/kubepods/pod1\n")
    group_2(tmp_path, "" if is_hidden else "kubepods/pod1", str(2 * GIB), GIB, cache=GIB)
    assert node_memory(tmp_path) == NodeMemory(GIB, 2 * GIB)


@pytest.mark.parametrize("is_hidden", [False, True], ids=["seen", "own group is the mount's root"])
def test_a_limit_of_version_1_counts(tmp_path: Path, *, is_hidden: bool) -> None:
    machine(tmp_path)
    write(tmp_path / "proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    group_1(tmp_path, "" if is_hidden else "docker/abc", 2 * GIB, GIB, cache=GIB)
    assert node_memory(tmp_path) == NodeMemory(GIB, 2 * GIB)


def test_a_group_without_a_limit_does_not_count(tmp_path: Path) -> None:
    machine(tmp_path)
    write(tmp_path / "proc/self/cgroup", "4:memory:/a\n0::/user.slice\n")
    group_2(tmp_path, "user.slice", "max", 8 * GIB)
    group_1(tmp_path, "a", 9223372036854771712, 15 * GIB)
    assert node_memory(tmp_path) == NodeMemory(4 * GIB, 16 * GIB)


def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    machine(tmp_path)
    write(tmp_path / "proc/self/cgroup", "0::/a/b/c\n")
    group_2(tmp_path, "a", str(8 * GIB), 7 * GIB)
    group_2(tmp_path, "a/b", "max", 7 * GIB)
    group_2(tmp_path, "a/b/c", str(4 * GIB), 2 * GIB)
    assert node_memory(tmp_path) == NodeMemory(7 * GIB, 8 * GIB)


def test_a_full_machine_counts_also_where_the_group_has_room(tmp_path: Path) -> None:
    machine(tmp_path, available=GIB)
    write(tmp_path / "proc/self/cgroup", "0::/a\n")
    group_2(tmp_path, "a", str(8 * GIB), GIB)
    assert node_memory(tmp_path) == NodeMemory(15 * GIB, 16 * GIB)


def test_this_machine_tells(tmp_path: Path) -> None:
    found = node_memory()
    assert 0 < found.used_bytes < found.limit_bytes
    assert 0 < process_bytes() < found.limit_bytes


def test_a_process_takes_what_the_kernel_counts_as_its_share(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/status", "Name: x\nVmHWM: 9 kB\nVmRSS: 8 kB\n")
    assert process_bytes(tmp_path) == 8 * 1024
    write(tmp_path / "proc/self/smaps_rollup", "0-1 ---p [rollup]\nRss: 8 kB\nPss: 5 kB\nPss_Anon: 4 kB\n")  # fmt: skip
    assert process_bytes(tmp_path) == 5 * 1024
