"""Text from a checkpoint of a language model, in this process. (Serving, with a KV cache, is another matter.)"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from smolcluster.config.schema import Config
from smolcluster.data.source import load_splits
from smolcluster.data.tokenizer import Tokenizer
from smolcluster.errors import ConfigError
from smolcluster.models.gpt import GPT
from smolcluster.models.hf import HFModel
from smolcluster.run.trained import load_trained

# Measured on the demo's model, four seeds: at 0.5 three quarters of the words occur in the training text, at 0.7 six in
# ten; at 0.4 it begins to repeat itself.
TEMPERATURE = 0.5
TOP_K = 20
_WORD = re.compile(r"[A-Za-z]{3,}")


@dataclass(frozen=True, slots=True)
class Written:
    """A generated text, and how many of its words of 3 or more letters occur in the training text."""

    text: str
    words: int
    known_words: int


def generate_text(
    checkpoint: Path,
    prompt: str,
    tokens: int,
    *,
    temperature: float = TEMPERATURE,
    top_k: int | None = TOP_K,
    seed: int = 0,
) -> Written:
    """Let a trained model write on; blocks.

    Args:
        checkpoint: one of ours, a folder of them, or a run's folder.
        prompt: the text's beginning; at least one token.
        tokens: how many follow.
        temperature: 0: always the likeliest token.
        top_k: draw from so many of the likeliest; None: from all.
        seed: same seed, same text.

    Raises:
        CheckpointError: there is none, or it holds another model.
        ConfigError: it is no language model that writes, or the prompt is empty.
    """
    if not prompt:
        raise ConfigError("the prompt is empty. Give at least one character")
    trained = load_trained(checkpoint)
    config, model, tokenizer = trained.config, trained.model, trained.tokenizer
    if not isinstance(model, GPT | HFModel) or tokenizer is None:
        raise ConfigError(f"model.type {config.model.type} writes no text; gpt and hf do")
    start = tokenizer.encode(prompt)[None]
    written = model.generate(start, tokens, temperature=temperature, top_k=top_k, seed=seed)
    text = tokenizer.decode(written[0])
    known = set(_words(_training_text(config, tokenizer)))
    words = _words(text[len(prompt) :])
    return Written(text, len(words), sum(word in known for word in words))


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _training_text(config: Config, tokenizer: Tokenizer) -> str:
    """What the model was trained on, back from its tokens."""
    train, _ = load_splits(
        config.data.dataset,
        path=config.data.path,
        text_column=config.data.text_column,
        tokenizer=config.data.tokenizer,
        max_seq_len=config.model.max_seq_len,
        train_split=config.data.train_split,
    )
    inputs, _ = train.batch(torch.arange(len(train)))
    return tokenizer.decode(inputs.flatten())
