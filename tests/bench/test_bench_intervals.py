"""The bootstrap interval: right where the answer is known, and as wide as the data are scattered."""

import random
import statistics
from collections.abc import Sequence

from smolcluster.bench.intervals import bootstrap_interval


def test_equal_rows_have_an_interval_without_width() -> None:
    assert bootstrap_interval([1.25] * 20, statistics.median) == (1.25, 1.25)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    generator = random.Random(3)
    rows = [generator.gauss(10.0, 2.0) for _ in range(400)]
    low, high = bootstrap_interval(rows, statistics.fmean)
    half_width = 1.96 * statistics.stdev(rows) / 400**0.5
    # 4000 draws put the ends within a few percent of the interval's own width.
    assert abs(low - (statistics.fmean(rows) - half_width)) < 0.1 * half_width
    assert abs(high - (statistics.fmean(rows) + half_width)) < 0.1 * half_width


def test_95_of_100_intervals_hold_the_true_median() -> None:
    generator = random.Random(5)
    held = 0
    for _ in range(100):
        low, high = bootstrap_interval([generator.gauss(1.0, 0.1) for _ in range(25)], statistics.median, resamples=400)
        held += low <= 1.0 <= high
    # 95 are expected; a binomial of 100 is below 88 in one of a thousand cases, and the seed is fixed.
    assert held >= 88


def test_rows_of_a_pair_stay_together() -> None:
    rows = [(scale, 1.1 * scale) for scale in (1.0, 5.0, 2.0, 9.0)]  # the scale is the weather, the ratio is not

    def ratio(rows: Sequence[tuple[float, float]]) -> float:
        return statistics.median(theirs / ours for ours, theirs in rows)

    low, high = bootstrap_interval(rows, ratio)
    assert abs(low - 1.1) < 1e-12
    assert abs(high - 1.1) < 1e-12


def test_the_same_rows_give_the_same_interval() -> None:
    rows = [0.9, 1.0, 1.2, 1.1, 0.95, 1.3]
    assert bootstrap_interval(rows, statistics.median) == bootstrap_interval(rows, statistics.median)
