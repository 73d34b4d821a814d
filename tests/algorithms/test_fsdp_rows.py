"""Stage 3 of fsdp with tables: embeddings and heads that are split by rows and whole on no rank."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algorithms.equality import TIME, Case, Outcome, check_equal, make_classicdp, run_fsdp, run_single
from algorithms.test_fsdp import _RANDOM, ADAMW, build_checkpointed
from algorithms.test_fsdp_checkpoints import train as train_and_save
from models.hf_folders import hf_config, transformers
from smolcluster.algorithms.fsdp import FSDP
from smolcluster.checkpoint.store import load_weights
from smolcluster.collectives.base import Communicator, Work
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.collectives.rows import RowWeight
from smolcluster.collectives.shards import Described, divide_table, plan_shards, stripes_of
from smolcluster.data.batch import Batch
from smolcluster.errors import ConfigError, SmolError
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.hf import HFModel, init_hf_parameters
from smolcluster.models.init import draw_parameters
from smolcluster.models.partition import Unit
from smolcluster.models.source import parameters_on_meta

# 151 is a prime: neither parts nor stripes divide it. A table of 9 664 bytes in float64, blocks of 4 000.
ROWS, WIDTH, PADDING = 151, 8, 7


def build_gpt(seed: int) -> nn.Module:
    """Its head is tied to its embedding."""
    return GPT(GPTConfig(ROWS, WIDTH, 2, 2, 12, 0.0, TIME), seed)


def build_llama(seed: int, *, is_tied: bool) -> nn.Module:
    config = hf_config(
        "llama", hidden_size=WIDTH, head_dim=6, intermediate_size=11, vocab_size=ROWS, tie_word_embeddings=is_tied
    )
    with _RANDOM, torch.random.fork_rng(devices=[]):
        inner = transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        init_hf_parameters(inner, seed)
    return HFModel(inner, None).train()


build_tied_llama = functools.partial(build_llama, is_tied=True)
build_untied_llama = functools.partial(build_llama, is_tied=False)


class Padded(nn.Module):
    """An embedding with padding, blocks, and a head with a bias, each frozen or not."""

    def __init__(self, seed: int, *, trains_embedding: bool = True, trains_head: bool = True) -> None:
        super().__init__()
        with _RANDOM, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(ROWS, WIDTH, padding_idx=PADDING)
            self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
            self.head = nn.Linear(WIDTH, ROWS)
        self.embedding.weight.requires_grad_(trains_embedding)
        self.head.weight.requires_grad_(trains_head)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x).tanh()
        logits: Tensor = self.head(x)
        return logits


class Partly(Padded):
    """Looks up twice and projects in two parts; tokens below 10 let a second look-up count, so on some ranks only."""

    def forward(self, tokens: Tensor) -> Tensor:
        x, other = self.embedding(tokens), self.embedding(tokens + 1)
        for block in self.blocks:
            x = x + block(x).tanh()
        if tokens.min() < 10:
            x = x + other
        return torch.cat([self.head(x[:, :3]), self.head(x[:, 3:])], dim=1)


class Wide(nn.Module):
    """No blocks: its large layers are tables, and follow each other."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with _RANDOM, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.up = nn.Linear(12, 41)
            self.down = nn.Linear(41, 33)
            self.out = nn.Linear(33, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.down(self.up(x).tanh()).tanh())
        return out


def tables_of(strategy: FSDP) -> list[str]:
    """The names of the parameters that are split by rows."""
    return [name for name, param in strategy.model.named_parameters() if isinstance(param, RowWeight)]


def text_case(build: Callable[[int], nn.Module], **changes: Any) -> Case:
    return Case(build=build, vocab=ROWS - 1, **changes).with_options(bucket_bytes=1024)


def alone(case: Case, **changes: Any) -> Outcome:
    """`single` on whole batches."""
    options = {name: value for name, value in case.options.items() if name != "bucket_bytes"}
    return run_single(replace(case, micro_batches=1, shares=None, options=options, **changes))


