from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collectives.contract import run_group, same_bits
from smolcluster.collectives.base import Work
from smolcluster.collectives.bucket import (
    FIRST_BUCKET_BYTES,
    LARGE_BYTES,
    GradientBuckets,
    StepSums,
    plan_buckets,
)
from smolcluster.collectives.codec import codec_for
from smolcluster.collectives.groups import tcp_group
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.errors import ConfigError


class Recorder:
    """A communicator that notes its all-reduces, and can hold them back as a slow network would."""

    def __init__(self, comm: LocalCommunicator) -> None:
        self._comm = comm
        self.calls: list[tuple[int, torch.dtype, str | None]] = []
        self.tensors: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Work:
        codec = kwargs.get("codec")
        self.calls.append((tensor.numel(), tensor.dtype, codec and codec.name))
        self.tensors.append(tensor)
        return self._comm.all_reduce(tensor, *args, **kwargs)


def params_of(*lengths: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(length, dtype=dtype)) for length in lengths]


def backward(params: list[nn.Parameter], grads: list[float | None]) -> Tensor:
    """Give parameter i the gradient grads[i] everywhere; None: it takes no part."""
    used = [(param, grad) for param, grad in zip(params, grads, strict=True) if grad is not None]
    loss = sum(((param * grad).sum().double() for param, grad in used), torch.zeros((), dtype=torch.float64))
    if used:
        loss.backward()
    return loss.detach()


def one_step(
    comm: Any, params: list[nn.Parameter], grads: list[float | None], **options: Any
) -> tuple[StepSums, list[Tensor | None]]:
    buckets = GradientBuckets(params, comm, **options)
    buckets.begin(0, count=3 + comm.rank, samples=2, planned=7)
    buckets.arm(torch.tensor(1.5))
    backward(params, grads)
    gradients = buckets.flush()
    sums = gradients.wait()
    gradients.install()
    return sums, [param.grad for param in params]


