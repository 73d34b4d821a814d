"""The bubble of mp_pipeline, measured: how long ranks wait where computing is sleeping, beside (P-1) / (V M + P-1).

    python benchmarks/pipeline_bubble.py              all cells, a quarter of an hour
    python benchmarks/pipeline_bubble.py --short      one cell of each schedule

Ranks are threads of one process with connections over loopback; a stage is a layer that sleeps in forward, and twice as
long in backward. Sleeping needs no core, so two cores are enough for four ranks. What a pass takes besides (Python,
autograd, waking up late) is measured on one rank and taken off its sleep: what remains is waiting, for other ranks and
for messages. All cells take turns; printed and saved are the median of the repeats, the lowest and the highest. It
exits 1 if a median is more than 10 % away from the formula.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from machine import save

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from algorithms.sleepers import Cell, calibrate, measure
from smolcluster.device import prepare_process
from smolcluster.kinds import PipelineSchedule

SCHEDULES: list[tuple[PipelineSchedule, int]] = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)]
RANKS, MICRO_BATCHES = (2, 3, 4), (4, 8, 16)
WITHIN = 0.1
# Than in the tests: what threads of one interpreter cost each other is less beside them.
LONGER = 1.5


def row(cell: Cell, late: float, found: list[float]) -> dict[str, Any]:
    """What was measured of a cell."""
    forward, backward = cell.sleeps
    bubble = statistics.median(found)
    step_s = cell.work / (1 - bubble)
    passes = 2 * cell.micro_batches * cell.stages_per_rank
    return {
        "schedule": cell.schedule, "ranks": cell.ranks, "micro_batches": cell.micro_batches,
        "stages_per_rank": cell.stages_per_rank, "forward_s": round(forward, 4), "backward_s": round(backward, 4),
        "taken_off_ms": round(1e3 * late, 3), "ideal": round(cell.ideal, 5), "bubble": round(bubble, 5),
        "apart": round(bubble / cell.ideal - 1, 4), "bubbles": [round(value, 5) for value in found],
        "more_per_pass_ms": round(1e3 * (step_s - cell.work / (1 - cell.ideal)) / passes, 3),
    }  # fmt: skip


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", default="tcp", choices=["tcp", "shm", "inproc", "local"])
    parser.add_argument("--short", action="store_true", help="P = 3 and M = 4 only; saves nothing")
    arguments = parser.parse_args()
    prepare_process()
    sizes = [(3, 4)] if arguments.short else [(ranks, count) for ranks in RANKS for count in MICRO_BATCHES]
    cells = [Cell(name, *size, stages, LONGER) for size in sizes for name, stages in SCHEDULES]
    late = {cell: calibrate(cell, arguments.engine) for cell in cells}
    found: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for _ in range(arguments.repeats):
        for cell in cells:
            found[cell] += measure(cell, late[cell], 1, arguments.engine)
    rows = [row(cell, late[cell], found[cell]) for cell in cells]
    print(f"{'schedule':>12} {'P':>2} {'M':>3} {'V':>2} {'formula':>8} {'measured':>8}  lowest to highest   apart")
    for one in rows:
        low, high = min(one["bubbles"]), max(one["bubbles"])
        print(
            f"{one['schedule']:>12} {one['ranks']:>2} {one['micro_batches']:>3} {one['stages_per_rank']:>2} "
            f"{one['ideal']:>8.4f} {one['bubble']:>8.4f}  {low:.4f} to {high:.4f}  {one['apart']:>+7.1%}"
        )
    if not arguments.short:
        save("pipeline_bubble", {"engine": arguments.engine, "repeats": arguments.repeats, "rows": rows})
    far = [one for one in rows if abs(one["apart"]) > WITHIN]
    if far:
        sys.exit(f"{len(far)} of {len(rows)} cells are more than {WITHIN:.0%} from the formula")


if __name__ == "__main__":
    main()
