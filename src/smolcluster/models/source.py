"""Where a model's initial values come from, one unit at a time: for ranks of which none shall hold the whole model.

A model is built with its parameters on the meta device, where they have shapes and no elements; then each unit's values
are drawn or read when it is their turn. They are, bit for bit, those that `build_model` gives.

Values that depend on (seed, name) can be drawn by themselves, and files can be read in parts. Where neither holds,
because a constructor computed the values or transformers has to convert a file's tensors, the model is built as a whole
after all, and each unit is let go when it was asked for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from smolcluster.config.schema import ModelConfig
from smolcluster.errors import ConfigError
from smolcluster.models.build import build_model
from smolcluster.models.folder import load_tensors, model_folder
from smolcluster.models.gpt import GPT
from smolcluster.models.gpt2 import read_gpt2
from smolcluster.models.hf import HFModel, adopt_folder, build_hf, draw_hf_parameters, stored_names
from smolcluster.models.init import draw_parameters
from smolcluster.models.partition import Unit

logger = logging.getLogger(__name__)

# Under this name a parameter remembers what is registered in its place, so that it may be registered twice: a tie.
_ON_META = "_smolcluster_on_meta"


class ModelSource(Protocol):
    """A model and its initial values. One thread at a time."""

    def build(self) -> nn.Module:
        """The model with its parameters on the meta device and its buffers on the CPU; blocks, perhaps for a download.

        In training mode. Tied parameters are one, as ever. Another one with each call.

        Raises:
            ConfigError: as `build_model`.
            CheckpointError: as `build_model`.
        """
        ...

    def values(self, unit: Unit) -> Mapping[str, Tensor]:
        """The initial values of a unit's parameters by their names in the model: float32, on CPU; blocks.

        They are the caller's; the source keeps none of them. The unit's module is not looked at.

        Raises:
            CheckpointError: a file is damaged.
        """
        ...


def model_source(
    config: ModelConfig, *, seed: int, vocab_size: int | None = None, num_classes: int | None = None
) -> ModelSource | None:
    """The source of a model that `build_model` would build from the same arguments.

    Returns:
        None for a class of the user's own: its constructor draws values in an order of its own, so the model has to be
        built as a whole.
    """
    if ":" in config.type:
        return None
    make = functools.partial(build_model, config, seed=seed, vocab_size=vocab_size, num_classes=num_classes)
    is_stored = config.init == "pretrained"
    if config.type == "hf":
        make_random = functools.partial(build_hf, config, seed=seed, vocab_size=vocab_size, with_weights=False)
        name = config.hf_model_name
        return _HF(name, make, _StoredHF(name, make_random) if is_stored else _DrawnHF(make_random, seed))
    return _StoredGPT(config.hf_model_name, make) if is_stored and config.type == "gpt" else _Drawn(make, seed)


class _Drawn:
    """Parameters with an `init_rule`: each is drawn from (seed, name)."""

    def __init__(self, make: Callable[[], nn.Module], seed: int) -> None:
        self._make = make
        self._seed = seed

    def build(self) -> nn.Module:
        with parameters_on_meta():
            return self._make()

    def values(self, unit: Unit) -> Mapping[str, Tensor]:
        return draw_parameters(self._own, unit.parameters, self._seed)

    @functools.cached_property
    def _own(self) -> nn.Module:
        """For its rules and shapes: those of the model that was given away may be changed by now."""
        return self.build()


class _StoredGPT:
    """Our GPT from a folder of GPT-2."""

    def __init__(self, folder_name: str | None, make: Callable[[], nn.Module]) -> None:
        self._folder_name = folder_name
        self._make = make

    def build(self) -> nn.Module:
        with parameters_on_meta():
            # With all its checks of the folder. What it copies to the meta device is not read.
            return self._make()

    def values(self, unit: Unit) -> Mapping[str, Tensor]:
        return read_gpt2(self._folder, self._own, unit.parameters)

    @functools.cached_property
    def _folder(self) -> Path:
        return model_folder(self._folder_name, with_weights=True)

    @functools.cached_property
    def _own(self) -> GPT:
        model = self.build()
        assert isinstance(model, GPT)
        return model


class _HFParts(Protocol):
    """How a model of transformers comes in parts; None wherever it does not."""

    def build(self) -> HFModel | None: ...

    def values(self, unit: Unit) -> dict[str, Tensor] | None: ...


class _HF:
    """A model of transformers: in parts, or built as a whole and given away in parts."""

    def __init__(self, name: str | None, make: Callable[[], nn.Module], parts: _HFParts) -> None:
        self._name = name
        self._make = make
        self._parts = parts
        self._left: dict[str, Tensor] | None = None

    def build(self) -> nn.Module:
        model = self._parts.build()
        return self._build_whole() if model is None else model

    def values(self, unit: Unit) -> Mapping[str, Tensor]:
        if self._left is None:
            values = self._parts.values(unit)
            if values is not None:
                return values
        if self._left is None or not self._left.keys() >= set(unit.parameters):
            self._build_whole()
        assert self._left is not None
        return {name: self._left.pop(name) for name in unit.parameters}

    def _build_whole(self) -> nn.Module:
        model = self._make()
        logger.info("model built whole, as its values cannot be had in parts model=%s", self._name)
        self._left = {name: param.detach() for name, param in model.named_parameters()}
        for module in model.modules():
            for name, param in module._parameters.items():
                if param is not None:
                    module._parameters[name] = _on_meta(param)
        return model


class _DrawnHF:
    """Initialised by transformers' own rules: each module from (seed, module name)."""

    def __init__(self, make: Callable[[], HFModel], seed: int) -> None:
        self._make = make
        self._seed = seed

    def build(self) -> HFModel | None:
        return _build_on_meta(self._make)

    def values(self, unit: Unit) -> dict[str, Tensor] | None:
        return None if self._own is None else draw_hf_parameters(self._own, unit.parameters, self._seed)

    @functools.cached_property
    def _own(self) -> HFModel | None:
        return self.build()


