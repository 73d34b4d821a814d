"""Stages on several ranks give every stream what one process gives it."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from models.hf_folders import make_hf_folder
from serving.test_engine import LENGTH, SAMPLED, Asked, decode, expected, prompts
from smolcluster.errors import FrameError, SmolError
from smolcluster.models.decoder import Segment
from smolcluster.models.decoder_config import read_decoder_config
from smolcluster.models.decoder_files import DecoderLoader
from smolcluster.models.tensor_files import TensorFiles
from smolcluster.serving.engine import Engine
from smolcluster.serving.executor import MicroBatch, NewTokens, Opened
from smolcluster.serving.requests import Request
from smolcluster.serving.sampling import Sampled, Sampling
from smolcluster.serving.stage_server import ChainExecutor, run_stage
from smolcluster.serving.wire import BatchMessage, pack_tokens, unpack_batch, unpack_tokens

BLOCKS, SLOTS = 5, 3
# Entry, 5 blocks, exit: where the second, third and fourth stage begin.
CUTS = [cuts for stages in (2, 3, 4) for cuts in itertools.combinations(range(1, BLOCKS + 2), stages - 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(
        tmp_path_factory.mktemp("llama"),
        "llama",
        num_hidden_layers=BLOCKS,
        tie_word_embeddings=False,
        max_position_embeddings=LENGTH,
    )


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[list[int]]:
    """Greedy for the even prompts, sampled for the odd ones."""
    return [expected(folder, prompt, 12, **(SAMPLED if n % 2 else {})) for n, prompt in enumerate(prompts())]


def load(folder: Path, layers: range) -> Any:
    config = read_decoder_config(folder)
    assert config is not None
    with TensorFiles(folder) as files:
        return DecoderLoader(config, torch.float64).load(files, layers, slots=SLOTS, length=LENGTH)


class QueueRing:
    """A ring of threads, without a network."""

    def __init__(self, rank: int, queues: list[SimpleQueue[bytes]]) -> None:
        self.rank, self.world_size = rank, len(queues)
        self._queues = queues

    def send(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        self._queues[(self.rank + 1) % self.world_size].put(b"".join(parts))

    def receive(self, meanwhile: Callable[[], object] = lambda: None, timeout: float = 60) -> memoryview:
        meanwhile()
        return memoryview(bytearray(self._queues[self.rank].get(timeout=60)))

    def failure(self) -> SmolError | None:
        return None

    def abort(self, error: SmolError) -> None:
        raise AssertionError

    def close(self) -> None:
        pass


def answer_over(folder: Path, stages: Sequence[range], *, has_controller: bool = False) -> list[list[int]]:
    queues = [SimpleQueue[bytes]() for _ in range(len(stages) + has_controller)]
    rings = [QueueRing(rank, queues) for rank in range(len(queues))]
    ranks = [
        threading.Thread(target=run_stage, args=(ring, load(folder, layers)), daemon=True)
        for ring, layers in zip(rings[1:], stages if has_controller else stages[1:], strict=True)
    ]
    for rank in ranks:
        rank.start()
    executor = ChainExecutor(rings[0], None if has_controller else load(folder, stages[0]), slots=SLOTS, length=LENGTH)
    engine = Engine([(executor, None)], decode)
    try:
        asked = [
            Asked(engine, Request(prompt, 12, Sampling(seed=5, **SAMPLED) if n % 2 else Sampling(temperature=0.0)))
            for n, prompt in enumerate(prompts())
        ]
        return [each.wait().tokens for each in asked]
    finally:
        engine.close()
        executor.close()
        for rank in ranks:
            rank.join(10)
            assert not rank.is_alive()


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_every_split_gives_what_generate_gives(folder: Path, answers: list[list[int]], cuts: tuple[int, ...]) -> None:
    edges = [0, *cuts, BLOCKS + 2]
    stages = [range(begin, end) for begin, end in itertools.pairwise(edges)]
    assert answer_over(folder, stages) == answers


def test_a_host_without_layers_has_the_engine(folder: Path, answers: list[list[int]]) -> None:
    assert answer_over(folder, [range(3), range(3, 7)], has_controller=True) == answers
    assert answer_over(folder, [range(7)], has_controller=True) == answers


def carried(parts: Sequence[bytes | bytearray | memoryview]) -> memoryview:
    return memoryview(bytearray(b"".join(parts)))


def test_messages_come_back_as_they_were() -> None:
    sampling = Sampling(seed=2**62, temperature=0.3, top_k=4, top_p=0.5, min_p=0.1, repetition_penalty=1.5, logprobs=2)
    opened = {3: Opened(sampling, (1, 2, 3), 2), 0: Opened(Sampling(), (4,), 0)}
    segments = [Segment(3, 5, 2), Segment(0, 2**31, 1)]
    for taken in (opened, {}):
        batch = MicroBatch(2**32 - 1, segments, (9, 9, 9), [(3, 1), (0, 2)], taken)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(5, 3).to(dtype).T  # 3 rows, not contiguous
            found, rows, seconds = unpack_batch(carried(BatchMessage(batch, [0.25]).parts(x, 0.125)))
            assert tuple(seconds) == (0.25, 0.125)
            assert torch.equal(rows, x)
            assert rows.dtype == dtype
            assert (found.number, found.segments, found.wanted) == (2**32 - 1, batch.segments, batch.wanted)
            assert set(found.opened) == set(taken)
            if taken:
                assert found.opened[3] == opened[3]
                assert found.opened[0].sampling == Sampling()
    ids = torch.tensor([5, 6, 7])
    _, rows, seconds = unpack_batch(carried(BatchMessage(batch, computes=False).parts(ids)))
    assert torch.equal(rows, ids)
    assert not seconds
    for tokens in (
        NewTokens(4, {1: Sampled(5), 2: Sampled(6)}, (0.5,)),
        NewTokens(4, {1: Sampled(5), 2: Sampled(6, -0.25, ((6, -0.25), (1, -2.5)))}, (0.5, 0.25)),
        NewTokens(5, {0: Sampled(-1, failure="no number")}),
        NewTokens(6, {}),
    ):
        assert unpack_tokens(carried(pack_tokens(tokens))) == tokens


def test_what_is_no_message_is_said_to_be_none() -> None:
    batch = MicroBatch(1, [Segment(0, 0, 2)], (), [(0, 1)], {0: Opened(Sampling(), (1, 2), 0)})
    good = bytes(carried(BatchMessage(batch).parts(torch.zeros(2, 4))))
    tokens = bytes(carried(pack_tokens(NewTokens(1, {0: Sampled(3, -0.5)}, (0.5,)))))
    rng = random.Random(1)
    for whole, unpack in ((good, unpack_batch), (tokens, unpack_tokens)):
        other = tokens if whole is good else good
        longer = [bytes([whole[0] + 1]) + whole[1:], whole + bytes(8)] if whole is good else []
        for bad in (b"", whole[:7], whole[:30], whole[: len(whole) - 40], other, *longer):
            with pytest.raises(FrameError, match="a stage sent"):
                unpack(memoryview(bytearray(bad)))
        for _ in range(300):  # it is that, or it can be read; nothing else
            bad = bytearray(whole)
            bad[rng.randrange(len(bad))] = rng.randrange(256)
            with contextlib.suppress(FrameError):
                unpack(memoryview(bad))
