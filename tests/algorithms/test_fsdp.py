from __future__ import annotations

import functools
import gc
import itertools
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algorithms.equality import (
    VOCAB,
    Case,
    Outcome,
    build_gpt,
    build_simple_nn,
    check_equal,
    make_fsdp,
    run_classicdp,
    run_fsdp,
    run_single,
)
from models.hf_folders import hf_config, transformers
from smolcluster.algorithms.fsdp import FSDP
from smolcluster.algorithms.single import Single
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.data.batch import Batch
from smolcluster.errors import CollectiveMismatch, ConfigError, TrainingStopped
from smolcluster.models.checkpointing import checkpoint_activations
from smolcluster.models.hf import HFModel, init_hf_parameters
from smolcluster.models.partition import Unit, split_into_units
from smolcluster.training.optim import optimizer_factory

ADAMW = optimizer_factory("adamw", 1e-3, 0.1)
STAGES = [0, 1, 2, 3]
_RANDOM = threading.Lock()  # ranks are threads here, and transformers draws from torch's global generator


def build_llama(seed: int, **changes: Any) -> nn.Module:
    """A random Llama of 3 000 parameters, its head tied to its embedding; sizes that 2, 3 and 4 do not divide."""
    config = hf_config("llama", vocab_size=VOCAB, hidden_size=14, head_dim=6, intermediate_size=19, **changes)
    with _RANDOM, torch.random.fork_rng(devices=[]):
        inner = transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        init_hf_parameters(inner, seed)
    return HFModel(inner, None).train()


def build_checkpointed(build: Callable[[int], nn.Module], seed: int) -> nn.Module:
    model = build(seed)
    assert checkpoint_activations(model) == 2
    return model


# Every pair of settings of these five occurs in some row: an orthogonal array of strength 2 (Plackett-Burman, 8 runs).
FACTORS = [
    # llama, 4 micro-batches, clipping, checkpointing, float32
    (False, False, False, False, False),
    (True, True, False, True, False),
    (False, True, True, False, True),
    (True, False, True, True, False),
    (True, True, False, False, True),
    (False, True, True, True, False),
    (False, False, False, True, True),
    (True, False, True, False, True),
]
CELLS = list(itertools.product(STAGES, [2, 3, 4], [0, 2]))


def case_of(row: tuple[bool, ...], staleness_bound: int) -> Case:
    is_llama, is_split, is_clipped, is_checkpointed, is_single_precision = row
    build = build_llama if is_llama else build_gpt
    case = Case(
        build=functools.partial(build_checkpointed, build) if is_checkpointed else build,
        precision="fp32" if is_single_precision else "fp64",
        micro_batches=4 if is_split else 1,
    )
    return case.with_options(staleness_bound=staleness_bound, grad_clip_norm=0.3 if is_clipped else None)


@functools.cache
def reference(row: tuple[bool, ...], staleness_bound: int) -> Any:
    """`single` on whole batches, without checkpointing: the same for all stages and numbers of ranks."""
    is_llama, _, is_clipped, _, is_single_precision = row
    return run_single(case_of((is_llama, False, is_clipped, False, is_single_precision), staleness_bound))


@pytest.mark.parametrize(("stage", "world_size", "staleness_bound"), CELLS)
def test_every_stage_on_any_number_of_ranks_equals_single(stage: int, world_size: int, staleness_bound: int) -> None:
    # 45 samples in batches of 10: steps end ragged, and in stage 3 a rank without samples must take part.
    number = CELLS.index((stage, world_size, staleness_bound))
    for row in (FACTORS[number % 8], FACTORS[(number + 3) % 8]):
        case = case_of(row, staleness_bound)
        outcome = reference(row, staleness_bound)
        if case.options["grad_clip_norm"]:
            assert min(result.grad_norm for result in outcome.results) > 0.3
        check_equal(outcome, run_fsdp(case, world_size, stage), case.precision)


@pytest.mark.parametrize("row", FACTORS)
@pytest.mark.parametrize("stage", [2, 3])
def test_every_pair_of_settings_equals_single(stage: int, row: tuple[bool, ...]) -> None:
    case = case_of(row, 2)
    check_equal(reference(row, 2), run_fsdp(case, 3, stage), case.precision)


