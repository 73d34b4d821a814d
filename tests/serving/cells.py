"""Cells of the equality check: an engine over stages in threads, and what transformers gives for the same requests.

A cell has a model, a split, so many requests at once, a way to cut prompts, maybe a beginning that has been computed
before, and maybe a chain that fails and is replaced by one with another split.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from models.hf_folders import make_hf_folder, transformers
from serving.test_chain import QueueRing
from serving.test_engine import Asked, decode
from smolcluster.errors import PeerLost, SmolError
from smolcluster.models.decoder_config import read_decoder_config
from smolcluster.models.decoder_files import DecoderLoader
from smolcluster.models.tensor_files import TensorFiles
from smolcluster.serving import executor, replica
from smolcluster.serving.engine import Engine
from smolcluster.serving.executor import Executor, LocalExecutor, MicroBatch, NewTokens
from smolcluster.serving.requests import Request
from smolcluster.serving.sampling import Sampled, Sampler, Sampling
from smolcluster.serving.stage_server import ChainExecutor, run_stage

BLOCKS, LENGTH, TOKENS, SLOTS, VOCAB = 5, 192, 64, 8, 503
CUTS = [cuts for stages in (1, 2, 3, 4) for cuts in itertools.combinations(range(1, BLOCKS + 2), stages - 1)]
SAMPLED: dict[str, Any] = {"temperature": 1.1, "top_k": 60, "top_p": 0.97, "min_p": 0.002, "repetition_penalty": 1.1}
PROMPTS = (40, 1, 23, 100, 5, 64, 31, 17)  # tokens
# How prompts are cut: as they come, in small pieces, or always alike and each stream by itself (--deterministic).
CHUNKS = ("whole", "small", "fixed")
PREFIXES = (False, True)
# The chain fails never, while prompts are computed, or later.
FAILURES = (None, 2, 40)
# Fewer different tokens in an answer, and the check proves nothing.
LEAST_DISTINCT = 20


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    cuts: tuple[int, ...]
    batch: int
    chunk: str
    has_prefix: bool
    fails_at: int | None


def rows() -> list[tuple[int, str, bool, int | None]]:
    """Batch, chunk, prefix, failure: every pair of two of their values is in one of them."""
    factors: list[Sequence[Any]] = [range(1, SLOTS + 1), CHUNKS, PREFIXES, FAILURES]
    every = [*itertools.product(*factors)]
    left = {
        (i, a, j, b)
        for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2)
        for a in first
        for b in second
    }

    def pairs(row: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
        return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(row), 2)}

    found = []
    while left:
        best = max(every, key=lambda row: len(left & pairs(row)))
        found.append(best)
        left -= pairs(best)
    return found


class Model:
    """A folder, and what transformers gives for our requests. Each number is a prompt; odd ones are sampled."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> None:
        config = read_decoder_config(folder)
        assert config is not None
        self.folder, self.config, self.dtype, self.tokens = folder, config, dtype, tokens
        self.answers: dict[int, list[int]] = {}

    @cached_property
    def reference(self) -> Any:
        return transformers().AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype).eval()

    def prompt(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(200 + number)
        count = PROMPTS[number % len(PROMPTS)]
        return torch.randint(self.config.vocab_size, (count,), generator=generator).tolist()

    def request(self, number: int) -> Request:
        sampling = Sampling(seed=number, **(SAMPLED if number % 2 else {"temperature": 0.0}))
        return Request(self.prompt(number), self.tokens, sampling)

    def answer(self, number: int) -> list[int]:
        if number not in self.answers:
            how = {"do_sample": True, **SAMPLED} if number % 2 else {"do_sample": False}
            prompt = torch.tensor([self.prompt(number)])
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(number)
                whole = self.reference.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=self.tokens, eos_token_id=None,
                    pad_token_id=0, **how,
                )  # fmt: skip
            self.answers[number] = whole[0, prompt.shape[1] :].tolist()
        return self.answers[number]

    def logits(self, number: int, answer: Sequence[int]) -> Tensor:
        """Of every token of an answer, teacher-forced: (len(answer), V)."""
        prompt = self.prompt(number)
        with torch.no_grad():
            whole = self.reference(torch.tensor([[*prompt, *answer[:-1]]])).logits[0]
        return whole[len(prompt) - 1 :]

    def decoder(self, layers: range, *, is_isolated: bool) -> Any:
        with TensorFiles(self.folder) as files:
            loader = DecoderLoader(self.config, self.dtype, is_isolated=is_isolated)
            return loader.load(files, layers, slots=SLOTS, length=LENGTH)


def random_model(folder: Path, family: str, **changes: Any) -> Path:
    """Std 0.2, an untied head, five layers; wide enough that greedy answers do not soon repeat themselves."""
    sizes = {"n_layer": BLOCKS, "n_positions": LENGTH, "n_embd": 128, "n_head": 4, "n_inner": 256}
    if family != "gpt2":
        sizes = {
            "num_hidden_layers": BLOCKS, "max_position_embeddings": LENGTH, "hidden_size": 64, "intermediate_size": 96,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        }  # fmt: skip
    if family == "mistral":
        sizes["sliding_window"] = 24
    return make_hf_folder(folder, family, **{**sizes, "vocab_size": VOCAB, "tie_word_embeddings": False, **changes})


