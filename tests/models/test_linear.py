"""Products with 8-bit weights: how far they are from those with the same weights in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from smolcluster.errors import ConfigError
from smolcluster.models import linear
from smolcluster.models.linear import (
    DynamicInt8Linear,
    Int8Linear,
    Rows,
    TwoDigitInt8Linear,
    WeightKind,
    make_linear,
    quantised,
)

is_x86 = pytest.mark.skipif(
    not linear.multiplies_integers(torch.device("cpu")), reason="PyTorch has no fast integer products here"
)


def drawn(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a bias, and activations with one that is much larger than the others, as language models have."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(48, width, generator=generator) * 0.05, torch.randn(48, generator=generator)
    x = torch.randn(rows, width, generator=generator)
    x[0, 0] = 30.0
    return weight, bias, x


def error(found: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> float:
    """Of the products, relative; what rounding the weights costs is not counted."""
    values, scale = quantised(weight)
    exact = x.double() @ (values.double() * scale.double()[:, None]).T
    return float((found - exact - bias).norm() / exact.norm())


@is_x86
@pytest.mark.parametrize("has_vnni", [True, False])
@pytest.mark.parametrize("width", [2, 30, 64, 768])
def test_two_digits_are_closer_than_bfloat16(width: int, has_vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_HAS_VNNI", has_vnni)
    for rows in (1, 5):
        weight, bias, x = drawn(rows, width)
        product = TwoDigitInt8Linear(weight, bias)
        # 2^-15 of the largest activation, 2^-13 with 7 bits; sums of many are a little less precise.
        assert error(product(x), weight, bias, x) < (5e-4 if has_vnni else 2e-3)


@is_x86
def test_one_digit_is_less_precise_and_what_two_cost_is_worth_it() -> None:
    weight, bias, x = drawn(4, 64)
    two, one = (error(kind(weight, bias)(x), weight, bias, x) for kind in (TwoDigitInt8Linear, DynamicInt8Linear))
    packed = error(Int8Linear(weight, bias)(x), weight, bias, x)
    assert two < packed / 3 < one / 3


@is_x86
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_no_row_depends_on_another(kind: WeightKind) -> None:
    """Not on a large one either, nor on one that is no number; and there may be none."""
    weight, bias, x = drawn(1, 64)
    product = make_linear(weight, bias, kind)
    alone = product(x)
    expected = product(torch.cat([x, x]))[:1]
    torch.testing.assert_close(expected, alone, rtol=1e-5, atol=1e-6)
    for other in (0.0, 1e6, float("nan"), float("inf")):
        row = torch.full((1, 64), other)
        found = product(torch.cat([x, row]))
        assert torch.equal(found[:1], expected)
        for each in (found[1], product(row)):
            assert bool(each.isfinite().all()) == (other in (0.0, 1e6))
    for rows in (1, 2):
        for little in (0.0, 1e-38, 1e-44):
            found = product(torch.zeros(rows, 64).index_fill_(1, torch.tensor([3]), little))
            torch.testing.assert_close(found, bias.expand(rows, -1), rtol=1e-6, atol=1e-6)
    assert product(x[:0]).shape == (0, 48)


@is_x86
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_a_matrix_may_have_one_column_and_one_row(kind: WeightKind) -> None:
    weight = torch.full((1, 1), 0.5)
    torch.testing.assert_close(make_linear(weight, None, kind)(torch.ones(1, 1)), weight, rtol=1e-2, atol=0)


def test_elsewhere_int8_is_multiplied_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "multiplies_integers", lambda device: False)
    weight, bias, x = drawn(3, 64)
    found = make_linear(weight, bias, "int8")
    assert isinstance(found, Int8Linear)
    assert error(found(x), weight, bias, x) < 1e-2
    assert isinstance(make_linear(Rows((48, 64), [weight]), bias, "int8"), Int8Linear)
    assert isinstance(make_linear(weight[:, :30], bias, "int8"), linear.PlainLinear)
    with pytest.raises(ConfigError, match="Use int8"):
        make_linear(weight, bias, "int8-dynamic")


@is_x86
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_a_large_matrix_is_kept_in_parts_and_may_come_in_rows(
    kind: WeightKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias, x = drawn(3, 64)
    whole = make_linear(weight, bias, kind)(x)
    monkeypatch.setattr(linear, "_PACKED_BYTES", 64 * 10)
    buffer = torch.empty(7, 64)

    def chunks() -> Iterator[Tensor]:
        for row in range(0, len(weight), 7):
            chunk = buffer[: min(7, len(weight) - row)]
            yield chunk.copy_(weight[row : row + 7])

    for given in (weight, Rows((48, 64), chunks())):
        torch.testing.assert_close(make_linear(given, bias, kind)(x), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("has_bias", [True, False])
def test_plain_products_are_pytorchs_with_any_number_of_rows(has_bias: bool) -> None:
    weight, bias, x = drawn(20, 64)
    product = make_linear(weight, bias if has_bias else None, "plain")
    for rows in range(21):
        found = product(x[:rows])
        assert found.is_contiguous()
        expected = torch.nn.functional.linear(x[:rows], weight, bias if has_bias else None)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