# ---- the layout


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("rows", "stripe_bytes"), [(151, 4000), (151, 1), (3, 100), (1, 1), (12, 10**9)])
def test_stripes_hold_every_row_once_and_are_no_larger_than_told(rows: int, stripe_bytes: int, world_size: int) -> None:
    stripes, strip_rows = divide_table(rows, WIDTH * 8, stripe_bytes, world_size)
    shape = torch.Size((rows, WIDTH))
    plain = Described(0, torch.Size((3,)), torch.float64)
    buckets = plan_shards([plain, Described(5, shape, torch.float64, strip_rows=strip_rows)], 100, world_size)
    found = [stripe for stripe in stripes_of(buckets) if buckets[stripe.bucket].is_table]
    (bucket,) = {buckets[stripe.bucket] for stripe in found}
    assert [stripe.unit for stripe in found] == list(range(5 + stripes - 1, 4, -1))
    assert bucket.part % WIDTH == 0
    assert world_size * bucket.part >= rows * WIDTH
    held = Counter(element for stripe in found for element in range(stripe.start, stripe.start + stripe.length))
    assert held == Counter(range(bucket.part))
    for stripe in found:
        assert stripe.length % WIDTH == 0
        nbytes = world_size * stripe.length * 8
        assert nbytes <= stripe_bytes or stripe.length == WIDTH


def test_a_matrix_is_split_where_it_is_larger_than_any_block_and_bucket() -> None:
    def split(comm: LocalCommunicator) -> list[list[str]]:
        builds = [build_gpt, build_tied_llama, build_untied_llama, Wide]
        found = [tables_of(FSDP(build(0), ADAMW, comm, stage=3, bucket_bytes=1024)) for build in builds]
        found.append(tables_of(FSDP(build_gpt(0), ADAMW, comm, stage=3, bucket_bytes=ROWS * WIDTH * 4)))
        found.append(tables_of(FSDP(build_gpt(0), ADAMW, comm, stage=2, bucket_bytes=1024)))
        return found

    llama = ["model.embed_tokens.weight", "lm_head.weight"]
    expected = [["token_embedding.weight"], llama[:1], llama, ["up.weight", "down.weight"], [], []]
    assert LocalGroup(2).run(split) == [expected] * 2


# ---- equality


def gpt_case(staleness_bound: int) -> Case:
    return text_case(build_gpt).with_options(staleness_bound=staleness_bound, grad_clip_norm=0.3)


@functools.cache
def gpt_reference(staleness_bound: int) -> Outcome:
    return alone(gpt_case(staleness_bound))


@pytest.mark.parametrize(("world_size", "staleness_bound"), [*itertools.product([2, 3, 4], [0, 2])])
def test_a_tied_table_equals_single(world_size: int, staleness_bound: int) -> None:
    case = replace(gpt_case(staleness_bound), micro_batches=4 if world_size == 3 else 1)
    check_equal(gpt_reference(staleness_bound), run_fsdp(case, world_size, 3), "fp64")


@pytest.mark.parametrize("build", [build_tied_llama, build_untied_llama])
@pytest.mark.parametrize(("world_size", "staleness_bound"), [(2, 0), (3, 2)])
def test_a_llama_equals_single(build: Callable[[int], nn.Module], world_size: int, staleness_bound: int) -> None:
    case = text_case(build, micro_batches=2).with_options(staleness_bound=staleness_bound, grad_clip_norm=0.3)
    check_equal(alone(case), run_fsdp(case, world_size, 3), "fp64")


@pytest.mark.parametrize("shares", [(1.0, 0.0, 3.0), (100.0, 1.0, 1.0)])
def test_unequal_shares_equal_single_even_where_a_rank_has_no_sample(shares: tuple[float, ...]) -> None:
    case = replace(gpt_case(0), shares=shares, micro_batches=2)
    check_equal(gpt_reference(0), run_fsdp(case, 3, 3), "fp64")


@pytest.mark.parametrize("engine", ["tcp", "gloo"])
def test_every_engine_equals_single(engine: str) -> None:
    case = replace(gpt_case(2), micro_batches=2)
    check_equal(gpt_reference(2), run_fsdp(case, 3, 3, engine), "fp64")


def test_alone_it_is_single() -> None:
    check_equal(gpt_reference(0), run_fsdp(replace(gpt_case(0), micro_batches=2), 1, 3), "fp64")


def test_more_ranks_than_rows_of_a_stripe_equal_single() -> None:
    # A stripe of one row of each rank.
    case = text_case(Padded, steps=10).with_options(bucket_bytes=1)
    check_equal(alone(case), run_fsdp(case, 4, 3), "fp64")


