"""The one training loop. It knows no algorithm: a Strategy computes and applies, this counts, times and evaluates."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch

from smolcluster.collectives.base import Communicator
from smolcluster.data.batch import Batch
from smolcluster.kinds import JsonObject
from smolcluster.telemetry import Span, Telemetry, overlap_s
from smolcluster.training.step import EvalSums, MicroBatches, StepResult, as_batches
from smolcluster.training.strategy import AddsUpEvaluations, Strategy

# What steps communicate by, as their spans are called.
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")


class MetricsSink(Protocol):
    """Where the rows of `metrics.jsonl` go; implemented by monitoring."""

    def write(self, row: JsonObject) -> None:
        """Take one row: `time`, `rank`, `step` and the metrics of that step."""
        ...

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """`done` of `total` steps are applied; `row` is the last one's."""
        ...


class Endpoint(Protocol):
    """What a trainer needs to know of how its process takes part: a Communicator, or a port to a parameter server.

    Attributes:
        rank: in the run.
        telemetry: what the algorithm measures.
    """

    @property
    def rank(self) -> int: ...
    @property
    def telemetry(self) -> Telemetry: ...


class NoMetrics:
    """A sink that keeps nothing."""

    def write(self, row: JsonObject) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; with the state of its strategy, what a resumed one goes on from.

    Attributes:
        steps: updates, the skipped ones included.
        computed: steps whose gradient is computed; with K > 0 up to K of them are not applied yet.
        is_drained: the run had ended, so no gradient waits; in a longer run the next K would be computed already.
        samples: samples over all ranks, of the updates.
        rank_samples: samples that this rank computed.
        tokens: targets over all ranks, of the updates.
        wall_s: seconds so far, the first start's included.
        train_s: the part of it that steps took.
        train_loss: loss of the last update's step.
    """

    steps: int = 0
    computed: int = 0
    is_drained: bool = False
    samples: int = 0
    rank_samples: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    train_s: float = 0.0
    train_loss: float | None = None


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run gave. Losses are None if there was nothing to compute them from.

    Attributes:
        steps: updates, the skipped ones included.
        samples: samples over all ranks.
        rank_samples: samples that this rank computed.
        tokens: targets over all ranks.
        wall_s: seconds from the first batch to the last evaluation.
        train_s: the part of it that steps and the wait for batches took: without evaluations and checkpoints.
        train_loss: loss of the last step.
        val_loss: mean loss over the validation split, at the last evaluation.
        val_accuracy: part of its answers that were right: of its targets, or of its samples where it says so.
        val_perplexity: exp(val_loss).
        stopped: True if somebody asked to stop before the last step.
    """

    steps: int
    samples: int
    rank_samples: int
    tokens: int
    wall_s: float
    train_s: float
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    val_perplexity: float | None
    stopped: bool


