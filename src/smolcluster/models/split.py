"""Where a model is cut into stages: so that no stage takes longer than it must, and none needs more memory than it has.

A layer's time is taken as proportional to the multiplications of parameters that it makes per token: a matrix counts
with its size, an embedding that is only looked up in does not, the same matrix as a head does. That is what differs
between the layers of a transformer on texts of one length. It does not see what attention multiplies with each other,
nor at how many positions a convolution applies its weights. What layers really take can be measured instead
(training/layer_times.py). A split is found exactly, by dynamic programming over (stages, layers).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from smolcluster.errors import ConfigError
from smolcluster.models.stage import Layers, layer_parameters

# Modules that multiply their whole weight with each token; Conv1D is transformers' own name of a linear layer.
_MATRIX_CLASSES = ("Linear", "Conv1D")


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        time: forward and backward of a token, in any unit.
        parameters: how many numbers it has; tied ones in each layer that uses them.
    """

    time: float
    parameters: int


def layer_costs(model: nn.Module, layers: Layers) -> list[LayerCost]:
    """The costs of a model's layers, by the sizes of their matrices; parameters may be on the meta device.

    A convolution counts as if it were applied at one position: in a model whose images become smaller from layer to
    layer the first ones take longer than this says, so measure those.
    """
    costs = []
    for layer in range(len(layers)):
        parameters = sum(param.numel() for param in layer_parameters(model, layers, layer).values())
        is_head = layer == len(layers) - 1
        products = sum(_products(model.get_submodule(name), is_head=is_head) for name in layers.modules(layer))
        # What is no matrix is read once: a norm counts a little, an embedding as next to nothing.
        costs.append(LayerCost(products or 1.0, parameters))
    return costs


def _products(module: nn.Module, *, is_head: bool) -> float:
    total = 0.0
    for part in module.modules():
        if type(part).__name__ in _MATRIX_CLASSES or (is_head and isinstance(part, nn.Embedding)):
            total += sum(param.numel() for param in part.parameters(recurse=False))
        elif isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            total += part.weight.numel()
    return total


def split_by_cost(
    times: Sequence[Sequence[float]],
    parameters: Sequence[int],
    limits: Sequence[float] | None = None,
    *,
    stages_per_rank: int = 1,
) -> list[range]:
    """Cut layers into one run for each stage, so that the slowest takes as little time as possible.

    Args:
        times: for each stage the time that each layer takes there; stages may lie on machines of different speed.
        parameters: how many numbers each layer has.
        limits: how many numbers each stage has room for; None: any.
        stages_per_rank: V, for what an error advises.

    Returns:
        The layers of each stage, at least one each. Of several such splits the one whose stages are most alike.

    Raises:
        ConfigError: there are fewer layers than stages, or not enough room.
    """
    stages, layers = len(times), len(parameters)
    if layers < stages:
        fewer = f"training.stages_per_rank below {stages_per_rank}, " if stages_per_rank > 1 else ""
        raise ConfigError(
            f"the model has {layers} layers, its entry and exit among them, which is too few for {stages} stages. Take "
            f"fewer ranks, {fewer}or a model with more layers"
        )
    room = limits or [math.inf] * stages
    # best[l] after s stages: (slowest, sum of squares, where the last stage begins) for the first l layers.
    best: list[list[tuple[float, float, int]]] = [[(0.0, 0.0, 0), *[(math.inf, math.inf, 0)] * layers]]
    for stage in range(stages):
        row = [(math.inf, math.inf, 0)] * (layers + 1)
        for end in range(stage + 1, layers + 1):
            time, held = 0.0, 0
            for begin in range(end - 1, stage - 1, -1):
                time += times[stage][begin]
                held += parameters[begin]
                if held > room[stage]:
                    break
                slowest, squares, _ = best[-1][begin]
                row[end] = min(row[end], (max(slowest, time), squares + time * time, begin))
        best.append(row)
    if math.isinf(best[-1][layers][0]):
        raise ConfigError(
            f"the model does not fit: it has {sum(parameters):,} parameters, and its {stages} stages have room for "
            f"{', '.join(f'{limit:,.0f}' for limit in room)}. Take more ranks, more memory or a smaller model"
        )
    cuts = [layers]
    for row in reversed(best[1:]):
        cuts.append(row[cuts[-1]][2])
    cuts.reverse()
    return [range(begin, end) for begin, end in itertools.pairwise(cuts)]


def needed_room(parameters: Sequence[int], limits: Sequence[float], *, stages_per_rank: int = 1) -> float:
    """The smallest number that all limits have to be multiplied with so that a split exists; 1 or less: it does.

    Args:
        parameters: how many numbers each layer has.
        limits: how many each stage has room for; more than 0.
        stages_per_rank: V, for what an error advises.

    Raises:
        ConfigError: there are fewer layers than stages.
    """
    # A split by time, where a stage takes as long as it is full.
    shares = [[held / limit for held in parameters] for limit in limits]
    split = split_by_cost(shares, parameters, stages_per_rank=stages_per_rank)
    return max(sum(parameters[layer] for layer in part) / limit for part, limit in zip(split, limits, strict=True))


def split_by_blocks(blocks: Sequence[int], layers: Layers, stages_per_rank: int = 1) -> list[range]:
    """Cut layers so that each rank has a given number of blocks; the first has the entry besides, the last the exit.

    Args:
        blocks: for each rank, in order.
        layers: the model's.
        stages_per_rank: V; each rank's blocks are divided among its stages as equally as they can be.

    Raises:
        ConfigError: these are not the model's blocks, or too few.
    """
    total = len(layers.blocks)
    if sum(blocks) != total:
        raise ConfigError(
            f"cluster.layer_distribution gives {len(blocks)} ranks {sum(blocks)} layers, but the model has {total}. "
            f"Give numbers that add up to {total}, or leave it out"
        )
    if min(blocks) < stages_per_rank:
        raise ConfigError(
            f"cluster.layer_distribution gives a rank {min(blocks)} layers, but with training.schedule interleaved "
            f"each rank has {stages_per_rank} stages. Give each rank {stages_per_rank} layers at least"
        )
    counts = []
    for turn in range(stages_per_rank):
        counts += [count // stages_per_rank + (turn < count % stages_per_rank) for count in blocks]
    cuts = [1 + sum(counts[:number]) for number in range(len(counts) + 1)]
    cuts[0], cuts[-1] = 0, len(layers)
    return [range(begin, end) for begin, end in itertools.pairwise(cuts)]
