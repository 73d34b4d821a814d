"""`smolcluster bench generate`: tokens per second through the whole engine, beside transformers' `generate`.

Both take turns in blocks: so many texts at once, so many tokens each, greedy, on one thread per process. transformers
computes them as one batch with its own cache, in this process; ours are as many requests, over as many stages as asked
for. The texts are random tokens, in each pair of blocks others, the same for both.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from smolcluster.bench.intervals import bootstrap_interval
from smolcluster.config.schema import ServingConfig
from smolcluster.errors import ConfigError, ServingError
from smolcluster.hub import import_extra, quiet_transformers
from smolcluster.kinds import JsonObject
from smolcluster.models.folder import model_folder
from smolcluster.run.serve import make_service
from smolcluster.run.stages import Layout
from smolcluster.serving.engine import Engine
from smolcluster.serving.requests import Event, Request
from smolcluster.serving.sampling import Sampling

PAIRS = 7
# As long as no answer takes.
_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class Options:
    """How is measured.

    Attributes:
        against: "hf", or None.
        local: stages.
        dtype: of ours; transformers' is fp32, or fp64 if ours is.
        streams: texts at once.
        prompt: tokens of each text's beginning.
        tokens: that are written.
        pairs: blocks of each side.
    """

    against: str | None = None
    local: int = 1
    dtype: str = "fp32"
    streams: int = 1
    prompt: int = 32
    tokens: int = 64
    pairs: int = PAIRS


def bench_generate(model: str, options: Options) -> JsonObject:
    """Measure; blocks.

    Args:
        model: a folder or Hugging Face id.
        options: how.

    Returns:
        tokens_per_s (the median block's) and what was asked; with a competitor also against_tokens_per_s, ratio (the
        median of the pairs') and ratio_interval.

    Raises:
        ConfigError: there is no such model or competitor.
    """
    if options.against not in (None, "hf"):
        raise ConfigError(f"--against {options.against} is unknown. Use hf, or leave it out")
    settings = ServingConfig(max_concurrent=options.streams, ctx_length=options.prompt + options.tokens)
    service = make_service(model, settings, dtype=options.dtype, layout=Layout(processes=options.local))
    try:
        generator = torch.Generator().manual_seed(0)
        sides: dict[str, Callable[[torch.Tensor], None]] = {
            "ours": lambda texts: write_all(service.engine, texts, options.tokens)
        }
        if options.against is not None:
            sides["against"] = transformers_side(model, options)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        # The first is not counted: memory has to be there, and the length of a prompt's pieces.
        for pair in range(-1, options.pairs):
            texts = torch.randint(service.vocab_size, (options.streams, options.prompt), generator=generator)
            for name in list(sides)[:: 1 if pair % 2 == 0 else -1]:
                began = time.perf_counter()
                sides[name](texts)
                if pair >= 0:
                    rates[name].append(options.streams * options.tokens / (time.perf_counter() - began))
    finally:
        service.close()
    found: JsonObject = {
        "tokens_per_s": statistics.median(rates["ours"]),
        "model": service.model,
        "local": options.local,
        "mode": "mp",
        "dtype": options.dtype,
        "streams": options.streams,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "pairs": options.pairs,
        "threads": torch.get_num_threads(),
    }
    if options.against is not None:
        ratios = [ours / other for ours, other in zip(rates["ours"], rates["against"], strict=True)]
        found |= {
            "against": options.against,
            "against_tokens_per_s": statistics.median(rates["against"]),
            "ratio": statistics.median(ratios),
            "ratio_interval": list(bootstrap_interval(ratios, statistics.median)),
        }
    return found


def write_all(engine: Engine, texts: torch.Tensor, tokens: int) -> None:
    """Write on texts (B, T), each by a request of its own and all at once; blocks to the end."""
    waits = [threading.Event() for _ in texts]
    failures: list[str] = []

    def take(number: int, event: Event) -> None:
        if event.error is not None:
            failures.append(event.error)
        if event.finish_reason is not None:
            waits[number].set()

    for number, text in enumerate(texts):
        request = Request(text.tolist(), tokens, Sampling(temperature=0.0))
        engine.submit(request, lambda event, number=number: take(number, event))  # type: ignore[misc]
    for wait in waits:
        if not wait.wait(_TIMEOUT):
            raise ServingError(f"an answer was not there after {_TIMEOUT:g} s")
    if failures:
        raise ServingError(failures[0])


def transformers_side(model: str, options: Options) -> Callable[[torch.Tensor], None]:
    """What writes on texts (B, T) with transformers, as one batch."""
    transformers = import_extra("transformers", "--against hf")
    dtype = torch.float64 if options.dtype == "fp64" else torch.float32
    with quiet_transformers():
        inner = transformers.AutoModelForCausalLM.from_pretrained(
            model_folder(model, with_weights=True, key="--model"),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        ).eval()
    inner.generation_config.eos_token_id = None  # both write as many tokens
    inner.generation_config.pad_token_id = 0

    def write(texts: torch.Tensor) -> None:
        with torch.inference_mode():
            inner.generate(
                texts,
                attention_mask=torch.ones_like(texts),
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
                do_sample=False,
            )

    return write


def generate_lines(result: JsonObject) -> Sequence[str]:
    """What was measured, in words."""
    lines = [
        f"{result['model']}, {result['dtype']}, {result['local']} stages, {result['streams']} streams: "
        f"{result['tokens_per_s']:.1f} tokens/s"
    ]
    if "ratio" in result:
        low, high = cast("list[float]", result["ratio_interval"])
        lines.append(
            f"{result['against']}: {result['against_tokens_per_s']:.1f} tokens/s; ratio {result['ratio']:.3f}, 95 % "
            f"interval {low:.3f} to {high:.3f}, {result['pairs']} pairs of blocks"
        )
    return lines
