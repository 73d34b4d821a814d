"""What a collective puts on the wire instead of the tensor's own bytes: bfloat16, float16, or int8 in blocks.

A codec remembers nothing from call to call, and pieces of a tensor may be encoded apart from each other. Sums are made
outside, in the tensor's own dtype.

- bf16 keeps float32's range and 8 significant bits: relative error at most 2^-8. The usual choice for gradients.
- fp16 keeps 11 significant bits (2^-11) from 6e-5 to 65504. Larger finite values become +-65504 instead of infinite:
  one large gradient must not turn the whole sum infinite. NaN and infinity stay, so non-finite steps are still noticed.
- int8 divides each block of 256 elements by a scale of its own and rounds to -127 to 127: a quarter of the bytes, an
  error of half a step, 1/254 of the block's largest value. Rounding so coarse is no noise that averages out: it is
  made up for in the next call (ErrorFeedback).

Source: Tang et al. 2019, "DoubleSqueeze", arXiv:1905.05957, algorithm 1, and Seide et al. 2014, "1-bit stochastic
gradient descent", section 2 (error feedback); Dettmers et al. 2021, arXiv:2110.02861, section 2.1 (blocks).
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smolcluster.errors import ConfigError

FP16_MAX = 65504.0

# Elements that share a scale: 4 bytes for 256 cost 1.6 % more than the numbers alone.
INT8_BLOCK = 256
_SCALE_BYTES = 4
# Smaller scales would be subnormal, which processors flush to zero or are slow with.
_MIN_SCALE = torch.finfo(torch.float32).tiny
# Elements that are encoded at a time: what is made of them on the way, twice 256 KiB, stays in the cache. Up to 256 Ki
# measure alike; 16 Ki take 1.7 times as long.
_SPAN = 64 * 1024


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
        _check(tensor, out, self.encoded_nbytes(tensor.numel()))
        _store(tensor.detach(), torch.bfloat16, out)

    def decode(self, data: Tensor, out: Tensor) -> None:
        """Decode uint8 `data` (2n,) into the flat floating-point tensor `out` (n,), on the same device.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        _check(out, data, self.encoded_nbytes(out.numel()))
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
        _check(tensor, out, self.encoded_nbytes(tensor.numel()))
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
        _check(out, data, self.encoded_nbytes(out.numel()))
        _load(data, torch.float16, out.detach())


