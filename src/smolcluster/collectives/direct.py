"""Messages to one neighbour and from one: whoever calls moves the bytes, and no other thread has a part in it.

For processes that do nothing but take, compute and pass on. A communicator moves bytes in the background as well, which
costs each message some hundred microseconds of Python where the processor's caches have been used for something else.
Frames are those of point-to-point messages (docs/protocol.md), on lanes of their own.
"""

from __future__ import annotations

import math
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from smolcluster.cluster.world import GRACE, World
from smolcluster.errors import CollectiveMismatch, CollectiveTimeout, ConnectionLost, PeerLost, SmolError
from smolcluster.transport import frame
from smolcluster.transport.base import Channel
from smolcluster.transport.frame import KIND_MESSAGE
from smolcluster.transport.tensors import dtype_code

_UINT8 = dtype_code(torch.uint8)
_DIM_BYTES = 8
_HEAD_BYTES = frame.PRELUDE_BYTES + _DIM_BYTES
MAX_BYTES = frame.MAX_UNSIZED_BYTES
# A look at whether the neighbour is still there, where the system does not wake who waits.
_LOOK_SECONDS = 0.25


class DirectRing:
    """This rank's part of a ring: it sends to the next rank, and receives from the one before. One thread uses it."""

    def __init__(self, world: World, *, timeout: float) -> None:
        """Open the connections; every rank of the world does so. Blocks.

        Args:
            world: the ranks, in the order of the ring; two or more. It is this one's from now on.
            timeout: seconds to wait for the neighbours.

        Raises:
            ConnectFailed: a neighbour did not connect in time.
            PeerLost: a rank is lost.
        """
        self._world = world
        rank, size = world.rank, world.world_size
        self.rank, self.world_size = rank, size
        self._next, self._before = (rank + 1) % size, (rank - 1) % size
        self._generation = world.view().generation
        self._sent = self._received = 0
        self._expected, self._rest = 0, b""  # bytes of the newest message; those that have been read behind it
        self._polls: dict[tuple[Channel, bool, bool], Any] = {}
        lanes = sorted([(rank, self._next), (self._before, rank)])  # the same order on both sides of a pair
        channels: dict[tuple[int, int], Channel] = {}
        try:
            for lane in lanes:
                peer = lane[1] if lane[0] == rank else lane[0]
                channels[lane] = world.open_channel(peer, f"direct:{lane[0]}", timeout)
        except SmolError as error:
            for channel in channels.values():
                channel.abort(error)
            raise
        self._out, self._in = channels[rank, self._next], channels[self._before, rank]
        self._closing = threading.Lock()
        self._forget = world.on_failure(self._fail)

    def send(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Give a message to the system, for the next rank; blocks while it takes no more.

        Args:
            parts: its bytes, which belong behind each other.

        Raises:
            PeerLost: a rank is lost; or what else ended the world.
        """
        head = frame.pack_bytes(_UINT8, self._generation, self._sent & 0xFFFFFFFF, sum(map(len, parts)))
        self._sent += 1
        left: list[memoryview] = [memoryview(head), *(memoryview(part) for part in parts)]
        try:
            while left:
                taken = self._out.try_send(left)
                if not taken:
                    self._wait(self._out, is_sending=True)
                left = _after(left, taken)
        except (SmolError, ValueError, OSError) as error:
            raise self._reason(error, self._next) from error

    def receive(self, meanwhile: Callable[[], object] = lambda: None, timeout: float = math.inf) -> memoryview:
        """The next message of the rank before; blocks until it is there. Its memory is the caller's.

        Args:
            meanwhile: called once if there is nothing yet. Who reads an old message here has the processor's caches
                full of what it takes to read the next one.
            timeout: seconds to wait for its first byte; then the ring is over.

        Raises:
            PeerLost: a rank is lost, or sent a part of a message and then nothing for the world's patience; or what
                else ended the world.
            CollectiveMismatch: it is of another generation, or not the next one.
            CollectiveTimeout: nothing came in time.
        """
        # Most messages are as long as the one before: then one read takes all of it, and nothing of the next one.
        buffer = bytearray(max(_HEAD_BYTES + self._expected, len(self._rest)))
        got = len(self._rest)
        buffer[:got] = self._rest
        self._rest = b""
        try:
            if not got and not (got := self._in.try_recv_into(memoryview(buffer))):
                meanwhile()
            got = self._fill(buffer, got, _HEAD_BYTES, timeout)
            count = int.from_bytes(buffer[_HEAD_BYTES - _DIM_BYTES : _HEAD_BYTES], "big")
            tag = self._received & 0xFFFFFFFF
            if buffer[:_HEAD_BYTES] != frame.pack_bytes(_UINT8, self._generation, tag, count) or count > MAX_BYTES:
                raise self._refusal(buffer)
            whole = _HEAD_BYTES + count
            if got > whole:
                self._rest, got = bytes(buffer[whole:got]), whole
            if whole != len(buffer):
                self._expected = count
                buffer = buffer[:got] + bytes(whole - got)
            self._fill(buffer, got, whole)
        except (SmolError, ValueError, OSError) as error:
            raise self._reason(error, self._before) from error
        self._received += 1
        return memoryview(buffer)[_HEAD_BYTES:]

    def failure(self) -> SmolError | None:
        """What ended the world, if anything did."""
        return self._world.error()

    def abort(self, error: SmolError) -> None:
        """End it on every rank, from any thread."""
        self._world.abort(error)

    def close(self) -> None:
        """Leave; what has been sent still arrives."""
        self._forget()
        self._world.leave()
        self._world.close()
        self._fail(PeerLost("this rank has left", self.rank))

    def _fill(self, buffer: bytearray, got: int, least: int, timeout: float = math.inf) -> int:
        """Read until `least` bytes are there, or more; how many. The first one may take as long as it will.

        Who computes says nothing; who has begun to send only goes on with that.
        """
        silence, patience, waited = 0.0, self._world.patience, 0.0
        with memoryview(buffer) as view:
            while got < least:
                if count := self._in.try_recv_into(view[got:]):
                    got, silence = got + count, 0.0
                    continue
                if silence > patience:
                    reason = f"it sent half a frame, then nothing for {patience:g} s"
                    self._world.report_lost(self._before, reason, may_return=True)
                    raise ConnectionLost(reason)
                if waited > timeout:  # whose fault it is, nobody knows here
                    late = CollectiveTimeout(f"nothing came for {timeout:g} s: somebody in the ring does not go on")
                    self._world.abort(late)
                    raise late
                began = time.monotonic()
                self._wait(self._in, is_sending=False)
                passed = min(time.monotonic() - began, _LOOK_SECONDS)  # if more, this process was suspended
                silence, waited = (silence + passed, waited) if got else (0.0, waited + passed)
        return got

    def _refusal(self, buffer: bytearray) -> SmolError:
        """What is wrong with the beginning of a message."""
        prelude = frame.unpack(buffer[: frame.PRELUDE_BYTES])
        if (prelude.kind, prelude.dtype, prelude.ndim) == (KIND_MESSAGE, _UINT8, 1):
            frame.unpack_dims(buffer[frame.PRELUDE_BYTES : _HEAD_BYTES], prelude, MAX_BYTES)
        return CollectiveMismatch(
            f"rank {self._before} sent {prelude.describe()} of generation {prelude.generation} where message "
            f"{self._received} of generation {self._generation} belongs"
        )

    def _wait(self, channel: Channel, *, is_sending: bool) -> None:
        due = channel.due()
        if due is not None and due <= time.monotonic():
            return
        reading, writing = channel.wants(sending=is_sending)
        reading = reading and not (is_sending and writing)
        if not hasattr(select, "poll"):  # Windows
            number = channel.fileno()
            select.select([number] if reading else [], [number] if writing else [], [], _LOOK_SECONDS)
            return
        asked = channel, reading, writing
        if (poll := self._polls.get(asked)) is None:
            poll = self._polls[asked] = select.poll()
            poll.register(channel.fileno(), reading * select.POLLIN | writing * select.POLLOUT)
        poll.poll(1000 * _LOOK_SECONDS)

    def _fail(self, error: SmolError) -> None:
        """On any thread: whoever waits is to wake."""
        with self._closing:
            for channel in (self._out, self._in):
                channel.abort(error)

    def _reason(self, error: BaseException, peer: int) -> SmolError:
        """Why a neighbour's connection has ended: the control plane may know it in a moment."""
        if isinstance(error, CollectiveMismatch):
            self._world.abort(error)
            return error
        deadline = time.monotonic() + GRACE
        while self._world.error() is None and time.monotonic() < deadline:
            time.sleep(GRACE / 50)
        if self._world.error() is None:
            self._world.report_lost(peer, str(error))
        return self._world.error() or PeerLost(f"{self._world.name(peer)} is gone: {error}", peer)


def _after(buffers: Sequence[memoryview], taken: int) -> list[memoryview]:
    """What is left of some buffers when so many bytes of them have gone."""
    left = []
    for buffer in buffers:
        gone = min(taken, len(buffer))
        taken -= gone
        if gone < len(buffer):
            left.append(buffer[gone:])
    return left