def test_blocks_that_compute_twice_equal_single() -> None:
    case = replace(gpt_case(0), build=functools.partial(build_checkpointed, build_gpt), micro_batches=2)
    check_equal(gpt_reference(0), run_fsdp(case, 3, 3), "fp64")


@pytest.mark.parametrize(
    "frozen",
    [{}, {"trains_embedding": False}, {"trains_head": False}, {"trains_embedding": False, "trains_head": False}],
)
def test_padding_a_bias_and_frozen_tables_equal_single(frozen: dict[str, bool]) -> None:
    case = text_case(functools.partial(Padded, **frozen), micro_batches=2)
    inputs = case.samples()[0]
    assert (inputs == PADDING).any()
    outcome = alone(case)
    check_equal(outcome, run_fsdp(case, 3, 3), "fp64")
    before = Padded(0).embedding.weight.detach().double()
    assert torch.equal(outcome.weights["embedding.weight"], before) == ("trains_embedding" in frozen)


def test_a_table_that_is_used_twice_or_on_some_ranks_only_equals_single() -> None:
    case = text_case(Partly, global_batch=6, micro_batches=2)
    inputs = case.samples()[0]
    assert 0 < sum(int(row.min() < 10) for row in inputs) < len(inputs)
    # Sample by sample, as on the ranks: which look-up counts depends on the samples of a micro-batch.
    outcome = run_single(replace(case, micro_batches=6, options={}))
    check_equal(outcome, run_fsdp(case, 3, 3), "fp64")


def test_a_model_without_blocks_whose_layers_are_tables_equals_single() -> None:
    case = Case(build=Wide, is_text=False, micro_batches=2).with_options(bucket_bytes=1024, staleness_bound=1)
    check_equal(alone(case), run_fsdp(case, 3, 3), "fp64")


def test_single_precision_equals_single() -> None:
    case = text_case(build_untied_llama, precision="fp32", micro_batches=2)
    check_equal(alone(case), run_fsdp(case, 3, 3), "fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("build", [build_gpt, Padded])
def test_half_precision_keeps_the_ranks_equal_and_follows_single(
    build: Callable[[int], nn.Module], precision: str
) -> None:
    case = text_case(build, precision=precision, micro_batches=2)
    outcome, ranks = alone(case), run_fsdp(case, 3, 3)
    assert all(rank.results == ranks[0].results for rank in ranks)
    losses = [result.loss for result in outcome.results]
    assert [result.loss for result in ranks[0].results] == pytest.approx(losses, abs=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in ranks[0].weights.values())


@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_compressed_gradients_follow_single(compression: str) -> None:
    case = text_case(build_gpt, precision="fp32", micro_batches=2)
    outcome = alone(case)
    ranks = run_fsdp(case.with_options(compression=compression), 3, 3)
    losses = [result.loss for result in outcome.results]
    assert [result.loss for result in ranks[0].results] == pytest.approx(losses, abs=0.03)


def test_two_runs_have_the_same_bits() -> None:
    case = replace(gpt_case(2), precision="fp32", micro_batches=2, steps=12)
    first, second = run_fsdp(case, 3, 3)[0], run_fsdp(case, 3, 3)[0]
    assert first.results == second.results
    assert all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())


def test_values_of_a_model_on_the_meta_device_are_those_of_one_in_memory() -> None:
    with parameters_on_meta():  # all threads' parameters, so not in the ranks' threads
        models = [build_gpt(4) for _ in range(3)]
    rules = build_gpt(4)
    expected = draw_parameters(rules, [name for name, _ in rules.named_parameters()], 4)

    def build(comm: LocalCommunicator) -> dict[str, Tensor | None]:
        asked: list[str] = []

        def values(unit: Unit) -> dict[str, Tensor]:
            asked.extend(unit.parameters)
            return draw_parameters(rules, unit.parameters, 4)

        strategy = FSDP(models[comm.rank], ADAMW, comm, stage=3, bucket_bytes=1024, values=values)
        assert set(asked) == set(expected)
        assert asked.count("token_embedding.weight") == 1
        return {name: strategy.whole_parameter(name) for name in expected}

    found, *others = LocalGroup(3).run(build)
    assert all(tensor is None for other in others for tensor in other.values())
    for name, tensor in found.items():
        assert tensor is not None
        assert torch.equal(tensor, expected[name])


