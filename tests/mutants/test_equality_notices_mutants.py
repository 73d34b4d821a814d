"""Each way in which data parallelism is usually wrong must fail the equality check.

`make mutants` does the same slowly, by changing the source text and running all equality tests against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algorithms.equality import Case, check_equal, make_classicdp, run_classicdp, run_single
from smolcluster.algorithms import classicdp
from smolcluster.algorithms.classicdp import ClassicDP
from smolcluster.collectives.bucket import GradientBuckets
from smolcluster.collectives.local import LocalCommunicator
from smolcluster.data.batch import Batch
from smolcluster.training.step import clip_gradients, forward_backward

WORLD_SIZE = 3
CASE = Case(steps=12).with_options(grad_clip_norm=0.3)


class _Done:
    """The work of an all-reduce that never was."""

    def wait(self, timeout: float | None = None) -> None:
        pass

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        fn(self)


def check(case: Case = CASE, **how: Any) -> None:
    check_equal(run_single(case), run_classicdp(case, WORLD_SIZE, **how), "fp64")


def test_the_program_as_it_is_passes() -> None:
    check()
    check(CASE.with_options(staleness_bound=2))


def test_no_broadcast_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classicdp, "_broadcast_model", lambda model, comm: None)
    with pytest.raises(AssertionError, match="rank 1 has another"):
        check()


@pytest.mark.parametrize("factor", [WORLD_SIZE, 1 / WORLD_SIZE])
def test_a_wrong_one_over_n_is_noticed(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr(
        classicdp, "clip_gradients", lambda params, limit, scale: clip_gradients(params, limit, scale * factor)
    )
    with pytest.raises(AssertionError):
        check()
    with pytest.raises(AssertionError):  # AdamW forgives a constant factor, the norm does not
        check(CASE.with_options(grad_clip_norm=None))


@pytest.mark.parametrize("bucket", [0, 2])
def test_a_skipped_bucket_is_noticed(monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    class Skipping:
        def __init__(self, comm: LocalCommunicator) -> None:
            self._comm = comm
            self._calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._comm, name)

        def all_reduce(self, tensor: Tensor, **options: Any) -> Any:
            call, self._calls = self._calls, self._calls + 1
            return _Done() if call % self.buckets == bucket else self._comm.all_reduce(tensor, **options)

    def make(model: nn.Module, comm: LocalCommunicator, case: Case) -> ClassicDP:
        skipping = Skipping(comm)
        strategy = make_classicdp(model, skipping, case)  # type: ignore[arg-type]
        skipping.buckets = len(strategy._buckets._layout)
        assert skipping.buckets > 3
        return strategy

    with pytest.raises(AssertionError):
        check(make_strategy=make)


def test_clipping_before_the_reduction_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = GradientBuckets.arm
    monkeypatch.setattr(GradientBuckets, "arm", lambda self, loss_sum: None)

    def clip_own(model: nn.Module, batches: list[Batch], scale: float, *args: Any, **options: Any) -> Tensor:
        loss_sum = forward_backward(model, batches, scale, *args, **options)
        clip_gradients(model.parameters(), 0.3 / WORLD_SIZE)
        arm(options["before_last"].__self__, loss_sum)
        return loss_sum

    monkeypatch.setattr(classicdp, "forward_backward", clip_own)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(("bound", "used"), [(0, 1), (1, 0), (2, 1), (2, 3)])
def test_a_staleness_bound_off_by_one_is_noticed(bound: int, used: int) -> None:
    def make(model: nn.Module, comm: LocalCommunicator, case: Case) -> ClassicDP:
        return make_classicdp(model, comm, case.with_options(staleness_bound=used))

    with pytest.raises(AssertionError):
        check(CASE.with_options(staleness_bound=bound), make_strategy=make)


def test_every_rank_computing_the_whole_batch_is_noticed() -> None:
    """The gradient is then corrected to the right one; only the counts tell of the wasted work."""
    with pytest.raises(AssertionError, match="count="):
        check(rank_batches=lambda step, rank, world_size: CASE.rank_batches(step, 0, 1))


def test_unequal_bits_between_ranks_are_noticed() -> None:
    case = Case(steps=3)
    reference, ranks = run_single(case), run_classicdp(case, 2)
    ranks[1].weights["norm.bias"][0] += 1e-15
    assert ranks[1].weights["norm.bias"].dtype == torch.float64
    with pytest.raises(AssertionError, match=r"rank 1 has another norm.bias"):
        check_equal(reference, ranks, "fp64")
