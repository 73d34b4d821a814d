"""Backward in two parts: first what the stage before waits for, then the gradients of weights, for which nobody waits.

Backward of a linear layer y = x W^T is two products: dx = dy W goes on down the layers, dW = dy^T x stays here, and
autograd computes both before it goes on. Here dW of all linear layers of a stage is computed once the stage's dx has
left. So the rank before has it up to half a backward pass earlier, and ranks that are equally fast no longer wait for
each other at every message. A schedule's table is what it was; the bubble is a little smaller than its formula.

Source: Qi et al. 2023, Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 2 (B and W).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The linear layer of transformers' GPT-2: its weight is (in, out).
_TRANSPOSED = "Conv1D"


class LateWeights:
    """The linear layers of a stage, whose weights' gradients wait until `compute` is called.

    Under autocast, where weights are cast for each use, and in layers with hooks they do not wait. Memory: until then
    the gradients of what the layers gave, of one micro-batch.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the linear layers below `module` over: their forward is another one from now on."""
        self._waiting: list[tuple[nn.Parameter, nn.Parameter | None, bool, Tensor, Tensor]] = []
        for layer in module.modules():
            is_transposed = type(layer).__name__ == _TRANSPOSED
            if (type(layer) is nn.Linear or is_transposed) and not _has_hooks(layer):
                layer.forward = partial(self._forward, layer, is_transposed, layer.forward)

    def compute(self) -> None:
        """Add the gradients that wait to those of the parameters."""
        for weight, bias, is_transposed, x, grad in self._waiting:
            x, grad = x.flatten(0, -2), grad.flatten(0, -2)
            if weight.requires_grad:
                _add(weight, x.t() @ grad if is_transposed else grad.t() @ x)
            if bias is not None and bias.requires_grad:
                _add(bias, grad.sum(dim=0))
        self._waiting.clear()

    def _forward(self, layer: Any, is_transposed: bool, plain: Any, x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        is_plain = torch.is_autocast_enabled(x.device.type) or x.dim() < 2 or not x.requires_grad
        if is_plain or not torch.is_grad_enabled() or not weight.requires_grad:
            given: Tensor = plain(x)
            return given
        out: Tensor = _Linear.apply(x, weight, bias, is_transposed, self._waiting)  # type: ignore[no-untyped-call]
        return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, is_transposed: bool, waiting: list[Any]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.is_transposed, ctx.waiting = weight, bias, is_transposed, waiting
        return F.linear(x, weight.t() if is_transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.waiting.append((ctx.weight, ctx.bias, ctx.is_transposed, x, grad))
        return grad @ (ctx.weight.t() if ctx.is_transposed else ctx.weight), None, None, None, None


def _add(param: nn.Parameter, grad: Tensor) -> None:
    """As autograd does."""
    if param.grad is None:
        param.grad = grad
    else:
        param.grad += grad


def _has_hooks(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "parametrizations" in layer._modules
