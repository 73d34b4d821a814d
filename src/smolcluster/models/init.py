"""Initial parameters that depend on (seed, name) and on nothing else.

Each parameter is drawn from a generator of its own, so the order of construction, the global random state and the
way a model is cut into parts change nothing: block 3 alone on a pipeline stage starts from the numbers that it has
in the whole model. A module says how its parameters are distributed through `init_rule`; modules that say nothing
(a user's own) keep the values that their constructor gave them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class InitRule:
    """How one parameter is distributed.

    Attributes:
        kind: normal with mean 0 and deviation `scale`, uniform in [-scale, scale), or constant zeros or ones.
        scale: standard deviation or bound; unused for the constants.
    """

    kind: Literal["normal", "uniform", "zeros", "ones"]
    scale: float = 0.0


@runtime_checkable
class HasInitRule(Protocol):
    """A module that decides the distribution of its parameters and of its children's."""

    def init_rule(self, name: str) -> InitRule:
        """The rule of the parameter `name`, as `named_parameters()` of this module spells it."""
        ...


def init_parameters(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill every parameter that has a rule, in place; parameters on the meta device are left alone.

    The innermost module around a parameter that has `init_rule` decides. A tied parameter counts under its first
    name. Values are drawn in float32 on the CPU and then converted, so that float64 and float32 runs, and runs on
    any device, start from the same numbers.

    Args:
        module: the whole model or a part of it.
        seed: the run's seed.
        prefix: for a part, its place in the whole model with the dot: "blocks.3.".
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            rule = _rule_for(module, name)
            if rule is not None and not parameter.is_meta:
                parameter.copy_(draw_parameter(prefix + name, parameter.shape, rule, seed))


def draw_parameters(module: nn.Module, names: Iterable[str], seed: int) -> dict[str, Tensor]:
    """The initial values of some parameters that have a rule: float32, on CPU, wherever the module has its own.

    Args:
        module: the whole model; its parameters may be on the meta device and stay as they are.
        names: as `named_parameters()` of the module spells them, a tied one by its first name.
        seed: the run's seed.
    """
    values = {}
    for name in names:
        rule = _rule_for(module, name)
        assert rule is not None, f"{name} has no init_rule"
        values[name] = draw_parameter(name, module.get_parameter(name).shape, rule, seed)
    return values


def draw_parameter(full_name: str, shape: Sequence[int], rule: InitRule, seed: int) -> Tensor:
    """The initial value of one parameter: float32, on CPU, of `shape`.

    Args:
        full_name: its name in the whole model.
        shape: its whole shape; a rank that keeps a shard draws all of it and cuts.
        rule: its distribution.
        seed: the run's seed.
    """
    # The device is named: a caller may stand inside `with torch.device("meta")`.
    values = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    if rule.kind == "zeros":
        return values.zero_()
    if rule.kind == "ones":
        return values.fill_(1.0)
    generator = torch.Generator(device="cpu").manual_seed(named_seed(full_name, seed))
    if rule.kind == "normal":
        return values.normal_(0.0, rule.scale, generator=generator)
    return values.uniform_(-rule.scale, rule.scale, generator=generator)


def named_seed(full_name: str, seed: int) -> int:
    """The seed of whatever bears this name in a run with this seed: 64 bits."""
    digest = hashlib.sha256(f"{seed}:{full_name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _rule_for(module: nn.Module, name: str) -> InitRule | None:
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):  # from the innermost owner outwards
        owner = module.get_submodule(".".join(parts[:cut]))
        if isinstance(owner, HasInitRule):
            return owner.init_rule(".".join(parts[cut:]))
    return None
