"""How a worker of a parameter server hands gradients over without waiting, and when a short wait is worth it."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from smolcluster.collectives.param_messages import PushNote
from smolcluster.collectives.param_worker import Ticket, WorkerPort
from smolcluster.telemetry import PUSHES
from smolcluster.training.server import as_result
from smolcluster.training.step import StepResult

# Gradients that wait to be pushed; one more is added to the youngest of them. More would only wait longer: what a
# gradient waits for here makes it stale.
MAX_WAITING = 1
# Pushes that are not answered yet.
MAX_IN_FLIGHT = 1
# Of its time, a worker waits at most so much for weights that are about to come.
WAITING_SHARE = 0.04
# If that is less than this part of what an answer has taken lately, it does not try. Less than the whole is worth it:
# answers come faster to a processor that waits.
WORTH_A_TRY = 0.3
# Seconds between looks of the pushing thread whether it shall end.
SLICE = 0.2


class Grace:
    """How long to wait for weights that are about to come: never for more than a small part of the time.

    Weights that have a worker's own last push in them are less stale by one push of every worker than those that it
    has while that push is on its way: with N workers tau is N - 1 instead of 2N - 1. Where an answer takes little time
    beside a lease, that is worth the wait.
    """

    def __init__(self) -> None:
        self._budget = 0.0
        self._answer_s = 0.0  # from handing a push over until its weights are here
        self._handed_over: float | None = None  # the push whose weights have not been seen yet
        self._began: float | None = None

    def seconds(self, now: float, weights_came_at: float) -> float:
        """A lease begins: how long it may wait for weights."""
        if self._began is not None:
            self._budget = min(self._budget + WAITING_SHARE * (now - self._began), now - self._began)
        self._began = now
        self._learn(weights_came_at)
        if self._handed_over is None or self._budget < WORTH_A_TRY * self._answer_s:
            return 0.0
        return min(self._budget, 2 * self._answer_s)

    def waited(self, seconds: float, weights_came_at: float) -> None:
        """So long it has."""
        self._budget -= seconds
        self._learn(weights_came_at)

    def handed_over(self, now: float, *, pull: bool) -> None:
        """A push is on its way; `pull`: weights come with its answer."""
        if pull and self._handed_over is None:
            self._handed_over = now

    def _learn(self, weights_came_at: float) -> None:
        if self._handed_over is not None and weights_came_at > self._handed_over:
            took = weights_came_at - self._handed_over
            self._answer_s = took if not self._answer_s else 0.8 * self._answer_s + 0.2 * took
            self._handed_over = None


@dataclass(slots=True)
class _Waiting:
    """Gradients that wait to be pushed, added up. Only those of one session: its leases end with it."""

    session: int
    gradients: list[Tensor]
    note: PushNote

    def merge(self, gradients: list[Tensor], note: PushNote) -> None:
        """Add one more, in place. The sums keep the scale of the first."""
        mine = self.note
        for flat, other in zip(self.gradients, gradients, strict=True):
            flat.add_(other, alpha=mine.scale / note.scale)
        is_known = mine.loss_sum is not None and note.loss_sum is not None
        self.note = PushNote(
            leases=(*mine.leases, *note.leases),
            bases=(*mine.bases, *note.bases),
            loss_sum=(mine.loss_sum or 0.0) + (note.loss_sum or 0.0) if is_known else None,
            count=mine.count + note.count,
            samples=mine.samples + note.samples,
            scale=mine.scale,
            compute_s=mine.compute_s + note.compute_s,
            missing=tuple(sorted({*mine.missing} & {*note.missing})),
            pull=mine.pull or note.pull,
        )


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A push that is not answered."""

    note: PushNote
    ticket: Ticket
    began: float
    lineage: str | None


class Outbox:
    """Pushes in the background, on a thread of its own. What does not fit into its queue is added up, never dropped."""

    def __init__(self, port: WorkerPort) -> None:
        self._port = port
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._in_flight: deque[_InFlight] = deque()
        self._results: deque[tuple[str | None, StepResult]] = deque()  # with the server's lineage
        self._error: BaseException | None = None
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def put(self, gradients: list[Tensor], note: PushNote) -> None:
        """Push this when its turn comes. Never waits.

        Raises:
            SmolError: the pushing thread has failed.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            session = self._port.sessions
            last = self._waiting[-1] if self._waiting else None
            if len(self._waiting) >= MAX_WAITING and last is not None and last.session == session:
                last.merge(gradients, note)
            else:
                self._waiting.append(_Waiting(session, gradients, note))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"push {self._port.rank}", daemon=True)
            self._thread.start()

    def next_result(self) -> StepResult | None:
        """What an answered push gave, oldest first; None: nothing new.

        While the server is away nobody knows whether it still counts: one that is started again goes back to a
        checkpoint, and with it all that was made since.
        """
        if (present := self._port.lineage()) is None:
            return None
        with self._changed:
            while self._results:
                lineage, result = self._results.popleft()
                if lineage == present:
                    return result
            return None

    def close(self) -> list[StepResult]:
        """End the thread; the results that are left. The run is over: what still waits is not wanted any more."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        results = []
        while (result := self.next_result()) is not None:
            results.append(result)
        return results

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                began, lineage = time.monotonic(), self._port.lineage()
                ticket = self._port.push(item.gradients, item.note)
                self._in_flight.append(_InFlight(item.note, ticket, began, lineage))
                self._collect(at_most=MAX_IN_FLIGHT - 1)
            self._collect(at_most=0)
        except BaseException as error:  # noqa: BLE001 - a thread's top: `put` raises it
            with self._changed:
                self._error = error

    def _next(self) -> _Waiting | None:
        """The oldest that waits; None once the outbox or the port closes."""
        while True:
            with self._changed:
                while self._waiting and self._waiting[0].session != self._port.sessions:
                    self._waiting.popleft()  # the server has given these leases to others
                if self._is_closing or self._port.is_closed:
                    return None
                if self._waiting:
                    return self._waiting.popleft()
                self._changed.wait(SLICE)
            self._collect(at_most=len(self._in_flight))

    def _collect(self, at_most: int) -> None:
        """Take answers until at most so many are missing, and all that are there."""
        while self._in_flight and (len(self._in_flight) > at_most or self._in_flight[0].ticket.done()):
            push = self._in_flight.popleft()
            lease = push.note.leases[-1]
            result = as_result(push.ticket.wait(is_hidden=True), spans=lease)
            if (trace := self._port.telemetry.trace) is not None:
                details = {"step": lease, "leases": len(push.note.leases)}
                trace.add(PUSHES, "push", push.began, time.monotonic(), details)
            if result is not None:
                with self._changed:
                    self._results.append((push.lineage, result))
