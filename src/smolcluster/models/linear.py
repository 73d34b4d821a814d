"""Matrix products with the weights of a model that generates: in floating point, or from 8-bit integers.

A stream's token reads every weight once, so a token takes as long as reading them does: a fourth of the bytes of fp32,
and nearly a fourth of the time.

- "int8": weights are int8 with one scale for each row. Activations are on x86 two integers of 8 bits each, which
  is about 15 bits of a row's largest one; elsewhere bfloat16.
- "int8-dynamic": activations are rounded to 8 bits as well, for each product anew, and products are of integers.

Products of integers are what an x86 processor is fastest with: two rows, or eight, take no longer than one, and
PyTorch's product of int8 with bfloat16 takes twice as long there for one row, eight times for eight. So an activation
is rounded to a whole number of 16 bits, 256 a + b, and one product has the digits a and b as rows.

Source    Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, section 2 (absmax and row-wise scales)
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smolcluster.errors import ConfigError

WeightKind = Literal["plain", "int8", "int8-dynamic"]
_LARGEST = 127
# Of a weight that are rounded at once: what is needed besides is small.
_CHUNK_NUMBERS = 1 << 18
# Of a matrix for oneDNN: more parts take more calls.
_PACKED_BYTES = 16 << 20
# Of a row of zeros, or of nearly nothing: the inverse has to be a float32.
_LEAST_SCALE = 1e-30
# PyTorch's product reads so many weights of a row at once; with rows of other widths it reads past the end, and dies.
_INT8_WIDTH = 16


# Intel's MKL takes up to twice as long for x W^T with so many rows as for W x^T with 16 (12 rows of 768: 2.2 ms, 1.3).
# By the number of rows alone, and not timed at the start: with --deterministic equal machines have to do the same.
_FEW_ROWS = range(7, 17)


class PlainLinear:
    """x W^T + b in the dtype of the weights."""

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None) -> None:
        self._weight = weight_FD
        self._bias = bias_F
        is_by_mkl = weight_FD.device.type == "cpu" and weight_FD.dtype == torch.float32 and _has_mkl()
        self._turned = _FEW_ROWS if is_by_mkl else range(0)
        self._bias_F1 = torch.zeros(1, 1) if bias_F is None else bias_F[:, None]

    def __call__(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, F)."""
        if (rows := len(x_ND)) in self._turned:
            columns = F.pad(x_ND, (0, 0, 0, self._turned[-1] - rows)).t()
            return torch.addmm(self._bias_F1, self._weight, columns).t()[:rows].contiguous()
        return F.linear(x_ND, self._weight, self._bias)


def _has_mkl() -> bool:
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Rows:
    """A weight that is never in memory as a whole.

    Attributes:
        shape: (F, D).
        chunks: its rows, (n, D) each; the memory of one may be used again for the next.
    """

    shape: tuple[int, int]
    chunks: Iterable[Tensor]


