"""Tensors as raw little-endian bytes, without a copy and without pickle."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor

from smolcluster.errors import FrameError
from smolcluster.transport.frame import DTYPE_NAMES, DTYPES, MAX_UNSIZED_BYTES, Prelude

_TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_BOOL = DTYPES["bool"][0]
_CODES = {dtype: DTYPES[name][0] for name, dtype in _TORCH_DTYPES.items()}


def dtype_code(dtype: torch.dtype) -> int:
    """The dtype's number on the wire.

    Raises:
        ValueError: this dtype does not travel.
    """
    try:
        return _CODES[dtype]
    except KeyError:
        raise ValueError(f"{dtype} tensors cannot be sent; can: {', '.join(_TORCH_DTYPES)}") from None


def dtype_of(code: int) -> torch.dtype:
    """The torch dtype of a number on the wire.

    Raises:
        FrameError: unknown number.
    """
    try:
        return _TORCH_DTYPES[DTYPE_NAMES[code]]
    except KeyError:
        raise FrameError(f"unknown dtype {code} in a frame") from None


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared, writable.

    Raises:
        ValueError: not contiguous or not on CPU.
    """
    if sys.byteorder != "little":
        raise ValueError("smolcluster sends little-endian bytes and this machine is big-endian")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"a contiguous CPU tensor is needed, this one has shape {tuple(tensor.shape)}, strides {tensor.stride()}, "
            f"device {tensor.device}; call .contiguous() first"
        )
    if tensor.numel() == 0:
        return memoryview(bytearray())
    flat = tensor if tensor.dim() == 1 and not tensor.requires_grad else tensor.detach().view(-1)
    array: Any = flat.view(torch.uint8).numpy()  # numpy's stubs do not say that it is a buffer
    return memoryview(array)


def alias_of(tensor: Tensor) -> Tensor:
    """A second tensor over the memory of a contiguous CPU tensor, with a storage of its own.

    `raw_bytes` makes a storage one that can no longer be resized; this spares the tensor's own. It is valid only as
    long as that keeps its memory.
    """
    if tensor.numel() == 0:
        return tensor.detach()
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def empty_for(prelude: Prelude, dims: tuple[int, ...]) -> Tensor:
    """Uninitialised CPU memory for a frame that carries a whole tensor of shape `dims`, as `unpack_dims` checked them.

    Raises:
        FrameError: the system gives no such memory.
    """
    assert prelude.nbytes <= MAX_UNSIZED_BYTES
    try:
        return torch.empty(dims, dtype=dtype_of(prelude.dtype))
    except RuntimeError as exc:
        raise FrameError(f"there is no memory for a frame of {prelude.nbytes} bytes") from exc


def check_payload(prelude: Prelude, payload: memoryview) -> None:
    """Refuse a bool that is neither 0 nor 1: torch counts on that, and may write beyond a tensor's end otherwise.

    Raises:
        FrameError: there is one.
    """
    if prelude.dtype == _BOOL and len(payload) and int(torch.frombuffer(payload, dtype=torch.uint8).max()) > 1:
        raise FrameError(f"bools that are neither 0 nor 1 in a {prelude.describe()}")
