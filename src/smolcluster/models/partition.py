"""How a model falls into units: parts that are computed one after the other, such as the blocks of a transformer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# What holds modules that a model runs through; each of them becomes a unit.
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a model.

    Attributes:
        name: its module's place in the model, such as "blocks.3"; "" for the rest of the model.
        module: whose forward needs the parameters.
        parameters: their names in the model, each parameter under its first name.
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]


def split_into_units(model: nn.Module) -> list[Unit]:
    """The modules of the model's outermost lists, in their order, and first what is in none of them: embeddings, norm.

    A parameter that several units share (tied weights) belongs to the rest, which is needed throughout. A model without
    lists is one unit. Modules without parameters are left out.
    """
    blocks = list(_outermost(model, ""))
    holders: Counter[int] = Counter()
    for _, block in blocks:
        holders.update({id(param) for param in block.parameters()})
    inside = {f"{name}." for name, _ in blocks}
    for name, param in model.named_parameters(remove_duplicate=False):
        if not any(name.startswith(prefix) for prefix in inside):
            holders[id(param)] += 2  # the rest needs it as well
    first_names = {id(param): name for name, param in model.named_parameters()}
    units = []
    for name, block in blocks:
        own = tuple(first_names[id(param)] for param in block.parameters() if holders[id(param)] == 1)
        if own:
            units.append(Unit(name, block, own))
    taken = {name for unit in units for name in unit.parameters}
    rest = tuple(name for name in first_names.values() if name not in taken)
    return [Unit("", model, rest), *units]


def _outermost(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The entries of containers that lie in no other entry. A list in a list is none: nobody calls it."""
    is_container = isinstance(module, _CONTAINERS)
    for name, child in module.named_children():
        if is_container and type(child).forward is not nn.Module.forward:
            yield prefix + name, child
        else:
            yield from _outermost(child, f"{prefix}{name}.")
