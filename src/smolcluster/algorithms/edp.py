"""Elastic data parallelism: workers push gradients when they have them, and the server applies each as it comes.

Idea      Nobody waits for anybody. A worker computes lease after lease, hands each gradient to a thread that pushes it,
          and takes newer weights whenever some have arrived. By the time a gradient is applied, the server has made
          tau other updates since the weights that it was computed on: the update is scaled by 1 / (1 + tau), and by
          its part of the global batch, so that a fast worker's many fresh gradients count and a slow one's few old
          ones do little harm. Where pushes cannot keep up, waiting gradients are added up: none is dropped. Every
          application is logged, and `single --replay RUN` repeats it.
Step      worker: 1 take weights that have come  2 zero_grad, forward/backward on the lease  3 hand the gradient over
          server: 1 take the next push  2 lr = lr(samples seen) * n / global_batch / (1 + tau)  3 clip, optimizer.step
          4 answer; send weights if the worker wants some. A step is one update on the server.
Cost      a worker sends S bytes per push and receives S per worker_update_interval of its leases (S = gradient bytes),
          both hidden behind computing. Memory: the server holds the optimizer state and arriving pushes, a worker
          weights, arriving weights, and up to three gradients (training/outbox.py).
Staleness unbounded by default. With staleness_bound K a worker whose finished gradients are more than K ahead of the
          slowest worker's gets no lease until that one has caught up; K = 0 is strict syncps.
Breaks if all machines are alike and the network is good: use classicdp, whose updates are all fresh. If tau becomes
          large (many workers, a large interval): steps shrink, and the same number of samples trains less.
Source    Dean et al. 2012, Large Scale Distributed Deep Networks, section 4.1; scaling by staleness: Zhang et al. 2016,
          Staleness-aware Async-SGD, arXiv:1511.05950, section 3.1; the bound: Ho et al. 2013, Stale Synchronous
          Parallel, section 2
Try       smolcluster train --algorithm edp --preset single_mnist --local 4
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smolcluster.collectives.param_messages import Answer, PushNote
from smolcluster.collectives.param_server import Push, ServerPort, Worker
from smolcluster.collectives.param_worker import WorkerPort
from smolcluster.data.batch import Batch
from smolcluster.data.leases import Lease, SamplePool
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
from smolcluster.training.outbox import Grace, Outbox
from smolcluster.training.schedule import LrSchedule
from smolcluster.training.server import Commit, Update, as_answer, log_of
from smolcluster.training.shares import WorkerShares
from smolcluster.training.step import (
    EvalSums,
    LossScaler,
    MicroBatches,
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
    prepare_model,
)

# Leases that a worker holds at first: one to compute and one to go on with. Whoever still has to wait for one asks for
# twice as many, until it holds what it computes in the time in which one comes. But not without end: what it holds
# when all samples are lent, the others wait for.
LEASES_AHEAD = 2
MAX_LEASES_AHEAD = 64


class EdpWorker:
    """A worker: never waits, as long as there is something to compute."""

    def __init__(
        self,
        model: nn.Module,
        port: WorkerPort,
        *,
        worker_update_interval: int = 1,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        """Take the model over; its first weights come from the server.

        Args:
            model: maps inputs to logits, (B, C) or (B, T, V).
            port: to the server.
            worker_update_interval: leases after which weights are asked for again.
            precision: "fp64" converts the model; "bf16" and "fp16" compute under autocast.
            device: where this worker computes.
        """
        self.model = prepare_model(model, precision, device)
        self._params = trained(self.model)
        self._port = port
        self._interval = worker_update_interval
        self._until_pull = worker_update_interval
        self._precision = precision
        self._device = device
        self._scaler = LossScaler() if precision == "fp16" else None
        self._outbox = Outbox(port)
        self._grace = Grace()
        self._leases_ahead = LEASES_AHEAD
        self._begun = 0  # leases, since it asked last
        self._session = 0

    def train_step(self, micro_batches: MicroBatches) -> StepResult | None:
        """Compute the gradient of the port's lease and hand it over; what has become of an earlier one.

        Args:
            micro_batches: the lease's samples, as Batches or (inputs, targets) pairs.

        Returns:
            The update that an earlier push made; None if no answer has come since the last call.
        """
        batches = as_batches(micro_batches)
        lease, layout = self._port.lease, self._port.layout
        assert lease is not None, "batches come from the port's leases"
        self._port.telemetry.step = lease.number
        began = time.monotonic()
        self._ask(lease.waited)

        # 1 weights: those that came with the first lease, or have arrived since
        weights = lease.weights
        if not lease.is_first:
            wait = self._grace.seconds(began, self._port.weights_came_at())
            weights = self._port.newest_weights(wait)
            self._grace.waited(time.monotonic() - began if wait else 0.0, self._port.weights_came_at())
        if weights is not None:
            blend_weights(self._params, weights, layout, 0.0)
            take_constants(self.model, lease.constants)
        base = self._port.version()

        # 2 zero_grad, forward, backward
        for param in self._params:
            param.grad = None
        count = count_targets(batches)
        scale = 1.0 / max(count, 1)
        loss_scale = self._scaler.scale if self._scaler else 1.0
        loss_sum = forward_backward(
            self.model, batches, scale * loss_scale, self._precision,
            device=self._device, telemetry=self._port.telemetry,
        )  # fmt: skip

        # 3 hand over
        flats, missing = flat_gradients(self._params, layout)
        if self._scaler is not None:
            unscale(flats, self._scaler)
        loss = float(loss_sum)
        self._until_pull -= 1
        pull = self._until_pull <= 0
        if pull:
            self._until_pull = self._interval
        note = PushNote(
            leases=(lease.number,),
            bases=(base,),
            loss_sum=loss if math.isfinite(loss) else None,
            count=count,
            samples=sum(batch.samples for batch in batches),
            scale=scale,
            compute_s=time.monotonic() - began,
            missing=missing,
            pull=pull,
        )
        self._outbox.put(flats, note)
        self._grace.handed_over(time.monotonic(), pull=pull)
        return self._outbox.next_result()

    def _ask(self, waited: float) -> None:
        """Ask for leases in place of those that are begun, half a window at a time; for more if one came late."""
        if self._session != self._port.sessions:
            self._session, self._leases_ahead, self._begun = self._port.sessions, LEASES_AHEAD, 0
            waited = 0.0  # for the server to come
        self._begun += 1
        wanted = self._begun if self._begun >= self._leases_ahead // 2 else 0
        self._begun -= wanted
        if waited > 0.0 and self._leases_ahead < MAX_LEASES_AHEAD:
            wanted += self._leases_ahead
            self._leases_ahead *= 2
        if wanted:
            self._port.ask(wanted)

    def eval_step(self, batch: Batch) -> EvalSums:
        """Loss sum, target count and correct predictions of one batch with this worker's weights; changes nothing."""
        return evaluate_batch(self.model, batch, self._precision, self._device)

    def finish(self) -> list[StepResult]:
        """Take the run's last weights; what became of the pushes that were not told of yet, oldest first."""
        results = self._outbox.close()
        if self._port.last_weights is not None:
            blend_weights(self._params, self._port.last_weights, self._port.layout, 0.0)
        return results

    def request_stop(self) -> None:
        """The server decides when a run ends."""

    def state(self) -> dict[str, Shard]:
        """Nothing: the server holds it all."""
        return {}

    def load_state(self, reader: StateReader) -> None:
        """Nothing: weights come from the server."""


