"""What this process uses of its machine."""

from __future__ import annotations

import sys

import psutil

from smolcluster.kinds import JsonObject


class ProcessUsage:
    """The columns `sys/…` of a row. For one thread."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent(None)  # the first call only sets the starting point

    def row(self) -> JsonObject:
        """CPU of this process since the last call (100 = one core), and its resident memory now."""
        return {
            "sys/cpu_percent": self._process.cpu_percent(None),
            "sys/rss_bytes": self._process.memory_info().rss,
        }


def peak_rss_bytes() -> int:
    """The most memory that this process ever had resident."""
    if sys.platform == "linux":
        # Not getrusage: its maximum survives exec, so a small child shows what its parent used.
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
