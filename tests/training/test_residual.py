"""What int8 gradients have lost, through a checkpoint and to other numbers of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from smolcluster.checkpoint.ranks import SharedReader, save_from_all_ranks
from smolcluster.checkpoint.store import open_checkpoint
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.training.residual import load_residuals, residual_state

NAMES = ["weight", "bias", "scale"]
SHAPES = [(3, 5), (7,), ()]


def of_rank(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def save(folder: Path, world_size: int, names: list[str] = NAMES) -> None:
    def rank(comm: LocalCommunicator) -> None:
        shards = residual_state(of_rank(comm.rank)[: len(names)], names, comm.rank, comm.world_size)
        save_from_all_ranks(comm, folder if comm.rank == 0 else None, 1, shards, {})

    LocalGroup(world_size).run(rank)


def load(folder: Path, world_size: int) -> list[list[Tensor]]:
    def rank(comm: LocalCommunicator) -> list[Tensor]:
        reader = SharedReader.open(comm, open_checkpoint(folder) if comm.rank == 0 else None)
        assert reader is not None
        residuals = [torch.zeros(shape) for shape in SHAPES]
        load_residuals(reader, residuals, NAMES, comm.rank, comm.world_size)
        return residuals

    return LocalGroup(world_size).run(rank)


def test_as_many_ranks_get_their_own_back_to_the_bit(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for rank, residuals in enumerate(load(tmp_path, 3)):
        assert all(torch.equal(mine, own) for mine, own in zip(residuals, of_rank(rank), strict=True))


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (4, 1)])
def test_for_another_number_of_ranks_the_sum_stays(before: int, after: int, tmp_path: Path) -> None:
    save(tmp_path, before)
    ranks = load(tmp_path, after)
    for index in range(len(NAMES)):
        expected = torch.stack([of_rank(rank)[index] for rank in range(before)]).sum(0)
        # float32, up to four numbers of up to 4 in another order
        torch.testing.assert_close(torch.stack([rank[index] for rank in ranks]).sum(0), expected, rtol=0, atol=2e-6)


def test_parameters_of_which_nothing_is_stored_begin_with_nothing(tmp_path: Path) -> None:
    save(tmp_path, 2, NAMES[:1])
    for residuals in load(tmp_path, 2):
        assert bool(residuals[0].any())
        assert not any(bool(residual.any()) for residual in residuals[1:])


def test_without_int8_nothing_is_stored_and_what_is_stored_is_left_out(tmp_path: Path) -> None:
    assert residual_state([], NAMES, 0, 2) == {}
    save(tmp_path, 2)

    def rank(comm: LocalCommunicator) -> None:
        reader = SharedReader.open(comm, open_checkpoint(tmp_path) if comm.rank == 0 else None)
        assert reader is not None
        load_residuals(reader, [], NAMES, comm.rank, comm.world_size)

    LocalGroup(2).run(rank)
