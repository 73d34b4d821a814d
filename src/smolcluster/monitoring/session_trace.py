"""A trace of a parameter server and its workers: as trace.py, but ranks come and go, and talk only to the server.

A worker hears in its session that a trace is recorded, and asks for the server's time: each answer was given between
the question and its arrival. At the end it asks again, and sends its events before its report, all over its link:

    server → worker   trace {began}              time {at}
    worker → server   clock {}                   events {text}

`began` is the server's time that the file calls 0.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import TracebackType

from smolcluster.cluster.sessions import SERVER, WORKER, SessionWorld
from smolcluster.kinds import JsonObject
from smolcluster.monitoring.trace import (
    CLOCK_TRIES,
    INCOMPLETE,
    Clock,
    ClockReading,
    chrome_events,
    in_pieces,
    on_rank_0s_clock,
    where_it_is,
    write_trace,
)
from smolcluster.telemetry import Telemetry, TraceRecorder

# Of events in a message, before what makes them a JSON string: a message has at most 1 MiB.
PIECE_BYTES = 1 << 18
# A worker waits so long for the server's time at the end, in seconds.
LAST_READING_S = 1.0


class ServerTrace:
    """What the server records, and what workers send it. Use it with `with` around the training."""

    def __init__(self, telemetry: Telemetry, path: Path, name: str, clock: Clock = time.monotonic) -> None:
        """Record from now on.

        Args:
            telemetry: the server's.
            path: the file.
            name: of the server's machine.
            clock: what the spans are measured with.
        """
        self._telemetry = telemetry
        self._path = path
        self._name = name
        self._clock = clock
        self._recorder = telemetry.trace = TraceRecorder()
        self._began = clock()
        self._lock = threading.Lock()
        self._pieces: list[bytes] = []
        self._dropped = 0

    def open(self, world: SessionWorld) -> None:
        """A session begins; on any thread."""
        world.on("clock", lambda _rank, _message: world.send(WORKER, "time", {"at": self._clock()}))
        world.on("events", lambda _rank, message: self._take(message))
        world.send(WORKER, "trace", {"began": self._began})

    def write(self) -> str:
        """End the recording and write the file; what the user should know of it."""
        error = self._write({})
        return error or where_it_is(self._path, self._dropped + self._recorder.dropped())

    def __enter__(self) -> ServerTrace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """After a failure, which is what the user has to hear of, write what there is."""
        if error is not None:
            with contextlib.suppress(Exception):
                self._write(INCOMPLETE)

    def _write(self, other: JsonObject) -> str | None:
        self._telemetry.trace = None
        events = chrome_events(self._recorder.events(), 0, self._name, lambda at: at - self._began)
        with self._lock:
            theirs = list(self._pieces)
        return write_trace(self._path, chain(in_pieces(events), theirs), other)

    def _take(self, message: JsonObject) -> None:
        text, dropped = message.get("text"), message.get("dropped")
        if isinstance(text, str) and isinstance(dropped, int):
            with self._lock:
                self._pieces.append(text.encode())
                self._dropped += dropped


class WorkerTrace:
    """What a worker records, if the server wants a trace."""

    def __init__(self, telemetry: Telemetry, rank: int, name: str, clock: Clock = time.monotonic) -> None:
        """Record nothing yet.

        Args:
            telemetry: the worker's.
            rank: the worker's in the run.
            name: of its machine.
            clock: what the spans are measured with.
        """
        self._telemetry = telemetry
        self._rank = rank
        self._name = name
        self._clock = clock
        self._recorder: TraceRecorder | None = None
        self._began = 0.0  # by the server's clock
        self._first: ClockReading | None = None
        self._reader: _ClockReader | None = None

    def begin(self, world: SessionWorld) -> None:
        """A session begins; before anything is received in it."""
        world.on("trace", lambda _rank, message: self._begin(world, message))
        world.on("time", lambda _rank, message: self._reader.answered(message) if self._reader else None)

    def send(self, world: SessionWorld) -> None:
        """End the recording and send it to the server. Blocks for a moment."""
        recorder, self._telemetry.trace = self._recorder, None
        if recorder is None or self._reader is None:
            return
        self._first = self._first or self._reader.reading()
        self._reader = _ClockReader(world, self._clock)
        self._reader.ask()
        self._reader.wait(LAST_READING_S)
        last = self._reader.reading() or self._first
        if last is None:
            return  # the server has not answered once
        to_server = on_rank_0s_clock(self._first or last, last)
        # What was before this server began (it was started again) has no place in its file.
        spans = [event for event in recorder.events() if to_server(event.start) >= self._began]
        events = chrome_events(spans, self._rank, self._name, lambda at: to_server(at) - self._began)
        dropped = recorder.dropped()
        for piece in _texts(events):
            world.send(SERVER, "events", {"text": piece, "dropped": dropped})
            dropped = 0

    def _begin(self, world: SessionWorld, message: JsonObject) -> None:
        """On the link's thread. A server that was started again has another beginning."""
        began = message.get("began")
        if not isinstance(began, int | float):
            return
        if self._recorder is None:
            self._recorder = self._telemetry.trace = TraceRecorder()
        if began != self._began:
            self._began, self._first, self._reader = float(began), None, None
        if self._reader is not None:
            self._first = self._first or self._reader.reading()
        self._reader = _ClockReader(world, self._clock)
        self._reader.ask()


class _ClockReader:
    """Asks for the server's time, some times in a row. Answers come on the link's thread."""

    def __init__(self, world: SessionWorld, clock: Clock) -> None:
        self._world = world
        self._clock = clock
        self._lower, self._upper = float("-inf"), float("inf")
        self._at = 0.0
        self._left = CLOCK_TRIES
        self._done = threading.Event()
        self._asked = 0.0

    def ask(self) -> None:
        """Ask once more. The first time when answers are heard."""
        self._asked = self._clock()
        self._world.send(SERVER, "clock", {})

    def answered(self, message: JsonObject) -> None:
        """An answer has come."""
        theirs, now = message.get("at"), self._clock()
        if not isinstance(theirs, int | float) or not self._left:
            return
        self._lower, self._upper = max(self._lower, theirs - now), min(self._upper, theirs - self._asked)
        self._at = now
        self._left -= 1
        if self._left:
            self.ask()
        else:
            self._done.set()

    def wait(self, timeout: float) -> None:
        """Block until all answers have come."""
        self._done.wait(timeout)

    def reading(self) -> ClockReading | None:
        """None: there was no answer."""
        if self._upper == float("inf"):
            return None
        return ClockReading(self._at, (self._lower + self._upper) / 2, abs(self._upper - self._lower) / 2)


def _texts(events: Iterator[JsonObject]) -> Iterator[str]:
    for piece in in_pieces(events, PIECE_BYTES):
        yield piece.decode()
