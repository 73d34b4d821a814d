"""Stages: consecutive layers of a model that one rank computes, and nothing of the rest.

A model's layers are numbered: 0 is its entry (embeddings), 1 to n are its blocks, n + 1 is its exit (the last norm, and
the head that makes logits). A stage is a range of these numbers. Its parameters keep the names that they have in the
model, so that a checkpoint does not tell how the model was cut.

A parameter that two layers use (a head tied to the embedding) is there in both, and their gradients are to be added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from smolcluster.errors import ConfigError

# Of an attribute that says what a module is. Not those that may hold tensors: a stand-in would keep them in memory.
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Layers:
    """Which modules each layer of a model uses, by their names in it.

    Attributes:
        entry: of layer 0; may be none.
        blocks: of layers 1, 2, …: one each.
        exit: of the last layer; may be none.
        give_tuples: each block gives a tuple, of which the model takes the first element and looks at no other.
    """

    entry: tuple[str, ...]
    blocks: tuple[str, ...]
    exit: tuple[str, ...]
    give_tuples: bool = False

    def __len__(self) -> int:
        """How many layers there are, entry and exit included."""
        return len(self.blocks) + 2

    def modules(self, layer: int) -> tuple[str, ...]:
        """Those of one layer."""
        if layer == 0:
            return self.entry
        return self.exit if layer == len(self) - 1 else (self.blocks[layer - 1],)


@runtime_checkable
class Divisible(Protocol):
    """A model that can run some of its layers."""

    def layers(self) -> Layers:
        """What it consists of. Every parameter belongs to a layer; one that belongs to two is tied."""
        ...

    def forward_layers(self, x: Tensor, layers: range) -> Tensor:
        """Run layers `layers.start` to `layers.stop - 1`.

        Args:
            x: what the layer before the first one gives: (B, T, D) of a transformer; the model's inputs for layer 0.
            layers: not empty.

        Returns:
            What the last one gives; logits if it is the exit.
        """
        ...


def layers_of(model: nn.Module) -> Layers:
    """The layers of a model.

    Raises:
        ConfigError: the model cannot be cut into stages.
    """
    if isinstance(model, Divisible):
        return model.layers()
    if isinstance(model, nn.Sequential) and _is_plain(model):
        # Not named_children(), which gives a module that runs twice once.
        modules = {name: module for name, module in model._modules.items() if module is not None}
        first, *blocks, last = modules if len(modules) > 1 else ("", "")
        if first and {*modules[first].parameters()} & {*modules[last].parameters()}:
            return Layers((first,), tuple(blocks), (last,))  # which alone may share parameters
        return Layers((), tuple(modules), ())
    raise ConfigError(
        f"a {type(model).__name__} cannot be cut into stages, as nothing says which of its parts run one after the "
        "other. Make it an nn.Sequential, give it the methods of smolcluster.models.stage.Divisible, or choose "
        "algorithm fsdp"
    )


def _is_plain(model: nn.Sequential) -> bool:
    """Whether it only runs its modules: neither a subclass's forward nor a hook would be called when it is cut."""
    hooks = (model._forward_hooks, model._forward_pre_hooks, model._backward_hooks, model._backward_pre_hooks)
    return len(model) > 0 and getattr(model.forward, "__func__", None) is nn.Sequential.forward and not any(hooks)


def layer_parameters(model: nn.Module, layers: Layers, layer: int) -> dict[str, nn.Parameter]:
    """The parameters that a layer uses, tied ones by the first name that they have in the model."""
    names = {id(param): name for name, param in model.named_parameters()}
    modules = [model.get_submodule(name) for name in layers.modules(layer)]
    return {names[id(param)]: param for module in modules for param in module.parameters()}


def tied_parameters(model: nn.Module, layers: Layers) -> list[str]:
    """Names of the parameters that both the entry and the exit use.

    Raises:
        ConfigError: other layers share parameters, or a parameter belongs to none.
    """
    users: dict[str, list[int]] = {name: [] for name, _ in model.named_parameters()}
    for layer in range(len(layers)):
        for name in layer_parameters(model, layers, layer):
            users[name].append(layer)
    tied = [name for name, used_by in users.items() if len(used_by) > 1]
    for name, used_by in users.items():
        if not used_by:
            raise ConfigError(f"{name} belongs to no layer of the {type(model).__name__}, which can thus not be cut")
        if len(used_by) > 1 and used_by != [0, len(layers) - 1]:
            raise ConfigError(
                f"{name} is shared by layers {used_by} of the {type(model).__name__}. Only the entry and the exit of a "
                "model that is cut into stages may share parameters: choose algorithm fsdp"
            )
    return tied


class Stage:
    """Some consecutive layers of a model.

    Attributes:
        module: the model without the other layers' modules.
        parameters: this stage's, by their names in the whole model (a tied one by its first).
        layers: which.
        is_first: it takes the model's inputs.
        is_last: it gives logits.
        end: the module whose result is the stage's, by its name in the model; "" if it has no modules.
    """

    def __init__(self, model: nn.Module, layers: range) -> None:
        """Take the model over: what the other layers use is removed from it.

        Args:
            model: its parameters may be on the meta device.
            layers: which to keep, not empty.
        """
        every = layers_of(model)
        self.module = model
        self.layers = layers
        self.is_first = layers.start == 0
        self.is_last = layers.stop == len(every)
        self._modules = [name for layer in layers for name in every.modules(layer)]
        self.end = self._modules[-1] if self._modules else ""
        self._run = model.forward_layers if isinstance(model, Divisible) else self._run_modules
        self.parameters = {n: p for layer in layers for n, p in layer_parameters(model, every, layer).items()}
        kept = set(self._modules)
        for layer in range(len(every)):
            for name in every.modules(layer):
                if name not in kept:
                    gives_tuple = every.give_tuples and name in every.blocks
                    replace_module(model, name, Absent(model.get_submodule(name), gives_tuple=gives_tuple))

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layers; see `Divisible.forward_layers`."""
        return self._run(x, self.layers)

    def _run_modules(self, x: Tensor, _: range) -> Tensor:
        for name in self._modules:
            x = self.module.get_submodule(name)(x)
        return x


class Absent(nn.Module):
    """Stands where a module was that another rank has: passes on what it is given; in an embedding's place gives 0.

    A model may look at a block before it calls it, as at its kind of attention to choose a mask. So what stands for a
    block has its plain attributes, and its parts have those of the block's parts; no parameters and no buffers.
    """

    def __init__(self, module: nn.Module, *, gives_tuple: bool = False) -> None:
        """Stand for a module, and keep nothing of it alive.

        Args:
            module: whose place it is.
            gives_tuple: give (x,), as the module does.
        """
        super().__init__()
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, _PLAIN):
                setattr(self, name, value)
        for name, part in module.named_children():
            self.add_module(name, Absent(part))
        self._gives_tuple = gives_tuple
        self._is_embedding = isinstance(module, nn.Embedding)

    def forward(self, x: Tensor, *_args: object, **_kwargs: object) -> Tensor | tuple[Tensor]:
        """`x` itself, or 0 in an embedding's place, or if these are ids; in a tuple where the module gives one."""
        # OPT's embedding of positions is given its mask, in floating point.
        is_embedded = self._is_embedding or not x.is_floating_point()
        out = torch.zeros((), device=x.device) if is_embedded else x
        return (out,) if self._gives_tuple else out


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place that `name` says."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
