"""What the ranks of fsdp hold goes to disk in parts, and comes back to any number of ranks, in any stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algorithms.equality import Case, build_gpt, build_simple_nn, check_equal, make_classicdp, make_fsdp, run_single
from algorithms.equality import _outcome as outcome_of
from smolcluster.checkpoint.ranks import SharedReader, save_from_all_ranks
from smolcluster.checkpoint.store import load_weights, open_checkpoint
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.errors import CheckpointError
from smolcluster.training.step import StepResult

STAGES = [0, 1, 2, 3]
CASE = Case(steps=24, micro_batches=2).with_options(grad_clip_norm=0.3)


def train(
    case: Case, world_size: int, first: int, last: int, folder: Path, *, make: Any = make_fsdp, resumes: bool = True
) -> list[Any]:
    """Steps first to last - 1, from the checkpoint of step `first` - K if there is to be one, and a checkpoint."""

    def run(comm: LocalCommunicator) -> Any:
        strategy = make(case.build(comm.rank), comm, case)
        if first > 0 and resumes:
            reader = SharedReader.open(comm, open_checkpoint(folder) if comm.rank == 0 else None)
            assert reader is not None
            strategy.load_state(reader)
        results: list[StepResult | None] = [
            strategy.train_step(case.rank_batches(step, comm.rank, comm.world_size)) for step in range(first, last)
        ]
        applied = last - case.options.get("staleness_bound", 0)
        save_from_all_ranks(comm, folder if comm.rank == 0 else None, applied, strategy.state(), {})
        return outcome_of(strategy, results) if last == case.steps else results

    return LocalGroup(world_size).run(run)


@pytest.mark.parametrize("staleness_bound", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_has_the_bits_of_the_one_that_was_not_interrupted(
    stage: int, staleness_bound: int, tmp_path: Path
) -> None:
    case = replace(CASE, precision="fp32").with_options(stage=stage, staleness_bound=staleness_bound)
    whole = train(case, 3, 0, 24, tmp_path / "whole")
    before = train(case, 3, 0, 11, tmp_path / "cut")
    after = train(case, 3, 11, 24, tmp_path / "cut")
    for rank in range(3):
        steps = [result for result in before[rank] if result is not None] + after[rank].results
        assert steps == whole[rank].results
        assert whole[rank].weights.keys() == after[rank].weights.keys()
        assert all(torch.equal(tensor, after[rank].weights[name]) for name, tensor in whole[rank].weights.items())


@pytest.mark.parametrize("staleness_bound", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_three_ranks_then_two_then_four_equal_single(stage: int, staleness_bound: int, tmp_path: Path) -> None:
    case = CASE.with_options(stage=stage, staleness_bound=staleness_bound)
    reference = run_single(replace(case, micro_batches=1, options={**CASE.options, "staleness_bound": staleness_bound}))
    first = train(case, 3, 0, 9, tmp_path)
    second = train(case, 2, 9, 17, tmp_path)
    outcomes = train(case, 4, 17, 24, tmp_path)
    earlier = [result for results in (first[0], second[0]) for result in results if result is not None]
    joined = [replace(outcome, results=earlier + outcome.results) for outcome in outcomes]
    check_equal(reference, joined, "fp64")


class Scaled(nn.Module):
    """With a parameter that has no dims, which in float64 looks like a number."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)) * 0.1)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.matrix * self.scale


class Tiny(nn.Module):
    """One number for three ranks: two of them own nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.1]))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, :5] * self.scale


@pytest.mark.parametrize("ranks", [3, 2])
@pytest.mark.parametrize("build", [Scaled, Tiny])
@pytest.mark.parametrize("stage", STAGES)
def test_parameters_of_few_elements_come_back(stage: int, build: Any, ranks: int, tmp_path: Path) -> None:
    case = replace(CASE, build=build, is_text=False)
    first = train(case.with_options(stage=stage), 3, 0, 9, tmp_path)
    outcomes = train(case.with_options(stage=stage), ranks, 9, 24, tmp_path)
    joined = [replace(outcome, results=first[0] + outcome.results) for outcome in outcomes]
    check_equal(run_single(replace(case, micro_batches=1)), joined, "fp64")


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3), (2, 1), (1, 3)])
def test_a_run_goes_on_in_another_stage(before: int, after: int, tmp_path: Path) -> None:
    reference = run_single(replace(CASE, micro_batches=1))
    first = train(CASE.with_options(stage=before), 3, 0, 9, tmp_path)
    outcomes = train(CASE.with_options(stage=after), 2, 9, 24, tmp_path)
    joined = [replace(outcome, results=first[0] + outcome.results) for outcome in outcomes]
    check_equal(reference, joined, "fp64")


def test_a_checkpoint_of_parts_is_one_of_classicdp_and_the_other_way_round(tmp_path: Path) -> None:
    reference = run_single(replace(CASE, micro_batches=1))
    sharded = CASE.with_options(stage=3, staleness_bound=0)
    first = train(sharded, 3, 0, 9, tmp_path)
    second = train(CASE, 2, 9, 17, tmp_path, make=make_classicdp)
    outcomes = train(sharded, 2, 17, 24, tmp_path)
    joined = [replace(outcome, results=first[0] + second[0] + outcome.results) for outcome in outcomes]
    check_equal(reference, joined, "fp64")


@pytest.mark.parametrize("stage", STAGES)
def test_the_weights_of_a_checkpoint_are_whole(stage: int, tmp_path: Path) -> None:
    outcomes = train(CASE.with_options(stage=stage), 3, 0, 24, tmp_path)
    tensors, _ = load_weights(tmp_path)
    weights: dict[str, Tensor] = outcomes[0].weights
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors.items())


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(tmp_path: Path) -> None:
    case = replace(CASE, build=build_simple_nn, is_text=False).with_options(stage=3)
    train(case, 2, 0, 9, tmp_path)
    with pytest.raises(CheckpointError, match="the checkpoint is of another model"):
        train(CASE.with_options(stage=3), 2, 9, 24, tmp_path)
    train(replace(CASE, precision="fp32", build=build_gpt).with_options(stage=3), 2, 0, 9, tmp_path / "fp32")
    with pytest.raises(CheckpointError, match="another precision"):
        train(CASE.with_options(stage=3), 2, 9, 24, tmp_path / "fp32")