@dataclass(slots=True)
class _Member:
    """A worker as the server sees it.

    Attributes:
        worker: who.
        granted: leases that it was sent in this session.
        finished: of these, those whose gradients have come; both count from where the slowest was when it joined.
        wanted: leases that it has asked for and not got.
        leases: that are out, by number.
        has_weights: it was sent its first.
        wants_weights: it has asked for newer ones, which were not sent yet.
    """

    worker: Worker
    granted: int
    finished: int
    wanted: int = LEASES_AHEAD
    leases: dict[int, Lease] = field(default_factory=dict)
    has_weights: bool = False
    wants_weights: bool = False


class EdpServer:
    """The server: applies pushes in the order of their arrival. See training/server.py for who calls it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_factory: OptimizerFactory,
        port: ServerPort,
        pool: SamplePool,
        *,
        steps: int,
        shares: WorkerShares,
        staleness_bound: int | None = None,
        grad_clip_norm: float | None = None,
        lr_schedule: LrSchedule,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        skip_nonfinite: bool = False,
    ) -> None:
        """Take the model over: its weights are those that all workers begin with.

        Args:
            model: as the workers'.
            optimizer_factory: makes the optimizer from the parameters to train.
            port: to the workers.
            pool: lends the samples; its global batch is that of all workers together.
            steps: updates of the whole run, at most.
            shares: the parts of the global batch that the workers' leases are.
            staleness_bound: K, how far a worker may be ahead of the slowest, at least 1; None: as far as it gets.
            grad_clip_norm: bound of each push's gradient norm; None: never clipped.
            lr_schedule: learning rate after so many global batches.
            precision: "fp64" converts the model; else the weights are as they are.
            device: where to step and evaluate.
            skip_nonfinite: pass over updates that are not finite instead of stopping.
        """
        assert staleness_bound is None or staleness_bound >= 1, "K = 0 is strict syncps"
        self.model = prepare_model(model, precision, device)
        self.refused = 0
        self.hold = False
        self._named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._params = list(self._named.values())
        self._optimizer = optimizer_factory(self._params)
        self._port = port
        self._pool = pool
        self._steps = steps
        self._shares = shares
        self._staleness_bound = staleness_bound
        self._grad_clip_norm = grad_clip_norm
        self._lr_schedule = lr_schedule
        self._precision = precision
        self._device = device
        # A loss scale too large for fp16 is found by the worker, which then sends a gradient that is not finite.
        self._skip_nonfinite = skip_nonfinite or precision == "fp16"
        self._members: dict[int, _Member] = {}
        self._arrived: deque[Push] = deque()
        self._version = 0
        self._samples = 0
        self._weights: tuple[int, list[Tensor]] | None = None  # (version, flat)
        self._commits: list[Commit] = []
        self._log: list[JsonObject] = []

    # ---- what happens

    def joined(self, worker: Worker) -> None:
        """It begins where the slowest is."""
        clock = self._slowest() or 0
        self._members[worker.session] = _Member(worker, clock, clock)

    def left(self, worker: Worker) -> None:
        """What it was lent and has not pushed goes back."""
        member = self._members.pop(worker.session, None)
        for number in member.leases if member is not None else ():
            self._pool.give_back(number)

    def asked(self, worker: Worker, leases: int) -> None:
        """It has begun with a lease and would like others."""
        if (member := self._members.get(worker.session)) is not None:
            member.wanted = min(member.wanted + leases, 2 * MAX_LEASES_AHEAD)

    def pushed(self, push: Push) -> None:
        """1 take it: pushes are applied in the order of their arrival, all of them."""
        member = self._members.get(push.worker.session)
        is_lent = member is not None and {*push.note.leases} <= member.leases.keys()
        if member is None or not is_lent or max(push.note.bases) > self._version:
            self.refused += 1  # leases of an earlier session or of none, or weights that never were
            self._port.answer(push.worker, push.number, Answer(status="refused", version=self._version))
            return
        member.finished += len(push.note.leases)
        for number in push.note.leases:
            del member.leases[number]
        self._shares.measured(push.worker.rank, push.note.samples, push.note.compute_s)
        self._arrived.append(push)

    def take_commits(self) -> list[Commit]:
        """What has been applied since the last call."""
        commits, self._commits = self._commits, []
        return commits

    def take_log(self) -> list[JsonObject]:
        """What repeats this run, since the last call: see run/replay.py."""
        log, self._log = self._log, []
        return log

    # ---- what follows from it

    def advance(self) -> Iterator[Update]:
        """Apply what has come, and lend."""
        while True:
            for member in self._members.values():
                self._send_weights(member)
            self._lend()
            if self.hold or not self._arrived or self._version >= self._steps:
                return
            yield self._apply(self._arrived.popleft())

    def deadline(self) -> float | None:
        """Nothing here depends on time."""
        return None

    def is_settled(self) -> bool:
        """Always: what is lent or has arrived is lent again if the run goes on from a checkpoint."""
        return True

    def is_finished(self) -> bool:
        """No update is to come."""
        return self._version >= self._steps or (self._pool.is_finished and not self._arrived)

    def last_weights(self) -> tuple[int, list[Tensor]]:
        """What all workers end with: version, flat."""
        return self._version, self._newest_weights()

    def _lend(self) -> None:
        """Give every worker the leases that it wants, as far as K allows; the one that is furthest behind first."""
        slowest = self._slowest()
        for member in sorted(self._members.values(), key=lambda member: (member.granted, member.worker.rank)):
            while member.wanted > 0 and self._may_begin(member, slowest):
                leases = self._pool.deal([1.0], self._lease_samples(member.worker))
                if not leases:
                    return
                member.wanted -= 1
                member.granted += 1
                member.leases[leases[0].number] = leases[0]
                weights = None if member.has_weights else self._newest_weights()
                if weights is not None:
                    self._log_weights(member.worker)
                member.has_weights = True
                self._port.lend(
                    member.worker, leases[0], step=self._version, planned=0, version=self._version, weights=weights
                )

    def _lease_samples(self, worker: Worker) -> int:
        return max(1, round(self._pool.global_batch * self._shares.part(worker.rank)))

    def _may_begin(self, member: _Member, slowest: int | None) -> bool:
        out = sum(len(other.leases) for other in self._members.values()) + len(self._arrived)
        if self._version + out >= self._steps:
            return False
        # With `granted` gradients finished it would be that far ahead; K ahead it may begin, K + 1 ahead it may not.
        return self._staleness_bound is None or slowest is None or member.granted - slowest <= self._staleness_bound

    def _slowest(self) -> int | None:
        return min((member.finished for member in self._members.values()), default=None)

    def _newest_weights(self) -> list[Tensor]:
        if self._weights is None or self._weights[0] != self._version:
            self._weights = (self._version, flat_weights(self._params, self._port.layout))
        return self._weights[1]

    def _apply(self, push: Push) -> Update:
        """2 scale, 3 clip and step, 4 answer."""
        note, worker = push.note, push.worker
        tau = self._version - min(note.bases)
        loss = math.nan if note.loss_sum is None else note.loss_sum / max(note.count, 1)
        install_gradients(self._params, push.gradients, self._port.layout, note.missing)
        grad_norm = clip_gradients(self._params, self._grad_clip_norm, 1.0 / (note.scale * max(note.count, 1)))
        part = note.samples / self._pool.global_batch
        lr = self._lr_schedule(self._samples // self._pool.global_batch) * part / (1 + tau)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        is_applied = note.count > 0 and is_applicable(
            self._version, loss, grad_norm, lr, skip_nonfinite=self._skip_nonfinite
        )
        if is_applied:
            self._optimizer.step()
        result = StepResult(self._version, loss, note.count, note.samples, grad_norm, lr, is_applied)

        ranges = {}
        for number in note.leases:
            lease = self._pool.commit(number)
            assert lease is not None, "a lease that is out is pushed once"
            ranges[number] = lease.ranges
            self._commits.append(Commit(self._version, worker, lease))
        self._log.append(log_of(result, [push], ranges, taus=[self._version - base for base in note.bases]))
        self._samples += note.samples
        self._version += 1
        self._port.answer(worker, push.number, as_answer(result, self._version))
        if note.pull and (member := self._members.get(worker.session)) is not None:
            member.wants_weights = True
            self._send_weights(member)
        return Update(result, [self._version - 1 - base for base in note.bases])

    def _send_weights(self, member: _Member) -> None:
        """One set at a time: where a link is slow, older ones would only be in the way of newer ones."""
        if member.wants_weights and self._port.has_room(member.worker):
            member.wants_weights = False
            self._log_weights(member.worker)
            self._port.send_weights(member.worker, self._version, self._newest_weights())

    def _log_weights(self, worker: Worker) -> None:
        self._log.append({"event": "weights", "session": worker.session, "version": self._version})

    # ---- state

    def state(self) -> dict[str, Shard]:
        """Weights, optimizer, and how many samples they have seen."""
        seen = Shard(torch.tensor(self._samples, dtype=torch.float64), "pending")
        return model_state(self.model) | optimizer_state(self._optimizer, self._named) | {"edp/samples": seen}

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint; before any worker has joined."""
        load_model_state(self.model, reader)
        load_optimizer_state(self._optimizer, self._named, reader)
        self._samples = round(float(reader.read("edp/samples")))
        self._version = reader.step
