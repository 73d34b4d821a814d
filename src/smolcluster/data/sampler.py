"""Which samples a rank computes in which step: a pure function of (length, global batch, seed, shares, step, rank).

An epoch is a permutation of all samples, drawn from (seed, epoch). Step after step takes the next `global_batch` of
it, the last step of an epoch what is left. A rank's samples are a consecutive part of the step's, or of each of its
micro-batches (`micro_ranges`). So the number of ranks and their shares decide who computes a sample, never when; and a
run that resumes at step t needs nothing but t.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from smolcluster.errors import ConfigError, DataError


class Sampler:
    """Deals the samples of each step. All methods may be called from any thread."""

    def __init__(self, length: int, global_batch: int, seed: int, shares: Sequence[float] | int = 1) -> None:
        """Describe the deal.

        Args:
            length: samples in the dataset.
            global_batch: samples of one step over all ranks.
            seed: the run's seed.
            shares: the ranks' relative weights, in rank order; a number of ranks: equal weights.

        Raises:
            DataError: the dataset is empty.
            ConfigError: the batch or the shares make no sense.
        """
        if length < 1:
            raise DataError("the dataset has no samples to train on. Choose another data.dataset or data.path")
        self.length = length
        self.global_batch = checked_global_batch(global_batch)
        self.seed = seed
        self.weights = checked_weights([1.0] * shares if isinstance(shares, int) else shares)
        self._orders: dict[int, Tensor] = {}  # replaced whole: safe between threads

    @property
    def world_size(self) -> int:
        """Ranks that samples are dealt to."""
        return len(self.weights)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample was used once; the last one may be smaller."""
        return -(-self.length // self.global_batch)

    def global_indices(self, step: int) -> Tensor:
        """The samples of a step over all ranks: (n,) int64, n = global_batch or, at the end of an epoch, less."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch
        return self.epoch_order(epoch)[start : start + self.global_batch]

    def epoch_order(self, epoch: int) -> Tensor:
        """All samples in the order of an epoch: (length,) int64. The last two asked for are kept."""
        order = self._orders.get(epoch)
        if order is None:
            order = seeded_permutation(self.length, self.seed, epoch)
            self._orders = dict([*self._orders.items()][-1:]) | {epoch: order}
        return order


def seeded_permutation(length: int, *key: int) -> Tensor:
    """A permutation of 0 to length - 1, (length,) int64, the same on every platform and version of torch and numpy.

    `key` is what it is drawn from: the seed, the epoch, and whatever else shall make it another one.

    It sorts raw 64-bit words of Philox, a stream that numpy keeps fixed. `torch.randperm` promises nothing from
    version to version, and the machines of one cluster need not run the same one.
    """
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(length)
    return torch.from_numpy(np.argsort(words, kind="stable").astype(np.int64, copy=False))


def split_by_shares(count: int, weights: Sequence[float]) -> list[int]:
    """Split `count` things in proportion to `weights`: whole numbers that add up exactly (largest remainder).

    Computed in fractions, so that no rounding can make two ranks disagree. Equal remainders: the lower rank first.
    """
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    quotas = [count * weight / total for weight in exact]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda rank: counts[rank] - quotas[rank])
    for rank in by_remainder[: count - sum(counts)]:
        counts[rank] += 1
    return counts


def micro_ranges(
    count: int, weights: Sequence[float], rank: int, micro_batches: int, *, micro_first: bool = False
) -> list[range]:
    """Which of a step's samples each micro-batch of a rank takes, by their places in the step.

    Args:
        count: samples of the step.
        weights: the ranks' relative shares.
        rank: whose.
        micro_batches: how many; as equal as they can be, some perhaps of 0 samples.
        micro_first: divide the step into micro-batches and each among the ranks, so that the ranks compute the same
            micro-batch together; else each rank divides its share.
    """
    even = [1.0] * micro_batches
    if not micro_first:
        counts = split_by_shares(count, weights)
        return _ranges(sum(counts[:rank]), split_by_shares(counts[rank], even))
    ranges = []
    for whole in _ranges(0, split_by_shares(count, even)):
        counts = split_by_shares(len(whole), weights)
        ranges.append(_ranges(whole.start, counts)[rank])
    return ranges


def _ranges(start: int, lengths: Sequence[int]) -> list[range]:
    starts = [start, *(start + sum(lengths[: number + 1]) for number in range(len(lengths)))]
    return [range(begin, end) for begin, end in itertools.pairwise(starts)]


def checked_global_batch(global_batch: int) -> int:
    """The number itself, or ConfigError."""
    if global_batch < 1:
        raise ConfigError(f"the global batch is {global_batch} samples; training.batch_size must be at least 1")
    return global_batch


def checked_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Shares that samples can be dealt by, or ConfigError."""
    valid = all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if not weights or not valid or not any(weight > 0 for weight in weights):
        raise ConfigError(
            f"cluster.shares gives the ranks the weights {list(weights)}; they must be finite, none below 0 and at "
            "least one above 0. Use `even`, or one positive number for each rank"
        )
    return tuple(weights)
