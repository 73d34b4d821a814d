from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from algorithms.equality import (
    Case,
    build_gpt,
    build_simple_nn,
    check_equal,
    make_classicdp,
    run_classicdp,
    run_single,
)
from smolcluster.algorithms.classicdp import ClassicDP
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.data.batch import Batch
from smolcluster.errors import CollectiveMismatch, ConfigError, TrainingStopped
from smolcluster.models.checkpointing import checkpoint_activations
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.step import LossScaler

ADAMW = optimizer_factory("adamw", 1e-3, 0.1)
PRECISIONS = ["fp64", "fp32"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gpt_on_any_number_of_ranks_equals_single(world_size: int, precision: str) -> None:
    # 45 samples in batches of 10: every fifth step has 5, and 10 over 3 or 4 ranks is unequal as well.
    case = Case(precision=precision)
    check_equal(run_single(case), run_classicdp(case, world_size), precision)


@pytest.mark.parametrize(("world_size", "precision"), [(2, "fp64"), (3, "fp32"), (4, "fp64")])
@pytest.mark.parametrize("engine", ["inproc", "tcp", "gloo"])
def test_every_engine_equals_single(engine: str, world_size: int, precision: str) -> None:
    case = Case(precision=precision, micro_batches=2).with_options(staleness_bound=1, grad_clip_norm=0.5)
    check_equal(run_single(case), run_classicdp(case, world_size, engine=engine), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_classifier_on_three_ranks_equals_single(precision: str) -> None:
    case = Case(build=build_simple_nn, is_text=False, precision=precision)
    check_equal(run_single(case), run_classicdp(case, 3), precision)


@pytest.mark.parametrize("shares", [(5.0, 3.0, 2.0), (1.0, 0.0, 3.0), (100.0, 1.0, 1.0)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_unequal_shares_equal_single_even_where_a_rank_has_no_sample(shares: tuple[float, ...], precision: str) -> None:
    case = Case(precision=precision, shares=shares)
    check_equal(run_single(case), run_classicdp(case, 3), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_accumulation_over_four_micro_batches_equals_single(precision: str) -> None:
    case = Case(precision=precision, micro_batches=4)
    whole = run_single(replace(case, micro_batches=1))
    check_equal(whole, run_classicdp(case, 2), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_active_clipping_equals_single(precision: str) -> None:
    case = Case(precision=precision).with_options(grad_clip_norm=0.3)
    reference = run_single(case)
    assert min(result.grad_norm for result in reference.results) > 0.3
    check_equal(reference, run_classicdp(case, 3), precision)


@pytest.mark.parametrize("delay", [1, 2, 5])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_delayed_gradients_equal_single_with_the_same_staleness_bound(delay: int, precision: str) -> None:
    case = Case(precision=precision, shares=(3.0, 1.0)).with_options(staleness_bound=delay, grad_clip_norm=0.5)
    check_equal(run_single(case), run_classicdp(case, 2), precision)


def test_activation_checkpointing_equals_single_without_it() -> None:
    def build(seed: int) -> nn.Module:
        model = build_gpt(seed)
        assert checkpoint_activations(model) == 2
        return model

    case = Case(micro_batches=2)
    check_equal(run_single(case), run_classicdp(replace(case, build=build), 2), "fp64")


def test_delayed_gradients_give_other_numbers_than_immediate_ones() -> None:
    immediate = run_classicdp(Case(), 2)[0]
    delayed = run_classicdp(Case().with_options(staleness_bound=1), 2)[0]
    assert abs(immediate.results[-1].loss - delayed.results[-1].loss) > 1e-6


def test_unplanned_batches_equal_single() -> None:
    case = Case()

    def pairs(step: int, rank: int, world_size: int) -> list[Batch]:
        return [replace(batch, planned_count=0) for batch in case.rank_batches(step, rank, world_size)]

    check_equal(run_single(case), run_classicdp(case, 3, rank_batches=pairs), "fp64")


def test_two_runs_give_the_same_bits() -> None:
    case = Case(precision="fp32", steps=10)
    first, second = run_classicdp(case, 3)[0], run_classicdp(case, 3)[0]
    assert all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())


@pytest.mark.parametrize("compression", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("delay", [0, 2])
def test_compressed_gradients_keep_the_ranks_equal_and_counts_exact(compression: str, delay: int) -> None:
    case = Case(precision="fp32").with_options(staleness_bound=delay)
    reference = run_single(case)
    ranks = run_classicdp(case.with_options(compression=compression), 3)
    for outcome in ranks:
        assert outcome.results == ranks[0].results
        assert all(torch.equal(tensor, ranks[0].weights[name]) for name, tensor in outcome.weights.items())
    # bf16 rounds gradients to 3 digits, int8 to 2; 50 steps of AdamW at 3e-3 stay close to the uncompressed run.
    losses = [result.loss for result in reference.results]
    assert [result.loss for result in ranks[0].results] == pytest.approx(losses, abs=0.02)
    assert ranks[0].results != reference.results, "nothing was compressed"
    assert [r.count for r in ranks[0].results] == [r.count for r in reference.results]
    assert ranks[0].results[0].loss == pytest.approx(losses[0], abs=1e-6), "loss sums must not be compressed"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_the_ranks_equal(precision: str) -> None:
    case = Case(precision=precision)
    reference, ranks = run_single(case), run_classicdp(case, 3)
    for outcome in ranks:
        assert outcome.results == ranks[0].results
        assert all(torch.equal(tensor, ranks[0].weights[name]) for name, tensor in outcome.weights.items())
    losses = [result.loss for result in reference.results]
    assert [result.loss for result in ranks[0].results] == pytest.approx(losses, abs=0.02)


class Normed(nn.Module):
    """A model with a buffer that differs by seed, a frozen parameter and one that is never used."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("shift", torch.randn(12, generator=generator))
        self.register_buffer("seen", torch.tensor(seed))
        self.frozen = nn.Parameter(torch.randn(12, generator=generator), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3, generator=generator))
        self.transposed = nn.Parameter(torch.randn(5, 12, generator=generator).t())

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs * self.frozen + self.shift) @ self.transposed


def test_all_ranks_start_from_rank_zeros_weights_and_buffers() -> None:
    def start(comm: LocalCommunicator) -> dict[str, Tensor]:
        return dict(ClassicDP(Normed(comm.rank), ADAMW, comm).model.state_dict())

    expected = Normed(0).state_dict()
    for state in LocalGroup(3).run(start):
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


def test_frozen_and_unused_parameters_are_treated_as_by_single() -> None:
    case = Case(build=Normed, is_text=False)
    reference = run_single(case)
    check_equal(reference, run_classicdp(case, 2), "fp64")
    # Plain AdamW decays no parameter that has no gradient.
    assert torch.equal(reference.weights["unused"], Normed(0).unused.detach().double())


class Branching(nn.Module):
    """Only samples whose first value is positive reach `extra`, so a rank may have no gradient for it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base, self.extra = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        is_extra = inputs[:, 0] > 1.5
        logits = self.base(inputs)
        return logits.index_add(0, is_extra.nonzero()[:, 0], self.extra(inputs[is_extra])) if is_extra.any() else logits


def test_a_parameter_that_only_some_ranks_use_equals_single() -> None:
    case = Case(build=Branching, is_text=False, global_batch=6, micro_batches=2)
    reference = run_single(replace(case, micro_batches=1))
    # Ranks are threads here and share torch's global generator, which the module draws from.
    weights = Branching(0).state_dict()

    def make(model: nn.Module, comm: LocalCommunicator, case: Case) -> ClassicDP:
        if comm.rank == 0:
            model.load_state_dict(weights)
        return make_classicdp(model, comm, case)

    check_equal(reference, run_classicdp(case, 3, make), "fp64")


@pytest.mark.parametrize("compression", ["none", "bf16", "int8"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_at_the_same_step(compression: str) -> None:
    def train(comm: LocalCommunicator) -> tuple[int, str]:
        strategy = ClassicDP(build_simple_nn(0), ADAMW, comm, compression=compression)
        targets = torch.zeros(2, dtype=torch.int64)
        for step in range(5):
            value = math.nan if step == 3 and comm.rank == 1 else 1.0
            try:
                strategy.train_step([Batch(torch.full((2, 12), value), targets, 4)])
            except TrainingStopped as error:
                return step, str(error)
        return -1, ""

    outcomes = LocalGroup(2).run(train)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == 3
    assert outcomes[0][1].startswith("step 3: the loss is nan")


@pytest.mark.parametrize("compression", ["none", "fp16", "int8"])
def test_skip_nonfinite_passes_over_the_step_on_all_ranks(compression: str) -> None:
    def train(comm: LocalCommunicator) -> tuple[list[bool], list[Tensor]]:
        strategy = ClassicDP(build_simple_nn(0), ADAMW, comm, compression=compression, skip_nonfinite=True)
        applied = []
        for step in range(4):
            value = math.inf if step == 1 and comm.rank == 0 else 1.0
            batch = Batch(torch.full((2, 12), value), torch.zeros(2, dtype=torch.int64), 4)
            result = strategy.train_step([batch])
            assert result is not None
            applied.append(result.applied)
        return applied, [param.detach() for param in strategy.model.parameters()]

    (applied, params), (other_applied, other_params) = LocalGroup(2).run(train)
    assert applied == other_applied == [True, False, True, True]
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(params, other_params, strict=True))


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("compression", ["none", "fp16", "int8"])
def test_an_fp16_overflow_on_one_rank_backs_off_on_all(delay: int, compression: str) -> None:
    def train(comm: LocalCommunicator) -> tuple[list[bool], float, list[Tensor]]:
        torch.manual_seed(comm.rank)
        strategy = ClassicDP(
            nn.Linear(3, 2), ADAMW, comm, precision="fp16", staleness_bound=delay, compression=compression
        )
        # Only rank 1's gradient is too large for float16.
        batch = Batch(torch.ones(4, 3) * (1 + 200 * comm.rank), torch.tensor([0, 1, 1, 0]), 8)
        results = [strategy.train_step([batch]) for _ in range(24)]
        applied = [result.applied for result in results if result is not None]
        return applied, strategy._scaler.scale, [param.detach() for param in strategy.model.parameters()]

    (applied, scale, params), (other_applied, other_scale, other_params) = LocalGroup(2).run(train)
    assert applied == other_applied
    assert not applied[0]
    assert applied[-1]
    # Late news of one overflow must not be taken for several.
    assert 64 <= scale < 2**16
    assert scale == other_scale
    assert all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True))


def test_an_fp16_gradient_is_unscaled_with_the_scale_it_was_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(precision="fp16", steps=12).with_options(staleness_bound=2)
    expected = run_classicdp(case, 2)[0].results
    # A scale that doubles after every step: gradients in flight then have three different ones.
    monkeypatch.setattr(LossScaler.__init__, "__defaults__", (256.0, 1))
    growing = run_classicdp(case, 2)[0].results
    assert [r.grad_norm for r in growing] == pytest.approx([r.grad_norm for r in expected], rel=0.02)


def test_a_vote_to_stop_reaches_all_ranks_at_the_same_step() -> None:
    for delay, expected in ((0, 2), (2, 2)):

        def train(comm: LocalCommunicator, delay: int = delay) -> int:
            strategy = ClassicDP(build_simple_nn(0), ADAMW, comm, staleness_bound=delay)
            for step in range(10):
                if step == 2 and comm.rank == 1:
                    strategy.request_stop()
                batch = Batch(torch.randn(2, 12), torch.zeros(2, dtype=torch.int64), 4)
                result = strategy.train_step([batch])
                if result is not None and result.stop:
                    return result.step
            return -1

        assert LocalGroup(2).run(train) == [expected, expected]


def test_ranks_that_plan_different_steps_are_told_so() -> None:
    def train(comm: LocalCommunicator) -> None:
        strategy = ClassicDP(build_simple_nn(0), ADAMW, comm)
        strategy.train_step([Batch(torch.randn(2, 12), torch.zeros(2, dtype=torch.int64), 4 + comm.rank)])

    with pytest.raises(CollectiveMismatch, match=r"planned [45] targets, but the mean over all 2 ranks is 4\.5"):
        LocalGroup(2).run(train)


def test_a_step_whose_plan_was_wrong_is_corrected_to_the_mean_of_what_was_computed() -> None:
    case = Case(steps=10)

    def half_the_plan(step: int, rank: int, world_size: int) -> list[Batch]:
        batches = case.rank_batches(step, rank, world_size)
        return [replace(batch, planned_count=batch.planned_count // 2) for batch in batches]

    check_equal(run_single(case), run_classicdp(case, 2, rank_batches=half_the_plan), "fp64")


def test_a_rank_without_samples_must_say_so_with_an_empty_batch() -> None:
    with pytest.raises(ConfigError, match="0 samples"):
        LocalGroup(1).run(lambda comm: ClassicDP(build_gpt(0), ADAMW, comm).train_step([]))


def test_the_step_leaves_the_spans_of_backward_and_of_every_bucket() -> None:
    def train(comm: LocalCommunicator) -> list[tuple[str, int]]:
        strategy = ClassicDP(build_simple_nn(0), ADAMW, comm, bucket_bytes=256)
        for _ in range(2):
            strategy.train_step([Batch(torch.randn(2, 12), torch.zeros(2, dtype=torch.int64), 4)])
        return [(span.name, span.step) for span in comm.telemetry.drain()]

    for spans in LocalGroup(2).run(train):
        for step in (0, 1):
            names = sorted(name for name, at in spans if at == step)
            # 9 x 12 weights of 4 bytes exceed a bucket of 256 bytes: out.weight + out.bias, hidden.bias, hidden.weight
            assert names.count("all_reduce") == 2
            assert names.count("backward") == names.count("forward") == names.count("comm_wait") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_a_cuda_rank_and_a_cpu_rank_train_together(precision: str) -> None:
    case = Case(precision=precision).with_options(grad_clip_norm=0.5)

    def make(model: nn.Module, comm: LocalCommunicator, case: Case) -> ClassicDP:
        return make_classicdp(model, comm, case.with_options(device="cpu" if comm.rank else "cuda"))

    reference, (on_gpu, on_cpu) = run_single(case), run_classicdp(case, 2, make)
    tolerance = {"fp64": 1e-9, "fp32": 1e-3}.get(precision, 0.05)
    assert [r.loss for r in on_gpu.results] == [r.loss for r in on_cpu.results]
    assert [r.loss for r in on_gpu.results] == pytest.approx([r.loss for r in reference.results], abs=tolerance)
