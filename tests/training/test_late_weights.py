"""Gradients of weights that are computed after those of activations: what autograd gives, and not before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from smolcluster.training.late_weights import LateWeights

WIDTH = 6


class Conv1D(nn.Module):
    """The linear layer of transformers' GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(x.shape)


class ChangesAPart(nn.Module):
    """Changes a view of what it is given in place."""

    def forward(self, x: Tensor) -> Tensor:
        x[..., : WIDTH // 2].tanh_()
        return x


def make_module(kind: str) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, bias=kind != "without bias", dtype=torch.float64)
    if kind == "transposed":
        return nn.Sequential(Conv1D(), nn.Tanh(), linear)
    if kind == "twice":
        return nn.Sequential(linear, nn.Tanh(), linear)
    if kind == "in place":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.ReLU(inplace=True), linear)
    if kind == "a part in place":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), ChangesAPart(), linear, ChangesAPart())
    if kind == "frozen weight":
        linear.weight.requires_grad_(False)
    if kind == "frozen bias":
        linear.bias.requires_grad_(False)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Tanh(), linear)


def backward(module: nn.Module, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Forward and backward of drawn inputs; their gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


def grads(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["rows", "sequences"])
@pytest.mark.parametrize(
    "kind",
    ["plain", "without bias", "transposed", "twice", "in place", "a part in place", "frozen weight", "frozen bias"],
)
def test_gradients_are_those_of_autograd_over_several_micro_batches(kind: str, shape: tuple[int, ...]) -> None:
    plain = make_module(kind)
    module = copy.deepcopy(plain)
    late = LateWeights(module)
    for seed in range(3):
        expected, found = backward(plain, seed, shape), backward(module, seed, shape)
        late.compute()
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        for name, grad in grads(plain).items():
            torch.testing.assert_close(grads(module)[name], grad, rtol=1e-13, atol=1e-13)


def test_weights_wait_until_they_are_computed() -> None:
    module = make_module("plain")
    late = LateWeights(module)
    backward(module, 0, (2, 3))
    assert {name for name, grad in grads(module).items() if grad is None} == {"0.weight", "2.weight"}
    late.compute()
    first = grads(module)
    assert all(grad is not None for grad in first.values())
    late.compute()  # nothing waits any more
    assert all(torch.equal(grads(module)[name], grad) for name, grad in first.items() if grad is not None)


def test_inputs_that_were_changed_in_place_are_noticed_as_autograd_does() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            out: Tensor = self.linear(x)
            x.add_(1)
            return out + x

    module = InPlace()
    x = torch.randn(3, WIDTH, requires_grad=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"in.?place"):
            module(x).sum().backward()
        LateWeights(module)


def test_what_autograd_or_a_hook_is_to_see_does_not_wait() -> None:
    hooked = nn.Linear(WIDTH, WIDTH)
    seen: list[Tensor] = []
    hooked.register_forward_hook(lambda _module, _args, out: seen.append(out))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    x = torch.randn(3, WIDTH, requires_grad=True)
    for layer in (hooked, normed):
        late = LateWeights(layer)
        layer(x).sum().backward()
        assert all(param.grad is not None for param in layer.parameters())
        late.compute()
    assert len(seen) == 1
    cast = nn.Linear(WIDTH, WIDTH)
    LateWeights(cast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cast(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert cast.weight.grad is not None
    with torch.no_grad():
        assert not cast(x).requires_grad
