"""Which parts of a model of transformers run one after the other, and how some of them are run by themselves.

Nothing of its code is repeated here: the whole model runs, with stand-ins for what other ranks have (see
models/stage.py). Its own forward makes masks and positions; what comes from the rank before is put in front of the
first block that is here, and what the last one gives is taken from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smolcluster.errors import ConfigError
from smolcluster.models.partition import split_into_units
from smolcluster.models.stage import Layers, replace_module


def find_layers(model: nn.Module, inner: Any) -> Layers:
    """The layers of a causal language model.

    Args:
        model: whose names count; its parameters may be on the meta device.
        inner: the same as transformers' model.

    Raises:
        ConfigError: it is more than a chain of blocks in one list.
    """
    blocks = tuple(unit.name for unit in split_into_units(model)[1:])
    lists = {name.rpartition(".")[0] for name in blocks}
    if len(lists) != 1:
        raise _refusal(inner)
    path = lists.pop().split(".")
    beside = [
        f"{'.'.join([*path[:depth], child])}"
        for depth in range(len(path))
        for child, module in model.get_submodule(".".join(path[:depth])).named_children()
        if child != path[depth] and next(module.parameters(), None) is not None
    ]
    before = _called_before(inner, blocks, beside)
    return Layers(
        tuple(name for name in beside if name in before), blocks, tuple(name for name in beside if name not in before)
    )


def _called_before(inner: Any, blocks: tuple[str, ...], beside: list[str]) -> set[str]:
    """Which modules beside the blocks run before them. Found by running the model with nothing in their places."""
    calls: list[tuple[str, Tensor]] = []
    width = inner.config.get_text_config().hidden_size
    originals = {name: inner.get_submodule(name) for name in (*blocks, *beside)}
    try:
        for name in originals:
            replace_module(inner, name, _Recorder(name, width, calls))
        with torch.no_grad():
            inner(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as exc:
        raise _refusal(inner) from exc
    finally:
        for name, module in originals.items():
            replace_module(inner, name, module)
    order = [name for name, _ in calls]
    # A model that takes its blocks' outputs apart has made something else of what they passed on.
    passed = [x for name, x in calls[order.index(blocks[0]) :]] if blocks[0] in order else []
    if [name for name in order if name in blocks] != list(blocks) or any(x.shape != (1, 2, width) for x in passed):
        raise _refusal(inner)
    return set(order[: order.index(blocks[0])])


class _Recorder(nn.Module):
    """Notes that it is called; passes on what it is given, and for ids gives (B, T, D) zeros."""

    def __init__(self, name: str, width: int, calls: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self._name, self._width, self._calls = name, width, calls

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        self._calls.append((self._name, x))
        return x if x.is_floating_point() else torch.zeros((1, 2, self._width))


def _refusal(inner: Any) -> ConfigError:
    return ConfigError(
        f"a {type(inner).__name__} cannot be cut into stages: its forward is more than an entry, blocks that each give "
        "the next one a tensor, and an exit. Choose algorithm fsdp"
    )


def run_layers(inner: Any, every: Layers, x: Tensor, layers: range) -> Tensor:
    """See `Divisible.forward_layers`; the model has stand-ins in the place of all other layers."""
    blocks = [inner.get_submodule(name) for name in every.blocks]
    is_first, is_last = layers.start == 0, layers.stop == len(every)
    given: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if not is_first:
            # The exit alone: in front of the stand-in of the last block.
            stack.enter_context(_replacing_input(blocks[min(layers.start, len(blocks)) - 1], x))
        if not is_last:
            stack.enter_context(_taking(blocks, layers.stop - 2, given))
        # Later stages: for the shapes of masks and positions, and for nothing else.
        given_in = {"input_ids": x} if is_first else {"inputs_embeds": x.detach()}
        out = inner(**given_in, use_cache=False)
    logits: Tensor = out.logits
    return logits if is_last else given[0]


@contextlib.contextmanager
def _replacing_input(block: nn.Module, x: Tensor) -> Iterator[None]:
    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    handle = block.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _taking(blocks: list[nn.Module], last: int, given: list[Tensor]) -> Iterator[None]:
    """Keep what block `last` gives; -1: what the first one is given."""

    def take_output(_module: nn.Module, _args: Any, output: Any) -> None:
        given.append(output if isinstance(output, Tensor) else output[0])

    def take_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(args[0] if args else kwargs["hidden_states"])

    if last >= 0:
        handle = blocks[last].register_forward_hook(take_output)
    else:
        handle = blocks[0].register_forward_pre_hook(take_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
