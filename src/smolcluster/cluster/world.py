"""The ranks of one run as this rank sees them: the view, the control links, who is lost.

A `World` is made by rendezvous.py. Its `Heartbeat` (heartbeat.py) notices silence; a closed control link is noticed
at once. Whoever notices a loss first tells the others before anything else, so that every rank names the same
culprit instead of the neighbour that gave up first.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

from smolcluster.errors import ConnectFailed, ConnectionLost, PeerLost, SmolError, error_of
from smolcluster.kinds import JsonObject
from smolcluster.transport.base import Channel, ControlLink, Hello, Listener, Network
from smolcluster.transport.tcp import CONTROL

logger = logging.getLogger(__name__)

# A peer's bulk connection may be seen closing before its control link has told why; wait this long for the reason.
GRACE = 0.5
# Messages that come before their handler are kept, the newest of each kind; kinds nobody ever handles are thus ignored.
MAX_EARLY = 1000
MAX_EARLY_KINDS = 16
# What an "abort" says at most: it must fit into a control message, whatever the error's text is.
MAX_TEXT = 10_000
# Seconds between looks whether the world has ended while a connection is awaited.
OPEN_SLICE = 0.25
# Beats per patience: two lost in a row (a busy processor, a slow link) are not yet a death.
BEATS_PER_PATIENCE = 5
# A heartbeat that comes later than planned by so many patiences: the process was suspended, or nearly so.
DOUBT = 0.5
# The fastest of so many answers counts: in a process that computes, one of ten is late by milliseconds.
RECENT_PINGS = 5
# Linux has a clock of its own that goes on while the machine sleeps; on macOS this one does, on Windows Python's own.
_CLOCK_WITH_SLEEP = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


@dataclass(frozen=True, slots=True)
class Member:
    """One rank: its name (host name or "rank2") and the address it listens on."""

    rank: int
    name: str
    address: str


@dataclass(frozen=True, slots=True)
class LinkState:
    """All connections to one rank together.

    Attributes:
        sent_bytes: since the start; frames, control messages and handshakes included.
        recv_bytes: as sent_bytes.
        queued_bytes: waiting now: in this process, and on Linux what the kernel holds until it is acknowledged.
        buffer_bytes: send buffer that the kernel granted the busiest bulk connection; None: there is none.
        wire_bytes: both directions with all headers and repetitions since the start; None: the system does not tell.
        round_trip: seconds there and back, of the fastest of the last pings; None: none was answered yet.
    """

    sent_bytes: int
    recv_bytes: int
    queued_bytes: int
    buffer_bytes: int | None
    wire_bytes: int | None
    round_trip: float | None


@dataclass(frozen=True, slots=True)
class View:
    """A membership: its generation number, the members in rank order, the leader's rank, and the run they form."""

    generation: int
    members: tuple[Member, ...]
    leader: int
    run_id: str


class Membership(Protocol):
    """Who takes part, and who is told when that changes."""

    def view(self) -> View:
        """The current membership."""
        ...

    def on_change(self, fn: Callable[[View], None]) -> None:
        """Call `fn` with each new view, on a cluster thread."""
        ...


