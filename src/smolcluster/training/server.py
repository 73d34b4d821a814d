"""What a parameter server does all day, whatever the algorithm: a rule decides, this counts, writes and evaluates.

One thread works off the port's events. A rule (syncps.py, edp.py) takes each in and says which updates follow; between
two updates the ledger is written, and a checkpoint or an evaluation made where one is due.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from smolcluster.checkpoint.ledger import Ledger
from smolcluster.checkpoint.state import Shard, StateReader
from smolcluster.collectives.param_messages import Answer
from smolcluster.collectives.param_server import Asked, Event, Joined, Left, Push, Reported, ServerPort, Worker
from smolcluster.data.leases import Lease, Range
from smolcluster.errors import PeerLost, RendezvousTimeout, SmolError
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.telemetry import COMPUTE
from smolcluster.training.role import RunContext
from smolcluster.training.step import EvalSums, StepResult
from smolcluster.training.trainer import Progress, TrainResult, evaluation_numbers, json_number, stop_on_interrupt

logger = logging.getLogger(__name__)

# Nobody knows who still comes: a run begins with those who are here, so many patiences after enough of them are.
START_PATIENCES = 6
# So many patiences are the workers waited for that a run cannot begin without.
JOIN_PATIENCES = 60
# With fewer workers than it needs, a run waits so many patiences for one to come (back) before it gives up.
RETURN_PATIENCES = 6
# The last word of the workers is waited for so many patiences. Those who fell silent not longer ago have this time to
# come back and hear that the run is over: without a server they would look for it long.
REPORT_PATIENCES = 6
# From when last weights have left, if some are on their way; but these are not waited for without end.
LAST_WEIGHTS_PATIENCES = 60
# Whoever stops a run wants it to end: seconds for the last words then.
HURRIED_S = 3.0
# Seconds between looks whether somebody wants the run to stop.
SLICE = 0.2


@dataclass(frozen=True, slots=True)
class Commit:
    """Samples that count from now on, in which update, and whose work they are."""

    step: int
    worker: Worker
    lease: Lease


@dataclass(frozen=True, slots=True)
class Update:
    """A step of the server's optimizer.

    Attributes:
        result: what it gave.
        stalenesses: of each gradient in it: versions between the weights that it was computed on and its application.
    """

    result: StepResult
    stalenesses: Sequence[int] = ()


class Rule(Protocol):
    """What an algorithm does with pushes; all on the server's thread.

    Attributes:
        model: holds the weights.
        refused: pushes refused so far.
        hold: set while a checkpoint is due: nothing is dealt, nothing applied.
    """

    model: nn.Module
    refused: int
    hold: bool

    def joined(self, worker: Worker) -> None:
        """A worker is here."""
        ...

    def left(self, worker: Worker) -> None:
        """It is gone; what it was lent goes back."""
        ...

    def asked(self, worker: Worker, leases: int) -> None:
        """It asks for so many leases more."""
        ...

    def pushed(self, push: Push) -> None:
        """A gradient is here."""
        ...

    def advance(self) -> Iterator[Update]:
        """Do what can be done now; each update is given right after it was made, and before what follows from it."""
        ...

    def take_commits(self) -> list[Commit]:
        """What counts since the last call."""
        ...

    def take_log(self) -> list[JsonObject]:
        """Lines of the application log since the last call: what repeats the run."""
        ...

    def deadline(self) -> float | None:
        """When to call `advance` though nothing happens (`time.monotonic()`); None: never."""
        ...

    def last_weights(self) -> tuple[int, list[Tensor]]:
        """The weights of now, for workers to end with: their version, flat on the CPU."""
        ...

    def is_settled(self) -> bool:
        """With `hold` set: its state can be saved."""
        ...

    def is_finished(self) -> bool:
        """No update is to come."""
        ...

    def state(self) -> Mapping[str, Shard]:
        """All that the next update depends on. Shares memory with the rule: store it before the next update."""
        ...

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint, before anybody joins."""
        ...


