"""How much memory a process may take, as Linux, its control groups and CUDA say it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sst_kernels.fisher import available as module
from sst_kernels.fisher.available import available

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNLIMITED = (1 << 63) - 4096  # how version 1 says "max"


@pytest.fixture
def root(monkeypatch, tmp_path):
    """/ of a host of which 8 GiB are available."""
    write(tmp_path / "proc/meminfo", f"MemTotal: {16 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {8 * MIB} kB\n")
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group_v2(folder: Path, limit: object, current: int, inactive: int) -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", current)
    write(folder / "memory.stat", f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file 3")


def group_v1(folder: Path, limit: int, usage: int, inactive: int) -> None:
    write(folder / "memory.limit_in_bytes", limit)
    write(folder / "memory.usage_in_bytes", usage)
    write(folder / "memory.stat", f"inactive_file 7\ntotal_inactive_file {inactive}")


def test_without_limits_the_host_says_it(root):
    assert available("cpu") == 8 * GIB


def test_files_in_the_cache_of_a_container_are_not_taken(root):
    write(root / "proc/self/cgroup", "0::/")
    group_v2(root / "sys/fs/cgroup", 4 * GIB, 3 * GIB, 2 * GIB)
    assert available("cpu") == 3 * GIB
    group_v2(root / "sys/fs/cgroup", 4 * GIB, 5 * GIB, 0)  # the limit was lowered below what is held
    assert available("cpu") == 0
    group_v2(root / "sys/fs/cgroup", "max", 3 * GIB, 0)
    assert available("cpu") == 8 * GIB


def test_the_tightest_of_nested_limits_counts(root):
    write(root / "proc/self/cgroup", "0::/user.slice/job:1/step")
    user = root / "sys/fs/cgroup/user.slice"
    group_v2(user, 6 * GIB, 2 * GIB, 0)
    group_v2(user / "job:1", 3 * GIB, 2 * GIB, MIB)
    group_v2(user / "job:1/step", "max", 1 * GIB, 0)
    assert available("cpu") == 1 * GIB + MIB


def test_version_1_counts_the_cache_of_all_its_groups(root):
    write(root / "proc/self/cgroup", "9:name=systemd:/\n5:cpu,cpuacct:/job\n4:memory:/job\n0::/")
    memory = root / "sys/fs/cgroup/memory"
    group_v1(memory, UNLIMITED, 9 * GIB, 0)
    assert available("cpu") == 8 * GIB
    group_v1(memory / "job", 2 * GIB, 1 * GIB, MIB)
    assert available("cpu") == 1 * GIB + MIB


def test_a_container_that_sees_only_its_own_group_finds_it(root):
    """Version 1 without namespaces: the path is the host's, and the folder is mounted as the root."""
    write(root / "proc/self/cgroup", "4:memory:/docker/0123abc")
    group_v1(root / "sys/fs/cgroup/memory", 2 * GIB, 1 * GIB, 0)
    assert available("cpu") == 1 * GIB


def test_what_cannot_be_read_is_left_out(root):
    write(root / "proc/self/cgroup", "0::/../job\nno line of this kind\n1:x")
    write(root / "sys/fs/cgroup/memory.max", GIB)
    write(root / "sys/fs/cgroup/memory.current", MIB)
    (root / "sys/fs/cgroup/memory.stat").mkdir()
    assert available("cpu") == GIB - MIB
    (root / "sys/fs/cgroup/memory.current").unlink()
    assert available("cpu") == 8 * GIB
    (root / "proc/meminfo").unlink()
    assert available("cpu") is None


def test_this_host_says_what_is_available():
    assert available("cpu") > MIB


def test_what_torch_keeps_of_a_gpu_without_using_it_is_available(monkeypatch):
    asked = []
    for name, said in (("mem_get_info", (GIB, 80 * GIB)), ("memory_reserved", 7 * GIB), ("memory_allocated", 5 * GIB)):
        monkeypatch.setattr(torch.cuda, name, lambda device, said=said: asked.append(device) or said)
    assert available("cuda:1") == 3 * GIB
    assert set(asked) == {torch.device("cuda:1")}
