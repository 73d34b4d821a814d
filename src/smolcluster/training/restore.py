"""Reading a checkpoint where a rank wants parts of the model only."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smolcluster.checkpoint.state import StateReader
from smolcluster.errors import CheckpointError
from smolcluster.training.optim import set_optimizer_state


class Part(NamedTuple):
    """What a rank has of a parameter: `param` holds its elements from `offset` on, counted in the flattened whole."""

    offset: int
    param: nn.Parameter


def load_parts(
    reader: StateReader,
    optimizer: torch.optim.Optimizer,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Collection[str],
    parts: Mapping[str, Part],
    buffers: Mapping[str, Tensor],
) -> None:
    """Read this rank's weights and optimizer state, and all buffers, in place. Every rank reads the same names.

    Args:
        reader: the checkpoint.
        optimizer: of the parts that are trained, before its first step.
        shapes: of all parameters of the model, by their first names.
        aliases: further names of tied parameters.
        parts: this rank's, by the parameter's name.
        buffers: all of the model's, by name.

    Raises:
        CheckpointError: it is of another model.
    """
    check_names(reader, {*shapes, *aliases, *buffers})
    for name, buffer in buffers.items():
        check_shape(reader, name, tuple(buffer.shape))
        buffer.copy_(reader.read(f"model/{name}"))
    slots = slots_of(reader)
    states: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        check_shape(reader, name, shape)
        part = parts.get(name)
        values = read_part(reader, f"model/{name}", part)
        if part is not None and values is not None:
            check_dtype(name, values, part.param)
            with torch.no_grad():
                part.param.copy_(values)
        for slot in slots.get(name, ()):
            full = f"optim/{name}/{slot}"
            if reader.shape(full) == shape and math.prod(shape) != 1:
                value: Any = read_part(reader, full, part)
            else:
                value = slot_value(reader.read(full), shape)
            if part is not None:
                states.setdefault(name, {})[slot] = value
    if slots:
        set_optimizer_state(optimizer, {name: part.param for name, part in parts.items()}, states)


def read_part(reader: StateReader, full_name: str, part: Part | None) -> Tensor | None:
    """Of a tensor of the parameter's size what this rank has, in the shape of its part; None: it has nothing."""
    if part is None:
        reader.read_slice(full_name, 0, 0)
        return None
    return reader.read_slice(full_name, part.offset, part.param.numel()).view(part.param.shape)


def slots_of(reader: StateReader) -> dict[str, list[str]]:
    """For each parameter what an optimizer remembers of it."""
    slots: dict[str, list[str]] = {}
    for full in reader.names("optim/"):
        name, _, slot = full.removeprefix("optim/").rpartition("/")
        slots.setdefault(name, []).append(slot)
    return slots


def slot_value(value: Tensor, shape: tuple[int, ...]) -> Any:
    """What is no tensor of the parameter's own shape, as the optimizer had it: a number was stored in float64."""
    return value.item() if value.dim() == 0 and value.dtype == torch.float64 and math.prod(shape) != 1 else value


def check_names(reader: StateReader, names: Collection[str]) -> None:
    """The model's tensors have these names.

    Raises:
        CheckpointError: others.
    """
    stored, own = set(reader.names("model/")), {f"model/{name}" for name in names}
    if missing := sorted(own ^ stored):
        raise CheckpointError(
            f"the checkpoint is of another model: {len(own - stored)} tensors are missing there, "
            f"{len(stored - own)} unknown here (first: {missing[0].removeprefix('model/')}). Resume with its settings"
        )


def check_shape(reader: StateReader, name: str, shape: tuple[int, ...]) -> None:
    """A tensor of the model has this shape.

    Raises:
        CheckpointError: another one.
    """
    found = reader.shape(f"model/{name}")
    if found != shape:
        raise CheckpointError(
            f"the checkpoint is of another model: {name} has shape {found} there, {shape} here. Resume with its "
            f"settings ({math.prod(found)} and {math.prod(shape)} elements)"
        )


def check_dtype(name: str, value: Tensor, own: Tensor) -> None:
    """A tensor of the model has the dtype that it has here.

    Raises:
        CheckpointError: another one.
    """
    if value.dtype != own.dtype:
        raise CheckpointError(
            f"the checkpoint is of another precision: {name} is {value.dtype} there, {own.dtype} here. Resume with its "
            "settings"
        )
