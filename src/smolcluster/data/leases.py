"""Samples on loan, for workers that come, go and differ in speed: what is lent comes back or counts, exactly once.

An epoch is the permutation of `sampler.py`; a sample is named by its epoch and its place in that. A lease holds some.
Committed, they are done with for good. Given back (refused, too late, its worker is gone), they are lent again before
any that were never lent. While nothing is given back, the n-th deal holds the very samples of the sampler's n-th step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from smolcluster.data.sampler import Sampler, split_by_shares
from smolcluster.errors import CheckpointError
from smolcluster.kinds import JsonObject

# (epoch, first place, place behind the last): consecutive places in an epoch's order.
Range: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Lease:
    """Some samples, lent to one worker. `number` is never used twice in a run."""

    number: int
    ranges: tuple[Range, ...]

    @property
    def samples(self) -> int:
        """How many, perhaps 0."""
        return sum(stop - start for _, start, stop in self.ranges)


class SamplePool:
    """Lends the samples of some epochs. For one thread."""

    def __init__(self, sampler: Sampler, epochs: int | None) -> None:
        """Lend nothing yet.

        Args:
            sampler: the order of each epoch, and the samples of one deal (`global_batch`).
            epochs: how many there are; None: no end.
        """
        self._sampler = sampler
        self._epochs = epochs
        self._fresh = (0, 0)  # epoch and place of the first sample that was never lent
        self._returned: list[Range] = []  # oldest first
        self._lent: dict[int, Lease] = {}
        self._next = 0

    @property
    def global_batch(self) -> int:
        """Samples of one deal."""
        return self._sampler.global_batch

    @property
    def is_finished(self) -> bool:
        """Every sample of every epoch is committed."""
        return not self._lent and not self._returned and self._is_dealt_out()

    @property
    def lent(self) -> dict[int, Lease]:
        """The leases that are out, by number."""
        return dict(self._lent)

    def deal(self, weights: Sequence[float], limit: int | None = None) -> list[Lease]:
        """Lend the samples of one step: what was given back, then fresh ones up to the end of an epoch.

        Args:
            weights: relative shares, one lease for each; a small one may be of 0 samples.
            limit: samples in all; None: the global batch.

        Returns:
            The leases; none if there is nothing to lend: the last are out, or the pool is finished.
        """
        ranges = self._take(self._sampler.global_batch if limit is None else limit)
        if not ranges:
            return []
        counts = split_by_shares(sum(stop - start for _, start, stop in ranges), weights)
        leases = []
        for count in counts:
            part, ranges = _split(ranges, count)
            leases.append(Lease(self._next, tuple(part)))
            self._lent[self._next] = leases[-1]
            self._next += 1
        return leases

    def commit(self, number: int) -> Lease | None:
        """These samples count. None: they are not lent, so this lease was committed or given back before."""
        return self._lent.pop(number, None)

    def give_back(self, number: int) -> Lease | None:
        """These samples do not count; they are lent again. None: as for `commit`."""
        lease = self._lent.pop(number, None)
        if lease is not None:
            self._returned = _merged([*self._returned, *lease.ranges])
        return lease

    def state(self) -> JsonObject:
        """For a checkpoint: what is lent now counts as given back, for whoever goes on from it knows none of those."""
        waiting = _merged([*self._returned, *(part for lease in self._lent.values() for part in lease.ranges)])
        return {"fresh": list(self._fresh), "returned": [list(part) for part in waiting], "next": self._next}

    def load_state(self, state: JsonObject) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it is no state of a pool over such data.
        """
        match state:
            case {"fresh": [int(epoch), int(place)], "returned": list(returned), "next": int(number)}:
                ranges = [_checked_range(part, self._sampler.length) for part in returned]
                if epoch >= 0 and 0 <= place < self._sampler.length and number >= 0 and None not in ranges:
                    self._fresh = (epoch, place)
                    self._returned = _merged(part for part in ranges if part is not None)
                    self._lent.clear()
                    self._next = number
                    return
        raise CheckpointError(
            f"the checkpoint's leases do not fit to {self._sampler.length} samples. Resume with the same data"
        )

    def _is_dealt_out(self) -> bool:
        return self._epochs is not None and self._fresh[0] >= self._epochs

    def _take(self, limit: int) -> list[Range]:
        taken, self._returned = _split(self._returned, limit)
        left = limit - sum(stop - start for _, start, stop in taken)
        if left > 0 and not self._is_dealt_out():
            epoch, start = self._fresh
            stop = min(start + left, self._sampler.length)
            taken.append((epoch, start, stop))
            self._fresh = (epoch + 1, 0) if stop == self._sampler.length else (epoch, stop)
        return taken


def range_indices(sampler: Sampler, ranges: Sequence[Range]) -> Tensor:
    """The samples of some ranges, numbers in the dataset: (n,) int64."""
    parts = [sampler.epoch_order(epoch)[start:stop] for epoch, start, stop in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _split(ranges: Sequence[Range], count: int) -> tuple[list[Range], list[Range]]:
    """The first `count` samples, or all, and the others."""
    first: list[Range] = []
    for position, (epoch, start, stop) in enumerate(ranges):
        if count < stop - start:
            cut = start + count
            head = [(epoch, start, cut)] if count else []
            return [*first, *head], [(epoch, cut, stop), *ranges[position + 1 :]]
        first.append((epoch, start, stop))
        count -= stop - start
    return first, []


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """In order, what touches joined: a pool from which leases come and go for days stays small."""
    merged: list[Range] = []
    for epoch, start, stop in sorted(ranges):
        if merged and merged[-1][0] == epoch and merged[-1][2] == start:
            merged[-1] = (epoch, merged[-1][1], stop)
        else:
            merged.append((epoch, start, stop))
    return merged


def _checked_range(part: object, length: int) -> Range | None:
    match part:
        case [int(epoch), int(start), int(stop)] if epoch >= 0 and 0 <= start < stop <= length:
            return epoch, start, stop
    return None
