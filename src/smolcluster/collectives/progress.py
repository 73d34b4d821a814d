"""The communicator's one non-blocking loop: it sends, receives and runs the collectives' generators.

Whoever waits runs the loop itself; while nobody waits, a background thread does, so that bytes move while the training
thread computes. Exactly one thread drives at any time. Small calls are often waited for at once, and waking a thread
costs as much as they do: whoever submits one runs the loop once, and the background thread comes ATTEND_SECONDS later.

A collective is a `Call`: pieces, each a generator of ring.py or mesh.py. Calls run one after the other, in the order in
which they were issued. Frames that come before their call begins stay in the kernel's buffer.
"""

from __future__ import annotations

import contextlib
import logging
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from torch import Tensor

from smolcluster.collectives.lane import Lane, Sum
from smolcluster.collectives.shm import Swap
from smolcluster.collectives.wire import Arrival, Steps
from smolcluster.collectives.work import PendingWork
from smolcluster.errors import CollectiveMismatch, ConnectionLost, FrameError, SmolError
from smolcluster.transport import frame
from smolcluster.transport.frame import Prelude
from smolcluster.transport.tensors import empty_for, raw_bytes

logger = logging.getLogger(__name__)

# How long a waiter looks without sleeping: an answer on loopback or a fast LAN comes within it.
SPIN_SECONDS = 200e-6
# While bytes move, sockets that no call waits for are looked at every so many turns.
POLL_TURNS = 16
# How long the background thread leaves a small call to its caller.
ATTEND_SECONDS = 500e-6
# The longest sleep of the loop. Everything that matters wakes it; this bounds the cost of what was overlooked.
MAX_SLEEP = 0.25


class Call:
    """One collective under way. `begin` makes the generator of a piece; pieces run `window` at a time."""

    def __init__(
        self,
        work: PendingWork,
        prelude: Prelude,
        pieces: int,
        begin: Callable[[Call, int], Steps],
        *,
        window: int,
        on_success: Callable[[], list[Tensor] | None],
    ) -> None:
        self.work = work
        self.prelude = prelude
        self.pieces = pieces
        self.begin = begin
        self.window = window
        self.on_success = on_success
        self.begun = 0
        self.running: dict[int, Steps] = {}
        self.waiting: dict[int, int] = {}  # piece -> arrivals that it still waits for
        self.posted: dict[tuple[int, int], Arrival] = {}  # (source, piece) -> where the next payload belongs

    def may_need(self, piece: int) -> bool:
        """Whether a payload for this piece may still be needed, now or later."""
        return piece in self.running or self.begun <= piece < self.pieces


