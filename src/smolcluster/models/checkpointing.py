"""Activation checkpointing: what a block computes in forward is forgotten, and computed again when backward needs it.

Of each block only its input is kept, so memory grows by one value per token, layer and width instead of by all that the
block computes; at any time one block is whole. In return each block computes forward twice: about a third more time.

What is computed stays the same to the bit: dropout draws the same masks, autocast computes in the same precision, and a
running mean counts a batch once.

Source    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, section 4
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from smolcluster.errors import ConfigError
from smolcluster.models.partition import split_into_units


def checkpoint_activations(model: nn.Module) -> int:
    """Make every module of the model's outermost lists compute its activations again in backward; in place.

    Without effect in evaluation and without gradients. Names and parameters stay; a deep copy is checkpointed too.

    Args:
        model: calls its blocks, not their methods.

    Returns:
        How many modules there are.

    Raises:
        ConfigError: the model has no list of modules.
    """
    modules = [unit.module for unit in split_into_units(model)[1:]]
    if not modules:
        raise ConfigError(
            "training.activation_checkpointing needs a model whose blocks lie in an nn.ModuleList, nn.Sequential or "
            f"nn.ModuleDict; {type(model).__name__} has none. Set it to false"
        )
    for module in modules:
        # Beneath `__call__`, so that hooks of the module do not run again. Not a closure: a deep copy, such as a server
        # evaluates, is to compute with its own parameters.
        module.forward = functools.partial(_checkpointed, module, module.forward)
    # What `checkpoint` loads when it is first called: a second or more, for which in training the others would wait.
    importlib.import_module("torch._dynamo")
    return len(modules)


def _checkpointed(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    # Keyword arguments go as one: they may have names of `checkpoint`'s own, and it looks at arguments by position to
    # know which devices' random numbers it is to repeat.
    return checkpoint(
        functools.partial(_call, forward),
        kwargs,
        *args,
        use_reentrant=False,  # or backward would give a shared parameter several gradients, one after the other
        preserve_rng_state=True,
        context_fn=lambda: (contextlib.nullcontext(), _Recomputation(module)),
    )


def _call(forward: Callable[..., Any], kwargs: dict[str, Any], *args: Any) -> Any:
    return forward(*args, **kwargs)


class _Recomputation:
    """What a module is in while it computes again: nothing but activations comes of it. Made before the first time."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # torch repeats the random numbers of the CPU and of CUDA, but not those of MPS, and does not say so
        # (github.com/pytorch/pytorch/issues/127676).
        is_mps = any(param.device.type == "mps" for param in module.parameters())
        self._first_numbers = torch.mps.get_rng_state() if is_mps else None

    def __enter__(self) -> None:
        self._buffers = [
            (part, name, buffer)
            for part in self._module.modules()
            for name, buffer in part.named_buffers(recurse=False)
        ]
        for part, name, buffer in self._buffers:
            setattr(part, name, buffer.clone())
        if self._first_numbers is not None:
            self._next_numbers = torch.mps.get_rng_state()
            torch.mps.set_rng_state(self._first_numbers)

    def __exit__(self, *_exc: object) -> None:
        if self._first_numbers is not None:
            torch.mps.set_rng_state(self._next_numbers)
        for part, name, buffer in self._buffers:
            setattr(part, name, buffer)