@pytest.mark.parametrize("stage", STAGES)
def test_alone_it_is_single(stage: int) -> None:
    case = Case(micro_batches=2).with_options(grad_clip_norm=0.3)
    check_equal(run_single(replace(case, micro_batches=1)), run_fsdp(case, 1, stage), "fp64")


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_draw_other_values_take_rank_zeros(stage: int) -> None:
    def start(comm: LocalCommunicator) -> dict[str, Tensor | None]:
        own = build_gpt(comm.rank)

        def values(unit: Unit) -> dict[str, Tensor]:
            return {name: own.get_parameter(name).detach() for name in unit.parameters}

        strategy = FSDP(build_gpt(7), ADAMW, comm, stage=stage, values=values, bucket_bytes=2048)
        return {name: strategy.whole_parameter(name) for name, _ in own.named_parameters()}

    expected = dict(build_gpt(0).named_parameters())
    for name, tensor in LocalGroup(3).run(start)[0].items():
        assert tensor is not None
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", ["tcp", "gloo"])
def test_every_engine_equals_single(engine: str, stage: int) -> None:
    case = Case(micro_batches=2, steps=20).with_options(staleness_bound=1, grad_clip_norm=0.5)
    check_equal(run_single(replace(case, micro_batches=1)), run_fsdp(case, 3, stage, engine), "fp64")


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_is_one_unit_equals_single(stage: int) -> None:
    case = Case(build=build_simple_nn, is_text=False)
    check_equal(run_single(case), run_fsdp(case, 3, stage), "fp64")


@pytest.mark.parametrize("shares", [(1.0, 0.0, 3.0), (100.0, 1.0, 1.0)])
@pytest.mark.parametrize("stage", STAGES)
def test_unequal_shares_equal_single_even_where_a_rank_has_no_sample(stage: int, shares: tuple[float, ...]) -> None:
    case = Case(shares=shares, micro_batches=2, steps=20)
    check_equal(run_single(replace(case, micro_batches=1)), run_fsdp(case, 3, stage), "fp64")


@pytest.mark.parametrize("stage", STAGES)
def test_an_untied_llama_whose_buckets_are_large_equals_single(stage: int) -> None:
    build = functools.partial(build_llama, tie_word_embeddings=False)
    case = Case(build=build, steps=20).with_options(bucket_bytes=1 << 20)
    check_equal(run_single(Case(build=build, steps=20)), run_fsdp(case, 2, stage), "fp64")


class Normed(nn.Module):
    """Blocks with a buffer that differs by seed, a frozen parameter and one that is never used."""

    class Block(nn.Module):
        def __init__(self, generator: torch.Generator, seed: int) -> None:
            super().__init__()
            self.register_buffer("shift", torch.randn(12, generator=generator))
            self.register_buffer("seen", torch.tensor(seed))
            self.frozen = nn.Parameter(torch.randn(12, generator=generator), requires_grad=False)
            self.unused = nn.Parameter(torch.randn(3, generator=generator))
            self.matrix = nn.Parameter(torch.randn(12, 12, generator=generator).t())

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs * self.frozen + self.shift) @ self.matrix

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(self.Block(generator, seed) for _ in range(3))
        self.out = nn.Parameter(torch.randn(12, 5, generator=generator) * 0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs).tanh()
        return inputs @ self.out


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_and_unused_parameters_are_treated_as_by_single(stage: int) -> None:
    case = Case(build=Normed, is_text=False, micro_batches=2, steps=20)
    outcome = run_single(replace(case, micro_batches=1))
    check_equal(outcome, run_fsdp(case, 2, stage), "fp64")
    # Plain AdamW decays no parameter that has no gradient.
    assert torch.equal(outcome.weights["blocks.1.unused"], Normed(0).blocks[1].unused.detach().double())


