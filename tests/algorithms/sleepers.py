"""A pipeline whose stages sleep instead of computing: what is left of a step's time is waiting and our own overhead."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collectives.contract import open_group, run_group
from smolcluster.algorithms.pipeline import Pipeline
from smolcluster.collectives.base import Communicator
from smolcluster.data.batch import Batch
from smolcluster.kinds import PipelineSchedule
from smolcluster.training.optim import optimizer_factory

CLASSES, SAMPLES = 4, 2
# A step is longer by what messages and Python cost, about 1 ms per micro-batch and stage when others use the machine
# too. So that this is little beside the bubble, which is P - 1 sleeps, these grow with the number of passes.
_SECONDS_PER_PASS = 0.02
_SHORTEST = 0.06


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: float, backward: float) -> Tensor:
        time.sleep(forward)
        ctx.seconds, ctx.like = backward, weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return grad, torch.ones_like(ctx.like), None, None


class Sleeper(nn.Module):
    """A layer that sleeps, and passes on what it is given."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # without one the first stage would have no backward
        self._seconds = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self.weight, *self._seconds)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Cell:
    """What is measured: a schedule for P, M and V, with sleeps so many times as long as the shortest sensible ones."""

    schedule: PipelineSchedule
    ranks: int
    micro_batches: int
    stages_per_rank: int = 1
    longer: float = 1.0

    @property
    def ideal(self) -> float:
        """The bubble that there has to be."""
        return (self.ranks - 1) / (self.stages_per_rank * self.micro_batches + self.ranks - 1)

    @property
    def sleeps(self) -> tuple[float, float]:
        """Seconds of a stage's forward and of its backward, which takes twice as long."""
        passes = self.micro_batches * self.stages_per_rank
        both = self.longer * max(_SHORTEST, _SECONDS_PER_PASS * passes / max(self.ranks - 1, 1))
        return both / 3, both * 2 / 3

    @property
    def work(self) -> float:
        """Seconds that a rank computes in a step."""
        return self.micro_batches * self.stages_per_rank * sum(self.sleeps)


def calibrate(cell: Cell, engine: str = "tcp") -> float:
    """Seconds that a pass takes longer than its sleep where nobody waits: as many of them on one rank."""
    passes = cell.micro_batches * cell.stages_per_rank
    [seconds] = _run(Cell("1f1b", 1, passes), cell.sleeps, 1, engine)
    return (seconds - cell.work) / (2 * passes)


def measure(cell: Cell, late: float, steps: int, engine: str = "tcp") -> list[float]:
    """The bubble of each of some steps: the part of the time, until the last rank is done, in which a rank waits.

    Args:
        cell: what to measure.
        late: from `calibrate`; sleeps are shorter by it.
        steps: how many.
        engine: of collectives.contract.
    """
    forward, backward = cell.sleeps
    return [1 - cell.work / seconds for seconds in _run(cell, (forward - late, backward - late), steps, engine)]


def _run(cell: Cell, sleeps: tuple[float, float], steps: int, engine: str) -> list[float]:
    """How long each step takes, from a barrier until the last rank is done; a small one goes before them."""
    stages = cell.ranks * cell.stages_per_rank

    def train(comm: Communicator) -> list[float]:
        model = nn.Sequential(*(Sleeper(*sleeps) for _ in range(stages)))
        # The first and the last layer of a Sequential are its entry and exit, which have no modules.
        split = [range(s + (s > 0), s + 2 + (s == stages - 1)) for s in range(stages)]
        strategy = Pipeline(model, optimizer_factory("sgd", 0.0), comm, split=split, schedule=cell.schedule)
        batch = Batch(torch.zeros(SAMPLES, CLASSES), torch.zeros(SAMPLES, dtype=torch.int64))
        seconds = []
        strategy.train_step([batch])
        for _ in range(steps):
            comm.barrier()
            start = time.perf_counter()
            strategy.train_step([batch] * cell.micro_batches)
            seconds.append(time.perf_counter() - start)
        return seconds

    of_ranks = run_group(open_group(engine, cell.ranks), train, timeout=600)
    return [max(of_step) for of_step in zip(*of_ranks, strict=True)]
