"""One rank of test_torch_dist's jobs, as a process: python torch_dist_rank.py SCENARIO RANK WORLD_SIZE INIT_METHOD.

Prints one JSON line with what it saw.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

from smolcluster.collectives.base import ReduceOp
from smolcluster.collectives.torch_dist import TorchCommunicator, init_torch_dist
from smolcluster.errors import PeerLost, SmolError

PATIENCE = 20.0


def collectives(comm: TorchCommunicator) -> dict[str, Any]:
    """A few calls of every kind."""
    tensor = torch.full((1000,), float(comm.rank + 1))
    comm.all_reduce(tensor, ReduceOp.AVG).wait(PATIENCE)
    lane = comm.split([1, 0], "lane")
    assert lane is not None
    gathered = torch.empty(2, dtype=torch.int64)
    lane.all_gather(gathered, torch.tensor([comm.rank])).wait(PATIENCE)
    peer = 1 - comm.rank
    work = comm.send(torch.full((300_000,), comm.rank), peer, 3)
    received = comm.recv(peer, 3).result()[0]
    work.wait(PATIENCE)
    messages = comm.exchange({"rank": comm.rank}, PATIENCE)
    comm.close()
    return {
        "average": tensor.tolist()[::999],
        "gathered": gathered.tolist(),
        "received": [received.sum().item(), str(received.dtype)],
        "messages": messages,
    }


def death(comm: TorchCommunicator) -> dict[str, Any]:
    """Rank 1 dies while rank 0 waits for it."""
    comm.barrier(PATIENCE)
    if comm.rank == 1:
        os._exit(9)
    work = comm.all_reduce(torch.ones(10))
    started = time.monotonic()
    try:
        work.wait(PATIENCE)
    except PeerLost as exc:
        return {"error": str(exc), "seconds": time.monotonic() - started}
    return {"error": ""}


def abort(comm: TorchCommunicator) -> dict[str, Any]:
    """Rank 0 gives up; both end at once, though rank 1 waits for a collective and a message."""
    if comm.rank == 0:
        comm.recv(1, 7).wait(PATIENCE)
        comm.abort(PeerLost("rank 1 was silent", 1))
        return {"error": "own"}
    message = comm.recv(0, 1)
    work = comm.all_reduce(torch.ones(10))
    comm.send(torch.ones(1), 0, 7).wait(PATIENCE)
    errors = []
    for pending in (work, message):
        try:
            pending.wait(PATIENCE)
        except SmolError as exc:
            errors.append(type(exc).__name__)
    return {"error": errors}


def main() -> None:
    """Run the scenario and leave without closing, as a program that fails does."""
    scenario, rank, world_size, init_method = sys.argv[1:]
    torch.set_num_threads(1)
    comm = init_torch_dist("gloo", int(rank), int(world_size), init_method)
    report = {"collectives": collectives, "death": death, "abort": abort}[scenario](comm)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