class Nested(nn.Module):
    """Blocks in a list in a dict, as nanoGPT has them, and pairs of modules in a list of lists."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def layer() -> nn.Linear:
            made = nn.Linear(12, 12)
            for param in made.parameters():
                param.data = torch.randn(param.shape, generator=generator) * 0.3
            return made

        self.parts = nn.ModuleDict({"first": layer(), "blocks": nn.ModuleList(layer() for _ in range(3))})
        self.pairs = nn.ModuleList(nn.ModuleList([layer(), layer()]) for _ in range(2))
        self.out = nn.Parameter(torch.randn(12, 5, generator=generator) * 0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.parts["first"](inputs)
        for block in self.parts["blocks"]:
            x = x + block(x).tanh()
        for one, other in self.pairs:
            x = x + other(one(x).tanh())
        return x @ self.out


@pytest.mark.parametrize("engine", ["local", "tcp"])
@pytest.mark.parametrize("stage", STAGES)
def test_lists_in_lists_equal_single(stage: int, engine: str) -> None:
    names = [unit.name for unit in split_into_units(Nested(0))]
    pairs = [f"pairs.{i}.{j}" for i in range(2) for j in range(2)]
    assert names == ["", "parts.first", *(f"parts.blocks.{i}" for i in range(3)), *pairs]
    case = Case(build=Nested, is_text=False, micro_batches=2, steps=20)
    check_equal(run_single(replace(case, micro_batches=1)), run_fsdp(case, 3, stage, engine), "fp64")


class Shifted(nn.Module):
    """A parameter whose gradient is a view of one that backward still reads: it was added with a dim of its own."""

    class Block(nn.Module):
        def __init__(self, generator: torch.Generator) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(12, generator=generator))
            self.matrix = nn.Parameter(torch.randn(12, 12, generator=generator) * 0.3)

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.matrix + self.shift.unsqueeze(0)

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(self.Block(generator) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return inputs[:, :5]


class Overwriting:
    """A communicator that at once overwrites what it may overwrite: the input of a reduce-scatter."""

    def __init__(self, comm: LocalCommunicator) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def reduce_scatter(self, output: Tensor, input: Tensor, **options: Any) -> Any:
        work = self._comm.reduce_scatter(output, input.clone(), **options)
        input.fill_(math.nan)
        return work


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_backward_still_reads_is_not_given_away(stage: int) -> None:
    # One sample for each rank: the gradient of the sum over the batch is then a view of the batch's own.
    case = Case(build=Shifted, is_text=False, global_batch=2, steps=20)

    def make(model: nn.Module, comm: LocalCommunicator, case: Case) -> FSDP:
        return make_fsdp(model, Overwriting(comm), case.with_options(bucket_bytes=1))  # type: ignore[arg-type]

    check_equal(run_single(case), run_classicdp(case.with_options(stage=stage), 2, make), "fp64")


class Batchnormed(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList([nn.BatchNorm1d(12)])
        self.out = nn.Parameter(torch.randn(12, 5, generator=generator) * 0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.blocks[0](inputs) @ self.out


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_samples_leaves_its_statistics_alone(stage: int) -> None:
    def train(comm: LocalCommunicator) -> Tensor:
        strategy = FSDP(Batchnormed(0), ADAMW, comm, stage=stage)
        inputs, targets = torch.randn(4, 12), torch.zeros(4, dtype=torch.int64)
        count = 4 * comm.rank
        strategy.train_step([Batch(inputs[:count], targets[:count], 4)])
        assert strategy.model.blocks[0].training
        return strategy.model.blocks[0].running_mean.clone()

    empty, other = LocalGroup(2).run(train)
    assert torch.equal(empty, torch.zeros(12))
    assert not torch.equal(other, torch.zeros(12))


class OnlyZeros(nn.Module):
    """Divides by a sample's norm, and uses `extra` for samples of zeros only, of which the data has none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(12, 5, generator=generator) * 0.1)
        self.extra = nn.Parameter(torch.randn(5, generator=generator))

    def forward(self, inputs: Tensor) -> Tensor:
        logits = inputs / inputs.norm(dim=1, keepdim=True) @ self.matrix
        return logits + self.extra if (inputs == 0).all(dim=1).any() else logits


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_rank_without_samples_computes_for_the_others_does_not_count(stage: int) -> None:
    case = Case(build=OnlyZeros, is_text=False, shares=(1.0, 0.0, 3.0), steps=10)
    outcome = run_single(case)
    check_equal(outcome, run_fsdp(case, 3, stage), "fp64")
    assert torch.equal(outcome.weights["extra"], OnlyZeros(0).extra.detach().double()), "decayed"


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_that_decays_matrices_only_equals_single(stage: int) -> None:
    def factory(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        matrices, rest = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}])

    case = Case(steps=20)

    def make(model: nn.Module, comm: LocalCommunicator, case: Case) -> FSDP:
        return FSDP(model, factory, comm, stage=stage, precision="fp64", bucket_bytes=2048)

    alone = Single(build_gpt(0), factory, precision="fp64")
    results = [alone.train_step(case.rank_batches(step, 0, 1)) for step in range(case.steps)]
    expected = Outcome([r for r in results if r is not None], dict(alone.model.state_dict()))
    check_equal(expected, run_classicdp(case, 3, make), "fp64")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_weight_that_is_used_without_its_module_is_named(stage: int) -> None:
    class Uncalled(Nested):
        def forward(self, inputs: Tensor) -> Tensor:
            return nn.functional.linear(inputs, self.parts["first"].weight) @ self.out

    case = Case(build=Uncalled, is_text=False, steps=3)
    with pytest.raises(ConfigError, match="was used without a call of the module"):
        run_fsdp(case, 2, stage)