def test_evaluation_is_that_of_a_model_in_memory() -> None:
    case = replace(text_case(build_untied_llama), precision="fp32", steps=4)
    inputs, targets = case.samples()

    def evaluate(strategy: FSDP, comm: Communicator) -> list[tuple[float, int]]:
        sums = []
        for step in range(2):
            batch = Batch(inputs[:7], targets[:7]) if comm.rank == 0 else Batch(inputs[:0], targets[:0])
            sums.append(strategy.eval_step(batch))
            strategy.train_step(case.rank_batches(step, comm.rank, comm.world_size))
        return [(item.loss_sum, item.count) for item in sums]

    def evaluate_tables(comm: LocalCommunicator) -> list[tuple[float, int]]:
        return evaluate(FSDP(build_untied_llama(0), ADAMW, comm, stage=3, bucket_bytes=1024), comm)

    comm = LocalGroup(1).communicators[0]
    expected = evaluate(FSDP(build_untied_llama(0), ADAMW, comm, stage=0), comm)
    first, second = LocalGroup(2).run(evaluate_tables)
    assert second == [(0.0, 0)] * 2
    assert first == [(pytest.approx(loss_sum, rel=1e-5), count) for loss_sum, count in expected]


# ---- checkpoints

CHECKPOINTED = text_case(build_gpt, steps=24, micro_batches=2).with_options(grad_clip_norm=0.3)


@functools.cache
def checkpointed_reference(staleness_bound: int) -> Outcome:
    return alone(CHECKPOINTED.with_options(staleness_bound=staleness_bound))


