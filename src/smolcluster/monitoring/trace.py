"""`trace.json`: what every rank computed, sent and waited for, on one clock, for ui.perfetto.dev or chrome://tracing.

Each rank keeps its spans in memory (telemetry.TraceRecorder), in seconds of its own monotonic clock. Before and after
the run every rank asks rank 0 for the time. The answer was given between the question and its arrival, so each round
trip bounds the difference of the two clocks from both sides; if it has changed in between, it is taken to have done so
evenly. At the end the ranks write their events as JSON, and rank 0 fetches them piece by piece.

Source: Cristian 1989, Probabilistic clock synchronization; the format: "Trace Event Format" of Chrome.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType

import torch

from smolcluster.collectives.base import Communicator
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.telemetry import (
    BUCKETS,
    COMPUTE,
    GATHERS,
    LOADER,
    MAX_TRACE_EVENTS,
    PUSHES,
    Telemetry,
    TraceEvent,
    TraceRecorder,
)

Clock = Callable[[], float]
# From a rank's own time to that of rank 0 or of the file; seconds.
ClockMap = Callable[[float], float]

# Questions for the time per rank: some milliseconds on a LAN, and on a busy machine some of them are answered at once.
CLOCK_TRIES = 32
PIECE_BYTES = 1 << 20
# The highest tag: an algorithm's own messages count from 0.
_TAG = 2**30 - 1
_EMPTY = torch.empty(0, dtype=torch.uint8)
# Said of a trace that lacks the other ranks.
INCOMPLETE: JsonObject = {"incomplete": "the run failed: rank 0 alone wrote this"}
# Perfetto looks threads up by their number alone, so no two ranks may have the same.
_THREADS_PER_RANK = 1000
_FIRST_TRACKS = (COMPUTE, BUCKETS, GATHERS, PUSHES, LOADER)


@dataclass(frozen=True, slots=True)
class ClockReading:
    """How a rank's clock compares with rank 0's.

    Attributes:
        at: when this was measured, by the rank's own clock, in seconds.
        offset: seconds to be added to it for rank 0's time.
        error: seconds by which `offset` may be wrong, half a round trip at most.
    """

    at: float
    offset: float = 0.0
    error: float = 0.0


class OptimizerSpans:
    """Records the updates of optimizers, while a trace is recorded."""

    def __init__(
        self, telemetry: Telemetry, optimizers: Iterable[torch.optim.Optimizer], clock: Clock = time.monotonic
    ) -> None:
        """Watch these from now on."""
        self._telemetry = telemetry
        self._clock = clock
        self._began = 0.0
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    def _before(self, *_: object) -> None:
        self._began = self._clock()

    def _after(self, *_: object) -> None:
        telemetry = self._telemetry
        if telemetry.trace is not None:
            telemetry.trace.add(COMPUTE, "optimizer", self._began, self._clock(), {"step": telemetry.step})


class RunTrace:
    """Records what one rank does, from the constructor to `write`.

    Use it with `with` around the training: if that fails, rank 0 writes what it has itself.
    """

    def __init__(
        self,
        comm: Communicator,
        path: Path | None,
        name: str,
        clock: Clock = time.monotonic,
    ) -> None:
        """Record from now on. Blocks; every rank calls it.

        Args:
            comm: all ranks.
            path: the file; only rank 0 has one.
            name: of this rank's machine.
            clock: what the spans are measured with.
        """
        self._comm = comm
        self._path = path
        self._name = name
        self._clock = clock
        self._recorder = TraceRecorder()
        self._began = clock()
        self._first = read_clock(comm, clock)
        comm.telemetry.trace = self._recorder
        comm.barrier()  # what comes now is recorded on both sides

    def __enter__(self) -> RunTrace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._write_own()

    def write(self) -> str | None:
        """End the recording and let rank 0 write the file. Blocks; every rank calls it.

        Returns:
            On rank 0 what the user should know: where it is, or why it is not there.
        """
        comm = self._comm
        comm.telemetry.trace = None
        comm.barrier()  # before there are messages that only the slower ranks record
        last = read_clock(comm, self._clock)
        own: JsonObject = {
            "rank": comm.rank,
            "began": self._began,
            "clock_offset_s": self._first.offset,
            "clock_error_us": 1e6 * max(self._first.error, last.error),
            "clock_drift_us": 1e6 * (last.offset - self._first.offset),
            "dropped_events": self._recorder.dropped(),
        }
        ranks = [rank for rank in comm.exchange(own) if isinstance(rank, dict)]
        pieces = self._pieces(last, _number(ranks[0]["began"]))
        if comm.rank != 0:
            for piece in chain(pieces, [b""]):
                comm.recv(0, _TAG).wait()  # rank 0 wants one more
                comm.send(torch.frombuffer(bytearray(piece), dtype=torch.uint8) if piece else _EMPTY, 0, _TAG).wait()
            comm.barrier()
            return None
        assert self._path is not None
        all_pieces = chain(pieces, *(self._fetch(peer) for peer in range(1, comm.world_size)))
        error = write_trace(self._path, all_pieces, {"ranks": [*ranks]})
        comm.barrier()
        if error is not None:
            return error
        return where_it_is(self._path, sum(int(_number(rank["dropped_events"])) for rank in ranks))

    def _write_own(self) -> None:
        """After a failure, which is what the user has to hear of."""
        self._comm.telemetry.trace = None
        if self._path is not None:
            with contextlib.suppress(Exception):
                pieces = self._pieces(self._first, self._began)
                write_trace(self._path, pieces, INCOMPLETE)

    def _fetch(self, peer: int) -> Iterator[bytes]:
        while True:
            self._comm.send(_EMPTY, peer, _TAG).wait()
            piece = self._comm.recv(peer, _TAG).result()[0]
            if not piece.numel():
                return
            yield piece.numpy().tobytes()

    def _pieces(self, last: ClockReading, began: float) -> Iterator[bytes]:
        """This rank's events as JSON, separated by commas, in pieces. `began`: rank 0's time of the file's 0."""
        to_common = on_rank_0s_clock(self._first, last)
        events = self._recorder.events()
        yield from in_pieces(chrome_events(events, self._comm.rank, self._name, lambda at: to_common(at) - began))


