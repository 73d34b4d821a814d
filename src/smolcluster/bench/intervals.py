"""How sure a measured figure is: a bootstrap interval over the blocks that it was computed from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

Row = TypeVar("Row")
CONFIDENCE = 0.95
RESAMPLES = 4000


def bootstrap_interval(
    rows: Sequence[Row],
    statistic: Callable[[Sequence[Row]], float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """The percentile interval of `statistic`: its spread if the rows had been drawn once more. The same every time.

    Efron 1979, Bootstrap Methods: Another Look at the Jackknife.

    Args:
        rows: what was measured, one row for each pair of blocks, so that blocks of one pair stay together.
        statistic: the figure, from as many rows.
        confidence: how often such an interval holds the true figure.
        resamples: draws.

    Returns:
        (lower end, upper end).
    """
    generator = random.Random(0)
    figures = sorted(statistic(generator.choices(rows, k=len(rows))) for _ in range(resamples))
    outside = (1.0 - confidence) / 2
    return figures[int(outside * resamples)], figures[min(resamples - 1, int((1.0 - outside) * resamples))]
