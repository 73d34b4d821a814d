from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from smolcluster import memory_pools as memory_pools_module
from smolcluster.memory_pools import group_memory_bytes, memory_pools

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
    monkeypatch.setattr(memory_pools_module, "group_memory_bytes", lambda root: {17: 4000})
    pools = memory_pools()
    machine = memory_pools_module.machine_name()
    assert pools[f"{machine}/group 17"] == 4000
    assert set(pools) == {machine, f"{machine}/group 17"}
    assert 0 < pools[machine] < psutil.virtual_memory().total