@pytest.mark.parametrize("staleness_bound", [0, 2])
def test_a_resumed_run_has_the_bits_of_the_one_that_was_not_interrupted(staleness_bound: int, tmp_path: Path) -> None:
    case = replace(CHECKPOINTED, precision="fp32").with_options(stage=3, staleness_bound=staleness_bound)
    whole = train_and_save(case, 3, 0, 24, tmp_path / "whole")
    before = train_and_save(case, 3, 0, 11, tmp_path / "cut")
    after = train_and_save(case, 3, 11, 24, tmp_path / "cut")
    steps = [result for result in before[0] if result is not None] + after[0].results
    assert steps == whole[0].results
    assert all(torch.equal(tensor, after[0].weights[name]) for name, tensor in whole[0].weights.items())
    tensors, _ = load_weights(tmp_path / "cut")
    if staleness_bound == 0:
        assert tensors.keys() == whole[0].weights.keys()
        assert all(torch.equal(tensor, whole[0].weights[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("staleness_bound", [0, 2])
def test_three_ranks_then_two_then_four_equal_single(staleness_bound: int, tmp_path: Path) -> None:
    case = CHECKPOINTED.with_options(stage=3, staleness_bound=staleness_bound)
    first = train_and_save(case, 3, 0, 9, tmp_path)
    second = train_and_save(case, 2, 9, 17, tmp_path)
    outcomes = train_and_save(case, 4, 17, 24, tmp_path)
    earlier = [result for results in (first[0], second[0]) for result in results if result is not None]
    joined = [replace(outcome, results=earlier + outcome.results) for outcome in outcomes]
    check_equal(checkpointed_reference(staleness_bound), joined, "fp64")


@pytest.mark.parametrize("staleness_bound", [0, 2])
def test_a_run_goes_on_in_other_stages(staleness_bound: int, tmp_path: Path) -> None:
    case = CHECKPOINTED.with_options(staleness_bound=staleness_bound)
    first = train_and_save(case.with_options(stage=3), 3, 0, 9, tmp_path)
    second = train_and_save(case.with_options(stage=1), 2, 9, 17, tmp_path)
    outcomes = train_and_save(case.with_options(stage=3), 2, 17, 24, tmp_path)
    earlier = [result for results in (first[0], second[0]) for result in results if result is not None]
    joined = [replace(outcome, results=earlier + outcome.results) for outcome in outcomes]
    check_equal(checkpointed_reference(staleness_bound), joined, "fp64")


def test_a_checkpoint_of_tables_is_one_of_classicdp_and_the_other_way_round(tmp_path: Path) -> None:
    sharded = CHECKPOINTED.with_options(stage=3, staleness_bound=0)
    first = train_and_save(sharded, 3, 0, 9, tmp_path)
    second = train_and_save(CHECKPOINTED, 2, 9, 17, tmp_path, make=make_classicdp)
    outcomes = train_and_save(sharded, 2, 17, 24, tmp_path)
    joined = [replace(outcome, results=first[0] + second[0] + outcome.results) for outcome in outcomes]
    check_equal(checkpointed_reference(0), joined, "fp64")


def test_norms_of_single_parameters_are_those_of_a_model_in_memory() -> None:
    case = text_case(build_untied_llama, steps=3)

    def norms(stage: int, comm: LocalCommunicator) -> list[dict[str, float] | None]:
        model = build_untied_llama(0).double()
        strategy = FSDP(model, ADAMW, comm, stage=stage, precision="fp64", bucket_bytes=1024)
        found = []
        for step in range(case.steps):
            strategy.train_step(case.rank_batches(step, comm.rank, comm.world_size))
            found.append(strategy.take_gradient_norms())
        return found

    of_one = LocalGroup(1).run(functools.partial(norms, 0))[0]
    for mine in LocalGroup(3).run(functools.partial(norms, 3)):
        for found, expected in zip(mine, of_one, strict=True):
            assert found == pytest.approx(expected, rel=1e-9)


# ---- memory and bytes


class Counting:
    """A communicator that counts the bytes of what it gathers, sums to owners and exchanges."""

    def __init__(self, comm: Any, counted: Counter[str]) -> None:
        self._comm = comm
        self._counted = counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_gather(self, output: Tensor, input: Tensor, codec: Any = None) -> Work:
        self._counted["all_gather"] += output.nbytes
        work: Work = self._comm.all_gather(output, input, codec)
        return work

    def reduce_scatter(self, output: Tensor, input: Tensor, **options: Any) -> Work:
        self._counted["reduce_scatter"] += input.nbytes
        work: Work = self._comm.reduce_scatter(output, input, **options)
        return work

    def all_to_all(self, output: Tensor, input: Tensor, *rows: Sequence[int]) -> Work:
        self._counted["all_to_all"] += output.nbytes
        work: Work = self._comm.all_to_all(output, input, *rows)
        return work

    def split(self, ranks: Sequence[int], name: str) -> Counting:
        return Counting(self._comm.split(ranks, name), self._counted)


@pytest.mark.parametrize("build", [build_gpt, build_untied_llama])
def test_a_step_sends_a_projected_table_thrice_and_a_looked_up_one_never(build: Callable[[int], nn.Module]) -> None:
    case = text_case(build, steps=3)

    def count(comm: LocalCommunicator) -> tuple[Counter[str], FSDP, int]:
        counted: Counter[str] = Counter()
        counting: Any = Counting(comm, counted)
        strategy = FSDP(build(0), ADAMW, counting, stage=3, precision="fp64", bucket_bytes=1024)
        strategy.train_step(case.rank_batches(0, comm.rank, 3))
        counted.clear()  # the first step does not know yet in what order the stripes come
        batches = case.rank_batches(1, comm.rank, 3)
        strategy.train_step(batches)
        sent = Counter(counted)  # with what the next step begins with, which the first one has sent for this
        strategy.finish()
        return sent, strategy, len(batches[0].inputs.unique())

    outcomes = LocalGroup(3).run(count)
    for counted, strategy, _ in outcomes:
        shards = strategy._shards
        nbytes = [tensor.numel() * tensor.element_size() for tensor in shards.whole]
        is_table = [shards.buckets[stripe.bucket].is_table for stripe in shards.stripes]
        projected = len(shards.buckets[0].places) == 1 and is_table[0]
        assert projected
        table = sum(n for n, stripe in zip(nbytes, shards.stripes, strict=True) if stripe.bucket == 0)
        last = nbytes[0]
        rest = sum(n for n, stripe in zip(nbytes, shards.stripes, strict=True) if stripe.unit == 0)
        blocks = sum(n for n, is_one in zip(nbytes, is_table, strict=True) if not is_one) - rest
        assert table >= ROWS * WIDTH * 8
        assert counted["all_gather"] == rest + 2 * blocks + 2 * table - last
        assert counted["reduce_scatter"] == rest + blocks + table
    rows = sum(unique for _, _, unique in outcomes)
    assert sum(counted["all_to_all"] for counted, _, _ in outcomes) == 2 * rows * WIDTH * 8


@pytest.mark.parametrize("build", [build_gpt, build_untied_llama, Padded])
def test_no_rank_holds_more_than_two_units_and_the_rest(build: Callable[[int], nn.Module]) -> None:
    case = text_case(build, steps=3, micro_batches=2)

    def train(comm: LocalCommunicator) -> tuple[int, int, int, int]:
        strategy = FSDP(build(0), ADAMW, comm, stage=3, precision="fp64", bucket_bytes=1024)
        for step in range(case.steps):
            strategy.train_step(case.rank_batches(step, comm.rank, 3))
            assert strategy._gradients.peak_bytes <= 2 * max(tensor.nbytes for tensor in strategy._shards.whole)
        strategy.eval_step(Batch(*case.samples()))
        strategy.finish()
        shards = strategy._shards
        nbytes: Counter[int] = Counter()
        for tensor, stripe in zip(shards.whole, shards.stripes, strict=True):
            nbytes[stripe.unit] += tensor.numel() * tensor.element_size()
        held = sum(whole.untyped_storage().nbytes() for whole in shards.whole)
        rest = nbytes.pop(0)
        return strategy._gather.peak_bytes, rest, max(nbytes.values()), held

    for peak, rest, largest, held in LocalGroup(3).run(train):
        assert rest < 1300
        assert largest < ROWS * WIDTH * 8 / 2
        assert peak <= rest + 2 * largest
        assert held == 0


# ---- what does not work


class Multiplying(Padded):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) @ self.head.weight.t()


class Limited(Padded):
    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(seed)
        self.options = options

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.embedding(tokens, self.embedding.weight, **self.options))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (Multiplying, r"head\.weight is split by rows .* calls aten\.t\.default .* Set cluster\.fsdp_stage to 2"),
        (functools.partial(Limited, max_norm=1.0), r"embedding\.weight has max_norm=1\.0.*cluster\.fsdp_stage to 2"),
        (functools.partial(Limited, sparse=True), "has sparse=True"),
        (functools.partial(Limited, scale_grad_by_freq=True), "has scale_grad_by_freq=True"),
    ],
)
def test_what_needs_a_whole_table_is_refused(build: Callable[[int], nn.Module], says: str) -> None:
    case = text_case(build)

    def train(comm: LocalCommunicator) -> None:
        FSDP(build(0), ADAMW, comm, stage=3, bucket_bytes=512).train_step(case.rank_batches(0, comm.rank, 2))

    with pytest.raises(ConfigError, match=says):
        LocalGroup(2).run(train)


