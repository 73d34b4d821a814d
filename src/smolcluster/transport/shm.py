"""Shared memory between two ranks of one host: a lane's bytes go through memory that both have, not through the kernel.

The segment holds two rings, one for each direction. A ring is a stream of bytes as TCP is, with two counters that only
grow: `written`, set by the sender, and `read`, set by the receiver. So neither side ever waits for a lock.

The authenticated TCP connection stays. It carries one byte when the other side sleeps and must wake, and its end says
that the other side is gone. The segment has no name once both have it: it vanishes with the last of the two processes,
however that ends.

Negotiation, on the connection, right after the handshake in which both said that they can:

    dialler  -> OFFER    where the segment is, its size, and a MAC of both that also stands in it
    listener -> ANSWER   1: mapped; 0: could not, both go on with plain TCP
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import mmap
import os
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from smolcluster.errors import FrameError, SmolError
from smolcluster.transport.base import Channel, SocketState

logger = logging.getLogger(__name__)

# Bytes of one direction of a lane for collectives. 1 MiB is as fast with one waiting thread on each side; the rest is
# slack for a rank that computes meanwhile.
BULK_RING_BYTES = 4 << 20
# The same of a lane for messages, which are smaller and of which there are as many.
MESSAGE_RING_BYTES = 1 << 20
# What is copied before the other side is told, so that both work at the same time on what the cache still holds.
BLOCK_BYTES = 256 << 10
# Below, numpy's own cost shows; above, the copy must not keep the interpreter from the thread that computes.
MIN_NUMPY_BYTES = 16 << 10
# Every buffer begins at such a position, so that each number of a payload can be read where it lies.
ALIGNMENT = 8

_HEADER_BYTES = 4096
_MAC_BYTES = 16
# Words of a ring, in units of 8 bytes. Each has a cache line of its own (128 bytes on Apple's processors): a line that
# both write goes back and forth between them.
_WRITTEN, _READ, _READER_SLEEPS, _WRITER_SLEEPS = 0, 16, 32, 48
_FIRST_WORDS = (16, 80)  # of the dialler's ring, of the listener's

# magic, zeros, bytes of one ring, length of the path, MAC; then the path in UTF-8
_OFFER = struct.Struct("!2s2xII16s")
_ANSWER = struct.Struct("!2sB")
_MAGIC = b"SM"
_MAX_PATH_BYTES = 1024
_MAX_RING_BYTES = 1 << 30


class Stream(Protocol):
    """A connection during its handshake: blocking, with a deadline."""

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        ...

    def write(self, data: bytes) -> None:
        """All of `data`."""
        ...


class SharedMemoryChannel:
    """A non-blocking stream through shared memory. See transport.base.Channel.

    It keeps the borders of what is sent: each buffer given to `try_send` begins at a multiple of 8 bytes. The receiver
    asks for the same parts, or for pieces of them that are multiples of 8 bytes but for the last.
    """

    def __init__(self, tcp: Channel, segment: Segment, *, is_dialler: bool) -> None:
        """`tcp`: the connection, from now on for waking and for noticing the end."""
        self.sent_bytes = tcp.sent_bytes
        self.recv_bytes = tcp.recv_bytes
        self._tcp = tcp
        self._outgoing = _Outgoing(segment, 0 if is_dialler else 1)
        self._incoming = _Incoming(segment, 1 if is_dialler else 0)
        self._heard = memoryview(bytearray(64))
        self._has_moved = False  # something was received since the connection was last looked at
        self._end: SmolError | None = None  # the other side is gone

    def fileno(self) -> int:
        return self._tcp.fileno()

    def wants(self, *, sending: bool) -> tuple[bool, bool]:
        return True, False  # that there is room again comes as a byte to read

    def due(self) -> float | None:
        return 0.0 if self._incoming.is_open() and self._incoming.available() else None

    def prepare_sleep(self, *, receiving: bool, sending: bool) -> bool:
        """Ask the other side to wake this one when there is something to receive, or room again to send.

        Returns:
            False: there is already. Do not sleep.
        """
        if not self._incoming.is_open():
            return False
        has_come = receiving and self._incoming.sleep_unless_ready()
        has_room = sending and self._outgoing.sleep_unless_ready()
        return not (has_come or has_room)

    def try_send(self, buffers: Sequence[memoryview]) -> int:
        taken, wake = self._outgoing.put(buffers)
        if wake:
            self._wake()
        if taken == 0 and not self._listen():  # who is gone makes no room
            raise self._lost()
        self.sent_bytes += taken
        return taken

    def try_send_view(self, count: int, *, align: int) -> memoryview | None:
        """Room for the next `count` bytes; None: not yet. To be filled, and sent by `commit`.

        Args:
            count: at most `align`.
            align: bytes, a divisor of the ring's size. They begin at a multiple of it, so that its end cuts none.
        """
        return self._outgoing.block(count, align)

    def commit(self, count: int) -> None:
        """Send what stands in the last view, of `count` bytes."""
        self.sent_bytes += count
        if self._outgoing.advance(count):
            self._wake()

    def try_recv_into(self, buffer: memoryview) -> int:
        got = 0
        while got < len(buffer):
            view = self.try_recv_view(len(buffer) - got)
            if view is None:
                break
            _copy(buffer[got : got + len(view)], view)
            got += len(view)
            self.give_back(len(view))
        return got

    def try_recv_view(self, limit: int) -> memoryview | None:
        """The next bytes where they lie, at most `limit`; None: none have come.

        They stay as they are until `give_back`. Fewer than have come where the ring ends.

        Raises:
            ConnectionLost: the other side closed the connection or is gone, and all that it sent was received.
        """
        return self._look(self._incoming.view, limit)

    def try_recv_whole(self, count: int, *, align: int, looks: int) -> memoryview | None:
        """`count` bytes that were sent by `try_send_view` and `commit`; None: not all have come, in so many looks.

        As `try_recv_view`.
        """
        return self._look(self._incoming.block, count, align, looks)

    def give_back(self, count: int) -> None:
        """The first `count` bytes of the last view are done with; nobody reads them any more."""
        self.recv_bytes += count
        if self._incoming.advance(count):
            self._wake()

    def socket_state(self) -> SocketState:
        return self._tcp.socket_state()

    def abort(self, error: SmolError) -> None:
        self._tcp.abort(error)
        # Unmapped with the last view, not here: another thread may be reading.
        self._outgoing.close(error)
        self._incoming.close(error)

    def _look(self, find: Callable[..., memoryview | None], *wanted: int) -> memoryview | None:
        view = find(*wanted)
        if view is None and not self._has_moved and not self._listen():
            view = find(*wanted)  # what it sent before it ended
            if view is None:
                raise self._lost()
        self._has_moved = view is not None
        return view

    def _wake(self) -> None:
        with contextlib.suppress(SmolError):  # gone: receiving tells, after what it still sent
            self._tcp.try_send([_BELL])  # not taken: it has many such bytes to read, and wakes for them

    def _listen(self) -> bool:
        """Take the bytes that woke this side; False: the other side is gone."""
        try:
            while self._tcp.try_recv_into(self._heard) == len(self._heard):
                pass
        except SmolError as error:
            self._end = error
            return False
        return True

    def _lost(self) -> SmolError:
        assert self._end is not None
        return self._end


_BELL = memoryview(b"!")


class Segment:
    """Memory that two processes have mapped. Unmapped when nothing refers to it any more."""

    def __init__(self, descriptor: int, ring_bytes: int) -> None:
        """Map it; the descriptor stays the caller's.

        Raises:
            OSError, ValueError: it cannot be mapped.
        """
        memory = memoryview(mmap.mmap(descriptor, _HEADER_BYTES + 2 * ring_bytes))
        self.ring_bytes = ring_bytes
        self.mac = memory[:_MAC_BYTES]
        self._words = memory[:_HEADER_BYTES].cast("Q")
        self._data = memory[_HEADER_BYTES:]

    def ring(self, direction: int) -> tuple[memoryview, memoryview]:
        """(bytes, words) of the dialler's ring (0) or the listener's (1)."""
        first, begin = _FIRST_WORDS[direction], direction * self.ring_bytes
        return self._data[begin : begin + self.ring_bytes], self._words[first : first + 64]


class _Ring:
    """What both ends of a ring have: its memory, until they are closed. For one thread at a time, but for `close`."""

    def __init__(self, segment: Segment, direction: int) -> None:
        self._size = segment.ring_bytes
        # (bytes, words). Let go of by `close`: an error that somebody keeps has a traceback, which keeps this object.
        self._memory: tuple[memoryview, memoryview] | None = segment.ring(direction)
        self._error: SmolError | None = None
        self._fence = _Fence()

    def is_open(self) -> bool:
        return self._memory is not None

    def close(self, error: SmolError) -> None:
        """From any thread; whatever is called later raises `error`."""
        self._error = self._error or error
        self._memory = None

    def _shared(self) -> tuple[memoryview, memoryview]:
        memory = self._memory
        if memory is None:
            assert self._error is not None
            raise self._error
        return memory

    def _look(self, word: int) -> int:
        """What the other side has counted. Only then look at the bytes that it speaks of."""
        _, words = self._shared()
        count: int = words[word]
        self._fence.pass_()
        return count

    def _tell(self, word: int, count: int, sleeps: int) -> bool:
        """Publish a count, after whatever was done with the bytes; True: the other side sleeps."""
        _, words = self._shared()
        self._fence.pass_()
        words[word] = count
        self._fence.pass_()  # of two that set a word and then look at the other's, at least one sees the other's
        return bool(words[sleeps])

    def _set_sleeping(self, word: int, sleeps: bool) -> None:
        _, words = self._shared()
        words[word] = int(sleeps)
        self._fence.pass_()


class _Outgoing(_Ring):
    """The sender's end of a ring."""

    def __init__(self, segment: Segment, direction: int) -> None:
        super().__init__(segment, direction)
        self._written = 0
        self._published = 0
        self._read = 0  # by the receiver, when it was last looked at

    def put(self, buffers: Sequence[memoryview]) -> tuple[int, bool]:
        """Copy from the front of `buffers` what there is room for; returns (bytes taken, whether to wake the other)."""
        taken, wake = 0, False
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                view = self.view(min(len(buffer) - done, BLOCK_BYTES))
                if view is None:
                    return taken, self._publish() or wake
                count = len(view)
                _copy(view, buffer[done : done + count])
                done += count
                taken += count
                self._written += _aligned(count)
                if self._written - self._published >= BLOCK_BYTES:
                    wake = self._publish() or wake
        return taken, self._publish() or wake

    def view(self, limit: int) -> memoryview | None:
        """Room for the next bytes, at most `limit`, up to the end of the ring; None: there is none."""
        room = self._room(limit)
        if room == 0:
            return None
        data, _ = self._shared()
        at = self._written % self._size
        return data[at : at + min(limit, room, self._size - at)]

    def block(self, count: int, align: int) -> memoryview | None:
        """Room for `count` bytes from the next multiple of `align` on; None: there is not enough."""
        skipped = -self._written % align
        if self._room(skipped + count) < skipped + count:
            return None
        self._written += skipped
        return self.view(count)

    def advance(self, count: int) -> bool:
        """Publish `count` bytes; True: the receiver sleeps and must be woken."""
        self._written += _aligned(count)
        return self._publish()

    def sleep_unless_ready(self) -> bool:
        """Ask to be woken when there is room; True: there is already."""
        self._set_sleeping(_WRITER_SLEEPS, True)
        is_ready = self._room(self._size) >= self._size // 4
        if is_ready:
            self._set_sleeping(_WRITER_SLEEPS, False)
        return is_ready

    def _publish(self) -> bool:
        if self._written == self._published:
            return False
        self._published = self._written
        sleeps = self._tell(_WRITTEN, self._written, _READER_SLEEPS)
        if sleeps:
            self._set_sleeping(_READER_SLEEPS, False)
        return sleeps

    def _room(self, wanted: int) -> int:
        room = self._size - (self._written - self._read)
        if room < wanted:
            self._read = self._look(_READ)
            room = self._size - (self._written - self._read)
            if not 0 <= room <= self._size:
                raise FrameError(f"a ring of {self._size} bytes has room for {room}: the other side is out of step")
        return room