class _StoredHF:
    """Read from the model's folder, tensor by tensor."""

    def __init__(self, folder_name: str | None, make: Callable[[], HFModel]) -> None:
        self._folder_name = folder_name
        self._make = make  # with random values: it needs no others
        # By a parameter's name the name in the files, and what it is converted to.
        self._places: dict[str, tuple[str, torch.dtype]] = {}

    def build(self) -> HFModel | None:
        stored = load_tensors(self._folder)
        model = _build_on_meta(self._make)
        names = None if model is None else stored_names(model, stored)
        if model is None or names is None:
            return None
        for name, buffer in model.state_dict().items():
            if not buffer.is_meta:
                buffer.copy_(stored[names[name]])
        adopt_folder(model, self._folder, stored)
        self._places = {name: (names[name], param.dtype) for name, param in model.named_parameters()}
        return model

    def values(self, unit: Unit) -> dict[str, Tensor] | None:
        if not self._places and self.build() is None:
            return None
        stored = load_tensors(self._folder)  # they stay in the files until they are read
        places = [(name, *self._places[name]) for name in unit.parameters]
        return {name: stored[place].to(dtype, copy=True) for name, place, dtype in places}

    @functools.cached_property
    def _folder(self) -> Path:
        return model_folder(self._folder_name, with_weights=True)


def _build_on_meta(make: Callable[[], HFModel]) -> HFModel | None:
    """None: this model cannot be built without values."""
    try:
        with parameters_on_meta():
            model = make()
    except (ConfigError, RuntimeError) as exc:
        # What a constructor asks of a tensor on the meta device is a RuntimeError; transformers' other refusals hold.
        if isinstance(exc, ConfigError) and not isinstance(exc.__cause__, RuntimeError):
            raise
        return None
    return None if any(buffer.is_meta for buffer in model.buffers()) else model


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that this thread makes get their parameters on the meta device; all other tensors are as they would be.

    A parameter is replaced when its module registers it: so at any time there is one that nobody has filled yet, and
    what a constructor does to it afterwards, such as `reset_parameters`, does nothing. (Under
    `torch.device("meta")` buffers too would be without values.)
    """
    thread = threading.get_ident()

    def replace(module: nn.Module, name: str, param: nn.Parameter) -> nn.Parameter | None:
        return _on_meta(param) if threading.get_ident() == thread and not is_lazy(param) else None

    handle = register_module_parameter_registration_hook(replace)  # type: ignore[arg-type]  # torch declares no result
    try:
        yield
    finally:
        handle.remove()


def _on_meta(param: nn.Parameter) -> nn.Parameter:
    """The same one for the same parameter."""
    if param.is_meta:
        return param
    known = getattr(param, _ON_META, None)
    if known is None:
        known = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        vars(known).update(vars(param))
        setattr(param, _ON_META, known)
    assert isinstance(known, nn.Parameter)
    return known
