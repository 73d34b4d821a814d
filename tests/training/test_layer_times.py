"""Layers are timed as they are: on what the one before gives."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.stage import layers_of
from smolcluster.training.layer_times import measure_layers


class Sleeps(nn.Module):
    def __init__(self, seconds: float, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self._seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self._seconds)
        out: Tensor = self.linear(x)
        return out


def test_layers_that_change_the_shape_are_timed_one_by_one() -> None:
    model = nn.Sequential(Sleeps(0.01, 6, 4), Sleeps(0.04, 4, 8), nn.ReLU(inplace=True), Sleeps(0.02, 8, 3))
    before = [param.clone() for param in model.parameters()]
    times = measure_layers(model, layers_of(model), torch.randn(5, 6), "fp32", "cpu")
    assert len(times) == 6  # with an entry and an exit that are empty
    assert 0.009 < times[1] < times[4] < times[2]
    assert max(times[0], times[3], times[5]) < times[1]
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


def test_of_equal_blocks_the_first_is_timed() -> None:
    model = GPT(GPTConfig(300, 32, 4, 2, 64, 0.0, 8))
    times = measure_layers(model, layers_of(model), torch.zeros(2, 8, dtype=torch.int64), "fp64", "cpu")
    assert len(times) == 6
    assert len(set(times[1:5])) == 1
