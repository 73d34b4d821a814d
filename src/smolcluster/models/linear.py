"""Matrix products with the weights of a model that generates: in floating point, or from 8-bit integers.

A stream's token reads every weight once, so a token takes as long as reading them does: a fourth of the bytes of fp32,
and nearly a fourth of the time.

- "int8": weights are int8 with one scale for each row; activations are bfloat16.
- "int8-dynamic": activations are rounded to 8 bits as well, for each product anew, and products are of integers.

Source    Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, section 2 (absmax and row-wise scales)
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WeightKind = Literal["plain", "int8", "int8-dynamic"]
_LARGEST = 127
# PyTorch's product reads so many weights of a row at once; with rows of other widths it reads past the end, and dies.
_INT8_WIDTH = 16


class PlainLinear:
    """x W^T + b in the dtype of the weights."""

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None) -> None:
        self._weight = weight_FD
        self._bias = bias_F

    def __call__(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, F)."""
        return F.linear(x_ND, self._weight, self._bias)


def quantised(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to int8 (F, D), and the scale of each (F,) in float32: weight = int8 x scale."""
    scale_F = weight_FD.float().abs().amax(dim=1).clamp(min=1e-12) / _LARGEST
    return (weight_FD.float() / scale_F[:, None]).round().to(torch.int8), scale_F


class Int8Linear:
    """Weights of int8; the result is in the dtype of the activations that come in."""

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None) -> None:
        self._weight, scale_F = quantised(weight_FD)
        self._scale = scale_F.to(torch.bfloat16)
        self._bias = bias_F

    def __call__(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, F)."""
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x_ND.to(torch.bfloat16), self._weight, self._scale).to(
            x_ND.dtype
        )
        return out if self._bias is None else out + self._bias


class DynamicInt8Linear:
    """Weights and activations of 8 bits."""

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None) -> None:
        values, scale_F = quantised(weight_FD)
        zero_F = torch.zeros(len(scale_F), dtype=torch.int64)
        packed = torch._make_per_channel_quantized_tensor(values, scale_F.double(), zero_F, 0)
        bias = None if bias_F is None else bias_F.float()
        self._packed = torch.ops.quantized.linear_prepack(packed, bias)

    def __call__(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, F)."""
        out: Tensor = torch.ops.quantized.linear_dynamic(x_ND.float(), self._packed)
        return out.to(x_ND.dtype)


Linear = Callable[[Tensor], Tensor]
_KINDS: dict[WeightKind, Callable[[Tensor, Tensor | None], Linear]] = {
    "plain": PlainLinear,
    "int8": Int8Linear,
    "int8-dynamic": DynamicInt8Linear,
}


def make_linear(weight_FD: Tensor, bias_F: Tensor | None, kind: WeightKind) -> Linear:
    """A product with a weight (F, D), which is taken over: (N, D) to (N, F).

    With "int8" a matrix whose D is no multiple of 16 stays as it is.
    """
    if kind == "int8" and weight_FD.shape[1] % _INT8_WIDTH:
        kind = "plain"
    return _KINDS[kind](weight_FD, bias_F)
