"""The parts of a training step that algorithms share.

A step's gradient is that of the *sum* of the losses times `scale`, and scale is one over the number of targets of
the whole step, over all ranks and micro-batches. So gradients of ranks and of micro-batches are simply added, however
unequal they are, and the result is the gradient of the global mean.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolcluster.checkpoint.state import Shard as Shard
from smolcluster.checkpoint.state import StateReader as StateReader
from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.errors import CheckpointError, ConfigError, TrainingStopped
from smolcluster.kinds import Precision as Precision
from smolcluster.telemetry import Telemetry as Telemetry

# A list of them, or one pair of tensors as a DataLoader gives it.
MicroBatches = Sequence[Batch | Sequence[Tensor] | Tensor]

# The loss scale's name in a checkpoint.
SCALER = "scaler"

# What each half precision computes in.
AUTOCAST_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gave, the same on every rank.

    Attributes:
        step: the step's number, from 0.
        loss: mean loss over all targets of all ranks, at the weights that the step computed on.
        count: targets over all ranks.
        samples: samples over all ranks.
        grad_norm: global gradient norm before clipping.
        lr: learning rate that the update used.
        applied: False when the gradient was not finite and the update was skipped.
        stop: True when some rank asked to stop.
        spans_until: the number up to which what this rank measured belongs to the step, where an algorithm does not
            know the step's number while it computes; None: `step` itself.
        metrics: what the model has measured of itself, by the names that metrics have; None: nothing.
    """

    step: int
    loss: float
    count: int
    samples: int
    grad_norm: float
    lr: float
    applied: bool = True
    stop: bool = False
    spans_until: int | None = None
    metrics: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class EvalSums:
    """Sums over evaluation targets: exact on ragged ends, to be added over batches and ranks.

    Attributes:
        loss_sum: over all targets.
        count: targets.
        correct: answers that are right.
        graded: answers; the targets, or the samples where Batch.graded says which targets are the answer.
    """

    loss_sum: float
    count: int
    correct: int
    graded: int

    def __add__(self, other: EvalSums) -> EvalSums:
        return EvalSums(
            self.loss_sum + other.loss_sum,
            self.count + other.count,
            self.correct + other.correct,
            self.graded + other.graded,
        )


@dataclass(frozen=True, slots=True)
class MicroBatchPlace:
    """Where this rank's share of a micro-batch stands in its step.

    Attributes:
        first_sample: number of its first sample in the global batch.
        targets: of the whole micro-batch, over all ranks.
    """

    first_sample: int
    targets: int


