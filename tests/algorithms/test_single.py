from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from algorithms import reference_loop
from algorithms.equality import Case, build_gpt, build_simple_nn, run_single
from smolcluster.algorithms import single
from smolcluster.algorithms.single import Single
from smolcluster.data.batch import Batch
from smolcluster.errors import ConfigError, TrainingStopped
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.schedule import lr_schedule

ADAMW = optimizer_factory("adamw", 1e-3, 0.1)


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_single_gives_the_numbers_of_an_independent_script(precision: str, delay: int) -> None:
    steps = 50
    schedule = lr_schedule("cosine", 2e-3, 7, 1e-4, steps)
    batches = reference_loop.make_batches(steps, 6, 8, 19, seed=5)
    model = build_gpt(0)
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    if precision == "fp64":
        weights = {name: tensor.double() for name, tensor in weights.items()}
    losses, norms, final = reference_loop.train(
        weights, batches, 2, [schedule(i) for i in range(steps)], 0.1, 0.5, delay
    )

    strategy = Single(
        model, ADAMW, precision=precision, lr_schedule=schedule, grad_clip_norm=0.5, staleness_bound=delay
    )
    results = [strategy.train_step([Batch(b[:, :-1], b[:, 1:], b[:, 1:].numel())]) for b in batches]
    assert results[:delay] == [None] * delay
    applied = [result for result in results if result is not None] + strategy.finish()

    # Only the order of additions may differ; AdamW amplifies it, in float32 to 1e-5 after 50 steps.
    tolerance = 1e-11 if precision == "fp64" else 2e-5
    assert [result.loss for result in applied] == pytest.approx(losses, abs=tolerance)
    assert [result.grad_norm for result in applied] == pytest.approx(norms, rel=1e3 * tolerance)
    assert min(norms[:10]) > 0.5, "clipping was not active"
    for name, param in model.named_parameters():
        theirs = final[name]
        if precision == "fp32" and name.endswith("qkv.bias"):  # the key bias has no gradient but rounding errors
            param, theirs = (torch.cat([t[:16], t[32:]]) for t in (param, theirs))
        assert torch.allclose(param, theirs, rtol=0, atol=tolerance), name


def test_delayed_gradients_give_other_numbers_than_immediate_ones() -> None:
    finals = [run_single(Case().with_options(staleness_bound=k)).results[-1].loss for k in (0, 1, 2)]
    assert abs(finals[0] - finals[1]) > 1e-6
    assert abs(finals[1] - finals[2]) > 1e-6


@pytest.mark.parametrize("case", [Case(), Case(build=build_simple_nn, is_text=False)])
def test_accumulation_over_micro_batches_changes_nothing(case: Case) -> None:
    whole = run_single(case)
    parts = run_single(Case(build=case.build, is_text=case.is_text, micro_batches=4))
    assert [r.loss for r in parts.results] == pytest.approx([r.loss for r in whole.results], abs=1e-12)
    for name, tensor in whole.weights.items():
        assert torch.allclose(parts.weights[name], tensor, rtol=0, atol=1e-12)


def test_the_first_micro_batches_gradient_is_computed_at_the_weights_of_its_step() -> None:
    strategy = Single(build_simple_nn(0), ADAMW, staleness_bound=2, precision="fp64")
    before = [param.detach().clone() for param in strategy.model.parameters()]
    batch = (torch.randn(4, 12), torch.randint(0, 5, (4,)))
    assert strategy.train_step([batch]) is None
    assert strategy.train_step([batch]) is None
    assert all(torch.equal(a, b) for a, b in zip(before, strategy.model.parameters(), strict=True))
    result = strategy.train_step([batch])
    assert result is not None
    assert result.step == 0
    assert not torch.equal(before[0], next(iter(strategy.model.parameters())))


def test_single_takes_pairs_of_tensors_in_place_of_batches() -> None:
    inputs, targets = torch.randn(6, 12), torch.randint(0, 5, (6,))
    losses = []
    for micro_batches in ([Batch(inputs, targets, 6)], [(inputs, targets)], [inputs, targets], (inputs, targets)):
        result = Single(build_simple_nn(0), ADAMW).train_step(micro_batches)
        assert result is not None
        losses.append(result.loss)
    assert len(set(losses)) == 1


