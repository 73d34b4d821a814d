"""Where a model is cut."""

from __future__ import annotations

import itertools
import random

import pytest

from smolcluster.errors import ConfigError
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.split import layer_costs, needed_room, split_by_blocks, split_by_cost
from smolcluster.models.stage import Layers, layers_of


def brute_force(times: list[list[float]], parameters: list[int], limits: list[float]) -> float | None:
    stages, layers = len(times), len(parameters)
    best = None
    for inner in itertools.combinations(range(1, layers), stages - 1):
        cuts = [0, *inner, layers]
        spans = [range(a, b) for a, b in itertools.pairwise(cuts)]
        if any(sum(parameters[layer] for layer in span) > limits[n] for n, span in enumerate(spans)):
            continue
        slowest = max(sum(times[n][layer] for layer in span) for n, span in enumerate(spans))
        best = slowest if best is None else min(best, slowest)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_split_is_the_best_one(seed: int) -> None:
    rng = random.Random(seed)
    stages, layers = rng.randint(1, 4), rng.randint(4, 9)
    times = [[rng.random() for _ in range(layers)] for _ in range(stages)]
    parameters = [rng.randint(1, 9) for _ in range(layers)]
    limits = [float(rng.randint(5, 40)) for _ in range(stages)]
    expected = brute_force(times, parameters, limits)
    if expected is None:
        with pytest.raises(ConfigError, match="does not fit"):
            split_by_cost(times, parameters, limits)
        return
    split = split_by_cost(times, parameters, limits)
    assert [layer for part in split for layer in part] == list(range(layers))
    assert all(sum(parameters[layer] for layer in part) <= limits[n] for n, part in enumerate(split))
    slowest = max(sum(times[n][layer] for layer in part) for n, part in enumerate(split))
    assert slowest == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(40))
def test_the_room_that_is_needed_is_the_least_with_which_a_split_exists(seed: int) -> None:
    rng = random.Random(seed)
    stages, layers = rng.randint(1, 4), rng.randint(4, 9)
    parameters = [rng.randint(0, 9) for _ in range(layers)]
    limits = [float(rng.randint(1, 9)) for _ in range(stages)]
    factor = needed_room(parameters, limits)
    times = [[1.0] * layers] * stages
    assert brute_force(times, parameters, [limit * factor * (1 + 1e-9) for limit in limits]) is not None
    assert brute_force(times, parameters, [limit * factor * (1 - 1e-9) for limit in limits]) is None


def test_a_large_head_makes_the_last_stage_shorter() -> None:
    """GPT-2's sizes over three equal ranks: the head is as much work as five blocks."""
    model = GPT(GPTConfig(50257, 768, 12, 12, 3072, 0.0, 16), seed=0)
    layers = layers_of(model)
    costs = layer_costs(model, layers)
    split = split_by_cost([[cost.time for cost in costs]] * 3, [cost.parameters for cost in costs])
    blocks = [sum(0 < layer <= 12 for layer in part) for part in split]
    assert blocks == [6, 6, 0]


def test_a_slow_rank_gets_fewer_layers() -> None:
    times = [[1.0] * 10, [4.0] * 10]
    assert [len(part) for part in split_by_cost(times, [1] * 10)] == [8, 2]


def test_blocks_as_they_are_given() -> None:
    layers = Layers(("e",), tuple("abcdefg"), ("n",))
    assert split_by_blocks([4, 2, 1], layers) == [range(5), range(5, 7), range(7, 9)]
    assert split_by_blocks([4, 3], layers, 2) == [range(3), range(3, 5), range(5, 7), range(7, 9)]
    with pytest.raises(ConfigError, match="add up to 7"):
        split_by_blocks([4, 2, 2], layers)
    with pytest.raises(ConfigError, match="2 layers at least"):
        split_by_blocks([6, 1], layers, 2)


def test_too_few_layers() -> None:
    with pytest.raises(ConfigError, match="fewer ranks"):
        split_by_cost([[1.0] * 2] * 3, [1] * 2)
