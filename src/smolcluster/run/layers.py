"""Which layers each rank of a run gets: as the configuration says, or by cost, speed and memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from smolcluster.collectives.base import Communicator
from smolcluster.config.schema import Config, resolved_batch_size, resolved_staleness_bound
from smolcluster.data.loader import eval_batches
from smolcluster.data.source import TrainingData
from smolcluster.errors import ConfigError
from smolcluster.memory_pools import machine_name, memory_pools
from smolcluster.models.split import layer_costs, needed_room, split_by_blocks, split_by_cost
from smolcluster.models.stage import Layers, layer_parameters, layers_of, tied_parameters
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
    kept: Sequence[range] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[range]:
    """The layers of each stage, the same on every rank; stage s lies on rank s mod P. Every rank calls it; blocks.

    By cost no rank gets more than it has room for. If no split is like that, all ranks get too much by the same factor,
    and that as small as it can be.

    Args:
        config: the resolved configuration.
        model: its parameters may be on the meta device.
        data: gives the samples that are measured with, where speeds are to be.
        comm: all ranks.
        blocks: how many blocks each rank gets; None: by cost.
        speeds: of the ranks, relative; with `cluster.shares: auto` they are measured.
        device: where this rank computes.
        kept: the layers of each stage until now, for a run that goes on; they stay, if these are as many stages and
            `blocks` does not say otherwise.
        say: shows the user a line if memory may not suffice; None: nobody looks.

    Raises:
        ConfigError: the model cannot be cut, or not so.
    """
    layers, world_size = layers_of(model), comm.world_size
    tied_parameters(model, layers)  # what it refuses is refused before anything is said of layers
    rooms = _rooms(config, comm, device)
    is_by_cost = False
    if blocks is not None:
        split = split_by_blocks(blocks, layers, stages_per_rank(config))
    elif kept is not None and _is_split(kept, layers, world_size * stages_per_rank(config)):
        split = list(kept)
    else:
        is_by_cost = True
        times = _times(config, model, layers, data, comm, speeds, device)
        split = _split_within(model, layers, times, rooms, stages_per_rank(config))
    held = [_held_parameters(model, layers, _layers_of_rank(split, rank, world_size)) for rank in range(world_size)]
    shortage = _shortage(config, held, rooms, is_by_cost=is_by_cost)
    if shortage is not None:
        logger.warning("memory %s", shortage)
        if say is not None:
            say(f"warning: {shortage}")
    return split


def describe_split(split: Sequence[range], model: nn.Module, world_size: int) -> str:
    """Which layers each rank has, in words."""
    layers = layers_of(model)
    lines = []
    for rank in range(world_size):
        own = _layers_of_rank(split, rank, world_size)
        parts = [_runs([layer for layer in own if 0 < layer <= len(layers.blocks)])]
        if 0 in own and layers.entry:
            parts.insert(0, "entry")
        if len(layers) - 1 in own and layers.exit:
            parts.append("exit")
        held = _held_parameters(model, layers, own)
        lines.append(f"rank {rank} {', '.join(part for part in parts if part) or 'nothing'} ({held:,} parameters)")
    return "layers: " + "; ".join(lines)


def fair_shares(pools: Sequence[Mapping[str, int]]) -> list[float]:
    """How much of the memory each rank may take, if all that take from a pool get equally much of it.

    Args:
        pools: for each rank the bytes that are left in what it takes from, by the pool's name; not empty.
    """
    sharing = Counter(name for own in pools for name in own)
    return [min(nbytes / sharing[name] for name, nbytes in own.items()) for own in pools]


# ---- by cost


def _times(
    config: Config,
    model: nn.Module,
    layers: Layers,
    data: TrainingData,
    comm: Communicator,
    speeds: Sequence[float],
    device: torch.device,
) -> list[list[float]]:
    """What each layer takes on each rank, in any unit. Every rank calls it; blocks."""
    if config.cluster.shares == "auto" and comm.world_size > 1:
        samples = max(1, resolved_batch_size(config) // config.training.micro_batches)
        inputs = next(iter(eval_batches(data.validation, samples))).inputs
        own: list[float] = []
        machines = cast("list[str]", comm.exchange(machine_name()))
        # Ranks of one machine take turns: all at once they would measure each other's disturbance.
        turn = machines[: comm.rank].count(machine_name())
        for now in range(max(Counter(machines).values())):
            if now == turn:
                own = measure_layers(model, layers, inputs, config.training.precision, device)
            every = comm.exchange(list(own))
        return cast("list[list[float]]", every)
    costs = layer_costs(model, layers)
    return [[cost.time / speed for cost in costs] for speed in speeds]


def _split_within(
    model: nn.Module, layers: Layers, times: Sequence[Sequence[float]], rooms: Sequence[float], stages_per_rank: int
) -> list[range]:
    """The fastest split of those that fit, or that are too large by the smallest factor."""
    parameters = [cost.parameters for cost in layer_costs(model, layers)]
    limits = [room / stages_per_rank for room in rooms] * stages_per_rank
    # A little more than is needed, so that rounding does not decide.
    factor = max(1.0, needed_room(parameters, limits, stages_per_rank=stages_per_rank) * (1 + 1e-9))
    return split_by_cost(
        [*times] * stages_per_rank, parameters, [limit * factor for limit in limits], stages_per_rank=stages_per_rank
    )


def _is_split(split: Sequence[range], layers: Layers, stages: int) -> bool:
    begins, ends = [part.start for part in split], [part.stop for part in split]
    return len(split) == stages and all(split) and begins == [0, *ends[:-1]] and ends[-1] == len(layers)


# ---- memory


def _rooms(config: Config, comm: Communicator, device: torch.device) -> list[float]:
    """How many parameters fit into what each rank may take of the memory. Every rank calls it; blocks."""
    pools = cast("list[dict[str, int]]", comm.exchange({**_pools(device)}))
    each = _bytes_per_parameter(config)
    return [max(1.0, _PART_FOR_PARAMETERS * share / each) for share in fair_shares(pools)]


def _pools(device: torch.device) -> dict[str, int]:
    """What this rank's parameters take memory from: its GPU, or the machine and its control groups."""
    if device.type != "cuda":
        return memory_pools()
    # Not the index: CUDA_VISIBLE_DEVICES may give each process a GPU 0 of its own.
    name = torch.cuda.get_device_properties(device).uuid
    return {f"{machine_name()}/{name}": torch.cuda.mem_get_info(device)[0]}


