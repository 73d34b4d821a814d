"""The losses of a run, kept small in memory, and their picture `loss.png`."""

from __future__ import annotations

import contextlib
import math
from array import array
from pathlib import Path

from smolcluster.kinds import JsonObject

# The smoothed line averages over about this many steps of a run of n: n / 40, at least 1.
_SMOOTHING_PARTS = 40
_MISSING_MATPLOTLIB = 'no loss.png: it needs matplotlib. Install it: pip install "smolcluster[plot]"'


class LossCurves:
    """Training and validation loss by step, from rank 0's rows."""

    def __init__(self) -> None:
        # arrays: 8 bytes a number, so that a run of a million steps costs 16 MB and not 100
        self.steps = array("q")
        self.losses = array("d")
        self.val_steps = array("q")
        self.val_losses = array("d")

    def add(self, row: JsonObject) -> None:
        """Take what the row has; rows of other ranks repeat the same numbers and are passed over."""
        step, loss, val_loss = row.get("step"), row.get("train/loss"), row.get("val/loss")
        if row.get("rank") != 0 or not isinstance(step, int):
            return
        if isinstance(loss, int | float):
            self.steps.append(step)
            self.losses.append(loss)
        if isinstance(val_loss, int | float):
            self.val_steps.append(step)
            self.val_losses.append(val_loss)


def smoothed(values: array[float], window: int) -> list[float]:
    """Exponential average over about `window` values, without the bias towards 0 at the beginning."""
    decay = math.exp(-1.0 / window)
    total = weight = 0.0
    result = []
    for value in values:
        total = decay * total + (1.0 - decay) * value
        weight = decay * weight + (1.0 - decay)
        result.append(total / weight)
    return result


def draw_losses(curves: LossCurves, path: Path, title: str, unit: str = "") -> str | None:
    """Write the picture; blocks for about a second.

    Args:
        curves: what to draw.
        path: a `.png` file.
        title: what was trained, how, by how many ranks.
        unit: of the loss, such as "nats per byte".

    Returns:
        None, or in words why there is no picture.
    """
    if not curves.steps and not curves.val_steps:
        return "no loss.png: no step was finished"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return _MISSING_MATPLOTLIB
    figure = Figure(figsize=(8, 4.5), dpi=144, layout="constrained")  # no pyplot: it keeps global state
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train, val, quiet = "#2a6fbb", "#d9622b", "#8a8f98"
    window = max(1, len(curves.losses) // _SMOOTHING_PARTS)
    axes.plot(curves.steps, curves.losses, color=train, alpha=0.25 if window > 1 else 1.0, linewidth=1.0)
    if window > 1:
        axes.plot(curves.steps, smoothed(curves.losses, window), color=train, linewidth=2.0, label="training, smoothed")
    elif curves.steps:
        axes.lines[0].set_label("training")
    if curves.val_steps:
        axes.plot(
            curves.val_steps, curves.val_losses, color=val, linewidth=1.5, marker="o", markersize=5, label="validation"
        )
        axes.annotate(
            f"{curves.val_losses[-1]:.3f}",
            (curves.val_steps[-1], curves.val_losses[-1]),
            xytext=(0, -16),  # below it: training loss often lies above
            textcoords="offset points",
            ha="right",
            color=val,
        )
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=12)
    axes.set_xlabel("step", color=quiet)
    axes.set_ylabel(f"loss ({unit})" if unit else "loss", color=quiet)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=quiet)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c9cdd2")
    axes.margins(x=0.02, y=0.1)
    axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            path.unlink()  # half a picture
        return f"no loss.png: {path} cannot be written ({exc.strerror or exc})"
    return None
