"""From the configuration's model section to a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smolcluster.config.schema import ModelConfig
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models.folder import model_folder
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.gpt2 import gpt2_config, load_gpt2
from smolcluster.models.hf import build_hf
from smolcluster.models.moe import MoE, MoEConfig
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.models.user import build_user_model


def build_model(
    config: ModelConfig, *, seed: int, vocab_size: int | None = None, num_classes: int | None = None
) -> nn.Module:
    """Build a model and initialise it from (seed, parameter name), or load what is published.

    float32, on CPU, in training mode. Blocks, perhaps for a download. The global random state is left alone.

    Args:
        config: the section `model`.
        seed: the run's seed.
        vocab_size: token ids of the data's tokenizer, for language models; None: config.vocab_size alone counts.
        num_classes: classes of the data, for classifiers; None: not checked.

    Raises:
        ConfigError: the type is not built in yet, cannot be had, or the model is too small for the data.
        CheckpointError: published weights are damaged.
    """
    return _build(config, seed, vocab_size, num_classes, with_weights=config.init == "pretrained")


def restore_model(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    origin: Path,
    vocab_size: int | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """Build the model of a run with the weights that it had, in their own precision.

    Args:
        config: the section `model` of the run.
        tensors: its `state_dict()`.
        origin: where they come from, for messages.
        vocab_size: as for `build_model`.
        num_classes: as for `build_model`.

    Raises:
        ConfigError: as for `build_model`.
        CheckpointError: the tensors are not those of this model.
    """
    model = _build(config, 0, vocab_size, num_classes, with_weights=False)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:  # a run in float64 keeps its bits
        model.to(dtypes.pop())
    try:
        model.load_state_dict(tensors)
    except RuntimeError as exc:
        text = " ".join(str(exc).split())[:300]
        raise CheckpointError(f"the weights in {origin} are not those of its configuration ({text})") from exc
    return model


def _build(
    config: ModelConfig, seed: int, vocab_size: int | None, num_classes: int | None, *, with_weights: bool
) -> nn.Module:
    if config.type == "simple_nn":
        if num_classes is not None and config.out < num_classes:
            raise ConfigError(
                f"model.out is {config.out}, but the dataset has {num_classes} classes. Set model.out={num_classes}"
            )
        return SimpleNN(config.input_dim, config.hidden, config.out, seed=seed)
    if config.type == "gpt":
        if config.init == "pretrained":
            return _published_gpt(config, vocab_size, with_weights)
        return GPT(GPTConfig(**_gpt_sizes(config, vocab_size)), seed=seed)
    if config.type == "moe":
        return MoE(_moe_config(config, vocab_size), seed=seed)
    if config.type == "hf":
        return build_hf(config, seed=seed, vocab_size=vocab_size, with_weights=with_weights)
    if ":" in config.type:
        return build_user_model(config, seed=seed, vocab_size=vocab_size, num_classes=num_classes)
    raise ConfigError(
        f"model.type {config.type} is unknown. Set it to simple_nn, gpt, moe, hf, or "
        "package.module:ClassName of your own"
    )


def _published_gpt(config: ModelConfig, vocab_size: int | None, with_weights: bool) -> GPT:
    """A GPT-2 folder: its sizes, and its weights or not. `model.max_seq_len` may be less than its positions."""
    folder = model_folder(config.hf_model_name, with_weights=with_weights)
    sizes = gpt2_config(folder, config.dropout)
    if config.max_seq_len > sizes.max_seq_len:
        raise ConfigError(
            f"model.max_seq_len is {config.max_seq_len}, but the model in {folder} has {sizes.max_seq_len} positions. "
            f"Set model.max_seq_len={sizes.max_seq_len} or less"
        )
    if vocab_size is not None and sizes.vocab_size < vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} ids, but the model in {folder} has {sizes.vocab_size}. Set data.tokenizer "
            "to the model's own"
        )
    return load_gpt2(folder, config.dropout) if with_weights else GPT(sizes)


def _moe_config(config: ModelConfig, vocab_size: int | None) -> MoEConfig:
    return MoEConfig(
        **_gpt_sizes(config, vocab_size),
        num_experts=config.num_experts,
        top_k=config.top_k,
        capacity_factor=config.capacity_factor,
        aux_loss_weight=config.aux_loss_weight,
        z_loss_weight=config.z_loss_weight,
        router_noise=config.router_noise,
    )


def _gpt_sizes(config: ModelConfig, vocab_size: int | None) -> dict[str, Any]:
    chosen = vocab_size if config.vocab_size is None else config.vocab_size
    if chosen is None:
        raise ConfigError("model.vocab_size is not set and there is no tokenizer to take it from. Set it")
    if vocab_size is not None and chosen < vocab_size:
        raise ConfigError(
            f"model.vocab_size is {chosen}, but the tokenizer has {vocab_size} ids. Set model.vocab_size={vocab_size}, "
            "or leave it out"
        )
    return {
        "vocab_size": chosen,
        "model_dim": config.model_dim,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "ff_dim": config.ff_dim,
        "dropout": config.dropout,
        "max_seq_len": config.max_seq_len,
    }
