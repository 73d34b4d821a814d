"""What this process uses of its machine."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import psutil

from smolcluster.kinds import JsonObject

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class ProcessUsage:
    """The columns `sys/…` of a row. For one thread.

    Args:
        device: where this process computes; None: on the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent(None)  # the first call only sets the starting point
        self._device = device
        self._has_utilization = device is not None and device.type == "cuda"

    def row(self) -> JsonObject:
        """CPU of this process since the last call (100 = one core), and its resident memory now.

        With a GPU also the memory that this process's tensors take there, and where the driver tells it how busy that
        GPU is (0 to 100, all processes together).
        """
        return {
            "sys/cpu_percent": self._process.cpu_percent(None),
            "sys/rss_bytes": self._process.memory_info().rss,
            **self._gpu(),
        }

    def _gpu(self) -> JsonObject:
        if self._device is None or self._device.type == "cpu":
            return {}
        import torch

        if self._device.type == "mps":
            return {"sys/gpu_memory_bytes": torch.mps.current_allocated_memory()}
        if self._device.type != "cuda":
            return {}
        row: JsonObject = {"sys/gpu_memory_bytes": torch.cuda.memory_allocated(self._device)}
        if self._has_utilization:
            try:
                row["sys/gpu_percent"] = torch.cuda.utilization(self._device)
            except Exception as error:  # noqa: BLE001 - no NVML package, or a Jetson, whose driver has none: once is enough
                self._has_utilization = False
                logger.info("no sys/gpu_percent reason=%s", error)
        return row


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
