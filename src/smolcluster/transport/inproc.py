"""Channels within one process, for tests and for learning: the same engine, no network, faults on demand.

A channel is one end of a socket pair, so that the communicator's loop polls it like any other. `InprocNetwork` holds
the listeners of one group; `hook` may wrap each channel, for instance in `FaultyChannel`.
"""

from __future__ import annotations

import logging
import queue
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smolcluster.errors import ConnectFailed, ConnectionLost, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.transport.base import Channel, ControlLink, Ended, Hello, SocketState
from smolcluster.transport.tcp import CONTROL, TcpChannel

logger = logging.getLogger(__name__)

Hook = Callable[[int, Hello, Channel], Channel]


class InprocNetwork:
    """The listeners of one process, by address `inproc://name`."""

    def __init__(self, hook: Hook | None = None) -> None:
        """`hook(rank, hello, channel)` wraps each end: rank owns the end, hello is the dialler's."""
        self._hook = hook
        self._lock = threading.Condition()
        self._listeners: dict[str, InprocListener] = {}

    def listen(self, name: str, rank: int) -> InprocListener:
        """Listen as `inproc://name` on behalf of `rank`."""
        listener = InprocListener(f"inproc://{name}", rank)
        with self._lock:
            self._listeners[listener.address] = listener
            self._lock.notify_all()
        return listener

    def dial_channel(self, address: str, hello: Hello, timeout: float, ended: Ended | None = None) -> Channel:
        listener = self._find(address, timeout)
        ours, theirs = socket.socketpair()
        far = self._wrap(listener.rank, hello, TcpChannel(theirs, f"rank {hello.rank}"))
        near = self._wrap(hello.rank, hello, TcpChannel(ours, address))
        listener.offer_channel(hello, far)
        return near

    def dial_control(self, address: str, hello: Hello, timeout: float, ended: Ended | None = None) -> ControlLink:
        near, far = InprocControlLink.pair()
        self._find(address, timeout).offer_control(hello, far)
        return near

    def _wrap(self, rank: int, hello: Hello, channel: Channel) -> Channel:
        return self._hook(rank, hello, channel) if self._hook is not None else channel

    def _find(self, address: str, timeout: float) -> InprocListener:
        with self._lock:
            if not self._lock.wait_for(lambda: address in self._listeners, timeout):
                raise ConnectFailed(f"nobody listens at {address} after {timeout:g} s")
            return self._listeners[address]


class InprocListener:
    """See transport.base.Listener."""

    def __init__(self, address: str, rank: int) -> None:
        self.address = address
        self.rank = rank
        self._ready = threading.Condition()
        self._channels: dict[tuple[int, str], Channel] = {}
        self._links: list[tuple[Hello, ControlLink]] = []
        self._closed = False

    def allow_run(self, run_id: str) -> None:
        """One network is one run."""

    def offer_channel(self, hello: Hello, channel: Channel) -> None:
        """Called by the dialling side."""
        with self._ready:
            if self._closed:
                channel.abort(ConnectionLost("the listener is closed"))
                return
            self._channels[(hello.rank, hello.lane)] = channel
            self._ready.notify_all()

    def offer_control(self, hello: Hello, link: ControlLink) -> None:
        """Called by the dialling side."""
        assert hello.lane == CONTROL
        with self._ready:
            if self._closed:
                link.close()
                return
            self._links.append((hello, link))
            self._ready.notify_all()

    def accept_channel(self, rank: int, lane: str, timeout: float) -> Channel:
        with self._ready:
            self._ready.wait_for(lambda: (rank, lane) in self._channels or self._closed, timeout)
            if (rank, lane) not in self._channels:
                raise ConnectFailed(f"rank {rank} did not open its {lane} connection within {timeout:g} s")
            return self._channels.pop((rank, lane))

    def accept_control(self, timeout: float) -> tuple[Hello, ControlLink]:
        with self._ready:
            self._ready.wait_for(lambda: bool(self._links) or self._closed, timeout)
            if not self._links:
                raise ConnectFailed(f"nobody opened a control connection to {self.address} within {timeout:g} s")
            return self._links.pop(0)

    def close(self) -> None:
        with self._ready:
            self._closed = True
            waiting, self._channels = list(self._channels.values()), {}
            links, self._links = self._links, []
            self._ready.notify_all()
        for channel in waiting:
            channel.abort(ConnectionLost("the listener is closed"))
        for _, link in links:
            link.close()


