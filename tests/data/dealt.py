"""Which samples a rank has of a step, for tests that make batches themselves."""

from __future__ import annotations

from torch import Tensor

from smolcluster.data.sampler import Sampler, micro_ranges


def rank_indices(sampler: Sampler, step: int, rank: int) -> Tensor:
    """The part of the step's samples that `rank` computes: (m,) int64, m may be 0."""
    indices = sampler.global_indices(step)
    (part,) = micro_ranges(len(indices), sampler.weights, rank, micro_batches=1)
    return indices[part.start : part.stop]
