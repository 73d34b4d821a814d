"""Tensors as raw bytes: shared, not copied, in all dtypes that travel."""

from __future__ import annotations

import pytest
import torch

from smolcluster.errors import FrameError
from smolcluster.transport import frame
from smolcluster.transport.frame import DTYPES, KIND_MESSAGE, Prelude
from smolcluster.transport.tensors import dtype_code, dtype_of, empty_for, raw_bytes

TORCH_DTYPES = [getattr(torch, name) for name in DTYPES]


def example(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose bits are random, so that NaN, infinity and -0.0 occur."""
    count = torch.Size(shape).numel()
    bits = torch.randint(0, 256, (count * dtype.itemsize,), generator=torch.Generator().manual_seed(count))
    if dtype == torch.bool:
        return (bits % 2 == 0).view(shape)
    return bits.to(torch.uint8).view(dtype).view(shape)


def received(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` after a journey: its frame, then its bytes into fresh memory."""
    dims = tuple(tensor.shape)
    prelude = Prelude(
        KIND_MESSAGE, 0, 0, dtype_code(tensor.dtype), 0, 1, 0, 0, 0, tensor.numel(), raw_bytes(tensor).nbytes, len(dims)
    )
    packed = frame.pack(prelude, dims)
    head = frame.unpack(packed[: frame.PRELUDE_BYTES])
    copy = empty_for(head, frame.unpack_dims(packed[frame.PRELUDE_BYTES :], head, 1 << 20))
    raw_bytes(copy)[:] = raw_bytes(tensor)
    return copy


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (), (0,), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_and_shape_survives_the_wire(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = example(dtype, shape)
    copy = received(tensor)
    assert copy.dtype == dtype
    assert copy.shape == tensor.shape
    assert bytes(raw_bytes(copy)) == bytes(raw_bytes(tensor))


def test_all_ten_dtypes_have_their_size() -> None:
    assert len(TORCH_DTYPES) == 10
    for dtype, (code, itemsize) in zip(TORCH_DTYPES, DTYPES.values(), strict=True):
        assert dtype.itemsize == itemsize
        assert dtype_of(dtype_code(dtype)) == dtype
        assert dtype_code(dtype) == code


def test_the_bytes_are_little_endian() -> None:
    assert bytes(raw_bytes(torch.tensor([1.0], dtype=torch.bfloat16))) == b"\x80\x3f"
    assert bytes(raw_bytes(torch.tensor([1, -2], dtype=torch.int32))) == b"\x01\0\0\0\xfe\xff\xff\xff"
    assert bytes(raw_bytes(torch.tensor([True, False]))) == b"\x01\0"


def test_the_bytes_are_the_tensors_own_memory() -> None:
    tensor = torch.zeros(4, dtype=torch.int16)
    raw_bytes(tensor)[2:4] = b"\x07\x01"
    assert tensor.tolist() == [0, 0x0107, 0, 0]


def test_a_parameter_and_a_slice_give_their_own_bytes() -> None:
    whole = torch.nn.Parameter(torch.arange(6.0))
    part = whole[2:4]
    assert part.requires_grad
    assert bytes(raw_bytes(part)) == bytes(raw_bytes(torch.tensor([2.0, 3.0])))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, 4).t()[1:], torch.zeros(10)[::2], torch.zeros(3).expand(2, 3), torch.zeros(2, device="meta")],
    ids=["transposed", "strided", "expanded", "meta"],
)
def test_a_tensor_whose_bytes_are_not_its_values_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a contiguous CPU tensor is needed"):
        raw_bytes(tensor)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_does_not_travel_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{dtype} tensors cannot be sent; can: float32"):
        dtype_code(dtype)


def test_an_unknown_number_of_a_dtype_is_a_frame_error() -> None:
    with pytest.raises(FrameError, match="unknown dtype 11"):
        dtype_of(11)
