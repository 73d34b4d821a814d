"""Backward in two parts: first what the stage before waits for, then the gradients of weights, for which nobody waits.

Backward of a linear layer y = x W^T is two products: dx = dy W goes on down the layers, dW = dy^T x stays here, and
autograd computes both before it goes on. Here dW of all linear layers of a stage is computed once the stage's dx has
left. So the rank before has it up to a third of a pass earlier, and ranks that are equally fast no longer wait for each
other at every message. A schedule's table is what it was; the bubble is a little smaller than its formula.

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
    """The linear layers of a stage, whose weights' gradients wait until `compute` is called; biases' do not.

    Under autocast, where weights are cast for each use, and in layers with hooks they do not wait either. Memory: until
    then the gradients of what the layers gave, of one micro-batch.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the linear layers below `module` over: their forward is another one from now on."""
        # A weight, and the factors of its gradient.
        self._waiting: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for layer in module.modules():
            is_transposed = type(layer).__name__ == _TRANSPOSED
            if (type(layer) is nn.Linear or is_transposed) and not _has_hooks(layer):
                layer.forward = partial(self._forward, layer, is_transposed, layer.forward)

    def compute(self) -> None:
        """Add the gradients that wait to those of the parameters."""
        for weight, left, right in self._waiting:
            if weight.grad is None:
                weight.grad = left @ right
            else:
                weight.grad.addmm_(left, right)  # without a second pass over the weight, as autograd takes
        self._waiting.clear()

    def _forward(self, layer: Any, is_transposed: bool, plain: Any, x: Tensor) -> Tensor:
        weight: nn.Parameter = layer.weight
        is_plain = torch.is_autocast_enabled(x.device.type) or x.dim() < 2 or not x.requires_grad
        if is_plain or not torch.is_grad_enabled() or not weight.requires_grad:
            given: Tensor = plain(x)
            return given
        constant = weight.detach()  # autograd computes no gradient for it
        rows = x.flatten(0, -2)
        out = F.linear(rows, constant.t() if is_transposed else constant, layer.bias)
        # On rows, not on what F.linear gives for more dims: that is a view, and a layer that changes a view in place,
        # as ReLU(inplace=True) does, takes its hooks away.
        out.register_hook(  # type: ignore[no-untyped-call]
            partial(self._keep, weight, is_transposed, rows.detach(), rows._version)
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    def _keep(self, weight: nn.Parameter, is_transposed: bool, rows: Tensor, version: int, grad: Tensor) -> None:
        if rows._version != version:  # autograd would say so, had it kept them
            raise RuntimeError("what a linear layer has been given was changed in place before its backward pass")
        self._waiting.append((weight, rows.t(), grad) if is_transposed else (weight, grad.t(), rows))


def _has_hooks(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "parametrizations" in layer._modules