def _bytes_per_parameter(config: Config) -> int:
    """Of weights, gradients and the optimizer's state, with what waits if K > 0."""
    element = 8 if config.training.precision == "fp64" else 4
    slots = 2 if config.training.optimizer == "adamw" else 0
    bound = resolved_staleness_bound(config) or 0
    return element * (2 + slots + 2 * bound + (1 if bound else 0))


def _shortage(config: Config, held: Sequence[int], rooms: Sequence[float], *, is_by_cost: bool) -> str | None:
    """One line on what is missing where some ranks may have too little memory; None: all fits, by the estimate."""
    each = _bytes_per_parameter(config)
    missing = {rank: (held[rank] - room) * each for rank, room in enumerate(rooms) if held[rank] > room}
    if not missing:
        return None
    worst = max(missing, key=lambda rank: missing[rank])
    cut = " The layers are cut by what is free, not by time." if is_by_cost and len(held) > 1 else ""
    remedies = ["Take a smaller model or more machines", "algorithm fsdp (cluster.fsdp_stage 3) also cuts large layers"]
    if config.training.optimizer == "adamw":
        remedies.append("training.optimizer sgd has no state")
    if resolved_staleness_bound(config):
        remedies.append("cluster.staleness_bound 0 keeps no copies")
    if not config.training.activation_checkpointing:
        remedies.append("training.activation_checkpointing leaves more room")
    return (
        f"memory may not suffice on {len(missing)} of {len(held)} ranks: rank {worst} needs about "
        f"{_size(held[worst] * each)} for {held[worst]:,} parameters with gradients and optimizer state, and has "
        f"{_size(rooms[worst] * each)} for them ({_PART_FOR_PARAMETERS:.0%} of its part of the free memory). Missing: "
        f"{_size(missing[worst])}, over all ranks {_size(sum(missing.values()))}.{cut} {'; '.join(remedies)}"
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 // 10 else f"{nbytes / 2**20:.1f} MiB"


# ---- a rank's layers


def _layers_of_rank(split: Sequence[range], rank: int, world_size: int) -> list[int]:
    return [layer for stage in split[rank::world_size] for layer in stage]


def _held_parameters(model: nn.Module, layers: Layers, own: Sequence[int]) -> int:
    """How many numbers a rank has, tied ones once."""
    params = {name: param for layer in own for name, param in layer_parameters(model, layers, layer).items()}
    return sum(param.numel() for param in params.values())


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
