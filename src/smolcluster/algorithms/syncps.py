"""Synchronous parameter server: workers push gradients for one step after the other, a server averages and steps.

Idea      The server holds the weights and lends samples: for each step it deals the global batch to the workers. Each
          worker computes the summed gradient of its part and pushes it. When all have pushed, the server averages by
          what was computed, steps its optimizer and answers. Every `worker_update_interval` steps the answer carries
          weights, which a worker blends with its own. Who has not pushed `timeout` seconds after the first push of a
          step is late: the step closes without it, its samples go back and are dealt again, and its push is refused
          when it comes. No step waits for a worker that was late, until one of its pushes comes in time again.
Step      worker: 1 take weights  2 zero_grad, forward/backward on the lease  3 push  4 wait for the answer
          server: 1 deal samples  2 gather pushes until the step closes  3 average, clip, optimizer.step  4 answer
Cost      a worker sends S bytes per step and receives S / worker_update_interval (S = gradient bytes); the server
          N times that, over one connection each: its link is what limits N. Memory: the server holds the optimizer
          state and N gradients, a worker weights and K + 1 gradients.
Staleness K = 0: workers compute on the newest weights (interval 1, alpha 0: equal to `single`). K > 0: leases are
          dealt K steps ahead, so that a worker computes while its push and the answer travel; the gradient of step t
          is applied K steps late, as in `single` with the same K.
Breaks if the server's link carries fewer than N * S bytes in the time of a step: use classicdp. If one worker is much
          slower than the others: give it a smaller share (cluster.shares), or use edp.
Source    Li et al. 2014, Scaling Distributed Machine Learning with the Parameter Server, section 3; closing without
          stragglers: Chen et al. 2016, Revisiting Distributed Synchronous SGD, arXiv:1604.00981, section 3 (backup
          workers); the blend: Polyak and Juditsky 1992
Try       smolcluster train --algorithm syncps --preset single_mnist --local 4
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smolcluster.collectives.param_messages import Answer, PushNote
from smolcluster.collectives.param_server import Push, ServerPort, Worker
from smolcluster.collectives.param_worker import Ticket, WorkerPort
from smolcluster.data.batch import Batch
from smolcluster.data.leases import Lease, Range, SamplePool
from smolcluster.kinds import JsonObject
from smolcluster.training.flat import (
    blend_weights,
    flat_gradients,
    flat_weights,
    install_gradients,
    take_constants,
    trained,
    unscale,
)
from smolcluster.training.optim import OptimizerFactory, load_optimizer_state, optimizer_state
from smolcluster.training.schedule import LrSchedule
from smolcluster.training.server import Commit, Update, as_answer, as_result, gathered_log_of, log_of
from smolcluster.training.shares import WorkerShares
from smolcluster.training.step import (
    EvalSums,
    LossScaler,
    MicroBatches,
    PendingGradient,
    Precision,
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


class SyncPsWorker:
    """A worker: computes what it is lent."""

    def __init__(
        self,
        model: nn.Module,
        port: WorkerPort,
        *,
        staleness_bound: int = 0,
        polyak_alpha: float = 0.0,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        """Take the model over; its first weights come from the server.

        Args:
            model: maps inputs to logits, (B, C) or (B, T, V).
            port: to the server.
            staleness_bound: K, how many pushes may be unanswered when the next step begins.
            polyak_alpha: what the worker's own weights count when weights come.
            precision: "fp64" converts the model; "bf16" and "fp16" compute under autocast.
            device: where this worker computes.
        """
        self.model = prepare_model(model, precision, device)
        self._params = trained(self.model)
        self._port = port
        self._staleness_bound = staleness_bound
        self._polyak_alpha = polyak_alpha
        self._precision = precision
        self._device = device
        self._scaler = LossScaler() if precision == "fp16" else None
        self._under_way: deque[Ticket] = deque()

    def train_step(self, micro_batches: MicroBatches) -> StepResult | None:
        """Compute and push the gradient of the port's lease; the answer to the push that is due.

        Args:
            micro_batches: the lease's samples, as Batches or (inputs, targets) pairs.

        Returns:
            What the step gave over all workers; None if no answer is due, or if it was refused or lost.
        """
        batches = as_batches(micro_batches)
        lease, layout = self._port.lease, self._port.layout
        assert lease is not None, "batches come from the port's leases"
        self._port.telemetry.step = lease.step
        began = time.monotonic()

        # 1 weights, if the lease brought some
        if lease.weights is not None:
            alpha = 0.0 if lease.is_first else self._polyak_alpha
            blend_weights(self._params, lease.weights, layout, alpha)
            take_constants(self.model, lease.constants)

        # 2 zero_grad, forward, backward
        for param in self._params:
            param.grad = None
        count = count_targets(batches)
        loss_scale = self._scaler.scale if self._scaler else 1.0
        scale = 1.0 / max(lease.planned, 1)
        loss_sum = forward_backward(
            self.model, batches, scale * loss_scale, self._precision,
            device=self._device, telemetry=self._port.telemetry,
        )  # fmt: skip

        # 3 push
        flats, missing = flat_gradients(self._params, layout)
        if self._scaler is not None:
            unscale(flats, self._scaler)
        loss = float(loss_sum)
        note = PushNote(
            leases=(lease.number,),
            bases=(lease.version,),
            loss_sum=loss if math.isfinite(loss) else None,
            count=count,
            samples=sum(batch.samples for batch in batches),
            scale=scale,
            compute_s=time.monotonic() - began,
            missing=missing,
        )
        self._under_way.append(self._port.push(flats, note))

        # 4 the answer to the oldest push, with K = 0 this one
        while len(self._under_way) > self._staleness_bound:
            result = as_result(self._under_way.popleft().wait())
            if result is not None:
                return result
        return None

    def eval_step(self, batch: Batch) -> EvalSums:
        """Loss sum, target count and correct predictions of one batch with this worker's weights; changes nothing."""
        return evaluate_batch(self.model, batch, self._precision, self._device)

    def finish(self) -> list[StepResult]:
        """Take the run's last weights; the answers that are still to come, oldest first."""
        results = [as_result(ticket.wait()) for ticket in self._under_way]
        self._under_way.clear()
        if self._port.last_weights is not None:
            blend_weights(self._params, self._port.last_weights, self._port.layout, 0.0)
        return [result for result in results if result is not None]

    def request_stop(self) -> None:
        """The server decides when a run ends."""

    def state(self) -> dict[str, Shard]:
        """Nothing: the server holds it all."""
        return {}

    def load_state(self, reader: StateReader) -> None:
        """Nothing: weights come from the server."""


