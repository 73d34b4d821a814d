"""One bulk connection to one peer, cut into frames."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from smolcluster.collectives.base import ReduceOp
from smolcluster.collectives.lane_spans import LaneSpans
from smolcluster.collectives.shm import Swap
from smolcluster.collectives.wire import combine
from smolcluster.errors import SmolError
from smolcluster.transport import frame
from smolcluster.transport.base import Channel
from smolcluster.transport.frame import Prelude
from smolcluster.transport.shm import ALIGNMENT, SharedMemoryChannel
from smolcluster.transport.tcp import MAX_SEND_BUFFERS
from smolcluster.transport.tensors import check_payload, raw_bytes

# Bytes that one system call sends or receives before the other direction, and the other lanes, get their turn. What
# was just received is then still in the processor's cache when it is added, and what was just sent when the other
# process of this machine receives it. On loopback 64 MiB take 31 ms, with 432 KiB too; with 112 KiB Python's part shows
# (33 ms). No multiple of 64 KiB, which are the kernel's own blocks: those meet the peer's out of step.
QUANTUM_BYTES = 240 << 10
# Where more ranks than cores share a machine they take turns, the cache is cold anyway, and a turn ought to be long: 4
# ranks on 2 cores reduce 64 MiB in 84 ms, with 240 KiB in 93.
CROWDED_QUANTUM_BYTES = 4 << 20
# Received before it is added, at most.
MAX_SUM_BYTES = 1 << 20


class Receiver(Protocol):
    """Decides where the payload of an incoming frame goes."""

    def place(self, lane: Lane, prelude: Prelude, dims: bytes) -> memoryview | Sum | Swap | None:
        """Where the payload belongs; None: not expected yet, ask again later. Raises on a frame that does not fit."""
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


class Sum:
    """A payload that is combined with a tensor as it arrives, through memory that stays in the processor's cache."""

    def __init__(self, scratch: Tensor) -> None:
        """`scratch`: uint8, as much as is received before it is combined; used again for every payload of a lane."""
        self._scratch = scratch
        self._bytes = raw_bytes(scratch)

    def begin(self, target: Tensor, op: ReduceOp) -> Sum:
        """The payload that comes now belongs to `target` (n,), a CPU tensor; in its dtype."""
        self._target = target
        self._op = op
        self._values = self._scratch.view(target.dtype)
        self._item_bytes = target.element_size()
        self._done = 0  # elements
        self._filled = 0  # bytes of scratch
        self._window = min(self._scratch.nbytes, target.nbytes)
        return self

    def __len__(self) -> int:
        return self._target.nbytes

    def add(self, block: memoryview) -> None:
        """The next bytes, whole elements, from where they lie. For payloads without `buffer` and `took`."""
        values = torch.frombuffer(block, dtype=self._target.dtype)
        combine(self._target[self._done : self._done + values.numel()], values, self._op)
        self._done += values.numel()

    def buffer(self) -> memoryview:
        """Where the next bytes belong."""
        return self._bytes[self._filled : self._window]

    def took(self, count: int) -> None:
        """So many bytes were put there."""
        self._filled += count
        if self._filled == self._window:
            elements = self._window // self._item_bytes
            values = self._values if self._window == self._scratch.nbytes else self._values[:elements]
            combine(self._target[self._done : self._done + elements], values, self._op)
            self._done += elements
            self._filled = 0
            self._window = min(self._scratch.nbytes, self._target.nbytes - self._done * self._item_bytes)


