"""What a collective algorithm (ring.py, mesh.py) sees of the network: send, and wait for what was sent.

An algorithm is a generator. It queues sends, and yields the arrivals that it needs before it can go on:

    wire.send(right, chunks[0])
    yield [wire.expect(left, into=chunks[1], op=ReduceOp.SUM)]
    wire.send(right, chunks[1])

The communicator's loop (progress.py) runs many such generators at once, one for each piece of a tensor, on one thread,
so that sending, receiving and adding overlap. A sent tensor may not be changed before the receiver must have it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from smolcluster.collectives.base import ReduceOp


class Arrival:
    """A payload that is expected from one rank: received straight into `into` (flat, contiguous, CPU), or added."""

    __slots__ = ("hop", "into", "nbytes", "op", "src")

    def __init__(
        self, src: int, into: Tensor | None, hop: int, op: ReduceOp | None = None, nbytes: int | None = None
    ) -> None:
        self.src = src
        self.into = into  # None: allocated from the frame's own shape, or a swap's
        self.hop = hop
        self.op = op  # combine what arrives with `into`, instead of overwriting it
        self.nbytes = into.nbytes if into is not None else nbytes  # None: what comes


Steps = Generator[Sequence[Arrival], None, None]


class Wire(Protocol):
    """The network for one piece of one collective."""

    rank: int
    world_size: int

    def send(self, dst: int, data: Tensor) -> None:
        """Queue a contiguous CPU tensor for `dst`; returns at once."""
        ...

    def expect(self, src: int, into: Tensor | None, op: ReduceOp | None = None) -> Arrival:
        """Say where the next payload from `src` belongs; with `op` it is combined with what stands there."""
        ...


def combine(target: Tensor, incoming: Tensor, op: ReduceOp) -> None:
    """target = target (op) incoming, in place. AVG adds here and divides once, at the end."""
    if op == ReduceOp.MAX:
        torch.maximum(target, incoming, out=target)
    else:
        target.add_(incoming)


def finish_average(target: Tensor, op: ReduceOp, world_size: int) -> None:
    """The division of AVG, in place."""
    if op == ReduceOp.AVG:
        target.div_(world_size)
