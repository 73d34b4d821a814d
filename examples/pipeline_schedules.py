"""One model over three ranks, one batch after the other and as a pipeline. The ranks are threads of this process.

    python examples/pipeline_schedules.py

Every layer does nothing but wait for 3 ms, and 6 ms in backward, so what is left of the time is what each schedule
makes the ranks wait. Between machines the strategies are the same, with `smol.connect()` as communicator; in
`smolcluster train --algorithm mp_pipeline` there is the whole loop.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import smolcluster as smol
from smolcluster.collectives.local import LocalCommunicator, LocalGroup

RANKS, LAYERS, MICRO_BATCHES, STEPS = 3, 6, 6, 3
FORWARD_S = 0.003


class Slow(torch.autograd.Function):
    """Waits, in both directions."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        time.sleep(FORWARD_S)
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # torch declares more arguments
        time.sleep(2 * FORWARD_S)
        return grad.clone()


class SlowLayer(nn.Module):
    """A layer of 16 numbers that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        slow: Tensor = Slow.apply(x * self.scale)  # type: ignore[no-untyped-call]
        return slow


def main() -> None:
    """Train the same few steps in each way, and in one process."""
    samples = torch.randn(STEPS, 2 * MICRO_BATCHES, 16, generator=torch.Generator().manual_seed(7))
    classes = samples.argmax(dim=-1)
    optimizer = smol.optimizer_factory("sgd", lr=0.1)
    # Two layers each, which have no matrices to be judged by. Layer 0 is the entry and 7 the exit: here both are empty.
    pairs = [range(3), range(3, 5), range(5, 8)]

    def train(strategy: Any) -> tuple[float, float]:
        begin, loss = time.perf_counter(), 0.0
        for step in range(STEPS):
            parts = zip(samples[step].chunk(MICRO_BATCHES), classes[step].chunk(MICRO_BATCHES), strict=True)
            result = strategy.train_step([smol.Batch(inputs, targets) for inputs, targets in parts])
            loss = result.loss
        return loss, (time.perf_counter() - begin) / STEPS

    def on_a_rank(comm: LocalCommunicator, schedule: str | None) -> tuple[float, float]:
        model = nn.Sequential(*(SlowLayer() for _ in range(LAYERS)))
        if schedule is None:
            return train(smol.ModelParallel(model, optimizer, comm, split=pairs))
        return train(smol.Pipeline(model, optimizer, comm, split=pairs, schedule=schedule))

    loss, seconds = train(smol.Single(nn.Sequential(*(SlowLayer() for _ in range(LAYERS))), optimizer))
    print(f"one process     loss {loss:.6f}  {1000 * seconds:4.0f} ms a step")
    for name, schedule in (("mp", None), ("gpipe", "gpipe"), ("1f1b", "1f1b")):
        loss, seconds = LocalGroup(RANKS).run(lambda comm, schedule=schedule: on_a_rank(comm, schedule))[0]
        print(f"{RANKS} ranks, {name:5}  loss {loss:.6f}  {1000 * seconds:4.0f} ms a step")


if __name__ == "__main__":
    main()
