from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from smolcluster import device
from smolcluster.device import (
    group_memory_bytes,
    is_out_of_memory,
    memory_pools,
    prepare_process,
    resolve_device,
)
from smolcluster.errors import ConfigError


def offer(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(0, False, "cpu"), (0, True, "mps"), (2, False, "cuda:0"), (1, True, "cuda:0")]
)
def test_auto_takes_the_fastest_that_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, expected: str
) -> None:
    offer(monkeypatch, cuda, mps)
    assert str(resolve_device("auto")) == expected
    assert str(resolve_device("cpu")) == "cpu"


def test_ranks_of_one_machine_share_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, cuda=2, mps=False)
    assert [str(resolve_device("cuda", local_rank)) for local_rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_device_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, cuda=0, mps=True)
    with pytest.raises(ConfigError, match=r"training.device is 'cuda', but this machine offers mps, cpu"):
        resolve_device("cuda")


def test_a_prepared_process_uses_one_thread_and_flushes_denormals() -> None:
    prepare_process()
    assert torch.get_num_threads() == 1
    assert (torch.tensor([1e-30]) * 1e-10).item() == 0.0


@pytest.mark.parametrize("numbers", [2**62, 2**50])  # more bytes than an int holds; more than an address space
def test_memory_that_cannot_be_had_is_known_from_other_errors(numbers: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(numbers, 7)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(caught.value)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps large blocks")
def test_large_tensors_leave_the_process_when_they_are_freed() -> None:
    """In a process of its own: the setting cannot be taken back."""
    program = """
import psutil, torch
from smolcluster.device import give_memory_back
torch.ones(2**22)  # 16 MiB, freed at once: from now on glibc keeps blocks up to that size
assert give_memory_back()
blocks = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
held = psutil.Process().memory_info().rss
del blocks[:-1]  # the last one lies above them
assert held - psutil.Process().memory_info().rss > 100 * 2**20
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ---- control groups

V1_NO_LIMIT = "9223372036854771712"
INACTIVE = {"memory.stat": "anon 7000\nfile 2000\ninactive_file 500\nactive_file 1500\n"}
INACTIVE_V1 = {"memory.stat": "inactive_file 3\nactive_file 4\ntotal_inactive_file 500\ntotal_active_file 4\n"}


def fake_root(root: Path, cgroup: str, mountinfo: str | None = None) -> Path:
    """A file system as a process sees it that is in these control groups."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(cgroup + "\n")
    if mountinfo is not None:
        (proc / "mountinfo").write_text(mountinfo + "\n")
    return root


def make_group(folder: Path, files: dict[str, str]) -> int:
    """The group's number."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text if name == "memory.stat" else text + "\n")
    return folder.stat().st_ino


V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def test_a_group_of_version_2_leaves_its_limit_less_what_it_uses_but_for_old_file_cache(tmp_path: Path) -> None:
    root = fake_root(tmp_path, "0::/user.slice/job.scope", V2_MOUNT)
    own = make_group(
        root / "sys/fs/cgroup/user.slice/job.scope", {"memory.max": "10000", "memory.current": "9000", **INACTIVE}
    )
    assert group_memory_bytes(root) == {own: 1500}


def test_a_group_of_version_1_too(tmp_path: Path) -> None:
    root = fake_root(tmp_path, "9:name=systemd:/\n4:memory:/jobs/1\n2:cpu,cpuacct:/elsewhere", V1_MOUNT)
    files = {"memory.limit_in_bytes": "10000", "memory.usage_in_bytes": "9000", **INACTIVE_V1}
    own = make_group(root / "sys/fs/cgroup/memory/jobs/1", files)
    assert group_memory_bytes(root) == {own: 1500}


@pytest.mark.parametrize("mountinfo", [V2_MOUNT, None], ids=["mounts known", "mounts unknown"])
def test_every_group_above_counts(mountinfo: str | None, tmp_path: Path) -> None:
    """The process's own group has no limit, the one above it has, the one above that a lower one."""
    root = fake_root(tmp_path, "0::/outer/middle/inner", mountinfo)
    top = root / "sys/fs/cgroup"
    make_group(top / "outer/middle/inner", {"memory.max": "max", "memory.high": "max", "memory.current": "800"})
    middle = make_group(top / "outer/middle", {"memory.max": "9000", "memory.current": "1000"})
    outer = make_group(top / "outer", {"memory.max": "6000", "memory.current": "5000"})
    make_group(root / "sys/fs", {"memory.max": "1", "memory.current": "0"})  # above the mount there are no groups
    assert group_memory_bytes(root) == {middle: 8000, outer: 1000}


def test_what_slows_a_group_down_is_a_limit_too(tmp_path: Path) -> None:
    root = fake_root(tmp_path, "0::/job", V2_MOUNT)
    own = make_group(
        root / "sys/fs/cgroup/job", {"memory.max": "10000", "memory.high": "4000", "memory.current": "5000"}
    )
    assert group_memory_bytes(root) == {own: 0}


@pytest.mark.parametrize(
    "mountinfo",
    [
        "812 805 0:32 /docker/4f9d /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory",
        "812 805 0:32 /kubepods/other /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory",
        None,
    ],
    ids=["its own group is mounted", "some group is mounted", "mounts unknown"],
)
def test_in_a_container_with_version_1_the_mount_is_the_containers_group(mountinfo: str | None, tmp_path: Path) -> None:
    """/proc/self/cgroup has the path that the host knows; in the container there is none like it."""
    root = fake_root(tmp_path, "4:memory:/docker/4f9d\n0::/", mountinfo)
    files = {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "1000"}
    own = make_group(root / "sys/fs/cgroup/memory", files)
    assert group_memory_bytes(root) == {own: 4000}


def test_in_a_container_with_version_2_the_path_is_the_name_spaces_root(tmp_path: Path) -> None:
    root = fake_root(tmp_path, "0::/", V2_MOUNT)
    own = make_group(root / "sys/fs/cgroup", {"memory.max": "5000", "memory.current": "1000"})
    assert group_memory_bytes(root) == {own: 4000}


def test_groups_below_the_one_that_is_mounted_are_found_also_with_signs_that_mountinfo_escapes(tmp_path: Path) -> None:
    mount = r"9 8 0:28 /machine.slice/machine-qemu\134x2d1.scope /sys/fs/my\040groups rw - cgroup2 cgroup2 rw"
    root = fake_root(tmp_path, r"0::/machine.slice/machine-qemu\x2d1.scope/job", mount)
    top = root / "sys/fs/my groups"
    above = make_group(top, {"memory.max": "8000", "memory.current": "1000"})
    own = make_group(top / "job", {"memory.max": "5000", "memory.current": "1000"})
    assert group_memory_bytes(root) == {above: 7000, own: 4000}


def test_version_2_beside_version_1_says_nothing_of_memory(tmp_path: Path) -> None:
    mounts = f"{V1_MOUNT}\n41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
    root = fake_root(tmp_path, "4:memory:/job\n0::/job", mounts)
    (root / "sys/fs/cgroup/unified/job").mkdir(parents=True)
    files = {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "1000"}
    own = make_group(root / "sys/fs/cgroup/memory/job", files)
    make_group(root / "sys/fs/cgroup/memory", {"memory.limit_in_bytes": V1_NO_LIMIT, "memory.usage_in_bytes": "7000"})
    assert group_memory_bytes(root) == {own: 4000}


def test_without_a_limit_or_without_groups_there_is_nothing_to_say(tmp_path: Path) -> None:
    unlimited = fake_root(tmp_path / "unlimited", "4:memory:/job\n0::/job", f"{V1_MOUNT}\n{V2_MOUNT}")
    v1 = {"memory.limit_in_bytes": V1_NO_LIMIT, "memory.usage_in_bytes": "7000"}
    make_group(unlimited / "sys/fs/cgroup/memory/job", v1)
    make_group(unlimited / "sys/fs/cgroup/job", {"memory.max": "max", "memory.high": "max", "memory.current": "7000"})
    assert group_memory_bytes(unlimited) == {}
    assert group_memory_bytes(fake_root(tmp_path / "odd", "nonsense", "more nonsense")) == {}
    assert group_memory_bytes(tmp_path / "another system") == {}


def test_the_machine_is_a_pool_and_each_of_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "group_memory_bytes", lambda root: {17: 4000})
    pools = memory_pools()
    machine = device.machine_name()
    assert pools[f"{machine}/group 17"] == 4000
    assert set(pools) == {machine, f"{machine}/group 17"}
    assert 0 < pools[machine] < psutil.virtual_memory().total