def test_a_step_without_micro_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match="no micro-batch"):
        Single(build_simple_nn(0), ADAMW).train_step([])


def test_a_step_without_targets_changes_nothing() -> None:
    strategy = Single(build_simple_nn(0), ADAMW)
    before = [param.detach().clone() for param in strategy.model.parameters()]
    result = strategy.train_step([Batch(torch.randn(2, 12), torch.full((2,), -100))])
    assert result is not None
    assert not result.applied
    assert result.loss == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, strategy.model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_stops_with_step_loss_and_advice() -> None:
    strategy = Single(build_simple_nn(0), ADAMW)
    batch = Batch(torch.full((2, 12), math.nan), torch.zeros(2, dtype=torch.int64))
    strategy.train_step([Batch(torch.randn(2, 12), batch.targets)])
    before = [param.detach().clone() for param in strategy.model.parameters()]
    with pytest.raises(TrainingStopped, match=r"step 1: the loss is nan .* Lower training.learning_rate") as caught:
        strategy.train_step([batch])
    assert caught.value.exit_code == 4
    assert all(torch.equal(a, b) for a, b in zip(before, strategy.model.parameters(), strict=True))


def test_skip_nonfinite_passes_over_the_step_and_goes_on() -> None:
    strategy = Single(build_simple_nn(0), ADAMW, skip_nonfinite=True)
    targets = torch.zeros(2, dtype=torch.int64)
    skipped = strategy.train_step([Batch(torch.full((2, 12), math.inf), targets)])
    applied = strategy.train_step([Batch(torch.randn(2, 12), targets)])
    assert skipped is not None
    assert applied is not None
    assert not skipped.applied
    assert applied.applied
    assert math.isfinite(applied.loss)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32_and_keeps_float32_weights(precision: str) -> None:
    full = run_single(Case(precision="fp32"))
    half = run_single(Case(precision=precision))
    assert all(tensor.dtype == torch.float32 for tensor in half.weights.values())
    assert [r.loss for r in half.results] == pytest.approx([r.loss for r in full.results], abs=0.03)
    assert [r.loss for r in half.results] != [r.loss for r in full.results], "nothing was computed in half precision"


def test_an_fp16_overflow_halves_the_scale_until_the_gradient_is_finite() -> None:
    strategy = Single(nn.Linear(3, 2), ADAMW, precision="fp16")
    # The weight's gradient is about 100 times the scale: too much for float16 until the scale is near 500.
    batch = Batch(torch.randn(4, 3) * 200, torch.randint(0, 2, (4,)))
    results = [strategy.train_step([batch]) for _ in range(12)]
    applied = [result.applied for result in results if result is not None]
    assert not applied[0]
    assert applied[-1]
    assert applied == sorted(applied), "once finite, it stays so"


def test_evaluation_counts_exactly_and_changes_nothing() -> None:
    strategy = Single(build_simple_nn(0), ADAMW)
    inputs, targets = torch.randn(5, 12), torch.randint(0, 5, (5,))
    sums = strategy.eval_step(Batch(inputs, targets))
    with torch.no_grad():
        logits = strategy.model(inputs)
    assert sums.count == 5
    assert sums.correct == int((logits.argmax(1) == targets).sum())
    assert sums.loss_sum == pytest.approx(float(nn.functional.cross_entropy(logits, targets, reduction="sum")))
    assert strategy.model.training
    assert all(param.grad is None for param in strategy.model.parameters())


def test_the_file_imports_only_torch_models_data_and_three_of_training() -> None:
    tree = ast.parse(Path(single.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    allowed = ("torch", "smolcluster.models", "smolcluster.data", "smolcluster.training.step")
    allowed += (
        "smolcluster.training.optim",
        "smolcluster.training.schedule",
        "__future__",
        "collections",
        "dataclasses",
    )
    assert {name for name in imported if not name.startswith(allowed)} == set()
