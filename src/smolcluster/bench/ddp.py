"""The other side of the comparison: torch's DistributedDataParallel, used as its documentation shows.

Model, optimizer and data are those of our side. The loop, the loss, autocast and clipping are plain torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smolcluster.config.schema import Config
from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.errors import ConfigError
from smolcluster.training.optim import optimizer_factory

_AUTOCAST = {"bf16": torch.bfloat16}


class DdpTraining:
    """One rank of DDP. The default process group must be there."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device, *, communicates: bool = True) -> None:
        """Take the model over; blocks until every rank has done so.

        Args:
            model: maps inputs to logits, (B, C) or (B, T, V).
            config: optimizer, precision and clipping.
            device: where to compute.
            communicates: False: every rank steps with its own gradient, to see what the same step takes without
                communication.

        Raises:
            ConfigError: a precision that DDP does not offer by itself.
        """
        training = config.training
        if training.precision not in ("fp32", "fp64", "bf16"):
            raise ConfigError(
                f"training.precision {training.precision}: the comparison with ddp has fp32, bf16 and fp64"
            )
        self._precision = training.precision
        self._device = device
        model = model.to(device=device, dtype=torch.float64 if training.precision == "fp64" else None).train()
        # The rest are DDP's defaults. This one saves it a copy of the gradients.
        self._model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._optimizer = optimizer_factory(training.optimizer, training.learning_rate, training.weight_decay)(
            self._params
        )
        self._grad_clip_norm = training.grad_clip_norm
        self._communicates = communicates

    def train_step(self, batches: Sequence[Batch]) -> float:
        """One update; this rank's mean loss. Blocks."""
        self._optimizer.zero_grad()
        loss_sum = torch.zeros((), device=self._device)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            with contextlib.nullcontext() if is_last and self._communicates else self._model.no_sync():
                loss = self._loss(batch) / len(batches)
                loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        if self._grad_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._params, self._grad_clip_norm)
        self._optimizer.step()
        return float(loss_sum)

    def _loss(self, batch: Batch) -> torch.Tensor:
        inputs, targets = batch.inputs.to(self._device), batch.targets.to(self._device)
        if self._precision == "fp64" and inputs.is_floating_point():
            inputs = inputs.double()
        half = _AUTOCAST.get(self._precision)
        with torch.autocast(self._device.type, dtype=half) if half is not None else contextlib.nullcontext():
            logits = self._model(inputs)
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NO_TARGET)
