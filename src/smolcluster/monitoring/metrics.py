"""`metrics.jsonl`: one JSON object per rank and step, on disk as soon as it is written."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from smolcluster.errors import TrainingStopped
from smolcluster.kinds import JsonObject, JsonValue


class EverySteps:
    """Says which rows are due: those whose step is a multiple of a number, or has passed one since the row before."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._before: int | None = None

    def is_due(self, step: int) -> bool:
        """To be asked once for every row: the steps of a worker of edp have gaps, those of others' pushes."""
        before = self._before
        if before is not None and step + self._interval < before:  # the run has gone back to a checkpoint
            before = None
        self._before = step if before is None else max(before, step)
        has_passed = before is not None and step // self._interval > before // self._interval
        return step % self._interval == 0 or has_passed


class MetricsFile:
    """Appends rows. For one thread."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        # Unbuffered: a reader, or whoever looks after a crash, finds every finished step.
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, row: JsonObject) -> None:
        """Append one row whole, or nothing. Numbers that JSON does not know (NaN, infinity) become null.

        Raises:
            TrainingStopped: the disk is full or the file cannot be written.
        """
        line = memoryview(json_line(row).encode())
        nbytes = len(line)
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[self._file.write(line) :]
        except OSError as exc:
            with contextlib.suppress(OSError):
                self._file.truncate(self._file.tell() - (nbytes - len(line)))
            raise self._stopped(exc) from exc

    def sync(self) -> None:
        """Wait until the rows so far are on the disk.

        Raises:
            TrainingStopped: the disk is full or the file cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as exc:
            raise self._stopped(exc) from exc

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _stopped(self, exc: OSError) -> TrainingStopped:
        return TrainingStopped(
            f"the metrics cannot be written to {self._path} ({exc.strerror or exc}). Free some space, or give --out a "
            "folder on another disk"
        )


def keep_rows_before(path: Path, step: int) -> None:
    """Drop the rows of `step` and later ones: a run that goes on from a checkpoint writes them again. Atomic.

    Raises:
        OSError: the file cannot be rewritten.
    """
    shorter = path.with_name(path.name + ".tmp")
    with shorter.open("w", encoding="utf-8", newline="\n") as file:
        for row in read_rows(path):
            number = row.get("step")
            if isinstance(number, int) and number < step:
                file.write(json_line(row))
        file.flush()
        os.fsync(file.fileno())
    os.replace(shorter, path)


def json_line(value: JsonValue) -> str:
    """`value` as one line of valid JSON, with null for NaN and infinity."""
    try:
        return json.dumps(value, allow_nan=False) + "\n"
    except ValueError:  # rare: looking for them in every row would cost more
        return json.dumps(_finite(value), allow_nan=False) + "\n"


def read_rows(path: Path) -> Iterator[JsonObject]:
    """The rows of a `metrics.jsonl`; a last line that a crash cut off is left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def _finite(value: JsonValue) -> JsonValue:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
