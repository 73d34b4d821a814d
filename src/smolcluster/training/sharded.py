"""What a sharded algorithm has besides its step: laying a model out, agreeing on a step's sums, checkpoints of parts.

Every rank's part of a tensor is a Shard with its place in the whole, under the names that other algorithms give the
whole. So a checkpoint of N ranks is read by M, and one of `fsdp` by `classicdp`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smolcluster.collectives.base import Communicator
from smolcluster.collectives.gather import ShardedParameters
from smolcluster.collectives.rows import RowWeight
from smolcluster.collectives.scatter import ShardedGradients, StepShards
from smolcluster.collectives.shards import Bucket, Described, Piece, divide_table, plan_shards
from smolcluster.errors import CollectiveMismatch, ConfigError
from smolcluster.kinds import Precision
from smolcluster.models.partition import Unit
from smolcluster.training.modules import buffers_of, move_buffers, parameter_names
from smolcluster.training.restore import Part, load_parts
from smolcluster.training.step import AUTOCAST_DTYPES, SCALER, LossScaler, Shard, StateReader, squares_of

# Modules whose matrices autocast casts in every forward: those may be gathered in half precision.
_CAST_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CAST_CLASSES = ("Conv1D",)  # transformers' own name of a linear layer, in GPT-2

# Point-to-point tag of this file, far from those that algorithms count up from 0.
_PARAMETER_TAG = 2**29 + 16


# ---- laying out


def make_shards(
    model: nn.Module,
    units: Sequence[Unit],
    comm: Communicator,
    *,
    bucket_bytes: int,
    precision: Precision,
    device: torch.device | str,
    is_divided: bool,
    is_freed: bool,
    values: Callable[[Unit], Mapping[str, Tensor]] | None,
) -> tuple[list[str], dict[str, str], ShardedParameters]:
    """Move a model to its device and lay its parameters out in buckets. Every rank calls it; blocks.

    With `is_freed` the embeddings and heads that are larger than any unit become tables: see collectives/rows.py.

    Returns:
        The names of all parameters; for each further name of a tied one its first name; and the parameters.

    Raises:
        ConfigError: parameters are on the meta device, and nobody says what their values are.
    """
    names, aliases = parameter_names(model)
    tables = _find_tables(model, units, precision, bucket_bytes, comm.world_size) if is_freed else {}
    described, drawn = _describe(model, units, tables, precision)
    params, given = _replace_parameters(model, device, names, described)
    move_buffers(model, device, precision)
    model.train()
    for buffer in model.buffers():
        comm.broadcast(buffer).wait()
    if values is None and any(tensor.is_meta for tensor in given.values()):
        raise ConfigError("the model has parameters on the meta device. Pass values=, which gives those of each unit")
    half = AUTOCAST_DTYPES.get(precision)
    buckets = plan_shards(described, bucket_bytes, comm.world_size)
    shards = ShardedParameters(params, buckets, comm, is_divided=is_divided, is_freed=is_freed, half=half)
    source = _Values(drawn, names, given, values)
    # Rank 0's count. What all draw or read alike need not travel; but another machine may have another file.
    shards.fill(source.of_bucket, are_alike=values is not None)
    return names, aliases, shards


def _find_tables(
    model: nn.Module, units: Sequence[Unit], precision: Precision, bucket_bytes: int, world_size: int
) -> dict[str, tuple[int, int]]:
    """The matrices of embeddings and linear layers in the rest of the model that are larger than any other unit.

    Such as a token embedding or a head. Each with what `divide_table` says, for stripes of the largest unit's size.
    """
    sizes = {name: param.numel() * _dtype_of(param, precision).itemsize for name, param in model.named_parameters()}
    largest = max([bucket_bytes, *(sum(sizes[name] for name in unit.parameters) for unit in units[1:])])
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(module)
    found = {}
    for name in units[0].parameters:
        param = model.get_parameter(name)
        is_known = all(isinstance(owner, nn.Embedding | nn.Linear) for owner in owners[id(param)])
        if is_known and param.dim() == 2 and sizes[name] > largest:
            rows = param.shape[0]
            found[name] = divide_table(rows, sizes[name] // rows, largest, world_size)
    return found


def _describe(
    model: nn.Module, units: Sequence[Unit], tables: Mapping[str, tuple[int, int]], precision: Precision
) -> tuple[list[Described], dict[int, Unit]]:
    """All parameters; and by the number of its first unit what is drawn or loaded at once, tables by themselves."""
    unit_of = {name: number for number, unit in enumerate(units) for name in unit.parameters}
    rest = tuple(name for name in units[0].parameters if name not in tables)
    drawn = dict(enumerate([dataclasses.replace(units[0], parameters=rest), *units[1:]]))
    next_unit = len(units)
    described = []
    for name, param in model.named_parameters():
        dtype = _dtype_of(param, precision)
        if name in tables:
            stripes, rows = tables[name]
            # Only projections gather it, and autocast casts it in each.
            described.append(Described(next_unit, param.shape, dtype, param.requires_grad, True, rows))
            drawn[next_unit] = Unit("", model, (name,))
            next_unit += stripes
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        is_cast = isinstance(owner, _CAST_MODULES) or type(owner).__name__ in _CAST_CLASSES
        halved = is_cast and param.dim() >= 2 and unit_of[name] > 0
        described.append(Described(unit_of[name], param.shape, dtype, param.requires_grad, halved))
    return described, drawn


def _dtype_of(param: Tensor, precision: Precision) -> torch.dtype:
    return torch.float64 if precision == "fp64" and param.is_floating_point() else param.dtype


def _replace_parameters(
    model: nn.Module, device: torch.device | str, names: Sequence[str], described: Sequence[Described]
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """New parameters without elements in the model's place, on its device; and what the old ones hold, by index."""
    old = list(model.parameters())
    made: dict[int, Any] = {}
    for name, param, like in zip(names, old, described, strict=True):
        if like.strip_rows:
            made[id(param)] = RowWeight(name, like.shape, like.dtype, device, like.trained)
        else:
            empty = torch.empty(0, dtype=like.dtype, device=device)
            made[id(param)] = nn.Parameter(empty, requires_grad=like.trained)
    given = {index: param.detach() for index, param in enumerate(old)}
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None:
                module._parameters[name] = made[id(held)]
    return [made[id(param)] for param in old], given


