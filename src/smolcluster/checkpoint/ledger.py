"""Files of JSON lines that belong to the weights: what comes after a checkpoint goes when the run goes back to it.

`ledger.jsonl` says which samples count, one line for each lease whose gradient is in the weights:

    {"step": 12, "lease": 31, "rank": 2, "session": 2, "ranges": [[0, 640, 672]], "samples": 32}

A range is (epoch, first place, place behind the last) in that epoch's order (data/sampler.py). Over a whole run every
place of every epoch stands in it exactly once.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from smolcluster.checkpoint import disk
from smolcluster.errors import CheckpointError, TrainingStopped
from smolcluster.kinds import JsonObject

LEDGER = "ledger.jsonl"


class Ledger:
    """Appends lines; knows how many there are. For one thread."""

    def __init__(self, path: Path, lines: int = 0) -> None:
        """Open the file and cut off what comes after the first `lines` lines.

        Raises:
            CheckpointError: there are fewer.
            TrainingStopped: the file cannot be written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as exc:
            raise self._stopped(exc) from exc
        self.lines = 0
        self._cut(lines)

    def append(self, rows: Sequence[JsonObject]) -> None:
        """Add lines; others can read them after the next `flush`, and they are on the disk after the next `sync`.

        Raises:
            TrainingStopped: the disk is full or the file cannot be written.
        """
        try:
            self._file.write(b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))
        except OSError as exc:
            raise self._stopped(exc) from exc
        self.lines += len(rows)

    def flush(self) -> None:
        """Hand all lines to the system.

        Raises:
            TrainingStopped: the disk is full or the file cannot be written.
        """
        try:
            self._file.flush()
        except OSError as exc:
            raise self._stopped(exc) from exc

    def sync(self) -> None:
        """Wait until all lines are on the disk.

        Raises:
            TrainingStopped: the disk is full or the file cannot be written.
        """
        self.flush()
        try:
            disk.sync_file(self._path)
        except OSError as exc:
            raise self._stopped(exc) from exc

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _cut(self, lines: int) -> None:
        self._file.seek(0)
        end = 0
        while self.lines < lines:
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.close()
                raise CheckpointError(
                    f"{self._path} has {self.lines} lines, but the checkpoint was written with {lines}. Put the file "
                    "of that run back, or resume from an earlier checkpoint"
                )
            self.lines += 1
            end += len(line)
        try:
            self._file.truncate(end)
            self._file.seek(0, os.SEEK_END)
        except OSError as exc:
            raise self._stopped(exc) from exc

    def _stopped(self, exc: OSError) -> TrainingStopped:
        return TrainingStopped(
            f"{self._path} cannot be written ({exc.strerror or exc}). Free some space, or give --out a folder on "
            "another disk"
        )


def read_ledger(path: Path) -> Iterator[JsonObject]:
    """The lines of a ledger; a last one that a crash cut off is left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row
