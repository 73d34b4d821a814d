"""GPT-2 folders as Hugging Face has them: read into our GPT, and written from it. Needs no transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from smolcluster.errors import ConfigError
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.models.folder import CONFIG, WEIGHTS, load_tensors, read_config
from smolcluster.models.gpt import GPT, NORM_EPS, GPTConfig

_SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "model_dim",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_positions": "max_seq_len",
}
# Both are GELU by tanh. What GPT-2's configuration may say, and what it says where it is silent.
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")
_FIXED: tuple[tuple[str, JsonValue, tuple[JsonValue, ...]], ...] = (
    ("activation_function", "gelu_new", _ACTIVATIONS),
    ("layer_norm_epsilon", NORM_EPS, (NORM_EPS,)),
    ("tie_word_embeddings", True, (True,)),
    ("scale_attn_weights", True, (True,)),
    ("scale_attn_by_inverse_layer_idx", False, (False,)),
    ("add_cross_attention", False, (False,)),
)
# Causal masks that older releases of transformers stored with the weights.
_MASKS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")


def gpt2_config(folder: Path, dropout: float = 0.0) -> GPTConfig:
    """The sizes of a GPT-2 folder.

    Args:
        folder: with config.json.
        dropout: the folder's own is not taken: it is part of the training, not of the model.

    Raises:
        ConfigError: the file is unreadable, or describes something that our GPT does not compute.
    """
    content = read_config(folder)
    file = folder / CONFIG
    if content.get("model_type") != "gpt2":
        raise ConfigError(
            f"{file} has model_type {content.get('model_type')}, but model.type gpt loads gpt2 only. Set model.type=hf"
        )
    for key, default, accepted in _FIXED:
        if (value := content.get(key, default)) not in accepted:
            raise ConfigError(f"{file} has {key} {value}, which model.type gpt does not compute. Set model.type=hf")
    sizes = {own: content.get(key) for key, own in _SIZES.items()}
    sizes["ff_dim"] = content.get("n_inner")
    if sizes["ff_dim"] is None and isinstance(sizes["model_dim"], int):
        sizes["ff_dim"] = 4 * sizes["model_dim"]
    whole = {key: value for key, value in sizes.items() if isinstance(value, int)}
    if missing := sizes.keys() - whole.keys():
        raise ConfigError(f"{file} does not say the model's {', '.join(sorted(missing))}. Name another folder")
    return GPTConfig(**whole, dropout=dropout)


def load_gpt2(folder: Path, dropout: float = 0.0) -> GPT:
    """A GPT-2 folder as our GPT: float32, on the CPU, in training mode.

    Raises:
        ConfigError: see `gpt2_config`.
        CheckpointError: a file is damaged, or its tensors are not those of its configuration.
    """
    model = GPT(gpt2_config(folder, dropout))
    model.load_exported(_exported(folder))
    return model


def read_gpt2(folder: Path, model: GPT, names: Collection[str]) -> dict[str, Tensor]:
    """Some parameters of a GPT-2 folder by our names, float32, on the CPU; no others are read.

    Args:
        folder: one that `load_gpt2` takes.
        model: of its sizes; its own parameters are not looked at and may be on the meta device.
        names: which parameters.

    Raises:
        CheckpointError: a file is damaged.
    """
    tensors = _exported(folder)
    values = {}
    for name, own_name, is_transposed in model.export_names():
        if own_name in names and own_name not in values:  # a tied head comes last
            tensor = tensors[name].t() if is_transposed else tensors[name]
            values[own_name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return values


def _exported(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors by the names that `GPT.load_exported` takes. They stay in the files until they are read."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_tensors(folder).items():
        # The published files say "h.0.…", what GPT2LMHeadModel saves "transformer.h.0.…".
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not _MASKS.fullmatch(full):
            tensors[full] = tensor
    return tensors


def save_gpt2(model: GPT, folder: Path, *, eos_id: int | None = None) -> None:
    """Write config.json and model.safetensors, in the model's own dtype, into a folder that is there.

    Args:
        model: on any device.
        folder: where to.
        eos_id: the tokenizer's end of text, for whoever generates.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    sizes = model.config
    dtype = str(model.token_embedding.weight.dtype).removeprefix("torch.")
    content: JsonObject = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{key: getattr(sizes, own) for key, own in _SIZES.items()},
        "n_inner": sizes.ff_dim,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), sizes.dropout),
        **{key: default for key, default, _ in _FIXED},
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 4.56
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.cpu() for name, tensor in model.export_state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
