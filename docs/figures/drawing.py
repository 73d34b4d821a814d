"""What the pictures of measured spans have in common: rows of bars over time, without a background of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#707b89"  # reads on white and on black
FORWARD, BACKWARD, WAITING, NETWORK, UPDATE = "#7aa6c2", "#2f6d9a", "#b9c2cd", "#e0782f", "#8c4f9f"


@contextmanager
def bars_over_time(
    picture: Path,
    rows: Sequence[tuple[float, str]],
    legend: Mapping[str, str],
    *,
    unit: str = "milliseconds",
    size: tuple[float, float] = (8.6, 3.3),
) -> Iterator[Any]:
    """Draw into the axes that this gives; afterwards `picture` is written, as SVG.

    Args:
        picture: the file.
        rows: where each one lies, and its name.
        legend: names by colour.
        unit: of the time.
        size: inches.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    style = {"svg.fonttype": "none", "svg.hashsalt": picture.stem, "font.family": "sans-serif", "font.size": 10.5}
    with plt.rc_context({**style, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure, axes = plt.subplots(figsize=size)
        yield axes
        axes.set_yticks([place for place, _ in rows], [name for _, name in rows])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.tick_params(length=0)
        axes.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        handles = [Patch(color=color, label=name) for color, name in legend.items()]
        axes.legend(handles=handles, ncols=5, loc="lower center", bbox_to_anchor=(0.46, 1.0), frameon=False)
        figure.tight_layout()
        figure.savefig(picture, transparent=True, metadata={"Date": None})


def bar(axes: Any, row: float, start_s: float, end_s: float, color: str, height: float = 0.8) -> None:
    """A bar in a row, in milliseconds."""
    axes.broken_barh([(1000 * start_s, 1000 * (end_s - start_s))], (row - height / 2, height), color=color, linewidth=0)