class HasAuxiliaryLoss(Protocol):
    """A model whose training has losses besides the cross-entropy, and which measures itself (models/moe.py).

    `train/loss` stays the plain cross-entropy.
    """

    def begin_micro_batch(self, step: int | None, first_sample: int) -> None:
        """Called before each forward in training; `first_sample` as in MicroBatchPlace."""
        ...

    def auxiliary_loss(self, targets: int) -> Tensor:
        """Of the last forward, this rank's part, weighted as the mean loss of so many targets: (), with gradients."""
        ...

    def take_sums(self) -> Tensor:
        """What it has measured since the last call, to be added up over ranks: (n,) float64 on the CPU. Blocks."""
        ...

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Of sums over all ranks, by name."""
        ...


def has_auxiliary_loss(model: nn.Module) -> TypeGuard[HasAuxiliaryLoss]:
    """Whether a model is a HasAuxiliaryLoss."""
    # isinstance with a Protocol takes 25 us, a tenth of a small model's step.
    kind = type(model)  # both: a user's own class may have a method of the one name
    return hasattr(kind, "auxiliary_loss") and hasattr(kind, "begin_micro_batch")


def take_metrics(model: nn.Module) -> dict[str, float] | None:
    """What a model has measured since the last call, on one rank; None if it measures nothing. Blocks."""
    return model.metrics(model.take_sums()) if has_auxiliary_loss(model) else None


def prepare_model(model: nn.Module, precision: Precision, device: torch.device | str) -> nn.Module:
    """Move the model to `device` and set it to training; "fp64" also makes its parameters float64.

    "bf16" and "fp16" keep the parameters as they are and compute in half precision under autocast.
    """
    model = model.to(device=device, dtype=torch.float64 if precision == "fp64" else None)
    return model.train()


def as_batches(micro_batches: MicroBatches | Batch) -> list[Batch]:
    """What the user gave as micro-batches: Batches, (inputs, targets) pairs, or a single one of either.

    Raises:
        ConfigError: there is none, or one is no pair of tensors.
    """
    if isinstance(micro_batches, Batch) or _is_pair(micro_batches):
        return [_as_batch(micro_batches)]
    if not micro_batches:
        raise ConfigError(
            "train_step was called with no micro-batch. A rank with nothing to compute passes one of 0 samples, "
            "so that all ranks scale alike."
        )
    return [_as_batch(batch) for batch in micro_batches]


def _as_batch(batch: object) -> Batch:
    if isinstance(batch, Batch):
        return batch
    if _is_pair(batch):
        return Batch(batch[0], batch[1])
    raise ConfigError(
        f"a micro-batch is a {type(batch).__name__}. Pass smolcluster.data.batch.Batch or a pair of tensors "
        f"(inputs, targets)."
    )


def _is_pair(batch: object) -> TypeGuard[Sequence[Tensor]]:
    return isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)


def count_targets(batches: Iterable[Batch]) -> int:
    """Targets that carry a loss: every one but NO_TARGET."""
    return sum(int(torch.count_nonzero(batch.targets != NO_TARGET)) for batch in batches)


def forward_backward(
    model: nn.Module,
    batches: Sequence[Batch],
    scale: float,
    precision: Precision = "fp32",
    *,
    device: torch.device | str = "cpu",
    before_last: Callable[[Tensor], None] | None = None,
    telemetry: Telemetry | None = None,
    step: int | None = None,
    places: Sequence[MicroBatchPlace] | None = None,
) -> Tensor:
    """Add the gradient of `scale` times the summed loss of all micro-batches to the parameters' `.grad`.

    Micro-batches without samples are passed over. Does not wait for the device.

    Args:
        model: maps inputs to logits, (B, C) or (B, T, V).
        batches: this rank's micro-batches, on any device.
        scale: one over the targets of the whole step, times the loss scale with fp16.
        precision: "fp64" also converts floating-point inputs; "bf16" and "fp16" compute under autocast.
        device: where the model is.
        before_last: called with the summed loss when only the last micro-batch's backward remains; not called
            if no micro-batch has samples. This is where gradient hooks are armed.
        telemetry: gets a "forward" and a "backward" span per micro-batch.
        step: the step's number, for models with auxiliary losses.
        places: for the same models, where each micro-batch stands, if ranks compute parts of it together. Then one
            without samples is computed as well, as the other ranks wait for it.

    Returns:
        The summed cross-entropy without `scale`, (), on `device`.
    """
    if places is None:
        batches = [batch for batch in batches if batch.samples]
    auxiliary = model if has_auxiliary_loss(model) else None
    if auxiliary is not None and places is None:
        places = _own_places(batches)
    loss_sum: Tensor | None = None
    for i, batch in enumerate(batches):
        with telemetry.span("forward") if telemetry else contextlib.nullcontext():
            targets = batch.targets.to(device, non_blocking=True)
            if auxiliary is not None and places is not None:
                auxiliary.begin_micro_batch(step, places[i].first_sample)
            loss = summed_loss(_logits(model, batch, precision, device), targets)
        detached = loss.detach()
        loss_sum = detached if loss_sum is None else loss_sum + detached
        if before_last is not None and i == len(batches) - 1:
            before_last(loss_sum)
        if auxiliary is not None and places is not None:
            loss = loss + auxiliary.auxiliary_loss(places[i].targets)
        with telemetry.span("backward") if telemetry else contextlib.nullcontext():
            # The scale enters as the loss's own gradient: one node of the graph less than a product.
            loss.backward(torch.full_like(loss, scale))  # type: ignore[no-untyped-call]
    return torch.zeros((), device=device) if loss_sum is None else loss_sum


def _own_places(batches: Sequence[Batch]) -> list[MicroBatchPlace]:
    """Of the micro-batches of a rank that has nobody to compute them with."""
    places, first = [], 0
    for batch in batches:
        places.append(MicroBatchPlace(first, count_targets([batch])))
        first += batch.samples
    return places


def filled(batch: Batch) -> Batch:
    """A batch of one sample without a target in place of one without samples: for a rank that must take part.

    Its loss and its gradients are zero.
    """
    inputs = torch.zeros((1, *batch.inputs.shape[1:]), dtype=batch.inputs.dtype)
    targets = torch.full((1, *batch.targets.shape[1:]), NO_TARGET, dtype=batch.targets.dtype)
    return Batch(inputs, targets, batch.planned_count)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the body no module is in training: no dropout, and no statistics that change."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate_batch(
    model: nn.Module,
    batch: Batch,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    *,
    also_empty: bool = False,
) -> EvalSums:
    """Loss sum, target count and right answers of one batch; leaves the model as it found it. Blocks.

    `also_empty` computes a batch without samples as well, for other ranks that wait for it.
    """
    if not batch.samples and not also_empty:
        return EvalSums(0.0, 0, 0, 0)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = _logits(model, batch, precision, device)
    finally:
        model.train(was_training)
    return grade(logits, batch, device)


def grade(logits: Tensor, batch: Batch, device: torch.device | str = "cpu") -> EvalSums:
    """Loss sum, target count and right answers of a batch, from its logits, (B, C) or (B, T, V). Blocks."""
    targets = batch.targets.to(device)
    loss = summed_loss(logits, targets)
    logits, targets = logits.flatten(0, -2), targets.flatten()
    # NO_TARGET is never an argmax, so what is not to be predicted cannot be correct.
    hits = logits.argmax(dim=-1) == targets
    count = count_targets([batch])
    if batch.graded is None:
        return EvalSums(float(loss), count, int(torch.count_nonzero(hits)), count)
    graded = batch.graded.to(hits.device)
    is_right = (hits.view(graded.shape) | ~graded).all(dim=1) & graded.any(dim=1)
    return EvalSums(float(loss), count, int(is_right.sum()), int(graded.any(dim=1).sum()))


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy, (), of logits (B, C) or (B, T, V) for targets (B,) or (B, T)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")


def _logits(model: nn.Module, batch: Batch, precision: Precision, device: torch.device | str) -> Tensor:
    inputs = batch.inputs.to(device, non_blocking=True)
    if precision == "fp64" and inputs.is_floating_point():
        inputs = inputs.double()
    half = AUTOCAST_DTYPES.get(precision)
    if half is None:
        logits: Tensor = model(inputs)
        return logits
    with torch.autocast(inputs.device.type, dtype=half):
        logits = model(inputs)
    return logits.float()  # a sum of thousands of losses has no place in 11 bits


def clip_gradients(params: Iterable[nn.Parameter], max_norm: float | None, factor: float = 1.0) -> float:
    """Multiply all gradients by `factor`, then scale them down so that their global norm is at most `max_norm`.

    In place and in one pass. Blocks. Gradients that are not finite are left alone.

    Args:
        params: parameters; those without a gradient are passed over.
        max_norm: None never scales down.
        factor: what still separates `.grad` from the true gradient.

    Returns:
        The true gradient's global norm before clipping.
    """
    grads = [param.grad for param in params if param.grad is not None]
    norm = gradient_norm(grads) * factor
    scale_gradients(grads, norm, max_norm, factor)
    return norm


def scale_gradients(grads: list[Tensor], norm: float, max_norm: float | None, factor: float = 1.0) -> None:
    """Multiply gradients by `factor`, then scale them down as far as their norm exceeds `max_norm`; in place.

    Args:
        grads: all of the model's, or this rank's part of them; left alone if the norm is not finite.
        norm: of all of them, after they are multiplied by `factor`.
        max_norm: None never scales down.
        factor: what still separates them from the true gradient.
    """
    coefficient = factor
    if max_norm is not None:
        coefficient *= min(1.0, max_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_ adds the same 1e-6
    if grads and coefficient != 1.0 and math.isfinite(norm):
        torch._foreach_mul_(grads, coefficient)


def squares_of(tensors: Sequence[Tensor]) -> list[float]:
    """The square of each tensor's norm; blocks once, however many there are."""
    if not tensors:
        return []
    # A norm in the gradient's own half precision would have two or three digits.
    norms = torch._foreach_norm([tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors])
    # One wait for the device, not one per tensor. Apple's MPS has no float64.
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return [norm * norm for norm in torch.stack([norm.to(widest) for norm in norms]).tolist()]