def test_an_id_that_the_table_does_not_have_is_refused() -> None:
    def train(comm: LocalCommunicator) -> None:
        strategy = FSDP(build_gpt(0), ADAMW, comm, stage=3, bucket_bytes=1024)
        strategy.eval_step(Batch(torch.tensor([[3, ROWS]]), torch.tensor([[1, 1]])))

    with pytest.raises((IndexError, SmolError), match=f"ids from 3 to {ROWS}, but it has {ROWS} rows"):
        LocalGroup(2).run(train)


def test_what_stands_for_a_table_has_its_name_shape_and_dtype() -> None:
    def build(comm: LocalCommunicator) -> None:
        model = FSDP(build_tied_llama(0), ADAMW, comm, stage=3, bucket_bytes=1024).model
        assert set(model.state_dict()) == set(build_tied_llama(0).state_dict())
        assert model.state_dict()["lm_head.weight"].shape == (ROWS, WIDTH)
        weight = model.get_parameter("lm_head.weight")
        assert weight is model.get_parameter("model.embed_tokens.weight")
        assert (weight.shape, weight.dtype, weight.numel()) == ((ROWS, WIDTH), torch.float32, ROWS * WIDTH)
        assert weight.requires_grad
        assert repr(weight).startswith("RowWeight(model.embed_tokens.weight, shape=(151, 8)")

    LocalGroup(2).run(build)


class Averaged(Padded):
    """Divides by the sum of a sample's ids, which is 0 for a sample that only fills a rank's place."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) / tokens.sum(dim=1)[:, None, None]


def test_what_a_rank_without_samples_looks_up_for_the_others_does_not_count() -> None:
    case = Case(build=Averaged, vocab=ROWS, shares=(1.0, 0.0, 3.0), steps=10)
    check_equal(run_single(case), run_fsdp(case, 3, 3), "fp64")
