"""A pipeline whose stages sleep instead of computing: what is left of a step's time is waiting and our own overhead."""

from __future__ import annotations

import statistics
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


def sleep_overshoot() -> float:
    """By how many seconds `time.sleep` comes back late here: the median of some."""
    late = []
    for _ in range(41):
        start = time.perf_counter()
        time.sleep(0.005)
        late.append(time.perf_counter() - start - 0.005)
    return statistics.median(late)


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
    """What is measured: P, M, V, and seconds of a rank's forward and backward of a micro-batch, over all its stages."""

    schedule: PipelineSchedule
    ranks: int
    micro_batches: int
    stages_per_rank: int = 1
    forward: float = 0.01
    backward: float = 0.02

    @property
    def ideal(self) -> float:
        """The bubble that there has to be."""
        return (self.ranks - 1) / (self.stages_per_rank * self.micro_batches + self.ranks - 1)

    @property
    def work(self) -> float:
        """Seconds that a rank computes in a step."""
        return self.micro_batches * (self.forward + self.backward)


def step_seconds(cell: Cell, steps: int, engine: str = "tcp") -> list[float]:
    """How long each of some steps takes, from a barrier until the last rank is done; one more goes before them."""
    stages = cell.ranks * cell.stages_per_rank
    late = sleep_overshoot()
    forward, backward = (s / cell.stages_per_rank - late for s in (cell.forward, cell.backward))

    def train(comm: Communicator) -> list[float]:
        torch.set_num_threads(1)
        model = nn.Sequential(*(Sleeper(forward, backward) for _ in range(stages)))
        # Layer 0 of a Sequential is an entry without modules, the last an exit without.
        split = [range(s + (s > 0), s + 2 + (s == stages - 1)) for s in range(stages)]
        strategy = Pipeline(model, optimizer_factory("sgd", 0.0), comm, split=split, schedule=cell.schedule)
        batches = [Batch(torch.zeros(SAMPLES, CLASSES), torch.zeros(SAMPLES, dtype=torch.int64))] * cell.micro_batches
        seconds = []
        for _ in range(1 + steps):
            comm.barrier()
            start = time.perf_counter()
            strategy.train_step(batches)
            seconds.append(time.perf_counter() - start)
        strategy.finish()
        return seconds[1:]

    of_ranks = run_group(open_group(engine, cell.ranks), train)
    return [max(of_step) for of_step in zip(*of_ranks, strict=True)]


def bubbles(cell: Cell, steps: int, engine: str = "tcp") -> list[float]:
    """The measured bubble of each step: the part of its time in which a rank does not compute."""
    return [1 - cell.work / seconds for seconds in step_seconds(cell, steps, engine)]
