"""Loads layers of any decoder-only model of transformers from its folder: those of a stage, and nothing of the rest.

The model is built without values, from config.json alone; the tensors of the layers that are wanted are read into it,
and stand-ins take the places of the others (models/stage.py).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smolcluster.errors import ConfigError
from smolcluster.hub import first_line, import_extra
from smolcluster.models.folder import read_config
from smolcluster.models.hf import HFModel, check_causal, own_generator
from smolcluster.models.hf_cache import make_slot_cache
from smolcluster.models.hf_decoder import FAILURES, HfDecoder, check_keeps
from smolcluster.models.hf_weights import StoredWeights
from smolcluster.models.linear import Linear, WeightKind, make_linear
from smolcluster.models.source import parameters_on_meta
from smolcluster.models.split import LayerCost
from smolcluster.models.stage import Absent, Layers, layer_parameters, replace_module, tied_parameters
from smolcluster.models.tensor_files import TensorFiles

# What transformers raises for a config.json that it can do nothing with.
_REFUSALS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
# Of blocks that keep something else than keys and values: transformers' names of them.
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention", "sparse", "dense")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
# Without learned or rotary positions a config.json may name no length; such models were trained with this one.
_DEFAULT_LENGTH = 2048
# Their frequencies change at the length that was trained, so what was kept before would not fit what comes after.
_CHANGING_ROPES = ("longrope", "su", "dynamic")


@dataclass(frozen=True, slots=True)
class HfSizes:
    """What serving has to know of a model.

    Attributes:
        family: model_type of config.json.
        vocab_size: V, token ids.
        model_dim: D, width of the residual stream.
        ff_dim: F, width of the feed-forward layer.
        num_layers: blocks.
        max_positions: longest sequence in tokens.
    """

    family: str
    vocab_size: int
    model_dim: int
    ff_dim: int
    num_layers: int
    max_positions: int


def read_hf_config(folder: Path) -> tuple[Any, HfSizes]:
    """transformers' configuration of a folder, and the sizes in it.

    Raises:
        ConfigError: transformers is not installed, does not know the model, or it is of a kind that cannot be served.
    """
    family = str(read_config(folder).get("model_type"))
    transformers = import_extra("transformers", f"the model in {folder}, a {family},")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config()
        width = int(text.hidden_size)
        sizes = HfSizes(
            family=family,
            vocab_size=int(text.vocab_size),
            model_dim=width,
            ff_dim=_first_size(text, ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")) or 4 * width,
            num_layers=int(text.num_hidden_layers),
            max_positions=_max_positions(text),
        )
    except _REFUSALS as exc:
        raise ConfigError(
            f"transformers cannot read config.json in {folder} ({first_line(exc)}). Code in a model's folder is never "
            "executed; check the folder, and the version of transformers"
        ) from exc
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"the model in {folder} is quantized, which cannot be served. Use the original")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"the model in {folder} is a {family}, which has an encoder. Name a decoder-only model")
    others = sorted({kind for kind in getattr(text, "layer_types", None) or () if kind not in _ATTENTION})
    if others:
        raise ConfigError(
            f"the model in {folder} is a {family} with layers of {', '.join(others)}, which keep something else than "
            "keys and values. It cannot be served"
        )
    return config, sizes


def _first_size(config: Any, names: Iterable[str]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((size for size in found if isinstance(size, int) and size > 0), None)


def _max_positions(config: Any) -> int:
    longest = _first_size(config, _LENGTHS) or _DEFAULT_LENGTH
    params = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One for all layers, or one for each kind of layer.
    ropes = [params, *(each for each in params.values() if isinstance(each, dict))]
    if any(rope.get("rope_type", rope.get("type")) in _CHANGING_ROPES for rope in ropes):
        trained = [rope.get("original_max_position_embeddings") for rope in ropes]
        trained.append(getattr(config, "original_max_position_embeddings", None))
        longest = min([longest, *(length for length in trained if isinstance(length, int))])
    return longest


@dataclass(slots=True)
class _Kept:
    """A layer that was read: tensors by their names in the model, and products by their modules' names."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    products: dict[str, _Product] = field(default_factory=dict)


