"""The one training loop. It knows no algorithm: a Strategy computes and applies, this counts, times and evaluates."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch

from smolcluster.collectives.base import Communicator
from smolcluster.data.batch import Batch
from smolcluster.kinds import JsonObject
from smolcluster.telemetry import Span, overlap_s
from smolcluster.training.step import EvalSums, MicroBatches, StepResult, as_batches
from smolcluster.training.strategy import Strategy


class MetricsSink(Protocol):
    """Where the rows of `metrics.jsonl` go; implemented by monitoring."""

    def write(self, row: JsonObject) -> None:
        """Take one row: `time`, `rank`, `step` and the metrics of that step."""
        ...

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """`done` of `total` steps are applied; `row` is the last one's."""
        ...


class NoMetrics:
    """A sink that keeps nothing."""

    def write(self, row: JsonObject) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """Nothing."""


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
        checkpoint: Callable[[int], None] | None = None,
        checkpoint_steps: int | None = None,
    ) -> None:
        """Say what to do; `run` does it.

        Args:
            strategy: computes and applies steps.
            batches: this rank's micro-batches of each step; also what a torch DataLoader gives.
            steps: stop after so many steps, or when `batches` ends.
            eval_batches: called for each evaluation; this rank's part of the validation split. The parts of all
                ranks together are the split, each sample once.
            eval_steps: evaluate after every so many updates, and at the end; None: only at the end.
            checkpoint: called with the number of updates so far.
            checkpoint_steps: call it after every so many updates, and at the end; None: only at the end.
        """
        self._strategy = strategy
        self._batches = batches
        self._steps = steps
        self._eval_batches = eval_batches
        self._eval_steps = eval_steps
        self._checkpoint = checkpoint
        self._checkpoint_steps = checkpoint_steps

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
            stop: set it from any thread or signal handler, on any rank. The step under way is finished, all
                pending gradients are applied, and the last evaluation is left out.

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
        self._timing = _StepTiming(comm)
        self._done = 0
        self._samples = 0
        self._rank_samples = 0
        self._tokens = 0
        self._train_s = 0.0
        self._last: StepResult | None = None
        self._last_row: JsonObject = {}
        self._eval: EvalSums | None = None
        self._evaluated_at = -1
        self._saved_at = -1

    def run(self) -> TrainResult:
        started = time.monotonic()
        steps = self._trainer._steps
        batches = iter(itertools.islice(self._trainer._batches, steps))
        while True:
            lap = time.monotonic()
            micro_batches = next(batches, None)
            if micro_batches is None:
                break
            micro_batches = as_batches(micro_batches)
            if self._stop.is_set():
                self._strategy.request_stop()
            self._rank_samples += sum(batch.samples for batch in micro_batches)
            result = self._strategy.train_step(micro_batches)
            step_s = time.monotonic() - lap
            self._train_s += step_s
            self._timing.collect()
            if result is not None:
                self._after_step(result, step_s, may_evaluate=True, is_last=result.step == steps - 1)
                if result.stop:
                    break
        stopped = self._last is not None and self._last.stop and self._last.step < steps - 1
        self._finish(stopped)
        return self._result(time.monotonic() - started, stopped)

    def _finish(self, stopped: bool) -> None:
        """Apply what is still pending; then evaluate and save what the last step has left undone."""
        lap = time.monotonic()
        results = self._strategy.finish()
        finish_s = time.monotonic() - lap
        self._train_s += finish_s
        self._timing.collect()
        for result in results:
            # All pending updates are applied by now, so only the last row can tell of an evaluation.
            is_last = result is results[-1]
            self._after_step(result, finish_s / len(results), may_evaluate=is_last and not stopped, is_last=is_last)
        if self._last is None:
            return
        if not stopped and self._trainer._eval_batches and self._evaluated_at != self._done:
            # The batches ended early: the last step's row is out already.
            row: JsonObject = {"time": time.time(), "rank": self._timing.rank, "step": self._last.step}
            self._metrics.write(row | self._evaluate())
        self._save(is_due=True)

    def _after_step(self, result: StepResult, step_s: float, *, may_evaluate: bool, is_last: bool) -> None:
        trainer = self._trainer
        self._last = result
        self._done += 1
        self._samples += result.samples
        self._tokens += result.count
        row: JsonObject = {
            "time": time.time(),
            "rank": self._timing.rank,
            "step": result.step,
            "train/loss": _json_number(result.loss),
            "train/grad_norm": _json_number(result.grad_norm),
            "train/lr": result.lr,
            "train/samples": result.samples,
            "train/tokens_per_s": result.count / max(step_s, 1e-9),
            "time/step_s": step_s,
        }
        row |= self._timing.row(result.step)
        is_eval_due = is_last or (trainer._eval_steps and (result.step + 1) % trainer._eval_steps == 0)
        if may_evaluate and is_eval_due and trainer._eval_batches:
            row |= self._evaluate()
        self._metrics.write(row)
        self._metrics.progress(self._done, trainer._steps, row)
        if may_evaluate:
            every = trainer._checkpoint_steps
            self._save(is_due=bool(every) and (result.step + 1) % (every or 1) == 0)

    def _save(self, is_due: bool) -> None:
        if is_due and self._trainer._checkpoint and self._saved_at != self._done:
            self._saved_at = self._done
            self._trainer._checkpoint(self._done)

    def _evaluate(self) -> JsonObject:
        """Evaluate this rank's part and add the sums up over all ranks, exactly."""
        assert self._trainer._eval_batches is not None
        sums = EvalSums(0.0, 0, 0, 0)
        for batch in self._trainer._eval_batches():
            sums = sums + self._strategy.eval_step(batch)
        if self._comm is not None:
            total = torch.tensor([sums.loss_sum, sums.count, sums.correct, sums.graded], dtype=torch.float64)
            self._comm.all_reduce(total).wait()
            sums = EvalSums(float(total[0]), *(round(number) for number in total[1:].tolist()))
        self._timing.collect()
        self._timing.skip_bytes()
        self._eval, self._evaluated_at = sums, self._done
        loss, accuracy, perplexity = _eval_numbers(sums)
        return {"val/loss": loss, "val/accuracy": accuracy, "val/perplexity": perplexity}

    def _result(self, wall_s: float, stopped: bool) -> TrainResult:
        loss, accuracy, perplexity = _eval_numbers(self._eval)
        return TrainResult(
            steps=self._done,
            samples=self._samples,
            rank_samples=self._rank_samples,
            tokens=self._tokens,
            wall_s=wall_s,
            train_s=self._train_s,
            train_loss=None if self._last is None else _json_number(self._last.loss),
            val_loss=loss,
            val_accuracy=accuracy,
            val_perplexity=perplexity,
            stopped=stopped,
        )


