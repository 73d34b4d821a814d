"""Where a rank computes, and what every computing process sets once."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Literal

from smolcluster.errors import ConfigError

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda", "mps"]

# glibc's number of this parameter (malloc.h), and the size from which the logits and activations of larger models are.
_M_MMAP_THRESHOLD = -3
RETURNED_BYTES = 4 << 20


def resolve_device(name: str, local_rank: int = 0, *, key: str = "training.device") -> torch.device:
    """The device that `training.device`, or a flag, names on this machine.

    Args:
        name: "auto" (CUDA if there is one, else Apple's MPS, else the CPU), "cpu", "cuda" or "mps".
        local_rank: this process's number among those of this machine; they share its GPUs in turn.
        key: what the user named it with, for messages.

    Raises:
        ConfigError: this machine has no such device, or the name is unknown.
    """
    import torch  # not at the top: `smolcluster --help` must not wait for it

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    if name not in available:
        raise ConfigError(
            f"{key} is {name!r}, but this machine offers {', '.join(available)} "
            f"(torch {torch.__version__}). Set {key} to one of those, or to auto."
        )
    if name == "cuda":
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device(name)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_process() -> None:
    """Set what every process that computes needs. Call once, before the first tensor is made.

    One torch thread per rank: ranks share the machine, and the transport needs its cores too. Denormals are
    flushed to zero: with embeddings of small scale they make a CPU step up to 12 times slower.
    """
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def spare_collector() -> None:
    """Take what this process has loaded so far out of Python's garbage collection; call once, before the work.

    torch's modules are half a million objects. A full collection looks at them all and holds up every thread for
    0.1 s, some times a second in a process that handles many messages.
    """
    gc.collect()
    gc.freeze()


def give_memory_back(least: int = RETURNED_BYTES) -> bool:
    """Let freed tensors of `least` bytes and more go back to the system at once; False where that cannot be set.

    glibc otherwise learns to keep blocks of up to 32 MiB in a heap, whose gaps made the peak of one and the same run
    vary by up to a fifth. The price is that such a tensor's pages are mapped anew: about 15 % of a step full of them.
    """
    import ctypes

    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, least))
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no name for the program itself
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the machine or of its GPU could not be had. The CPU's allocator raises a plain RuntimeError."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    known = ("DefaultCPUAllocator", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in known)
