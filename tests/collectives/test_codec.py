"""bf16 and fp16 on the wire: exact values, rounding, range, and the bytes themselves. int8: test_int8.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolcluster.collectives.base import Codec
from smolcluster.collectives.codec import Bf16Codec, Fp16Codec, Int8Codec, codec_for
from smolcluster.errors import ConfigError

CODECS: list[Codec] = [Bf16Codec(), Fp16Codec()]
codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
float_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def encode(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    out = torch.full((codec.encoded_nbytes(tensor.numel()),), 255, dtype=torch.uint8)
    codec.encode(tensor, out)
    return out


def round_trip(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(tensor, 77.0)
    codec.decode(encode(codec, tensor), out)
    return out


@codecs
@float_dtypes
def test_values_that_fit_come_back_exactly(codec: Codec, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, -0.0, 1.0, -1.5, 0.0078125, 248.0, -65280.0], dtype=dtype)
    decoded = round_trip(codec, tensor)
    assert torch.equal(decoded, tensor)
    assert math.copysign(1.0, decoded[1].item()) == -1.0


@codecs
@pytest.mark.parametrize("count", [0, 1, 2, 1001])
def test_two_bytes_per_element_for_any_count(codec: Codec, count: int) -> None:
    assert codec.encoded_nbytes(count) == 2 * count
    tensor = torch.linspace(-3, 3, count)
    assert torch.allclose(round_trip(codec, tensor), tensor, rtol=2.0**-8, atol=1e-6)


def test_the_bytes_are_little_endian() -> None:
    one_and_a_half = torch.tensor([1.5])
    assert encode(Bf16Codec(), one_and_a_half).tolist() == [0xC0, 0x3F]
    assert encode(Fp16Codec(), one_and_a_half).tolist() == [0x00, 0x3E]


@float_dtypes
def test_ties_go_to_the_even_neighbour(dtype: torch.dtype) -> None:
    # Half-way between two neighbours: 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between that and 1 + 2^-6.
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8)], dtype=dtype)
    assert round_trip(Bf16Codec(), ties).tolist() == [1.0, 1 + 2.0**-6, -1.0]
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -(1 + 2.0**-11)], dtype=dtype)
    assert round_trip(Fp16Codec(), ties).tolist() == [1.0, 1 + 2.0**-9, -1.0]


@given(st.lists(st.floats(min_value=-60000, max_value=60000, width=32), max_size=20))
def test_the_error_is_at_most_half_a_unit_in_the_last_place(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    # The floor: half of fp16's smallest subnormal number, and bf16's, which is smaller.
    for codec, unit, floor in ((Bf16Codec(), 2.0**-8, 2.0**-134), (Fp16Codec(), 2.0**-11, 2.0**-25)):
        error = (round_trip(codec, tensor).double() - tensor.double()).abs()
        assert bool((error <= torch.clamp(tensor.double().abs() * unit, min=floor)).all())


@codecs
def test_encoding_again_changes_nothing_more(codec: Codec) -> None:
    tensor = torch.randn(1001, generator=torch.Generator().manual_seed(0)) * 1e4
    once = round_trip(codec, tensor)
    assert torch.equal(round_trip(codec, once), once)


@codecs
@float_dtypes
def test_nan_and_infinity_survive(codec: Codec, dtype: torch.dtype) -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e6, -1e6, 2.0], dtype=dtype)
    decoded = round_trip(codec, tensor)
    assert decoded.isnan().tolist() == [True, False, False, False, False, False]
    assert decoded.isinf().tolist() == [False, True, True, False, False, False]
    assert decoded[1] > 0 > decoded[2]


@float_dtypes
def test_fp16_saturates_finite_values_instead_of_making_them_infinite(dtype: torch.dtype) -> None:
    tensor = torch.tensor([65504.0, 65519.0, 65520.0, 1e5, -1e5, 3e38, -3e38], dtype=dtype)
    assert round_trip(Fp16Codec(), tensor).tolist() == [65504.0] * 4 + [-65504.0, 65504.0, -65504.0]


def test_bf16_keeps_the_range_of_float32() -> None:
    tensor = torch.tensor([1e38, -1e38, 1e-38])
    assert torch.allclose(round_trip(Bf16Codec(), tensor), tensor, rtol=2.0**-8)


@codecs
def test_a_buffer_that_begins_at_an_odd_byte_works(codec: Codec) -> None:
    buffer = torch.zeros(9, dtype=torch.uint8)
    tensor = torch.tensor([1.0, -2.0, 3.5, 0.25])
    codec.encode(tensor, buffer[1:])
    assert buffer[0] == 0
    decoded = torch.empty(4)
    codec.decode(buffer[1:], decoded)
    assert torch.equal(decoded, tensor)


@codecs
def test_the_input_is_left_alone_and_parameters_can_be_encoded(codec: Codec) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0 + 2.0**-20, 1e6]))
    before = parameter.detach().clone()
    assert not round_trip(codec, parameter).equal(before)
    assert torch.equal(parameter.detach(), before)


@pytest.mark.parametrize("codec", [*CODECS, Int8Codec()], ids=lambda codec: codec.name)
def test_arguments_that_do_not_fit_raise_value_error(codec: Codec) -> None:
    good, out = torch.ones(4), torch.empty(8, dtype=torch.uint8)  # 8 bytes for int8 as well
    for tensor, data in (
        (torch.ones(4, dtype=torch.int64), out),
        (torch.ones(2, 2), out),
        (good, torch.empty(7, dtype=torch.uint8)),
        (good, torch.empty(8, dtype=torch.int8)),
        (good, torch.empty(16, dtype=torch.uint8)[::2]),
    ):
        with pytest.raises(ValueError, match=r"codec|bytes"):
            codec.encode(tensor, data)
        with pytest.raises(ValueError, match=r"codec|bytes"):
            codec.decode(data, tensor)


def test_codec_for_knows_the_names_of_the_configuration() -> None:
    assert codec_for("none") is None
    assert isinstance(codec_for("bf16"), Bf16Codec)
    assert isinstance(codec_for("fp16"), Fp16Codec)
    assert isinstance(codec_for("int8"), Int8Codec)
    assert [codec.name for codec in [*CODECS, Int8Codec()]] == ["bf16", "fp16", "int8"]


@pytest.mark.parametrize(("name", "says"), [("zip", "none, bf16, fp16, int8"), ("", "none")])
def test_codec_for_refuses_other_names_and_says_what_to_use(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        codec_for(name)


def test_codec_for_refuses_a_big_endian_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(ConfigError, match="big-endian"):
        codec_for("bf16")
    assert codec_for("none") is None
