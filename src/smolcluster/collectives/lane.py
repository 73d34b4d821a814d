"""One bulk connection to one peer, cut into frames."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

from smolcluster.collectives.lane_spans import LaneSpans
from smolcluster.errors import SmolError
from smolcluster.transport import frame
from smolcluster.transport.base import Channel
from smolcluster.transport.frame import Prelude
from smolcluster.transport.tcp import MAX_SEND_BUFFERS

# Frames taken from one lane before the others get their turn.
FRAMES_PER_TURN = 16


class Receiver(Protocol):
    """Decides where the payload of an incoming frame goes."""

    def place(self, lane: Lane, prelude: Prelude, dims: bytes) -> memoryview | None:
        """Memory for the payload; None: not expected yet, ask again later. Raises on a frame that does not fit."""
        ...

    def arrived(self, lane: Lane, prelude: Prelude) -> None:
        """The payload is complete."""
        ...

    def expects(self, peer: int) -> bool:
        """True while something that `peer` has yet to send is waited for."""
        ...

    def gone(self, peer: int, error: SmolError) -> None:
        """Nothing more comes from `peer`."""
        ...


class Lane:
    """One bulk connection to one peer: a queue of outgoing bytes, and the frame that is coming in."""

    def __init__(self, peer: int, channel: Channel, receiver: Receiver, spans: LaneSpans) -> None:
        self.peer = peer
        self.channel = channel
        self.receiver = receiver
        self.spans = spans
        self.sent_bytes = 0
        self.queued_bytes = 0
        self.held = False  # a frame is here that nobody expects yet
        self.broken = False
        self._sent_frames = 0
        self._recv_frames = 0
        self._out: deque[memoryview] = deque()
        self._marks: deque[tuple[int, Callable[[SmolError | None], None]]] = deque()
        self._head = memoryview(bytearray(frame.PRELUDE_BYTES))
        self._dims = memoryview(bytearray(8 * frame.MAX_DIMS))
        self._prelude: Prelude | None = None
        self._dims_complete = False
        self._body: memoryview | None = None
        self._got = 0  # bytes of whatever part is arriving: head, dims or body
        self._began = 0.0  # for a trace: when the first byte of the head was here

    def enqueue(
        self,
        prelude: Prelude,
        buffers: Iterable[memoryview],
        on_sent: Callable[[SmolError | None], None] | None = None,
    ) -> None:
        """Queue a frame; `on_sent(None)` runs when its last byte was given to the system, `on_sent(error)` if never."""
        before = self.queued_bytes
        for buffer in buffers:
            if len(buffer):
                self._out.append(buffer)
                self.queued_bytes += len(buffer)
        until = self.sent_bytes + self.queued_bytes
        if on_sent is not None:
            self._marks.append((until, on_sent))
        self._sent_frames += 1
        if self.spans.is_on():
            self.spans.queued(prelude, self._sent_frames, self.queued_bytes - before, until)

    def sending(self) -> bool:
        """True while bytes wait to be sent."""
        return bool(self._out)

    def is_needed(self) -> bool:
        """True while bytes wait to be sent, or the peer's are waited for."""
        return self.sending() or self.receiver.expects(self.peer)

    def flush(self) -> None:
        """Send until the connection takes no more."""
        is_traced, at = bool(self._out) and self.spans.is_on(), 0.0
        while self._out:
            if is_traced:
                at = time.monotonic()
            taken = self.channel.try_send(list(islice(self._out, MAX_SEND_BUFFERS)))
            if taken == 0:
                break
            self.sent_bytes += taken
            self.queued_bytes -= taken
            if is_traced:
                self.spans.sent(at, self.sent_bytes)
            while taken:
                first = self._out[0]
                if taken < len(first):
                    self._out[0] = first[taken:]
                    break
                taken -= len(first)
                self._out.popleft()
        while self._marks and self._marks[0][0] <= self.sent_bytes:
            self._marks.popleft()[1](None)

    def give_up(self, error: SmolError) -> None:
        """The peer is gone for good: what is queued, and what is expected, fails."""
        self._out.clear()
        self.queued_bytes = 0
        while self._marks:
            self._marks.popleft()[1](error)
        self.receiver.gone(self.peer, error)

    def pump(self) -> bool:
        """Receive until the connection has no more or a frame must wait; True if anything moved."""
        moved = False
        for _ in range(FRAMES_PER_TURN):
            if not self._receive_head():
                return moved
            if self._body is None:
                assert self._prelude is not None
                self._body = self.receiver.place(self, self._prelude, bytes(self._dims[: 8 * self._prelude.ndim]))
                self.held = self._body is None
                if self._body is None:
                    return moved
            while self._got < len(self._body):
                count = self.channel.try_recv_into(self._body[self._got :])
                if count == 0:
                    return moved
                moved = True
                self._got += count
            prelude = self._prelude
            assert prelude is not None
            self._reset()
            self._recv_frames += 1
            if self.spans.is_on():
                self.spans.received(prelude, self._recv_frames, self._began)
            self.receiver.arrived(self, prelude)
            moved = True
        return moved

    def _receive_head(self) -> bool:
        if self._prelude is None:
            if not self._fill(self._head):
                return False
            self._prelude, self._got = frame.unpack(self._head), 0
            self._dims_complete = self._prelude.ndim == 0
        if not self._dims_complete:
            if not self._fill(self._dims[: 8 * self._prelude.ndim]):
                return False
            self._got, self._dims_complete = 0, True
        return True

    def _fill(self, target: memoryview) -> bool:
        while self._got < len(target):
            count = self.channel.try_recv_into(target[self._got :])
            if count == 0:
                return False
            if self._prelude is None and self._got == 0:
                self._began = time.monotonic()
            self._got += count
        return True

    def _reset(self) -> None:
        self._prelude, self._dims_complete, self._body, self._got = None, False, None, 0