def test_a_block_that_returns_no_tensor_is_refused_in_stage_3() -> None:
    class Boxed(nn.Module):
        class Block(nn.Linear):
            def forward(self, inputs: Tensor) -> Any:
                return type("Box", (), {"x": super().forward(inputs)})()

        def __init__(self, seed: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([self.Block(12, 5)])

        def forward(self, inputs: Tensor) -> Tensor:
            x: Tensor = self.blocks[0](inputs).x
            return x

    case = Case(build=Boxed, is_text=False, steps=1)
    run_fsdp(case, 2, 2)
    with pytest.raises(ConfigError, match="returns a Box, in which no tensor is found"):
        run_fsdp(case, 2, 3)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (0, 2, 4, 1, 3, 5)])
def test_whatever_way_a_model_takes_no_more_than_two_units_are_gathered(order: tuple[int, ...]) -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in order)

        def forward(self, inputs: Tensor) -> Tensor:
            for number in order:
                inputs = self.blocks[number](inputs)
            return inputs

    def train(comm: LocalCommunicator) -> int:
        strategy = FSDP(Ordered(), ADAMW, comm, stage=3)
        for _ in range(3):
            strategy.train_step([Batch(torch.randn(4, 64), torch.zeros(4, dtype=torch.int64), 8)] * 2)
        return strategy._gather.peak_bytes

    # One more where the order is another: the last one of the list is kept for backward, the first for what follows.
    allowed = 2 if order == tuple(sorted(order)) else 4
    assert all(peak <= allowed * 64 * 64 * 4 for peak in LocalGroup(2).run(train))


def test_a_rank_may_own_nothing() -> None:
    def train(comm: LocalCommunicator) -> float:
        strategy = FSDP(nn.Linear(2, 1, bias=False), ADAMW, comm, stage=2)
        result = strategy.train_step([Batch(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64), 4)])
        strategy.state()
        assert result is not None
        return result.loss

    assert len(set(LocalGroup(4).run(train))) == 1


def test_a_stage_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage is 4"):
        FSDP(build_gpt(0), ADAMW, LocalGroup(1).communicators[0], stage=4)


def test_a_strategy_that_nobody_uses_any_more_gives_its_memory_back() -> None:
    strategy = FSDP(build_gpt(0), ADAMW, LocalGroup(1).communicators[0], stage=3)
    case = Case()
    strategy.train_step(case.rank_batches(0, 0, 1))
    shards = weakref.ref(strategy._shards)
    del strategy
    gc.collect()
    assert shards() is None