def quantised(weight_FD: Tensor | Rows) -> tuple[Tensor, Tensor]:
    """Rows rounded to int8 (F, D), and the scale of each (F,) in float32: weight = int8 x scale."""
    count, width = weight_FD.shape
    chunks = weight_FD.chunks if isinstance(weight_FD, Rows) else _split(weight_FD, _CHUNK_NUMBERS // width)
    device = weight_FD.device if isinstance(weight_FD, Tensor) else torch.device("cpu")
    values = torch.empty((count, width), dtype=torch.int8, device=device)
    scale_F, row = torch.empty(count, device=device), 0
    for chunk in chunks:
        own = slice(row, row + len(chunk))
        numbers = chunk.float()
        scale_F[own] = numbers.abs().amax(dim=1).clamp_(min=1e-12).div_(_LARGEST)
        values[own] = (numbers / scale_F[own, None]).round_()
        row += len(chunk)
    return values, scale_F


def _split(weight_FD: Tensor, rows: int) -> Iterator[Tensor]:
    for row in range(0, len(weight_FD), max(1, rows)):
        yield weight_FD[row : row + max(1, rows)]


class Int8Linear:
    """Weights of int8; the result is in the dtype of the activations that come in."""

    def __init__(self, weight_FD: Tensor | Rows, bias_F: Tensor | None) -> None:
        self._weight, scale_F = quantised(weight_FD)
        self._scale = scale_F.to(torch.bfloat16)
        self._bias = bias_F

    def __call__(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, F)."""
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x_ND.to(torch.bfloat16), self._weight, self._scale).to(
            x_ND.dtype
        )
        return out if self._bias is None else out + self._bias


# Without VNNI instructions sums of two products overflow 16 bits, unless one factor has 7 bits.
_HAS_VNNI = bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


class _IntegerProduct:
    """Products of integers with int8 weights, by oneDNN, which is fast at them on x86.

    A token of one stream is so little work that every call counts: a single row has a number as its scale, for oneDNN.
    A bias costs it more than an addition.
    """

    def __init__(self, weight_FD: Tensor | Rows) -> None:
        # oneDNN makes a copy in an order of its own: part by part, so that not all of it is there twice.
        self._parts = [
            (torch.ops.onednn.qlinear_prepack(values, None), scale_F, torch.zeros(len(scale_F), dtype=torch.int64))
            for values, scale_F in _quantised_parts(weight_FD)
        ]
        self.outputs = sum(len(scale_F) for _, scale_F, _ in self._parts)
        self.bits = 8 if _HAS_VNNI else 7
        self._multiply = torch.ops.onednn.qlinear_pointwise.default  # not every build of PyTorch has it

    def __call__(self, digits_ND: Tensor, scale: float = 1.0) -> Tensor:
        """uint8 (N, D), of which half the largest, 2 ** (bits - 1), is subtracted; (N, F) float32, times the scale."""
        zero = 1 << (self.bits - 1)
        outs: list[Tensor] = [
            self._multiply(digits_ND, scale, zero, packed, scale_F, zero_F, None, 1.0, 0, torch.float32, "none", [], "")
            for packed, scale_F, zero_F in self._parts
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _one_scale(x_1D: Tensor, most: int) -> float:
    """What whole numbers up to `most` are to be multiplied with to be these; not finite if one of these is not."""
    low, high = x_1D.aminmax()
    return max(-low.item(), high.item(), _LEAST_SCALE) / most  # what is no number comes first, and stays


def _scales(x_ND: Tensor, most: int) -> Tensor:
    """The same for each row, (N, 1): no row's depends on another one's."""
    return x_ND.abs().amax(dim=1, keepdim=True).clamp_(min=_LEAST_SCALE).div_(most)


def _quantised_parts(weight_FD: Tensor | Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows after the other, as `quantised` gives them; the memory of values is used again for the next ones."""
    count, width = weight_FD.shape
    most = max(1, _PACKED_BYTES // width)
    if isinstance(weight_FD, Tensor):
        for row in range(0, count, most):
            yield quantised(weight_FD[row : row + most])
        return
    values, scale_F, got = torch.empty((most, width), dtype=torch.int8), torch.empty(most), 0
    for chunk in weight_FD.chunks:
        for rows in _split(chunk, most):
            if got + len(rows) > most:
                yield values[:got], scale_F[:got].clone()
                got = 0
            values[got : got + len(rows)], scale_F[got : got + len(rows)] = quantised(rows)
            got += len(rows)
    yield values[:got], scale_F[:got].clone()


class TwoDigitInt8Linear:
    """Weights of int8, activations of two digits of 8 bits each: see above. A row's largest one sets its scale."""

    def __init__(self, weight_FD: Tensor | Rows, bias_F: Tensor | None) -> None:
        self._product = product = _IntegerProduct(weight_FD)
        self._bits, base = product.bits, 1 << product.bits
        # Both digits are unsigned, and the product subtracts half of the base of each: what that comes to is added.
        self._zero = (base >> 1) * (base + 1)
        self._most = self._zero - base - 1
        self._half = torch.tensor(self._zero + 0.5)  # so that cutting the fraction off rounds
        self._worth = torch.tensor([[base, 1.0]])
        self._bias = torch.zeros(()) if bias_F is None else bias_F.float()

    def __call__(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, F)."""
        rows, x = len(x_ND), x_ND.float()
        if rows == 1:
            scale = _one_scale(x, self._most)
            digits = self._digits(torch.add(self._half, x, alpha=1 / scale))
            return torch.addmm(self._bias, self._worth, self._product(digits, scale)).to(x_ND.dtype)
        if not rows:
            return x_ND.new_empty((0, self._product.outputs))
        scale_N1 = _scales(x, self._most)
        out = self._product(self._digits(torch.addcmul(self._half, x, scale_N1.reciprocal())))
        both = torch.add(out[rows:], out[:rows], alpha=1 << self._bits)
        return torch.addcmul(self._bias, both, scale_N1).to(x_ND.dtype)

    def _digits(self, steps_ND: Tensor) -> Tensor:
        """Of numbers from 0 on, without their fractions: uint8 (2 N, D), the high ones first."""
        whole_ND = steps_ND.to(torch.int32)
        return torch.cat([whole_ND >> self._bits, whole_ND & ((1 << self._bits) - 1)]).to(torch.uint8)


class DynamicInt8Linear:
    """Weights and activations of 8 bits; a row's largest activation sets its scale."""

    def __init__(self, weight_FD: Tensor | Rows, bias_F: Tensor | None) -> None:
        self._product = product = _IntegerProduct(weight_FD)
        zero = 1 << (product.bits - 1)
        self._most, self._half = zero - 1, torch.tensor(zero + 0.5)
        self._bias = torch.zeros(()) if bias_F is None else bias_F.float()

    def __call__(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, F)."""
        rows, x = len(x_ND), x_ND.float()
        if rows == 1:
            scale = _one_scale(x, self._most)
            digits = torch.add(self._half, x, alpha=1 / scale).to(torch.uint8)
            return self._product(digits, scale).add_(self._bias).to(x_ND.dtype)
        if not rows:
            return x_ND.new_empty((0, self._product.outputs))
        scale_N1 = _scales(x, self._most)
        out = self._product(torch.addcmul(self._half, x, scale_N1.reciprocal()).to(torch.uint8))
        return torch.addcmul(self._bias, out, scale_N1).to(x_ND.dtype)


Linear = Callable[[Tensor], Tensor]


def make_linear(weight_FD: Tensor | Rows, bias_F: Tensor | None, kind: WeightKind) -> Linear:
    """A product with a weight (F, D), which is taken over: (N, D) to (N, F).

    Args:
        weight_FD: a tensor, which "plain" needs; rows where nothing stays as it is, see `stays`.
        bias_F: added to the product.
        kind: see above.

    Raises:
        ConfigError: "int8-dynamic" outside x86.
    """
    device = weight_FD.device if isinstance(weight_FD, Tensor) else torch.device("cpu")
    if isinstance(weight_FD, Tensor) and stays(weight_FD.shape[1], kind, device):
        return PlainLinear(weight_FD, bias_F)
    if not multiplies_integers(device):
        return Int8Linear(weight_FD, bias_F)
    return TwoDigitInt8Linear(weight_FD, bias_F) if kind == "int8" else DynamicInt8Linear(weight_FD, bias_F)


def stays(width: int, kind: WeightKind, device: torch.device) -> bool:
    """Whether a weight (F, `width`) is kept as floating-point numbers: with "int8" outside x86 those of some widths.

    Raises:
        ConfigError: this machine has no such products.
    """
    if kind == "plain" or multiplies_integers(device):
        return kind == "plain"
    if kind == "int8-dynamic":
        raise ConfigError("--dtype int8-dynamic needs an x86 processor, and --device cpu. Use int8")
    return width % _INT8_WIDTH != 0


def multiplies_integers(device: torch.device) -> bool:
    """Whether PyTorch has fast products of integers here."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and device.type == "cpu" and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