class Trainer:
    """Drives one strategy on one rank."""

    def __init__(
        self,
        strategy: Strategy,
        batches: Iterable[MicroBatches],
        steps: int,
        *,
        eval_batches: Callable[[], Iterable[Batch]] | None = None,
        eval_steps: int | None = None,
        checkpoint: Callable[[Progress], None] | None = None,
        checkpoint_steps: int | None = None,
        start: Progress | None = None,
        endpoint: Endpoint | None = None,
        balance: Callable[[int, float], None] | None = None,
    ) -> None:
        """Say what to do; `run` does it.

        Args:
            strategy: computes and applies steps.
            batches: this rank's micro-batches of each step; also what a torch DataLoader gives. Of a resumed run
                from step `start.computed` on.
            steps: stop after so many steps, or when `batches` ends.
            eval_batches: called for each evaluation; this rank's part of the validation split. The parts of all
                ranks together are the split, each sample once.
            eval_steps: evaluate after every so many updates, and at the end; None: only at the end.
            checkpoint: called on every rank at the same step, with how far the run is. With K > 0 also while the last
                gradients still wait, so that a longer run can go on as if this one had not ended.
            checkpoint_steps: call it after every so many updates, and at the end; None: only at the end.
            start: how far the strategy's state is; None: at the beginning.
            endpoint: how this process takes part where it has no communicator.
            balance: called after every step with the samples that this rank computed and the seconds that forward and
                backward took; it may communicate, and deal the next steps' samples otherwise.
        """
        self._balance = balance
        self._endpoint = endpoint
        self._strategy = strategy
        self._batches = batches
        self._steps = steps
        self._eval_batches = eval_batches
        self._eval_steps = eval_steps
        self._checkpoint = checkpoint
        self._checkpoint_steps = checkpoint_steps
        self._start = start or Progress()

    def run(
        self,
        metrics: MetricsSink | None = None,
        comm: Communicator | None = None,
        stop: threading.Event | None = None,
    ) -> TrainResult:
        """Train to the end or until somebody asks to stop; every rank returns after the same step.

        Args:
            metrics: gets a row per step.
            comm: adds up evaluations over ranks and knows the telemetry; None: one process.
            stop: set it from any thread or signal handler, on any rank. The step under way is finished, and the last
                evaluation is left out. Gradients that wait (K > 0) go into the checkpoint, or without one are applied.

        Raises:
            TrainingStopped: the loss is not finite.
            PeerLost: a rank is gone.
        """
        return _Run(self, metrics or NoMetrics(), comm, stop or threading.Event()).run()


