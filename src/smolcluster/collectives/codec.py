"""What a collective puts on the wire instead of the tensor's own bytes: bfloat16 or float16, half of float32.

A codec has no state and no thread. It rounds every element on its own, so encoding what was decoded changes nothing
more, and pieces of a tensor may be encoded apart from each other. Sums are made outside, in the tensor's own dtype.

- bf16 keeps float32's range and 8 significant bits: relative error at most 2^-8. The usual choice for gradients.
- fp16 keeps 11 significant bits (2^-11) from 6e-5 to 65504. Larger finite values become +-65504 instead of infinite:
  one large gradient must not turn the whole sum infinite. NaN and infinity stay, so non-finite steps are still noticed.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from smolcluster.collectives.base import Codec
from smolcluster.errors import ConfigError

FP16_MAX = 65504.0


class Bf16Codec:
    """bfloat16 on the wire, little-endian, rounded to the nearest (ties to even; float64 goes through float32)."""

    name = "bf16"

    def encoded_nbytes(self, count: int) -> int:
        """Two bytes per element."""
        return 2 * count

    def encode(self, tensor: Tensor, out: Tensor) -> None:
        """Encode a flat floating-point tensor (n,) into `out`, uint8 (2n,), on the same device.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        _check(tensor, out)
        _store(tensor.detach(), torch.bfloat16, out)

    def decode(self, data: Tensor, out: Tensor) -> None:
        """Decode uint8 `data` (2n,) into the flat floating-point tensor `out` (n,), on the same device.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        _check(out, data)
        _load(data, torch.bfloat16, out.detach())


class Fp16Codec:
    """float16 on the wire, little-endian, rounded to the nearest; finite values saturate at +-65504."""

    name = "fp16"

    def encoded_nbytes(self, count: int) -> int:
        """Two bytes per element."""
        return 2 * count

    def encode(self, tensor: Tensor, out: Tensor) -> None:
        """Encode a flat floating-point tensor (n,) into `out`, uint8 (2n,), on the same device.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        _check(tensor, out)
        tensor = tensor.detach()
        half = tensor.to(torch.float16)
        too_large = half.isinf()
        # Rare, so the common path pays for one look at the result only.
        if bool(too_large.any()):
            too_large &= tensor.isfinite()
            half = torch.where(too_large, half.clamp(-FP16_MAX, FP16_MAX), half)
        _store(half, torch.float16, out)

    def decode(self, data: Tensor, out: Tensor) -> None:
        """Decode uint8 `data` (2n,) into the flat floating-point tensor `out` (n,), on the same device.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        _check(out, data)
        _load(data, torch.float16, out.detach())


def codec_for(compression: str) -> Codec | None:
    """The codec of `cluster.compression`; None for "none".

    Raises:
        ConfigError: an unknown name, one of a later release, or a machine that cannot read the wire format.
    """
    if compression == "none":
        return None
    if compression == "int8":
        raise ConfigError(
            "cluster.compression is int8, which comes in a later release: use bf16 (2x fewer bytes) for now"
        )
    codecs: dict[str, type[Bf16Codec] | type[Fp16Codec]] = {"bf16": Bf16Codec, "fp16": Fp16Codec}
    if compression not in codecs:
        raise ConfigError(f"cluster.compression is {compression!r}: use one of none, {', '.join(codecs)}")
    if sys.byteorder != "little":
        raise ConfigError(
            f"cluster.compression is {compression}, which is little-endian on the wire, and this machine is "
            "big-endian: use none"
        )
    return codecs[compression]()


def _check(values: Tensor, encoded: Tensor) -> None:
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"a codec needs a flat floating-point tensor, got {values.dtype} {tuple(values.shape)}")
    if encoded.dtype != torch.uint8 or encoded.shape != (2 * values.numel(),) or not encoded.is_contiguous():
        raise ValueError(
            f"{values.numel()} elements need a contiguous uint8 tensor of {2 * values.numel()} bytes, "
            f"got {encoded.dtype} {tuple(encoded.shape)}"
        )
    if values.device != encoded.device:
        raise ValueError(f"values on {values.device} and encoded bytes on {encoded.device}: move one first")


def _store(values: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    if _is_even(out):
        out.view(dtype).copy_(values)  # converts while it copies: no memory of its own
    else:
        out.copy_(values.to(dtype).view(torch.uint8))


def _load(data: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    out.copy_((data if _is_even(data) else data.clone()).view(dtype))


def _is_even(data: Tensor) -> bool:
    # A slice of a receive buffer may begin at an odd byte, where a view of two-byte elements is refused.
    return data.storage_offset() % 2 == 0 and data.data_ptr() % 2 == 0
