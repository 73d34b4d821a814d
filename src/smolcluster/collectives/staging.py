"""Tensors that are not in CPU memory (CUDA, MPS) pass through a CPU copy on their way to the network and back."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Staging(Protocol):
    """Moves tensors between their device and host memory."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """The tensor itself if it is in host memory, else a copy there."""
        ...

    def from_host(self, host: Tensor, tensor: Tensor) -> None:
        """Copy back what `to_host` made; nothing to do if it was the tensor itself."""
        ...


class DeviceStaging:
    """CPU tensors are used in place; CUDA goes through pinned memory, every other device through plain memory."""

    def to_host(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        # empty_like keeps the shape; pinned memory lets CUDA copy without a bounce buffer.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda")
        host.copy_(tensor)  # synchronous: the values are there when it returns
        return host

    def from_host(self, host: Tensor, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            tensor.copy_(host)