@contextmanager
def stop_on_interrupt(stop: threading.Event) -> Iterator[None]:
    """Within the body, the first Ctrl-C sets `stop`, the second raises KeyboardInterrupt. For the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it gets the signal
        return

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class _Run:
    """The state of one `Trainer.run`."""

    def __init__(
        self, trainer: Trainer, metrics: MetricsSink, comm: Communicator | None, stop: threading.Event
    ) -> None:
        self._trainer = trainer
        self._strategy = trainer._strategy
        self._metrics = metrics
        self._comm = comm
        self._stop = stop
        self._timing = _StepTiming(trainer._endpoint or comm)
        start = trainer._start
        self._done = start.steps
        self._computed = start.computed
        self._samples = start.samples
        self._rank_samples = start.rank_samples
        self._tokens = start.tokens
        self._train_s = start.train_s
        self._train_loss = start.train_loss
        self._is_drained = False
        self._last: StepResult | None = None
        self._eval: EvalSums | None = None
        self._evaluated_at = -1
        self._saved_at = start.steps
        self._began = time.monotonic() - start.wall_s

    def run(self) -> TrainResult:
        steps = self._trainer._steps
        batches = iter(itertools.islice(self._trainer._batches, max(0, steps - self._computed)))
        while True:
            lap = time.monotonic()
            with self._timing.traced("next batch"):
                micro_batches = next(batches, None)
            if micro_batches is None:
                break
            micro_batches = as_batches(micro_batches)
            if self._stop.is_set():
                self._strategy.request_stop()
            samples = sum(batch.samples for batch in micro_batches)
            self._rank_samples += samples
            with self._timing.traced("step"):
                result = self._strategy.train_step(micro_batches)
            self._computed += 1
            step_s = time.monotonic() - lap
            self._train_s += step_s
            self._timing.collect()
            if self._trainer._balance is not None:
                self._trainer._balance(samples, self._timing.compute_s(self._computed - 1))
            if result is not None:
                self._after_step(result, step_s, may_evaluate=True, is_last=result.step == steps - 1)
                if result.stop:
                    break
        stopped = self._last is not None and self._last.stop and self._last.step < steps - 1
        self._finish(stopped)
        return self._result(stopped)

    def _finish(self, stopped: bool) -> None:
        """Apply what is still pending; then evaluate and save what the last step has left undone."""
        if self._computed > self._done and self._trainer._checkpoint is not None:
            self._save(is_due=True)
            if stopped:
                return  # what is pending is kept for the run that goes on from here
        self._is_drained = self._computed > self._done
        lap = time.monotonic()
        with self._timing.traced("finish"):
            results = self._strategy.finish()
        finish_s = time.monotonic() - lap
        self._train_s += finish_s
        self._timing.collect()
        for result in results:
            # All pending updates are applied by now, so only the last row can tell of an evaluation.
            is_last = result is results[-1]
            self._after_step(result, finish_s / len(results), may_evaluate=is_last and not stopped, is_last=is_last)
        if self._done == 0:
            return
        if not stopped and self._trainer._eval_batches and self._evaluated_at != self._done:
            # The batches ended early, or a resumed run was at its end: the last step's row is out already.
            row: JsonObject = {"time": 0.0, "rank": self._timing.rank, "step": self._done - 1}
            row |= self._evaluate()
            if self._last is not None:
                self._write(row)
        self._save(is_due=True)

    def _after_step(self, result: StepResult, step_s: float, *, may_evaluate: bool, is_last: bool) -> None:
        trainer = self._trainer
        self._last = result
        self._train_loss = json_number(result.loss)
        self._done += 1
        self._samples += result.samples
        self._tokens += result.count
        row: JsonObject = {
            "time": 0.0,  # its place; see _write
            "rank": self._timing.rank,
            "step": result.step,
            "train/loss": json_number(result.loss),
            "train/grad_norm": json_number(result.grad_norm),
            "train/lr": result.lr,
            "train/samples": result.samples,
            "train/tokens_per_s": result.count / max(step_s, 1e-9),
            "time/step_s": step_s,
        }
        row |= {name: json_number(value) for name, value in (result.metrics or {}).items()}
        row |= self._timing.row(result.step if result.spans_until is None else result.spans_until, result.spans_until)
        is_eval_due = is_last or (trainer._eval_steps and (result.step + 1) % trainer._eval_steps == 0)
        if may_evaluate and is_eval_due and trainer._eval_batches:
            row |= self._evaluate()
        self._write(row)
        self._metrics.progress(self._done, trainer._steps, row)
        if may_evaluate:
            every = trainer._checkpoint_steps
            self._save(is_due=bool(every) and (result.step + 1) % (every or 1) == 0)

    def _write(self, row: JsonObject) -> None:
        """Write a row with the bytes since the one before it: those of a step, an evaluation, a checkpoint."""
        row |= self._timing.traffic()
        row["time"] = time.time()  # bytes and time of a row are of the same moment
        self._metrics.write(row)

    def _save(self, is_due: bool) -> None:
        if is_due and self._trainer._checkpoint and self._saved_at != self._done:
            self._saved_at = self._done
            progress = Progress(
                steps=self._done,
                computed=self._computed,
                is_drained=self._is_drained,
                samples=self._samples,
                rank_samples=self._rank_samples,
                tokens=self._tokens,
                wall_s=time.monotonic() - self._began,
                train_s=self._train_s,
                train_loss=self._train_loss,
            )
            with self._timing.traced("checkpoint"):
                self._trainer._checkpoint(progress)
            self._timing.collect()

    def _evaluate(self) -> JsonObject:
        """Evaluate this rank's part and add the sums up over all ranks, exactly."""
        assert self._trainer._eval_batches is not None
        sums = EvalSums(0.0, 0, 0, 0)
        with self._timing.traced("evaluate"):
            for batch in self._trainer._eval_batches():
                sums = sums + self._strategy.eval_step(batch)
            if isinstance(self._strategy, AddsUpEvaluations):
                sums = self._strategy.add_up(sums)
            elif self._comm is not None:
                total = torch.tensor([sums.loss_sum, sums.count, sums.correct, sums.graded], dtype=torch.float64)
                self._comm.all_reduce(total).wait()
                sums = EvalSums(float(total[0]), *(round(number) for number in total[1:].tolist()))
        self._timing.collect()
        self._eval, self._evaluated_at = sums, self._done
        loss, accuracy, perplexity = evaluation_numbers(sums)
        return {"val/loss": loss, "val/accuracy": accuracy, "val/perplexity": perplexity}

    def _result(self, stopped: bool) -> TrainResult:
        loss, accuracy, perplexity = evaluation_numbers(self._eval)
        return TrainResult(
            steps=self._done,
            samples=self._samples,
            rank_samples=self._rank_samples,
            tokens=self._tokens,
            wall_s=time.monotonic() - self._began,
            train_s=self._train_s,
            train_loss=self._train_loss,
            val_loss=loss,
            val_accuracy=accuracy,
            val_perplexity=perplexity,
            stopped=stopped,
        )


