from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from smolcluster.data.datasets import Dataset as OwnDataset
from smolcluster.data.indexed import IndexedDataset
from smolcluster.data.source import MemoryData, TrainingData
from smolcluster.errors import CheckpointError, DataError
from smolcluster.kinds import JsonObject


class Samples(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def numbers_of(data: TrainingData, world_size: int, start: JsonObject | None, max_steps: int) -> list[list[int]]:
    """The samples' numbers by step, over all ranks."""
    by_rank = []
    for rank in range(world_size):
        with data.loader(rank, [1.0] * world_size, global_batch=8, seed=3, start=start, max_steps=max_steps) as loader:
            by_rank.append([[int(x) for batch in step for x in batch.inputs] for step in loader])
            assert loader.position() == {"step": max_steps, "samples": 30}
    return [sum(parts, []) for parts in zip(*by_rank, strict=True)]  # noqa: RUF017 - three short lists


def test_samples_do_not_depend_on_the_ranks_and_a_resume_goes_on() -> None:
    dataset = IndexedDataset(TensorDataset(torch.arange(30.0), torch.zeros(30)), num_classes=1)
    data: TrainingData = MemoryData(dataset, dataset)
    whole = numbers_of(data, 1, None, 7)
    assert data.steps_per_epoch(8) == 4
    assert sorted(number for step in whole[:4] for number in step) == list(range(30))
    assert numbers_of(data, 3, None, 3) + numbers_of(data, 2, {"step": 3, "samples": 30}, 7) == whole


def test_pairs_and_mappings_of_tensors_and_numbers_are_samples() -> None:
    pairs = IndexedDataset(Samples([(torch.tensor([1.0, 2.0]), 3), ([4.0, 5.0], torch.tensor(1))]), num_classes=4)
    assert (pairs.kind, pairs.num_classes, pairs.vocab_size, pairs.input_dim, len(pairs)) == ("classes", 4, None, 2, 2)
    inputs, targets = pairs.batch(torch.tensor([1, 0]))
    assert (inputs.tolist(), targets.tolist()) == ([[4.0, 5.0], [1.0, 2.0]], [1, 3])
    assert targets.dtype == torch.int64
    assert pairs.targets_per_sample(torch.tensor([1, 0, 1])) == 3
    mappings: OwnDataset = IndexedDataset(Samples([{"x": [1, 2], "y": [2, -100], "z": 0}]), keys=("x", "y"))
    assert (mappings.kind, mappings.input_dim) == ("text", 2)
    inputs, targets = mappings.batch(torch.tensor([0]))
    assert (inputs.tolist(), targets.tolist()) == ([[1, 2]], [[2, -100]])
    assert mappings.targets_per_sample(torch.tensor([0])) == 0  # unknown without making every rank's samples


def test_a_batch_without_samples_keeps_its_shape() -> None:
    dataset = IndexedDataset(TensorDataset(torch.zeros(3, 2, 2), torch.zeros(3, 5)))
    inputs, targets = dataset.batch(torch.empty(0, dtype=torch.int64))
    assert (inputs.shape, targets.shape) == ((0, 2, 2), (0, 5))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], r"dataset own has no samples"),
        ([{"input_ids": 1, "labels": 2}], r"sample 0 has the keys input_ids, labels, but not inputs, targets"),
        ([torch.zeros(2)], r"sample 0 is a Tensor\. Give pairs"),
        ([(1, 2, 3)], r"sample 0 is a tuple"),
        ([(1, 2.5)], r"the target of sample 0 is 2\.5\. Targets are classes or tokens: give whole numbers"),
    ],
)
def test_what_is_no_sample_is_an_error_that_says_what_is_wanted(samples: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        IndexedDataset(Samples(samples))


def test_samples_of_different_shapes_are_named() -> None:
    dataset = IndexedDataset(Samples([([1.0], 0), ([1.0, 2.0], 0)]))
    with pytest.raises(DataError, match=r"samples \[0, 1\] have different shapes"):
        dataset.batch(torch.tensor([0, 1]))


def test_a_position_of_streamed_data_is_refused() -> None:
    dataset = IndexedDataset(TensorDataset(torch.arange(30.0), torch.zeros(30)))
    for start in ({"step": -1, "samples": 30}, {"step": "1", "samples": 30}, {}, {"step": 1, "epoch": 0}):
        with pytest.raises(CheckpointError, match="no place in data in memory"):
            MemoryData(dataset, dataset).loader(0, [1.0], global_batch=1, seed=0, start=start)


def test_a_position_in_data_of_another_length_is_refused() -> None:
    dataset = IndexedDataset(TensorDataset(torch.arange(30.0), torch.zeros(30)))
    with pytest.raises(CheckpointError, match="has 30 samples, but the checkpoint was written with 31"):
        MemoryData(dataset, dataset).loader(0, [1.0], global_batch=8, seed=3, start={"step": 1, "samples": 31})
