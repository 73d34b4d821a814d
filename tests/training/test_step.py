from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.errors import ConfigError, TrainingStopped
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.telemetry import Telemetry
from smolcluster.training.step import (
    EvalSums,
    LossScaler,
    as_batches,
    clip_gradients,
    count_targets,
    evaluate_batch,
    forward_backward,
    is_applicable,
    prepare_model,
)


def classes(count: int) -> Batch:
    return Batch(torch.randn(count, 12), torch.randint(0, 5, (count,)))


def test_the_gradient_is_that_of_the_summed_loss_times_scale() -> None:
    model, batches = SimpleNN(12, 9, 5), [classes(3), classes(4)]
    loss_sum = forward_backward(model, batches, 0.25)
    ours = [param.grad for param in model.parameters()]
    model.zero_grad()
    inputs = torch.cat([batch.inputs for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    plain = nn.functional.cross_entropy(model(inputs), targets, reduction="sum")
    (plain * 0.25).backward()
    assert loss_sum.item() == pytest.approx(plain.item(), rel=1e-6)
    assert not loss_sum.requires_grad
    for param, grad in zip(model.parameters(), ours, strict=True):
        assert grad is not None
        assert param.grad is not None
        assert torch.allclose(grad, param.grad, atol=1e-6)


def test_the_callback_comes_between_forward_and_backward_of_the_last_batch_with_samples() -> None:
    model = SimpleNN(12, 9, 5)
    seen: list[tuple[float, Tensor | None]] = []

    def before_last(loss_sum: Tensor) -> None:
        grad = model.out.bias.grad
        seen.append((loss_sum.item(), None if grad is None else grad.clone()))

    batches = [classes(0), classes(3), classes(4), classes(0)]
    loss_sum = forward_backward(model, batches, 1.0, before_last=before_last)
    ((loss_then, grad_then),) = seen
    assert loss_then == loss_sum.item()
    assert grad_then is not None, "the first micro-batch's backward is over"
    assert not torch.equal(grad_then, model.out.bias.grad), "the last one's is not"


def test_without_samples_nothing_is_computed_and_the_callback_stays_out() -> None:
    model = SimpleNN(12, 9, 5)
    assert forward_backward(model, [classes(0)], 1.0, before_last=lambda _: pytest.fail("called")).item() == 0.0
    assert all(param.grad is None for param in model.parameters())


def test_targets_that_are_none_have_no_part_in_loss_or_count() -> None:
    model, batch = SimpleNN(12, 9, 5), classes(4)
    masked = Batch(batch.inputs, torch.where(torch.arange(4) < 3, batch.targets, NO_TARGET))
    kept = Batch(batch.inputs[:3], batch.targets[:3])
    assert count_targets([batch, masked]) == 4 + 3
    assert forward_backward(model, [masked], 1.0).item() == pytest.approx(forward_backward(model, [kept], 1.0).item())
    assert evaluate_batch(model, masked).count == 3
    assert evaluate_batch(model, masked).correct == evaluate_batch(model, kept).correct


def test_fp64_converts_the_model_and_pixels_but_not_token_ids() -> None:
    model = prepare_model(SimpleNN(12, 9, 5), "fp64", "cpu")
    assert {param.dtype for param in model.parameters()} == {torch.float64}
    assert forward_backward(model, [classes(3)], 1.0, "fp64").dtype == torch.float64
    embedding = prepare_model(nn.Embedding(7, 7), "fp64", "cpu")
    tokens = torch.randint(0, 7, (2, 3))
    assert forward_backward(embedding, [Batch(tokens, tokens)], 1.0, "fp64").dtype == torch.float64


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_computes_in_it_and_sums_losses_in_float32(precision: str, dtype: torch.dtype) -> None:
    model = SimpleNN(12, 9, 5)
    seen = []
    model.out.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    assert forward_backward(model, [classes(3)], 1.0, precision).dtype == torch.float32
    assert seen == [dtype]


def test_spans_of_forward_and_backward_are_recorded_for_every_micro_batch() -> None:
    telemetry = Telemetry()
    forward_backward(SimpleNN(12, 9, 5), [classes(2), classes(2)], 1.0, telemetry=telemetry)
    assert [span.name for span in telemetry.drain()] == ["forward", "backward"] * 2


def test_pairs_and_batches_become_batches() -> None:
    batch = classes(2)
    pair = (batch.inputs, batch.targets)
    assert as_batches(batch) == [batch]
    for micro_batches in ([pair], pair, list(pair), [list(pair)]):
        (only,) = as_batches(micro_batches)
        assert only.inputs is batch.inputs
        assert only.planned_count == 0
    assert len(as_batches([pair, batch])) == 2
    with pytest.raises(ConfigError, match="micro-batch is a Tensor"):
        as_batches([batch.inputs])


def test_the_norm_is_the_true_one_and_clipping_is_torchs() -> None:
    model = SimpleNN(12, 9, 5)
    forward_backward(model, [classes(3)], 1.0)
    params = list(model.parameters())
    before = [param.grad.clone() for param in params if param.grad is not None]
    norm = clip_gradients(params, None)
    assert all(torch.equal(a, b.grad) for a, b in zip(before, params, strict=True))
    assert clip_gradients(params, norm / 3) == norm
    clipped = [param.grad.clone() for param in params if param.grad is not None]
    for param, grad in zip(params, before, strict=True):
        param.grad = grad.clone()
    torch_norm = nn.utils.clip_grad_norm_(params, norm / 3)
    assert norm == pytest.approx(torch_norm.item(), rel=1e-6)
    for param, grad in zip(params, clipped, strict=True):
        assert torch.allclose(grad, param.grad, rtol=1e-6, atol=0)


def test_the_factor_is_part_of_the_gradient_that_is_clipped() -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([param], 100.0, factor=2.0) == 10.0
    assert param.grad.tolist() == [6.0, 8.0]
    assert clip_gradients([param], 1.0, factor=0.5) == 5.0
    assert param.grad.norm().item() == pytest.approx(1.0, abs=1e-6)


def test_gradients_of_several_dtypes_have_one_norm() -> None:
    params = [nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    for param, value in zip(params, (2.0, 3.0, 6.0), strict=True):
        param.grad = torch.full_like(param, value)
    assert clip_gradients(params, None) == 7.0


def test_the_norm_of_half_precision_gradients_is_computed_in_float32() -> None:
    param = nn.Parameter(torch.zeros(257, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    assert clip_gradients([param], None) == pytest.approx(257**0.5, rel=1e-6)


def test_the_norm_without_any_gradient_is_zero() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0) == 0.0


def test_a_norm_that_is_not_finite_leaves_gradients_alone() -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([1.0, math.inf])
    assert clip_gradients([param], 1.0) == math.inf
    assert param.grad.tolist() == [1.0, math.inf]


def test_the_scale_halves_on_overflow_doubles_after_good_steps_and_never_falls_below_one() -> None:
    scaler = LossScaler(8.0, growth_interval=3)
    for _ in range(2):
        scaler.update(True, 8.0)
    scaler.update(False, 8.0)
    assert scaler.scale == 4.0
    for _ in range(3):
        scaler.update(True, 4.0)
    assert scaler.scale == 8.0, "three good steps in a row"
    for _ in range(9):
        scaler.update(False, scaler.scale)
    assert scaler.scale == 1.0


def test_several_overflows_of_one_scale_halve_it_once() -> None:
    scaler = LossScaler(8.0)
    for _ in range(4):
        scaler.update(False, 8.0)
    assert scaler.scale == 4.0


def test_an_overflow_is_passed_over_while_a_smaller_scale_can_help() -> None:
    scaler = LossScaler(4.0)
    assert not is_applicable(0, 1.0, math.inf, 1e-3, scaler=scaler, loss_scale=4.0)
    assert scaler.scale == 2.0
    with pytest.raises(TrainingStopped, match="step 3: the loss is 1 and the gradient's norm inf"):
        is_applicable(3, 1.0, math.inf, 1e-3, scaler=scaler, loss_scale=1.0)
    with pytest.raises(TrainingStopped, match="the loss is nan"):
        is_applicable(3, math.nan, 1.0, 1e-3, scaler=scaler, loss_scale=4.0)


def test_evaluation_sums_add_up() -> None:
    assert EvalSums(1.5, 2, 1, 2) + EvalSums(0.5, 3, 0, 1) == EvalSums(2.0, 5, 1, 3)


class _Echo(nn.Module):
    """Predicts that the next token is the present one."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(tokens, 4).float()


def test_where_some_targets_are_graded_a_sample_is_right_if_all_of_them_are() -> None:
    inputs = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    targets = torch.tensor([[0, 2, 3], [1, 2, 0], [1, 2, 3]])
    graded = torch.tensor([[False, True, True], [False, True, True], [False, False, False]])
    sums = evaluate_batch(_Echo(), Batch(inputs, targets, graded=graded))
    assert (sums.count, sums.correct, sums.graded) == (9, 1, 2)


def test_evaluation_of_no_samples_is_zero_and_dropout_is_off() -> None:
    model = nn.Sequential(nn.Dropout(0.9), SimpleNN(12, 9, 5))
    assert evaluate_batch(model, classes(0)) == EvalSums(0.0, 0, 0, 0)
    batch = classes(4)
    assert evaluate_batch(model, batch) == evaluate_batch(model, batch)
    assert model.training
    model.eval()
    evaluate_batch(model, batch)
    assert not model.training