class _Product(nn.Module):
    """In the place of an nn.Linear: the same product, from 8-bit integers."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., F)."""
        return self._linear(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class HfLoader:
    """Reads layers, and keeps those that it was asked for last: the same interface as decoder_files.DecoderLoader."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, kind: WeightKind = "plain", device: torch.device | str = "cpu"
    ) -> None:
        """Build the model without values; only the headers of its files are read.

        Args:
            folder: the model's.
            dtype: of weights and activations.
            kind: what the matrices of nn.Linear are kept as.
            device: where everything is to lie.

        Raises:
            ConfigError: it cannot be served.
            CheckpointError: a file is missing or damaged.
        """
        config, self.config = read_hf_config(folder)
        self._where = str(folder)
        self._dtype, self._kind, self._device = dtype, kind, torch.device(device)
        self._model = _build(folder, config, dtype)
        self._every = _layers(self._model)
        self._blocks = self.config.num_layers if self._every is None else len(self._every.blocks)
        with TensorFiles(folder) as files:
            self._stored = StoredWeights(self._model, files, self._where)
        self._cache_numbers = _cache_numbers(self._model, self._blocks)
        self._kept: dict[int, _Kept] = {}
        if kind != "plain":
            self._check_linears()

    @property
    def layers(self) -> int:
        """How many there are, entry and exit included."""
        return self._blocks + 2

    def costs(self) -> list[LayerCost]:
        """Of each layer: what a token takes, and what has to be held; by sizes alone.

        Raises:
            ConfigError: the model cannot be cut into stages.
        """
        if self._every is None:
            raise self._refusal()
        text = self._model.inner.config.get_text_config()
        chosen = _first_size(text, ("num_experts_per_tok", "moe_topk", "top_k_experts")) or 1
        costs = []
        for layer in range(len(self._every)):
            shapes = [param.shape for param in layer_parameters(self._model, self._every, layer).values()]
            # A token is multiplied with each matrix, and with those of a few experts, which are one tensor (E, F, D).
            used = sum(shape.numel() for shape in shapes if len(shape) == 2)
            used += sum(min(chosen, shape[0]) * shape[1] * shape[2] for shape in shapes if len(shape) == 3)
            # An embedding is looked up in.
            costs.append(LayerCost(float(used) if layer else 1.0, sum(shape.numel() for shape in shapes)))
        return costs

    def bytes_per_position(self) -> int:
        """Of keys and values, of one position of a sequence, in all blocks."""
        return self._cache_numbers * self._dtype.itemsize

    def load(self, files: TensorFiles, layers: range, *, slots: int, length: int) -> HfDecoder:
        """Some layers, with an empty cache; blocks while it reads those that are not there yet.

        Args:
            files: of the model's folder.
            layers: 0 is the entry, 1 to n are the blocks, n + 1 is the exit; see models/stage.py.
            slots: sequences that are kept at once.
            length: positions of each.

        Raises:
            CheckpointError: a file is damaged.
            ConfigError: the model cannot be cut into stages, or does not run like this.
        """
        if self._every is None and layers != range(self.layers):
            raise self._refusal()
        model = copy.deepcopy(self._model)
        places = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        wanted = list(layers) if self._every is not None else [0]
        self._kept = {layer: self._kept[layer] for layer in wanted if layer in self._kept}
        for layer in wanted:
            if layer not in self._kept:
                self._kept[layer] = self._read(files, layer)
        for layer in range(self.layers if self._every is not None else 0):
            assert self._every is not None
            for name in self._every.modules(layer) if layer not in layers else ():
                gives_tuple = self._every.give_tuples and name in self._every.blocks
                replace_module(model, name, Absent(model.get_submodule(name), gives_tuple=gives_tuple))
        for kept in self._kept.values():
            for name, product in kept.products.items():
                replace_module(model, name, product)
        _fill(model, {places[name]: value for kept in self._kept.values() for name, value in kept.tensors.items()})
        model.to(self._device)
        return HfDecoder(model, self._every, layers, self._dtype, blocks=self._blocks, slots=slots, length=length)

    def _read(self, files: TensorFiles, layer: int) -> _Kept:
        """The tensors of a layer, and of its products if they are not kept as they are; None of them twice."""
        kept = _Kept()
        modules = self._every.modules(layer) if self._every is not None else ("",)
        owned = [(module, self._model.get_submodule(module)) for module in modules]
        first_names = {id(param): name for name, param in self._model.named_parameters()}
        linears = {
            f"{place}.{name}".strip("."): part
            for place, module in owned
            for name, part in module.named_modules()
            if self._kind != "plain" and _is_linear(part)
        }
        for place, part in linears.items():
            names = [first_names[id(param)] for param in part.parameters()]
            values = [self._tensors(files, [name])[name] for name in names]
            linear = make_linear(values[0], values[1] if len(values) > 1 else None, self._kind)
            kept.products[place] = _Product(linear)
        taken = {id(part) for part in linears.values()}
        names = [
            first_names[id(param)]
            for _, module in owned
            for part in module.modules()
            if id(part) not in taken
            for param in part.parameters(recurse=False)
        ]
        stored = self._model.state_dict()
        buffers = [f"{place}.{name}".strip(".") for place, module in owned for name, _ in module.named_buffers()]
        kept.tensors = self._tensors(files, [*dict.fromkeys(names), *(name for name in buffers if name in stored)])
        return kept

    def _tensors(self, files: TensorFiles, names: Iterable[str]) -> dict[str, Tensor]:
        """By name; those of other layers that are here are not read again."""
        here = {name: tensor for kept in self._kept.values() for name, tensor in kept.tensors.items()}
        found = {name: here[name] for name in names if name in here}
        dtypes = {name: self._dtype_of(name) for name in names}
        read = self._stored.read(files, [name for name in names if name not in found])
        return found | {name: tensor.to(self._device, dtypes[name]) for name, tensor in read.items()}

    def _dtype_of(self, name: str) -> torch.dtype:
        """As from_pretrained has it: some parameters are kept in float32 in a model of 16 bits."""
        own = self._model.state_dict(keep_vars=True)[name].dtype
        kept: set[str] = set()
        if self._dtype in (torch.float16, torch.bfloat16):
            kept.update(getattr(self._model.inner, "_keep_in_fp32_modules_strict", None) or ())
        if self._dtype == torch.float16:
            kept.update(getattr(self._model.inner, "_keep_in_fp32_modules", None) or ())
        is_kept = any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in kept)
        return torch.float32 if is_kept else own

    def _check_linears(self) -> None:
        """8-bit integers would save little where most numbers are in no nn.Linear, as those of experts."""
        total = sum(param.numel() for param in self._model.parameters())
        linear = {id(p): p.numel() for part in self._model.modules() if _is_linear(part) for p in part.parameters()}
        if 2 * sum(linear.values()) < total:
            raise ConfigError(
                f"--dtype {self._kind}: most weights of a {self.config.family} are in no nn.Linear, and stay as they "
                "are. Choose fp32, bf16 or fp16"
            )

    def _refusal(self) -> ConfigError:
        return ConfigError(
            f"the model in {self._where}, a {self.config.family}, cannot be cut into stages: its forward is more than "
            "an entry, blocks that each give the next one a tensor, and an exit. Serve it in one process: leave "
            "--local and --split out"
        )


def _build(folder: Path, config: Any, dtype: torch.dtype) -> HFModel:
    transformers = import_extra("transformers", "this model")
    if dtype == torch.float64 and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # the others have no products in float64
    try:
        with own_generator(0), parameters_on_meta():
            inner = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except _REFUSALS as exc:
        raise ConfigError(
            f"transformers cannot build a causal language model from {folder} ({first_line(exc)}). Code in a model's "
            "folder is never executed; check the folder, and the version of transformers"
        ) from exc
    check_causal(inner, folder)
    if any(buffer.is_meta for buffer in inner.buffers()) or next(inner.parameters(recurse=False), None) is not None:
        raise ConfigError(
            f"the model in {folder}, a {config.model_type}, cannot be built in parts. It cannot be served"
        )
    model = HFModel(inner, None)
    model.train(False)
    return model


def _layers(model: HFModel) -> Layers | None:
    try:
        every = model.layers()
        tied_parameters(model, every)  # for what it refuses
    except ConfigError:
        return None
    return every


def _cache_numbers(model: HFModel, blocks: int) -> int:
    """How many numbers one position takes: a token runs through the model without values.

    Raises:
        ConfigError: it keeps something else than keys and values.
    """
    config = model.inner.config.get_text_config()
    meta, cache = copy.deepcopy(model).to("meta"), make_slot_cache(blocks, 1, 1)
    token = torch.zeros((1, 1), dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode():
            meta.inner(input_ids=token, past_key_values=cache, use_cache=True)
    except FAILURES:  # a router looks at values; those that run are checked when they are loaded
        heads = _first_size(config, ("num_key_value_heads", "num_attention_heads")) or 1
        width = _first_size(config, ("head_dim",)) or config.hidden_size // config.num_attention_heads
        # Of latent attention, where head_dim is that of a part.
        parts = [getattr(config, name, None) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
        return blocks * heads * (max(width, parts[0] + parts[1]) + max(width, parts[2]))
    check_keeps(model.inner.config.model_type, cache, set(range(blocks)))
    return sum(kept.keys.numel() + kept.values.numel() for kept in cache.layers)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _fill(model: HFModel, values: Mapping[int, Tensor]) -> None:
    """Put values in the places of the parameters and buffers with these ids, tied ones into each of theirs."""
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and id(param) in values:
                module._parameters[name] = nn.Parameter(values[id(param)], requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in values:
                module._buffers[name] = values[id(buffer)]
    left = [name for name, param in model.named_parameters() if param.is_meta]
    assert not left, left
