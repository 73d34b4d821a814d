"""How the rows and the log of every rank reach the run folder, which rank 0 owns.

Between machines they travel as control messages while training goes on. gloo and nccl have none: there the other ranks
keep their rows until the next checkpoint, or until training has ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from smolcluster.errors import SmolError
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.log import FORMAT
from smolcluster.monitoring.reporters import Reporter
from smolcluster.run.folder import RunFolder

if TYPE_CHECKING:
    from smolcluster.cluster.world import World
    from smolcluster.collectives.base import Communicator

logger = logging.getLogger(__name__)

# An exchanged message may be 1 MiB; a row is less than 64 KiB even with a norm for each of a thousand parameters.
_ROWS_MESSAGE_BYTES = 512 << 10
_WAIT_SLICE = 0.1


class Mail:
    """Brings this rank's rows and log to the run folder, wherever that is. A MetricsSink.

    Args:
        world: control links to the other ranks; None: there are none.
        folder: on rank 0, the run folder.
        reporter: where this rank's own progress is shown.
        patience: seconds to wait for the last rows of the others.
    """

    def __init__(self, world: World | None, folder: RunFolder | None, reporter: Reporter, patience: float) -> None:
        self._world = world
        self._folder = folder
        self._reporter = reporter
        self._patience = patience
        self._kept: list[JsonObject] = []
        self._arrived: deque[JsonObject] = deque()  # rows of other ranks; the thread that trains writes them
        self._is_over = False  # nobody trains any more
        self._ended = threading.Semaphore(0)
        self._logs: dict[int, TextIO] = {}
        self._logs_are_closed = False
        self._handler: logging.Handler | None = None
        self._level = logging.NOTSET

    def __enter__(self) -> Mail:
        if self._world is not None and self._folder is not None:
            self._world.on("row", lambda rank, message: self._row_of(message))
            self._world.on("log", lambda rank, message: self._log_of(rank, message))
            self._world.on("rows_end", lambda rank, message: self._ended.release())
        elif self._world is not None:
            self._handler = _WorldLog(self._world)
            logs = logging.getLogger("smolcluster")
            self._level = logs.level
            logs.addHandler(self._handler)
            logs.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handler is not None:
            logs = logging.getLogger("smolcluster")
            logs.removeHandler(self._handler)
            logs.setLevel(self._level)
        self._logs_are_closed = True
        for log in self._logs.values():
            log.close()
        if self._folder is not None and self._world is not None:
            # Some rows may still be on their way. A rank that the others have given up writes no more.
            with contextlib.suppress(SmolError):
                self._write_arrived()
                self._is_over = True

    def write(self, row: JsonObject) -> None:
        """Take one row of this rank."""
        if self._folder is not None:
            self._write_arrived()
            self._folder.write(row)
        elif self._world is not None:
            self._world.send(0, "row", {"row": row})
        else:
            self._kept.append(row)

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """Show it here."""
        self._reporter.progress(done, total, row)

    def deliver(self, comm: Communicator) -> None:
        """Every rank calls it after the same step; afterwards the rows of all so far are on rank 0's disk."""
        if self._world is None:
            self._exchange_kept(comm)
        elif self._folder is None:
            self._world.send(0, "rows_end", {})
        else:
            self._wait_for_others(self._world, comm.world_size - 1)
            self._write_arrived()
        if self._folder is not None:
            self._folder.sync()
        comm.barrier()

    def _row_of(self, message: JsonObject) -> None:
        row = message.get("row")
        if not isinstance(row, dict):
            return
        self._arrived.append(row)
        if self._is_over:
            try:
                self._write_arrived()
            except SmolError as error:  # a full disk
                logger.error("row not written reason=%s", error)

    def _write_arrived(self) -> None:
        if self._world is not None:
            self._world.confirm()
        assert self._folder is not None
        while self._arrived:
            self._folder.write(self._arrived.popleft())

    def _log_of(self, rank: int, message: JsonObject) -> None:
        assert self._folder is not None
        if self._logs_are_closed:
            return  # it comes after the end of the run
        with contextlib.suppress(ValueError):  # closed right now
            if rank not in self._logs:
                self._logs[rank] = self._folder.log_path(rank).open("a", encoding="utf-8", buffering=1)
            self._logs[rank].write(f"{message.get('line')}\n")

    def _wait_for_others(self, world: World, count: int) -> None:
        deadline = time.monotonic() + self._patience
        for _ in range(count):
            while not self._ended.acquire(timeout=_WAIT_SLICE):
                if world.error() is not None:
                    return  # what communicates next raises it
                if time.monotonic() > deadline:
                    logger.warning("rows missing: some rank did not send its last one")
                    return

    def _exchange_kept(self, comm: Communicator) -> None:
        kept, at = self._kept, 0
        self._kept = []
        while True:
            end, nbytes = at, 0
            while end < len(kept) and nbytes < _ROWS_MESSAGE_BYTES:
                nbytes += len(json.dumps(kept[end]))
                end += 1
            message: JsonValue = [*kept[at:end]]
            parts = comm.exchange(message)
            at = end
            rows = [row for part in parts if isinstance(part, list) for row in part if isinstance(row, dict)]
            if not rows:
                return
            if self._folder is not None:
                for row in rows:
                    self._folder.write(row)


class _WorldLog(logging.Handler):
    """Log lines of this rank for rank 0's run folder. What sending logs itself is left out."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))
        self._world = world
        self._sending = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(self._sending, "now", False):
            return
        self._sending.now = True
        try:
            self._world.send(0, "log", {"line": self.format(record)})
        except Exception:  # noqa: BLE001 - logging's own rule: a handler never breaks its program
            self.handleError(record)
        finally:
            self._sending.now = False