class World:
    """The control plane of one rank. Thread-safe."""

    def __init__(
        self,
        rank: int,
        view: View,
        links: dict[int, ControlLink],
        listener: Listener,
        network: Network,
        patience: float,
    ) -> None:
        self.rank = rank
        self.world_size = len(view.members)
        self.patience = patience
        self.lost: list[int] = []
        self._view = view
        self._links = links
        self._listener = listener
        self._network = network
        self._lock = threading.RLock()
        self._error: SmolError | None = None
        self._left: set[int] = set()  # ranks that said good-bye: their closed links are no loss
        self._told = threading.Event()  # the others have been sent the error that ended this world
        self._leaving = False
        self._on_failure: list[Callable[[SmolError], None]] = []
        self._handlers: dict[str, Callable[[int, JsonObject], None]] = {}
        self._early: dict[str, list[tuple[int, JsonObject]]] = {}
        self._suspects: dict[int, threading.Timer] = {}
        self._on_left: dict[int, list[Callable[[PeerLost], None]]] = {}
        others = [peer for peer in range(self.world_size) if peer != rank]
        self._channels: dict[int, list[Channel]] = {peer: [] for peer in others}
        self._queues: dict[int, list[Callable[[], int]]] = {peer: [] for peer in others}
        self._counting = threading.Lock()
        self._counted = (0, 0)
        self._round_trips = {peer: deque[float](maxlen=RECENT_PINGS) for peer in others}
        self._began = time.monotonic()
        self._sleeps_until = math.inf  # this rank's own heartbeat; inf: it is awake
        self._certain_from = -math.inf  # before it, the others may have given this rank up without its knowing
        self._suspended = 0.0  # seconds by which the heartbeat has just overslept
        self._failed = threading.Event()
        for peer, link in links.items():
            self._attach(peer, link)

    def view(self) -> View:
        return self._view

    def on_change(self, fn: Callable[[View], None]) -> None:
        """Membership is fixed so far: `fn` is never called."""

    def name(self, rank: int) -> str:
        """How messages call a rank: "rank 2 (mini3)"."""
        name = self._view.members[rank].name
        return f"rank {rank}" if name == f"rank{rank}" else f"rank {rank} ({name})"

    def run_rank(self, rank: int) -> int:
        """The number that the whole run knows a rank by."""
        return rank

    def neighbours(self) -> int:
        """How many of the other ranks are on this rank's host, by their addresses."""
        hosts = [member.address.rpartition(":")[0] for member in self._view.members]
        return hosts.count(hosts[self.rank]) - 1

    def open_channel(self, peer: int, lane: str, timeout: float) -> Channel:
        """A new bulk connection to `peer` for `lane`; both sides call it. The higher rank dials.

        Raises:
            ConnectFailed: not connected within `timeout` seconds.
            PeerLost: a rank was lost meanwhile; or whatever else ended this world.
        """
        channel = self._open_channel(peer, lane, timeout)
        self._channels[peer].append(channel)
        return channel

    def _open_channel(self, peer: int, lane: str, timeout: float) -> Channel:
        if peer < self.rank:
            hello = Hello(self.rank, lane, self._view.run_id, peer)
            return self._network.dial_channel(self._view.members[peer].address, hello, timeout, self.error)
        deadline = time.monotonic() + timeout
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._listener.accept_channel(peer, lane, min(OPEN_SLICE, wait_until(deadline)))
            except ConnectFailed:
                if time.monotonic() >= deadline:
                    raise

    def watch_queue(self, peer: int, queued_bytes: Callable[[], int]) -> Callable[[], None]:
        """Count `queued_bytes()`, called from any thread, as waiting for `peer`, until what this returns is called."""
        self._queues[peer].append(queued_bytes)
        return lambda: self._queues[peer].remove(queued_bytes)

    def new_bytes(self) -> tuple[int, int]:
        """Bytes (sent, received) on all connections of this rank since the last call."""
        with self._counting:
            connections: list[Channel | ControlLink] = [*chain.from_iterable(self._channels.values())]
            connections += self._links.values()
            sent, received = sum(c.sent_bytes for c in connections), sum(c.recv_bytes for c in connections)
            before, self._counted = self._counted, (sent, received)
        return sent - before[0], received - before[1]

    def link_state(self, peer: int) -> LinkState:
        """What has passed between this rank and `peer`, and what waits. From any thread."""
        connections: list[Channel | ControlLink] = [*self._channels[peer]]
        if peer in self._links:
            connections.append(self._links[peer])
        states = [connection.socket_state() for connection in connections]
        wire = [state.wire_bytes for state in states]
        with self._lock:
            round_trip = min(self._round_trips[peer], default=None)
        return LinkState(
            sent_bytes=sum(connection.sent_bytes for connection in connections),
            recv_bytes=sum(connection.recv_bytes for connection in connections),
            queued_bytes=sum(state.unacknowledged_bytes for state in states)
            + sum(queued_bytes() for queued_bytes in self._queues[peer]),
            buffer_bytes=self._busiest_buffer(peer),
            wire_bytes=None if None in wire else sum(nbytes for nbytes in wire if nbytes is not None),
            round_trip=round_trip,
        )

    def _busiest_buffer(self, peer: int) -> int | None:
        """Of the connection that gradients take: there may be others, unused."""
        channels = self._channels[peer]
        if not channels:
            return None
        return max(channels, key=lambda channel: channel.sent_bytes + channel.recv_bytes).socket_state().buffer_bytes

    def ping(self) -> None:
        """Ask every rank for an answer, to measure the way there and back. Returns before they come."""
        for peer in self.silent_since():
            self.send(peer, "ping", {"sent": time.perf_counter()})  # the system clock of Windows ticks every 16 ms

    def link_all(self, timeout: float) -> None:
        """Open a control link to every rank that has none yet: the higher rank dials. Blocks.

        Raises:
            ConnectFailed: not all are linked within `timeout` seconds.
            PeerLost: a rank was lost meanwhile; or whatever else ended this world.
        """
        deadline = time.monotonic() + timeout
        for lower in sorted(set(range(self.rank)) - self._links.keys()):
            hello, address = Hello(self.rank, CONTROL, self._view.run_id, lower), self._view.members[lower].address
            self._add_link(lower, self._network.dial_control(address, hello, wait_until(deadline), self.error))
        while missing := set(range(self.rank + 1, self.world_size)) - self._links.keys():
            if self._error is not None:
                raise self._error
            try:
                who, link = self._listener.accept_control(min(OPEN_SLICE, wait_until(deadline)))
            except ConnectFailed:
                if time.monotonic() >= deadline:
                    raise
                continue
            if who.run_id == self._view.run_id and who.rank in missing:
                self._add_link(who.rank, link)
            else:
                refuse(link, f"this is rank {self.rank}, not rank 0: start every machine with the address of rank 0")

    def _add_link(self, peer: int, link: ControlLink) -> None:
        with self._lock:
            self._links[peer] = link
        self._attach(peer, link)

    def send(self, rank: int, kind: str, payload: JsonObject) -> None:
        """Send a control message to another rank. A lost receiver is noticed elsewhere, so nothing is raised."""
        link = self._links.get(rank)  # None: not linked yet; it will hear of what matters from rank 0
        try:
            if link is not None:
                link.send({"kind": kind, **payload})
        except ConnectionLost as error:
            logger.debug("control message not sent to=%d kind=%s reason=%s", rank, kind, error)

    def on(self, kind: str, handler: Callable[[int, JsonObject], None]) -> None:
        """Call `handler(rank, message)` for messages of this kind, on the link's thread; early ones first."""
        with self._lock:
            early = self._early.pop(kind, [])
            self._handlers[kind] = handler
            for rank, message in early:
                handler(rank, message)

    def on_failure(self, fn: Callable[[SmolError], None]) -> Callable[[], None]:
        """Call `fn(error)` once when a rank is lost or some rank aborts; at once if that has happened.

        Returns:
            What to call when `fn` is to be forgotten. `fn` may be running then.
        """
        with self._lock:
            if self._error is None:
                self._on_failure.append(fn)
                return partial(self._forget, fn)
        fn(self._error)
        return partial(self._forget, fn)

    def _forget(self, fn: Callable[[SmolError], None]) -> None:
        with self._lock:
            if fn in self._on_failure:
                self._on_failure.remove(fn)

    def error(self) -> SmolError | None:
        """What ended this world, if anything did."""
        return self._error

    @property
    def is_over(self) -> bool:
        """It has ended with an error, or this rank has left it."""
        return self._error is not None or self._leaving

    def silent_since(self) -> dict[int, float]:
        """For each rank that should be alive: `time.monotonic()` at which it was last heard.

        Not before this world began: until the last rank came, those that were waiting had nothing to say.
        """
        with self._lock:
            return {r: max(self._began, link.last_heard()) for r, link in self._links.items() if r not in self._left}

    def note_sleep(self, until: float) -> None:
        """This rank's heartbeat sleeps until then (`clock_with_sleep()`)."""
        self._sleeps_until = until

    def note_awake(self, now: float) -> None:
        """It has woken. Much too late means that this whole process, or the machine, was suspended."""
        with self._lock:
            overslept, self._sleeps_until = now - self._sleeps_until, math.inf
            if overslept > DOUBT * self.patience:
                self._suspended = overslept
                self._certain_from = now + self.patience / BEATS_PER_PATIENCE

    def confirm(self) -> None:
        """Call before writing what belongs to the run: returns if the others have not given this rank up.

        They may have while this process was suspended, and perhaps another run goes on in its place. So after waking
        it waits for a moment, until what they sent meanwhile is read. If all were suspended together, nobody is lost.

        Raises:
            PeerLost: this rank is the lost one.
        """
        while self._error is None and not self._leaving:
            with self._lock:
                now = clock_with_sleep()
                oversleeps = now - self._sleeps_until > DOUBT * self.patience  # this thread has woken before it
                left = self.patience / BEATS_PER_PATIENCE if oversleeps else self._certain_from - now
            if left <= 0:
                return
            self._failed.wait(left)
        if isinstance(self._error, PeerLost) and self._error.rank == self.rank:
            raise self._error

    def suspect(self, peer: int, reason: SmolError, on_left: Callable[[PeerLost], None]) -> None:
        """A bulk connection to `peer` broke: give the control plane `GRACE` seconds to say why, then blame it.

        If it turns out that the peer left as planned, nobody is lost: `on_left(error)` fails what still needs it.
        """
        with self._lock:
            if self._error is not None:
                return
            leaving = self._leaving
            if not leaving:
                self._on_left.setdefault(peer, []).append(on_left)
        if leaving:  # this rank itself has ended the run, and nobody judges any more
            on_left(PeerLost(f"{self.name(peer)} is gone, and this rank has left the run: {reason}", peer))
            return
        with self._lock:
            if peer in self._suspects:
                return
            timer = threading.Timer(GRACE, self._judge, (peer, reason))
            timer.daemon = True
            timer.name = f"suspect rank {peer}"
            self._suspects[peer] = timer
            timer.start()

    def report_lost(self, peer: int, reason: str, *, may_return: bool = False) -> None:
        """`peer` is lost: tell everyone and fail everything here. No rank that left as planned is lost."""
        with self._lock:
            if peer in self._left:
                return
        self.abort(PeerLost(f"{self.name(peer)} is lost: {reason}", peer, may_return=may_return))

    def _judge(self, peer: int, reason: SmolError) -> None:
        with self._lock:
            left = peer in self._left
            self._suspects.pop(peer, None)
            callbacks = self._on_left.pop(peer, [])
        if left:
            error = PeerLost(f"{self.name(peer)} has left the run, but this rank still needs it: {reason}", peer)
            for on_left in callbacks:
                on_left(error)
        else:
            self.report_lost(peer, str(reason))

    def abort(self, error: SmolError) -> None:
        """End the run on every rank with `error`: tell the others, then fail everything here. From any thread."""
        with self._lock:
            if self._error is not None or self._leaving:
                return
            error = self._error = self._or_own_suspension(error)
            if isinstance(error, PeerLost):
                self.lost.append(error.rank)
            callbacks, self._on_failure = self._on_failure, []
        logger.error("run aborted rank=%d error=%s", self.rank, error)
        message: JsonObject = {"error": type(error).__name__, "text": str(error)[:MAX_TEXT]}
        if isinstance(error, PeerLost):
            message["lost"] = error.rank
        for peer in list(self._links):
            if peer not in self.lost:
                self.send(peer, "abort", message)
        self._told.set()
        self._failed.set()
        for fn in callbacks:
            fn(error)
        for peer in self.lost:  # last, because it may not read any more; one that lives must not blame somebody else
            if peer in self._links:
                self.send(peer, "abort", message)

    def _or_own_suspension(self, error: SmolError) -> SmolError:
        """`error`; or, if this process has just woken from a long suspension, that it is the lost one itself."""
        now = clock_with_sleep()
        suspended = max(now - self._sleeps_until, self._suspended if now < self._certain_from else 0.0)
        if not isinstance(error, PeerLost) or suspended <= self.patience:
            return error
        return PeerLost(
            f"{self.name(self.rank)} was suspended for {suspended:.1f} s, longer than cluster.patience "
            f"({self.patience:g}), and the other ranks have given it up",
            self.rank,
            may_return=True,
        )

    def leave(self) -> None:
        """Say good-bye, so that closing is not taken for a loss. Call when nothing is under way any more."""
        with self._lock:
            self._leaving = True
        for peer in list(self._links):
            self.send(peer, "leave", {})

    def close(self) -> None:
        """Close all control links and the listener."""
        if self._error is not None:
            self._told.wait(self.patience)  # else the others would take this rank for the lost one
        with self._lock:
            self._leaving = True
            timers = list(self._suspects.values())
        for timer in timers:
            timer.cancel()
            if timer is not threading.current_thread():
                timer.join(timeout=2.0)
        self._listener.close()
        for link in list(self._links.values()):
            link.close()

    def _attach(self, peer: int, link: ControlLink) -> None:
        link.on_close(lambda error: self._closed(peer, error))
        link.on_message(lambda message: self._received(peer, message))

    def _received(self, peer: int, message: JsonObject) -> None:
        kind = message.get("kind")
        if kind == "beat":
            return
        if kind == "ping":
            held = time.perf_counter() - self._links[peer].arrived_at()
            self.send(peer, "pong", {"sent": message.get("sent"), "held": held})
            return
        if kind == "pong":
            self._pong_received(peer, message)
            return
        if kind == "leave":
            with self._lock:
                self._left.add(peer)
        elif kind == "abort":
            self._abort_received(peer, message)
        elif isinstance(kind, str):
            with self._lock:
                handler = self._handlers.get(kind)
                if handler is None:
                    waiting = self._early.setdefault(kind, []) if len(self._early) < MAX_EARLY_KINDS else []
                    del waiting[:-MAX_EARLY]
                    waiting.append((peer, message))
                    return
            handler(peer, message)

    def _pong_received(self, peer: int, message: JsonObject) -> None:
        """The way there and back, without what either process took to read: both compute at the same time."""
        sent, held, arrived = message.get("sent"), message.get("held"), self._links[peer].arrived_at()
        if not isinstance(sent, int | float) or not isinstance(held, int | float):
            return
        # Otherwise it answers what nobody asked, or a clock was set meanwhile.
        if 0 <= sent < arrived and 0 <= held < arrived - sent:
            with self._lock:
                self._round_trips[peer].append(arrived - sent - held)

    def _abort_received(self, peer: int, message: JsonObject) -> None:
        text = str(message.get("text", ""))
        lost = message.get("lost")
        error: SmolError | None
        if isinstance(lost, int) and 0 <= lost < self.world_size:
            error = PeerLost(text, lost, may_return=lost == self.rank)
        else:
            error = error_of(str(message.get("error")), text)
        self.abort(error or PeerLost(f"{self.name(peer)} gave up: {text}", peer))

    def _closed(self, peer: int, error: SmolError) -> None:
        with self._lock:
            gone = peer in self._left or self._leaving
        if not gone:
            self.report_lost(peer, f"it {_ending(error)}")


def _ending(error: SmolError) -> str:
    return "died or closed its connections" if isinstance(error, ConnectionLost) else str(error)


def refuse(link: ControlLink, reason: str) -> None:
    """Tell a rank why it is not let in, and close."""
    reason = reason[:MAX_TEXT]
    logger.warning("rank refused reason=%s", reason)
    with contextlib.suppress(SmolError):
        link.send({"kind": "refused", "reason": reason})
    link.close()


def clock_with_sleep() -> float:
    """`time.monotonic()`, with the time that the machine slept: a laptop that was closed must know it."""
    return time.monotonic() if _CLOCK_WITH_SLEEP is None else time.clock_gettime(_CLOCK_WITH_SLEEP)


def wait_until(deadline: float) -> float:
    """Seconds from now to `deadline` (`time.monotonic()`), at least a little."""
    return max(0.05, deadline - time.monotonic())
