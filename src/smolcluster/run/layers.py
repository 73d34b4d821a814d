"""Which layers each rank of a run gets: as the configuration says, or by cost, speed and memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from smolcluster.collectives.base import Communicator
from smolcluster.config.schema import Config, resolved_batch_size, resolved_staleness_bound
from smolcluster.data.loader import eval_batches
from smolcluster.data.source import TrainingData
from smolcluster.device import free_memory_bytes
from smolcluster.errors import ConfigError
from smolcluster.models.split import layer_costs, split_by_blocks, split_by_cost
from smolcluster.models.stage import Layers, layers_of
from smolcluster.training.layer_times import measure_layers

logger = logging.getLogger(__name__)

# Of the free memory: the rest is for activations and messages.
_PART_FOR_PARAMETERS = 0.8


def blocks_per_rank(config: Config, names: Sequence[str]) -> list[int] | None:
    """What `cluster.layer_distribution` gives the ranks, in rank order; None: nothing is given.

    Raises:
        ConfigError: it is not about these ranks.
    """
    given = config.cluster.layer_distribution
    if given is None:
        return None
    if isinstance(given, dict):
        if set(given) != set(names):
            raise ConfigError(
                f"cluster.layer_distribution has {', '.join(given)}, but the ranks are {', '.join(names)}. Name each "
                "of them once, or give a list in rank order"
            )
        return [given[name] for name in names]
    if len(given) != len(names):
        raise ConfigError(
            f"cluster.layer_distribution has {len(given)} numbers for {len(names)} ranks. Give one for each, or leave "
            "it out"
        )
    return list(given)


def stages_per_rank(config: Config) -> int:
    """V: more than one for interleaved pipelines only."""
    is_interleaved = config.algorithm == "mp_pipeline" and config.training.schedule == "interleaved"
    return config.training.stages_per_rank if is_interleaved else 1


def decide_split(
    config: Config,
    model: nn.Module,
    data: TrainingData,
    comm: Communicator,
    *,
    blocks: Sequence[int] | None,
    speeds: Sequence[float],
    device: torch.device,
) -> list[range]:
    """The layers of each stage, the same on every rank; stage s lies on rank s mod P. Every rank calls it; blocks.

    Args:
        config: the resolved configuration.
        model: its parameters may be on the meta device.
        data: gives the samples that are measured with, where speeds are to be.
        comm: all ranks.
        blocks: how many blocks each rank gets; None: by cost.
        speeds: of the ranks, relative; with `cluster.shares: auto` they are measured.
        device: where this rank computes.

    Raises:
        ConfigError: the model cannot be cut, or not so.
    """
    layers = layers_of(model)
    per_rank = stages_per_rank(config)
    if blocks is not None:
        return split_by_blocks(blocks, layers, per_rank)
    costs = layer_costs(model, layers)
    if config.cluster.shares == "auto" and comm.world_size > 1:
        own = _measured(config, model, layers, data, device)
        times = cast("list[list[float]]", comm.exchange(list(own)))
    else:
        times = [[cost.time / speed for cost in costs] for speed in speeds]
    parameters = [cost.parameters for cost in costs]
    room = cast("list[float]", comm.exchange(_room(config, device) / per_rank))
    try:
        split = split_by_cost(times * per_rank, parameters, room * per_rank)
    except ConfigError as exc:
        if not _needs_more(times * per_rank, parameters):
            raise
        logger.warning("no split fits into the free memory, by an estimate; going on without it reason=%s", exc)
        split = split_by_cost(times * per_rank, parameters)
    return split


def describe_split(split: Sequence[range], model: nn.Module, world_size: int) -> str:
    """Which layers each rank has, in words."""
    layers = layers_of(model)
    parameters = [cost.parameters for cost in layer_costs(model, layers)]
    lines = []
    for rank in range(world_size):
        own = [layer for stage in split[rank::world_size] for layer in stage]
        parts = [f"{_runs([layer for layer in own if 0 < layer <= len(layers.blocks)])}"] if own else []
        if 0 in own and layers.entry:
            parts.insert(0, "entry")
        if len(layers) - 1 in own and layers.exit:
            parts.append("exit")
        held = sum(parameters[layer] for layer in own)
        lines.append(f"rank {rank} {', '.join(part for part in parts if part)} ({held:,} parameters)")
    return "layers: " + "; ".join(lines)


def _runs(blocks: Sequence[int]) -> str:
    """Numbers of blocks from 0, runs of them shortened."""
    runs: list[list[int]] = []
    for layer in blocks:
        if runs and runs[-1][1] == layer - 2:
            runs[-1][1] = layer - 1
        else:
            runs.append([layer - 1, layer - 1])
    named = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    return f"{'block' if len(blocks) == 1 else 'blocks'} {', '.join(named)}" if named else ""


def _needs_more(times: Sequence[Sequence[float]], parameters: Sequence[int]) -> bool:
    """Whether it is memory that is missing, and not layers."""
    return len(parameters) >= len(times)


def _room(config: Config, device: torch.device) -> float:
    """How many parameters fit into the memory that this rank has left, with gradients and optimizer."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()
    element = 8 if config.training.precision == "fp64" else 4
    slots = 2 if config.training.optimizer == "adamw" else 0
    bound = resolved_staleness_bound(config) or 0
    copies = 2 + slots + 2 * bound + (1 if bound else 0)
    return _PART_FOR_PARAMETERS * free / (element * copies)


def _measured(
    config: Config,
    model: nn.Module,
    layers: Layers,
    data: TrainingData,
    device: torch.device,
) -> list[float]:
    samples = max(1, resolved_batch_size(config) // config.training.micro_batches)
    inputs = next(iter(eval_batches(data.validation, samples))).inputs
    return measure_layers(model, layers, inputs, config.training.precision, device)
