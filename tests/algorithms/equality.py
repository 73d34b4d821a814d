"""What it means that an algorithm equals `single`, as functions: used by tests, and by the tests of the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from collectives.contract import open_group, run_group
from data.dealt import rank_indices
from smolcluster.algorithms.classicdp import ClassicDP
from smolcluster.algorithms.fsdp import FSDP
from smolcluster.algorithms.single import Single
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.rows import RowWeight
from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.data.sampler import Sampler, split_by_shares
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.schedule import lr_schedule
from smolcluster.training.step import StepResult

VOCAB, TIME, DIM, LAYERS = 19, 8, 16, 2

# Floating-point addition in another order; both bounds are those that the issue sets for 50 AdamW steps.
LOSS_TOLERANCE = {"fp64": 1e-11, "fp32": 5e-5}
WEIGHT_TOLERANCE = {"fp64": 1e-11, "fp32": 2e-5}


def build_gpt(seed: int) -> nn.Module:
    """A GPT of 4 000 parameters; its head is tied to its embedding."""
    return GPT(GPTConfig(VOCAB, DIM, LAYERS, 2, 2 * DIM, 0.0, TIME), seed)


def build_simple_nn(seed: int) -> nn.Module:
    return SimpleNN(12, 9, 5, seed)


def without_zero_gradients(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what has a true gradient of zero, where AdamW turns rounding errors into steps of full size.

    Those are the key biases: softmax over the keys does not see what is added to all of them. They are the middle
    third of `blocks.*.attention.qkv.bias`.
    """
    kept = {}
    for name, tensor in weights.items():
        if name.endswith("attention.qkv.bias"):
            query, _key, value = tensor.chunk(3)
            tensor = torch.cat([query, value])
        kept[name] = tensor
    return kept


@dataclass(frozen=True)
class Case:
    """One training problem.

    Attributes:
        build: the model, from a seed; rank r builds seed r.
        is_text: token windows with some targets left out, else vectors and classes.
        precision: of both runs.
        length: samples; no multiple of `global_batch`, so that every epoch ends ragged.
        global_batch: samples of a step.
        micro_batches: parts of a rank's share.
        shares: relative weights in rank order; None: equal.
        steps: updates.
        vocab: of the text.
        options: for both algorithms.
    """

    build: Callable[[int], nn.Module] = build_gpt
    is_text: bool = True
    precision: str = "fp64"
    length: int = 45
    global_batch: int = 10
    micro_batches: int = 1
    shares: tuple[float, ...] | None = None
    steps: int = 50
    vocab: int = VOCAB
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    def samples(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7)
        if not self.is_text:
            inputs = torch.randn(self.length, 12, generator=generator)
            return inputs, torch.randint(0, 5, (self.length,), generator=generator)
        windows = torch.randint(0, self.vocab, (self.length, TIME + 1), generator=generator)
        targets = windows[:, 1:].clone()
        # Unequally many targets per sample: a mean over samples, ranks or micro-batches is then no mean over targets.
        targets[torch.rand(targets.shape, generator=generator) < 0.3] = NO_TARGET
        return windows[:, :-1], targets

    def rank_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        inputs, targets = self.samples()
        sampler = Sampler(self.length, self.global_batch, seed=3, shares=self.shares or world_size)
        planned = int((targets[sampler.global_indices(step)] != NO_TARGET).sum())
        indices = rank_indices(sampler, step, rank)
        parts = split_by_shares(len(indices), [1.0] * self.micro_batches)
        return [Batch(inputs[part], targets[part], planned) for part in indices.split(parts)]


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    results: list[StepResult]
    weights: dict[str, Tensor]


Strategies = Callable[[nn.Module, Communicator, Case], Any]


def _arguments(case: Case) -> dict[str, Any]:
    # Warm-up and cosine, so that an update that uses another one's learning rate shows.
    schedule = lr_schedule("cosine", 3e-3, 5, 1e-4, case.steps)
    return {"precision": case.precision, "lr_schedule": schedule, **case.options}


