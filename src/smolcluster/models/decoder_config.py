"""The sizes and habits of a decoder-only transformer, as Hugging Face's config.json has them. Needs no transformers.

GPT-2, Llama, Mistral, Qwen2 and Qwen3: one kind of block with few differences, which decoder.py computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from smolcluster.errors import ConfigError
from smolcluster.kinds import JsonObject
from smolcluster.models.folder import CONFIG, read_config

Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]
# By the names of transformers.
_ACTIVATIONS: dict[object, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What decoder.py computes.

    Attributes:
        family: model_type of config.json.
        vocab_size: V, token ids.
        model_dim: D, width of the residual stream.
        num_layers: blocks.
        num_heads: H, of queries.
        kv_heads: of keys and values; divides num_heads (grouped-query attention).
        head_dim: K, width of a head.
        ff_dim: F, width of the feed-forward layer.
        max_positions: longest sequence in tokens.
        norm_eps: of all norms.
        activation: of the feed-forward layer.
        windows: for each block how many positions a token sees, itself included; None: all before it.
        is_tied: the head is the token embedding.
        rope: frequencies of rotary positions, (K/2,) float32; None: positions are learned (GPT-2).
        has_qkv_bias: of queries, keys and values.
        has_out_bias: of attention's projection.
        has_ff_bias: of the feed-forward layer.
        has_qk_norm: queries and keys are normalised head by head (Qwen3).
    """

    family: str
    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    ff_dim: int
    max_positions: int
    norm_eps: float
    activation: Activation
    windows: tuple[int | None, ...]
    is_tied: bool
    rope: Tensor | None = None
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_ff_bias: bool = False
    has_qk_norm: bool = False

    @property
    def is_gpt2(self) -> bool:
        """LayerNorm, learned positions, a feed-forward layer without a gate."""
        return self.family == "gpt2"


def read_decoder_config(folder: Path) -> DecoderConfig | None:
    """What a folder's config.json describes; None if decoder.py does not compute it.

    Raises:
        ConfigError: the file is unreadable, or a size in it makes no sense.
    """
    content = read_config(folder)
    family = content.get("model_type")
    try:
        if family == "gpt2":
            return _gpt2(content)
        if family in FAMILIES:
            return _llama_like(str(family), content)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as exc:
        raise ConfigError(f"{folder / CONFIG} lacks a size, or one makes no sense ({exc}). Copy it again") from exc
    return None


def _gpt2(content: JsonObject) -> DecoderConfig | None:
    width, layers, heads = _int(content, "n_embd"), _int(content, "n_layer"), _int(content, "n_head")
    activation = _ACTIVATIONS.get(content.get("activation_function", "gelu_new"))
    is_plain = content.get("scale_attn_weights", True) and not any(
        content.get(key) for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    )
    if activation is None or not is_plain:
        return None
    return DecoderConfig(
        family="gpt2",
        vocab_size=_int(content, "vocab_size"),
        model_dim=width,
        num_layers=layers,
        num_heads=heads,
        kv_heads=heads,
        head_dim=_divided(width, heads),
        ff_dim=_int(content, "n_inner", 4 * width),
        max_positions=_int(content, "n_positions"),
        norm_eps=_float(content, "layer_norm_epsilon", 1e-5),
        activation=activation,
        windows=(None,) * layers,
        is_tied=bool(content.get("tie_word_embeddings", True)),
        has_qkv_bias=True,
        has_out_bias=True,
        has_ff_bias=True,
    )


def _llama_like(family: str, content: JsonObject) -> DecoderConfig | None:
    width, layers = _int(content, "hidden_size"), _int(content, "num_hidden_layers")
    heads = _int(content, "num_attention_heads")
    kv_heads = _int(content, "num_key_value_heads", 32 if family.startswith("qwen") else heads)
    head_dim = _int(content, "head_dim", 128 if family == "qwen3" else width // heads)
    activation = _ACTIVATIONS.get(content.get("hidden_act", "silu"))
    rope = _rope(content, head_dim)
    _divided(heads, kv_heads)
    if activation is None or rope is None:
        return None
    has_bias = bool(content.get("attention_bias", False)) and family in ("llama", "qwen3")
    return DecoderConfig(
        family=family,
        vocab_size=_int(content, "vocab_size"),
        model_dim=width,
        num_layers=layers,
        num_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ff_dim=_int(content, "intermediate_size"),
        max_positions=_int(content, "max_position_embeddings"),
        norm_eps=_float(content, "rms_norm_eps", 1e-6),
        activation=activation,
        windows=_windows(family, content, layers),
        is_tied=bool(content.get("tie_word_embeddings", False)),
        rope=rope,
        has_qkv_bias=has_bias or family == "qwen2",
        has_out_bias=has_bias,
        has_ff_bias=bool(content.get("mlp_bias", False)) and family == "llama",
        has_qk_norm=family == "qwen3",
    )


def _windows(family: str, content: JsonObject, layers: int) -> tuple[int | None, ...]:
    window = content.get("sliding_window", 4096)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"sliding_window {window}")
    if family == "mistral":
        return (window,) * layers
    if not family.startswith("qwen") or not content.get("use_sliding_window", False):
        return (None,) * layers
    kinds = content.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = _int(content, "max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(layers))


def _rope(content: JsonObject, head_dim: int) -> Tensor | None:
    """Frequencies, computed in float32 step by step as transformers does; None: of a kind that is not known here.

    Source    transformers, modeling_rope_utils.py
    """
    params = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(params, dict):
        raise ValueError(f"rope_parameters {params}")
    theta = params.get("rope_theta", content.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"rope_theta {theta}")
    kind = params.get("rope_type", params.get("type", "default"))
    if params.get("partial_rotary_factor", content.get("partial_rotary_factor", 1.0)) != 1.0 or head_dim % 2:
        return None
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if kind == "default":
        return frequencies
    factor = _float(params, "factor", 0.0)
    if kind == "linear":
        return frequencies / factor
    if kind != "llama3":
        return None
    low, high = _float(params, "low_freq_factor", 0.0), _float(params, "high_freq_factor", 0.0)
    trained = _int(params, "original_max_position_embeddings")
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > trained / low, frequencies / factor, frequencies)
    smooth = (trained / wavelengths - low) / (high - low)
    smoothed = (1 - smooth) * stretched / factor + smooth * stretched
    is_medium = ~(wavelengths < trained / high) * ~(wavelengths > trained / low)
    return torch.where(is_medium, smoothed, stretched)


def _int(content: JsonObject, key: str, default: int | None = None) -> int:
    value = content.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} {value}")
    return value


def _float(content: JsonObject, key: str, default: float) -> float:
    value = content.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{key} {value}")
    return float(value)


def _divided(number: int, parts: int) -> int:
    if number % parts:
        raise ValueError(f"{number} is no multiple of {parts}")
    return number // parts
