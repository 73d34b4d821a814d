"""Threads that wait for torch.distributed: its own calls block, ours do not."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from smolcluster.collectives.torch_group import translate
from smolcluster.collectives.work import PendingWork
from smolcluster.errors import CollectiveMismatch, SmolError

# A step's collectives come within it, so that they share a thread; a forgotten communicator keeps none.
LINGER = 1.0
# How long `close` waits for a thread. Broken connections end what it waits for within milliseconds.
JOIN_TIMEOUT = 5.0
# Idle lanes above it are forgotten: tags that count steps would otherwise add up.
MAX_KEPT_LANES = 256

Run = Callable[[], list[Tensor]]


class WorkLanes:
    """The works under way of one communicator: one lane for collectives, one for every (direction, peer, tag).

    The works of a lane run one after the other, those of different lanes at the same time.
    """

    def __init__(self, name: str, on_broken: Callable[[SmolError], None]) -> None:
        """`on_broken(error)`: the group can no longer be used; called on a lane's thread, which then calls `fail`."""
        self._name = name
        self._on_broken = on_broken
        self._lock = threading.Lock()
        self._error: SmolError | None = None
        self._open: set[PendingWork] = set()
        self._collectives = SerialThread(f"torch-dist {name}", LINGER)
        self._messages: dict[Hashable, SerialThread] = {}

    @property
    def error(self) -> SmolError | None:
        """What everything fails with, None while all is well."""
        return self._error

    def is_idle(self) -> bool:
        """True if nothing is under way and nothing has failed."""
        with self._lock:
            return self._error is None and not self._open

    def collective(self, what: str, run: Run) -> PendingWork:
        """Queue `run`; `what` is for messages. Returns at once."""
        with self._lock:
            work = self._pending(what)
            self._collectives.submit(lambda: self._finish(work, what, run, -1))
        return work

    def message(self, direction: str, peer: int, tag: int, run: Run) -> PendingWork:
        """Queue `run` behind the messages of the same direction, peer and tag. Returns at once."""
        what = f"{direction} rank {peer} with tag {tag}"
        with self._lock:
            work = self._pending(what)
            lane = self._messages.get((direction, peer, tag))
            if lane is None:
                if len(self._messages) >= MAX_KEPT_LANES:
                    self._messages = {key: lane for key, lane in self._messages.items() if not lane.is_idle()}
                lane = self._messages[direction, peer, tag] = SerialThread(f"torch-dist {self._name} {what}")
            lane.submit(lambda: self._finish(work, what, run, peer))
        return work

    def fail(self, error: SmolError) -> bool:
        """Fail all that is under way and all that comes; False if something else has failed it before."""
        with self._lock:
            if self._error is not None:
                return False
            self._error = error
            works, self._open = self._open, set()
        for work in works:
            work.finish(error)
        return True

    def close(self) -> None:
        """Wait for the threads to end."""
        for thread in [self._collectives, *self._messages.values()]:
            thread.close(JOIN_TIMEOUT)

    def _pending(self, what: str) -> PendingWork:
        work = PendingWork(_Sleep(), lambda: f"{what} on {self._name}", [])
        if self._error is None:
            self._open.add(work)
        return work

    def _finish(self, work: PendingWork, what: str, run: Run, peer: int) -> None:
        error, results = self._error, []
        if error is None:
            try:
                with torch.no_grad():
                    results = run()
            except Exception as exc:  # noqa: BLE001 - top of the thread: stored in the work and in the communicator
                error = exc if isinstance(exc, SmolError) else translate(exc, what, peer)
                # A message that does not fit concerns nobody but its receiver.
                if peer < 0 or not isinstance(error, CollectiveMismatch):
                    self._on_broken(error)
        with self._lock:
            self._open.discard(work)
        work.finish(error, results)


class SerialThread:
    """Runs jobs one after the other on a thread of its own, which exists only while there are jobs.

    Jobs never raise: they store their errors where somebody waits for them.
    """

    def __init__(self, name: str, linger: float = 0.0) -> None:
        """`linger`: seconds that the thread waits for a next job before it ends."""
        self._name = name
        self._linger = linger
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._is_running = False
        self._is_closing = False

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` after those submitted before it; returns at once."""
        with self._changed:
            self._jobs.append(job)
            if self._is_running:
                self._changed.notify()
                return
            self._is_running = True
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def is_idle(self) -> bool:
        """True if no job is queued or running, and the thread has ended."""
        with self._changed:
            return self._thread is None or not self._thread.is_alive()

    def close(self, timeout: float) -> bool:
        """Let the thread end once its jobs are done; False if it has not ended within `timeout` seconds."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)  # also one that has no job: it must be gone before the interpreter is
        return not thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs and not self._is_closing and self._linger:
                    self._changed.wait(self._linger)
                if not self._jobs:
                    self._is_running = False
                    return
                job = self._jobs.popleft()
            job()
            del job  # with the tensors that it holds


class _Sleep:
    """The driver of works that another thread finishes: just wait."""

    def wait(self, finished: threading.Event, timeout: float | None) -> None:
        finished.wait(timeout)
