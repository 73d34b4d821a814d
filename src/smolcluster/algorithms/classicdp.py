"""Classic data parallelism: every rank holds the whole model and averages gradients.

Idea      All ranks start from rank 0's weights. In every step each rank computes the gradient of its own share of the
          global batch, and an all-reduce adds the shares up. Since all then hold the same sum and step the same
          optimizer, the replicas stay equal without ever sending weights again. Gradients travel in buckets while
          backward still computes the rest. Each share is scaled by the planned number of targets of the whole batch
          and the sum corrected by planned/actual, so ranks may compute unequally many.
Step      1 zero_grad  2 forward/backward on own micro-batches  3 all_reduce buckets  4 optimizer.step
Cost      each rank sends 2(N-1)/N * S bytes per step (S = gradient bytes); memory: full replica, and K + 2 gradients
Staleness K = 0: all ranks equal after every step. K > 0: a gradient is applied K steps late, on all ranks alike, and
          the network has K steps of time to carry it. K buys time, not accuracy.
Breaks if one link is 10x slower than the rest (everyone waits for it): use edp.
Source    Li et al. 2020, PyTorch Distributed, arXiv:2006.15704, sections 3.2 and 4.2
Try       smolcluster train --preset classicdp_mnist --local 2
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import nn

from smolcluster.collectives.base import Communicator
from smolcluster.collectives.bucket import DEFAULT_BUCKET_BYTES, GradientBuckets, StepGradients, StepSums
from smolcluster.collectives.codec import codec_for
from smolcluster.data.batch import Batch
from smolcluster.kinds import Compression, Precision
from smolcluster.training.optim import OptimizerFactory, load_optimizer_state, optimizer_state
from smolcluster.training.residual import load_residuals, residual_state
from smolcluster.training.schedule import LrSchedule
from smolcluster.training.step import (
    SCALER,
    EvalSums,
    LossScaler,
    MicroBatches,
    PendingGradient,
    Shard,
    StateReader,
    StepResult,
    as_batches,
    clip_gradients,
    count_targets,
    evaluate_batch,
    forward_backward,
    is_applicable,
    load_model_state,
    model_state,
    pending_state,
    prepare_model,
    read_pending,
)


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    """A step whose gradient is computed here but perhaps not yet reduced."""

    gradients: StepGradients
    planned: int
    loss_scale: float


class ClassicDP:
    """Data-parallel training with an all-reduce of the gradients."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_factory: OptimizerFactory,
        comm: Communicator,
        *,
        staleness_bound: int = 0,
        compression: Compression = "none",
        grad_clip_norm: float | None = None,
        lr_schedule: LrSchedule | None = None,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        skip_nonfinite: bool = False,
    ) -> None:
        """Take the model over, and give it rank 0's weights and buffers. Blocks until every rank has done so.

        Args:
            model: maps inputs to logits, (B, C) or (B, T, V).
            optimizer_factory: makes the optimizer from the parameters to train.
            comm: the ranks that train together.
            staleness_bound: K, the steps by which a gradient is applied late.
            compression: what the gradients are encoded as on the wire.
            grad_clip_norm: bound of the global gradient norm; None: never clipped.
            lr_schedule: learning rate of update i; None: what the optimizer has.
            precision: "fp64" converts the model; "bf16" and "fp16" compute under autocast.
            device: where this rank computes; ranks may differ.
            bucket_bytes: gradient bytes that travel together.
            skip_nonfinite: pass over updates that are not finite instead of stopping.
        """
        self.model = prepare_model(model, precision, device)
        self._comm = comm
        self._named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._params = list(self._named.values())
        _broadcast_model(model, comm)
        self._optimizer = optimizer_factory(self._params)
        self._buckets = GradientBuckets(
            self._params,
            comm,
            bucket_bytes=bucket_bytes,
            codec=codec_for(compression),
            sets=staleness_bound + 1,
        )
        self._staleness_bound = staleness_bound
        self._grad_clip_norm = grad_clip_norm
        self._lr_schedule = lr_schedule
        self._precision = precision
        self._device = device
        self._skip_nonfinite = skip_nonfinite
        self._scaler = LossScaler() if precision == "fp16" else None
        self._under_way: deque[_StepUnderWay] = deque()
        self._step = 0
        self._is_stop_requested = False

    def train_step(self, micro_batches: MicroBatches) -> StepResult | None:
        """Compute this rank's share of one step's gradient and apply the one that is due; see Strategy.

        Args:
            micro_batches: this rank's share, as Batches or (inputs, targets) pairs; perhaps of 0 samples.

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
        self._optimizer.zero_grad()

        # 2 forward, backward: this rank's share of the gradient of the global mean
        self._buckets.begin(self._step, count=count, samples=samples, planned=planned, stop=self._is_stop_requested)
        forward_backward(
            self.model,
            batches,
            loss_scale / planned,
            self._precision,
            device=self._device,
            before_last=self._buckets.arm,
            telemetry=self._comm.telemetry,
        )

        # 3 communicate: most buckets left during backward, here goes the rest
        self._under_way.append(_StepUnderWay(self._buckets.flush(), planned, loss_scale))
        self._step += 1
        if len(self._under_way) <= self._staleness_bound:
            return None

        # 4 step, with the oldest gradient: this one if K = 0
        return self._apply(self._under_way.popleft())

    def _apply(self, due: _StepUnderWay) -> StepResult:
        """Wait for the sum over all ranks, correct it to the mean, clip, and step: the same bits on every rank."""
        sums = due.gradients.wait()
        due.gradients.install()
        step = due.gradients.step
        loss = sums.loss_sum / max(sums.count, 1)
        correction = due.planned / max(sums.count, 1) / due.loss_scale
        grad_norm = clip_gradients(self._params, self._grad_clip_norm, correction)
        if sums.nonfinite:
            grad_norm = math.inf
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
            self._optimizer.step()
        return StepResult(step, loss, sums.count, sums.samples, grad_norm, lr, is_applied, sums.stop_votes > 0)

    def eval_step(self, batch: Batch) -> EvalSums:
        """Loss sum, target count and correct predictions of one batch on this rank; changes nothing."""
        return evaluate_batch(self.model, batch, self._precision, self._device)

    def finish(self) -> list[StepResult]:
        """Apply what is still under way, in order; their results, oldest first."""
        return [self._apply(self._under_way.popleft()) for _ in range(len(self._under_way))]

    def request_stop(self) -> None:
        """Vote for stopping, in the next step's last bucket; from any thread."""
        self._is_stop_requested = True

    def state(self) -> dict[str, Shard]:
        """Rank 0: weights, optimizer, loss scale, and the reduced gradients that wait. All ranks hold the same bits.

        Every rank: what its int8 encodings have lost.
        """
        waiting = [_as_pending(item) for item in self._under_way]
        names, comm = list(self._named), self._comm
        residuals = residual_state(self._buckets.residuals, names, comm.rank, comm.world_size)
        if comm.rank != 0:
            return residuals
        shards = residuals | model_state(self.model) | optimizer_state(self._optimizer, self._named)
        if self._scaler is not None:
            shards[SCALER] = self._scaler.state()
        return shards | pending_state(waiting, names)

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint; see Strategy."""
        load_model_state(self.model, reader)
        load_optimizer_state(self._optimizer, self._named, reader)
        names, comm = list(self._named), self._comm
        load_residuals(reader, self._buckets.residuals, names, comm.rank, comm.world_size)
        if self._scaler is not None:
            self._scaler.load_state(reader)
        for item in read_pending(reader, self._params, names):
            sums = StepSums(item.loss_sum, item.count, item.samples, item.nonfinite, stop_votes=0)
            gradients = self._buckets.restore(item.step, item.grads, sums)
            self._under_way.append(_StepUnderWay(gradients, item.planned, item.loss_scale))
        self._step = reader.step + len(self._under_way)


def _as_pending(item: _StepUnderWay) -> PendingGradient:
    sums, gradients = item.gradients.wait(), item.gradients
    return PendingGradient.of(gradients.step, sums, item.planned, item.loss_scale, gradients.grads)


def _broadcast_model(model: nn.Module, comm: Communicator) -> None:
    """Copy rank 0's parameters and buffers to all ranks: equal seeds are no promise of equal weights."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    copies = [tensor.contiguous() for tensor in tensors]  # the tensor itself where it is contiguous already
    for work in [comm.broadcast(copy, src=0) for copy in copies]:
        work.wait()
    for tensor, copy in zip(tensors, copies, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)
