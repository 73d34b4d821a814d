"""How large each parameter's gradient is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smolcluster.kinds import JsonObject

_HALF = (torch.float16, torch.bfloat16)


class GradientNorms:
    """The columns `grad_norm/<parameter>` of a row: norms before clipping, whose root of squares is `train/grad_norm`.

    They are taken when the optimizer is about to step, and not when the row is written: at the end of a run with K > 0
    all pending gradients are applied before the first of their rows. Tied parameters count once, under the first name.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Listen to `optimizer`, which steps the parameters of `model`."""
        self._names = {param: name for name, param in model.named_parameters()}
        self._taken: deque[dict[str, float]] = deque()
        optimizer.register_step_pre_hook(self._take)

    def row(self, row: JsonObject) -> JsonObject:
        """The columns for the row of an update, in the order of the updates; none for one that was not applied."""
        true_norm = row.get("train/grad_norm")
        if not _is_applied(row) or not self._taken:
            return {}
        assert isinstance(true_norm, float)
        norms = self._taken.popleft()
        # What the optimizer sees is clipped; the global norm is from before, and tells by how much.
        factor = true_norm / sum(norm * norm for norm in norms.values()) ** 0.5
        return {f"grad_norm/{name}": norm * factor for name, norm in norms.items()}

    def _take(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grads = {
            self._names[param]: param.grad
            for group in optimizer.param_groups
            for param in group["params"]
            if param.grad is not None
        }
        norms = dict(zip(grads, _norms(list(grads.values())), strict=True))
        if any(norms.values()):  # a gradient of zeros has `train/grad_norm` 0, as a step without targets has
            self._taken.append(norms)


class ReportedNorms:
    """The same columns where the algorithm knows the norms, since no rank has a whole gradient."""

    def __init__(self, take: Callable[[], dict[str, float] | None]) -> None:
        """`take` gives those of the oldest update that it was not asked for."""
        self._take = take

    def row(self, row: JsonObject) -> JsonObject:
        """The columns for the row of an update, in the order of the updates; none for one that was not applied."""
        if not _is_applied(row):
            return {}
        return {f"grad_norm/{name}": norm for name, norm in (self._take() or {}).items()}


def _is_applied(row: JsonObject) -> bool:
    norm = row.get("train/grad_norm")
    return isinstance(norm, float) and norm > 0 and isinstance(row.get("train/loss"), float)


def _norms(grads: Sequence[Tensor]) -> list[float]:
    """Each gradient's norm; waits for the device once."""
    if not grads:
        return []
    # A norm in a gradient's own half precision would have two or three digits. Apple's MPS has no float64.
    widest = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    norms = [torch.linalg.vector_norm(grad.float() if grad.dtype in _HALF else grad).to(widest) for grad in grads]
    return torch.stack(norms).tolist()
