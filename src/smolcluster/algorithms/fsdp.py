"""Fully sharded data parallelism: ZeRO stages 0 to 3. Ranks share data and, stage by stage, their memory as well.

Idea      Data parallelism keeps everything N times: parameters, gradients, and the optimizer's state, which for AdamW
          is the largest part. Each element of it is needed on one rank only, the one that steps it. So all are laid
          flat in buckets, of which every rank owns an equal part. Stage 0 divides nothing. Stage 1 divides the
          optimizer: gradients are summed to their owners, who step and give the new parameters to all. Stage 2 also
          divides gradients: they leave after every micro-batch, and only the own part is kept. Stage 3 also divides
          the parameters: a unit (a block of the model) is gathered from its owners right before it computes, while
          the one before it still does, and is let go afterwards; an embedding or head that is larger than any unit
          is divided by rows and never whole (rows.py). What is computed is the same in all stages.
Step      1 zero_grad  2 forward/backward of each micro-batch: gathers (3), sums gradients to their owners (2, 3)
          3 sum gradients to their owners (1), or to all (0)  4 optimizer.step on the own part, gather parameters (1, 2)
Cost      S = bytes of all parameters, U = of its units, F of the first, L of the last; M = micro-batches, N = ranks.
          Each rank sends per step (N-1)/N times: stages 0 and 1 2 S, stage 2 (M + 1) S, stage 3 M S for gradients and
          (S - U) + 2 M U - M L - (M - 1) F for parameters. Of a matrix that is divided by rows each stripe is a unit,
          the last one L; where the model only looks rows up in it, these rows are all that is sent.
          Memory with fp32 AdamW: 16, 8 + 8/N, 4 + 12/N or 16/N bytes per parameter; in stages 2 and 3 also 2 (K + 1)
          buckets of gradients, in stage 3 also the rest and two units.
Staleness K = 0: as plain training. K > 0: a gradient is applied K steps late, on all ranks alike, and its sums have
          the time; each step keeps its gradients (their part, from stage 2 on). Parameters are never late.
Breaks if links are slow: stage 3 sends up to half as much again as stage 1. Every rank waits for the slowest: edp.
Source    Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 5; Zhao et al. 2023, PyTorch FSDP, arXiv:2304.11277
Try       smolcluster train --preset fsdp_gpt --local 3 --override cluster.fsdp_stage=3
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smolcluster.collectives.base import Communicator
from smolcluster.collectives.bucket import DEFAULT_BUCKET_BYTES
from smolcluster.collectives.codec import codec_for
from smolcluster.collectives.gather import UnitGather, UnitHooks
from smolcluster.collectives.rows import connect_tables
from smolcluster.collectives.scatter import ShardedGradients, StepShards
from smolcluster.data.batch import Batch
from smolcluster.errors import ConfigError
from smolcluster.kinds import Compression, Precision
from smolcluster.models.partition import Unit, split_into_units
from smolcluster.training.optim import OptimizerFactory
from smolcluster.training.schedule import LrSchedule
from smolcluster.training.sharded import (
    PendingShards,
    StepTotals,
    gather_parameter,
    held_bytes,
    load_pending_shards,
    load_sharded_state,
    make_shards,
    pending_shards,
    piece_squares,
    sharded_state,
    sum_totals,
)
from smolcluster.training.step import (
    EvalSums,
    LossScaler,
    MicroBatches,
    Shard,
    StateReader,
    StepResult,
    as_batches,
    count_targets,
    evaluate_batch,
    evaluating,
    filled,
    forward_backward,
    is_applicable,
    scale_gradients,
)


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    """A step whose gradient is computed here but perhaps not yet summed."""

    gradients: StepShards
    own: StepTotals
    planned: int
    loss_scale: float


class FSDP:
    """Data-parallel training in which ranks share the memory of the optimizer, the gradients and the parameters."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_factory: OptimizerFactory,
        comm: Communicator,
        *,
        stage: int = 1,
        staleness_bound: int = 0,
        compression: Compression = "none",
        grad_clip_norm: float | None = None,
        lr_schedule: LrSchedule | None = None,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        skip_nonfinite: bool = False,
        values: Callable[[Unit], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Take the model over, and give it rank 0's weights and buffers. Blocks until every rank has done so.

        Args:
            model: maps inputs to logits, (B, C) or (B, T, V). Read its weights through `strategy.model`; in stage 3
                it has none between steps, see `whole_parameter`.
            optimizer_factory: makes the optimizer from the parameters to step: flat pieces of the model's, from stage
                1 on. So it must treat each element alike (SGD, Adam, AdamW do).
            comm: the ranks that train together.
            stage: what they share: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also parameters.
            staleness_bound: K, the steps by which a gradient is applied late.
            compression: what gradients are encoded as on the wire; here without making up for what that loses.
            grad_clip_norm: bound of the global gradient norm; None: never clipped.
            lr_schedule: learning rate of update i; None: what the optimizer has.
            precision: "fp64" converts the model; "bf16" and "fp16" compute under autocast, with float32 in what each
                rank owns, and gather the matrices in half precision.
            device: where this rank computes; ranks may differ.
            bucket_bytes: bytes of parameters that travel together.
            skip_nonfinite: pass over updates that are not finite instead of stopping.
            values: the parameters of a unit by name, where the model's lie on the meta device: the whole of it is then
                on no rank. The same on every rank.
        """
        if stage not in (0, 1, 2, 3):
            raise ConfigError(f"stage is {stage}; ZeRO has stages 0, 1, 2 and 3")
        # The four stages: the rest of this file asks only these three.
        self._shares_optimizer = stage >= 1
        self._shares_gradients = stage >= 2
        self._shares_parameters = stage >= 3
        self._model = model
        self._comm = comm
        self._units = split_into_units(model)
        self._names, self._aliases, self._shards = make_shards(
            model,
            self._units,
            comm,
            bucket_bytes=bucket_bytes,
            precision=precision,
            device=device,
            is_divided=self._shares_optimizer,
            is_freed=self._shares_parameters,
            values=values,
        )
        self._pieces = [piece for piece in self._shards.pieces if piece.param.requires_grad]
        # Where there is less than one element for each rank, some own nothing; optimizers want something to step.
        owned = [piece.param for piece in self._pieces] or [nn.Parameter(torch.empty(0, device=device))]
        self._optimizer = optimizer_factory(owned)
        # Gathers have connections of their own: what forward and backward wait for must not queue behind gradients.
        lane = comm.split(range(comm.world_size), "gather") if self._shares_optimizer else comm
        assert lane is not None
        self._gather = UnitGather(self._shards, lane)
        modules = [unit.module for unit in self._units[1:]]
        self._hooks = UnitHooks(model, modules, self._gather, frees=self._shares_parameters)
        self._gradients = ShardedGradients(
            self._shards,
            comm,
            keeps_whole=not self._shares_gradients,
            codec=codec_for(compression),
            sets=staleness_bound + 1,
            on_done=self._hooks.done,
            is_here=self._gather.is_here,
        )
        # A large embedding or head is never whole in stage 3: see rows.py.
        connect_tables(self._shards, self._gather, self._hooks, self._gradients)
        self._staleness_bound = staleness_bound
        self._grad_clip_norm = grad_clip_norm
        self._lr_schedule = lr_schedule
        self._precision = precision
        self._device = device
        self._skip_nonfinite = skip_nonfinite
        self._scaler = LossScaler() if precision == "fp16" else None
        self._under_way: deque[_StepUnderWay] = deque()
        self._norms: deque[dict[str, float]] = deque(maxlen=staleness_bound + 1)
        self._step = 0
        self._is_stop_requested = False

    @property
    def model(self) -> nn.Module:
        """The model, with all parameters up to date; in stage 3 without them. There every rank has to call it."""
        self._gather.settle()
        return self._model

    def train_step(self, micro_batches: MicroBatches) -> StepResult | None:
        """Compute this rank's share of one step's gradient and apply the one that is due; see Strategy.

        Args:
            micro_batches: this rank's share, as Batches or (inputs, targets) pairs; perhaps of 0 samples. In stages 2
                and 3 as many on every rank.

        Raises:
            TrainingStopped: the loss or the gradient is not finite; on all ranks at the same step.
            PeerLost: a rank is gone.
        """
        batches = as_batches(micro_batches)
        count = count_targets(batches)
        samples = sum(batch.samples for batch in batches)
        # Unknown on a rank means unknown on all. Alone, this rank's targets are all there are.
        planned = batches[0].planned_count or (max(count, 1) if self._comm.world_size == 1 else 1)
        loss_scale = self._scaler.scale if self._scaler else 1.0

        # 1 zero_grad
        self._comm.telemetry.step = self._step
        self._gradients.begin(self._step)

        # 2 forward, backward: in stage 3 the model's hooks gather each unit before it computes
        losses = []
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            if self._shares_gradients or is_last:
                # 3 communicate: from now on gradients leave for their owners (stage 0: for all) as backward fills them
                self._gradients.arm(counts=not self._is_for_others(batch))
            losses.append(self._forward_backward(batch, loss_scale / planned))
            self._gradients.flush()
            if not is_last:
                self._hooks.end_of_backward()
        self._hooks.leave()

        loss_sum = float(torch.stack(losses).sum())
        own = StepTotals(loss_sum, count, samples, planned, int(not math.isfinite(loss_sum)), self._is_stop_requested)
        self._under_way.append(_StepUnderWay(self._gradients.end(), own, planned, loss_scale))
        self._step += 1
        if len(self._under_way) <= self._staleness_bound:
            self._hooks.prefetch()
            return None

        # 4 step, with the oldest gradient: this one if K = 0
        return self._apply(self._under_way.popleft())

    def _is_for_others(self, batch: Batch) -> bool:
        """Whether there is nothing to compute, but the other ranks gather, and wait for this rank's parts."""
        return self._shares_parameters and not batch.samples

    def _forward_backward(self, batch: Batch, scale: float) -> Tensor:
        is_for_others = self._is_for_others(batch)
        if is_for_others:
            batch = filled(batch)
        with evaluating(self._model) if is_for_others else contextlib.nullcontext():
            return forward_backward(
                self._model, [batch], scale, self._precision, device=self._device, telemetry=self._comm.telemetry
            )

    def _apply(self, due: _StepUnderWay) -> StepResult:
        """Wait for this rank's part of the sum, agree on its norm, clip, step, and let all have the new parameters."""
        due.gradients.wait()
        grads = due.gradients.grads(self._pieces)
        # Each element is owned once (in stage 0 by all): the squares of all owners' norms add up to the global norm's.
        sums = sum_totals(due.own, due.gradients, piece_squares(self._pieces, grads, self._shards), self._comm)
        step = due.gradients.step
        loss = sums.loss_sum / max(sums.count, 1)
        correction = due.planned / max(sums.count, 1) / due.loss_scale
        grad_norm = math.inf if sums.nonfinite else math.sqrt(sum(sums.squares)) * correction
        scale_gradients(grads, grad_norm, self._grad_clip_norm, correction)
        for piece, grad in zip(self._pieces, grads, strict=True):
            # Where no rank has a gradient, plain PyTorch has none either, and AdamW then decays nothing.
            piece.param.grad = grad if sums.has_grad[piece.index] else None
        if self._lr_schedule is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr_schedule(step)
        lr = float(self._optimizer.param_groups[0]["lr"])
        is_applied = sums.count > 0 and is_applicable(
            step,
            loss,
            grad_norm,
            lr,
            scaler=self._scaler,
            loss_scale=due.loss_scale,
            skip_nonfinite=self._skip_nonfinite,
        )
        if is_applied:
            self._gather.settle()  # what is being sent must not change
            self._optimizer.step()
            self._norms.append({self._names[i]: math.sqrt(s) * correction for i, s in enumerate(sums.squares) if s > 0})
            if self._shares_optimizer:
                self._gather.expire()
        # Stages 1 and 2: all parameters; stage 3: the first unit. While the next batch is made, and its forward begins.
        self._hooks.prefetch()
        return StepResult(step, loss, sums.count, sums.samples, grad_norm, lr, is_applied, sums.stop_votes > 0)

    def eval_step(self, batch: Batch) -> EvalSums:
        """Loss sum, target count and correct predictions of one batch on this rank; changes nothing.

        In stage 3 every rank calls it equally often, if need be with batches of 0 samples.
        """
        if self._is_for_others(batch):
            evaluate_batch(self._model, filled(batch), self._precision, self._device)
        return evaluate_batch(self._model, batch, self._precision, self._device)

    def finish(self) -> list[StepResult]:
        """Apply what is still under way, in order; their results, oldest first."""
        results = [self._apply(self._under_way.popleft()) for _ in range(len(self._under_way))]
        self._hooks.leave()
        self._gather.settle()
        return results

    def request_stop(self) -> None:
        """Vote for stopping, with the next step's sums; from any thread."""
        self._is_stop_requested = True

    @property
    def holds_whole_model(self) -> bool:
        """Whether `model` has all parameters, in their full precision."""
        return not self._shards.is_freed and not self._shards.is_halved

    @property
    def parameters(self) -> int:
        """How many numbers the whole model has, tied ones once."""
        return sum(bucket.used for bucket in self._shards.buckets)

    def take_gradient_norms(self) -> dict[str, float] | None:
        """The norm of each parameter's gradient before clipping, of the oldest update not asked for; None: no more."""
        return self._norms.popleft() if self._norms else None

    def whole_parameter(self, name: str) -> Tensor | None:
        """A parameter as it is now, in its shape, on rank 0; None elsewhere. Every rank calls it; blocks.

        Raises:
            KeyError: the model has no such parameter.
            PeerLost: a rank is gone.
        """
        return gather_parameter(self._shards, self._names.index(self._aliases.get(name, name)))

    def held_bytes(self) -> tuple[int, int, int]:
        """Bytes of parameters, gradients and optimizer state that this rank has held at most, all at once."""
        parameters, gradients = self._gather.peak_bytes, self._gradients.peak_bytes
        return held_bytes(self._shards, self._gradients.kept, self._optimizer, parameters, gradients)

    def state(self) -> dict[str, Shard]:
        """What this rank owns: parts of weights and optimizer state, and of the summed gradients that wait."""
        shards = sharded_state(
            self._model, self._shards, self._optimizer, self._names, self._aliases, self._scaler, self._comm
        )
        waiting = []
        for item in self._under_way:
            item.gradients.wait()
            sums = sum_totals(item.own, item.gradients, [0.0] * len(self._names), self._comm)
            grads = item.gradients.grads(self._pieces)
            waiting.append(PendingShards(item.gradients.step, sums, item.planned, item.loss_scale, grads))
        return shards | pending_shards(waiting, self._pieces, self._names, self._shards, self._comm)

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint; see Strategy."""
        load_sharded_state(reader, self._model, self._shards, self._optimizer, self._names, self._aliases, self._scaler)
        if self._shares_optimizer:
            self._gather.expire()
            self._hooks.prefetch()
        for item in load_pending_shards(reader, self._pieces, self._names, self._gradients, self._comm):
            self._under_way.append(_StepUnderWay(item.gradients, item.own, item.planned, item.loss_scale))
        self._step = reader.step + len(self._under_way)
