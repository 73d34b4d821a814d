"""Learning rate as a function of the update's number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from smolcluster.errors import ConfigError

LrSchedule = Callable[[int], float]
ScheduleKind = Literal["cosine", "constant"]


def lr_schedule(
    kind: str, base: float, warmup_iters: int = 0, min_lr: float = 0.0, total_updates: int = 0
) -> LrSchedule:
    """Linear warm-up to `base`, then a cosine down to `min_lr`, or `base` for ever.

    Args:
        kind: "cosine" or "constant".
        base: the highest learning rate.
        warmup_iters: updates until `base` is reached; update i of them uses base * (i + 1) / warmup_iters.
        min_lr: where the cosine ends; later updates stay there.
        total_updates: updates of the whole run, warm-up included.

    Returns:
        A function from the update's number, from 0, to its learning rate.

    Raises:
        ConfigError: the kind is unknown, or the cosine's end lies above its start.
    """
    if kind not in ("cosine", "constant"):
        raise ConfigError(f"lr_schedule.kind is {kind!r}. Set it to cosine or constant.")
    if kind == "cosine" and min_lr > base:
        raise ConfigError(
            f"lr_schedule.min_lr ({min_lr:g}) is above training.learning_rate ({base:g}), where the cosine "
            f"starts. Lower min_lr."
        )
    decay_updates = max(1, total_updates - warmup_iters)

    def lr_at(update: int) -> float:
        if update < warmup_iters:
            return base * (update + 1) / warmup_iters
        if kind == "constant":
            return base
        progress = min(1.0, (update - warmup_iters) / decay_updates)
        return min_lr + 0.5 * (base - min_lr) * (1.0 + math.cos(math.pi * progress))

    return lr_at
