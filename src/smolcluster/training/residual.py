"""What int8 gradients have lost so far, in a checkpoint: `residual/<parameter>`, one row for each rank.

Only the sum over the ranks counts: it is what the coming results make up for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from smolcluster.checkpoint.state import Shard, StateReader


def residual_state(residuals: Sequence[Tensor], names: Sequence[str], rank: int, world_size: int) -> dict[str, Shard]:
    """This rank's rows. Shares memory with `residuals`, which are those of GradientBuckets; perhaps none."""
    return {
        f"residual/{name}": Shard(residual.view(-1), "residual", (world_size, *residual.shape), rank * residual.numel())
        for name, residual in zip(names if residuals else (), residuals, strict=True)
    }


def load_residuals(
    reader: StateReader, residuals: Sequence[Tensor], names: Sequence[str], rank: int, world_size: int
) -> None:
    """Fill `residuals` from a checkpoint, in place, so that their sum over all ranks is the stored one's.

    With as many ranks as before each gets its own row back, with another number rank 0 gets the sum. Parameters of
    which the checkpoint has nothing keep what they have. Every rank calls it alike.
    """
    stored = set(reader.names("residual/"))
    for name, residual in zip(names if residuals else (), residuals, strict=True):
        row, count = residual.view(-1), residual.numel()
        if f"residual/{name}" not in stored:
            continue
        rows = reader.shape(f"residual/{name}")[0]
        if rows == world_size:
            row.copy_(reader.read_slice(f"residual/{name}", rank * count, count))
            continue
        for number in range(rows):  # row by row: all of them may be more than fits into memory
            wanted = count if rank == 0 else 0
            row[:wanted].add_(reader.read_slice(f"residual/{name}", number * count, wanted))
