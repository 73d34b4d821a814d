"""A model's gradients and weights as flat tensors, on their way to and from a parameter server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smolcluster.collectives.flat import FlatLayout
from smolcluster.training.step import LossScaler


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What a parameter server's messages carry: the parameters that are trained, each once."""
    return [param for param in model.parameters() if param.requires_grad]


def constants(model: nn.Module) -> list[Tensor]:
    """The rest of the model's state: frozen parameters and buffers. A worker gets the server's when it joins."""
    frozen = [param.detach() for param in model.parameters() if not param.requires_grad]
    return [*frozen, *(buffer.detach() for buffer in model.buffers())]


@torch.no_grad()
def take_constants(model: nn.Module, values: Sequence[Tensor]) -> None:
    """Copy the server's constants, if any came, in place."""
    for own, value in zip(constants(model), values, strict=bool(values)):
        own.copy_(value)


def flat_gradients(params: Sequence[nn.Parameter], layout: FlatLayout) -> tuple[list[Tensor], tuple[int, ...]]:
    """Copies of the parameters' gradients, flat on the CPU, and the numbers of those that have none."""
    grads = [param.grad for param in params]
    return layout.flatten(grads), tuple(number for number, grad in enumerate(grads) if grad is None)


def install_gradients(
    params: Sequence[nn.Parameter], flats: Sequence[Tensor], layout: FlatLayout, missing: Sequence[int]
) -> None:
    """Make views into flat gradients the parameters' own; None where nobody had one, as after a plain backward."""
    absent = set(missing)
    for number, (param, grad) in enumerate(zip(params, layout.parts(flats), strict=True)):
        param.grad = None if number in absent else grad.to(param.device)


def flat_weights(params: Sequence[nn.Parameter], layout: FlatLayout) -> list[Tensor]:
    """Copies of the parameters, flat on the CPU."""
    return layout.flatten([param.detach() for param in params])


@torch.no_grad()
def blend_weights(params: Sequence[nn.Parameter], flats: Sequence[Tensor], layout: FlatLayout, alpha: float) -> None:
    """Polyak's average with what came from the server: w <- (1 - alpha) * w_server + alpha * w, in place."""
    for param, weights in zip(params, layout.parts(flats), strict=True):
        weights = weights.to(param.device)
        if alpha == 0.0:
            param.copy_(weights)
        else:
            param.mul_(alpha).add_(weights, alpha=1.0 - alpha)


def unscale(flats: Sequence[Tensor], scaler: LossScaler) -> None:
    """Divide gradients by fp16's loss scale, in place, and let the scaler learn whether it was too large."""
    finite = True
    for flat in flats:
        flat.mul_(1.0 / scaler.scale)
        finite = finite and bool(torch.isfinite(flat).all())
    scaler.update(finite, scaler.scale)
