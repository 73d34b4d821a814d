"""Text from a checkpoint of a language model: exported, and served over stages of this machine for one text."""

from __future__ import annotations

import contextlib
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import torch

from smolcluster.config.schema import Config, ServingConfig
from smolcluster.data.source import load_splits
from smolcluster.data.tokenizer import Tokenizer
from smolcluster.errors import ConfigError, ServingError
from smolcluster.models.gpt import GPT
from smolcluster.models.hf import HFModel
from smolcluster.run.export import export_model
from smolcluster.run.serve import make_service
from smolcluster.run.stages import Layout
from smolcluster.run.trained import load_trained
from smolcluster.serving.engine import Engine
from smolcluster.serving.requests import Event, Request
from smolcluster.serving.sampling import Sampling

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
    stages: int = 1,
    logs: Path | None = None,
) -> Written:
    """Let a trained model write on; blocks.

    Args:
        checkpoint: one of ours, a folder of them, or a run's folder.
        prompt: the text's beginning; at least one token.
        tokens: how many follow.
        temperature: 0: always the likeliest token.
        top_k: draw from so many of the likeliest; None: from all.
        seed: same seed, same text.
        stages: processes of this machine over which the model's layers are spread.
        logs: a folder for what they log; None: nowhere.

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
    sampling = Sampling(seed, temperature, top_k)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        export_model(checkpoint, folder)
        layout = Layout(processes=stages, logs=logs)
        with contextlib.closing(make_service(str(folder), ServingConfig(max_concurrent=1), layout=layout)) as service:
            written = _continued(service.engine, tokenizer.encode(prompt).tolist(), tokens, sampling)
    text = tokenizer.decode(torch.tensor(written))
    known = set(_words(_training_text(config, tokenizer)))
    words = _words(text[len(prompt) :])
    return Written(text, len(words), sum(word in known for word in words))


def _continued(engine: Engine, written: list[int], count: int, sampling: Sampling) -> list[int]:
    """A text and `count` tokens more. Where it outgrows the context it goes on from its newest half context."""
    end = len(written) + count
    while len(written) < end:
        known = written[-engine.length // 2 :] if len(written) >= engine.length else written
        request = Request(known, min(end - len(written), engine.length - len(known)), sampling)
        written = [*written, *_ask(engine, request)]
        sampling = replace(sampling, seed=sampling.seed + 1)
    return written


def _ask(engine: Engine, request: Request) -> list[int]:
    events: SimpleQueue[Event] = SimpleQueue()
    engine.submit(request, events.put)
    tokens: list[int] = []
    while True:
        event = events.get()
        if event.token is not None:
            tokens.append(event.token.token)
        if event.error is not None:
            raise ServingError(event.error)
        if event.finish_reason is not None:
            return tokens


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
