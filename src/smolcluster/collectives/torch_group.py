"""A torch.distributed process group of our own: opened from a store, broken on abort, its errors in our words.

Not the global default group: nothing is registered with `torch.distributed`, so a script may use that beside us, and
groups within groups need only their own members to open them (dist.new_group wants every process of the job).

What was tried with torch 2.13 and gloo, and shapes this file and torch_dist.py:

- A tensor of another size than the peer expects ends the whole process (gloo throws on its own thread). So every
  collective is preceded by a small one that compares what the ranks are about to do.
- `group.abort()` does nothing. A receive whose timeout passes closes all connections of its group at once, here and at
  the peers; that is our abort.
- Sends and receives are matched by tag, in any order; but sizes must be known. A header goes first.
"""

from __future__ import annotations

import contextlib
import re
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from smolcluster.errors import ClusterError, CollectiveTimeout, ConfigError, PeerLost, SmolError

# Nobody ever sends with it: message tags are below 2^30 and use 2 * tag and 2 * tag + 1.
_SILENT_TAG = 2**31 - 1

_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
_CLOSED = re.compile(r"connection (closed|reset|refused)|broken pipe|pair closure|socket closed", re.IGNORECASE)


def open_group(backend: str, store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.ProcessGroup:
    """Connect the ranks that meet at `store`; blocks until all are there.

    Args:
        backend: "gloo", or "nccl": then CUDA tensors go over NCCL and CPU tensors over gloo.
        store: the same for all ranks, and not used for another group.
        rank: of this process.
        world_size: number of ranks.
        timeout: seconds after which a collective or receive without progress breaks the group.

    Raises:
        ConfigError: the backend is unknown or not in this build of torch.
        RuntimeError: from torch, when a rank cannot be reached.
    """
    seconds = timedelta(seconds=timeout)
    group = dist.ProcessGroup(store, rank, world_size)
    types = dist.ProcessGroup.BackendType
    if not dist.is_gloo_available():
        raise ConfigError("this build of torch has no gloo: use --backend tcp")
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, world_size, timeout=seconds)
    group._register_backend(torch.device("cpu"), types.GLOO, gloo)
    if backend == "nccl":
        if not dist.is_nccl_available() or not torch.cuda.is_available():
            raise ConfigError("backend nccl needs a CUDA device and a torch built for it: use --backend gloo or tcp")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = seconds
        nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, world_size, options)
        group._register_backend(torch.device("cuda"), types.NCCL, nccl)
        group._set_default_backend(types.NCCL)
    elif backend == "gloo":
        group._set_default_backend(types.GLOO)
    else:
        raise ConfigError(f"backend is {backend!r}: torch.distributed is used with gloo or nccl")
    return group


def break_group(group: dist.ProcessGroup, rank: int, world_size: int, backend: str) -> None:
    """Close the group's connections: what is pending here and on the peers fails. Takes some milliseconds."""
    with contextlib.suppress(RuntimeError):  # broken already
        if world_size > 1:
            receive = dist.irecv(torch.empty(1), group=group, group_src=(rank + 1) % world_size, tag=_SILENT_TAG)
            if receive is not None:
                receive.wait(timedelta(milliseconds=1))
    if backend == "nccl":
        with contextlib.suppress(RuntimeError):
            group.abort()


def translate(error: Exception, what: str, peer: int) -> SmolError:
    """An error of torch.distributed in our words.

    Args:
        error: what torch raised.
        what: what was under way, for the message.
        peer: the rank it was with, -1 if it was with all of them: gloo does not say which one is gone.
    """
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    whom = "a peer" if peer < 0 else f"rank {peer}"
    if _TIMED_OUT.search(reason):
        return CollectiveTimeout(
            f"{what}: {whom} made no progress within torch.distributed's timeout ({reason}). See its log, or give a "
            "longer timeout"
        )
    if _CLOSED.search(reason):
        return PeerLost(f"{what}: {whom} closed its connection ({reason}). See which rank ended, and its log", peer)
    return ClusterError(f"{what} failed in torch.distributed: {reason}")


def gather_bytes(group: dist.ProcessGroup, own: Tensor, world_size: int) -> Tensor:
    """Every rank's `own`, uint8 (n,), as rows of (world_size, n); blocks."""
    gathered = torch.empty(world_size * own.numel(), dtype=torch.uint8, device=own.device)
    all_gather_flat(group, gathered, own)
    return gathered.view(world_size, -1)


def all_gather_flat(group: dist.ProcessGroup, output: Tensor, input: Tensor) -> None:
    """dist.all_gather_into_tensor under whichever name this torch has; blocks."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    wait(gather(output, input, group=group, async_op=True))


def reduce_scatter_flat(group: dist.ProcessGroup, output: Tensor, input: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    """dist.reduce_scatter_tensor under whichever name this torch has; blocks."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    wait(scatter(output, input, op=op, group=group, async_op=True))


def wait(work: dist.Work | None) -> None:
    """Wait for a Work of torch.distributed. None (this rank is not in the group) cannot happen here."""
    assert work is not None
    work.wait()
