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

    def _run(self) -> None:
        world = self._world
        interval = world.patience / BEATS_PER_PATIENCE
        last = time.monotonic()
        while not self._stop.wait(interval):
            now = time.monotonic()
            # Only if this process itself was running: after a suspension everybody else seems silent at first.
            suspended = now - last > interval + world.patience / 2
            last = now
            for rank, heard in world.silent_since().items():
                world.send(rank, "beat", {})
                if now - heard > world.patience and not suspended:
                    world.report_lost(
                        rank, f"it was silent for {now - heard:.1f} s (cluster.patience is {world.patience:g})"
                    )
