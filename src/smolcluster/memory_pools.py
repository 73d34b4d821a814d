"""What a process may still take memory from, and who it shares that with: its machine, and on Linux control groups."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


def memory_pools() -> dict[str, int]:
    """What this process may still take memory from: bytes that are left, by the pool's name; the smallest counts.

    The pools are the machine, and on Linux every control group that this process is in. Processes on any machines that
    share a pool give it the same name, in whatever containers they are: they divide what is left there.
    """
    import psutil

    machine = machine_name()
    groups = group_memory_bytes(Path("/"))
    left = {machine: int(psutil.virtual_memory().available)}
    return left | {f"{machine}/group {number}": nbytes for number, nbytes in groups.items()}


def group_memory_bytes(root: Path) -> dict[int, int]:
    """Bytes that the control groups (v1 and v2) of this process leave it, by the number of the group's folder.

    Its own group and all above it that can be seen from here; those without a limit are left out. What a group uses
    does not count as far as it is file cache that was not read lately: the kernel gives that back first.

    Args:
        root: the root of the file system; another one for tests.
    """
    left = {}
    for folder, top, names in _own_groups(root):
        for level in (folder, *folder.parents):
            limits = [limit for name in names.limits if (limit := _read_number(level / name)) is not None]
            used = _read_number(level / names.used)
            if limits and min(limits) < _NO_LIMIT and used is not None:
                used -= _read_statistic(level / "memory.stat", names.reclaimable)
                # The kernel numbers a group once, for all mounts and name spaces.
                left[level.stat().st_ino] = max(0, min(limits) - max(0, used))
            if level == top:
                break
    return left


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """Where memory groups lie if the mounts do not say so, and what their files are called."""

    mount: str
    limits: tuple[str, ...]
    used: str
    reclaimable: str


# Above memory.high the kernel slows a group down until it hardly moves, so that is a limit too.
_V2 = _GroupFiles("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _GroupFiles("sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
# Where v2 says "max", v1 gives the largest number of pages that it can count.
_NO_LIMIT = 1 << 60


def _own_groups(root: Path) -> list[tuple[Path, Path, _GroupFiles]]:
    """This process's memory groups: the folder, the topmost folder that is mounted here, and the names of its files."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    mounts = _group_mounts(root)
    groups = []
    for line in lines:
        controllers, _, place = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        names, own = _V1 if controllers else _V2, PurePosixPath(place)
        tops = [(group, top) for kind, group, top in mounts if kind is names] or [("/", root / names.mount)]
        folders = [(top / own.relative_to(group), top) for group, top in tops if own.is_relative_to(group)]
        # In a container the mount may be the container's own group, and the path one that only the host has.
        whole = (tops[0][1], tops[0][1])
        folder, top = next((found for found in folders if ".." not in own.parts and found[0].is_dir()), whole)
        groups.append((folder, top, names))
    return groups


def _group_mounts(root: Path) -> list[tuple[_GroupFiles, str, Path]]:
    """Where control groups are mounted: the version, the group that the mount begins at, and the folder."""
    try:
        lines = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        before, _, after = line.partition(" - ")
        kind, options = after.partition(" ")[0], after.rpartition(" ")[2].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options):
            group, place = (_unescape(text) for text in before.split(" ")[3:5])
            mounts.append((_V2 if kind == "cgroup2" else _V1, group, root / place.lstrip("/")))
    return mounts


def _unescape(text: str) -> str:
    """Names in mountinfo have spaces and backslashes as octal numbers; systemd's units have backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # there is none at this level, or it is "max"
        return None


def _read_statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split(" ")[1]) for line in lines if line.startswith(f"{name} ")), 0)


def machine_name() -> str:
    """The same in all containers of a machine, another one on each machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