class _StepTiming:
    """Turns one rank's telemetry into the columns of a step's row."""

    def __init__(self, comm: Communicator | None) -> None:
        self.rank = 0 if comm is None else comm.rank
        self._telemetry = None if comm is None else comm.telemetry
        self._spans: dict[int, list[Span]] = {}
        self._sent = self._recv = 0.0
        self.skip_bytes()

    def collect(self) -> None:
        """Take the spans over; they may belong to steps whose gradient is applied later."""
        if self._telemetry is not None:
            for span in self._telemetry.drain():
                self._spans.setdefault(span.step, []).append(span)

    def skip_bytes(self) -> None:
        """Leave the bytes since the last row out of the next one."""
        if self._telemetry is not None:
            self._sent = self._telemetry.counter("link/sent_bytes")
            self._recv = self._telemetry.counter("link/recv_bytes")

    def row(self, step: int) -> JsonObject:
        """The columns of `step`; forgets its spans and all older ones."""
        if self._telemetry is None:
            return {}
        spans = self._spans.pop(step, [])
        self._spans = {later: spans for later, spans in self._spans.items() if later > step}
        sent, recv = self._sent, self._recv
        self.skip_bytes()
        traffic: JsonObject = {"link/sent_bytes": self._sent - sent, "link/recv_bytes": self._recv - recv}
        if not spans:
            return traffic  # an algorithm that measures nothing: no zeros that look like measurements
        by_name: dict[str, list[Span]] = {}
        for span in spans:
            by_name.setdefault(span.name, []).append(span)
        all_reduce_s, hidden_s = overlap_s(by_name.get("all_reduce", []), by_name.get("backward", []))
        return traffic | {
            "time/forward_s": _total_s(by_name.get("forward", [])),
            "time/backward_s": _total_s(by_name.get("backward", [])),
            "time/comm_wait_s": _total_s(by_name.get("comm_wait", [])),
            "time/all_reduce_s": all_reduce_s,
            "time/all_reduce_hidden_s": hidden_s,
        }


def _total_s(spans: list[Span]) -> float:
    return sum(span.end - span.start for span in spans)


def _eval_numbers(sums: EvalSums | None) -> tuple[float | None, float | None, float | None]:
    """(mean loss, accuracy, perplexity), None where undefined."""
    if sums is None or sums.count == 0:
        return None, None, None
    loss = sums.loss_sum / sums.count
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows at 710
    return _json_number(loss), sums.correct / max(sums.graded, 1), _json_number(perplexity)


def _json_number(value: float) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if math.isfinite(value) else None