class _Values:
    """The initial values, bucket by bucket, and let go as soon as they were asked for. Of a table, all at once."""

    def __init__(
        self,
        units: Mapping[int, Unit],
        names: Sequence[str],
        given: dict[int, Tensor],
        values: Callable[[Unit], Mapping[str, Tensor]] | None,
    ) -> None:
        self._units = units
        self._names = names
        self._given = given
        self._values = values
        self._unit = -1
        self._drawn: Mapping[str, Tensor] = {}

    def of_bucket(self, bucket: Bucket) -> dict[int, Tensor]:
        """The parameters of a bucket by their index."""
        indices = [place.index for place in bucket.places]
        if self._values is None:
            return {index: self._given.pop(index) for index in indices}
        if bucket.unit != self._unit:
            self._drawn = {}  # before the next ones are made
            self._unit, self._drawn = bucket.unit, self._values(self._units[bucket.unit])
        return {index: self._drawn[self._names[index]] for index in indices}


# ---- a step's sums


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What one rank contributes to a step besides gradients."""

    loss_sum: float
    count: int
    samples: int
    planned: int
    nonfinite: int
    stop: bool


@dataclass(frozen=True, slots=True)
class StepAgreement:
    """What all ranks contributed to a step besides gradients, the same bits on every rank.

    Attributes:
        loss_sum: over all targets.
        count: targets computed.
        samples: samples computed.
        nonfinite: ranks whose loss (with a codec: or gradient) was not finite.
        stop_votes: ranks that asked to stop.
        squares: of each parameter's gradient, the square of its norm.
        has_grad: for each parameter, whether any rank has a gradient.
    """

    loss_sum: float
    count: int
    samples: int
    nonfinite: int
    stop_votes: int
    squares: list[float]
    has_grad: list[bool]


def piece_squares(pieces: Sequence[Piece], grads: Sequence[Tensor], shards: ShardedParameters) -> list[float]:
    """Of each parameter the square of the norm of this rank's piece of its gradient; blocks.

    Where every rank owns all, each brings in its part of the square: over all ranks it is the whole one again.
    """
    owners = 1 if shards.is_divided else shards.comm.world_size
    squares = [0.0] * len(shards.params)
    for piece, square in zip(pieces, squares_of(grads), strict=True):
        squares[piece.index] = square / owners
    return squares


def sum_totals(own: StepTotals, gradients: StepShards, squares: Sequence[float], comm: Communicator) -> StepAgreement:
    """Add up over all ranks, in one small all-reduce; blocks.

    Raises:
        CollectiveMismatch: the ranks planned different steps.
    """
    nonfinite = float(own.nonfinite or gradients.overflowed)
    fields = [own.loss_sum, own.count, own.samples, own.planned, nonfinite, own.stop, *squares, *gradients.has_grad]
    total = torch.tensor(fields, dtype=torch.float64)
    if comm.world_size > 1:
        with comm.telemetry.span("comm_wait"):
            comm.all_reduce(total).wait()
    loss_sum, count, samples, planned, nonfinite, votes, *each = total.tolist()
    if abs(planned - own.planned * comm.world_size) > 1e-6 * planned:
        raise CollectiveMismatch(
            f"step {gradients.step}: rank {comm.rank} planned {own.planned} targets, but the mean over all "
            f"{comm.world_size} ranks is {planned / comm.world_size:g}. Batch.planned_count is that of the whole step: "
            f"give every rank the same number."
        )
    has_grad = [ranks > 0 for ranks in each[len(squares) :]]
    return StepAgreement(
        loss_sum, round(count), round(samples), round(nonfinite), round(votes), each[: len(squares)], has_grad
    )


# ---- parameters, whole


def gather_parameter(shards: ShardedParameters, index: int) -> Tensor | None:
    """The parameter `index` from its owners, in its shape, on rank 0's CPU; None elsewhere. Blocks."""
    comm, rank = shards.comm, shards.comm.rank
    number, place = next((n, p) for n, b in enumerate(shards.buckets) for p in b.places if p.index == index)
    part = shards.buckets[number].part
    own = shards.own[number]
    if not shards.is_divided:
        return own[place.offset : place.offset + place.numel].view(place.shape).cpu() if rank == 0 else None
    whole = torch.empty(place.numel, dtype=own.dtype) if rank == 0 else None
    for owner in range(comm.world_size):
        start, end = max(place.offset, owner * part), min(place.offset + place.numel, (owner + 1) * part)
        if start >= end:
            continue
        values = own[start - owner * part : end - owner * part]
        if whole is None:
            if rank == owner:
                comm.send(values.cpu(), 0, _PARAMETER_TAG).wait()
            continue
        target = whole[start - place.offset : end - place.offset]
        if owner == 0:
            target.copy_(values)
        else:
            comm.recv(owner, _PARAMETER_TAG, target).wait()
    return None if whole is None else whole.view(place.shape)


