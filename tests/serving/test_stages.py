"""Stages as processes of this machine: they answer as one process does, and go on when one of them dies."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from models.hf_folders import make_hf_folder
from serving.test_engine import Asked, expected
from smolcluster.cluster.generations import GenerationWorld
from smolcluster.config.schema import ServingConfig
from smolcluster.errors import ConfigError, SmolError
from smolcluster.models.decoder import Decoder
from smolcluster.run.serve import make_service
from smolcluster.run.stages import Layout
from smolcluster.serving.layer_store import LayerStore
from smolcluster.serving.requests import Request
from smolcluster.serving.sampling import Sampling
from smolcluster.serving.service import Service

BLOCKS, LENGTH, TOKENS = 5, 256, 200
PATIENCE = 1.0
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_hf_folder(
        tmp_path_factory.mktemp("llama"),
        "llama",
        num_hidden_layers=BLOCKS,
        tie_word_embeddings=False,
        max_position_embeddings=LENGTH,
    )
    # No text belongs to these ids; whoever asks for text gets bytes.
    from smolcluster.data.tokenizer import ByteTokenizer

    ByteTokenizer().save(folder)
    return folder


def serve(folder: Path, stages: int, tmp_path: Path, split: tuple[int, ...] | None = None) -> Service:
    layout = Layout(processes=stages, split=split, patience=PATIENCE, logs=tmp_path)
    return make_service(str(folder), ServingConfig(max_concurrent=4), dtype="fp64", layout=layout)


def stage_processes() -> list[int]:
    """The processes that this one has started as stages, in the order of their numbers."""
    import psutil

    children = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    found = [p for p in children if "smolcluster.run.stage" in " ".join(p.cmdline())]
    return [process.pid for process in sorted(found, key=lambda process: process.create_time())]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(16, (n,), generator=generator).tolist() for n in (3, 20, 40)]


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[list[int]]:
    return [expected(folder, prompt, TOKENS, **(SAMPLED if n % 2 else {})) for n, prompt in enumerate(prompts())]


def ask_all(service: Service) -> list[Asked]:
    return [
        Asked(
            service.engine,
            Request(prompt, TOKENS, Sampling(seed=5, **SAMPLED) if n % 2 else Sampling(temperature=0.0)),
        )
        for n, prompt in enumerate(prompts())
    ]


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_stage_dies_and_every_stream_goes_on_with_the_same_tokens(
    folder: Path, answers: list[list[int]], tmp_path: Path, fault: str
) -> None:
    service = serve(folder, 3, tmp_path)
    stopped: list[int] = []
    try:
        for number in (1, 0):  # the last one; then the one that is left (a stopped one is a process still)
            asked = ask_all(service)
            while sum(len(each.tokens) for each in asked) < 60:
                time.sleep(0.001)
            pid = stage_processes()[number]
            os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            stopped.append(pid)
            assert [each.wait().tokens for each in asked] == answers
        assert service.engine.counts.recoveries >= 2
        assert [each.wait().tokens for each in ask_all(service)] == answers
    finally:
        for pid in stopped:
            if fault == "stop":
                os.kill(pid, signal.SIGKILL)
        service.close()
    assert not stage_processes()


def test_a_split_as_told_and_what_is_no_split(folder: Path, answers: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="5 blocks"):
        serve(folder, 2, tmp_path, (1, 3))
    assert not stage_processes()
    service = serve(folder, 2, tmp_path, (1, 4))
    try:
        assert [each.wait().tokens for each in ask_all(service)] == answers
    finally:
        service.close()


def test_a_stage_that_dies_while_nobody_asks_is_noticed(folder: Path, answers: list[list[int]], tmp_path: Path) -> None:
    service = serve(folder, 2, tmp_path)
    try:
        os.kill(stage_processes()[0], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not service.engine.counts.recoveries and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.engine.counts.recoveries == 1
        service.engine.reconnect()
        assert [each.wait().tokens for each in ask_all(service)] == answers
    finally:
        service.close()


def test_chains_that_are_over_are_forgotten(folder: Path, tmp_path: Path) -> None:
    def count(kind: type) -> int:
        gc.collect()
        return sum(type(each) is kind for each in gc.get_objects())

    before = count(Decoder)
    service = serve(folder, 2, tmp_path)
    try:
        worlds = count(GenerationWorld)
        for number in range(1, 4):
            service.engine.reconnect()
            deadline = time.monotonic() + 10
            while service.engine.counts.recoveries < number and time.monotonic() < deadline:
                time.sleep(0.01)
        assert service.engine.counts.recoveries == 3
        assert count(Decoder) == before + 1  # with its weights and its cache
        assert count(GenerationWorld) <= worlds + 1  # that of the first chain, which whoever began it still has
    finally:
        service.close()


def test_damaged_weights_end_the_start_at_once(tmp_path: Path) -> None:
    model = make_hf_folder(tmp_path / "model", "llama", num_hidden_layers=BLOCKS)
    from smolcluster.data.tokenizer import ByteTokenizer

    ByteTokenizer().save(model)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    began = time.monotonic()
    with pytest.raises(SmolError, match="ends early"):
        serve(model, 2, tmp_path)
    assert time.monotonic() - began < 30
    assert not stage_processes()


def test_auto_is_the_dtype_whose_products_take_least(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smolcluster.serving import layer_store

    taken = {"fp32": 2.0, "bf16": 1.0, "fp16": 3.0}
    with monkeypatch.context() as patch:
        patch.setattr(layer_store, "_time_products", lambda config, dtype, device: (taken[dtype], 1))
        assert LayerStore(folder, "auto").dtype == "bf16"
    measured = LayerStore(folder, "auto")
    assert measured.dtype in ("fp32", "bf16", "fp16")
    machine = layer_store.measure_machine(measured.config, "int8", "cpu")
    assert 1e5 < machine.bytes_per_s < 1e13
    assert 1e8 < machine.free_bytes < 1e14