class ProgressLoop:
    """Drives the lanes of one communicator."""

    def __init__(
        self,
        name: str,
        on_broken: Callable[[int, SmolError], None],
        *,
        patience: float = math.inf,
        spin_seconds: float = SPIN_SECONDS,
    ) -> None:
        """Start without lanes.

        Args:
            name: of its thread.
            on_broken: called with (peer, error) when a lane broke; the owner finds out why and calls `fail`.
            patience: after so many seconds without a byte in the middle of a frame a lane is broken.
            spin_seconds: how long a waiter looks without sleeping.
        """
        self._patience = patience
        self._on_broken = on_broken
        self._spin_seconds = spin_seconds
        self._comes_soon = True  # the bytes that were waited for last: then it pays to look without sleeping
        self._lanes: list[Lane] = []
        self._collective_lanes: list[Lane] = []
        self._lane_to: dict[int, Lane] = {}  # the collective lane to each peer
        self._posted = False  # something new is expected since the lanes were last pumped
        self._state = threading.Condition()
        self._driven = False
        self._asleep = False  # the driving thread sleeps: wake it
        self._waiting = 0  # threads that want to drive
        self._submitted = 0.0  # when the last small call was
        self._attending = False  # the background thread is awake and waits until it is due
        self._stopping = False
        self._error: SmolError | None = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._calls: deque[Call] = deque()
        self._current: Call | None = None
        self._broken: dict[Lane, SmolError] = {}  # broken connections that nobody has needed since
        self._departed: dict[int, SmolError] = {}  # peers that left as planned: what still needs them fails
        self._open_works: set[PendingWork] = set()
        self._poller = _Poller()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"progress {name}", daemon=True)
        self._thread.start()

    def add_lane(self, lane: Lane, *, collective: bool) -> None:
        """Take over a connection. Call before the first `submit`."""
        self._lanes.append(lane)
        if collective:
            self._collective_lanes.append(lane)
            self._lane_to[lane.peer] = lane

    def submit(self, work: PendingWork, action: Callable[[], None], *, is_small: bool = False) -> None:
        """Run `action` on the driving thread, in order of submission; `work` fails if the loop does.

        `is_small`: what it sends is worth no other thread; sent before this returns, where nobody else drives.
        """
        with self._state:
            error = self._error
            if error is None and self._stopping:
                error = CollectiveMismatch("the communicator is closed")
            if error is None:
                self._inbox.append(action)
                self._open_works.add(work)
                begins = is_small and not self._driven
                if begins:
                    self._driven = True
                    self._submitted = time.monotonic()
                if self._asleep:
                    self._wake()
                if not self._driven or (begins and not self._attending):
                    self._attending = begins
                    self._state.notify_all()
        if error is not None:
            work.finish(error)
        elif begins:
            try:
                self._drive(None, None, once=True)
            finally:
                self._give()

    def enqueue_call(self, call: Call) -> None:
        """Queue a collective. On the driving thread."""
        self._calls.append(call)

    def finish(self, work: PendingWork, error: SmolError | None = None, results: list[Tensor] | None = None) -> None:
        """Mark a work done. On the driving thread."""
        with self._state:
            self._open_works.discard(work)
        work.finish(error, results)

    def wait(self, finished: threading.Event, timeout: float | None) -> None:
        """Drive the loop, or let another thread drive, until `finished` or `timeout` seconds have passed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not finished.is_set():
            left = MAX_SLEEP if deadline is None else min(MAX_SLEEP, deadline - time.monotonic())
            if left <= 0:
                return
            with self._state:
                if self._driven:  # the background thread hands over, another waiter when it has finished
                    self._waiting += 1
                    if self._asleep:
                        self._wake()
                    self._state.wait_for(lambda: not self._driven or finished.is_set(), left)
                    self._waiting -= 1
                takes = not self._driven and self._error is None and not finished.is_set()
                self._driven = self._driven or takes
                if not self._driven:  # the background thread has left the loop to this one, which needs it no more
                    self._state.notify_all()
            if takes:
                try:
                    self._drive(finished, deadline)
                finally:
                    self._give()
            elif self._error is not None:
                finished.wait(left)  # `fail` is about to finish it

    def fail(self, error: SmolError) -> None:
        """Fail everything that is pending and all that comes. From any thread; returns at once."""
        with self._state:
            if self._error is not None:
                return
            self._error = error
            works, self._open_works = self._open_works, set()
            self._state.notify_all()
            self._wake()
        for work in works:
            try:
                work.finish(error)
            except Exception:  # a mistake in a callback: the other works must fail as well
                logger.exception("callback failed name=%s", self._thread.name)

    def depart(self, peer: int, error: SmolError) -> None:
        """`peer` has left and its connections are closed: fail what needs it, now and later. From any thread."""
        with self._state:
            self._departed[peer] = error
            self._inbox.append(lambda: self._fail_dependents(peer, error))
            self._state.notify_all()
            self._wake()

    def departed(self, peer: int) -> SmolError | None:
        """The error for what needs a peer that has left; None: it is there."""
        return self._departed.get(peer)

    def error(self) -> SmolError | None:
        """What ended this loop, if anything did."""
        return self._error

    def close(self) -> None:
        """Stop the thread and close the lanes. What is still pending fails."""
        with self._state:
            self._stopping = True
            self._state.notify_all()
            self._wake()
        self._thread.join(timeout=5.0)
        closed = CollectiveMismatch("the communicator was closed while this was under way")
        self.fail(closed)
        with self._state:  # a waiter may just be leaving the loop: its work has failed
            self._state.wait_for(lambda: not self._driven, timeout=5.0)
        for lane in self._lanes:
            lane.channel.abort(closed)
        self._wake_in.close()
        self._wake_out.close()

    # ---- who drives

    def _give(self) -> None:
        with self._state:
            self._driven = False
            self._state.notify_all()

    def _busy(self) -> bool:
        return bool(self._open_works or self._inbox)

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._stopping or self._attending or self._is_unattended())
                while self._attending and not self._stopping:
                    left = self._submitted + ATTEND_SECONDS - time.monotonic()
                    if left <= 0:
                        self._attending = False
                    else:
                        self._state.wait(left)
                if self._stopping:
                    return
                if not self._is_unattended():
                    continue
                self._driven = True
            try:
                self._drive(None, None)
            finally:
                self._give()

    def _is_unattended(self) -> bool:
        return not self._driven and not self._waiting and self._error is None and self._busy()

    def _drive(self, finished: threading.Event | None, deadline: float | None, *, once: bool = False) -> None:
        """Run until `finished`, or for the background thread until there is nothing to do or somebody waits."""
        spin_until: float | None = None
        idle_since = 0.0
        turns = 0
        while self._error is None and not self._stopping:
            if finished is not None and finished.is_set():
                return
            if finished is None and not once and (self._waiting or not self._busy()):
                return
            try:
                if self._turn(finished, polls=turns % POLL_TURNS == POLL_TURNS - 1):
                    spin_until = None
                    turns += 1
                    if once:
                        return
                    continue
                if once:
                    return
                # The background thread never spins: it would take the interpreter from the one that computes.
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    return
                if finished is not None and spin_until is None:
                    idle_since = now
                    spin_until = now + (self._spin_seconds if self._comes_soon else 0.0)
                turns = POLL_TURNS - 1
                if spin_until is None or now >= spin_until:
                    if finished is not None and finished.is_set():
                        return  # the bytes came together with the end of their connection: that counts as nothing moved
                    self._check_order()
                    if self._sleep(self._sleep_seconds(deadline)) and spin_until is not None:
                        self._comes_soon = time.monotonic() - idle_since < self._spin_seconds
                        spin_until = None
            except SmolError as error:
                self.fail(error)
                return
            except Exception as exc:  # a mistake here or in a callback: those who wait must hear of it, not wait on
                logger.exception("progress loop failed name=%s", self._thread.name)
                unexpected = SmolError(f"the communicator failed unexpectedly: {exc!r}")
                unexpected.__cause__ = exc
                self.fail(unexpected)
                return
            except BaseException:  # Ctrl-C in the middle of a frame: what follows on that connection has no beginning
                self.fail(SmolError("the communicator was interrupted while bytes were under way"))
                raise

    def _check_order(self) -> None:
        """A frame that is not expected yet waits in its lane for a piece before it. Nothing comes if all wait so."""
        call, awaited = self._current, [lane for lane in self._collective_lanes if lane.awaited]
        if call is not None and awaited and not self._posted and all(lane.held for lane in awaited):
            raise CollectiveMismatch(
                f"rank {awaited[0].peer} does not send what this rank waits for next in {call.prelude.describe()}"
            )

    def _sleep_seconds(self, deadline: float | None) -> float:
        now = time.monotonic()
        ends = [lane.channel.due() for lane in self._lanes if not lane.broken and not lane.held]
        seconds = min((end - now for end in [*ends, deadline] if end is not None), default=MAX_SLEEP)
        return max(0.0, min(MAX_SLEEP, seconds))

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: nobody is left to wake
            self._wake_out.send(b"w")

    # ---- one turn of the loop

    def _turn(self, finished: threading.Event | None, *, polls: bool) -> bool:
        """Send and receive a little on every lane, without blocking; True if bytes moved.

        Lanes that a call waits for are read at once, the others where the system says that there is something.
        """
        if self._inbox:
            self._take_submissions()
            self._advance_calls()
        retry, self._posted = self._posted, False
        moved = False
        for lane in self._lanes:
            if lane.broken:
                continue
            if lane.queued_bytes:
                moved = self._guarded(lane, lane.flush) or moved
            if retry if lane.held else lane.awaited:
                moved = self._guarded(lane, lane.pump) or moved
        if moved:
            self._advance_calls()  # what arrived or was sent may have finished a call
        if finished is not None and finished.is_set():
            return True
        return self._sleep(0.0) or moved if polls else moved

    def _sleep(self, seconds: float) -> bool:
        """Wait until a lane can be read or written, at most `seconds`, and read; True if bytes moved."""
        if seconds > 0:
            self._asleep = True
            if self._inbox or self._waiting or self._stopping or self._error is not None:
                seconds = 0.0  # somebody came before the flag was up, and woke nobody
            elif not all(lane.prepare_sleep() for lane in self._lanes if not lane.broken):
                seconds = 0.0
        try:
            ready = self._poller.poll(self._wake_in, self._lanes, seconds)
        finally:
            self._asleep = False
        moved = False
        now = time.monotonic()
        for lane in self._lanes:
            if lane.broken:
                continue
            due = None if lane.held else lane.channel.due()
            if lane in ready or (due is not None and due <= now):
                moved = self._guarded(lane, lane.pump) or moved
        if seconds > 0 and not moved:
            self._set_stalled_aside(now)
        self._advance_calls()
        self._report_broken()
        return moved

    def _set_stalled_aside(self, now: float) -> None:
        """A frame is in memory before its first byte leaves: however long its sender computes, the rest follows."""
        for lane in self._lanes:
            if not lane.broken and lane.stalled_for(now) > self._patience:
                self._set_aside(lane, ConnectionLost(f"it sent half a frame, then nothing for {self._patience:g} s"))

    def _fail_dependents(self, peer: int, error: SmolError) -> None:
        for lane in self._lanes:
            if lane.peer == peer:
                if lane in self._collective_lanes and lane.is_needed():
                    self.fail(error)  # half a collective cannot be taken back
                lane.give_up(error)

    def _report_broken(self) -> None:
        """Report a broken connection once it is needed: a peer that is done may close while others still go on."""
        for lane, error in list(self._broken.items()):
            if lane.is_needed():
                del self._broken[lane]
                self._on_broken(lane.peer, error)

    def _take_submissions(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _advance_calls(self) -> None:
        while True:
            if self._current is None:
                if not self._calls:
                    return
                if self._departed:
                    self.finish(self._calls.popleft().work, next(iter(self._departed.values())))
                    continue
                self._current = self._calls.popleft()
            call = self._current
            while call.begun < call.pieces and len(call.running) < call.window:
                piece = call.begun
                call.begun += 1
                call.running[piece] = call.begin(call, piece)
                self._step(call, piece)
            if call.running or any(lane.queued_bytes for lane in self._collective_lanes):
                return
            self._current = None
            for lane in self._collective_lanes:
                lane.spans.call_ended()
            self.finish(call.work, results=call.on_success())

    def _step(self, call: Call, piece: int) -> None:
        """Run a piece's generator up to its next wait."""
        while True:
            arrivals = next(call.running[piece], None)
            if arrivals is None:
                del call.running[piece]
                return
            for arrival in arrivals:
                call.posted[(arrival.src, piece)] = arrival
                self._lane_to[arrival.src].awaited += 1
                self._posted = True
            if arrivals:
                call.waiting[piece] = len(arrivals)
                return

    def _guarded(self, lane: Lane, action: Callable[[], bool | None]) -> bool:
        """Run `action`; a broken connection is reported and set aside, everything else is raised."""
        try:
            return bool(action())
        except CollectiveMismatch:
            raise
        except FrameError as error:
            raise FrameError(f"rank {lane.peer} sent a malformed frame: {error}") from error
        except SmolError as error:
            self._set_aside(lane, error)
            return False

    def _set_aside(self, lane: Lane, error: SmolError) -> None:
        lane.broken = True
        logger.info("lane broken peer=%d reason=%s", lane.peer, error)
        self._broken[lane] = error

    # ---- Receiver of the collective lanes

    def expects(self, peer: int) -> bool:
        """See Receiver."""
        return self._lane_to[peer].awaited > 0

    def place(self, lane: Lane, prelude: Prelude, dims: bytes) -> memoryview | Sum | Swap | None:
        """See Receiver."""
        call = self._current
        if call is None:
            return None  # this rank has not called it yet
        ours = call.prelude
        if prelude.sequence > ours.sequence and prelude.generation == ours.generation:
            if self.expects(lane.peer):  # what it sends comes in the order of its calls
                raise CollectiveMismatch(
                    f"rank {lane.peer} called {prelude.describe()} before it had sent its part of {ours.describe()}"
                )
            return None  # the peer has finished this call and begun a later one
        if not prelude.is_of_call(ours):
            raise CollectiveMismatch(
                f"rank {lane.peer} called {prelude.describe()} while this rank called {ours.describe()}. Every rank "
                "must call the same collectives in the same order"
            )
        arrival = call.posted.get((lane.peer, prelude.tag))
        if arrival is None:
            if not call.may_need(prelude.tag):
                raise CollectiveMismatch(
                    f"rank {lane.peer} sent piece {prelude.tag} of {prelude.describe()}: there are {call.pieces}, or "
                    "it came before"
                )
            return None
        if arrival.nbytes is None:
            arrival.into = empty_for(prelude, frame.unpack_dims(dims, prelude, frame.SHAPED[prelude.operation]))
            arrival.nbytes = arrival.into.nbytes
        if arrival.hop != prelude.hop or arrival.nbytes != prelude.nbytes:
            raise CollectiveMismatch(
                f"rank {lane.peer} sent hop {prelude.hop} with {prelude.nbytes} bytes of {prelude.describe()}, hop "
                f"{arrival.hop} with {arrival.nbytes} bytes was expected"
            )
        if arrival.into is None:
            return lane.swap
        return raw_bytes(arrival.into) if arrival.op is None else lane.sum_into(arrival.into, arrival.op)

    def arrived(self, lane: Lane, prelude: Prelude) -> None:
        """See Receiver."""
        call = self._current
        assert call is not None
        del call.posted[(lane.peer, prelude.tag)]
        lane.awaited -= 1
        call.waiting[prelude.tag] -= 1
        if call.waiting[prelude.tag] == 0:
            self._step(call, prelude.tag)
            self._advance_calls()

    def gone(self, peer: int, error: SmolError) -> None:
        """See Receiver. A collective that needed the peer has failed already."""


