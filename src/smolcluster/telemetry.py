"""Counters and spans that every layer may write and that monitoring reads. Knows nothing of monitoring.

One `Telemetry` belongs to one communicator (and so to one rank). Spans are (name, start, end, step) on the
monotonic clock; whoever reports drains them, and of what nobody drains the newest are kept.

While `Telemetry.trace` is set, the same spans are also kept there, with the row of the picture that they belong to and
details. Some are made for the picture alone: what nobody drains costs nothing while no trace is recorded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

# Some hundred steps: a script that trains without the trainer never drains them.
MAX_SPANS = 10_000
# About 400 bytes each in memory, 200 in the file: 10 000 steps of a small model.
MAX_TRACE_EVENTS = 500_000

# Rows of a trace: what the training thread does, the buckets of gradients, the parameters or the pushes on their way,
# what the loader's thread does.
COMPUTE = "compute"
BUCKETS = "buckets"
GATHERS = "gathers"
PUSHES = "pushes"
LOADER = "loader"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time: `name` from `start` to `end` (seconds, `time.monotonic()`), belonging to `step`."""

    name: str
    start: float
    end: float
    step: int


class TraceEvent(NamedTuple):
    """A span of a trace. Those of one track never overlap in part: one ends before the other begins, or lies in it."""

    track: str
    name: str
    start: float
    end: float
    details: Mapping[str, int | str]


class TraceRecorder:
    """Keeps the spans of a run for a picture of it, the newest `max_events` of them. Thread-safe."""

    def __init__(self, max_events: int = MAX_TRACE_EVENTS) -> None:
        self._lock = threading.Lock()
        self._events: deque[TraceEvent] = deque(maxlen=max_events)
        self._added = 0

    def add(self, track: str, name: str, start: float, end: float, details: Mapping[str, int | str]) -> None:
        """Keep a span, in seconds of `time.monotonic()`."""
        event = TraceEvent(track, name, start, end, details)
        with self._lock:
            self._events.append(event)
            self._added += 1

    def events(self) -> list[TraceEvent]:
        """What was kept, in the order in which it ended."""
        with self._lock:
            return list(self._events)

    def dropped(self) -> int:
        """How many of the oldest were forgotten."""
        with self._lock:
            return self._added - len(self._events)


class Telemetry:
    """Thread-safe counters and spans of one rank.

    Attributes:
        step: the step under way; spans belong to it unless they say otherwise.
        trace: what keeps all spans; None: no trace is recorded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self._counters: dict[str, float] = {}
        self._asked: dict[str, float] = {}  # the counters' values when `increase` was called last
        self._sources: list[Callable[[], None]] = []
        self.step = 0
        self.trace: TraceRecorder | None = None

    def count(self, name: str, amount: float) -> None:
        """Add to a counter such as `link/sent_bytes`."""
        with self._lock:
            self._counters[name] = self._counters.get(name, 0.0) + amount

    def add_source(self, count: Callable[[], None]) -> None:
        """Call `count()` before a counter is read: it counts what happens too often to be counted each time."""
        self._sources.append(count)

    def remove_source(self, count: Callable[[], None]) -> None:
        """Call it a last time, and never again."""
        if count in self._sources:
            self._sources.remove(count)
            count()

    def counter(self, name: str) -> float:
        """The counter's value since the start, 0.0 if it was never written."""
        self._ask_sources()
        with self._lock:
            return self._counters.get(name, 0.0)

    def increase(self, name: str) -> float:
        """By how much the counter has grown since the last such call, the first time since the start."""
        self._ask_sources()
        with self._lock:
            value = self._counters.get(name, 0.0)
            before = self._asked.get(name, 0.0)
            self._asked[name] = value
            return value - before

    def _ask_sources(self) -> None:
        for count in list(self._sources):
            count()

    def record(
        self,
        name: str,
        start: float,
        end: float,
        step: int | None = None,
        *,
        track: str = COMPUTE,
        details: Mapping[str, int | str] | None = None,
    ) -> None:
        """Record a span.

        Args:
            name: what took the time.
            start: seconds, `time.monotonic()`.
            end: seconds, `time.monotonic()`.
            step: that it belongs to; None: the current step.
            track: the row of a trace.
            details: shown in a trace besides the step.
        """
        step = self.step if step is None else step
        with self._lock:
            self._spans.append(Span(name, start, end, step))
        if self.trace is not None:
            self.trace.add(track, name, start, end, {"step": step, **(details or {})})

    @contextmanager
    def span(self, name: str, details: Mapping[str, int | str] | None = None) -> Iterator[None]:
        """Record the time that the body takes; `details` are shown in a trace."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.record(name, start, time.monotonic(), details=details)

    def traced(self, name: str, track: str = COMPUTE) -> AbstractContextManager[None]:
        """Keep the time that the body takes in the trace, if one is recorded, and nowhere else."""
        return nullcontext() if self.trace is None else self._traced(self.trace, name, track)

    @contextmanager
    def _traced(self, trace: TraceRecorder, name: str, track: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            trace.add(track, name, start, time.monotonic(), {"step": self.step})

    def drain(self) -> list[Span]:
        """All spans recorded since the last call, oldest first by end."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
            return spans


def overlap_s(inner: list[Span], outer: list[Span]) -> tuple[float, float]:
    """How much of `inner` lies under `outer`.

    Returns:
        (seconds of the union of `inner`, seconds of it that lie within the union of `outer`).
    """
    inner_union, outer_union = _union(inner), _union(outer)
    total = sum(end - start for start, end in inner_union)
    hidden = sum(
        max(0.0, min(end, outer_end) - max(start, outer_start))
        for start, end in inner_union
        for outer_start, outer_end in outer_union
    )
    return total, hidden


def _union(spans: list[Span]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.start):
        if merged and span.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span.end))
        else:
            merged.append((span.start, span.end))
    return merged