class Lane:
    """One bulk connection to one peer: a queue of outgoing bytes, and the frame that is coming in."""

    def __init__(
        self,
        peer: int,
        channel: Channel,
        receiver: Receiver,
        spans: LaneSpans,
        *,
        quantum_bytes: int = QUANTUM_BYTES,
    ) -> None:
        self.peer = peer
        self._quantum_bytes = quantum_bytes
        self.channel = channel
        self.receiver = receiver
        self.spans = spans
        self.sent_bytes = 0
        self.queued_bytes = 0
        self.awaited = 0  # payloads that a collective waits for
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
        self._body: memoryview | Sum | Swap | None = None
        self._sum: Sum | None = None
        self._got = 0  # bytes of whatever part is arriving: head, dims or body
        self._began = 0.0  # for a trace: when the first byte of the head was here
        self._seen = (0, False, 0)  # how far it had received when `stalled_for` was asked last, and since when
        self._seen_at = 0.0
        self._shared = channel if isinstance(channel, SharedMemoryChannel) else None
        self.swap: Swap | None = None  # an all-reduce with the peer alone, under way

    def enqueue(
        self,
        prelude: Prelude,
        buffers: Iterable[memoryview],
        on_sent: Callable[[SmolError | None], None] | None = None,
        *,
        more_bytes: int = 0,
    ) -> None:
        """Queue a frame; `on_sent(None)` runs when its last byte was given to the system, `on_sent(error)` if never.

        `more_bytes`: what belongs to it and is not in `buffers`, but sent by a swap.
        """
        before = self.queued_bytes
        for buffer in buffers:
            if len(buffer):
                self._out.append(buffer)
                self.queued_bytes += len(buffer)
        self.queued_bytes += more_bytes
        until = self.sent_bytes + self.queued_bytes
        if on_sent is not None:
            self._marks.append((until, on_sent))
        self._sent_frames += 1
        if self.spans.is_on():
            self.spans.queued(prelude, self._sent_frames, self.queued_bytes - before, until)

    @property
    def shares_memory(self) -> bool:
        """Whether the bytes go through memory that the peer has as well."""
        return self._shared is not None

    def sending(self) -> bool:
        """True while bytes wait to be sent."""
        return bool(self._out)

    def is_needed(self) -> bool:
        """True while bytes wait to be sent, or the peer's are waited for."""
        return self.sending() or self.receiver.expects(self.peer)

    def flush(self) -> bool:
        """Send about a quantum, or what the connection takes; True if it took any."""
        if not self._out:
            return self.swap is not None and self._move(self.swap, self.swap.send)
        buffers: list[memoryview] = []
        gathered = 0
        for buffer in self._out:
            # Only the end of a payload may be no multiple: see SharedMemoryChannel.
            room = (self._quantum_bytes - gathered) // ALIGNMENT * ALIGNMENT
            if room == 0 or len(buffers) == MAX_SEND_BUFFERS:
                break
            buffers.append(buffer[:room])
            gathered += len(buffers[-1])
        at = time.monotonic() if self.spans.is_on() else 0.0
        taken = self.channel.try_send(buffers)
        if taken == 0:
            return False
        self.sent_bytes += taken
        self.queued_bytes -= taken
        if at:
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
        return True

    def give_up(self, error: SmolError) -> None:
        """The peer is gone for good: what is queued, and what is expected, fails."""
        self._out.clear()
        self.queued_bytes = 0
        while self._marks:
            self._marks.popleft()[1](error)
        self.receiver.gone(self.peer, error)

    def pump(self) -> bool:
        """Receive about a quantum, or until the connection has no more or a frame must wait; True if any came."""
        received = 0
        while received < self._quantum_bytes:
            if self._body is None:
                if not self._receive_head():
                    break
                assert self._prelude is not None
                self._body = self.receiver.place(self, self._prelude, bytes(self._dims[: 8 * self._prelude.ndim]))
                self.held = self._body is None
                if self._body is None:
                    break
            body = self._body
            if self._got < len(body):
                count = self._receive(body)
                if count == 0:
                    break
                received += count
            if self._got == len(body):
                received += frame.PRELUDE_BYTES  # which bounds the number of empty frames as well
                self._complete()
        return received > 0

    def prepare_sleep(self) -> bool:
        """Before the loop sleeps: ask for what wakes it. False: there is something to do already."""
        return self._shared is None or self._shared.prepare_sleep(receiving=not self.held, sending=bool(self._out))

    def stalled_for(self, now: float) -> float:
        """Seconds without a byte of the frame that is coming in, counted from call to call; 0 if none is."""
        seen = (self._recv_frames, self._dims_complete, self._got)
        is_within = self._got > 0 or self._prelude is not None
        if seen != self._seen or not is_within or self.held:
            self._seen, self._seen_at = seen, now
        return now - self._seen_at

    def sum_into(self, target: Tensor, op: ReduceOp) -> Sum:
        """For `place`: the payload is to be combined with `target`."""
        if self._sum is None:
            self._sum = Sum(torch.empty(min(MAX_SUM_BYTES, self._quantum_bytes), dtype=torch.uint8))
        return self._sum.begin(target, op)

    def begin_swap(self, prelude: Prelude, tensors: Sequence[Tensor], op: ReduceOp) -> None:
        """Reduce `tensors` with the peer, the only other rank of the group, which must do the same."""
        assert self._shared is not None
        self.swap = Swap(self._shared, tensors, op, is_first=self.peer == 1)
        self.enqueue(prelude, [memoryview(frame.pack(prelude))], more_bytes=len(self.swap))

    def _receive(self, body: memoryview | Sum | Swap) -> int:
        """Receive more of the payload; returns the bytes that came."""
        if isinstance(body, memoryview):
            count = self.channel.try_recv_into(body[self._got : self._got + self._quantum_bytes])
        elif isinstance(body, Swap):
            self._move(body, body.run)
            count = body.recv_bytes - self._got
        elif self._shared is not None:
            view = self._shared.try_recv_view(min(len(body) - self._got, self._quantum_bytes))
            if view is None:
                return 0
            count = len(view)
            body.add(view)
            self._shared.give_back(count)
        else:
            count = self.channel.try_recv_into(body.buffer())
            body.took(count)
        self._got += count
        return count

    def _move(self, swap: Swap, action: Callable[[], object]) -> bool:
        """Let `swap` send blocks, and count them; True if there were any."""
        if self._out:
            return False  # the frame's head
        before = swap.sent_bytes
        action()
        count = swap.sent_bytes - before
        self.sent_bytes += count
        self.queued_bytes -= count
        if count and self.spans.is_on():
            self.spans.sent(time.monotonic(), self.sent_bytes)
        return count > 0

    def _complete(self) -> None:
        prelude, body = self._prelude, self._body
        assert prelude is not None
        assert body is not None
        if isinstance(body, memoryview):
            check_payload(prelude, body)
        self._reset()
        self._recv_frames += 1
        if self.spans.is_on():
            self.spans.received(prelude, self._recv_frames, self._began)
        self.receiver.arrived(self, prelude)

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
        if isinstance(self._body, Swap):
            self.swap = None
        self._prelude, self._dims_complete, self._body, self._got = None, False, None, 0
