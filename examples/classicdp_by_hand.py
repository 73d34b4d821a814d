"""Data parallelism through the Python interface, without the command line's loop.

One process:

    python examples/classicdp_by_hand.py

Two processes, here started by torchrun; Slurm, or a shell that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT,
does as well. The ranks meet over smolcluster's own TCP transport, so they need a cluster token:

    export SMOLCLUSTER_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
    torchrun --nproc-per-node 2 examples/classicdp_by_hand.py

Both print the same losses: every rank computes its part of the same 32 samples.
"""

from __future__ import annotations

import torch
from torch import nn

import smolcluster as smol

STEPS = 30
GLOBAL_BATCH = 32


def main() -> None:
    """Train a small network on points in a plane: is a point inside the circle or outside?"""
    comm = smol.connect()  # the launcher's job, or world size 1

    # Each rank may build what it likes: rank 0's weights are broadcast before the first step.
    torch.manual_seed(comm.rank)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    strategy = smol.ClassicDP(
        model,
        smol.optimizer_factory("adamw", lr=1e-2),
        comm,
        staleness_bound=0,
        compression="none",
        grad_clip_norm=1.0,
    )

    points = torch.rand(4096, 2, generator=torch.Generator().manual_seed(7)) * 2 - 1
    inside = (points.square().sum(dim=1) < 2 / torch.pi).long()  # half of the square

    for step in range(STEPS):
        rows = slice(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        share = slice(comm.rank, None, comm.world_size)  # every rank takes other rows of the same batch
        # planned_count: targets of the whole step, over all ranks. With it, ranks may have unequal parts.
        batch = smol.Batch(points[rows][share], inside[rows][share], planned_count=GLOBAL_BATCH)
        result = strategy.train_step([batch])
        if result is not None and comm.rank == 0 and step % 10 == 9:
            print(f"step {result.step + 1:2}  loss {result.loss:.4f}  over {result.samples} samples")

    strategy.finish()  # applies what staleness_bound > 0 has left
    sums = strategy.eval_step(smol.Batch(points[-1000:], inside[-1000:]))
    if comm.rank == 0:
        print(f"{sums.correct} of {sums.count} points that it has not seen are right")
    comm.close()


if __name__ == "__main__":
    main()
