"""One process, plain PyTorch: the reference that every other algorithm is compared with.

Idea      The model computes the gradient of the global batch's mean loss and the optimizer applies it. Nothing is
          distributed. Micro-batches are added up, so that a batch may be larger than memory. The gradient queue
          exists for comparison: with staleness_bound K this gives the numbers that the others give with the same K.
Step      1 zero_grad  2 forward/backward on all micro-batches  3 queue (K > 0)  4 optimizer.step
Cost      no network; memory: one replica, its optimizer state, and K + 1 gradients.
Staleness K = 0: plain training. K > 0: the gradient of step t, computed wholly on w_t, is applied K steps late.
Breaks if the model or its batch does not fit into one machine, or one machine is too slow: use classicdp or fsdp.
Source    Rumelhart, Hinton, Williams 1986; the delayed gradient: Ho et al. 2013, Stale Synchronous Parallel, section 2
Try       smolcluster train --algorithm single --preset single_mnist
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smolcluster.data.batch import Batch
from smolcluster.training.optim import OptimizerFactory, load_optimizer_state, optimizer_state
from smolcluster.training.schedule import LrSchedule
from smolcluster.training.step import (
    SCALER,
    EvalSums,
    LossScaler,
    MicroBatches,
    PendingGradient,
    Precision,
    Shard,
    StateReader,
    StepResult,
    Telemetry,
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
    take_metrics,
)


@dataclass(frozen=True, slots=True)
class _Gradient:
    """A finished gradient that waits for its turn."""

    step: int
    loss_sum: Tensor
    count: int
    samples: int
    loss_scale: float
    grads: list[Tensor | None]
    planned: int  # what it is scaled by: its targets, unless another algorithm computed it
    metrics: dict[str, float] | None = None  # what the model measured


class Single:
    """Training in one process."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_factory: OptimizerFactory,
        *,
        staleness_bound: int = 0,
        grad_clip_norm: float | None = None,
        lr_schedule: LrSchedule | None = None,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        skip_nonfinite: bool = False,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Take the model over; it is moved to `device`.

        Args:
            model: maps inputs to logits, (B, C) or (B, T, V).
            optimizer_factory: makes the optimizer from the parameters to train.
            staleness_bound: K, the steps by which a gradient is applied late.
            grad_clip_norm: bound of the global gradient norm; None: never clipped.
            lr_schedule: learning rate of update i; None: what the optimizer has.
            precision: "fp64" converts the model; "bf16" and "fp16" compute under autocast.
            device: where to compute.
            skip_nonfinite: pass over updates that are not finite instead of stopping.
            telemetry: gets the time that forward and backward take.
        """
        self.model = prepare_model(model, precision, device)
        self._named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._params = list(self._named.values())
        self._optimizer = optimizer_factory(self._params)
        self._staleness_bound = staleness_bound
        self._grad_clip_norm = grad_clip_norm
        self._lr_schedule = lr_schedule
        self._precision = precision
        self._device = device
        self._skip_nonfinite = skip_nonfinite
        self._telemetry = telemetry or Telemetry()
        self._scaler = LossScaler() if precision == "fp16" else None
        self._queue: deque[_Gradient] = deque()
        self._step = 0
        self._is_stop_requested = False

    def train_step(self, micro_batches: MicroBatches) -> StepResult | None:
        """Compute one step's gradient and apply the one that is due; see Strategy.

        Args:
            micro_batches: the whole global batch, as Batches or (inputs, targets) pairs.

        Raises:
            TrainingStopped: the loss or the gradient is not finite.
        """
        batches = as_batches(micro_batches)
        count = count_targets(batches)
        loss_scale = self._scaler.scale if self._scaler else 1.0
        self._telemetry.step = self._step

        # 1 zero_grad
        self._optimizer.zero_grad()

        # 2 forward, backward: the gradient of the mean loss over all micro-batches
        scale = loss_scale / max(count, 1)
        loss_sum = forward_backward(
            self.model,
            batches,
            scale,
            self._precision,
            device=self._device,
            telemetry=self._telemetry,
            step=self._step,
        )

        # 3 queue: gradients leave in the order of their steps
        samples = sum(batch.samples for batch in batches)
        grads = [param.grad for param in self._params]
        metrics = take_metrics(self.model)
        self._queue.append(_Gradient(self._step, loss_sum, count, samples, loss_scale, grads, max(count, 1), metrics))
        self._step += 1
        if len(self._queue) <= self._staleness_bound:
            return None

        # 4 step
        return self._apply(self._queue.popleft())

    def _apply(self, due: _Gradient) -> StepResult:
        """Make `due` the parameters' gradient and step."""
        for param, grad in zip(self._params, due.grads, strict=True):
            param.grad = grad
        loss = due.loss_sum.item() / max(due.count, 1)
        correction = due.planned / max(due.count, 1) / due.loss_scale
        grad_norm = clip_gradients(self._params, self._grad_clip_norm, correction)
        if self._lr_schedule is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr_schedule(due.step)
        lr = float(self._optimizer.param_groups[0]["lr"])
        is_applied = due.count > 0 and is_applicable(
            due.step,
            loss,
            grad_norm,
            lr,
            scaler=self._scaler,
            loss_scale=due.loss_scale,
            skip_nonfinite=self._skip_nonfinite,
        )
        if is_applied:
            self._optimizer.step()
        stop = self._is_stop_requested
        return StepResult(due.step, loss, due.count, due.samples, grad_norm, lr, is_applied, stop, metrics=due.metrics)

    def eval_step(self, batch: Batch) -> EvalSums:
        """Loss sum, target count and correct predictions of one batch; changes nothing."""
        return evaluate_batch(self.model, batch, self._precision, self._device)

    def finish(self) -> list[StepResult]:
        """Apply what is still queued, in order; their results, oldest first."""
        return [self._apply(self._queue.popleft()) for _ in range(len(self._queue))]

    def request_stop(self) -> None:
        """Stop after the step under way; from any thread."""
        self._is_stop_requested = True

    def state(self) -> dict[str, Shard]:
        """Weights, optimizer, loss scale, and the gradients that still wait."""
        shards = model_state(self.model) | optimizer_state(self._optimizer, self._named)
        if self._scaler is not None:
            shards[SCALER] = self._scaler.state()
        waiting = [
            PendingGradient(g.step, float(g.loss_sum), g.count, g.samples, 0, g.planned, g.loss_scale, g.grads)
            for g in self._queue
        ]
        return shards | pending_state(waiting, list(self._named))

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint; see Strategy."""
        load_model_state(self.model, reader)
        load_optimizer_state(self._optimizer, self._named, reader)
        if self._scaler is not None:
            self._scaler.load_state(reader)
        for item in read_pending(reader, self._params, list(self._named)):
            loss_sum = torch.tensor(item.loss_sum, dtype=torch.float64)
            self._queue.append(
                _Gradient(item.step, loss_sum, item.count, item.samples, item.loss_scale, item.grads, item.planned)
            )
        self._step = reader.step + len(self._queue)
