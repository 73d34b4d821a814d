"""Experts over three ranks learn what one process learns. The ranks are threads of this process.

    python examples/expert_load.py

Five experts do not divide by three: the ranks have 1, 2 and 2. Between machines the strategy is the same, with
`smol.connect()` as communicator; `smolcluster train --algorithm ep` is the whole loop.
"""

from __future__ import annotations

import torch

import smolcluster as smol
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.models.moe import MoE, MoEConfig
from smolcluster.training.step import StepResult

RANKS, STEPS, BATCH, TIME, VOCAB = 3, 20, 12, 16, 11
SIZES = MoEConfig(VOCAB, 16, 2, 2, 32, 0.0, TIME, num_experts=5, top_k=2, capacity_factor=1.0)


def main() -> None:
    """Train the same few steps alone and over three ranks."""
    tokens = torch.randint(VOCAB, (STEPS, BATCH, TIME + 1), generator=torch.Generator().manual_seed(7))
    optimizer = smol.optimizer_factory("adamw", lr=1e-2)

    def train(strategy: smol.Single | smol.ExpertParallel, rank: int, ranks: int) -> StepResult:
        own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        for step in range(STEPS):
            share = tokens[step][own]
            batch = smol.Batch(share[:, :-1], share[:, 1:], planned_count=BATCH * TIME)
            result = strategy.train_step([batch])
        assert result is not None
        return result

    def on_a_rank(comm: LocalCommunicator) -> StepResult:
        model = MoE(SIZES, seed=0)  # of which the strategy keeps this rank's experts, and all else
        return train(smol.ExpertParallel(model, optimizer, comm, precision="fp64"), comm.rank, comm.world_size)

    alone = train(smol.Single(MoE(SIZES, seed=0), optimizer, precision="fp64"), 0, 1)
    shared = LocalGroup(RANKS).run(on_a_rank)[0]
    for name, result in (("one process", alone), (f"{RANKS} ranks", shared)):
        metrics = result.metrics or {}
        print(
            f"{name:11}  loss {result.loss:.10f}  largest load {metrics['moe/expert_load_max']:.2f} of the even one, "
            f"{metrics['moe/dropped_tokens']:.0f} tokens dropped"
        )


if __name__ == "__main__":
    main()
