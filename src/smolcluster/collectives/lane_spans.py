"""When the bytes of each call went over a lane: the rows "send to rank 1" and "recv from rank 1" of a trace.

A span begins and ends where the other side cannot have been earlier, however late this thread wakes up after a system
call: a send with the moments *before* the system was given its first and its last bytes, a receive with the moments
*after* it gave them. So on a common clock a receive never seems to begin or to end before its send.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from smolcluster.telemetry import Telemetry
from smolcluster.transport.frame import KIND_MESSAGE, OP_NAMES, PRELUDE_BYTES, Prelude


@dataclass(slots=True)
class _Transfer:
    """The bytes of one call in one direction: all its frames, or one message."""

    operation: int
    sequence: int
    tag: int
    start: float
    end: float
    nbytes: int
    until: int = 0  # of a send: the lane's sent_bytes when its last byte has gone


class LaneSpans:
    """Both directions of one lane. Everything here runs on the driving thread.

    Calls run one after the other and empty their lanes before they end, so that the spans of a track do not overlap.
    """

    def __init__(self, telemetry: Telemetry, group: str, rank: int, peer: int, *, messages: bool) -> None:
        """`rank` and `peer` as the whole run counts them; `messages`: the lane of point-to-point messages."""
        self._telemetry = telemetry
        self._group = group
        part = group.partition("/")[2]
        suffix = (" (messages)" if messages else "") + (f" of {part}" if part else "")
        self._send_track = f"send to rank {peer}{suffix}"
        self._recv_track = f"recv from rank {peer}{suffix}"
        self._send_ends = (rank, peer)
        self._recv_ends = (peer, rank)
        self._sends: deque[_Transfer] = deque()
        self._receive: _Transfer | None = None
        self._free_at = 0.0  # when the last message had gone

    def is_on(self) -> bool:
        """Whether a trace is recorded; the methods below are then to be called."""
        return self._telemetry.trace is not None

    def queued(self, prelude: Prelude, number: int, nbytes: int, until: int) -> None:
        """A frame was queued.

        Args:
            prelude: of the frame.
            number: of the frame on this lane.
            nbytes: on the wire.
            until: the lane's sent_bytes when its last byte has gone.
        """
        if self._sends and prelude.kind != KIND_MESSAGE:
            call = self._sends[-1]
            call.nbytes += nbytes
            call.until = until
            return
        now = time.monotonic()
        self._sends.append(_transfer(prelude, number, now, now, nbytes, until))

    def sent(self, at: float, sent_bytes: int) -> None:
        """The system took bytes, `sent_bytes` in all by now; just before it was asked to, it was `at`."""
        while self._sends:
            first = self._sends[0]
            first.end = max(first.end, at)
            if first.operation or first.until > sent_bytes:
                return  # of a call more may come
            first.start = max(first.start, self._free_at)  # messages wait for those before them
            self._free_at = first.end
            self._add(self._send_track, self._sends.popleft(), self._send_ends)

    def received(self, prelude: Prelude, number: int, start: float) -> None:
        """A frame is complete; just after its first byte was read, it was `start`."""
        now, nbytes = time.monotonic(), PRELUDE_BYTES + 8 * prelude.ndim + prelude.nbytes
        if prelude.kind == KIND_MESSAGE:
            self._add(self._recv_track, _transfer(prelude, number, start, now, nbytes), self._recv_ends)
        elif self._receive is None:
            self._receive = _transfer(prelude, number, start, now, nbytes)
        else:
            self._receive.end = now
            self._receive.nbytes += nbytes

    def call_ended(self) -> None:
        """The collective under way has sent and received all of its bytes."""
        if self._sends:
            self._add(self._send_track, self._sends.popleft(), self._send_ends)
        if self._receive is not None:
            self._add(self._recv_track, self._receive, self._recv_ends)
            self._receive = None

    def _add(self, track: str, transfer: _Transfer, ends: tuple[int, int]) -> None:
        trace = self._telemetry.trace
        if trace is None:
            return
        name = OP_NAMES[transfer.operation]
        details: dict[str, int | str] = {
            "sequence": transfer.sequence,
            "bytes": transfer.nbytes,
            "src": ends[0],
            "dst": ends[1],
            "group": self._group,
        }
        if transfer.operation == 0:
            details["tag"] = transfer.tag
        trace.add(track, name, transfer.start, transfer.end, details)


def _transfer(prelude: Prelude, number: int, start: float, end: float, nbytes: int, until: int = 0) -> _Transfer:
    sequence = number if prelude.kind == KIND_MESSAGE else prelude.sequence
    return _Transfer(prelude.operation, sequence, prelude.tag, start, end, nbytes, until)
