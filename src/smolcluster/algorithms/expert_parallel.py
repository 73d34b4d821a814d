"""Expert parallelism: each rank holds some of a model's experts, and tokens travel to those that the router chose.

Idea      In a model with experts most parameters belong to experts, of which each token uses few. So the experts lie on
          the ranks in equal runs, and everything else, attention, routers and embeddings, is on all of them, as in
          classicdp. Each rank computes its share of the batch. In every layer it sends its tokens to the ranks of the
          experts that the router chose for them, computes its own experts on what arrives, and sends the results back.
          Backward sends gradients the same ways. So an expert's gradient is complete where the expert lies, and is
          never all-reduced; the gradients of all else are. Capacity and the load-balancing loss are those of the
          tokens of all ranks: each layer first gathers how many go where.
Step      1 zero_grad  2 forward/backward on own micro-batches, an all-to-all before and after the experts of each
          layer  3 all_reduce buckets of what all ranks have, agree on the experts' gradient norms  4 optimizer.step
Cost      S = gradient bytes of all but the experts, k = top_k, T = this rank's tokens, D = bytes of a token. Each rank
          sends 2(N-1)/N * S, and for each layer up to 4 (N-1)/N * k T D bytes, which it waits for. Memory: all but the
          experts, and 1/N of them; K + 2 gradients of the former, K + 1 of the latter.
Staleness K = 0: as plain training. K > 0: a gradient is applied K steps late. Those of experts wait as long as all
          others, although they are complete at once: all parameters are then of one step, and the run equals `single`
          with the same K. Only the all-reduce gains time: tokens are waited for in every layer.
Breaks if the links are slow, or one rank is: every layer waits. If the model fits on each rank: use classicdp. If a
          few experts get all tokens, their ranks compute alone: see moe/expert_load_max.
Source    Lepikhin et al. 2020, GShard, arXiv:2006.16668, section 3; Fedus et al. 2021, Switch Transformers,
          arXiv:2101.03961, section 5
Try       smolcluster train --preset ep_moe --local 2
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smolcluster.collectives.base import Communicator, Work
from smolcluster.collectives.bucket import DEFAULT_BUCKET_BYTES, GradientBuckets, StepGradients, StepSums
from smolcluster.collectives.codec import codec_for
from smolcluster.collectives.dispatch import ExpertExchange
from smolcluster.data.batch import Batch
from smolcluster.kinds import Compression, Precision
from smolcluster.models.moe import moe_layers
from smolcluster.models.partition import Unit
from smolcluster.training.optim import OptimizerFactory
from smolcluster.training.own_experts import OwnExperts
from smolcluster.training.residual import load_residuals, residual_state
from smolcluster.training.schedule import LrSchedule
from smolcluster.training.step import (
    SCALER,
    EvalSums,
    LossScaler,
    MicroBatches,
    MicroBatchPlace,
    PendingGradient,
    Shard,
    StateReader,
    StepResult,
    as_batches,
    count_targets,
    evaluate_batch,
    forward_backward,
    has_auxiliary_loss,
    is_applicable,
    pending_state,
    read_pending,
    scale_gradients,
    squares_of,
)


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    """A step whose gradient is computed here but perhaps not yet summed.

    Attributes:
        gradients: of what all ranks have.
        expert_grads: of the experts here, complete; they wait for the others all the same.
        total: of each expert's parameters the square of its gradient's norm, then what the model has measured; once
            `agreed` is done, of all ranks.
        agreed: adds `total` up.
        planned: targets that the gradient is scaled by.
        loss_scale: what it is multiplied with (fp16).
        is_measured: whether the model has measured anything.
    """

    gradients: StepGradients
    expert_grads: list[Tensor | None]
    total: Tensor
    agreed: Work
    planned: int
    loss_scale: float
    is_measured: bool


class ExpertParallel:
    """Data-parallel training in which each rank holds some of the experts."""

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
        values: Callable[[Unit], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Take the model over, and give it rank 0's weights and buffers. Blocks until every rank has done so.

        Args:
            model: with layers of models/moe.py; maps inputs to logits, (B, T, V). Other ranks' experts are then on the
                meta device: see `whole_parameter`.
            optimizer_factory: makes the optimizer from this rank's parameters to train.
            comm: the ranks that train together.
            staleness_bound: K, the steps by which a gradient is applied late, an expert's too.
            compression: what the summed gradients are encoded as on the wire; tokens never are.
            grad_clip_norm: bound of the global gradient norm; None: never clipped.
            lr_schedule: learning rate of update i; None: what the optimizer has.
            precision: "fp64" converts the model; "bf16" and "fp16" compute under autocast, and send tokens in it.
            device: where this rank computes; ranks may differ.
            bucket_bytes: gradient bytes that travel together.
            skip_nonfinite: pass over updates that are not finite instead of stopping.
            values: the parameters of a unit by name, where the model's lie on the meta device: the whole of it is then
                on no rank. The same on every rank.

        Raises:
            ConfigError: the model has no experts.
        """
        self.model = model
        self._comm = comm
        self._own = OwnExperts(model, comm, precision=precision, device=device, values=values)
        self._shared, self._experts = self._own.shared(), self._own.experts()
        self._params = [*self._shared.values(), *self._experts.values()]
        self._expert_names = [name for name in self._own.names if name in self._own.owners]
        self._optimizer = optimizer_factory(self._params)
        # Tokens have connections of their own: what forward and backward wait for must not queue behind gradients.
        lane = comm.split(range(comm.world_size), "experts")
        assert lane is not None
        self._lane = lane
        if comm.world_size > 1:
            for layer in moe_layers(model).values():
                layer.exchange = ExpertExchange(lane, len(layer.experts))
        self._buckets = GradientBuckets(
            list(self._shared.values()),
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
        self._norms: deque[dict[str, float]] = deque(maxlen=staleness_bound + 1)
        self._step = 0
        self._is_stop_requested = False

    def train_step(self, micro_batches: MicroBatches) -> StepResult | None:
        """Compute this rank's share of one step's gradient and apply the one that is due; see Strategy.

        Args:
            micro_batches: this rank's share of each micro-batch of the global batch, as Batches or (inputs, targets)
                pairs; as many on every rank, perhaps of 0 samples, and those of lower ranks come first in it.

        Raises:
            TrainingStopped: the loss or the gradient is not finite; on all ranks at the same step.
            PeerLost: a rank is gone.
        """
        batches = as_batches(micro_batches)
        count = count_targets(batches)
        samples = sum(batch.samples for batch in batches)
        self._comm.telemetry.step = self._step
        places = _places(batches, self._lane)
        planned = batches[0].planned_count or max(sum(place.targets for place in places), 1)
        loss_scale = self._scaler.scale if self._scaler else 1.0

        # 1 zero_grad
        self._optimizer.zero_grad()

        # 2 forward, backward: this rank's share of the gradient of the global mean, and the whole of its experts'
        self._buckets.begin(self._step, count=count, samples=samples, planned=planned, stop=self._is_stop_requested)
        forward_backward(
            self.model,
            batches,
            loss_scale / planned,
            self._precision,
            device=self._device,
            before_last=self._buckets.arm,
            telemetry=self._comm.telemetry,
            step=self._step,
            places=places,
        )

        # 3 communicate: most buckets left during backward, here goes the rest
        gradients = self._buckets.flush()
        expert_grads = [param.grad for param in self._experts.values()]
        sums = self.model.take_sums() if has_auxiliary_loss(self.model) else None
        self._under_way.append(self._agree(gradients, expert_grads, planned, loss_scale, sums))
        self._step += 1
        if len(self._under_way) <= self._staleness_bound:
            return None

        # 4 step, with the oldest gradient: this one if K = 0
        return self._apply(self._under_way.popleft())

    def _agree(
        self,
        gradients: StepGradients,
        expert_grads: list[Tensor | None],
        planned: int,
        loss_scale: float,
        sums: Tensor | None,
    ) -> _StepUnderWay:
        """Let all ranks know the norms of the experts' gradients. Each expert is on one rank, and counts once."""
        squares = dict.fromkeys(self._expert_names, 0.0)
        squares |= _squares(self._experts, expert_grads)
        measured = torch.empty(0, dtype=torch.float64) if sums is None else sums
        total = torch.cat([torch.tensor([*squares.values()], dtype=torch.float64), measured])
        agreed = self._comm.all_reduce(total)
        return _StepUnderWay(gradients, expert_grads, total, agreed, planned, loss_scale, sums is not None)

    def _apply(self, due: _StepUnderWay) -> StepResult:
        """Wait for the sums over all ranks, correct them to the mean, clip, and step."""
        sums = due.gradients.wait()
        with self._comm.telemetry.span("comm_wait"):
            due.agreed.wait()
        due.gradients.install()
        for param, grad in zip(self._experts.values(), due.expert_grads, strict=True):
            param.grad = grad
        step = due.gradients.step
        loss = sums.loss_sum / max(sums.count, 1)
        correction = due.planned / max(sums.count, 1) / due.loss_scale
        squares = dict(zip(self._expert_names, due.total.tolist(), strict=False))
        squares |= _squares(self._shared, [param.grad for param in self._shared.values()])
        grad_norm = math.inf if sums.nonfinite else math.sqrt(sum(squares.values())) * correction
        grads = [param.grad for param in self._params if param.grad is not None]
        scale_gradients(grads, grad_norm, self._grad_clip_norm, correction)
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
            self._norms.append({name: math.sqrt(square) * correction for name, square in squares.items() if square > 0})
        metrics = None
        if due.is_measured and has_auxiliary_loss(self.model):
            metrics = self.model.metrics(due.total[len(self._expert_names) :])
        stop = sums.stop_votes > 0
        return StepResult(step, loss, sums.count, sums.samples, grad_norm, lr, is_applied, stop, metrics=metrics)

    def eval_step(self, batch: Batch) -> EvalSums:
        """Loss sum, target count and correct predictions of one batch on this rank; changes nothing.

        Every rank calls it equally often, if need be with batches of 0 samples.
        """
        return evaluate_batch(self.model, batch, self._precision, self._device, also_empty=True)

    def finish(self) -> list[StepResult]:
        """Apply what is still under way, in order; their results, oldest first."""
        return [self._apply(self._under_way.popleft()) for _ in range(len(self._under_way))]

    def request_stop(self) -> None:
        """Vote for stopping, in the next step's last bucket; from any thread."""
        self._is_stop_requested = True

    # ---- DividesModel

    @property
    def holds_whole_model(self) -> bool:
        """Whether `model` has all parameters: alone."""
        return self._comm.world_size == 1

    @property
    def parameters(self) -> int:
        """How many numbers the whole model has, tied ones once."""
        return sum(param.numel() for param in self.model.parameters())

    def take_gradient_norms(self) -> dict[str, float] | None:
        """The norm of each parameter's gradient before clipping, of the oldest update not asked for; None: no more."""
        return self._norms.popleft() if self._norms else None

    def whole_parameter(self, name: str) -> Tensor | None:
        """A parameter as it is now, on rank 0's CPU; None elsewhere. Every rank calls it; blocks."""
        return self._own.whole_parameter(name)

    def held_bytes(self) -> tuple[int, int, int]:
        """Bytes of parameters, gradients and optimizer state that this rank has held at most, all at once."""
        shared = sum(param.nbytes for param in self._shared.values())
        experts = sum(param.nbytes for param in self._experts.values())
        # In backward there is a gradient besides those in the sets of buckets.
        gradients = (self._staleness_bound + 2) * shared + (self._staleness_bound + 1) * experts
        slots = [value for state in self._optimizer.state.values() for value in state.values()]
        parameters = sum(param.nbytes for param in self._own.params.values())
        return parameters, gradients, sum(value.nbytes for value in slots if isinstance(value, Tensor))

    # ---- checkpoints

    def state(self) -> dict[str, Shard]:
        """This rank's experts, their optimizer state and waiting gradients; on rank 0 also what all ranks have.

        What the model has measured in steps that wait is not kept. Every rank: what its int8 encodings have lost.
        """
        waiting = [item.gradients.wait() for item in self._under_way]
        comm = self._comm
        residuals = residual_state(self._buckets.residuals, list(self._shared), comm.rank, comm.world_size)
        shards = residuals | self._own.state(self._optimizer)
        if self._scaler is not None and comm.rank == 0:
            shards[SCALER] = self._scaler.state()
        pending = []
        for item, sums in zip(self._under_way, waiting, strict=True):
            found = dict(zip(self._experts, item.expert_grads, strict=True))
            if comm.rank == 0:
                found |= dict(zip(self._shared, item.gradients.grads, strict=True))
            grads = [found.get(name) for name in self._own.names]
            pending.append(PendingGradient.of(item.gradients.step, sums, item.planned, item.loss_scale, grads))
        shards |= pending_state(pending, self._own.names, with_sums=comm.rank == 0)
        return shards

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint; see Strategy."""
        self._own.load_state(self._optimizer, reader)
        comm = self._comm
        load_residuals(reader, self._buckets.residuals, list(self._shared), comm.rank, comm.world_size)
        if self._scaler is not None:
            self._scaler.load_state(reader)
        names = self._own.names
        for item in read_pending(reader, [self._own.params.get(name) for name in names], names):
            found = dict(zip(names, item.grads, strict=True))
            sums = StepSums(item.loss_sum, item.count, item.samples, item.nonfinite, stop_votes=0)
            gradients = self._buckets.restore(item.step, [found[name] for name in self._shared], sums)
            expert_grads = [found[name] for name in self._experts]
            self._under_way.append(self._agree(gradients, expert_grads, item.planned, item.loss_scale, None))
        self._step = reader.step + len(self._under_way)


def _places(batches: Sequence[Batch], comm: Communicator) -> list[MicroBatchPlace]:
    """Where this rank's shares of the micro-batches stand among those of all ranks. Blocks."""
    own = torch.tensor([(count_targets([batch]), batch.samples) for batch in batches], dtype=torch.int64).flatten()
    every = own.new_empty(comm.world_size * len(own))
    comm.all_gather(every, own).wait()
    targets_RM, samples_RM = every.view(comm.world_size, len(batches), 2).unbind(-1)  # noqa: N806 - ranks, micro-batches
    return [
        MicroBatchPlace(
            first_sample=int(samples_RM[:, :micro].sum() + samples_RM[: comm.rank, micro].sum()),
            targets=int(targets_RM[:, micro].sum()),
        )
        for micro in range(len(batches))
    ]


def _squares(params: Mapping[str, nn.Parameter], grads: Sequence[Tensor | None]) -> dict[str, float]:
    """Of each parameter that has a gradient the square of its norm."""
    found = {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}
    return dict(zip(found, squares_of(list(found.values())), strict=True))
