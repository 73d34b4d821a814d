"""The torch.distributed engine with several ranks in one process: each thread opens a gloo group of its own."""

from __future__ import annotations

import threading

import torch.distributed as dist

from smolcluster.collectives.base import Communicator
from smolcluster.collectives.torch_dist import TorchCommunicator


def gloo_group(world_size: int, timeout: float = 60.0) -> list[Communicator]:
    """One connected TorchCommunicator per rank, over loopback, in rank order."""
    store = dist.HashStore()
    comms: dict[int, Communicator] = {}
    errors: list[BaseException] = []

    def connect(rank: int) -> None:
        try:
            comms[rank] = TorchCommunicator(store, rank, world_size, timeout=timeout)
        except BaseException as exc:  # noqa: BLE001 - top of the thread, raised below
            errors.append(exc)

    threads = [
        threading.Thread(target=connect, args=(rank,), name=f"gloo-connect-{rank}") for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [comms[rank] for rank in range(world_size)]
