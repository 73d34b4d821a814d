"""The four ZeRO stages side by side: the same losses, less and less memory. Three ranks as threads of this process.

    python examples/fsdp_memory.py

Between machines the strategy is the same, with `smol.connect()` as communicator; `smolcluster train --algorithm fsdp`
is the whole loop.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import smolcluster as smol
from smolcluster.collectives.local import LocalCommunicator, LocalGroup

RANKS = 3
STEPS = 5


class Deep(nn.Module):
    """Eight equal layers. What lies in a list is a unit: stage 3 gathers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(8))
        self.out = nn.Linear(128, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        out: Tensor = self.out(x)
        return out


def main() -> None:
    """Train the same few steps in each stage."""
    generator = torch.Generator().manual_seed(7)
    samples = torch.randn(STEPS, 30, 128, generator=generator)
    classes = (samples[..., 0] > 0).long()
    torch.manual_seed(0)
    initial = Deep()

    def train(comm: LocalCommunicator, stage: int) -> tuple[float, tuple[int, int, int]]:
        model = copy.deepcopy(initial)  # of which the strategy keeps what the stage leaves it
        optimizer = smol.optimizer_factory("adamw", lr=1e-3)
        strategy = smol.FSDP(model, optimizer, comm, stage=stage, grad_clip_norm=1.0, bucket_bytes=1 << 16)
        loss = 0.0
        for step in range(STEPS):
            share = slice(comm.rank, None, comm.world_size)
            batch = smol.Batch(samples[step][share], classes[step][share], planned_count=30)
            result = strategy.train_step([batch])
            loss = result.loss if result is not None else loss
        strategy.finish()
        return loss, strategy.held_bytes()

    for stage in range(4):
        loss, held = LocalGroup(RANKS).run(lambda comm, stage=stage: train(comm, stage))[0]
        parameters, gradients, optimizer = (nbytes / 1024 for nbytes in held)
        print(
            f"stage {stage}  loss {loss:.4f}  parameters {parameters:4.0f} KiB  gradients {gradients:4.0f} KiB  "
            f"optimizer {optimizer:5.0f} KiB"
        )


if __name__ == "__main__":
    main()