class _StepTiming:
    """Turns one rank's telemetry into the columns of a step's row."""

    def __init__(self, endpoint: Endpoint | None) -> None:
        self.rank = 0 if endpoint is None else endpoint.rank
        self._telemetry = None if endpoint is None else endpoint.telemetry
        self._spans: dict[int, list[Span]] = {}

    def collect(self) -> None:
        """Take the spans over; they may belong to steps whose gradient is applied later."""
        if self._telemetry is not None:
            for span in self._telemetry.drain():
                self._spans.setdefault(span.step, []).append(span)

    def compute_s(self, step: int) -> float:
        """Seconds that forward and backward of a step took whose row is not made yet, less those spent in waiting."""
        spans = self._spans.get(step, [])
        compute = [span for span in spans if span.name in ("forward", "backward")]
        waits_s = overlap_s([span for span in spans if span.name == "comm_wait"], compute)[1]
        return _total_s(compute) - waits_s

    def traced(self, name: str) -> AbstractContextManager[None]:
        """Shows the time that the body takes in a trace."""
        return nullcontext() if self._telemetry is None else self._telemetry.traced(name)

    def traffic(self) -> JsonObject:
        """Bytes since the last call; at first also what was sent before the first step. So rows add up to the run."""
        if self._telemetry is None:
            return {}
        return {name: self._telemetry.increase(name) for name in ("link/sent_bytes", "link/recv_bytes")}

    def row(self, step: int, until: int | None = None) -> JsonObject:
        """The times of `step`, or of all steps up to `until`; forgets these spans and all older ones."""
        if self._telemetry is None:
            return {}
        if until is None:
            spans = self._spans.pop(step, [])
        else:
            spans = [span for number, found in self._spans.items() if number <= until for span in found]
        self._spans = {later: found for later, found in self._spans.items() if later > step}
        if not spans:
            return {}  # an algorithm that measures nothing: no zeros that look like measurements
        by_name: dict[str, list[Span]] = {}
        for span in spans:
            by_name.setdefault(span.name, []).append(span)
        compute: JsonObject = {
            "time/forward_s": _total_s(by_name.get("forward", [])),
            "time/backward_s": _total_s(by_name.get("backward", [])),
        }
        if "comm_wait" not in by_name:
            return compute
        communication: JsonObject = {"time/comm_wait_s": _total_s(by_name["comm_wait"])}
        for name in COLLECTIVES:
            if name in by_name:
                total_s, hidden_s = overlap_s(
                    by_name[name], [*by_name.get("forward", []), *by_name.get("backward", [])]
                )
                communication |= {f"time/{name}_s": total_s, f"time/{name}_hidden_s": hidden_s}
        return compute | communication


def _total_s(spans: list[Span]) -> float:
    return sum(span.end - span.start for span in spans)


def evaluation_numbers(sums: EvalSums | None) -> tuple[float | None, float | None, float | None]:
    """(mean loss, accuracy, perplexity), None where undefined."""
    if sums is None or sums.count == 0:
        return None, None, None
    loss = sums.loss_sum / sums.count
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows at 710
    return json_number(loss), sums.correct / max(sums.graded, 1), json_number(perplexity)


def json_number(value: float) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if math.isfinite(value) else None
