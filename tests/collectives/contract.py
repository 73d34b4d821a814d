"""Runs the contract suite (test_contract_*.py) on every engine: N ranks as N threads of the test process.

An engine is a function world_size -> one connected communicator per rank. `tcp` and `gloo` use real sockets over
loopback, `shm` the tcp engine through shared memory, `inproc` over in-process channels, `local` no channel at all.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from collectives.gloo_threads import gloo_group
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.groups import inproc_group, tcp_group
from smolcluster.collectives.local import LocalGroup
from smolcluster.errors import CollectiveTimeout, PeerLost, SmolError

_FACTORIES: dict[str, Callable[[int], Sequence[Communicator]]] = {
    "local": lambda world_size: LocalGroup(world_size).communicators,
    "inproc": inproc_group,
    "tcp": tcp_group,
    "shm": partial(tcp_group, shared_memory=True),
    "gloo": gloo_group,
}
ENGINES = tuple(_FACTORIES)

# Every wait of the suite that ought to succeed uses it, so that a deadlock fails the test instead of hanging it.
PATIENCE = 20.0

RankFunction = Callable[[Communicator], Any]
RunRanks = Callable[..., list[Any]]


def open_group(engine: str, world_size: int) -> list[Communicator]:
    """One connected communicator per rank, in rank order."""
    return list(_FACTORIES[engine](world_size))


def run_group(comms: list[Communicator], fn: RankFunction, timeout: float = 60.0) -> list[Any]:
    """Run fn(comm) on one thread per rank, close all, and return the results in rank order.

    The first error that a rank raises aborts that rank's communicator, as a dying process would, and is raised here.
    """
    results: list[Any] = [None] * len(comms)
    errors: list[tuple[int, BaseException]] = []
    lock = threading.Lock()

    def rank_thread(rank: int, comm: Communicator) -> None:
        try:
            results[rank] = fn(comm)
        except BaseException as exc:  # noqa: BLE001 - top of the thread: stored, the others woken, raised by run_group
            with lock:
                errors.append((rank, exc))
            comm.abort(exc if isinstance(exc, SmolError) else PeerLost(f"rank {rank} failed: {exc!r}", rank))
        finally:
            comm.close()

    threads = [
        threading.Thread(target=rank_thread, args=(rank, comm), name=f"test-rank-{rank}", daemon=True)
        for rank, comm in enumerate(comms)
    ]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if stuck:
        faulthandler.dump_traceback(all_threads=True)
        for comm in comms:
            comm.abort(CollectiveTimeout(f"the test did not finish within {timeout} s"))
        for thread in threads:
            thread.join(5.0)
    if errors:
        raise errors[0][1]
    assert not stuck, f"{stuck} did not finish within {timeout} s; their stacks are on stderr"
    return results


def values(count: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    """Small whole numbers, different on every rank: sums of four are exact in every dtype, bfloat16 and uint8 too."""
    base = (torch.arange(count) * 7 + 3 * rank + 1) % 11
    if dtype == torch.bool:
        return base % 2 == 0
    if dtype.is_floating_point or dtype == torch.int64:
        base = base - 5
    return base.to(dtype)


def same_bits(tensors: list[torch.Tensor]) -> bool:
    """True if all tensors are equal in dtype, shape and every bit (so NaN equals NaN, and 0.0 is not -0.0)."""
    first = tensors[0]
    return all(t.dtype == first.dtype and t.shape == first.shape and raw_bytes(t) == raw_bytes(first) for t in tensors)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's own bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
