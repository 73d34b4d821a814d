"""Reading a checkpoint where a rank wants parts of the model only."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from smolcluster.checkpoint.state import StateReader
from smolcluster.errors import CheckpointError


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
