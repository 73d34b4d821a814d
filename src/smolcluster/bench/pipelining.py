"""The other side of the comparison with mp_pipeline: torch.distributed.pipelining, used as its documentation shows.

Model, cut, optimizer and data are those of our side; each stage is a PipelineStage, and the schedule is torch's of the
same name. The loop, the loss and clipping are plain torch. Two things torch leaves to its user, and here they are done
in the plainest way: the gradient of a parameter that the first and the last stage share (a tied head) is summed by an
all-reduce of these two ranks, and the squares for the gradient's norm by one of all ranks.

Its buffers for activations have the shape of the first micro-batch, so all micro-batches must be alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from smolcluster.algorithms.pipeline import Pipeline
from smolcluster.collectives.base import Communicator
from smolcluster.config.schema import Config, resolved_batch_size, resolved_staleness_bound
from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.errors import ConfigError
from smolcluster.kinds import JsonObject
from smolcluster.models.stage import Stage, layer_parameters, layers_of, tied_parameters
from smolcluster.training.optim import optimizer_factory

AnySchedule = ScheduleGPipe | Schedule1F1B | ScheduleInterleaved1F1B


class PipeliningTraining:
    """One rank of torch's pipeline. The default process group must be there."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device, *, split: Sequence[range]) -> None:
        """Take the model over, whose weights are the same on every rank, and keep this rank's stages.

        Every rank calls it; blocks.

        Args:
            model: can be cut into stages; see models/stage.py.
            config: optimizer, precision, clipping, schedule and micro-batches.
            device: where to compute.
            split: the layers of each stage, over all ranks; stage s lies on rank s mod P.

        Raises:
            ConfigError: what torch's schedules do not offer.
        """
        check_offered(config, dist.get_world_size())
        training = config.training
        self._rank, self._last_rank = dist.get_rank(), dist.get_world_size() - 1
        self._device = device
        tied = tied_parameters(model, layers_of(model))
        _check_parameters(model, split, dist.get_world_size())
        modules = [
            (number, _StageModule(Stage(copy.deepcopy(model), layers)).to(device, _dtype(config)).train())
            for number, layers in enumerate(split)
            if number % dist.get_world_size() == self._rank
        ]
        named = {name: param for _, module in modules for name, param in module.stage_parameters().items()}
        self._params = [param for param in named.values() if param.requires_grad]
        self._tied = [named[name] for name in tied if name in named and named[name].requires_grad]
        # All ranks make the group, though only its two use it.
        self._ends = dist.new_group([0, self._last_rank]) if tied else None
        self._optimizer = optimizer_factory(training.optimizer, training.learning_rate, training.weight_decay)(
            self._params
        )
        self._grad_clip_norm = training.grad_clip_norm
        stages = [PipelineStage(module, number, len(split), device) for number, module in modules]
        self._schedule = _schedule(config, stages)

    def train_step(self, batches: Sequence[Batch]) -> float | None:
        """One update; the mean loss on the last rank, None elsewhere. Blocks.

        Args:
            batches: the whole batch in micro-batches, the same on every rank.
        """
        self._optimizer.zero_grad()
        losses: list[Tensor] = []
        inputs = [torch.cat([batch.inputs for batch in batches]).to(self._device)] if self._rank == 0 else []
        targets = None
        if self._rank == self._last_rank:
            targets = torch.cat([batch.targets for batch in batches]).to(self._device)
        self._schedule.step(*inputs, target=targets, losses=losses, return_outputs=False)
        for param in self._tied:
            assert param.grad is not None
            dist.all_reduce(param.grad, group=self._ends)
        if self._grad_clip_norm is not None:
            clip_grads_with_norm_(self._params, self._grad_clip_norm, self._grad_norm())
        self._optimizer.step()
        return float(torch.stack(losses).detach().sum()) if losses else None

    def _grad_norm(self) -> Tensor:
        """Of the whole model; a tied parameter, which two ranks have, counts on the first."""
        counted = {id(param) for param in self._params} - ({id(p) for p in self._tied} if self._rank else set())
        grads = [param.grad for param in self._params if param.grad is not None and id(param) in counted]
        square = get_total_norm(grads) ** 2
        dist.all_reduce(square)
        return square.sqrt()


class _StageModule(nn.Module):
    """A Stage as a module, which is what PipelineStage takes."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.layers = stage.module
        self._stage = stage

    def forward(self, x: Tensor) -> Tensor:
        return self._stage(x)

    def stage_parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the whole model, where a tied one has the same on both of its ranks."""
        return self._stage.parameters


def check_offered(config: Config, world_size: int) -> None:
    """Refuse what torch's pipeline has not.

    Raises:
        ConfigError: names the key, and what there is.
    """
    training = config.training
    if world_size < 2:
        raise ConfigError("--against torch_pipelining needs a second rank to pipeline with. Give --local 2 or more")
    if training.precision not in ("fp32", "fp64"):
        raise ConfigError(
            f"training.precision {training.precision}: the comparison with torch_pipelining has fp32 and fp64"
        )
    if resolved_batch_size(config) % training.micro_batches:
        raise ConfigError(
            f"training.batch_size {resolved_batch_size(config)} is not {training.micro_batches} micro-batches of one "
            "size, and torch's pipeline takes no others. Make it a multiple of training.micro_batches"
        )
    if training.schedule == "1f1b" and training.micro_batches < world_size:
        raise ConfigError(
            f"training.micro_batches {training.micro_batches}: torch's 1F1B wants as many as there are ranks, "
            f"{world_size}, or more"
        )
    if resolved_staleness_bound(config):
        raise ConfigError("torch's pipeline applies no gradient late. Set cluster.staleness_bound to 0")


def _check_parameters(model: nn.Module, split: Sequence[range], world_size: int) -> None:
    """Refuse a rank with nothing to train; every rank sees it."""
    every = layers_of(model)
    for rank in range(world_size):
        layers = [layer for stage in split[rank::world_size] for layer in stage]
        params = [param for layer in layers for param in layer_parameters(model, every, layer).values()]
        if not any(param.requires_grad for param in params):
            raise ConfigError(
                f"rank {rank} of {world_size} gets no parameters to train, and torch's optimizers take no empty list. "
                "Give fewer ranks, a model with more layers, or other numbers in cluster.layer_distribution"
            )


def split_of(strategy: Pipeline, comm: Communicator) -> list[range]:
    """The layers of each stage of our side. Every rank calls it; blocks."""
    own: JsonObject = {str(number): [layers.start, layers.stop] for number, layers in strategy.layers.items()}
    found = {int(n): ends for each in comm.exchange(own) for n, ends in cast("dict[str, list[int]]", each).items()}
    return [range(*found[number]) for number in range(len(found))]


def _schedule(config: Config, stages: Sequence[PipelineStage]) -> AnySchedule:
    """Torch's of the same name. It neither keeps the logits nor goes over the gradients again to scale them."""
    micro_batches, name = config.training.micro_batches, config.training.schedule
    loss = _mean_of(micro_batches)
    if name == "interleaved":
        return ScheduleInterleaved1F1B(list(stages), micro_batches, loss, scale_grads=False)
    kind = ScheduleGPipe if name == "gpipe" else Schedule1F1B
    [stage] = stages
    return kind(stage, micro_batches, loss, scale_grads=False)


def _mean_of(micro_batches: int) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        mean = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NO_TARGET)
        return mean / micro_batches

    return loss


def _dtype(config: Config) -> torch.dtype | None:
    return torch.float64 if config.training.precision == "fp64" else None
