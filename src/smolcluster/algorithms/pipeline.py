"""Pipeline parallelism: layers over ranks as in mp, and the batch in micro-batches, so that all ranks compute at once.

Idea      In mp all ranks but one wait. Here a batch is cut into M micro-batches: while rank 1 computes the first one,
          rank 0 computes the second. Who computes what in which order is a schedule, a table that is made, proved and
          printed before anything runs (training/pipeline_schedule.py); this file only follows it. What is left of the
          waiting is the bubble, at the beginning until the first micro-batch has reached the last rank, and at the end:
          the part (P-1) / (M+P-1) of the time. Every micro-batch weighs as much as it has targets, so none has to be
          full.
Step      1 zero_grad  2 forward and backward passes as the schedule says  3 agree on the gradient's norm 4
          optimizer.step on the own layers
Cost      as mp: what one stage gives the next goes up and down once per step, in M parts; with V stages a rank
          ("interleaved") V times as much, also from the last rank to the first. Bubble: (P-1) / (VM+P-1). Memory: a
          rank's layers, and the activations of M micro-batches ("gpipe") or of at most P ("1f1b", and a little more
          "interleaved"). Gradients of linear layers' weights are computed when those of a stage's inputs are on their
          way, so the bubble is a little smaller than that (training/late_weights.py).
Staleness K = 0: as plain training. K > 0: a gradient is applied K steps late, on all ranks alike; the pipeline is not
          drained at a step's end, so there is no bubble. Each step in flight has its own copy of the weights.
Breaks if M is small: with M = P almost half of the time is bubble. If one stage takes longer, all wait for it.
Source    Huang et al. 2019, GPipe, arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473, section 2.2
Try       smolcluster train --preset pipeline_gpt --local 3
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from smolcluster.collectives.base import Communicator
from smolcluster.errors import ConfigError
from smolcluster.kinds import PipelineSchedule, Precision
from smolcluster.models.partition import Unit
from smolcluster.training.optim import OptimizerFactory
from smolcluster.training.pipeline_schedule import Schedule, check_schedule, make_schedule
from smolcluster.training.schedule import LrSchedule
from smolcluster.training.staged import StagedStrategy
from smolcluster.training.step import MicroBatches, StepResult


class Pipeline(StagedStrategy):
    """Training of a model whose layers lie on several ranks, which compute different micro-batches at the same time."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_factory: OptimizerFactory,
        comm: Communicator,
        *,
        split: Sequence[range] | None = None,
        schedule: PipelineSchedule = "1f1b",
        stages_per_rank: int = 2,
        staleness_bound: int = 0,
        grad_clip_norm: float | None = None,
        lr_schedule: LrSchedule | None = None,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        skip_nonfinite: bool = False,
        values: Callable[[Unit], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Take the model over and give this rank its layers; see StagedStrategy.

        Args:
            split: the layers of each stage, over all ranks: P of them, or V * P if interleaved. None: by their costs.
            schedule: in which order passes run: "gpipe", "1f1b" or "interleaved".
            stages_per_rank: V, if interleaved and `split` does not say.

        Raises:
            ConfigError: the model cannot be cut so, or `split` has another number of stages.
        """
        per_rank = stages_per_rank if schedule == "interleaved" else 1
        if schedule == "interleaved" and split is not None:
            per_rank = max(1, len(split) // comm.world_size)
        super().__init__(
            model,
            optimizer_factory,
            comm,
            split=split,
            stages_per_rank=per_rank,
            staleness_bound=staleness_bound,
            grad_clip_norm=grad_clip_norm,
            lr_schedule=lr_schedule,
            precision=precision,
            device=device,
            skip_nonfinite=skip_nonfinite,
            values=values,
            has_late_weights=True,
        )
        self._schedule_name: PipelineSchedule = schedule
        self._schedule: Schedule | None = None

    def train_step(self, micro_batches: MicroBatches) -> StepResult | None:
        """Compute the gradient of one step's batch and apply the one that is due; see Strategy.

        Args:
            micro_batches: the whole batch, as Batches or (inputs, targets) pairs: M of them, of any sizes; the same on
                every rank. Inputs are looked at on the first rank, targets on the last one.

        Raises:
            TrainingStopped: the loss or the gradient is not finite; on all ranks at the same step.
            CollectiveMismatch: the rank before this one was given other micro-batches.
            PeerLost: a rank is gone.
        """
        # 1 zero_grad; with K > 0 also a copy of the weights
        step = self._begin(micro_batches)

        # 2 forward and backward passes, in the order of this rank's line of the table
        for direction, stage, micro in self._schedule_for(len(step.batches)).actions[self._comm.rank]:
            if direction == "F":
                self._forward(step, stage, micro)
            else:
                # A negative number is a micro-batch of a step before, of which there is none at the beginning.
                before, micro = divmod(micro, len(step.batches))
                if len(self._under_way) >= 1 - before:
                    self._backward(self._under_way[before - 1], stage, micro)

        # 3 agree on the sums, 4 step: with the oldest gradient, this one if K = 0
        return self._end()

    def _schedule_for(self, micro_batches: int) -> Schedule:
        """The table for so many micro-batches, proved."""
        if self._schedule is None or self._schedule.micro_batches != micro_batches:
            if self._schedule is not None and self._staleness_bound:
                raise ConfigError(
                    f"a step of {micro_batches} micro-batches after steps of {self._schedule.micro_batches}: with "
                    "staleness_bound above 0 the pipeline is never drained, so each step has as many. Pass some of 0 "
                    "samples"
                )
            self._schedule = make_schedule(
                self._schedule_name,
                self._comm.world_size,
                micro_batches,
                stages_per_rank=self._stages.number // self._comm.world_size,
                max_lag=self._staleness_bound * micro_batches,
            )
            check_schedule(self._schedule)
        return self._schedule