def read_clock(comm: Communicator, clock: Clock = time.monotonic) -> ClockReading:
    """Compare this rank's clock with rank 0's. Blocks; every rank calls it."""
    if comm.rank == 0:
        for peer in range(1, comm.world_size):
            for _ in range(CLOCK_TRIES):
                comm.recv(peer, _TAG).wait()
                comm.send(torch.tensor([clock()], dtype=torch.float64), peer, _TAG).wait()
        return ClockReading(clock())
    lower, upper = float("-inf"), float("inf")
    for _ in range(CLOCK_TRIES):
        asked = clock()
        comm.send(_EMPTY, 0, _TAG).wait()
        theirs = comm.recv(0, _TAG).result()[0].item()
        lower, upper = max(lower, theirs - clock()), min(upper, theirs - asked)
    return ClockReading(clock(), (lower + upper) / 2, abs(upper - lower) / 2)


def on_rank_0s_clock(first: ClockReading, last: ClockReading) -> ClockMap:
    """From a rank's own time to rank 0's, by two readings."""
    lower = max(first.offset - first.error, last.offset - last.error)
    upper = min(first.offset + first.error, last.offset + last.error)
    if lower <= upper:  # one offset explains both: a slope would be that of the errors
        return lambda at: at + (lower + upper) / 2
    drift = (last.offset - first.offset) / (last.at - first.at)
    return lambda at: at + first.offset + (at - first.at) * drift


def chrome_events(events: Sequence[TraceEvent], rank: int, name: str, to_common: ClockMap) -> Iterator[JsonObject]:
    """One rank's spans as Chrome trace events.

    Times are whole microseconds, so that no rounding of a sum makes two spans overlap.

    Args:
        events: in any order.
        rank: becomes the process number.
        name: of the rank's machine.
        to_common: from the rank's own time to the file's.
    """
    first = rank * _THREADS_PER_RANK
    tracks = {track: first + number for number, track in enumerate(_in_order({event.track for event in events}), 1)}
    yield _metadata("process_name", rank, first, {"name": f"rank {rank} ({name})"})
    yield _metadata("process_sort_index", rank, first, {"sort_index": rank})
    for track, thread in tracks.items():
        yield _metadata("thread_name", rank, thread, {"name": track})
        yield _metadata("thread_sort_index", rank, thread, {"sort_index": thread})
    buckets = {_call(event): event.details for event in events if event.track in (BUCKETS, GATHERS)}
    # What encloses comes first, also where both begin in the same microsecond.
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        start, end = _microseconds(to_common(event.start)), _microseconds(to_common(event.end))
        place: JsonObject = {"pid": rank, "tid": tracks[event.track]}
        args: JsonObject = {**event.details}
        if "dst" in event.details:  # bytes on a lane, not a span of the training thread
            args["call"] = event.name
            if (bucket := buckets.get(_call(event))) is not None:
                args |= {"step": bucket["step"], "bucket": bucket["bucket"]}
        label = _label(event, args, rank)
        span: JsonObject = {"name": label, "cat": event.track, "ph": "X", "ts": start, "dur": end - start, "args": args}
        yield span | place
        if "dst" in event.details:
            yield _arrow(event, rank, start, end) | place


