"""Which parts of a model of transformers run one after the other, and how some of them are run by themselves.

Nothing of its code is repeated here: the whole model runs, with stand-ins for what other ranks have (see
models/stage.py). Its own forward makes masks and positions; what comes from the rank before is put in front of the
first block that is here, and what the last one gives is taken from it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from smolcluster.errors import ConfigError
from smolcluster.models.partition import split_into_units
from smolcluster.models.stage import Absent, Layers, replace_module

logger = logging.getLogger(__name__)


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
    for give_tuples in (False, True):
        before = _called_before(inner, blocks, beside, give_tuples)
        if before is not None:
            entry = tuple(name for name in beside if name in before)
            return Layers(entry, blocks, tuple(name for name in beside if name not in before), give_tuples)
    raise _refusal(inner)


def _called_before(inner: Any, blocks: tuple[str, ...], beside: list[str], give_tuples: bool) -> set[str] | None:
    """Which modules beside the blocks run before them. Found by running the model with nothing in their places.

    Returns:
        None if it is not true of the model that each block is given what the one before gives, in a tuple or not, and
        nothing else of it is looked at, nor of the text; or if it cannot begin with embeddings, as later stages do.
    """
    width = inner.config.get_text_config().hidden_size
    originals = {name: inner.get_submodule(name) for name in (*blocks, *beside)}
    # Two texts of three tokens: taking the first element of a tensor, as of a tuple, gives another shape.
    ids, embeddings = torch.zeros((2, 3), dtype=torch.int64), torch.zeros((2, 3, width))
    try:
        first = _run_without(inner, originals, blocks if give_tuples else (), {"input_ids": ids})
        later = _run_without(inner, originals, blocks if give_tuples else (), {"inputs_embeds": embeddings})
    # StopIteration: it asks for its first parameter's dtype, and has none.
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, StopIteration) as exc:
        logger.debug("run without its modules model=%s give_tuples=%s error=%r", type(inner).__name__, give_tuples, exc)
        return None
    if not (_is_chain(first, blocks, embeddings.shape) and _is_chain(later, blocks, embeddings.shape)):
        return None
    if not all(map(_is_given_same, _of_blocks(first, blocks), _of_blocks(later, blocks))):
        return None
    order = [call.name for call in first]
    return set(order[: order.index(blocks[0])])


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A module that was run, what it was given first and besides, and what it gave."""

    name: str
    given: Tensor
    besides: list[Any]
    gave: Tensor


def _run_without(
    inner: Any, modules: Mapping[str, nn.Module], giving_tuples: tuple[str, ...], inputs: Mapping[str, Tensor]
) -> list[_Call]:
    """Run a model with stand-ins for some of its modules; which of them ran, in order."""
    calls: list[_Call] = []

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if "input_ids" in inputs and not args[0].is_floating_point():
            # Not the zeros that a later stage begins with: what is made of them besides is to be seen.
            out = torch.ones((*inputs["input_ids"].shape, inner.config.get_text_config().hidden_size))
        calls.append(_Call(name, args[0], tree_leaves((args[1:], kwargs)), out))
        return _FirstOnly((out,)) if name in giving_tuples else out

    try:
        for name, module in modules.items():
            stand_in = Absent(module)
            stand_in.register_forward_hook(
                lambda _module, args, kwargs, out, name=name: note(name, args, kwargs, out), with_kwargs=True
            )
            replace_module(inner, name, stand_in)
        with torch.no_grad():
            inner(**inputs, use_cache=False)
    finally:
        for name, module in modules.items():
            replace_module(inner, name, module)
    return calls


def _is_chain(calls: list[_Call], blocks: tuple[str, ...], shape: torch.Size) -> bool:
    """Whether all blocks ran, each on what the one before gave; the first one and the exit on (B, T, D)."""
    ran = _of_blocks(calls, blocks)
    if [call.name for call in ran] != list(blocks):
        return False
    if any(after.given is not before.gave for before, after in itertools.pairwise(ran)):
        return False
    return all(call.given.shape == shape for call in calls[calls.index(ran[0]) :])


def _of_blocks(calls: list[_Call], blocks: tuple[str, ...]) -> list[_Call]:
    return [call for call in calls if call.name in blocks]


def _is_given_same(one: _Call, other: _Call) -> bool:
    """Whether a block is given the same besides, whatever the text: a later stage does not know it."""
    if len(one.besides) != len(other.besides):
        return False
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
        for a, b in zip(one.besides, other.besides, strict=True)
    )


class _FirstOnly(tuple[Tensor]):
    """A tuple at whose first element may be looked, and at nothing else: that would come from no other rank."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        if index != 0:
            raise IndexError("more than the first of what a block gives")
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Tensor]:
        raise TypeError("all of what a block gives")

    def __len__(self) -> int:
        raise TypeError("how much a block gives")


def _refusal(inner: Any) -> ConfigError:
    return ConfigError(
        f"a {type(inner).__name__} cannot be cut into stages: its forward is more than an entry, blocks that each give "
        "the next one a tensor, and an exit. Choose algorithm fsdp"
    )


def run_layers(inner: Any, every: Layers, x: Tensor, layers: range, options: Mapping[str, Any] | None = None) -> Tensor:
    """See `Divisible.forward_layers`; the model has stand-ins in the place of all other layers.

    Args:
        inner: transformers' model.
        every: all of its layers.
        x: see there.
        layers: see there.
        options: arguments of the model's forward besides; None: it keeps no keys and values.
    """
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
        # Not x itself, which some models would scale in place.
        given_in = {"input_ids": x} if is_first else {"inputs_embeds": torch.zeros_like(x)}
        out = inner(**given_in, **({"use_cache": False} if options is None else options))
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
