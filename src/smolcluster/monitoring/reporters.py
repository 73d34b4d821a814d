"""What a user sees while a run goes on: a progress bar in a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from smolcluster.kinds import JsonObject, JsonValue

# The bar is redrawn ten times a second anyway; formatting every step of a fast run would only cost time.
_UPDATE_INTERVAL_S = 0.1
# Part of the old value that stays in the shown rate with each shown step.
_RATE_DECAY = 0.9


class Reporter(Protocol):
    """Where progress goes. `note` may be called from any thread, the others from one."""

    def note(self, text: str) -> None:
        """Something happened that the user should know."""
        ...

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """`done` of `total` steps are applied; `row` is the last one's."""
        ...

    def close(self) -> None:
        """Nothing more comes: give the terminal back."""
        ...


class QuietReporter:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class BarReporter:
    """One progress bar with loss, validation loss and speed."""

    def __init__(self, stream: TextIO, unit: str = "tokens") -> None:
        self._console = Console(file=stream)
        self._unit = unit
        self._numbers = _Numbers()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: TaskID | None = None
        self._shown_at = 0.0

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """Move the bar."""
        self._numbers.take(row)
        now = time.monotonic()
        if done < total and now - self._shown_at < _UPDATE_INTERVAL_S:
            return
        self._shown_at = now
        if self._task is None:
            self._task = self._progress.add_task("training", total=total, numbers="")
            self._progress.start()
        self._progress.update(self._task, completed=done, numbers=self._numbers.text(self._unit))

    def close(self) -> None:
        """Stop the bar and leave it as it stands."""
        self._progress.stop()


class LineReporter:
    """A line every `interval` steps, and one for each evaluation: for files, pipes and continuous integration."""

    def __init__(self, stream: TextIO, interval: int, unit: str = "tokens") -> None:
        self._stream = stream
        self._interval = interval
        self._unit = unit
        self._numbers = _Numbers()
        self._shown = 0
        self._broken = False

    def note(self, text: str) -> None:
        """Print a line."""
        if self._broken:
            return
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except OSError:
            # Whoever read it has gone (a closed pipe, a lost ssh session): that is no reason to stop training.
            self._broken = True

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """Print a line when it is due."""
        self._numbers.take(row)
        # `done` may jump: fast runs report only some of their steps
        if done == total or done // self._interval > self._shown // self._interval or "val/loss" in row:
            self.note(f"step {done}/{total}  {self._numbers.text(self._unit)}")
        self._shown = done

    def close(self) -> None:
        """Nothing to give back."""


def make_reporter(quiet: bool, interval: int, unit: str = "tokens", stream: TextIO | None = None) -> Reporter:
    """The reporter for `stream` (None: stderr, so that stdout stays free for results)."""
    if quiet:
        return QuietReporter()
    stream = sys.stderr if stream is None else stream
    return BarReporter(stream, unit) if stream.isatty() else LineReporter(stream, interval, unit)


class _Numbers:
    """The newest of each number that is shown, the rate averaged."""

    def __init__(self) -> None:
        self._loss: JsonValue = None
        self._val_loss: JsonValue = None
        self._rate: float | None = None

    def take(self, row: JsonObject) -> None:
        self._loss = row.get("train/loss", self._loss)
        self._val_loss = row.get("val/loss", self._val_loss)
        rate = row.get("train/tokens_per_s")
        if isinstance(rate, int | float):
            self._rate = rate if self._rate is None else _RATE_DECAY * self._rate + (1 - _RATE_DECAY) * rate

    def text(self, unit: str) -> str:
        parts = [f"{name} {value:.4f}" for name, value in (("loss", self._loss), ("val", self._val_loss)) if _is(value)]
        if self._rate is not None:
            parts.append(f"{self._rate:,.0f} {unit}/s")
        return "  ".join(parts)


def _is(value: JsonValue) -> bool:
    return isinstance(value, int | float)