class _Incoming(_Ring):
    """The receiver's end of a ring."""

    def __init__(self, segment: Segment, direction: int) -> None:
        super().__init__(segment, direction)
        self._read = 0
        self._written = 0  # by the sender, when it was last looked at

    def available(self, wanted: int = 1) -> int:
        """Bytes to read."""
        count = self._written - self._read
        if count < wanted:
            self._written = self._look(_WRITTEN)
            count = self._written - self._read
            if not 0 <= count <= self._size:
                raise FrameError(f"a ring of {self._size} bytes holds {count}: the other side is out of step")
        return count

    def view(self, limit: int) -> memoryview | None:
        """The next bytes, at most `limit`, up to the end of the ring; None: there are none."""
        count = self.available(limit)
        if count == 0:
            return None
        data, _ = self._shared()
        at = self._read % self._size
        return data[at : at + min(limit, count, self._size - at)]

    def block(self, count: int, align: int, looks: int) -> memoryview | None:
        """`count` bytes from the next multiple of `align` on; None: they are not all here."""
        skipped = -self._read % align
        until, (_, words) = self._read + skipped + count, self._shared()
        for _ in range(looks):
            if words[_WRITTEN] >= until:
                break
        if self.available(skipped + count) < skipped + count:
            return None
        self._read += skipped
        return self.view(count)

    def advance(self, count: int) -> bool:
        """Give `count` bytes back; True: the sender sleeps and must be woken."""
        self._read += _aligned(count)
        sleeps = self._tell(_READ, self._read, _WRITER_SLEEPS)
        # Not for every block: a sender that has slept may fill a good part at once.
        wake = sleeps and self.available(self._size) <= self._size - self._size // 4
        if wake:
            self._set_sleeping(_WRITER_SLEEPS, False)
        return wake

    def sleep_unless_ready(self) -> bool:
        """Ask to be woken when something has come; True: it has already."""
        self._set_sleeping(_READER_SLEEPS, True)
        is_ready = bool(self.available())
        if is_ready:
            self._set_sleeping(_READER_SLEEPS, False)
        return is_ready