@dataclass(slots=True)
class _Member:
    """A worker as the server sees it."""

    worker: Worker
    until_weights: int = 0  # leases until one brings weights
    is_behind: bool = False  # it was late, and no push of it has come in time since
    computing: set[int] = field(default_factory=set)  # leases that it was sent and has not pushed


@dataclass(frozen=True, slots=True)
class _Sum:
    """What the pushes of a step add up to."""

    gradients: list[Tensor]
    loss_sum: float
    count: int
    samples: int
    scale: float
    missing: list[int]


@dataclass(slots=True)
class _Gathering:
    """A step that is open: dealt, and not yet applied.

    Attributes:
        number: the step's.
        planned: targets that were dealt.
        awaited: sessions that the step waits for.
        waiting: lease numbers that are out, by session.
        pushes: what has come, by session.
        ranges: samples of the leases that have come.
        first_push_at: when the first came (`time.monotonic()`); None: none has.
        total: of all pushes, once it is made; of a step from a checkpoint all that there is.
    """

    number: int
    planned: int = 0
    awaited: set[int] = field(default_factory=set)
    waiting: dict[int, int] = field(default_factory=dict)
    pushes: dict[int, Push] = field(default_factory=dict)
    ranges: dict[int, tuple[Range, ...]] = field(default_factory=dict)
    first_push_at: float | None = None
    total: _Sum | None = None

    def in_order(self) -> list[Push]:
        """By rank: added up so, they give the same bits, whoever was faster."""
        return sorted(self.pushes.values(), key=lambda push: push.worker.rank)

    @property
    def is_empty(self) -> bool:
        """Nobody computes it, and nobody has."""
        return not self.waiting and not self.pushes and self.total is None


