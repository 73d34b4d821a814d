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
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from smolcluster.errors import ClusterError, CollectiveMismatch, CollectiveTimeout, ConfigError, PeerLost, SmolError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed has it too, but its stubs do not say so

# Nobody ever sends with it: message tags are below 2^30 and use 2 * tag and 2 * tag + 1.
_SILENT_TAG = 2**31 - 1

# Room for Call.says in the comparison.
_SAYS_BYTES = 192
# What a rank says that is about to leave.
CLOSE = "close"

_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
_CLOSED = re.compile(r"connection (closed|reset|refused)|broken pipe|socket closed", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Call:
    """What a rank is about to do.

    Attributes:
        says: in words; equal on all ranks.
        rows_from: rows that it expects from each rank, for all_to_all.
        rows_to: rows that it sends to each rank.
    """

    says: str
    rows_from: list[int] | None = None
    rows_to: list[int] | None = None


def open_group(backend: str, store: Store, rank: int, world_size: int, timeout: float) -> dist.ProcessGroup:
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
    if not dist.is_available() or not dist.is_gloo_available():
        raise ConfigError("this build of torch has no torch.distributed with gloo: use --backend tcp")
    seconds = timedelta(seconds=timeout)
    group = dist.ProcessGroup(store, rank, world_size)
    types = dist.ProcessGroup.BackendType
    gloo = dist.ProcessGroupGloo(prefixed("gloo", store), rank, world_size, timeout=seconds)
    group._register_backend(torch.device("cpu"), types.GLOO, gloo)
    if backend == "nccl":
        if not dist.is_nccl_available() or not torch.cuda.is_available():
            raise ConfigError("backend nccl needs a CUDA device and a torch built for it: use --backend gloo or tcp")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = seconds
        nccl = dist.ProcessGroupNCCL(prefixed("nccl", store), rank, world_size, options)
        group._register_backend(torch.device("cuda"), types.NCCL, nccl)
        group._set_default_backend(types.NCCL)
    elif backend == "gloo":
        group._set_default_backend(types.GLOO)
    else:
        raise ConfigError(f"backend is {backend!r}: torch.distributed is used with gloo or nccl")
    return group


def prefixed(prefix: str, store: Store) -> Store:
    """A part of the store for one group alone."""
    part: Store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined] # exported, but not in torch's stubs
    return part


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


def gather_ragged_bytes(group: dist.ProcessGroup, own: bytes, world_size: int) -> list[bytes]:
    """Every rank's bytes, of any length, in rank order; blocks."""
    sizes = gather_bytes(group, torch.tensor([len(own)]).view(torch.uint8), world_size)
    lengths = sizes.view(torch.int64).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    rows = gather_bytes(group, padded, world_size)
    return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]


def compare_calls(group: dist.ProcessGroup, name: str, rank: int, world_size: int, call: Call, number: int) -> None:
    """Wait until every rank is about to make a collective, and check that it is the same one.

    Args:
        group: of all the ranks.
        name: of the group, for messages.
        rank: of this process.
        world_size: number of ranks.
        call: what this rank is about to do.
        number: how many collectives it has made.

    Raises:
        CollectiveMismatch: on all ranks, unless only the rows differ: then on those that expect others.
        PeerLost: a rank is about to close.
    """
    own = torch.zeros(_SAYS_BYTES + 8 * world_size, dtype=torch.uint8)
    text = call.says.encode()[:_SAYS_BYTES]
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if call.rows_to is not None:
        own[_SAYS_BYTES:] = torch.tensor(call.rows_to, dtype=torch.int64).view(torch.uint8)
    every = gather_bytes(group, own, world_size)
    said = [row[:_SAYS_BYTES].numpy().tobytes().rstrip(b"\0").decode(errors="replace") for row in every]
    where = f"ranks of {name} are out of step at call {number}"
    if any(other != said[0] for other in said):
        if CLOSE in said and call.says != CLOSE:
            gone = said.index(CLOSE)
            raise PeerLost(f"{call.says}: rank {gone} has closed its communicator {name}", gone)
        listed = "; ".join(f"rank {other} called {what}" for other, what in enumerate(said))
        raise CollectiveMismatch(f"{where}: {listed}: every rank must call the same collectives in the same order")
    if call.rows_from is not None:
        sent = every[:, _SAYS_BYTES:].contiguous().view(torch.int64)[:, rank].tolist()
        for src, (rows, expected) in enumerate(zip(sent, call.rows_from, strict=True)):
            if rows != expected:
                raise CollectiveMismatch(
                    f"{where}: rank {src} sends {rows} rows to rank {rank}, which expects {expected}: output_rows must "
                    "say what the others send"
                )


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
