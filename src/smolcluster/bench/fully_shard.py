"""The other side of the comparison with fsdp: torch's fully_shard (FSDP2), used as its documentation shows.

Model, optimizer and data are those of our side, and so are the units: each is sharded by itself, then the model, for
what is in none of them. The loop, the loss, mixed precision and clipping are plain torch. Our stages are, of it:

3    its default: a unit is freed after its forward, and gathered again for its backward
2    reshard_after_forward=False; what is gathered is kept until the last micro-batch's backward
1    the same, and gradients are reduced in the last micro-batch only

It has nothing for stage 0, which shards nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from smolcluster.config.schema import Config
from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.errors import ConfigError
from smolcluster.models.partition import split_into_units
from smolcluster.training.optim import optimizer_factory

# What is sharded stays float32, which the optimizer steps; with fp64 the model itself is converted.
_POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "fp64": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


class FullyShardTraining:
    """One rank of fully_shard. The default process group must be there."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device, *, communicates: bool = True) -> None:
        """Take the model over, whose weights are the same on every rank. Every rank calls it; blocks.

        Args:
            model: maps inputs to logits, (B, C) or (B, T, V).
            config: optimizer, precision, clipping and stage.
            device: where to compute.
            communicates: False: every rank is a mesh of its own, to see what the same step takes without
                communication. It then holds all parameters and steps them all.

        Raises:
            ConfigError: a precision or a stage that fully_shard does not offer.
        """
        training, self._stage = config.training, config.cluster.fsdp_stage
        _check_offered(config)
        self._is_double = training.precision == "fp64"
        self._device = device
        model = model.to(device=device, dtype=torch.float64 if self._is_double else None).train()
        # Two axes, one of all ranks and one of length 1: along it every rank is by itself.
        meshes = init_device_mesh(device.type, (dist.get_world_size(), 1), mesh_dim_names=("all", "alone"))
        mesh = meshes["all" if communicates else "alone"]
        self._model = model
        self._sharded = _shard(model, mesh, _POLICIES[training.precision], frees=self._stage == 3)  # the same object
        self._params = [param for param in model.parameters() if param.requires_grad]
        # DTensors take the fused kernel of our side too, which is a third of the time of torch's default on the CPU.
        self._optimizer = optimizer_factory(training.optimizer, training.learning_rate, training.weight_decay)(
            self._params
        )
        self._grad_clip_norm = training.grad_clip_norm

    def train_step(self, batches: Sequence[Batch]) -> float:
        """One update; this rank's mean loss. Blocks."""
        self._optimizer.zero_grad()
        loss_sum = torch.zeros((), device=self._device)
        for number, batch in enumerate(batches):
            if len(batches) > 1:
                self._prepare_backward(is_last=number == len(batches) - 1)
            loss = self._loss(batch) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        if self._grad_clip_norm is not None:
            # A DTensor, of which every rank has its part until clipping needs the whole. Nobody asks for the number.
            torch.nn.utils.clip_grad_norm_(self._params, self._grad_clip_norm)
        self._optimizer.step()
        return float(loss_sum)

    def _prepare_backward(self, *, is_last: bool) -> None:
        """What the documentation has for several micro-batches: do, or keep, only what the stage says."""
        self._sharded.set_is_last_backward(is_last)
        self._sharded.set_requires_gradient_sync(is_last or self._stage > 1)
        # In stage 3 only the rest of the model is kept, as on our side.
        self._sharded.set_reshard_after_backward(is_last, recurse=self._stage < 3)

    def _loss(self, batch: Batch) -> torch.Tensor:
        inputs, targets = batch.inputs.to(self._device), batch.targets.to(self._device)
        if self._is_double and inputs.is_floating_point():
            inputs = inputs.double()
        logits = self._model(inputs).flatten(0, -2)
        logits = logits if self._is_double else logits.float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=NO_TARGET)


def _check_offered(config: Config) -> None:
    """Refuse a precision or a stage that fully_shard has not.

    Raises:
        ConfigError: names the key, and what there is.
    """
    if config.training.precision not in _POLICIES:
        raise ConfigError(
            f"training.precision {config.training.precision}: the comparison with fully_shard has fp32, bf16 and fp64"
        )
    if config.cluster.fsdp_stage == 0:
        raise ConfigError("cluster.fsdp_stage 0 shards nothing, fully_shard always does. Use --against ddp, or stage 1")


def _shard(model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, *, frees: bool) -> FSDPModule:
    """fully_shard on each unit, then on the model; `frees`: units are freed after their forward."""
    # None is its default: True, but for the model itself, with which backward begins.
    reshards = None if frees else False
    for unit in split_into_units(model)[1:]:
        # What shares a parameter with another unit, or is a list in a list, is refused, and so stays with the rest.
        owns_all = len(list(unit.module.parameters())) == len(unit.parameters)
        if owns_all and type(unit.module).forward is not nn.Module.forward:
            fully_shard(unit.module, mesh=mesh, reshard_after_forward=reshards, mp_policy=policy)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshards, mp_policy=policy)
