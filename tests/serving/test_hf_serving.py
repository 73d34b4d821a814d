"""Families that only transformers computes, through the engine and over processes: the tokens of `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.hf_folders import OTHER_FAMILIES, make_other_folder, whole_model
from serving.test_engine import Asked, decode
from smolcluster.config.schema import ServingConfig
from smolcluster.data.tokenizer import ByteTokenizer
from smolcluster.errors import ConfigError
from smolcluster.run.serve import make_service
from smolcluster.run.stages import Layout
from smolcluster.serving.engine import Engine
from smolcluster.serving.executor import LocalExecutor
from smolcluster.serving.layer_store import CacheSize, LayerStore
from smolcluster.serving.requests import Request
from smolcluster.serving.sampling import Sampling

LENGTH, TOKENS, SLOTS = 96, 64, 2
# A penalty: small random models repeat themselves, and a token that comes again and again shows little.
GREEDY: dict[str, Any] = {"repetition_penalty": 10.0}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture(scope="module", params=OTHER_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_other_folder(tmp_path_factory.mktemp(request.param), request.param)


def prompts() -> list[list[int]]:
    """Three for two slots; the last one begins as the first."""
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(64, (n,), generator=generator).tolist() for n in (26, 5))
    return [first, second, [*first[:20], 1, 2, 3]]


def expected(folder: Path, prompt: list[int], *, is_sampled: bool) -> list[int]:
    how = {"do_sample": True, **SAMPLED} if is_sampled else {"do_sample": False, **GREEDY}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        whole = whole_model(folder, torch.float64).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            **how,
        )
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    return tokens


def ask(engine: Engine, folder: Path) -> None:
    """Greedy and sampled answers at once."""
    sampled = [number % 2 == 1 for number in range(3)]
    asked = [
        Asked(
            engine,
            Request(prompt, TOKENS, Sampling(**({"seed": 5, **SAMPLED} if how else {"temperature": 0.0, **GREEDY}))),
        )
        for prompt, how in zip(prompts(), sampled, strict=True)
    ]
    for prompt, how, answer in zip(prompts(), sampled, asked, strict=True):
        wanted = expected(folder, prompt, is_sampled=how)
        assert answer.wait().tokens == wanted
        assert len(set(wanted)) >= 20


def test_streams_together_get_what_generate_gives_each(folder: Path) -> None:
    store = LayerStore(folder, "fp64")
    engine = Engine([(LocalExecutor(store.decoder(range(store.layers), CacheSize(SLOTS, LENGTH))), None)], decode)
    try:
        ask(engine, folder)
        assert engine.counts.reused_tokens == 20
    finally:
        engine.close()


def test_over_processes_of_this_machine_they_get_the_same(tmp_path: Path) -> None:
    folder = make_other_folder(tmp_path / "model", "gemma2", tie_word_embeddings=True)
    ByteTokenizer().save(folder)
    settings = ServingConfig(max_concurrent=SLOTS)
    service = make_service(str(folder), settings, dtype="fp64", layout=Layout(processes=2, logs=tmp_path))
    try:
        ask(service.engine, folder)
        assert service.describe()["split"] in ([2, 3], [3, 2])
    finally:
        service.close()


def test_what_cannot_be_served_says_so_before_a_process_is_started(tmp_path: Path) -> None:
    make_other_folder(tmp_path, "phi3")
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ConfigError, match="5 blocks"):
        make_service(str(tmp_path), ServingConfig(), layout=Layout(processes=2, split=(1, 3)))


def test_auto_measures_the_sizes_of_these_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smolcluster.serving import layer_store

    sizes = []
    monkeypatch.setattr(layer_store, "_time_products", lambda config, *_: sizes.append(config.ff_dim) or (1.0, 1))
    assert LayerStore(make_other_folder(tmp_path, "opt"), "auto").dtype == "fp32"
    assert sizes == [40, 40, 40]
