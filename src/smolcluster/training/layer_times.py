"""How long this machine takes for each layer of a model: measured, for ranks of unequal speed."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

from smolcluster.kinds import Precision
from smolcluster.models.stage import Layers, Stage
from smolcluster.training.modules import move_buffers
from smolcluster.training.step import AUTOCAST_DTYPES

# The first round brings memory and kernels up; of the others the fastest counts, as everything else is disturbance. A
# layer of some microseconds gets more of them, as a tick of the system is longer than all four.
_LEAST_ROUNDS, _MOST_ROUNDS = 4, 50
_LEAST_SECONDS = 0.02
_STD = 0.02


def measure_layers(
    model: nn.Module,
    layers: Layers,
    inputs: Tensor,
    precision: Precision,
    device: torch.device | str,
) -> list[float]:
    """Seconds that forward and backward of each layer take here.

    Each is measured with random weights, on what the one before gives; of blocks that are alike only the first. Blocks
    for some steps' time.

    Args:
        model: it stays as it is; its values are not looked at.
        layers: the model's.
        inputs: some samples, as many as a micro-batch has.
        precision: of the run.
        device: where to compute.
    """
    x = inputs.double() if precision == "fp64" and inputs.is_floating_point() else inputs
    x = x.to(device)
    # Values are of no use, and a copy of them would be one more.
    on_meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, dict(on_meta))
    kinds = {_kind(skeleton.get_submodule(name)) for name in layers.blocks}
    last = len(layers) - 1
    measured = {0, 1, last} if len(kinds) <= 1 else set(range(len(layers)))
    found: dict[int, float] = {}
    for layer in sorted(measured):
        stage = Stage(copy.deepcopy(skeleton), range(layer, layer + 1))
        _fill(stage, precision, device)
        found[layer], x = _time(stage, x, precision)
    return [found[layer] if layer in found else found[1] for layer in range(len(layers))]


def _kind(block: nn.Module) -> tuple[object, ...]:
    """Blocks of one kind take equally long."""
    return type(block), *(tuple(param.shape) for param in block.parameters())


def _fill(stage: Stage, precision: Precision, device: torch.device | str) -> None:
    move_buffers(stage.module, device, precision)
    made: dict[int, nn.Parameter] = {}
    for module in stage.module.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in made:
                    dtype = torch.float64 if precision == "fp64" and param.is_floating_point() else param.dtype
                    values = torch.empty(param.shape, dtype=dtype, device=device).normal_(0.0, _STD)
                    made[id(param)] = nn.Parameter(values)
                module._parameters[name] = made[id(param)]


def _time(stage: Stage, x: Tensor, precision: Precision) -> tuple[float, Tensor]:
    half = AUTOCAST_DTYPES.get(precision)
    fastest, total, rounds = float("inf"), 0.0, 0
    while rounds < _LEAST_ROUNDS or (rounds < _MOST_ROUNDS and total < _LEAST_SECONDS):
        given = x.detach().clone()
        if given.is_floating_point() and not stage.is_first:
            given.requires_grad_()
        begin = time.perf_counter()
        with torch.autocast(given.device.type, dtype=half, enabled=half is not None):
            out = stage(given.clone())  # a module that works in place may not do so on a leaf
        if out.requires_grad:
            out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
        float(out.flatten()[0].detach())  # a GPU is done when somebody looks
        seconds = time.perf_counter() - begin
        fastest, total, rounds = min(fastest, seconds), total + seconds, rounds + 1
    return fastest, out.detach()
