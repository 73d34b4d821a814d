"""Point-to-point messages: a lane of their own, matched by (source, tag), so that no collective stands in their way."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from torch import Tensor

from smolcluster.collectives.lane import Lane
from smolcluster.collectives.progress import ProgressLoop
from smolcluster.collectives.work import PendingWork
from smolcluster.errors import CollectiveMismatch, SmolError
from smolcluster.transport import frame
from smolcluster.transport.frame import KIND_MESSAGE, MAX_UNSIZED_BYTES, Prelude
from smolcluster.transport.tensors import empty_for, raw_bytes

# Of one peer: more that nobody receives is no pipeline but a mistake, or somebody who fills the memory.
MAX_UNCLAIMED_BYTES = 4 << 30
MESSAGE_BYTES = 2048  # what this process needs for an empty one


@dataclass(slots=True)
class _Posted:
    """A receive that waits. `out` is host memory, None: to be allocated."""

    work: PendingWork
    out: Tensor | None


class MessageBox:
    """Receiver of the point-to-point lanes. Everything here runs on the driving thread."""

    def __init__(self, loop: ProgressLoop, generation: int) -> None:
        self._loop = loop
        self._generation = generation
        self._posted: dict[tuple[int, int], deque[_Posted]] = {}
        self._unclaimed: dict[tuple[int, int], deque[Tensor]] = {}
        self._unclaimed_bytes: Counter[int] = Counter()
        # What is arriving on each peer's lane: the memory, and the receive it belongs to, if that was posted in time.
        self._arriving: dict[int, tuple[Tensor, _Posted | None]] = {}

    def post(self, src: int, tag: int, work: PendingWork, out: Tensor | None) -> None:
        """Receive the oldest message of (src, tag) that no other receive has claimed."""
        posted = _Posted(work, out)
        unclaimed = self._unclaimed.get((src, tag))
        if unclaimed:
            message = unclaimed.popleft()
            self._unclaimed_bytes[src] -= message.nbytes + MESSAGE_BYTES
            if not unclaimed:  # tags are often used once: do not keep an empty queue of each
                del self._unclaimed[(src, tag)]
            self._deliver(posted, message, src, tag)
            return
        if (left := self._loop.departed(src)) is not None:
            self._loop.finish(work, left)
            return
        self._posted.setdefault((src, tag), deque()).append(posted)

    def place(self, lane: Lane, prelude: Prelude, dims: bytes) -> memoryview | None:
        """See lane.Receiver. Messages are always taken in: one that nobody wants yet must not block those behind it."""
        if prelude.kind != KIND_MESSAGE or prelude.generation != self._generation:
            raise CollectiveMismatch(
                f"rank {lane.peer} sent {prelude.describe()} of generation {prelude.generation} where a message of "
                f"generation {self._generation} belongs"
            )
        shape = frame.unpack_dims(dims, prelude, MAX_UNSIZED_BYTES)
        queue = self._posted.get((lane.peer, prelude.tag))
        posted = queue.popleft() if queue else None
        memory = posted.out if posted is not None else None
        if memory is None or raw_bytes(memory).nbytes != prelude.nbytes or not _same_kind(memory, prelude):
            memory = empty_for(prelude, shape)
        self._arriving[lane.peer] = (memory, posted)
        return raw_bytes(memory)

    def arrived(self, lane: Lane, prelude: Prelude) -> None:
        """See lane.Receiver."""
        memory, posted = self._arriving.pop(lane.peer)
        if posted is None:
            queue = self._posted.get((lane.peer, prelude.tag))  # posted while the message was coming in
            posted = queue.popleft() if queue else None
        if posted is None:
            self._unclaimed.setdefault((lane.peer, prelude.tag), deque()).append(memory)
            self._unclaimed_bytes[lane.peer] += memory.nbytes + MESSAGE_BYTES
            if self._unclaimed_bytes[lane.peer] > MAX_UNCLAIMED_BYTES:
                raise CollectiveMismatch(
                    f"rank {lane.peer} has sent more than {MAX_UNCLAIMED_BYTES} bytes of messages that this rank does "
                    "not receive"
                )
        else:
            self._deliver(posted, memory, lane.peer, prelude.tag)

    def expects(self, peer: int) -> bool:
        """See lane.Receiver."""
        arriving = self._arriving.get(peer)
        if arriving is not None and arriving[1] is not None:
            return True
        return any(src == peer and queue for (src, _), queue in self._posted.items())

    def gone(self, peer: int, error: SmolError) -> None:
        """See lane.Receiver: receives that wait for `peer` fail."""
        _, posted = self._arriving.pop(peer, (None, None))
        if posted is not None:
            self._loop.finish(posted.work, error)
        for (src, _), queue in self._posted.items():
            while src == peer and queue:
                self._loop.finish(queue.popleft().work, error)

    def _deliver(self, posted: _Posted, message: Tensor, src: int, tag: int) -> None:
        out = posted.out
        if out is None:
            self._loop.finish(posted.work, results=[message])
        elif out is message:
            self._loop.finish(posted.work)  # its result is the caller's own tensor already
        elif out.numel() == message.numel() and out.dtype == message.dtype:
            out.view(-1).copy_(message.view(-1))
            self._loop.finish(posted.work)
        else:
            error = CollectiveMismatch(
                f"rank {src} sent {message.dtype} of shape {tuple(message.shape)} with tag {tag}, the receiver has "
                f"{out.dtype} of shape {tuple(out.shape)}"
            )
            self._loop.finish(posted.work, error)


def _same_kind(memory: Tensor, prelude: Prelude) -> bool:
    return empty_for(prelude, (0,)).dtype == memory.dtype
