"""A network with one hidden layer: the smallest model that learns to read digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smolcluster.errors import ConfigError
from smolcluster.models.init import InitRule, init_parameters
from smolcluster.models.stage import Layers


class SimpleNN(nn.Module):
    """Linear, ReLU, Linear. By default 784-128-10: 101 770 parameters."""

    def __init__(self, input_dim: int = 784, hidden: int = 128, out: int = 10, seed: int = 0) -> None:
        """Build and initialise the network.

        Args:
            input_dim: values of one sample, after flattening.
            hidden: width of the hidden layer.
            out: number of classes.
            seed: with the parameter's name it decides each parameter's initial value.
        """
        super().__init__()
        self.input_dim = input_dim
        self.hidden = nn.Linear(input_dim, hidden)
        self.out = nn.Linear(hidden, out)
        init_parameters(self, seed)

    def init_rule(self, name: str) -> InitRule:
        """torch's own default for Linear: weight and bias uniform within 1 / sqrt(fan in)."""
        layer = self.hidden if name.startswith("hidden.") else self.out
        return InitRule("uniform", layer.in_features**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            inputs: (B, ...) float; everything but the batch dim is flattened. B may be 0.

        Returns:
            (B, out).

        Raises:
            ConfigError: a sample has not `input_dim` values.
        """
        return self.forward_layers(inputs, range(3))

    def layers(self) -> Layers:
        """See models/stage.py; the entry flattens and has no parameters."""
        return Layers((), ("hidden",), ("out",))

    def forward_layers(self, x: Tensor, layers: range) -> Tensor:
        """(B, ...), (B, input_dim) or (B, hidden) to the next of these or logits (B, out); see models/stage.py."""
        for layer in layers:
            x = (self._flatten, self._hide, self.out)[layer](x)
        return x

    def _hide(self, x: Tensor) -> Tensor:
        return torch.relu(self.hidden(x))

    def _flatten(self, inputs: Tensor) -> Tensor:
        x = inputs.flatten(1)
        if x.shape[1] != self.input_dim:
            raise ConfigError(
                f"a sample of shape {tuple(inputs.shape[1:])} has {x.shape[1]} values, but model.input_dim is "
                f"{self.input_dim}. Set model.input_dim={x.shape[1]}, or choose another data.dataset"
            )
        return x