def make_classicdp(model: nn.Module, comm: Communicator, case: Case) -> ClassicDP:
    # 2 KiB: the small models have several buckets.
    arguments = {"bucket_bytes": 2048, **_arguments(case)}
    return ClassicDP(model, optimizer_factory("adamw", 3e-3, 0.1), comm, **arguments)


def make_fsdp(model: nn.Module, comm: Communicator, case: Case) -> FSDP:
    # 2 KiB, as above.
    arguments = {"bucket_bytes": 2048, **_arguments(case)}
    return FSDP(model, optimizer_factory("adamw", 3e-3, 0.1), comm, **arguments)


def run_single(case: Case) -> Outcome:
    """Train in one process on whole global batches."""
    strategy = Single(case.build(0), optimizer_factory("adamw", 3e-3, 0.1), **_arguments(case))
    case = replace(case, shares=None)
    results = [strategy.train_step(case.rank_batches(step, 0, 1)) for step in range(case.steps)]
    return _outcome(strategy, results)


def run_fsdp(case: Case, world_size: int, stage: int, engine: str = "local") -> list[Outcome]:
    """The same with a stage of `fsdp`."""
    return run_classicdp(case.with_options(stage=stage), world_size, make_fsdp, engine=engine)


def run_classicdp(
    case: Case,
    world_size: int,
    make_strategy: Strategies = make_classicdp,
    rank_batches: Callable[[int, int, int], list[Batch]] | None = None,
    engine: str = "local",
) -> list[Outcome]:
    """Train over `world_size` threads, each from other initial weights; one outcome per rank."""
    rank_batches = rank_batches or case.rank_batches

    def train(comm: Communicator) -> Outcome:
        strategy = make_strategy(case.build(comm.rank), comm, case)
        results = [strategy.train_step(rank_batches(step, comm.rank, comm.world_size)) for step in range(case.steps)]
        return _outcome(strategy, results)

    return run_group(open_group(engine, world_size), train)


def _outcome(strategy: Any, results: list[StepResult | None]) -> Outcome:
    every_result = [result for result in results if result is not None] + strategy.finish()
    state = strategy.model.state_dict()
    # What stands for a table has no elements of its own.
    weights = {name: tensor.detach().clone() for name, tensor in state.items() if not isinstance(tensor, RowWeight)}
    if isinstance(strategy, FSDP):
        names = [name for name, _ in strategy.model.named_parameters(remove_duplicate=False)]
        owned = {name: strategy.whole_parameter(name) for name in names}
        if owned[names[0]] is None:  # not rank 0: what it has of a parameter is to be the owners' bits
            weights = {name: tensor for name, tensor in weights.items() if tensor.numel() or name not in owned}
        else:
            weights |= owned
    return Outcome(every_result, weights)


def check_equal(reference: Outcome, ranks: Sequence[Outcome], precision: str) -> None:
    """Assert that all ranks have the same bits, and that those are the reference's numbers."""
    for rank, outcome in enumerate(ranks):
        assert outcome.results == ranks[0].results, f"rank {rank} reports other results than rank 0"
        for name, tensor in outcome.weights.items():
            assert torch.equal(tensor, ranks[0].weights[name]), f"rank {rank} has another {name} than rank 0"
    outcome = ranks[0]
    assert [r.step for r in outcome.results] == [r.step for r in reference.results], "another number of updates"
    for mine, theirs in zip(outcome.results, reference.results, strict=True):
        assert abs(mine.loss - theirs.loss) <= LOSS_TOLERANCE[precision], f"step {mine.step}: loss {mine} {theirs}"
        assert (mine.count, mine.samples) == (theirs.count, theirs.samples), f"step {mine.step}: {mine} {theirs}"
        assert mine.lr == theirs.lr, f"step {mine.step}: {mine} {theirs}"
        assert abs(mine.grad_norm - theirs.grad_norm) <= 100 * LOSS_TOLERANCE[precision] * theirs.grad_norm
    mine, theirs = outcome.weights, reference.weights
    if precision != "fp64":
        mine, theirs = without_zero_gradients(mine), without_zero_gradients(theirs)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        difference = float((mine[name] - tensor).abs().max())
        assert difference <= WEIGHT_TOLERANCE[precision], f"{name} differs by {difference}"
