"""The next token from logits.

What is drawn depends on (seed, position in the answer) only: the generator is this sequence's own, and every drawn
token uses up as many numbers. So whoever takes a sequence over in the middle goes on with the same tokens. Rules, their
order and the numbers drawn are those of transformers' `generate` after `torch.manual_seed(seed)`.

Source    Holtzman et al. 2020, arXiv:1904.09751, section 3.1 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p);
          Keskar et al. 2019, arXiv:1909.05858, section 4.1 (repetition penalty)
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals: V vocab

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Below it the likeliest token is taken: divided by less, logits would no longer be finite.
LEAST_TEMPERATURE = 1e-3


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        seed: of what is drawn.
        temperature: divides the logits; below LEAST_TEMPERATURE: always the likeliest token.
        top_k: draw from so many of the likeliest; None: from all.
        top_p: draw from the likeliest that together have this probability; None: from all.
        min_p: draw from those with at least this part of the likeliest one's probability; None: from all.
        repetition_penalty: tokens that the context has become less likely by this factor; 1: they do not.
        logprobs: how many of the likeliest tokens to tell with their logarithmic probability; None: not even the own.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token.

    Attributes:
        token: its id.
        logprob: of it, by the model's own distribution, before temperature and the like; None: not asked for.
        top: the likeliest tokens with theirs, likeliest first.
        failure: why there is no token; None: there is one.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    failure: str | None = None


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, sampling: Sampling, context: Iterable[int], drawn: int = 0) -> None:
        """Begin, or go on.

        Args:
            sampling: how.
            context: the tokens before the next one: prompt and answer so far.
            drawn: how many of them are the answer's.
        """
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        self._drawn = drawn
        self._seen = set(context) if sampling.repetition_penalty != 1.0 else set()

    def __call__(self, logits_V: Tensor) -> Sampled:
        """The next token, from logits (V,) on the CPU; or why there is none."""
        sampling, raw_V = self.sampling, logits_V.float()
        if not math.isfinite(raw_V.max()):
            return Sampled(-1, failure="the model's logits are not finite numbers; another --dtype may help")
        scores_V = self._penalised(raw_V)
        is_greedy = sampling.temperature < LEAST_TEMPERATURE
        # NumPy finds the largest of 50 000 in a twentieth of the time that PyTorch takes.
        token = int(scores_V.numpy().argmax()) if is_greedy else self._drawn_from(_kept(scores_V, sampling))
        if sampling.repetition_penalty != 1.0:
            self._seen.add(token)
        if sampling.logprobs is None:
            return Sampled(token)
        logprobs_V = raw_V.log_softmax(dim=-1)
        values, ids = logprobs_V.topk(min(sampling.logprobs, len(logprobs_V)))
        return Sampled(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _penalised(self, scores_V: Tensor) -> Tensor:
        penalty = self.sampling.repetition_penalty
        if penalty == 1.0 or not self._seen:
            return scores_V
        seen = torch.tensor(sorted(self._seen))
        found = scores_V[seen]
        return scores_V.scatter(0, seen, torch.where(found < 0, found * penalty, found / penalty))

    def _drawn_from(self, scores_V: Tensor) -> int:
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.sampling.seed)
            spent = torch.empty(1, len(scores_V))
            for _ in range(self._drawn):  # what torch.multinomial takes from a generator for one token
                spent.exponential_(generator=self._generator)
        return int(torch.multinomial(scores_V.softmax(dim=-1)[None], 1, generator=self._generator))


def _kept(scores_V: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature != 1.0:
        scores_V = scores_V / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scores_V):
        least = scores_V.topk(sampling.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < least, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered_V, ids_V = scores_V.sort()
        is_left_out = ordered_V.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - sampling.top_p
        is_left_out[-1] = False  # the likeliest stays, whatever its probability
        scores_V = scores_V.masked_fill(is_left_out.scatter(0, ids_V, is_left_out), -math.inf)
    if sampling.min_p is not None and sampling.min_p > 0.0:
        chances_V = scores_V.softmax(dim=-1)
        scores_V = scores_V.masked_fill(chances_V < sampling.min_p * chances_V.max(), -math.inf)
    return scores_V
