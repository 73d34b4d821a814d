"""One micro-batch of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# The field's own "no target here" (torch.nn.functional.cross_entropy's default ignore_index).
NO_TARGET = -100

# What a rank looks at in its batches: where layers lie on several ranks, the first one reads inputs, the last targets.
Reads = Literal["all", "inputs", "targets", "nothing"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that one rank computes at once.

    Attributes:
        inputs: (B, ...) pixels (float) or token ids (int64), on CPU. B may be 0: this rank has nothing to do. (B, 0)
            where it looks at no inputs.
        targets: (B,) or (B, T) int64; NO_TARGET where nothing is to be predicted. (B, 0) where it looks at none.
        planned_count: how many targets the whole step has, over all ranks and micro-batches, as the sampler plans
            it. The same number on every rank that looks at targets. 0: unknown; the step then scales by what it counts.
        graded: (B, T) bool, only for evaluation: the targets that the accuracy is about. A sample counts as correct
            when all of its graded targets are. None: every target is graded on its own.
    """

    inputs: Tensor
    targets: Tensor
    planned_count: int = 0
    graded: Tensor | None = None

    @property
    def samples(self) -> int:
        """Samples in this micro-batch."""
        return int(self.inputs.shape[0])


def read_only(batch: Batch, reads: Reads) -> Batch:
    """A batch of as many samples, without what is not looked at."""
    nothing = unread(batch.samples)
    inputs = batch.inputs if reads in ("all", "inputs") else nothing.inputs
    if reads in ("all", "targets"):
        return Batch(inputs, batch.targets, batch.planned_count, batch.graded)
    return Batch(inputs, nothing.targets)


def unread(samples: int) -> Batch:
    """A batch of as many samples, for a rank that looks at nothing of them: (B, 0) inputs and targets."""
    nothing = torch.empty(samples, 0)
    return Batch(nothing, nothing)
