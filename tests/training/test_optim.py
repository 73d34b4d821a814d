from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from smolcluster.errors import ConfigError
from smolcluster.training.optim import optimizer_factory


def weights_after(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    # 67 is no multiple of a vector register: a fused kernel computes the rest in another way.
    params = [nn.Parameter(torch.randn(n, 67, generator=generator).to(dtype)) for n in (1, 5)]
    optimizer = make(params)
    for _ in range(50):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (
            optimizer_factory("adamw", 1e-3, 0.1),
            lambda params: torch.optim.AdamW(
                params, 1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False
            ),
        ),
        (
            optimizer_factory("sgd", 1e-2, 0.1, momentum=0.9),
            lambda params: torch.optim.SGD(params, 1e-2, momentum=0.9, weight_decay=0.1, foreach=False),
        ),
    ],
    ids=["adamw", "sgd"],
)
def test_the_numbers_are_those_of_torchs_plain_optimizer(
    ours: Any, plain: Any, dtype: torch.dtype, tolerance: float
) -> None:
    for mine, theirs in zip(weights_after(ours, dtype), weights_after(plain, dtype), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=tolerance)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.optimizer is 'lion'. Set it to adamw or sgd"):
        optimizer_factory("lion", 1e-3)