class Int8Codec:
    """int8 in blocks of 256 on the wire: first every block's scale as float32, little-endian, then the numbers.

    A block's scale is its largest absolute value / 127; each element is sent as the nearest multiple of it. A block
    with a NaN or an infinity in it decodes to no finite number. Any thread may use it.
    """

    name = "int8"

    def __init__(self) -> None:
        self._memory = _ThreadMemory()

    def encoded_nbytes(self, count: int) -> int:
        """A byte per element and four per begun block of 256."""
        return count + _SCALE_BYTES * _blocks(count)

    def encode(self, tensor: Tensor, out: Tensor) -> None:
        """Encode a flat floating-point tensor (n,) into `out`, uint8 (encoded_nbytes(n),), on the same device.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        _check(tensor, out, self.encoded_nbytes(tensor.numel()))
        for values, scales, numbers in _spans(tensor.detach(), out):
            self._quantize(_widened(values), scales, numbers)

    def encode_with_feedback(self, tensor: Tensor, residual: Tensor, out: Tensor) -> None:
        """Encode tensor + residual, and leave in `residual` what that lost.

        Where values are not finite, nothing is left: a step that is not applied must not spoil those after it.

        Args:
            tensor: (n,), floating-point.
            residual: (n,), of the same dtype and device.
            out: uint8 (encoded_nbytes(n),).

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        _check(tensor, out, self.encoded_nbytes(tensor.numel()))
        lost_spans = _spans(residual, out)
        for (values, scale_bytes, numbers), (lost, _, _) in zip(_spans(tensor.detach(), out), lost_spans, strict=True):
            is_wide = values.dtype == _wide_dtype(values)  # then the sum can stand where the rest will: less memory
            wanted = lost if is_wide else self._scratch(values, "wanted").copy_(lost)
            decoded, scales = self._quantize(wanted.add_(values), scale_bytes, numbers)
            # Exactly what receivers decode, in two roundings: one fused operation would leave another rest.
            torch.sub(wanted, decoded.mul_(scales), out=lost)
            if not math.isfinite(float(scales.sum())):
                lost.masked_fill_(~torch.isfinite(scales), 0.0)

    def decode(self, data: Tensor, out: Tensor) -> None:
        """Decode uint8 `data` (encoded_nbytes(n),) into the flat floating-point tensor `out` (n,), on the same device.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        _check(out, data, self.encoded_nbytes(out.numel()))
        for values, scales, numbers in _spans(out.detach(), data):
            torch.mul(self._scratch(values).copy_(numbers), _load_scales(scales, values), out=values)

    def decode_add(self, data: Tensor, target: Tensor) -> None:
        """Add what `data` decodes to to `target` (n,). The last bit may differ between kinds of processors.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        _check(target, data, self.encoded_nbytes(target.numel()))
        for values, scales, numbers in _spans(target.detach(), data):
            decoded = self._scratch(values).copy_(numbers)
            values.addcmul_(decoded, _load_scales(scales, values))

    def _quantize(self, values: Tensor, scale_bytes: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Write the scales and numbers of `values` (rows, width); returns the numbers as floats, and the scales.

        The first lies in memory that the next call uses again.
        """
        scratch = self._scratch(values)
        scales = torch.abs(values, out=scratch).amax(dim=1, keepdim=True).div_(127).float().clamp_(min=_MIN_SCALE)
        scale_bytes.copy_(scales.view(-1).view(torch.uint8))
        scales = scales.to(values.dtype)
        torch.mul(values, scales.reciprocal(), out=scratch)
        numbers.copy_(scratch.round_())
        return scratch, scales

    def _scratch(self, values: Tensor, purpose: str = "decoded") -> Tensor:
        """Memory of the shape of `values` in the dtype that is computed in, this thread's own: new pages are slow."""
        tensors = self._memory.tensors
        key = (purpose, _wide_dtype(values), values.device)
        if key not in tensors:
            tensors[key] = torch.empty(_SPAN, dtype=key[1], device=key[2])
        return tensors[key][: values.numel()].view(values.shape)


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """For a tensor that is reduced by all ranks again and again: what int8 loses in one call is added in the next.

    Over all ranks the results and the residuals of the calls so far add up to the exact sums. A rank's residual holds
    what its contributions have lost; for the part of the tensor whose sum it makes, what that sum has lost.

    Attributes:
        codec: encodes.
        residual: (n,) for a tensor of n elements, of its dtype, in CPU memory; zeros at first. Belongs to a call until
            it is done.
    """

    codec: Int8Codec
    residual: Tensor

    @property
    def name(self) -> str:
        """The codec's."""
        return self.codec.name


class _ThreadMemory(threading.local):
    """Each thread sees `tensors` of its own."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


def codec_for(compression: str) -> Bf16Codec | Fp16Codec | Int8Codec | None:
    """The codec of `cluster.compression`; None for "none".

    Raises:
        ConfigError: an unknown name, or a machine that cannot read the wire format.
    """
    if compression == "none":
        return None
    codecs: dict[str, type[Bf16Codec | Fp16Codec | Int8Codec]] = {
        "bf16": Bf16Codec,
        "fp16": Fp16Codec,
        "int8": Int8Codec,
    }
    if compression not in codecs:
        raise ConfigError(f"cluster.compression is {compression!r}: use one of none, {', '.join(codecs)}")
    if sys.byteorder != "little":
        raise ConfigError(
            f"cluster.compression is {compression}, which is little-endian on the wire, and this machine is "
            "big-endian: use none"
        )
    return codecs[compression]()


def _check(values: Tensor, encoded: Tensor, nbytes: int) -> None:
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"a codec needs a flat floating-point tensor, got {values.dtype} {tuple(values.shape)}")
    if encoded.dtype != torch.uint8 or encoded.shape != (nbytes,) or not encoded.is_contiguous():
        raise ValueError(
            f"{values.numel()} elements need a contiguous uint8 tensor of {nbytes} bytes, "
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


def _blocks(count: int) -> int:
    return -(-count // INT8_BLOCK)


def _spans(values: Tensor, encoded: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Parts of `values` (rows, width) with their scales' bytes (4 * rows,) and int8 numbers (rows, width)."""
    count = values.numel()
    scales, numbers = encoded[: _SCALE_BYTES * _blocks(count)], encoded[_SCALE_BYTES * _blocks(count) :]
    start = 0
    while start < count:
        stop = min(start + _SPAN, count)
        if stop - start > INT8_BLOCK:
            stop -= (stop - start) % INT8_BLOCK  # the last block, which is shorter, comes by itself
        shape = (-1, min(INT8_BLOCK, stop - start))
        yield (
            values[start:stop].view(shape),
            scales[_SCALE_BYTES * _blocks(start) : _SCALE_BYTES * _blocks(stop)],
            numbers[start:stop].view(torch.int8).view(shape),
        )
        start = stop


def _load_scales(scale_bytes: Tensor, values: Tensor) -> Tensor:
    # clone: a slice of a receive buffer may begin anywhere, and a view of four-byte numbers may not.
    return scale_bytes.clone().view(torch.float32).view(-1, 1).to(_wide_dtype(values))


def _wide_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _widened(values: Tensor) -> Tensor:
    return values.to(_wide_dtype(values))  # itself, but for half precision
