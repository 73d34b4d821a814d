"""Counters and spans that every layer may write and that monitoring reads. Knows nothing of monitoring.

One `Telemetry` belongs to one communicator (and so to one rank). Spans are (name, start, end, step) on the
monotonic clock; whoever reports drains them, and of what nobody drains the newest are kept.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Some hundred steps: a script that trains without the trainer never drains them.
MAX_SPANS = 10_000


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time: `name` from `start` to `end` (seconds, `time.monotonic()`), belonging to `step`."""

    name: str
    start: float
    end: float
    step: int


class Telemetry:
    """Thread-safe counters and spans of one rank."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self._counters: dict[str, float] = {}
        self.step = 0

    def count(self, name: str, amount: float) -> None:
        """Add to a counter such as `link/sent_bytes`."""
        with self._lock:
            self._counters[name] = self._counters.get(name, 0.0) + amount

    def counter(self, name: str) -> float:
        """The counter's value since the start, 0.0 if it was never written."""
        with self._lock:
            return self._counters.get(name, 0.0)

    def record(self, name: str, start: float, end: float, step: int | None = None) -> None:
        """Record a span; `step` None: the current step."""
        with self._lock:
            self._spans.append(Span(name, start, end, self.step if step is None else step))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the time that the body takes."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.record(name, start, time.monotonic())

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