class _FailingExecutor:
    """Fails at its n-th micro-batch."""

    def __init__(self, inner: Executor, fails_at: int) -> None:
        self._inner, self._left = inner, fails_at
        self.slots, self.length, self.depth = inner.slots, inner.length, inner.depth

    def submit(self, batch: MicroBatch) -> None:
        self._left -= 1
        if self._left < 0:
            raise PeerLost("node1 is lost", 1)
        self._inner.submit(batch)

    def result(self) -> NewTokens:
        return self._inner.result()

    def failure(self) -> SmolError | None:
        return None


class Found:
    """What came of a cell: the answers, the logits of each token, and what was used again."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.logits: dict[tuple[int, int], Tensor] = {}
        self.reused = self.recoveries = 0


@contextmanager
def _stages(model: Model, cuts: Sequence[int], *, is_isolated: bool) -> Iterator[Executor]:
    layers = model.config.num_layers + 2
    stages = [range(a, b) for a, b in itertools.pairwise([0, *cuts, layers])]
    decoders = [model.decoder(each, is_isolated=is_isolated) for each in stages]
    if len(stages) == 1:
        yield LocalExecutor(decoders[0])
        return
    queues = [SimpleQueue[bytes]() for _ in stages]
    rings = [QueueRing(rank, queues) for rank in range(len(stages))]
    ranks = [
        threading.Thread(target=run_stage, args=each, daemon=True) for each in zip(rings[1:], decoders[1:], strict=True)
    ]
    for rank in ranks:
        rank.start()
    chain = ChainExecutor(rings[0], decoders[0], slots=SLOTS, length=LENGTH)
    try:
        yield chain
    finally:
        chain.close()
        for rank in ranks:
            rank.join(30)
            assert not rank.is_alive()


def _other_cuts(cuts: tuple[int, ...]) -> tuple[int, ...]:
    """Of a chain with a stage less, or of one with two."""
    return cuts[:-1] if cuts else (3,)


def run(model: Model, cell: Cell) -> Found:
    """All requests of a cell at once."""
    found = Found()

    class Noting(Sampler):
        """Keeps what it is given; a request's seed is its number."""

        def __init__(self, sampling: Sampling, context: Sequence[int], drawn: int = 0) -> None:
            super().__init__(sampling, context, drawn)
            self._at = drawn

        def __call__(self, logits_V: Tensor) -> Sampled:
            found.logits[self.sampling.seed, self._at] = logits_V.clone()
            self._at += 1
            return super().__call__(logits_V)

    is_fixed = cell.chunk == "fixed"
    with ExitStack() as stack:
        made = stack.enter_context(_stages(model, cell.cuts, is_isolated=is_fixed))
        other = None
        if cell.fails_at is not None:
            other = stack.enter_context(_stages(model, _other_cuts(cell.cuts), is_isolated=is_fixed))
            made = _FailingExecutor(made, cell.fails_at)
        stack.enter_context(mock.patch.object(executor, "Sampler", Noting))
        if cell.chunk == "small":
            stack.enter_context(mock.patch.object(replica, "ChunkSize", _SmallChunks))
            stack.enter_context(mock.patch.object(replica, "Limits", _small_limits))
        recover = None if other is None else (lambda error, other=other: other)
        engine = Engine([(made, recover)], decode, is_deterministic=is_fixed)
        stack.callback(engine.close)
        numbers = range(cell.batch)
        if cell.has_prefix:
            for number in numbers:
                request = model.request(number)
                if len(request.prompt) > 4:
                    Asked(engine, Request(request.prompt[:-3], 1, Sampling(seed=10_000))).wait()
        asked = [Asked(engine, model.request(number)) for number in numbers]
        found.tokens = [each.wait().tokens for each in asked]
        found.reused, found.recoveries = engine.counts.reused_tokens, engine.counts.recoveries
    return found


class _SmallChunks(replica.ChunkSize):
    MOST = LEAST = 7


def _small_limits(depth: int, chunk: int, *, fixed_chunk: int | None) -> Any:
    from smolcluster.serving.scheduler import Limits

    return Limits(depth, 7, 11, fixed_chunk)


def check(model: Model, cell: Cell) -> None:
    """Token ids equal `generate`'s, logits within 1e-9; and the cell is what it says."""
    found = run(model, cell)
    assert found.tokens == [model.answer(number) for number in range(cell.batch)]
    for number in range(cell.batch):
        answer = model.answer(number)
        assert len(set(answer)) >= LEAST_DISTINCT or len(answer) < TOKENS, "the check proves nothing"
        assert found.tokens[number] == answer, number
        ours = torch.stack([found.logits[number, at] for at in range(len(answer))])
        torch.testing.assert_close(ours, model.logits(number, answer), rtol=0, atol=1e-9)
    if cell.has_prefix and cell.chunk != "fixed" and cell.batch < SLOTS:
        assert found.reused >= PROMPTS[0] - 3
    assert found.recoveries == (cell.fails_at is not None)
