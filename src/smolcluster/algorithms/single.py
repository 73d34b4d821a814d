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
from smolcluster.training.optim import OptimizerFactory
from smolcluster.training.schedule import LrSchedule
from smolcluster.training.step import (
    EvalSums,
    LossScaler,
    MicroBatches,
    Precision,
    StepResult,
    as_batches,
    clip_gradients,
    count_targets,
    evaluate_batch,
    forward_backward,
    is_applicable,
    prepare_model,
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
        """
        self.model = prepare_model(model, precision, device)
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._optimizer = optimizer_factory(self._params)
        self._staleness_bound = staleness_bound
        self._grad_clip_norm = grad_clip_norm
        self._lr_schedule = lr_schedule
        self._precision = precision
        self._device = device
        self._skip_nonfinite = skip_nonfinite
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

        # 1 zero_grad
        self._optimizer.zero_grad()

        # 2 forward, backward: the gradient of the mean loss over all micro-batches
        loss_sum = forward_backward(
            self.model, batches, loss_scale / max(count, 1), self._precision, device=self._device
        )

        # 3 queue: gradients leave in the order of their steps
        samples = sum(batch.samples for batch in batches)
        grads = [param.grad for param in self._params]
        self._queue.append(_Gradient(self._step, loss_sum, count, samples, loss_scale, grads))
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
        grad_norm = clip_gradients(self._params, self._grad_clip_norm, 1.0 / due.loss_scale)
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
        return StepResult(due.step, loss, due.count, due.samples, grad_norm, lr, is_applied, self._is_stop_requested)

    def eval_step(self, batch: Batch) -> EvalSums:
        """Loss sum, target count and correct predictions of one batch; changes nothing."""
        return evaluate_batch(self.model, batch, self._precision, self._device)

    def finish(self) -> list[StepResult]:
        """Apply what is still queued, in order; their results, oldest first."""
        return [self._apply(self._queue.popleft()) for _ in range(len(self._queue))]

    def request_stop(self) -> None:
        """Stop after the step under way; from any thread."""
        self._is_stop_requested = True