@dataclass(slots=True)
class Crew:
    """Who took part.

    Attributes:
        ranks: ranks that have been here.
        joined: ranks that came when the run had begun, perhaps for the second time; each once.
        lost: ranks that were lost and have not come back.
        reports: what the workers said of themselves at the end, by rank.
    """

    ranks: set[int] = field(default_factory=set)
    joined: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    reports: dict[int, JsonObject] = field(default_factory=dict)


class ServerRole:
    """Serves workers until the run is over. See training/role.py."""

    def __init__(
        self,
        rule: Rule,
        port: ServerPort,
        *,
        workers: int,
        min_workers: int,
        patience: float,
        planned_steps: int,
        ledger: Ledger | None = None,
        applications: Ledger | None = None,
        evaluate: Callable[[nn.Module], EvalSums] | None = None,
        evaluates_beside: bool = False,
        eval_steps: int | None = None,
        checkpoint: Callable[[Progress], None] | None = None,
        checkpoint_steps: int | None = None,
        start: Progress | None = None,
        note: Callable[[str], None] | None = None,
        ended: Callable[[], SmolError | None] | None = None,
        rank_samples: list[int] | None = None,
        report_patiences: float = REPORT_PATIENCES,
    ) -> None:
        """Say what to do; `run` does it.

        Args:
            rule: the algorithm.
            port: to the workers; a reception lets them in meanwhile.
            workers: how many are expected at the start.
            min_workers: with fewer the run does not go on.
            patience: `cluster.patience`, in seconds.
            planned_steps: updates that the run will about have, for those who watch it.
            ledger: where commits go.
            applications: where updates are logged that can be replayed.
            evaluate: evaluates a model on the whole validation split.
            evaluates_beside: while training goes on, on a thread of its own: so that no worker waits for it.
            eval_steps: evaluate after every so many updates, and at the end; None: only at the end.
            checkpoint: writes one; called between two updates.
            checkpoint_steps: call it after every so many updates, and at the end; None: only at the end.
            start: how far the rule's state is.
            note: shows the user a line.
            ended: asked now and then what has ended the run from outside; None: nothing.
            rank_samples: samples that count, by rank; counted on here.
            report_patiences: the workers' last word is waited for so many patiences.
        """
        self._report_patiences = report_patiences
        self._ended = ended or (lambda: None)
        self._rank_samples = rank_samples
        self.crew = Crew()
        self._rule = rule
        self._port = port
        self._workers = workers
        self._min_workers = min_workers
        self._patience = patience
        self._planned_steps = planned_steps
        self._ledger = ledger
        self._applications = applications
        self._evaluate = evaluate
        self._evaluates_beside = evaluates_beside
        self._evaluation: threading.Thread | None = None
        self._eval_steps = eval_steps
        self._checkpoint = checkpoint
        self._checkpoint_steps = checkpoint_steps
        self._note = note or (lambda _text: None)
        start = start or Progress()
        self._steps = start.steps
        self._samples = start.samples
        self._tokens = start.tokens
        self._train_s = start.train_s
        self._train_loss = start.train_loss
        self._start = start
        self._eval: EvalSums | None = None
        self._evaluated: queue.SimpleQueue[tuple[int, EvalSums]] = queue.SimpleQueue()
        self._evaluated_at = -1
        self._saved_at = start.steps
        self._began = 0.0
        self._lap = 0.0
        self._here: set[int] = set()  # sessions that this has heard of
        self._silent_since: dict[int, float] = {}  # ranks that may come back
        self._too_few_since: float | None = None
        self._has_begun = False
        self._is_over = False

    def run(self, context: RunContext) -> TrainResult:
        """Serve to the end, or until somebody asks to stop. Blocks.

        Raises:
            TrainingStopped: the loss is not finite.
            PeerLost: too few workers are left.
        """
        self._context = context
        with stop_on_interrupt(context.stop):
            try:
                return self._serve()
            except BaseException as error:  # whatever it is: workers that are not told would wait for leases
                self._port.end(error)
                raise

    def _serve(self) -> TrainResult:
        self._await_workers()
        self._has_begun = True
        self._began = time.monotonic() - self._start.wall_s
        self._lap = time.monotonic()
        self._port.telemetry.step = self._steps
        stopped = False
        while not self._rule.is_finished():
            for update in self._timed(self._rule.advance()) if self._too_few_since is None else ():
                self._port.flush()  # workers hear of it before anything is written
                with self._port.telemetry.traced("write"):
                    self._after_update(update)
                if self._context.stop.is_set():
                    break
                self._handle_next(0.0)  # who asks meanwhile does not wait until all that has come is applied
                if self._too_few_since is not None:
                    break
            if self._context.stop.is_set():
                stopped = not self._rule.is_finished()
                break
            if not self._rule.is_finished():
                self._handle_next(self._rule.deadline() if self._too_few_since is None else None)
        self._conclude(stopped)
        return self._result(stopped)

    def _timed(self, updates: Iterator[Update]) -> Iterator[Update]:
        """The same, each with its row in a trace."""
        while True:
            began = time.monotonic()
            update = next(updates, None)
            if update is None:
                return
            telemetry = self._port.telemetry
            if telemetry.trace is not None:
                telemetry.step = update.result.step + 1  # the optimizer's span is of the step that is to come
                telemetry.trace.add(COMPUTE, "update", began, time.monotonic(), {"step": update.result.step})
            yield update

    def _await_workers(self) -> None:
        """Until all are here, or enough of them for a while."""
        enough_since: float | None = None
        began = time.monotonic()
        while len(self._here) < self._workers and not self._context.stop.is_set():
            now = time.monotonic()
            if self._rule.is_finished():  # resumed at its end: those who look for the server hear of it
                if now - began > self._report_patiences * self._patience:
                    return
                self._handle_next(now + SLICE, is_start=True)
                continue
            if len(self._here) >= self._min_workers:
                enough_since = enough_since or now
                if now - enough_since > START_PATIENCES * self._patience:
                    break
            elif now - began > JOIN_PATIENCES * self._patience:
                raise RendezvousTimeout(
                    f"{len(self._here)} of {self._workers} workers came within {JOIN_PATIENCES * self._patience:g} s, "
                    f"and the run needs {self._min_workers}. Start the missing ones, or look for a firewall in between"
                )
            self._handle_next(now + SLICE, is_start=True)

    def _handle_next(self, deadline: float | None, *, is_start: bool = False) -> None:
        """Wait for one event, or until `deadline`, and take in all that are there."""
        if (error := self._ended()) is not None:
            raise error
        self._port.flush()
        event = self._port.next_event(0.0)
        if event is None:
            self._flush_logs()  # there is time for it
            now = time.monotonic()
            until = now + SLICE if deadline is None else min(deadline, now + SLICE)
            event = self._port.next_event(max(0.0, until - now))
        while event is not None:
            self._take_in(event)
            event = self._port.next_event(0.0)
        if not is_start:
            self._check_number()

    def _take_in(self, event: Event) -> None:
        if isinstance(event, Joined):
            self._here.add(event.worker.session)
            self._joined(event.worker)
        elif isinstance(event, Left):
            self._here.discard(event.worker.session)
            self._left(event)
        elif isinstance(event, Push):
            self._rule.pushed(event)
        elif isinstance(event, Asked):
            self._rule.asked(event.worker, event.leases)
        elif isinstance(event, Reported):
            self.crew.reports[event.worker.rank] = event.report

    def _joined(self, worker: Worker) -> None:
        crew = self.crew
        self._silent_since.pop(worker.rank, None)
        if worker.rank in crew.lost:
            crew.lost.remove(worker.rank)
        if self._has_begun and worker.rank not in crew.joined:
            crew.joined.append(worker.rank)
        if self._has_begun:
            back = "is back" if worker.rank in crew.ranks else "has joined"
            self._note(f"{worker.name} (rank {worker.rank}) {back}: {_counted(len(self._port.workers()))}")
        crew.ranks.add(worker.rank)
        self._rule.joined(worker)

    def _left(self, event: Left) -> None:
        worker = event.worker
        self._rule.left(worker)
        self._port.forget(worker)
        if isinstance(event.error, PeerLost) and event.error.may_return:
            self._silent_since[worker.rank] = time.monotonic()
        logger.warning("worker left rank=%d session=%d reason=%s", worker.rank, worker.session, event.error)
        if self._is_over or worker.rank in self.crew.lost:
            return
        if all(other.rank != worker.rank for other in self._port.workers()):
            self.crew.lost.append(worker.rank)
            why = "has left" if event.error is None else "is lost"
            here = len(self._port.workers())
            self._note(f"{worker.name} (rank {worker.rank}) {why}; {_counted(here)} {'goes' if here == 1 else 'go'} on")

    def _check_number(self) -> None:
        """With too few workers nothing is lent or applied; give up when there were for too long."""
        here = len(self._port.workers())
        if here >= self._min_workers:
            self._too_few_since = None
            return
        now = time.monotonic()
        self._too_few_since = self._too_few_since or now
        limit = RETURN_PATIENCES * self._patience
        if now - self._too_few_since > limit:
            lost = self.crew.lost[-1] if self.crew.lost else -1
            self._save(is_due=True)
            raise PeerLost(
                f"rank{'s' if len(self.crew.lost) != 1 else ''} {', '.join(map(str, sorted(self.crew.lost)))} "
                f"{'are' if len(self.crew.lost) != 1 else 'is'} lost: {here} workers are here, the run needs "
                f"{self._min_workers} (cluster.min_ranks is {self._min_workers + 1}), and none came back within "
                f"{limit:g} s. Start them again and go on with --resume latest",
                lost,
            )

    def _after_update(self, update: Update) -> None:
        result = update.result
        self._write_commits()
        self._steps += 1
        self._samples += result.samples
        self._tokens += result.count
        self._train_loss = json_number(result.loss)
        now = time.monotonic()
        step_s, self._lap = now - self._lap, now
        self._train_s += step_s
        row: JsonObject = {
            "time": 0.0,
            "rank": 0,
            "step": result.step,
            "train/loss": json_number(result.loss),
            "train/grad_norm": json_number(result.grad_norm),
            "train/lr": result.lr,
            "train/samples": result.samples,
            "train/tokens_per_s": result.count / max(step_s, 1e-9),
            "time/step_s": step_s,
            "push/refused": self._rule.refused,
        }
        if update.stalenesses:
            row["staleness/mean"] = sum(update.stalenesses) / len(update.stalenesses)
            row["staleness/max"] = max(update.stalenesses)
        is_last = self._rule.is_finished()
        is_eval_due = bool(self._eval_steps) and self._steps % (self._eval_steps or 1) == 0
        if is_last or (is_eval_due and not self._evaluates_beside):
            row |= self._evaluate_now()
        elif is_eval_due:
            self._evaluate_beside(result.step)
        self._write_evaluated()
        self._write(row)
        self._context.metrics.progress(self._steps, max(self._planned_steps, self._steps), row)
        self._save(is_due=is_last or bool(self._checkpoint_steps and self._steps % self._checkpoint_steps == 0))
        self._lap = time.monotonic()

    def _write(self, row: JsonObject) -> None:
        telemetry = self._port.telemetry
        row |= {name: telemetry.increase(name) for name in ("link/sent_bytes", "link/recv_bytes")}
        row["time"] = time.time()
        self._context.metrics.write(row)

    def _write_commits(self) -> None:
        """What counts now, and what repeats it."""
        commits, log = self._rule.take_commits(), self._rule.take_log()
        if self._applications is not None and log:
            self._applications.append(log)
        if self._rank_samples is not None:
            for commit in commits:
                self._rank_samples[commit.worker.rank] += commit.lease.samples
        if self._ledger is not None and commits:
            self._ledger.append([_as_line(commit) for commit in commits])

    def _flush_logs(self) -> None:
        for log in (self._ledger, self._applications):
            if log is not None:
                log.flush()

    def _evaluate_now(self) -> JsonObject:
        """With the server's weights."""
        if self._evaluate is None:
            return {}
        self._join_evaluation()
        self._eval, self._evaluated_at = self._evaluate(self._rule.model), self._steps
        return _as_columns(self._eval)

    def _evaluate_beside(self, step: int) -> None:
        """With a copy of the weights, on a thread of its own; its row comes later. One at a time."""
        if self._evaluate is None or (self._evaluation is not None and self._evaluation.is_alive()):
            return
        evaluate, model = self._evaluate, copy.deepcopy(self._rule.model)

        def run() -> None:
            try:
                self._evaluated.put((step, evaluate(model)))
            except Exception:  # top of the thread: training goes on without this figure
                logger.exception("evaluation failed step=%d", step)

        self._evaluation = threading.Thread(target=run, name="evaluate", daemon=True)
        self._evaluation.start()

    def _join_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.join()
            self._evaluation = None
        self._write_evaluated()

    def _write_evaluated(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                step, sums = self._evaluated.get_nowait()
                row: JsonObject = {"time": 0.0, "rank": 0, "step": step}
                self._write(row | _as_columns(sums))

    def _save(self, *, is_due: bool) -> None:
        """Write a checkpoint, once every gradient of what was dealt is here: it holds those that are not applied."""
        if not is_due or self._checkpoint is None or self._saved_at == self._steps or self._rule.hold:
            return
        self._rule.hold = True
        while not self._rule.is_settled():
            self._handle_next(self._rule.deadline())
            for _ in self._rule.advance():
                raise AssertionError("nothing is applied while a checkpoint is due")
        self._saved_at = self._steps
        self._write_commits()
        for log in (self._ledger, self._applications):
            if log is not None:
                log.sync()
        self._checkpoint(
            Progress(
                steps=self._steps,
                computed=self._steps,
                samples=self._samples,
                tokens=self._tokens,
                wall_s=time.monotonic() - self._began,
                train_s=self._train_s,
                train_loss=self._train_loss,
            )
        )
        self._rule.hold = False

    def _conclude(self, stopped: bool) -> None:
        if not stopped:  # whoever wants the run to stop does not wait for an evaluation
            self._join_evaluation()
            if self._steps and self._evaluated_at != self._steps and self._evaluate is not None:
                row: JsonObject = {"time": 0.0, "rank": 0, "step": self._steps - 1}  # a resumed run that was at its end
                self._write(row | self._evaluate_now())
        if self._steps:
            self._save(is_due=True)
        for log in (self._ledger, self._applications):
            if log is not None:
                log.sync()
        self._is_over = True
        version, weights = self._rule.last_weights()
        self._port.end(None, version, weights)
        self._await_reports()
        self._write_evaluated()

    def _await_reports(self) -> None:
        """Until all who are here, and those who fell silent lately, have said their last word, or long enough."""
        began = quiet_since = time.monotonic()
        is_told = False
        while True:
            now = time.monotonic()
            is_hurried = self._context.stop.is_set()
            limit = min(self._patience, HURRIED_S) if is_hurried else self._report_patiences * self._patience
            if self._port.is_sending() and not is_hurried and now - began < LAST_WEIGHTS_PATIENCES * self._patience:
                quiet_since = now
            silent = {rank for rank, since in self._silent_since.items() if not is_hurried and now - since < limit}
            waited_for = silent | {worker.rank for worker in self._port.workers()}
            if not waited_for - self.crew.reports.keys() or now - quiet_since > limit:
                return
            if not is_told and silent and now - began > self._patience:
                is_told = True
                self._note(
                    f"rank {', '.join(map(str, sorted(silent)))} fell silent: the server waits up to {limit:g} s to "
                    "tell it that the run is over"
                )
            self._handle_next(None, is_start=True)

    def _result(self, stopped: bool) -> TrainResult:
        loss, accuracy, perplexity = evaluation_numbers(self._eval)
        return TrainResult(
            steps=self._steps,
            samples=self._samples,
            rank_samples=0,
            tokens=self._tokens,
            wall_s=time.monotonic() - self._began,
            train_s=self._train_s,
            train_loss=self._train_loss,
            val_loss=loss,
            val_accuracy=accuracy,
            val_perplexity=perplexity if perplexity is not None and math.isfinite(perplexity) else None,
            stopped=stopped,
        )


def _counted(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _as_columns(sums: EvalSums) -> JsonObject:
    loss, accuracy, perplexity = evaluation_numbers(sums)
    return {"val/loss": loss, "val/accuracy": accuracy, "val/perplexity": perplexity}


def _as_line(commit: Commit) -> JsonObject:
    """A line of the ledger."""
    return {
        "step": commit.step,
        "lease": commit.lease.number,
        "rank": commit.worker.rank,
        "session": commit.worker.session,
        "ranges": [list(part) for part in commit.lease.ranges],
        "samples": commit.lease.samples,
    }


def log_of(
    result: StepResult,
    pushes: Sequence[Push],
    ranges: Mapping[int, Sequence[Range]],
    taus: Sequence[int] = (),
) -> JsonObject:
    """What repeats an update: whose gradients, of which samples, computed on which versions, in the order of adding.

    Args:
        result: what it gave.
        pushes: in the order in which they were added up.
        ranges: the samples of each lease.
        taus: staleness of each part of the only push; empty: the update was not scaled by it.
    """
    return {
        "event": "update",
        "step": result.step,
        "pushes": _described(pushes, ranges),
        "samples": result.samples,
        "count": result.count,
        "tau": max(taus) if taus else None,
        "lr": result.lr,
        "loss": json_number(result.loss),
        "applied": result.applied,
    }


def gathered_log_of(step: int, pushes: Sequence[Push], ranges: Mapping[int, Sequence[Range]]) -> JsonObject:
    """The pushes of a step that a checkpoint has as one sum: a run that goes on from it does not know them any more."""
    return {"event": "gathered", "step": step, "pushes": _described(pushes, ranges)}


def _described(pushes: Sequence[Push], ranges: Mapping[int, Sequence[Range]]) -> JsonValue:
    described: list[JsonValue] = []
    for push in pushes:
        parts: list[JsonValue] = [
            {"lease": lease, "base": base, "ranges": [list(part) for part in ranges[lease]]}
            for lease, base in zip(push.note.leases, push.note.bases, strict=True)
        ]
        described.append(
            {
                "session": push.worker.session,
                "rank": push.worker.rank,
                "number": push.number,
                "scale": push.note.scale,
                "parts": parts,
            }
        )
    return described


def as_answer(result: StepResult, version: int) -> Answer:
    """What workers are told of an update."""
    return Answer(
        status="applied",
        step=result.step,
        loss=json_number(result.loss),
        count=result.count,
        samples=result.samples,
        grad_norm=json_number(result.grad_norm),
        lr=result.lr,
        is_skipped=not result.applied,
        version=version,
    )


def as_result(answer: Answer, spans: int | None = None) -> StepResult | None:
    """What a worker learns from an answer; None: its push was refused or lost.

    Args:
        answer: the server's.
        spans: the number under which this worker has recorded its times, where that is not the step's.
    """
    if answer.status != "applied":
        return None
    loss = math.nan if answer.loss is None else answer.loss
    grad_norm = math.inf if answer.grad_norm is None else answer.grad_norm
    is_applied = not answer.is_skipped
    return StepResult(
        answer.step, loss, answer.count, answer.samples, grad_norm, answer.lr, is_applied, spans_until=spans
    )
