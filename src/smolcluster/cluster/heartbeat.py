"""Heartbeats: a rank that is silent for longer than `patience` is lost, even if its connection looks alive."""

from __future__ import annotations

import threading
import time

from smolcluster.cluster.world import World

# Beats per patience: two lost in a row (a busy processor, a slow link) are not yet a death.
BEATS_PER_PATIENCE = 5


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
        if overslept > patience / 2:
            return
        for rank, heard in self._world.silent_since().items():
            silence = now - heard
            if silence > patience:
                self._world.report_lost(rank, f"it was silent for {silence:.1f} s (cluster.patience is {patience:g})")

    def _run(self) -> None:
        interval = self._world.patience / BEATS_PER_PATIENCE
        while True:
            for rank in self._world.silent_since():
                self._world.send(rank, "beat", {})
            began = time.monotonic()
            if self._stop.wait(interval):
                return
            now = time.monotonic()
            self.look(now, now - began - interval)