def _label(event: TraceEvent, args: JsonObject, rank: int) -> str:
    """What stands on the span.

    Only the wait has the call's name in it: how long the all-reduces themselves took is another question, and whoever
    adds up the spans of a name should not mix the two.
    """
    name = f"bucket {args['bucket']}" if "bucket" in args else event.name
    if "dst" in args:
        return f"{'send' if args['src'] == rank else 'recv'} {name}"
    return f"{name} ({args['call']})" if "call" in args else name


def _call(event: TraceEvent) -> tuple[object, ...]:
    return event.name, event.details.get("group"), event.details.get("sequence")


def _arrow(event: TraceEvent, rank: int, start: int, end: int) -> JsonObject:
    """One end of the arrow from a send to its receive; it has to lie within the span to be drawn at it."""
    arrow: JsonObject = {"name": event.name, "cat": "bytes", "id": _flow_id(event)}
    if event.details["src"] == rank:
        return arrow | {"ph": "s", "ts": (start + end) // 2}
    return arrow | {"ph": "f", "bp": "e", "ts": max(start, end - 1)}


def _in_order(tracks: Iterable[str]) -> list[str]:
    """The threads of the rank first, then its peers."""
    found = set(tracks)
    return [track for track in _FIRST_TRACKS if track in found] + sorted(found - {*_FIRST_TRACKS})


def _metadata(name: str, rank: int, thread: int, args: JsonObject) -> JsonObject:
    return {"name": name, "ph": "M", "ts": 0, "pid": rank, "tid": thread, "args": args}


def _microseconds(seconds: float) -> int:
    return round(1e6 * seconds)


def _flow_id(event: TraceEvent) -> int:
    """The same number for the send and the receive of a call's bytes between two ranks; below 2^53 for JavaScript."""
    transfer = (*_call(event), event.details["src"], event.details["dst"])
    return int.from_bytes(hashlib.blake2b(repr(transfer).encode(), digest_size=6).digest(), "big")


def _number(value: JsonValue) -> float:
    return value if isinstance(value, int | float) else 0.0


def in_pieces(events: Iterable[JsonObject], nbytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Events as JSON, separated by commas, some of them at a time: about `nbytes`."""
    lines: list[str] = []
    length = 0
    for event in events:
        lines.append(json.dumps(event, separators=(",", ":")))
        length += len(lines[-1])
        if length >= nbytes:
            yield ",\n".join(lines).encode()
            lines, length = [], 0
    if lines:
        yield ",\n".join(lines).encode()


def where_it_is(path: Path, dropped: int) -> str:
    """What the user is told of a trace that is written."""
    lacks = f", without the first {dropped} events: a rank keeps the newest {MAX_TRACE_EVENTS}" if dropped else ""
    return f"the trace is {path}{lacks}; open it in https://ui.perfetto.dev"


def write_trace(path: Path, pieces: Iterator[bytes], other: JsonObject) -> str | None:
    """Write events, separated by commas, and what else is to be known; the error in words, None if all is well.

    All pieces are taken also when the disk is full: other ranks wait until theirs are.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(b'{"traceEvents":[\n')
            for number, piece in enumerate(pieces):
                file.write(b",\n" + piece if number else piece)
            file.write(b'\n],"otherData":' + json.dumps(other).encode() + b"}\n")
        partial.replace(path)
    except OSError as exc:
        for _ in pieces:
            pass
        return f"the trace cannot be written to {path} ({exc.strerror or exc}). Free some space and run again"
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return None
