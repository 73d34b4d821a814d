"""The fingerprint of a model's weights: one number by which ranks and runs are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class HasExport(Protocol):
    """A model with an export format of its own."""

    def export_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names and in the layout of the export format."""
        ...


@runtime_checkable
class NamesExport(Protocol):
    """A model that tells how its export is made of its own tensors, so that they need not all be there at once."""

    def export_names(self) -> Iterable[tuple[str, str, bool]]:
        """(name in the export, own name, whether it lies transposed there) of every tensor of the export."""
        ...


def exported_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that stand for the model: its exported state dict, `state_dict()` for models without one."""
    state = model.export_state_dict() if isinstance(model, HasExport) else model.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def weights_sha256(model: nn.Module) -> str:
    """Hash of all weights, in the model's own dtype; blocks while tensors are copied to the CPU.

    Two models have the same hash if and only if names, dtypes, shapes and every bit agree. The format is
    `summary.json`'s: see `tensors_sha256`.
    """
    return tensors_sha256(exported_tensors(model))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of named tensors, in the order of their UTF-8 names.

    Each gives `json.dumps([name, dtype, shape])` without spaces, a line feed, and its raw bytes, little-endian as on
    every platform that torch has wheels for. Tensors that share their memory (tied weights) count once, under the
    first of their names; so an export has to hand out a tied tensor twice, not a copy of it.
    """
    digest = hashlib.sha256()
    seen: set[tuple[str, int, int, torch.dtype]] = set()
    for name in sorted(tensors, key=lambda name: name.encode()):
        tensor = tensors[name].detach()
        # Not the storage alone: views of one flat buffer share it and are different weights.
        memory = (str(tensor.device), tensor.data_ptr(), tensor.numel(), tensor.dtype)
        if tensor.numel() and memory in seen:
            continue
        seen.add(memory)
        _add(digest, name, tensor)
    return digest.hexdigest()


def streamed_sha256(model: nn.Module, first_names: Mapping[str, str], read: Callable[[str], Tensor | None]) -> str:
    """`weights_sha256` of a model whose tensors are read one after the other.

    Args:
        model: its names; its own parameters are not looked at.
        first_names: for each further name of a tied parameter its first one.
        read: gives a tensor of the state dict by its own, first name; None: this process is not to know it, and the
            hash is of no value.
    """
    names = ((name, name, False) for name in model.state_dict())
    exported = model.export_names() if isinstance(model, NamesExport) else names
    digest = hashlib.sha256()
    seen: set[str] = set()
    for name, own_name, is_transposed in sorted(exported, key=lambda entry: entry[0].encode()):
        first_name = first_names.get(own_name, own_name)
        if first_name in seen:
            continue
        seen.add(first_name)
        tensor = read(first_name)
        if tensor is not None:
            _add(digest, name, tensor.t() if is_transposed else tensor)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
    digest.update(json.dumps(header, separators=(",", ":")).encode() + b"\n")
    # reshape: a tensor without dims cannot be viewed as bytes; numpy has no bfloat16, but uint8 it has.
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
