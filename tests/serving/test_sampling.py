"""Tokens are chosen as transformers' generate chooses them, and again from the middle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.hf_folders import transformers
from smolcluster.serving.sampling import Sampler, Sampling

VOCAB, LENGTH = 50, 12
CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"top_k": 1},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    {"top_k": 99},
]


def logits_after(tokens: list[int]) -> Tensor:
    """Of a "model" that looks at the newest token and the length."""
    generator = torch.Generator().manual_seed(1000 * tokens[-1] + len(tokens))
    logits = 3 * torch.randn(VOCAB, generator=generator)
    logits[7] = logits[8]  # a draw between two
    return logits


def expected(prompt: list[int], case: dict[str, Any], seed: int) -> list[int]:
    """As generate does it, with its own processors in its order."""
    library = transformers().generation
    kinds = {
        "repetition_penalty": library.RepetitionPenaltyLogitsProcessor,
        "temperature": library.TemperatureLogitsWarper,
        "top_k": library.TopKLogitsWarper,
        "top_p": library.TopPLogitsWarper,
        "min_p": library.MinPLogitsWarper,
    }
    processors = library.LogitsProcessorList([kinds[name](case[name]) for name in kinds if name in case])
    torch.manual_seed(seed)
    tokens = list(prompt)
    for _ in range(LENGTH):
        scores = processors(torch.tensor([tokens]), logits_after(tokens)[None])
        tokens.append(int(torch.multinomial(scores.softmax(dim=-1), num_samples=1)))
    return tokens[len(prompt) :]


def chosen(prompt: list[int], sampling: Sampling, drawn: list[int], count: int) -> list[int]:
    tokens = [*prompt, *drawn]
    sampler = Sampler(sampling, tokens, len(drawn))
    for _ in range(count):
        tokens.append(sampler(logits_after(tokens)).token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_seeded_sampling_equals_generate_and_goes_on_from_the_middle(case: dict[str, Any]) -> None:
    prompt, sampling = [3, 1, 4, 1, 5], Sampling(seed=11, **case)
    with torch.random.fork_rng():
        wanted = expected(prompt, case, 11)
    assert chosen(prompt, sampling, [], LENGTH) == wanted
    for done in (1, 5, LENGTH - 1):
        assert chosen(prompt, sampling, wanted[:done], LENGTH - done) == wanted


def test_temperature_0_takes_the_likeliest_also_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert Sampler(Sampling(temperature=0.0), [])(logits).token == 1
    assert Sampler(Sampling(temperature=0.0, repetition_penalty=4.0), [1])(logits).token == 2
    sampler = Sampler(Sampling(temperature=0.0, repetition_penalty=4.0), [])
    assert [sampler(logits).token for _ in range(3)] == [1, 2, 0]


def test_logprobs_are_the_models_own_before_temperature() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    found = Sampler(Sampling(temperature=0.0, logprobs=2), [])(logits)
    expected_logprobs = logits.log_softmax(dim=0).tolist()
    assert found.logprob == pytest.approx(expected_logprobs[1])
    assert [token for token, _ in found.top] == [1, 2]
    assert [logprob for _, logprob in found.top] == pytest.approx([expected_logprobs[1], expected_logprobs[2]])


def test_seeds_differ() -> None:
    prompt = [1]
    assert len({tuple(chosen(prompt, Sampling(seed=seed), [], LENGTH)) for seed in range(5)}) == 5