class _Poller:
    """select.poll where there is one, select.select elsewhere (Windows). Re-registers only what changed."""

    def __init__(self) -> None:
        self._poll = select.poll() if hasattr(select, "poll") else None
        self._masks: dict[int, int] = {}

    def poll(self, wake: socket.socket, lanes: list[Lane], seconds: float) -> set[Lane]:
        """The lanes that can be read or written, after at most `seconds`; bytes on `wake` end the sleep."""
        wanted = {wake.fileno(): (True, False)}
        by_fd: dict[int, Lane] = {}
        closed = {lane for lane in lanes if not lane.broken and lane.channel.fileno() < 0}
        for lane in lanes:
            if not lane.broken and lane not in closed:
                reads, writes = lane.channel.wants(sending=lane.sending())
                wanted[lane.channel.fileno()] = (reads and not lane.held, writes)
                by_fd[lane.channel.fileno()] = lane
        seconds = 0.0 if closed else seconds
        ready = self._select(wanted, seconds) if self._poll is None else self._poll_fds(self._poll, wanted, seconds)
        if wake.fileno() in ready:
            with contextlib.suppress(OSError):
                wake.recv(4096)
        return {by_fd[fd] for fd in ready if fd in by_fd} | closed  # reading tells why it is closed

    def _poll_fds(self, poll: select.poll, wanted: dict[int, tuple[bool, bool]], seconds: float) -> list[int]:
        masks = {fd: reads * select.POLLIN | writes * select.POLLOUT for fd, (reads, writes) in wanted.items()}
        # A descriptor without interest would still report a hang-up, again and again: leave it out.
        masks = {fd: mask for fd, mask in masks.items() if mask}
        if masks != self._masks:
            for fd in self._masks.keys() - masks.keys():
                poll.unregister(fd)
            for fd, mask in masks.items():
                poll.register(fd, mask)
            self._masks = masks
        return [fd for fd, _ in poll.poll(seconds * 1000)]

    @staticmethod
    def _select(wanted: dict[int, tuple[bool, bool]], seconds: float) -> list[int]:
        reads = [fd for fd, (read, _) in wanted.items() if read]
        writes = [fd for fd, (_, write) in wanted.items() if write]
        readable, writable, _ = select.select(reads, writes, [], seconds)
        return [*readable, *writable]
