"""Layers over ranks: what each holds goes to disk, and comes back to any other split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from algorithms.equality import Case, check_equal, make_classicdp, run_single
from algorithms.equality import _outcome as outcome_of_whole
from algorithms.staged import build_gpt, make_staged, outcome_of, staged_batches
from smolcluster.checkpoint.ranks import SharedReader, save_from_all_ranks
from smolcluster.checkpoint.store import load_weights, open_checkpoint
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.errors import CheckpointError
from smolcluster.training.step import StepResult

CASE = Case(build=build_gpt, steps=24, micro_batches=3).with_options(grad_clip_norm=0.3)


def train(case: Case, world_size: int, first: int, last: int, folder: Path, *, is_whole: bool = False) -> list[Any]:
    """Steps first to last - 1, from the checkpoint of step `first` - K if there is to be one, and a checkpoint."""

    def run(comm: LocalCommunicator) -> Any:
        make = make_classicdp if is_whole else make_staged
        strategy = make(case.build(comm.rank), comm, case)
        if first > 0:
            reader = SharedReader.open(comm, open_checkpoint(folder) if comm.rank == 0 else None)
            assert reader is not None
            strategy.load_state(reader)
        results: list[StepResult | None] = []
        for step in range(first, last):
            if is_whole:
                batches = case.rank_batches(step, comm.rank, comm.world_size)
            else:
                batches = staged_batches(case, step, comm.rank, comm.world_size)
            results.append(strategy.train_step(batches))
        applied = last - case.options.get("staleness_bound", 0)
        save_from_all_ranks(comm, folder if comm.rank == 0 else None, applied, strategy.state(), {})
        if last < case.steps:
            return results
        return outcome_of_whole(strategy, results) if is_whole else outcome_of(strategy, results)

    return LocalGroup(world_size).run(run)


@pytest.mark.parametrize("staleness_bound", [0, 2])
@pytest.mark.parametrize("schedule", [None, "gpipe", "1f1b", "interleaved"])
def test_a_resumed_run_has_the_bits_of_the_one_that_was_not_interrupted(
    schedule: str | None, staleness_bound: int, tmp_path: Path
) -> None:
    case = replace(CASE, precision="fp32").with_options(staleness_bound=staleness_bound)
    case = case if schedule is None else case.with_options(schedule=schedule)
    whole = train(case, 3, 0, 24, tmp_path / "whole")
    before = train(case, 3, 0, 11, tmp_path / "cut")
    after = train(case, 3, 11, 24, tmp_path / "cut")
    for rank in range(3):
        steps = [result for result in before[rank] if result is not None] + after[rank].results
        assert steps == whole[rank].results
        assert whole[rank].weights.keys() == after[rank].weights.keys()
        assert all(torch.equal(tensor, after[rank].weights[name]) for name, tensor in whole[rank].weights.items())


@pytest.mark.parametrize("staleness_bound", [0, 2])
@pytest.mark.parametrize("schedules", [(None, None, None), ("1f1b", "interleaved", "gpipe"), ("gpipe", None, "1f1b")])
def test_three_ranks_then_two_then_four_equal_single(
    schedules: tuple[str | None, ...], staleness_bound: int, tmp_path: Path
) -> None:
    case = CASE.with_options(staleness_bound=staleness_bound)
    parts = [case if name is None else case.with_options(schedule=name) for name in schedules]
    first = train(parts[0], 3, 0, 9, tmp_path)
    second = train(parts[1], 2, 9, 17, tmp_path)
    outcomes = train(parts[2], 4, 17, 24, tmp_path)
    earlier = [result for results in (first[0], second[0]) for result in results if result is not None]
    joined = [replace(outcome, results=earlier + outcome.results) for outcome in outcomes]
    check_equal(run_single(case), joined, "fp64")


@pytest.mark.parametrize("staleness_bound", [0, 1])
def test_a_checkpoint_of_layers_is_one_of_classicdp_and_the_other_way_round(
    staleness_bound: int, tmp_path: Path
) -> None:
    case = CASE.with_options(staleness_bound=staleness_bound)
    first = train(case, 3, 0, 9, tmp_path)
    second = train(case, 2, 9, 17, tmp_path, is_whole=True)
    outcomes = train(case.with_options(schedule="1f1b"), 4, 17, 24, tmp_path)
    earlier = [result for results in (first[0], second[0]) for result in results if result is not None]
    joined = [replace(outcome, results=earlier + outcome.results) for outcome in outcomes]
    check_equal(run_single(case), joined, "fp64")


def test_the_weights_of_a_checkpoint_are_whole(tmp_path: Path) -> None:
    outcomes = train(CASE, 3, 0, 24, tmp_path)
    tensors, _ = load_weights(tmp_path)
    assert tensors.keys() == outcomes[0].weights.keys()
    assert all(torch.equal(tensor, outcomes[0].weights[name]) for name, tensor in tensors.items())


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(tmp_path: Path) -> None:
    train(replace(CASE, build=lambda seed: build_gpt(seed, blocks=4)), 2, 0, 9, tmp_path)
    with pytest.raises(CheckpointError, match="the checkpoint is of another model"):
        train(CASE, 2, 9, 24, tmp_path)
    train(replace(CASE, precision="fp32"), 2, 0, 9, tmp_path / "fp32")
    with pytest.raises(CheckpointError, match="another precision"):
        train(CASE, 2, 9, 24, tmp_path / "fp32")
