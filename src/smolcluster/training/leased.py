"""Batches of leased samples: what a worker of a parameter server iterates over, one lease after the other."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence

import torch

from smolcluster.collectives.param_worker import Lease, WorkerPort
from smolcluster.data.batch import Batch
from smolcluster.data.datasets import Dataset
from smolcluster.data.leases import Range, range_indices
from smolcluster.data.sampler import Sampler, split_by_shares


class LeasedBatches:
    """Iterates over a worker's leases: `next()` waits for one and gives its micro-batches.

    Before that it seeds torch's generators from the run's seed and the lease's samples. So dropout depends on what is
    computed, not on who computes it, or when: it is the same when a run is resumed, or replayed.
    """

    def __init__(self, port: WorkerPort, dataset: Dataset, sampler: Sampler, micro_batches: int = 1) -> None:
        """Describe the batches.

        Args:
            port: where leases come from; its `lease` is the one whose batches were given last.
            dataset: the training split.
            sampler: the order of each epoch.
            micro_batches: parts that a lease's samples are split into.
        """
        self._port = port
        self._dataset = dataset
        self._sampler = sampler
        self._micro_batches = micro_batches

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        lease: Lease | None = self._port.next_lease()
        if lease is None:
            raise StopIteration
        seed_for(self._sampler.seed, lease.ranges)
        began = time.monotonic()
        batches = leased_batches(self._dataset, self._sampler, lease.ranges, self._micro_batches, lease.planned)
        self._port.telemetry.record("load", began, time.monotonic(), lease.step)
        return batches


def leased_batches(
    dataset: Dataset, sampler: Sampler, ranges: Sequence[Range], micro_batches: int = 1, planned: int = 0
) -> list[Batch]:
    """The micro-batches of some samples; as equal in size as they can be."""
    indices = range_indices(sampler, ranges)
    parts = max(1, min(micro_batches, len(indices)))
    pieces = torch.split(indices, split_by_shares(len(indices), [1.0] * parts))
    return [Batch(*dataset.batch(piece), planned_count=planned) for piece in pieces]


def seed_for(seed: int, ranges: Sequence[Range]) -> None:
    """Seed torch's generators from the run's seed and the samples that are about to be computed."""
    digest = hashlib.sha256(repr((seed, *ranges)).encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    # Not torch.manual_seed, which notes a stack trace for each kind of device that was never used: 0.5 ms.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)