def test_buckets_go_from_the_last_parameter_to_the_first_and_the_first_is_small() -> None:
    mebi = 2**20 // 4
    params = params_of(mebi * 30, mebi * 2, mebi, mebi, mebi // 2, mebi // 2)
    assert plan_buckets(params, 4 * 2**20) == [[5, 4], [3, 2, 1], [0]]
    assert FIRST_BUCKET_BYTES == 2**20


def test_a_small_model_has_smaller_buckets_so_that_backward_can_hide_them() -> None:
    quarter = 2**18 // 4
    assert [len(bucket) for bucket in plan_buckets(params_of(*[quarter] * 16), 4 * 2**20)] == [2] * 8
    assert [len(bucket) for bucket in plan_buckets(params_of(*[quarter // 2] * 8), 4 * 2**20)] == [2] * 4


def test_a_parameter_larger_than_a_bucket_has_one_of_its_own() -> None:
    assert plan_buckets(params_of(10, 1000, 10), 400) == [[2], [1], [0]]


def test_each_bucket_has_one_dtype_and_goes_when_its_first_parameter_is_ready() -> None:
    params = params_of(4, 4) + params_of(4, 4, dtype=torch.bfloat16) + params_of(4)
    assert plan_buckets(params, 2**20) == [[3, 2], [4, 1, 0]]


def test_gradients_of_all_ranks_are_added_whatever_the_bucket_size() -> None:
    for bucket_bytes in (4, 64, 2**20):

        def step(comm: LocalCommunicator, bucket_bytes: int = bucket_bytes) -> list[Tensor | None]:
            grads = [float(10**i * (comm.rank + 1)) for i in range(4)]
            return one_step(comm, params_of(3, 5, 1, 7), grads, bucket_bytes=bucket_bytes)[1]

        for grads in LocalGroup(3).run(step):
            assert [grad is not None and grad.tolist() for grad in grads] == [
                [6.0 * 10**i] * length for i, length in enumerate((3, 5, 1, 7))
            ]


def test_a_bucket_is_sent_during_backward_as_soon_as_all_before_it_are_full() -> None:
    """Backward computes parameter 1 before parameter 2 here: the order of sending must not follow it."""
    sent_at: list[list[int]] = []

    def step(comm: LocalCommunicator) -> list[int]:
        recorder = Recorder(comm)
        params = params_of(3, 5, 7)
        buckets = GradientBuckets(params, recorder, bucket_bytes=4)
        when_computed = []

        def note(_grad: Tensor) -> None:
            when_computed.append(len(recorder.calls))

        x = params[0].sum() * 2
        x.register_hook(note)
        x = x + params[2].sum()
        x.register_hook(note)
        x = x * 1.0 + params[1].sum()
        buckets.begin(0, count=1, samples=1)
        buckets.arm(torch.tensor(0.0))
        x.backward()
        sent_at.append(when_computed)
        sent = [length for length, _, _ in recorder.calls]
        buckets.flush().wait()
        assert len(recorder.calls) == len(sent), "everything was sent before flush"
        return sent

    # The bucket of parameter 0 is last and carries the tail: 6 fields and one for each parameter.
    assert LocalGroup(2).run(step) == [[7, 5, 3 + 6 + 3]] * 2
    # With parameters 1 and then 2 computed, two buckets have left before parameter 0's part of backward.
    assert all(when[-1] == 2 for when in sent_at)


def test_the_tail_adds_up_what_ranks_report() -> None:
    def step(comm: LocalCommunicator) -> StepSums:
        buckets = GradientBuckets(params_of(3), comm)
        buckets.begin(0, count=10 + comm.rank, samples=comm.rank, planned=33, stop=comm.rank == 1)
        buckets.arm(torch.tensor(0.5 * comm.rank))
        return buckets.flush().wait()

    assert LocalGroup(3).run(step) == [StepSums(1.5, 33, 3, 0, 1)] * 3


def test_the_tail_says_how_many_losses_are_not_finite() -> None:
    def step(comm: LocalCommunicator) -> StepSums:
        buckets = GradientBuckets(params_of(3), comm)
        buckets.begin(0, count=1, samples=1)
        buckets.arm(torch.tensor(float("nan") if comm.rank else 1.0))
        return buckets.flush().wait()

    sums = LocalGroup(3).run(step)
    assert [one.nonfinite for one in sums] == [2] * 3
    assert all(one.loss_sum != one.loss_sum for one in sums)


def test_a_rank_that_computed_nothing_sends_zeros() -> None:
    def step(comm: LocalCommunicator) -> tuple[StepSums, list[Tensor | None]]:
        params = params_of(3, 5)
        buckets = GradientBuckets(params, comm, bucket_bytes=8)
        for number in range(2):  # the second step must not send what the first has left in the buckets
            buckets.begin(number, count=4 * comm.rank, samples=comm.rank, planned=4)
            if comm.rank:
                buckets.arm(torch.tensor(2.0))
                backward(params, [1.0, 2.0])
            gradients = buckets.flush()
            sums = gradients.wait()
            gradients.install()
            grads = [param.grad for param in params]
            for param in params:
                param.grad = None
        return sums, grads

    for sums, grads in LocalGroup(2).run(step):
        assert sums == StepSums(2.0, 4, 1, 0, 0)
        assert [grad is not None and grad.tolist() for grad in grads] == [[1.0] * 3, [2.0] * 5]


def test_a_parameter_used_by_no_rank_has_no_gradient_and_one_used_by_some_has_their_sum() -> None:
    def step(comm: LocalCommunicator) -> list[Tensor | None]:
        return one_step(comm, params_of(2, 2, 2), [1.0, None, 5.0 if comm.rank == 0 else None])[1]

    for grads in LocalGroup(2).run(step):
        assert grads[0] is not None
        assert grads[1] is None
        assert grads[2] is not None
        assert grads[0].tolist() == [2.0, 2.0]
        assert grads[2].tolist() == [5.0, 5.0]


def test_a_gradient_of_earlier_micro_batches_counts_where_the_last_has_none() -> None:
    def step(comm: LocalCommunicator) -> list[Tensor | None]:
        params = params_of(2, 2)
        buckets = GradientBuckets(params, comm)
        buckets.begin(0, count=1, samples=1)
        backward(params, [1.0, 3.0])
        buckets.arm(torch.tensor(0.0))
        backward(params, [1.0, None])
        gradients = buckets.flush()
        gradients.wait()
        gradients.install()
        return [param.grad for param in params]

    for grads in LocalGroup(2).run(step):
        assert [grad is not None and grad.tolist() for grad in grads] == [[4.0, 4.0], [6.0, 6.0]]


@pytest.mark.parametrize("last_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_counts_are_exact_whatever_the_parameters_dtype(last_dtype: torch.dtype) -> None:
    def step(comm: LocalCommunicator) -> tuple[StepSums, list[Tensor | None], Any]:
        recorder = Recorder(comm)
        params = params_of(2, dtype=last_dtype) + params_of(2, dtype=torch.float64) + params_of(2)
        buckets = GradientBuckets(params, recorder)
        buckets.begin(0, count=123_457, samples=1001, planned=123_457 * 2)
        buckets.arm(torch.tensor(1.0, dtype=torch.float64))
        backward(params, [1.0, 2.0, 3.0])
        gradients = buckets.flush()
        sums = gradients.wait()
        gradients.install()
        return sums, [param.grad for param in params], recorder.calls

    for sums, grads, calls in LocalGroup(2).run(step):
        assert sums == StepSums(2.0, 246_914, 2002, 0, 0)
        assert [grad.dtype for grad in grads] == [last_dtype, torch.float64, torch.float32]
        assert [grad.tolist() for grad in grads] == [[2.0, 2.0], [4.0, 4.0], [6.0, 6.0]]
        # bfloat16 counts to 256: then the tail travels alone.
        assert len(calls) == {torch.float32: 2, torch.float64: 2, torch.bfloat16: 4}[last_dtype]


def test_with_a_codec_gradients_are_encoded_and_the_tail_is_not() -> None:
    def step(comm: LocalCommunicator) -> tuple[StepSums, list[Tensor | None], Any]:
        recorder = Recorder(comm)
        sums, grads = one_step(recorder, params_of(3, 4), [1.0, 257.0], codec=codec_for("bf16"))
        return sums, grads, recorder.calls

    for sums, grads, calls in LocalGroup(2).run(step):
        assert (sums.count, sums.loss_sum) == (7, 3.0)
        assert grads[1] is not None
        assert grads[1].tolist() == [512.0] * 4, "257 is no bfloat16"
        assert calls == [(7, torch.float32, "bf16"), (6 + 2, torch.float64, None)]


def test_with_a_codec_a_gradient_that_is_not_finite_is_reported_before_it_is_encoded() -> None:
    def step(comm: LocalCommunicator) -> int:
        grads: list[float | None] = [1.0, float("inf") if comm.rank else 2.0]
        return one_step(comm, params_of(3, 4), grads, codec=codec_for("fp16"), bucket_bytes=8)[0].nonfinite

    assert LocalGroup(2).run(step) == [1, 1]


@pytest.mark.parametrize("sets", [1, 3])
def test_with_int8_sums_and_residuals_add_up_to_the_gradients_whichever_set_carried_them(sets: int) -> None:
    def steps(comm: LocalCommunicator) -> tuple[list[Tensor], list[Tensor]]:
        params = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (5,), (4,))]
        buckets = GradientBuckets(params, comm, codec=codec_for("int8"), sets=sets, bucket_bytes=30)
        under_way, totals = [], [torch.zeros_like(param) for param in params]
        for number in range(9 + sets - 1):
            if number < 9:
                buckets.begin(number, count=1, samples=1)
                buckets.arm(torch.tensor(0.0))
                factors = [torch.linspace(-1, 1 + comm.rank, param.numel()).view(param.shape) for param in params]
                torch.stack([(param * f).sum() for param, f in zip(params, factors, strict=True)]).sum().backward()
                under_way.append(buckets.flush())
            if number >= sets - 1:
                gradients = under_way.pop(0)
                gradients.wait()
                gradients.install()
                for total, param in zip(totals, params, strict=True):
                    assert param.grad is not None
                    total += param.grad
                    param.grad = None
        assert [residual.shape for residual in buckets.residuals] == [param.shape for param in params]
        return totals, buckets.residuals

    ranks = LocalGroup(2).run(steps)
    for index, total in enumerate(ranks[0][0]):
        exact = 9 * sum(torch.linspace(-1, 1 + rank, total.numel()).view(total.shape) for rank in range(2))
        lost = ranks[0][1][index] + ranks[1][1][index]
        torch.testing.assert_close(total + lost, exact, rtol=0, atol=1e-5)  # float32, 9 sums of up to 3
        assert bool(lost.any())


def test_only_int8_among_several_ranks_keeps_what_it_has_lost() -> None:
    assert GradientBuckets(params_of(3), LocalGroup(1).communicators[0], codec=codec_for("int8")).residuals == []
    assert GradientBuckets(params_of(3), LocalGroup(2).communicators[0], codec=codec_for("bf16")).residuals == []


def test_steps_under_way_at_once_have_buckets_of_their_own() -> None:
    def steps(comm: LocalCommunicator) -> list[list[float]]:
        params = params_of(2)
        buckets = GradientBuckets(params, comm, sets=3)
        under_way, seen = [], []
        for number in range(6):
            for param in params:
                param.grad = None
            buckets.begin(number, count=1, samples=1)
            buckets.arm(torch.tensor(0.0))
            backward(params, [float(number)])
            under_way.append(buckets.flush())
            if len(under_way) == 3:
                gradients = under_way.pop(0)
                gradients.wait()
                gradients.install()
                assert params[0].grad is not None
                seen.append(params[0].grad.tolist())
        return seen

    assert LocalGroup(2).run(steps) == [[[2.0 * number] * 2 for number in range(4)]] * 2


def test_one_rank_alone_copies_and_sends_nothing() -> None:
    recorder = Recorder(LocalGroup(1).communicators[0])
    params = params_of(3)
    buckets = GradientBuckets(params, recorder)
    buckets.begin(0, count=5, samples=2, stop=True)
    buckets.arm(torch.tensor(2.5))
    backward(params, [1.0])
    plain = params[0].grad
    gradients = buckets.flush()
    assert gradients.wait() == StepSums(2.5, 5, 2, 0, 1)
    gradients.install()
    assert params[0].grad is plain
    assert recorder.calls == []


def test_a_gradient_that_arrives_twice_in_one_backward_is_refused() -> None:
    def step(comm: LocalCommunicator) -> str:
        linear = nn.Linear(3, 3)
        buckets = GradientBuckets(list(linear.parameters()), comm)
        buckets.begin(0, count=1, samples=1)
        buckets.arm(torch.tensor(0.0))
        x = torch.ones(2, 3, requires_grad=True)
        x = checkpoint(linear, checkpoint(linear, x, use_reentrant=True), use_reentrant=True)
        with pytest.raises(ConfigError, match="use_reentrant=False") as caught:
            x.sum().backward()
        return str(caught.value)

    assert "twice" in LocalGroup(2).run(step)[0]


def test_after_close_gradients_are_left_alone() -> None:
    recorder = Recorder(LocalGroup(2).communicators[0])
    params = params_of(3)
    buckets = GradientBuckets(params, recorder)
    buckets.begin(0, count=1, samples=1)
    buckets.arm(torch.tensor(0.0))
    buckets.close()
    backward(params, [1.0])
    assert params[0].grad is not None
    assert recorder.calls == []


class Manual:
    """Work that ends when told to."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.callbacks: list[Any] = []

    def wait(self, timeout: float | None = None) -> None:
        assert self.event.wait(10)

    def add_done_callback(self, fn: Any) -> None:
        self.callbacks.append(fn)

    def end(self) -> None:
        for fn in self.callbacks:
            fn(self)
        self.event.set()


def test_an_all_reduces_span_begins_when_the_one_before_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = LocalGroup(2).communicators[0]
    works = [Manual(), Manual()]
    waiting = list(works)
    clock = iter(range(100, 1000))
    monkeypatch.setattr("smolcluster.collectives.bucket.time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(comm, "all_reduce", lambda tensor, **_: waiting.pop(0), raising=False)
    params = params_of(3, 4)
    buckets = GradientBuckets(params, comm, bucket_bytes=4)
    buckets.begin(0, count=1, samples=1)
    buckets.arm(torch.tensor(0.0))
    backward(params, [1.0, 1.0])  # issued at 100 and 101
    gradients = buckets.flush()
    for work in works:  # ended at 102 and 103
        work.end()
    gradients.wait()
    spans = [(span.name, span.start, span.end) for span in comm.telemetry.drain()]
    assert spans == [("comm_wait", 104.0, 105.0), ("all_reduce", 100.0, 102.0), ("all_reduce", 102.0, 103.0)]


# ---- two ranks that share memory

LARGE = LARGE_BYTES // 4  # float32 elements
SHAPES = [(3,), (LARGE,), (5, LARGE // 4), (1,), (LARGE - 1,)]
# By step: what each rank's gradients are; None: that parameter takes no part.
CASES: list[dict[int, list[float | None]]] = [
    {0: [1.0, 2.0, 3.0, 4.0, 5.0], 1: [0.5, 0.25, 7.0, 1.0, 9.0]},
    {0: [1.0, None, 3.0, None, 5.0], 1: [None, 0.25, None, None, None]},
    {0: [None, None, None, None, None], 1: [1.0, 2.0, 3.0, 4.0, 5.0]},
]


def reduced_in_steps(
    comm: Any, dtypes: list[torch.dtype], sets: int
) -> list[tuple[StepSums, list[Tensor | None], list[int]]]:
    """Sums, gradients and where autograd had put these, of all cases one after the other, `sets` under way at once."""
    params = [nn.Parameter(torch.zeros(*shape, dtype=dtype)) for shape, dtype in zip(SHAPES, dtypes, strict=True)]
    params[2] = nn.Parameter(params[2].detach().t())  # columns first
    buckets = GradientBuckets(params, comm, sets=sets)
    under_way: list[tuple[Any, list[int]]] = []
    results = []
    for step, case in enumerate([*CASES, None, None][: len(CASES) + sets - 1]):
        if case is not None:
            buckets.begin(step, count=3 + comm.rank, samples=2, planned=7)
            buckets.arm(torch.tensor(1.5))
            backward(params, case[comm.rank])
            places = [0 if param.grad is None else param.grad.data_ptr() for param in params]
            under_way.append((buckets.flush(), places))
        if len(under_way) == sets or case is None:
            gradients, places = under_way.pop(0)
            sums = gradients.wait()
            gradients.install()
            results.append((sums, [None if param.grad is None else param.grad.clone() for param in params], places))
            assert all(param.grad is None or param.grad.stride() == param.stride() for param in params)
            if places[1] and params[1].nbytes >= LARGE_BYTES and comm.all_reduce_scattered is not None:
                assert params[1].grad is not None
                assert params[1].grad.data_ptr() == places[1]  # reduced where it lies
            for param in params:
                param.grad = None
    buckets.close()
    return results


@pytest.mark.skipif(sys.platform == "win32", reason="ranks of one host speak TCP on Windows")
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("half", [[], [1], [4], [0, 1, 2, 3, 4]])
def test_ranks_that_share_memory_reduce_the_same_where_autograd_left_it(half: list[int], sets: int) -> None:
    dtypes = [torch.bfloat16 if index in half else torch.float32 for index in range(len(SHAPES))]
    group = tcp_group(2, shared_memory=True)
    through_memory = run_group(group, lambda comm: reduced_in_steps(comm, dtypes, sets))
    expected = LocalGroup(2).run(lambda comm: reduced_in_steps(comm, dtypes, sets))
    for mine, theirs in zip(through_memory, expected, strict=True):
        assert len(mine) == len(CASES)
        for (sums, grads, _), (wanted_sums, wanted_grads, _) in zip(mine, theirs, strict=True):
            assert sums == wanted_sums
            for grad, wanted in zip(grads, wanted_grads, strict=True):
                assert (grad is None) == (wanted is None)
                assert grad is None or (wanted is not None and same_bits([grad, wanted]))


@pytest.mark.skipif(sys.platform == "win32", reason="ranks of one host speak TCP on Windows")
def test_two_parameters_that_autograd_gave_one_gradient_are_each_added_once() -> None:
    def step(comm: Any) -> list[Tensor | None]:
        params = params_of(LARGE, LARGE, LARGE)
        buckets = GradientBuckets(params, comm)
        buckets.begin(0, count=1, samples=1)
        buckets.arm(torch.tensor(1.5))
        first, second, third = params
        values = torch.full((1, LARGE), comm.rank + 1.0)
        (((first.view(1, -1) + second.view(1, -1)) * values).sum() + (third * values).sum()).backward()
        assert first.grad is not None
        assert second.grad is not None
        assert first.grad.data_ptr() == second.grad.data_ptr()
        gradients = buckets.flush()
        gradients.wait()
        return gradients.grads

    for grads in run_group(tcp_group(2, shared_memory=True), step):
        assert [None if grad is None else grad.unique().tolist() for grad in grads] == [[3.0]] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="ranks of one host speak TCP on Windows")
def test_a_gradient_that_is_reduced_where_it_lies_is_gone_once_it_is_applied() -> None:
    def step(comm: Any) -> bool:
        params = params_of(LARGE)
        buckets = GradientBuckets(params, comm)
        buckets.begin(0, count=1, samples=1)
        buckets.arm(torch.tensor(1.5))
        backward(params, [1.0])
        gradients = buckets.flush()
        gradients.wait()
        gradients.install()
        del gradients
        assert params[0].grad is not None
        kept = weakref.ref(params[0].grad)
        comm.barrier()  # the loop has nothing to do with the reduction any more
        params[0].grad = None
        return kept() is None

    assert run_group(tcp_group(2, shared_memory=True), step) == [True, True]


@pytest.mark.skipif(sys.platform == "win32", reason="ranks of one host speak TCP on Windows")
def test_ranks_that_share_memory_but_not_the_kind_of_device_lay_their_buckets_out_alike() -> None:
    def calls(comm: Any) -> list[tuple[torch.dtype, int]]:
        device = ["cpu", "meta"][comm.rank]
        params = [nn.Parameter(torch.zeros(FIRST_BUCKET_BYTES // 4, device=device)) for _ in range(3)]
        buckets = GradientBuckets(params, comm)
        return [(tensor.dtype, tensor.numel()) for tensor in getattr(buckets._sets[0], "buckets", [])]

    on_cpu, elsewhere = run_group(tcp_group(2, shared_memory=True), calls)
    assert on_cpu == elsewhere
    assert len(on_cpu) == 3
