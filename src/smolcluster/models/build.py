"""From the configuration's model section to a module."""

from __future__ import annotations

from torch import nn

from smolcluster.config.schema import ModelConfig
from smolcluster.errors import ConfigError
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.simple_nn import SimpleNN


def build_model(
    config: ModelConfig, *, seed: int, vocab_size: int | None = None, num_classes: int | None = None
) -> nn.Module:
    """Build a model and initialise it from (seed, parameter name): float32, on CPU, in training mode.

    Args:
        config: the section `model`.
        seed: the run's seed.
        vocab_size: token ids of the data's tokenizer, for language models; None: config.vocab_size alone counts.
        num_classes: classes of the data, for classifiers; None: not checked.

    Raises:
        ConfigError: the type is not built in yet, or the model is too small for the data.
    """
    if config.type == "simple_nn":
        if num_classes is not None and config.out < num_classes:
            raise ConfigError(
                f"model.out is {config.out}, but the dataset has {num_classes} classes. Set model.out={num_classes}"
            )
        return SimpleNN(config.input_dim, config.hidden, config.out, seed=seed)
    if config.type == "gpt":
        return GPT(_gpt_config(config, vocab_size), seed=seed)
    raise ConfigError(
        f"model.type {config.type} comes in a later release; this one has simple_nn and gpt. From Python, any "
        "torch module can be given to an algorithm"
    )


def _gpt_config(config: ModelConfig, vocab_size: int | None) -> GPTConfig:
    chosen = vocab_size if config.vocab_size is None else config.vocab_size
    if chosen is None:
        raise ConfigError("model.vocab_size is not set and there is no tokenizer to take it from. Set it")
    if vocab_size is not None and chosen < vocab_size:
        raise ConfigError(
            f"model.vocab_size is {chosen}, but the tokenizer has {vocab_size} ids. Set model.vocab_size={vocab_size}, "
            "or leave it out"
        )
    return GPTConfig(
        vocab_size=chosen,
        model_dim=config.model_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        ff_dim=config.ff_dim,
        dropout=config.dropout,
        max_seq_len=config.max_seq_len,
    )