class _Fence:
    """Keeps the processor from moving memory accesses from one side of `pass_` to the other.

    Python has no fence of its own. Releasing a lock is a store that no earlier access may follow, and taking it is a
    load that no later access may precede; a take after a release is not moved before it, neither by x86 (the
    instructions are locked) nor by ARM (their acquire and release keep their order among each other).
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def pass_(self) -> None:
        self._lock.release()
        self._lock.acquire()


def offer(stream: Stream, ring_bytes: int, key: bytes) -> Segment | None:
    """The dialler's part of the negotiation; None: go on with plain TCP. `key`: the session's.

    Raises:
        ConnectionLost: the listener is gone.
        FrameError: it answers something else.
    """
    with contextlib.ExitStack() as until_answered:
        try:
            segment, path = _create(ring_bytes, until_answered)
        except (OSError, ValueError) as exc:
            logger.info("no shared memory bytes=%d reason=%s", 2 * ring_bytes, exc)
            segment, path = None, b""
        mac = offer_mac(key, ring_bytes, path)
        if segment is not None:
            segment.mac[:] = mac
        stream.write(_OFFER.pack(_MAGIC, ring_bytes, len(path), mac) + path)
        magic, has_mapped = _ANSWER.unpack(stream.read(_ANSWER.size))
    if magic != _MAGIC:
        raise FrameError("the answer to an offer of shared memory is something else")
    return segment if has_mapped else None


def answer(stream: Stream, key: bytes) -> Segment | None:
    """The listener's part of the negotiation; None: go on with plain TCP. `key`: the session's.

    Raises:
        ConnectionLost: the dialler is gone.
        FrameError: it offers nothing that could be shared memory, or somebody else has put another path there: what is
            written there would be any file of this user's.
    """
    magic, ring_bytes, path_bytes, mac = _OFFER.unpack(stream.read(_OFFER.size))
    if magic != _MAGIC or path_bytes > _MAX_PATH_BYTES or not 0 < ring_bytes <= _MAX_RING_BYTES or ring_bytes % 4096:
        raise FrameError(f"an offer of shared memory of {ring_bytes} bytes at a path of {path_bytes} bytes")
    path = stream.read(path_bytes)
    if not hmac.compare_digest(mac, offer_mac(key, ring_bytes, path)):
        raise FrameError("an offer of shared memory with a wrong MAC")
    segment = None
    if path:
        try:
            segment = _open(path, ring_bytes, mac)
        except (OSError, ValueError) as exc:
            logger.info("no shared memory path=%s reason=%s", os.fsdecode(path), exc)
    stream.write(_ANSWER.pack(_MAGIC, segment is not None))
    return segment


def offer_mac(key: bytes, ring_bytes: int, path: bytes) -> bytes:
    """What only the other end of the authenticated connection can say of a segment."""
    return hmac.new(key, b"memory" + struct.pack("!I", ring_bytes) + path, hashlib.sha256).digest()[:_MAC_BYTES]


def _create(ring_bytes: int, until_answered: contextlib.ExitStack) -> tuple[Segment, bytes]:
    """A new segment and where the other process finds it while `until_answered` is open."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("smolcluster")  # has no name in any folder: nothing is left after kill -9
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp(prefix="smolcluster-")
        until_answered.callback(os.unlink, path)
    until_answered.callback(os.close, descriptor)
    # Written, not only sized: where memory is short this fails, and a touch of the missing page would kill the process.
    zeros = bytes(1 << 20)
    left = _HEADER_BYTES + 2 * ring_bytes
    while left > 0:
        left -= os.write(descriptor, zeros[:left])
    segment = Segment(descriptor, ring_bytes)
    return segment, os.fsencode(path)


def _open(path: bytes, ring_bytes: int, mac: bytes) -> Segment:
    """Map what the dialler offers, if it is that."""
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0))  # whatever it is, it may not hold us up
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_size != _HEADER_BYTES + 2 * ring_bytes:
            raise ValueError(f"there is something else, of {state.st_size} bytes")
        segment = Segment(descriptor, ring_bytes)
    finally:
        os.close(descriptor)
    if not hmac.compare_digest(bytes(segment.mac), mac):
        raise ValueError("another segment is there")
    return segment


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _copy(target: memoryview, source: memoryview) -> None:
    if len(source) < MIN_NUMPY_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))  # lets other threads run meanwhile
