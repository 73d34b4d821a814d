"""Your own module, your own optimizer, your own DataLoader, in smolcluster's loop.

    python examples/custom_model.py

A module needs no base class. It maps inputs to logits, (batch, classes) or (batch, time, vocabulary); the loss is
cross-entropy over the targets. Batches are what a torch DataLoader gives: pairs (inputs, targets).

Under a launcher, as in classicdp_by_hand.py, every rank takes its rows of each batch and the numbers stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import smolcluster as smol

Pair = tuple[Tensor, Tensor]


class Echo(nn.Module):
    """Reads letters and says the one that it read two letters ago."""

    def __init__(self, letters: int = 6, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, letters)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, T, letters) of letters (B, T)."""
        logits: Tensor = self.out(self.gru(self.embedding(inputs))[0])
        return logits


def sequences(count: int, seed: int) -> TensorDataset:
    """Inputs and targets, (count, 12) each; -100 where nothing is to be predicted."""
    inputs = torch.randint(6, (count, 12), generator=torch.Generator().manual_seed(seed))
    targets = torch.full_like(inputs, -100)
    targets[:, 2:] = inputs[:, :-2]
    return TensorDataset(inputs, targets)


def adam(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Any function from parameters to an optimizer will do."""
    return torch.optim.Adam(params, lr=1e-2)


def rows_of(rank: int, world_size: int, batches: Iterable[Pair]) -> Iterator[Pair]:
    """One rank's rows of every batch; perhaps none of a short one."""
    for inputs, targets in batches:
        yield inputs[rank::world_size], targets[rank::world_size]


def main() -> None:
    """Train it, and evaluate it on sequences that it has not seen."""
    comm = smol.connect()
    torch.manual_seed(0)
    strategy = smol.ClassicDP(Echo(), adam, comm, grad_clip_norm=1.0)

    mine = comm.rank, comm.world_size
    train = DataLoader(sequences(3200, seed=1), batch_size=32)
    held_out = DataLoader(sequences(500, seed=2), batch_size=100)
    trainer = smol.Trainer(
        strategy,
        rows_of(*mine, train),
        steps=100,
        eval_batches=lambda: [smol.Batch(*pair) for pair in rows_of(*mine, held_out)],
    )
    result = trainer.run(comm=comm)
    if comm.rank == 0:
        print(f"{result.steps} steps, {result.samples} samples: training loss {result.train_loss:.4f}")
        print(f"held-out loss {result.val_loss:.4f}, {100 * result.val_accuracy:.1f} % of the letters are right")
    comm.close()


if __name__ == "__main__":
    main()