def held_bytes(
    shards: ShardedParameters,
    kept: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    gathered_bytes: int,
    buffer_bytes: int,
) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer state: what lies in memory always, and what did at the peak."""
    parameters = _bytes_of([*shards.own, *([] if shards.is_freed else shards.whole)]) + gathered_bytes
    slots = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return parameters, _bytes_of(kept) + buffer_bytes, _bytes_of(slots)


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# ---- checkpoints


def sharded_state(
    model: nn.Module,
    shards: ShardedParameters,
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    aliases: Mapping[str, str],
    scaler: LossScaler | None,
    comm: Communicator,
) -> dict[str, Shard]:
    """This rank's pieces of the parameters and of what the optimizer remembers of them; on rank 0 also the rest.

    Raises:
        ConfigError: the optimizer remembers what is no number and no tensor of the parameter's own size.
    """
    found: dict[str, Shard] = {}
    for piece in shards.pieces:
        if not shards.is_divided and comm.rank != 0:
            break  # all ranks hold the same
        name, shape = names[piece.index], shape_of(shards, piece)
        found[f"model/{name}"] = Shard(piece.param.detach().view(-1), "param", shape, piece.offset)
        for slot, value in optimizer.state.get(piece.param, {}).items():
            tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            if tensor.numel() == piece.param.numel() and tensor.dim() > 0:
                found[f"optim/{name}/{slot}"] = Shard(tensor.view(-1), "optim", shape, piece.offset)
            elif tensor.numel() == 1 and piece.offset == 0:
                found[f"optim/{name}/{slot}"] = Shard(tensor, "optim")
            elif tensor.numel() != 1:
                raise ConfigError(
                    f"the optimizer keeps {slot} of shape {tuple(tensor.shape)} for {piece.param.numel()} elements of "
                    f"{name}, which cannot be divided. Set cluster.fsdp_stage to 0, or take adamw or sgd"
                )
    if comm.rank == 0:
        found |= {f"model/{name}": Shard(tensor.detach(), "buffer") for name, tensor in buffers_of(model).items()}
        for alias, name in aliases.items():
            shape = tuple(_shapes(shards)[names.index(name)])
            found[f"model/{alias}"] = Shard(torch.empty(0), "param", shape, alias_of=f"model/{name}")
        if scaler is not None:
            found[SCALER] = scaler.state()
    return found


def load_sharded_state(
    reader: StateReader,
    model: nn.Module,
    shards: ShardedParameters,
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    aliases: Mapping[str, str],
    scaler: LossScaler | None,
) -> None:
    """Read this rank's pieces from a checkpoint, in place. Every rank calls it.

    Raises:
        CheckpointError: it is of another model.
    """
    load_parts(
        reader,
        optimizer,
        shapes={names[index]: tuple(shape) for index, shape in sorted(_shapes(shards).items())},
        aliases=aliases,
        parts={names[piece.index]: Part(piece.offset, piece.param) for piece in shards.pieces},
        buffers=buffers_of(model),
    )
    if scaler is not None:
        scaler.load_state(reader)


@dataclass(frozen=True, slots=True)
class PendingShards:
    """A step's summed gradient that waits for its turn (K > 0): this rank's pieces of it."""

    step: int
    sums: StepAgreement
    planned: int
    loss_scale: float
    grads: list[Tensor]


@dataclass(frozen=True, slots=True)
class RestoredShards:
    """The same, read from a checkpoint."""

    gradients: StepShards
    own: StepTotals
    planned: int
    loss_scale: float


def pending_shards(
    waiting: Sequence[PendingShards],
    pieces: Sequence[Piece],
    names: Sequence[str],
    shards: ShardedParameters,
    comm: Communicator,
) -> dict[str, Shard]:
    """Gradients that wait, oldest first, as training.step.pending_state has them."""
    found: dict[str, Shard] = {}
    for number, item in enumerate(waiting):
        sums = item.sums
        if comm.rank == 0:
            numbers = [
                item.step,
                sums.loss_sum,
                sums.count,
                sums.samples,
                sums.nonfinite,
                item.planned,
                item.loss_scale,
            ]
            found[f"pending/{number:04d}/sums"] = Shard(torch.tensor(numbers, dtype=torch.float64), "pending")
        if not shards.is_divided and comm.rank != 0:
            continue
        for piece, grad in zip(pieces, item.grads, strict=True):
            if sums.has_grad[piece.index]:
                name = f"pending/{number:04d}/grad/{names[piece.index]}"
                found[name] = Shard(grad.view(-1), "pending", shape_of(shards, piece), piece.offset)
    return found


def load_pending_shards(
    reader: StateReader,
    pieces: Sequence[Piece],
    names: Sequence[str],
    gradients: ShardedGradients,
    comm: Communicator,
) -> list[RestoredShards]:
    """The gradients that waited when the checkpoint was made, oldest first. Every rank calls it."""
    stored = set(reader.names("pending/"))
    own_pieces = {piece.index: piece for piece in pieces}
    restored = []
    for sums_name in sorted(name for name in stored if name.endswith("/sums")):
        step, loss_sum, count, samples, nonfinite, planned, loss_scale = reader.read(sums_name).tolist()
        prefix = f"{sums_name.removesuffix('sums')}grad/"
        has_grad = [f"{prefix}{name}" in stored for name in names]
        due, kept = gradients.restore(round(step), has_grad)
        for index, name in enumerate(names):
            if has_grad[index]:
                piece = own_pieces.get(index)
                start, length = (0, 0) if piece is None else (piece.offset, piece.param.numel())
                values = reader.read_slice(f"{prefix}{name}", start, length)
                if piece is not None:
                    piece.of(kept[piece.bucket]).view(-1).copy_(values)
        # The sums are those of all ranks: rank 0 brings them in, so that they count once.
        mine = StepTotals(loss_sum, round(count), round(samples), round(planned), round(nonfinite), False)
        if comm.rank != 0:
            mine = StepTotals(0.0, 0, 0, round(planned), 0, False)
        restored.append(RestoredShards(due, mine, round(planned), loss_scale))
    return restored


def shape_of(shards: ShardedParameters, piece: Piece) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(next(place.shape for place in shards.buckets[piece.bucket].places if place.index == piece.index))


def _shapes(shards: ShardedParameters) -> dict[int, torch.Size]:
    return {place.index: place.shape for bucket in shards.buckets for place in bucket.places}