class InprocControlLink:
    """A control link over two queues; None is the end of the stream. No bytes move, so none are counted."""

    sent_bytes = 0
    recv_bytes = 0

    def __init__(self, inbox: queue.SimpleQueue[JsonObject | None]) -> None:
        self._inbox = inbox
        self._peer: InprocControlLink | None = None
        self._heard = time.monotonic()
        self._arrived = time.perf_counter()
        self._closed = False
        self._on_close: Callable[[SmolError], None] | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def pair(cls) -> tuple[InprocControlLink, InprocControlLink]:
        """Two connected ends."""
        left, right = cls(queue.SimpleQueue()), cls(queue.SimpleQueue())
        left._peer, right._peer = right, left
        return left, right

    def send(self, message: JsonObject) -> None:
        assert self._peer is not None
        if self._closed or self._peer._closed:
            raise ConnectionLost("the control link is closed")
        self._peer._inbox.put(message)

    def receive(self, timeout: float) -> JsonObject | None:
        try:
            message = self._inbox.get(timeout=timeout) if timeout > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None
        if message is None:
            raise ConnectionLost("the other side closed the control link")
        self._heard = time.monotonic()
        return message

    def on_message(self, handler: Callable[[JsonObject], None]) -> None:
        self._thread = threading.Thread(target=self._read, args=(handler,), name="inproc control", daemon=True)
        self._thread.start()

    def on_close(self, handler: Callable[[SmolError], None]) -> None:
        self._on_close = handler

    def last_heard(self) -> float:
        return self._heard

    def arrived_at(self) -> float:
        return self._arrived

    def socket_state(self) -> SocketState:
        return SocketState(0, None, None)

    def close(self) -> None:
        self._closed = True
        self._inbox.put(None)
        if self._peer is not None:
            self._peer._inbox.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2.0)

    def _read(self, handler: Callable[[JsonObject], None]) -> None:
        ending: SmolError = ConnectionLost("the other side closed the control link")
        try:
            while (message := self._inbox.get()) is not None:
                self._heard, self._arrived = time.monotonic(), time.perf_counter()
                handler(message)
        except Exception as exc:  # top of the thread: as TcpControlLink does
            logger.exception("control message not handled")
            ending = SmolError(f"sent a control message that could not be handled here: {exc!r}")
        if not self._closed and self._on_close is not None:
            self._on_close(ending)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """What goes wrong on one end of a channel. Everything is drawn from `seed`, so a run can be repeated.

    Attributes:
        seed: of the random draws.
        max_latency: each received chunk is held back for up to this many seconds.
        max_chunk: at most this many bytes move in one call, so that every boundary of a frame is met.
        cut_after_bytes: the connection breaks after so many received bytes.
        stall_after_bytes: after so many received bytes nothing arrives any more.
    """

    seed: int = 0
    max_latency: float = 0.0
    max_chunk: int | None = None
    cut_after_bytes: int | None = None
    stall_after_bytes: int | None = None


class FaultyChannel:
    """Wraps a channel and makes it slow, fragmented, cut off or silent, as `plan` says."""

    def __init__(self, inner: Channel, plan: FaultPlan) -> None:
        self._inner = inner
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._held: deque[tuple[float, bytes]] = deque()
        self._received = 0
        self._scratch = bytearray(1 << 16)
        self._end: SmolError | None = None

    @property
    def sent_bytes(self) -> int:
        return self._inner.sent_bytes

    @property
    def recv_bytes(self) -> int:
        return self._inner.recv_bytes

    def socket_state(self) -> SocketState:
        return self._inner.socket_state()

    def fileno(self) -> int:
        return self._inner.fileno()

    def wants(self, *, sending: bool) -> tuple[bool, bool]:
        reads, writes = self._inner.wants(sending=sending)
        return reads and not self._is_stalled(), writes

    def due(self) -> float | None:
        return self._held[0][0] if self._held else None

    def try_send(self, buffers: Sequence[memoryview]) -> int:
        if self._plan.max_chunk is not None:
            buffers = [buffers[0][: self._random.randint(1, self._plan.max_chunk)]]
        return self._inner.try_send(buffers)

    def try_recv_into(self, buffer: memoryview) -> int:
        self._fill()
        if not self._held:
            if self._end is not None:
                raise self._end
            return 0
        due, data = self._held[0]
        if due > time.monotonic():
            return 0
        count = min(len(buffer), len(data), self._plan.max_chunk or len(data))
        buffer[:count] = data[:count]
        if count == len(data):
            self._held.popleft()
        else:
            self._held[0] = (due, data[count:])
        return count

    def abort(self, error: SmolError) -> None:
        self._inner.abort(error)

    def _is_stalled(self) -> bool:
        return self._plan.stall_after_bytes is not None and self._received >= self._plan.stall_after_bytes

    def _fill(self) -> None:
        plan = self._plan
        if self._end is not None or self._is_stalled():
            return
        room = len(self._scratch)
        for limit in (plan.cut_after_bytes, plan.stall_after_bytes):
            room = room if limit is None else min(room, limit - self._received)
        try:
            count = self._inner.try_recv_into(memoryview(self._scratch)[:room])
        except SmolError as error:
            self._end = error
            return
        if count:
            self._received += count
            floor = self._held[-1][0] if self._held else 0.0  # a stream does not overtake itself
            due = max(floor, time.monotonic() + self._random.uniform(0.0, plan.max_latency))
            self._held.append((due, bytes(self._scratch[:count])))
        if plan.cut_after_bytes is not None and self._received >= plan.cut_after_bytes:
            self._end = ConnectionLost("the connection was cut by the fault plan")
            self._inner.abort(self._end)
