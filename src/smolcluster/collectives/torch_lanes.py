"""Threads that wait for torch.distributed: its own calls block, ours do not."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


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
        self._is_closing = False

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` after those submitted before it; returns at once."""
        with self._changed:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            else:
                self._changed.notify()

    def close(self, timeout: float) -> bool:
        """Let the thread end once its jobs are done; False if it has not ended within `timeout` seconds."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs and not self._is_closing and self._linger:
                    self._changed.wait(self._linger)
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            job()