def gradient_norm(grads: list[Tensor]) -> float:
    """The norm of all gradients together; blocks. 0 if there are none."""
    if not grads:
        return 0.0
    if any(grad.dtype in AUTOCAST_DTYPES.values() for grad in grads):
        # A norm in the gradient's own half precision would have two or three digits.
        grads = [grad.float() if grad.dtype in AUTOCAST_DTYPES.values() else grad for grad in grads]
    norms = torch._foreach_norm(grads)
    if grads[0].is_cpu:
        return math.hypot(*(norm.item() for norm in norms))
    # One wait for the device, not one per parameter. Apple's MPS has no float64, so ask for it only if it is there.
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return math.hypot(*torch.stack([norm.to(widest) for norm in norms]).tolist())


class LossScaler:
    """Loss scale for fp16: half precision has no gradient below 6e-8, so losses are multiplied before backward.

    Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740, section 3.2. All ranks decide from the same
    reduced gradient, so their scales stay equal without a message.
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.scale = scale
        self._growth_interval = growth_interval
        self._finite_steps = 0

    def update(self, finite: bool, scale: float) -> None:
        """Learn from a gradient that was computed with `scale`, which may be older than the present one."""
        if not finite:
            # min: with K > 0 several gradients in flight overflow for the same reason.
            self.scale = max(1.0, min(self.scale, scale / 2))
            self._finite_steps = 0
            return
        self._finite_steps += 1
        if self._finite_steps >= self._growth_interval:
            self.scale, self._finite_steps = self.scale * 2, 0

    def can_help(self, scale: float) -> bool:
        """Whether a gradient that overflowed with `scale` may be finite with a smaller one."""
        return scale > 1.0

    def state(self) -> Shard:
        """Scale and good steps since it last changed."""
        return Shard(torch.tensor([self.scale, self._finite_steps], dtype=torch.float64), "scaler")

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint; one made without fp16 has nothing to say."""
        if SCALER in reader.names(SCALER):
            self.scale, finite_steps = reader.read(SCALER).tolist()
            self._finite_steps = round(finite_steps)


