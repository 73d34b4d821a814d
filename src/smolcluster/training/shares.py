"""`cluster.shares: auto`: every rank gets a part of the global batch in proportion to its measured speed.

The global batch and its samples stay what they are; only who computes which of them changes. Speed is samples per
second of forward and backward, without waiting. A change counts once it is DRIFT or more: measurements vary, and every
change of the shares changes the last bits of the sums.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from smolcluster.collectives.base import Communicator
from smolcluster.data.loader import BatchLoader

logger = logging.getLogger(__name__)

# Relative change of a share that is worth dealing anew.
DRIFT = 0.1
# Ranks without a server compare their speeds after 2, 4, 8, 16 steps and then after every 16: it costs one message.
FIRST_CHECK, LONGEST_INTERVAL = 2, 16
# What the last measurement counts against those before it.
NEWEST = 0.3


def adjusted(weights: Sequence[float], speeds: Sequence[float | None]) -> list[float] | None:
    """New weights in proportion to the speeds, where known; None: they differ too little from the old ones.

    A rank of unknown speed (it has computed nothing) gets the mean of the others.
    """
    known = [speed for speed in speeds if speed is not None and speed > 0]
    if not known:
        return None
    mean = sum(known) / len(known)
    wanted = [mean if speed is None or speed <= 0 else speed for speed in speeds]
    before, after = sum(weights), sum(wanted)
    parts = [(old / before, new / after) for old, new in zip(weights, wanted, strict=True)]
    if all(abs(new - old) <= DRIFT * max(old, 1e-9) for old, new in parts):
        return None
    return wanted


class ShareBalancer:
    """For ranks in lock-step: they exchange their speeds now and then, and all deal anew from the same step on."""

    def __init__(self, comm: Communicator, loader: BatchLoader) -> None:
        """Begin with equal shares.

        Args:
            comm: all ranks.
            loader: this rank's; deals anew.
        """
        self._comm = comm
        self._loader = loader
        self._weights = [1.0] * comm.world_size
        self._samples = 0
        self._seconds = 0.0
        self._steps = 0
        self._check_at = FIRST_CHECK

    def after_step(self, samples: int, seconds: float) -> None:
        """Take note of a step. Every rank calls it after the same steps; now and then it communicates."""
        self._samples += samples
        self._seconds += seconds
        self._steps += 1
        if self._steps < self._check_at:
            return
        self._check_at += min(self._check_at, LONGEST_INTERVAL)
        speed = self._samples / self._seconds if self._samples and self._seconds > 0 else None
        self._samples, self._seconds = 0, 0.0
        speeds = [number if isinstance(number, float) else None for number in self._comm.exchange(speed)]
        weights = adjusted(self._weights, speeds)
        if weights is not None:
            logger.info("shares changed rank=%d weights=%s", self._comm.rank, [round(w, 3) for w in weights])
            self._weights = weights
            self._loader.reshare(weights)


class WorkerShares:
    """For the workers of a parameter server, which learns their speeds from their pushes."""

    def __init__(self, weights: Sequence[float], *, measures: bool = False) -> None:
        """Begin with these.

        Args:
            weights: of the ranks from 1 on.
            measures: change them by measured speed.
        """
        self._weights = list(weights)
        self._measures = measures
        self._speeds: list[float | None] = [None] * len(self._weights)

    def weight(self, rank: int) -> float:
        """A worker's relative share."""
        return self._weights[rank - 1]

    def part(self, rank: int) -> float:
        """A worker's share of the whole, of all workers that there may be."""
        return self._weights[rank - 1] / sum(self._weights)

    def measured(self, rank: int, samples: int, seconds: float) -> None:
        """A worker has computed so many samples in so many seconds."""
        if not self._measures or not samples or seconds <= 0:
            return
        before, now = self._speeds[rank - 1], samples / seconds
        self._speeds[rank - 1] = now if before is None else (1 - NEWEST) * before + NEWEST * now
        weights = adjusted(self._weights, self._speeds)
        if weights is not None:
            logger.info("shares changed weights=%s", [round(weight, 3) for weight in weights])
            self._weights = weights
