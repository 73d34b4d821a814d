"""mp and mp_pipeline say what is wrong, where ranks would otherwise wait for each other for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algorithms.equality import Case, check_equal, run_single
from algorithms.staged import build_gpt, drawn, even_split, make_staged, run_staged, staged_batches
from collectives.contract import open_group, run_group
from smolcluster.algorithms.model_parallel import ModelParallel
from smolcluster.algorithms.pipeline import Pipeline
from smolcluster.collectives.base import Communicator
from smolcluster.data.batch import Batch
from smolcluster.errors import ClusterError, CollectiveMismatch, ConfigError
from smolcluster.training.optim import optimizer_factory

ALGORITHMS: list[dict[str, Any]] = [{}, {"schedule": "gpipe"}, {"schedule": "1f1b"}, {"schedule": "interleaved"}]
SGD = optimizer_factory("sgd", 0.1, 0.0)


# ---- splits


@pytest.mark.parametrize(
    ("algorithm", "stages", "says"),
    [
        ({}, 4, "split has 4 stages, but 2 ranks with 1 each have 2. Give the layers of 2 stages"),
        ({}, 1, "split has 1 stages, but 2 ranks with 1 each have 2"),
        ({"schedule": "gpipe"}, 4, "split has 4 stages, but 2 ranks with 1 each have 2"),
        ({"schedule": "1f1b"}, 3, "split has 3 stages, but 2 ranks with 1 each have 2"),
        ({"schedule": "interleaved"}, 5, "split has 5 stages, but 2 ranks with 2 each have 4"),
        ({"schedule": "interleaved"}, 1, "split has 1 stages, but 2 ranks with 1 each have 2"),
    ],
)
def test_a_split_for_another_number_of_ranks_is_refused(algorithm: dict[str, Any], stages: int, says: str) -> None:
    def build(comm: Communicator) -> None:
        kind: Any = Pipeline if algorithm else ModelParallel
        with pytest.raises(ConfigError, match=says):
            kind(build_gpt(0), SGD, comm, split=even_split(8, stages), **algorithm)

    run_group(open_group("local", 2), build, timeout=10)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_an_interleaved_split_says_how_many_stages_a_rank_has(stages: int) -> None:
    def build(comm: Communicator) -> int:
        strategy = Pipeline(build_gpt(0), SGD, comm, split=even_split(8, stages), schedule="interleaved")
        return len(strategy.layers)

    assert run_group(open_group("local", 2), build, timeout=10) == [stages // 2] * 2


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_one_rank_takes_any_split(algorithm: dict[str, Any]) -> None:
    def build(comm: Communicator) -> dict[int, range]:
        kind: Any = Pipeline if algorithm else ModelParallel
        layers: dict[int, range] = kind(build_gpt(0), SGD, comm, split=even_split(8, 3), **algorithm).layers
        return layers

    assert run_group(open_group("local", 1), build, timeout=10) == [{0: range(8)}]


# ---- micro-batches


def of_samples(samples: list[int]) -> list[Batch]:
    """Micro-batches of so many samples each."""
    made = torch.Generator().manual_seed(3)
    tokens = [torch.randint(19, (count, 8), generator=made) for count in samples]
    return [Batch(part, part) for part in tokens]


@pytest.mark.parametrize("engine", ["local", "tcp"])
@pytest.mark.parametrize("bound", [0, 1])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize(
    "given",
    [
        [[2, 2], [2, 2], [2, 1]],
        [[2, 2], [2, 0], [2, 2]],
        [[2, 2], [0, 0], [2, 2]],
        [[0, 0], [2, 2], [2, 2]],
        [[2, 2], [2, 2], [0, 0]],
    ],
    ids=str,
)
def test_ranks_with_other_micro_batches_end_with_an_error(
    given: list[list[int]], algorithm: dict[str, Any], bound: int, engine: str
) -> None:
    check_all_end(given, algorithm, bound, engine)


@pytest.mark.parametrize("engine", ["local", "tcp"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("given", [[[2, 2], [2, 2], [2]], [[2], [2, 2], [2, 2]], [[2, 2], [4], [2, 2]]], ids=str)
def test_ranks_with_another_number_of_micro_batches_end_with_an_error(
    given: list[list[int]], algorithm: dict[str, Any], engine: str
) -> None:
    check_all_end(given, algorithm, 0, engine)


def check_all_end(given: list[list[int]], algorithm: dict[str, Any], bound: int, engine: str) -> None:
    """Two steps are alike, the third is not: one rank says so, and nobody waits."""
    case = Case(build=build_gpt).with_options(staleness_bound=bound, **algorithm)
    ended: dict[int, BaseException] = {}

    def train(comm: Communicator) -> None:
        strategy = make_staged(case.build(0), comm, case)
        try:
            for samples in ([2, 2], [2, 2], given[comm.rank]):
                strategy.train_step(of_samples(samples))
            strategy.finish()
        except (CollectiveMismatch, ClusterError) as exc:
            ended[comm.rank] = exc
            raise

    with pytest.raises(CollectiveMismatch):
        run_group(open_group(engine, 3), train, timeout=10)
    assert sorted(ended) == [0, 1, 2]
    told = {str(exc) for exc in ended.values() if str(exc).startswith("step 2: ")}
    wrong = {
        f"step 2: rank {rank} was given micro-batches of {given[rank]} samples, but rank {rank - 1} of "
        f"{given[rank - 1]}. Every rank computes the whole batch of a step: give every rank the same micro-batches"
        for rank in (1, 2)
        if given[rank] != given[rank - 1]
    }
    assert told
    assert told <= wrong


# ---- models


class Pair(nn.Module):
    """Gives two tensors, as an LSTM does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), x


class Both(nn.Module):
    """Takes them."""

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0] + x[1]


def build_pair(_seed: int) -> nn.Module:
    return drawn(lambda: nn.Sequential(nn.Flatten(), Pair(), Both(), nn.Linear(12, 5)))


@pytest.mark.parametrize("algorithm", ALGORITHMS[:3], ids=str)
@pytest.mark.parametrize("is_eval", [False, True])
def test_a_stage_that_gives_two_tensors_is_refused(is_eval: bool, algorithm: dict[str, Any]) -> None:
    case = Case(build=build_pair, is_text=False).with_options(**algorithm)
    says = r"layer '1' of the Sequential gives a tuple, but stage 0 ends with it, and a stage gives one tensor"

    def train(comm: Communicator) -> None:
        strategy = make_staged(case.build(0), comm, case)  # six layers: the cut is behind the pair
        batches = staged_batches(case, 0, comm.rank, comm.world_size)
        strategy.eval_step(batches[0]) if is_eval else strategy.train_step(batches)

    with pytest.raises(ConfigError, match=says):
        run_group(open_group("local", 2), train, timeout=10)


def build_tied_ends(_seed: int) -> nn.Module:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Embedding(19, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 19))
        model[-1].weight = model[0].weight
        return model

    return drawn(build)


@pytest.mark.parametrize(("algorithm", "world_size"), [({}, 3), ({"schedule": "1f1b"}, 3), (ALGORITHMS[3], 2)])
def test_a_sequential_with_a_tied_head_equals_single(algorithm: dict[str, Any], world_size: int) -> None:
    case = Case(build=build_tied_ends, micro_batches=3, steps=12).with_options(grad_clip_norm=0.5)
    check_equal(run_single(case), run_staged(case, world_size, **algorithm), "fp64")