def is_applicable(
    step: int,
    loss: float,
    grad_norm: float,
    lr: float,
    *,
    scaler: LossScaler | None = None,
    loss_scale: float = 1.0,
    skip_nonfinite: bool = False,
) -> bool:
    """Whether the step's update may be applied; tells the scaler. The same answer on every rank.

    Args:
        step: the step's number, for the message.
        loss: its global mean loss.
        grad_norm: its reduced gradient's norm.
        lr: its learning rate, for the message.
        scaler: with fp16.
        loss_scale: what the step was computed with.
        skip_nonfinite: skip an update that is not finite, whatever the reason.

    Raises:
        TrainingStopped: loss or gradient is not finite, and nothing says to go on.
    """
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if scaler is not None:
        scaler.update(finite, loss_scale)
    if finite:
        return True
    is_overflow = scaler is not None and math.isfinite(loss) and scaler.can_help(loss_scale)
    if skip_nonfinite or is_overflow:
        return False
    raise TrainingStopped(
        f"step {step}: the loss is {loss:g} and the gradient's norm {grad_norm:g}, at learning rate {lr:g}; the "
        f"weights are those before this update. Lower training.learning_rate, set training.grad_clip_norm (1.0 is "
        f"usual), or pass --skip-nonfinite to pass over such steps."
    )


class HasSums(Protocol):
    """What all ranks contributed to a step besides gradients, as each algorithm that adds it up keeps it."""

    @property
    def loss_sum(self) -> float:
        """Over all targets."""
        ...

    @property
    def count(self) -> int:
        """Targets computed."""
        ...

    @property
    def samples(self) -> int:
        """Samples computed."""
        ...

    @property
    def nonfinite(self) -> int:
        """Ranks whose loss or gradient was not finite."""
        ...


