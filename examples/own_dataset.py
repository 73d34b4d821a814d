"""Your own torch Dataset, dealt to the ranks: the same samples in every step however many there are, and a resume.

    python examples/own_dataset.py

A map-style dataset has a length and gives sample i; `IndexedDataset` takes pairs (input, target) or dictionaries. The
loader then decides which rank computes which samples, so a run over four machines sees what a run on one sees.

(An iterable that only gives batches, such as a DataLoader, can be handed to the Trainer as it is: custom_model.py.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import smolcluster as smol
from smolcluster.data.indexed import IndexedDataset
from smolcluster.data.loader import eval_batches
from smolcluster.data.source import MemoryData


class Angles(Dataset[dict[str, Tensor]]):
    """Points of the plane, and which of eight sectors they lie in; made when they are asked for."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        point = torch.randn(2, generator=torch.Generator().manual_seed(self.seed * self.count + index))
        angle = torch.atan2(point[1], point[0]) + torch.pi
        return {"point": point, "sector": (angle / (2 * torch.pi) * 8).long().clamp(max=7)}


def main() -> None:
    """Train 120 steps in two parts, as if the run had been interrupted after the first."""
    comm = smol.connect()
    keys = ("point", "sector")
    data = MemoryData(
        train=IndexedDataset(Angles(2000, seed=1), keys=keys, num_classes=8),
        validation=IndexedDataset(Angles(500, seed=2), keys=keys, num_classes=8),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 8))
    strategy = smol.ClassicDP(model, smol.optimizer_factory("adamw", 1e-2, 0.0), comm)
    position = None
    for steps in (60, 60):
        loader = data.loader(comm.rank, [1.0] * comm.world_size, global_batch=64, seed=0, start=position)
        with loader:
            trainer = smol.Trainer(
                strategy,
                loader,
                steps,
                eval_batches=lambda: eval_batches(data.validation, 100, comm.rank, comm.world_size),
            )
            result = trainer.run(comm=comm)
            position = loader.position()
        if comm.rank == 0:
            right = 100 * result.val_accuracy
            print(f"at step {position['step']}: loss {result.val_loss:.4f}, {right:.1f} % of the sectors are right")
    comm.close()


if __name__ == "__main__":
    main()
