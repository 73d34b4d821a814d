"""The picture of the three schedules in docs/pipeline.md: what `smolcluster plan pipeline` draws, one below the other.

python docs/figures/pipeline_schedules.py      draws pipeline_schedules.svg
"""

from __future__ import annotations

from pathlib import Path

from smolcluster.cli.plan import draw, draw_legend
from smolcluster.training.pipeline_schedule import make_schedule, timeline

PICTURE = Path(__file__).resolve().parents[1] / "images" / "pipeline_schedules.svg"
RANKS, MICRO_BATCHES = 3, 4
TICKS = 3 * (MICRO_BATCHES + RANKS - 1)  # of the first two; the third needs fewer
WIDTH = 9.6  # inches


def main() -> None:
    """Draw all three on the same scale: a stage of interleaved has half the layers, and takes half as long."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"svg.fonttype": "none", "svg.hashsalt": "pipeline", "font.family": "sans-serif"}
    with plt.rc_context(style):
        figure, rows = plt.subplots(3, 1, figsize=(WIDTH, 7.6), layout="constrained")
        for axes, name in zip(rows, ("gpipe", "1f1b", "interleaved"), strict=True):
            schedule = make_schedule(name, RANKS, MICRO_BATCHES)
            forward = 1 / schedule.stages_per_rank
            draw(axes, schedule, timeline(schedule, forward, 2 * forward), (WIDTH - 1.6) / TICKS)
            axes.set_xlim(0, TICKS)
            axes.set_xlabel("")
        rows[-1].set_xlabel("time: a forward through all layers of a rank takes 1", color="#707b89")
        draw_legend(rows[0])
        figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
