"""The bubble that a pipeline really has, with stages that sleep. All cells: benchmarks/pipeline_bubble.py."""

from __future__ import annotations

import statistics

import pytest

from algorithms.sleepers import Cell, calibrate, measure

# What the issue asks for. Other processes only ever make a step longer, so the best of some attempts counts.
WITHIN = 0.1
ATTEMPTS = 3


@pytest.mark.parametrize("engine", ["local", "tcp"])
@pytest.mark.parametrize(
    "cell",
    [Cell("gpipe", 3, 4), Cell("1f1b", 3, 4), Cell("interleaved", 3, 4, 2), Cell("1f1b", 4, 8)],
    ids=lambda cell: f"{cell.schedule}-{cell.ranks}-{cell.micro_batches}",
)
def test_the_measured_bubble_is_that_of_the_formula(cell: Cell, engine: str) -> None:
    apart = []
    for _ in range(ATTEMPTS):
        late = calibrate(cell, engine)
        apart.append(statistics.median(measure(cell, late, 5, engine)) / cell.ideal - 1)
        if abs(apart[-1]) <= WITHIN:
            return
    pytest.fail(f"{cell} on {engine}: measured bubbles are {apart} away from {cell.ideal:.4f}")
