"""A device whose memory nobody can reach from the CPU: `python fake_device.py` runs every call of a communicator on it.

Uses PyTorch's own way to write a device in Python (2.9 and later, called experimental there). It registers the device
for the whole process, so test_tcp_engine.py runs this file in a process of its own. Prints "no such API" where it is
missing, and "ok".
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor

from smolcluster.collectives.base import ReduceOp
from smolcluster.collectives.codec import Bf16Codec
from smolcluster.collectives.groups import inproc_group
from smolcluster.collectives.plan import Plan
from smolcluster.collectives.tcp import TcpCommunicator

DEVICE = "fakedevice"


class DeviceTensor(Tensor):
    """A tensor of the device: its own storage is empty, the values lie in `memory`."""

    memory: Tensor

    @staticmethod
    def __new__(cls, memory: Tensor) -> DeviceTensor:
        tensor: Any = torch._C._acc.create_empty_tensor(memory.shape, memory.dtype)
        tensor.__class__ = DeviceTensor
        return tensor

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory


def register() -> object | None:
    """Make torch know the device; returns what must stay alive, None where torch has no such API."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except ImportError:
        return None
    _setup_privateuseone_for_python_backend(DEVICE)
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
              memory_format: Any = None) -> Tensor:  # fmt: skip
        return DeviceTensor(torch.empty(size, dtype=dtype or torch.float32))

    def copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        there = target.memory if isinstance(target, DeviceTensor) else target
        there.copy_((source.memory if isinstance(source, DeviceTensor) else source).view(there.shape))
        return target

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy, "PrivateUse1")
    library.impl("detach", lambda tensor: DeviceTensor(tensor.memory), "PrivateUse1")
    return library


def on_device(values: Tensor) -> Tensor:
    """A copy of CPU values on the device."""
    tensor = torch.empty(values.shape, dtype=values.dtype, device=DEVICE)
    tensor.copy_(values)
    return tensor


def read(tensor: Tensor) -> list[Any]:
    """The values of a tensor on the device."""
    assert tensor.device.type == DEVICE
    host = torch.empty(tensor.shape, dtype=tensor.dtype)
    host.copy_(tensor)
    return host.tolist()


def check(comm: TcpCommunicator) -> None:
    """Every call with device tensors on rank 0; rank 1 has CPU tensors, as a machine without a GPU."""
    rank, place = comm.rank, (on_device if comm.rank == 0 else Tensor.clone)

    def values(tensor: Tensor) -> list[Any]:
        return read(tensor) if rank == 0 else tensor.tolist()

    for count in (3, 1000):  # one round, and the ring
        for codec in (None, Bf16Codec()):
            tensor = place(torch.full((count,), rank + 1.0))
            work = comm.all_reduce(tensor, ReduceOp.AVG, codec)
            assert work.result()[0] is tensor
            assert values(tensor) == [1.5] * count
    output = place(torch.zeros(2))
    comm.reduce_scatter(output, place(torch.arange(4.0))).wait(10)
    assert values(output) == [[0.0, 2.0], [4.0, 6.0]][rank]
    output = place(torch.zeros(4, dtype=torch.int64))
    comm.all_gather(output, place(torch.tensor([rank, 7]))).wait(10)
    assert values(output) == [0, 7, 1, 7]
    for src in (0, 1):
        tensor = place(torch.full((5,), float(rank)))
        comm.broadcast(tensor, src).wait(10)
        assert values(tensor) == [float(src)] * 5
    output = place(torch.zeros(2, 2))
    comm.all_to_all(output, place(torch.tensor([[rank, 0.0], [rank, 1.0]]))).wait(10)
    assert values(output) == [[0.0, float(rank)], [1.0, float(rank)]]
    parts = comm.all_to_all_ragged([place(torch.full((src + 1,), float(rank))) for src in range(2)]).result()
    assert [part.tolist() for part in parts] == [[0.0] * (rank + 1), [1.0] * (rank + 1)]
    other = 1 - rank
    sent = comm.send(place(torch.tensor([[1.0, 2.0], [3.0, rank]])), other, 5)
    target = place(torch.zeros(2, 2))
    received = comm.recv(other, 5, out=target)
    assert received.result()[0] is target
    sent.wait(10)
    assert values(target) == [[1.0, 2.0], [3.0, float(other)]]


def main() -> int:
    library = register()
    if library is None:
        print("no such API")
        return 0
    comms = inproc_group(2, plan=Plan(one_round_bytes=64, chunk_bytes=256))
    errors: list[BaseException] = []

    def run(comm: TcpCommunicator) -> None:
        try:
            check(comm)
        except BaseException as exc:  # noqa: BLE001 - top of the thread: printed below, and the other rank is woken
            errors.append(exc)
            comm._world.report_lost(1 - comm.rank, "the check failed")

    threads = [threading.Thread(target=run, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for comm in comms:
        comm.close()
    if errors:
        raise errors[0]
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