@dataclass(frozen=True, slots=True)
class PendingGradient:
    """A step's gradient, summed over all ranks, that waits for its turn (K > 0): what a checkpoint keeps of it.

    Attributes:
        step: the step's number.
        loss_sum: over all its targets.
        count: its targets.
        samples: its samples.
        nonfinite: ranks whose loss or gradient was not finite.
        planned: the targets that its gradient is scaled by.
        loss_scale: what it is multiplied with (fp16).
        grads: of each parameter, None where it has none.
    """

    step: int
    loss_sum: float
    count: int
    samples: int
    nonfinite: int
    planned: int
    loss_scale: float
    grads: list[Tensor | None]

    @classmethod
    def of(
        cls, step: int, sums: HasSums, planned: int, loss_scale: float, grads: list[Tensor | None]
    ) -> PendingGradient:
        """That of a step whose sums are known; see the attributes."""
        return cls(step, sums.loss_sum, sums.count, sums.samples, sums.nonfinite, planned, loss_scale, grads)


def model_state(model: nn.Module) -> dict[str, Shard]:
    """Parameters and buffers under `model/<name>`, tied ones under each of their names. Shares their memory."""
    params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        f"model/{name}": Shard(tensor.detach(), "param" if name in params else "buffer")
        for name, tensor in model.state_dict().items()
    }


def load_model_state(model: nn.Module, reader: StateReader) -> None:
    """Copy parameters and buffers from a checkpoint, in place.

    Raises:
        CheckpointError: it is of another model: names, shapes or dtypes differ.
    """
    own = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    stored = set(reader.names("model/"))
    missing, foreign = sorted(own.keys() - stored), sorted(stored - own.keys())
    if missing or foreign:
        name = (missing or foreign)[0].removeprefix("model/")
        where = "the model, not in the checkpoint" if missing else "the checkpoint, not in the model"
        raise CheckpointError(f"the checkpoint is of another model: {name} is in {where}. Resume with its settings")
    for name in sorted(own):
        tensor, value = own[name], reader.read(name)
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise CheckpointError(
                f"the checkpoint is of another model: {name.removeprefix('model/')} is {value.dtype} of shape "
                f"{tuple(value.shape)} there, {tensor.dtype} of {tuple(tensor.shape)} here. Resume with its settings"
            )
        tensor.copy_(value)


def pending_state(
    pending: Sequence[PendingGradient], names: Sequence[str], *, with_sums: bool = True
) -> dict[str, Shard]:
    """Gradients that wait, oldest first, under `pending/<number>/…`.

    Args:
        pending: where ranks have different parameters, None for those that others answer for.
        names: of their parameters.
        with_sums: all but the gradients too; one rank says it.
    """
    shards: dict[str, Shard] = {}
    for number, item in enumerate(pending):
        sums = [item.step, item.loss_sum, item.count, item.samples, item.nonfinite, item.planned, item.loss_scale]
        if with_sums:
            shards[f"pending/{number:04d}/sums"] = Shard(torch.tensor(sums, dtype=torch.float64), "pending")
        for name, grad in zip(names, item.grads, strict=True):
            if grad is not None:
                shards[f"pending/{number:04d}/grad/{name}"] = Shard(grad, "pending")
    return shards


def read_pending(
    reader: StateReader, params: Sequence[nn.Parameter | None], names: Sequence[str]
) -> list[PendingGradient]:
    """The gradients that waited when the checkpoint was made, oldest first, on their parameters' devices.

    Every rank reads the same names; where it has no such parameter it gets None.
    """
    stored = set(reader.names("pending/"))
    pending = []
    for sums_name in sorted(name for name in stored if name.endswith("/sums")):
        step, loss_sum, count, samples, nonfinite, planned, loss_scale = reader.read(sums_name).tolist()
        grads: list[Tensor | None] = []
        for param, name in zip(params, names, strict=True):
            grad_name = f"{sums_name.removesuffix('sums')}grad/{name}"
            grad: Tensor | None = None
            if grad_name in stored:
                values = reader.read_slice(grad_name, 0, 0 if param is None else param.numel())
                grad = None if param is None else values.view(param.shape).to(param.device)
            grads.append(grad)
        pending.append(
            PendingGradient(
                step=round(step),
                loss_sum=loss_sum,
                count=round(count),
                samples=round(samples),
                nonfinite=round(nonfinite),
                planned=round(planned),
                loss_scale=loss_scale,
                grads=grads,
            )
        )
    return pending
