"""How long this machine takes for each layer of a model: measured, for ranks of unequal speed."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smolcluster.kinds import Precision
from smolcluster.models.split import LayerCost
from smolcluster.models.stage import Layers, Stage
from smolcluster.training.step import AUTOCAST_DTYPES

# The first round brings memory and kernels up; of the others the fastest counts, as everything else is disturbance.
_ROUNDS = 4
_STD = 0.02


def measure_layers(
    model: nn.Module,
    layers: Layers,
    costs: Sequence[LayerCost],
    inputs: Tensor,
    precision: Precision,
    device: torch.device | str,
) -> list[float]:
    """Seconds that forward and backward of each layer take here.

    The entry, the first block and the exit are measured, with random weights, one after the other; other blocks are
    taken to differ from the first as their costs do. Blocks for some steps' time.

    Args:
        model: on the meta device; it stays as it is.
        layers: the model's.
        costs: by size, of each layer.
        inputs: some samples, as many as a micro-batch has.
        precision: of the run.
        device: where to compute.
    """
    x = inputs.double() if precision == "fp64" and inputs.is_floating_point() else inputs
    x = x.to(device)
    found: dict[int, float] = {}
    for layer in (0, 1, len(layers) - 1) if layers.blocks else (0, len(layers) - 1):
        stage = Stage(copy.deepcopy(model), range(layer, layer + 1))
        _fill(stage, precision, device)
        found[layer], x = _time(stage, x, precision)
    if not layers.blocks:
        return [found[0], found[1]]
    blocks = [found[1] * costs[layer].time / costs[1].time for layer in range(1, len(layers) - 1)]
    return [found[0], *blocks, found[len(layers) - 1]]


def _fill(stage: Stage, precision: Precision, device: torch.device | str) -> None:
    made: dict[int, nn.Parameter] = {}
    for module in stage.module.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in made:
                    dtype = torch.float64 if precision == "fp64" and param.is_floating_point() else param.dtype
                    values = torch.empty(param.shape, dtype=dtype, device=device).normal_(0.0, _STD)
                    made[id(param)] = nn.Parameter(values)
                module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                is_wide = precision == "fp64" and buffer.is_floating_point()
                module._buffers[name] = buffer.to(device, torch.float64 if is_wide else None)


def _time(stage: Stage, x: Tensor, precision: Precision) -> tuple[float, Tensor]:
    half = AUTOCAST_DTYPES.get(precision)
    fastest = float("inf")
    for _ in range(_ROUNDS):
        given = x.detach().clone()
        if given.is_floating_point() and not stage.is_first:
            given.requires_grad_()
        begin = time.perf_counter()
        with torch.autocast(given.device.type, dtype=half, enabled=half is not None):
            out = stage(given)
        if out.requires_grad:
            out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
        float(out.flatten()[0].detach())  # a GPU is done when somebody looks
        fastest = min(fastest, time.perf_counter() - begin)
    return fastest, out.detach()
