"""Heartbeats: a rank that is silent for longer than `patience` is lost, even if its connection looks alive."""

from __future__ import annotations

import threading
import time

from smolcluster.cluster.world import BEATS_PER_PATIENCE, DOUBT, World, clock_with_sleep

# So soon after the end of a rank's time it is looked for: a clock that ticks coarsely must not find it still in time.
MARGIN = 0.01


class Heartbeat:
    """Beats to every rank and watches all of them, on one thread."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat rank {world.rank}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop beating."""
        self._stop.set()
        self._thread.join(timeout=self._world.patience + 1.0)

    def look(self, now: float, overslept: float) -> None:
        """Report every rank that was silent for too long.

        Args:
            now: `time.monotonic()`.
            overslept: how many seconds later than planned this look comes. After a suspension everybody else seems
                silent, until what they sent meanwhile is read: then nobody is reported.
        """
        patience = self._world.patience
        if overslept > DOUBT * patience:
            return
        for rank, heard in self._world.silent_since().items():
            silence = now - heard
            if silence > patience:
                reason = f"it was silent for {silence:.1f} s (cluster.patience is {patience:g})"
                self._world.report_lost(rank, reason, may_return=True)

    def _run(self) -> None:
        while True:
            for rank in self._world.silent_since():
                self._world.send(rank, "beat", {})
            seconds = self._seconds_to_next_look(time.monotonic())
            until = clock_with_sleep() + seconds
            self._world.note_sleep(until)
            if self._stop.wait(seconds):
                return
            now = clock_with_sleep()
            self._world.note_awake(now)
            self.look(time.monotonic(), now - until)

    def _seconds_to_next_look(self, now: float) -> float:
        """Until the next beats are due, or sooner: until some rank's time is over, to notice it then and not later."""
        interval = self._world.patience / BEATS_PER_PATIENCE
        due = min(self._world.silent_since().values(), default=now) + self._world.patience + MARGIN - now
        # Over already: this process was suspended, and what the others sent meanwhile is to be read first.
        return interval if due <= 0 else min(interval, due)