class SyncPsServer:
    """The server: deals samples, gathers pushes, steps. See training/server.py for who calls it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_factory: OptimizerFactory,
        port: ServerPort,
        pool: SamplePool,
        *,
        steps: int,
        count_planned: Callable[[Sequence[Range]], int],
        shares: WorkerShares,
        staleness_bound: int = 0,
        timeout: float | None = None,
        worker_update_interval: int = 1,
        grad_clip_norm: float | None = None,
        lr_schedule: LrSchedule | None = None,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        skip_nonfinite: bool = False,
    ) -> None:
        """Take the model over: its weights are those that all workers begin with.

        Args:
            model: as the workers'.
            optimizer_factory: makes the optimizer from the parameters to train.
            port: to the workers.
            pool: lends the samples; a step is one deal of it.
            steps: updates of the whole run, at most.
            count_planned: the targets of some samples.
            shares: the workers' relative weights.
            staleness_bound: K, the steps that are dealt ahead.
            timeout: seconds after its first push when a step closes; None: it waits for every worker.
            worker_update_interval: leases of a worker until one brings weights again.
            grad_clip_norm: bound of the global gradient norm; None: never clipped.
            lr_schedule: learning rate of update i; None: what the optimizer has.
            precision: "fp64" converts the model; else the weights are as they are.
            device: where to step and evaluate.
            skip_nonfinite: pass over updates that are not finite instead of stopping.
        """
        self.model = prepare_model(model, precision, device)
        self.refused = 0
        self.hold = False
        self._named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._params = list(self._named.values())
        self._optimizer = optimizer_factory(self._params)
        self._port = port
        self._pool = pool
        self._steps = steps
        self._count_planned = count_planned
        self._shares = shares
        self._staleness_bound = staleness_bound
        self._timeout = timeout
        self._interval = worker_update_interval
        self._grad_clip_norm = grad_clip_norm
        self._lr_schedule = lr_schedule
        self._precision = precision
        self._device = device
        # A loss scale too large for fp16 is found by the worker, which then sends a gradient that is not finite.
        self._skip_nonfinite = skip_nonfinite or precision == "fp16"
        self._members: dict[int, _Member] = {}
        self._open: deque[_Gathering] = deque()
        self._next_step = 0
        self._version = 0
        self._weights: tuple[int, list[Tensor]] | None = None  # (version, flat)
        self._commits: list[Commit] = []
        self._log: list[JsonObject] = []

    # ---- what happens

    def joined(self, worker: Worker) -> None:
        """It gets its first lease, and weights with it, when the next step is dealt."""
        self._members[worker.session] = _Member(worker)

    def left(self, worker: Worker) -> None:
        """What it was lent goes back; what it has pushed counts."""
        self._members.pop(worker.session, None)
        for step in self._open:
            step.awaited.discard(worker.session)
            if (lease := step.waiting.pop(worker.session, None)) is not None:
                self._pool.give_back(lease)

    def asked(self, worker: Worker, leases: int) -> None:
        """Leases are dealt step by step, asked for or not."""

    def pushed(self, push: Push) -> None:
        """Take a push in, or refuse it if its step has closed."""
        session, number = push.worker.session, push.note.leases[0]
        member = self._members.get(session)
        if member is None:
            return
        self._shares.measured(push.worker.rank, push.note.samples, push.note.compute_s)
        member.computing.discard(number)
        # A step whose sum is made is as good as closed: a checkpoint has it as it is.
        gathering = (step for step in self._open if step.total is None and step.waiting.get(session) == number)
        if (step := next(gathering, None)) is None:
            self.refused += 1
            self._port.answer(push.worker, push.number, Answer(status="refused", version=self._version))
            return
        del step.waiting[session]
        step.pushes[session] = push
        step.first_push_at = step.first_push_at or time.monotonic()
        member.is_behind = False
        lease = self._pool.commit(number)
        assert lease is not None, "a lease that is out belongs to one open step"
        step.ranges[number] = lease.ranges
        self._commits.append(Commit(step.number, push.worker, lease))

    def take_commits(self) -> list[Commit]:
        """What has been taken in since the last call."""
        commits, self._commits = self._commits, []
        return commits

    def take_log(self) -> list[JsonObject]:
        """What repeats this run, since the last call: see run/replay.py. With `hold` set, also what is gathered."""
        log, self._log = self._log, []
        if self.hold:
            log += [gathered_log_of(step.number, step.in_order(), step.ranges) for step in self._open if step.pushes]
        return log

    # ---- what follows from it

    def advance(self) -> Iterator[Update]:
        """Deal and close what can be; gives each update when it is made. With `hold` set no step begins or closes."""
        while True:
            self._deal()
            if self.hold or not self._open or not self._may_close(self._open[0]):
                return
            yield self._close(self._open.popleft())

    def deadline(self) -> float | None:
        """When to call `advance` again though nothing happens (`time.monotonic()`); None: never."""
        if self._timeout is None:
            return None
        waiting = list(self._open) if self.hold else list(self._open)[:1]
        begun = [step.first_push_at for step in waiting if not self._may_close(step) and step.first_push_at is not None]
        return min(begun) + self._timeout if begun else None

    def last_weights(self) -> tuple[int, list[Tensor]]:
        """What all workers end with: version, flat."""
        return self._version, self._newest_weights()

    def is_settled(self) -> bool:
        """With `hold` set: every step that was dealt has all the gradients that it will get."""
        return all(self._may_close(step) or (step.is_empty and not self._members) for step in self._open)

    def is_finished(self) -> bool:
        """No update is to come."""
        is_all_dealt = self._next_step >= self._steps or self._pool.is_finished
        return is_all_dealt and not self._open

    def _deal(self) -> None:
        """1 deal: open steps up to K ahead, each with a lease for every worker that is not busy with an old one."""
        while self._open and self._open[-1].is_empty:
            self._open.pop()  # all that it was dealt to are gone
            self._next_step -= 1
        for step in self._open:
            if step.is_empty:  # steps after it have pushes: it is dealt again, under its own number
                self._fill(step)
        while not self.hold and len(self._open) <= self._staleness_bound and self._next_step < self._steps:
            step = _Gathering(self._next_step)
            if not self._fill(step):
                return
            self._open.append(step)
            self._next_step += 1

    def _fill(self, step: _Gathering) -> bool:
        """Lend the samples of a step; False: there is nobody, or nothing to lend."""
        everyone = sorted(self._members.values(), key=lambda member: member.worker.rank)
        ready = [member for member in everyone if not (member.is_behind and member.computing)]
        shares = [self._share(member) for member in ready]
        if not ready or sum(shares) <= 0:
            return False
        limit = None
        if len(ready) < len(everyone):
            part = sum(shares) / sum(self._share(member) for member in everyone)
            limit = max(1, round(part * self._pool.global_batch))
        leases = self._pool.deal(shares, limit)
        if not leases:
            return False
        step.planned = self._count_planned([part for lease in leases for part in lease.ranges])
        for member, lease in zip(ready, leases, strict=True):
            if lease.samples:
                self._lend(member, lease, step)
            else:
                self._pool.commit(lease.number)
        return True

    def _share(self, member: _Member) -> float:
        return self._shares.weight(member.worker.rank)

    def _lend(self, member: _Member, lease: Lease, step: _Gathering) -> None:
        session = member.worker.session
        step.waiting[session] = lease.number
        if not member.is_behind:
            step.awaited.add(session)
        member.computing.add(lease.number)
        weights = None
        if member.until_weights == 0:
            weights, member.until_weights = self._newest_weights(), self._interval
            self._log.append({"event": "weights", "session": session, "version": self._version})
        member.until_weights -= 1
        self._port.lend(
            member.worker, lease, step=step.number, planned=step.planned, version=self._version, weights=weights
        )

    def _newest_weights(self) -> list[Tensor]:
        if self._weights is None or self._weights[0] != self._version:
            self._weights = (self._version, flat_weights(self._params, self._port.layout))
        return self._weights[1]

    def _may_close(self, step: _Gathering) -> bool:
        """2 gather: all are here, or all that are awaited, or the time is over."""
        if step.total is not None:
            return True
        if not step.pushes:
            return False
        if not step.waiting or (step.awaited and not step.awaited & step.waiting.keys()):
            return True
        assert step.first_push_at is not None
        return self._timeout is not None and time.monotonic() >= step.first_push_at + self._timeout

    def _close(self, step: _Gathering) -> Update:
        """3 average, clip, step: on the sum of what has come, corrected by how much that is."""
        for session, number in step.waiting.items():
            self._pool.give_back(number)
            self._members[session].is_behind = True
        total = self._sum(step)
        loss = total.loss_sum / max(total.count, 1)
        install_gradients(self._params, total.gradients, self._port.layout, total.missing)
        correction = 1.0 / (total.scale * max(total.count, 1))
        grad_norm = clip_gradients(self._params, self._grad_clip_norm, correction)
        if self._lr_schedule is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr_schedule(step.number)
        lr = float(self._optimizer.param_groups[0]["lr"])
        is_applied = total.count > 0 and is_applicable(
            step.number, loss, grad_norm, lr, skip_nonfinite=self._skip_nonfinite
        )
        if is_applied:
            self._optimizer.step()
        stalenesses = [self._version - base for push in step.pushes.values() for base in push.note.bases]
        self._version += 1

        # 4 answer
        result = StepResult(step.number, loss, total.count, total.samples, grad_norm, lr, is_applied)
        pushes = step.in_order()
        self._log.append(log_of(result, pushes, step.ranges))
        for push in pushes:
            self._port.answer(push.worker, push.number, as_answer(result, self._version))
        return Update(result, stalenesses)

    def _sum(self, step: _Gathering) -> _Sum:
        """The pushes of a step added up."""
        if step.total is not None:
            return step.total
        pushes = step.in_order()
        first, *others = pushes
        scale = first.note.scale
        for push in others:
            for flat, other in zip(first.gradients, push.gradients, strict=True):
                flat.add_(other, alpha=scale / push.note.scale)
        missing = set(first.note.missing).intersection(*(push.note.missing for push in others))
        losses = [math.nan if push.note.loss_sum is None else push.note.loss_sum for push in pushes]
        step.total = _Sum(
            first.gradients,
            sum(losses),
            sum(push.note.count for push in pushes),
            sum(push.note.samples for push in pushes),
            scale,
            sorted(missing),
        )
        return step.total

    # ---- state

    def state(self) -> dict[str, Shard]:
        """Weights, optimizer, and the gathered gradients of steps that are not applied. Only while it is settled."""
        waiting = [self._as_pending(step) for step in self._open if step.pushes or step.total is not None]
        shards = model_state(self.model) | optimizer_state(self._optimizer, self._named)
        return shards | pending_state(waiting, list(self._named))

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint; before any worker has joined."""
        load_model_state(self.model, reader)
        load_optimizer_state(self._optimizer, self._named, reader)
        pending = read_pending(reader, self._params, list(self._named))
        for item in pending:
            missing = [number for number, grad in enumerate(item.grads) if grad is None]
            flats = self._port.layout.flatten(item.grads)
            total = _Sum(flats, item.loss_sum, item.count, item.samples, 1.0 / item.planned, missing)
            self._open.append(_Gathering(item.step, item.planned, total=total))
        self._version = reader.step
        self._next_step = max([reader.step, *(item.step + 1 for item in pending)])

    def _as_pending(self, step: _Gathering) -> PendingGradient:
        total = self._sum(step)
        grads: list[Tensor | None] = [*self._port.layout.parts(total.gradients)]
        for number in total.missing:
            grads[number] = None
        return PendingGradient(
            step.number, total.loss_sum, total.count, total.samples, 0, round(1.0 / total.scale), 1.0, grads
        )