class Branching(nn.Module):
    """Only samples whose first value is large reach `extra`, so a rank may have no gradient for it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = nn.Parameter(torch.randn(12, 5, generator=generator) * 0.1)
        self.extra = nn.Parameter(torch.randn(12, 5, generator=generator) * 0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        is_extra = inputs[:, 0] > 1.5
        logits = inputs @ self.base
        if not is_extra.any():
            return logits
        return logits.index_add(0, is_extra.nonzero()[:, 0], inputs[is_extra] @ self.extra)


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_that_only_some_ranks_use_equals_single(stage: int) -> None:
    case = Case(build=Branching, is_text=False, global_batch=6, micro_batches=2)
    check_equal(run_single(replace(case, micro_batches=1)), run_fsdp(case, 3, stage), "fp64")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_keeps_the_ranks_equal_and_follows_single(stage: int, precision: str) -> None:
    case = Case(precision=precision, micro_batches=2)
    outcome, ranks = run_single(replace(case, micro_batches=1)), run_fsdp(case, 3, stage)
    assert all(rank.results == ranks[0].results for rank in ranks)
    losses = [result.loss for result in outcome.results]
    assert [result.loss for result in ranks[0].results] == pytest.approx(losses, abs=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in ranks[0].weights.values())


@pytest.mark.parametrize("compression", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_compressed_gradients_follow_single(stage: int, compression: str) -> None:
    case = Case(precision="fp32", micro_batches=2)
    outcome = run_single(replace(case, micro_batches=1))
    ranks = run_fsdp(case.with_options(compression=compression), 3, stage)
    losses = [result.loss for result in outcome.results]
    assert [result.loss for result in ranks[0].results] == pytest.approx(losses, abs=0.03)
    assert ranks[0].results != outcome.results, "nothing was compressed"
    assert ranks[0].results[0].loss == pytest.approx(losses[0], abs=1e-6), "loss sums must not be compressed"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("compression", ["none", "int8"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_at_the_same_step(compression: str, stage: int) -> None:
    def train(comm: LocalCommunicator) -> tuple[int, str]:
        strategy = FSDP(build_simple_nn(0), ADAMW, comm, stage=stage, compression=compression)
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


@pytest.mark.parametrize("stage", STAGES)
def test_an_fp16_overflow_on_one_rank_backs_off_on_all(stage: int) -> None:
    def train(comm: LocalCommunicator) -> tuple[list[bool], float]:
        torch.manual_seed(comm.rank)
        strategy = FSDP(nn.Linear(3, 2), ADAMW, comm, stage=stage, precision="fp16", staleness_bound=1)
        # Only rank 1's gradient is too large for float16.
        batch = Batch(torch.ones(4, 3) * (1 + 200 * comm.rank), torch.tensor([0, 1, 1, 0]), 8)
        results = [strategy.train_step([batch]) for _ in range(24)]
        assert strategy._scaler is not None
        return [result.applied for result in results if result is not None], strategy._scaler.scale

    (applied, scale), other = LocalGroup(2).run(train)
    assert (applied, scale) == other
    assert not applied[0]
    assert applied[-1]
    assert 64 <= scale < 2**16


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_counts_every_sample_once_also_where_ranks_have_none(stage: int) -> None:
    case = Case(steps=4)
    inputs, targets = case.samples()

    def evaluate(comm: LocalCommunicator) -> tuple[float, int]:
        strategy = FSDP(build_gpt(0), ADAMW, comm, stage=stage)
        strategy.train_step(case.rank_batches(0, comm.rank, comm.world_size))
        sums = strategy.eval_step(Batch(inputs[:7], targets[:7])) if comm.rank == 0 else None
        if sums is None:
            sums = strategy.eval_step(Batch(inputs[:0], targets[:0]))
        after = strategy.train_step(case.rank_batches(1, comm.rank, comm.world_size))
        assert after is not None
        return sums.loss_sum, sums.count

    sums = LocalGroup(2).run(evaluate)
    single = FSDP(build_gpt(0), ADAMW, LocalGroup(1).communicators[0], stage=0)
    single.train_step(case.rank_batches(0, 0, 1))
    expected = single.eval_step(Batch(inputs[:7], targets[:7]))
    assert sums[0] == (pytest.approx(expected.loss_sum, rel=1e-5), expected.count)
    assert sums[1] == (0.0, 0)


def test_a_vote_to_stop_reaches_all_ranks_at_the_same_step() -> None:
    def train(comm: LocalCommunicator) -> int:
        strategy = FSDP(build_simple_nn(0), ADAMW, comm, stage=2)
        for step in range(10):
            if step == 2 and comm.rank == 1:
                strategy.request_stop()
            result = strategy.train_step([Batch(torch.randn(2, 12), torch.zeros(2, dtype=torch.int64), 4)])
            if result is not None and result.stop:
                return result.step
        return -1

    assert LocalGroup(2).run(train) == [2, 2]


def test_ranks_that_plan_different_steps_are_told_so() -> None:
    def train(comm: LocalCommunicator) -> None:
        strategy = FSDP(build_simple_nn(0), ADAMW, comm, stage=2)
        strategy.train_step([Batch(torch.randn(2, 12), torch.zeros(2, dtype=torch.int64), 4 + comm.rank)])

    with pytest.raises(CollectiveMismatch, match=r"planned [45] targets, but the mean over all 2 ranks is 4\.5"):
        LocalGroup(2).run(train)


@pytest.mark.parametrize("stage", STAGES)
def test_norms_of_single_parameters_are_those_of_single(stage: int) -> None:
    case = Case(steps=3)

    def train(comm: LocalCommunicator) -> list[dict[str, float] | None]:
        strategy = FSDP(build_gpt(0).double(), ADAMW, comm, stage=stage, precision="fp64", bucket_bytes=2048)
        found = []
        for step in range(case.steps):
            strategy.train_step(case.rank_batches(step, comm.rank, comm.world_size))
            found.append(strategy.take_gradient_norms())
        assert strategy.take_gradient_norms() is None
        return found

    alone, ranks = LocalGroup(1).run(train)[0], LocalGroup(3).run(train)
    for mine in ranks:
        for step, norms in enumerate(mine):
            assert norms == pytest.approx(alone[step], rel=1e-9)
            assert norms is not None
            assert set(norms) == {name for name, _ in build_gpt(0).named_parameters()}


# ---- memory


def wide_gpt() -> nn.Module:
    from smolcluster.models.gpt import GPT, GPTConfig

    return GPT(GPTConfig(64, 64, 6, 2, 256, 0.0, 16))


@pytest.mark.parametrize(("stage", "expected"), [(0, 16.0), (1, 8 + 8 / 3), (2, 4 + 12 / 3), (3, 16 / 3)])
def test_memory_is_what_zero_says(stage: int, expected: float) -> None:
    model = wide_gpt()
    psi = sum(param.numel() for param in model.parameters())
    sizes = [sum(model.get_parameter(name).numel() for name in unit.parameters) for unit in split_into_units(model)]
    bucket_bytes = 64 * 1024

    def train(comm: LocalCommunicator) -> tuple[int, int, int]:
        strategy = FSDP(wide_gpt(), ADAMW, comm, stage=stage, bucket_bytes=bucket_bytes)
        tokens = torch.randint(0, 64, (2, 17))
        for _ in range(3):
            strategy.train_step([Batch(tokens[:, :-1], tokens[:, 1:], 96)] * 2)
        return strategy.held_bytes()

    for held in LocalGroup(3).run(train):
        more = (2 * max(sizes) * 4 if stage == 3 else 0) + (2 * bucket_bytes if stage >= 2 else 0)
        assert 0.99 * expected * psi <= sum(held) <= 1.05 * expected * psi + more


def test_between_steps_stage_3_has_no_more_than_the_rest_and_the_first_unit_and_in_the_end_nothing() -> None:
    def train(comm: LocalCommunicator) -> tuple[int, int]:
        strategy = FSDP(wide_gpt(), ADAMW, comm, stage=3)
        tokens = torch.randint(0, 64, (2, 17))
        strategy.train_step([Batch(tokens[:, :-1], tokens[:, 1:], 64)])
        between = sum(whole.untyped_storage().nbytes() for whole in strategy._shards.whole)
        strategy.finish()
        return between, sum(whole.untyped_storage().nbytes() for whole in strategy._shards.whole)

    rest, first = split_into_units(wide_gpt())[:2]
    sizes = [sum(wide_gpt().get_parameter(name).numel() for name in unit.parameters) for unit in (rest, first)]
    for between, after in LocalGroup(2).run(train):
        assert between <= 4 * sum(sizes) + 64
        assert after == 0


def test_an_optimizer_whose_state_cannot_be_divided_is_refused_when_it_is_saved() -> None:
    def train(comm: LocalCommunicator) -> None:
        strategy = FSDP(build_gpt(0), lambda params: torch.optim.Adafactor(list(params)), comm, stage=1)
        case = Case()
        strategy.train_step(case.rank_batches(0, comm.rank, comm.world_size))
        strategy.state()

    with pytest.raises(ConfigError, match="which cannot be divided"):
        LocalGroup(2).run(train)
