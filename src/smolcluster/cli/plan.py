"""`smolcluster plan pipeline`: what a pipeline's ranks will do, before anything runs. Does not import torch."""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from smolcluster.errors import ConfigError
from smolcluster.kinds import JsonObject, JsonValue, PipelineSchedule
from smolcluster.training.pipeline_schedule import (
    Action,
    Schedule,
    Span,
    Timeline,
    check_schedule,
    ideal_bubble,
    make_schedule,
    timeline,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Characters of a line of the table: what a terminal beside an editor still shows.
_LINE_WIDTH = 100
# Ranks times ticks. Above it nobody reads the table, and the picture takes minutes.
_MAX_CELLS = 20_000
# Of --json, which programs read. The proof takes seconds here, and grows with the square.
_MAX_JSON_CELLS = 200_000
# Stages of each rank, for interleaved.
_PER_RANK = 2
_SUFFIXES = (".png", ".svg", ".pdf")
_MISSING_MATPLOTLIB = 'no picture: it needs matplotlib. Install it: pip install "smolcluster[plot]"'

_INK, _QUIET, _EMPTY = "#3c4654", "#707b89", "#f1f3f5"
# Luma of forward and of backward: far enough apart that they differ in grey print too.
_LIGHT, _DARK = 0.82, 0.40
_CHROMA = 0.17  # more of it leaves what a screen can show

app = typer.Typer(name="plan", help="Show what a run will do, before it runs.", no_args_is_help=True)


@app.callback()
def plan() -> None:
    """Show what a run will do, before it runs."""


@app.command()
def pipeline(
    stages: Annotated[int, typer.Option(metavar="P", help="Ranks, each with a stage of the model.")],
    micro_batches: Annotated[int, typer.Option(metavar="M", help="Parts that a step's batch is cut into.")],
    schedule: Annotated[
        str, typer.Option(metavar="gpipe|1f1b|interleaved", help="In which order ranks work.")
    ] = "1f1b",
    per_rank: Annotated[
        int | None, typer.Option(metavar="V", help=f"Stages of each rank, for interleaved. Default: {_PER_RANK}.")
    ] = None,
    backward: Annotated[
        int, typer.Option(metavar="B", help="Ticks of a backward; a forward takes 1. Activation checkpointing: 3.")
    ] = 2,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture. Default: pipeline-SCHEDULE-P-M.png, here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Table and picture of mp_pipeline: who computes what when, how long ranks wait, how much they hold."""
    made = _make(schedule, stages, micro_batches, per_rank, backward, _MAX_JSON_CELLS if as_json else _MAX_CELLS)
    times = timeline(made, 1, backward)
    path = out or Path(f"pipeline-{schedule}-{stages}-{micro_batches}.png")
    _check_path(path)
    if as_json:
        picture: str | None = None
        try:
            picture = _save_if_readable(made, times, path, is_asked_for=out is not None)
        finally:  # the plan does not depend on the picture
            print(json.dumps(_as_json(made, times) | {"backward": backward, "picture": picture}))
        return
    print("\n".join(heading_lines(made, backward)))
    print()
    print("\n".join(table_lines(made, times)))
    print()
    print("\n".join(summary_lines(made, times)), flush=True)  # before what may be said of the picture
    print(save_picture(made, times, path) or f"picture: {path}")


def heading_lines(schedule: Schedule, backward: int) -> list[str]:
    """What is shown, and how to read the table."""
    ticks = "1 tick" if backward == 1 else f"{backward} ticks"
    where = "" if schedule.stages_per_rank == 1 else f"; @{schedule.ranks}: in stage {schedule.ranks}, of rank 0"
    return [
        f"{_title(schedule)}",
        f"F0: forward of micro-batch 0, 1 tick; B0: its backward, {ticks}{where}; a dot: waiting",
    ]


def table_lines(schedule: Schedule, times: Timeline) -> list[str]:
    """A line per rank, a column per tick; cut into parts that fit on a screen."""
    ticks = round(times.duration)
    width = 1 + max(len(_cell(span.action, schedule)) for ran in times.spans for span in ran)
    width = max(width, 1 + len(str(ticks - 1)))
    rows = [
        [f"{tick:<{width}}" for tick in range(ticks)],
        *(_cells(ran, schedule, ticks, width) for ran in times.spans),
    ]
    heads = ["tick", *(f"rank {rank}" for rank in range(schedule.ranks))]
    head_width = 2 + max(map(len, heads))
    parts = math.ceil(ticks / ((_LINE_WIDTH - head_width) // width))
    per_part = math.ceil(ticks / parts)
    lines: list[str] = []
    for first in range(0, ticks, per_part):
        if lines:
            lines.append("")
        for head, row in zip(heads, rows, strict=True):
            lines.append(f"{head:<{head_width}}{''.join(row[first : first + per_part])}".rstrip())
    return lines


def summary_lines(schedule: Schedule, times: Timeline) -> list[str]:
    """Bubble and memory, in words."""
    ideal, fill = ideal_bubble(schedule), schedule.ranks - 1
    work = "" if schedule.stages_per_rank == 1 else f"{schedule.stages_per_rank}*"
    work += str(schedule.micro_batches)
    lines = [
        f"bubble: {times.bubble:.1%} of the ranks' time is waiting; the least there can be is "
        f"{fill}/({work}+{fill}) = {ideal:.1%}"
    ]
    if schedule.stages_per_rank > 1 and schedule.micro_batches < schedule.ranks:
        lines.append(f"  (interleaved needs at least as many micro-batches as ranks, {schedule.ranks}, to reach it)")
    unit = "micro-batches" if schedule.stages_per_rank == 1 else "micro-batches times stages"
    lines.append(f"memory: at most so many {unit} wait for their backward, each with all activations of a stage:")
    lines.append("  " + ", ".join(f"rank {rank}: {held}" for rank, held in enumerate(times.held)))
    if schedule.stages_per_rank > 1:
        lines.append(f"  (a stage is 1/{schedule.stages_per_rank} of a rank's layers here)")
    return lines


def save_picture(schedule: Schedule, times: Timeline, path: Path) -> str | None:
    """Write the picture; blocks for about a second.

    Args:
        schedule: for the title.
        times: what to draw.
        path: a .png, .svg or .pdf file.

    Returns:
        None, or in words why there is no picture.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return _MISSING_MATPLOTLIB
    size = min(26.0, max(7.0, 2.2 + 0.36 * times.duration)), 1.6 + 0.52 * schedule.ranks
    figure = Figure(figsize=size, dpi=144, layout="constrained")  # no pyplot: it keeps global state
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, schedule, times, (size[0] - 1.8) / times.duration)
    draw_legend(axes)
    try:
        figure.savefig(path)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written ({exc.strerror or exc}). Choose another --out") from exc
    return None


def draw(axes: Axes, schedule: Schedule, times: Timeline, tick_inches: float) -> None:
    """Draw a timeline: a row per rank, a bar per pass, coloured by micro-batch; backwards are dark and hatched.

    Args:
        axes: empty.
        schedule: for the title.
        times: what to draw.
        tick_inches: how wide a tick will be; numbers that do not fit are left out.
    """
    from matplotlib.ticker import MaxNLocator

    for rank, ran in enumerate(times.spans):
        for span in ran:
            _draw_span(axes, span, rank, schedule, tick_inches)
        place = times.duration + 0.12 / tick_inches
        axes.text(place, rank, f"holds {times.held[rank]}", va="center", fontsize=9, color=_QUIET)
    axes.set_yticks(range(schedule.ranks), [f"rank {rank}" for rank in range(schedule.ranks)])
    axes.set_ylim(schedule.ranks - 0.45, -0.55)
    axes.set_xlim(0, times.duration)
    number = "micro-batch" if schedule.stages_per_rank == 1 else "micro-batch, s: stage"
    axes.set_xlabel(f"ticks: a forward takes 1. Number: {number}", color=_QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(length=0, colors=_INK)
    axes.set_facecolor(_EMPTY)  # what is not covered is the bubble
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(
        f"{_title(schedule)}. Bubble {times.bubble:.1%}",
        loc="left", fontsize=12, fontweight="bold", color=_INK, pad=26,
    )  # fmt: skip


def draw_legend(axes: Axes) -> None:
    """Say above the axes what the bars are."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=_color(0, 3, _LIGHT), edgecolor="#ffffff", label="forward (light)"),
        Patch(facecolor=_color(0, 3, _DARK), edgecolor="#ffffff", hatch="////", label="backward (dark, hatched)"),
        Patch(facecolor=_EMPTY, edgecolor="#c9cdd2", label="waiting"),
    ]
    axes.legend(
        handles=handles, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=9,
        labelcolor=_INK, borderaxespad=0.2, handlelength=1.6,
    )  # fmt: skip


def _draw_span(axes: Axes, span: Span, rank: int, schedule: Schedule, inches: float) -> None:
    direction, stage, micro = span.action
    is_forward = direction == "F"
    color = _color(micro, schedule.micro_batches, _LIGHT if is_forward else _DARK)
    width, gap = span.end - span.start, 0.012 / inches
    axes.broken_barh(
        [(span.start + gap, width - 2 * gap)], (rank - 0.4, 0.8), facecolor=color, edgecolor=(1.0, 1.0, 1.0, 0.35),
        linewidth=0, hatch=None if is_forward else "////",
    )  # fmt: skip
    points = min(9.0, 72 * inches * width / 1.6)
    if points < 4:
        return
    text = str(micro) if schedule.stages_per_rank == 1 else f"{micro}\ns{stage}"
    ink = _INK if is_forward else "#ffffff"
    axes.text(span.start + width / 2, rank, text, ha="center", va="center", fontsize=points, color=ink)


def _color(micro: int, micro_batches: int, luma: float) -> tuple[float, float, float]:
    """Neighbours differ in hue: once around the circle, with many micro-batches several times. Luma is grey's."""
    angle = 2 * math.pi * (0.6 + micro / min(micro_batches, 8))
    return colorsys.yiq_to_rgb(luma, _CHROMA * math.cos(angle), _CHROMA * math.sin(angle))


def _title(schedule: Schedule) -> str:
    of_each = f", {schedule.stages_per_rank} stages each" if schedule.stages_per_rank > 1 else ""
    return (
        f"{schedule.name}: {_count(schedule.ranks, 'rank')}{of_each}, {_count(schedule.micro_batches, 'micro-batch')}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('h') else 's'}"


def _cells(ran: Sequence[Span], schedule: Schedule, ticks: int, width: int) -> list[str]:
    """A rank's line, tick by tick."""
    cells = [f"{'.':<{width}}"] * ticks
    for span in ran:
        first, last = round(span.start), round(span.end)
        fill = "-" if last - first > 1 else " "
        bar = f"{_cell(span.action, schedule):{fill}<{(last - first) * width - 1}} "
        for tick in range(first, last):
            cells[tick] = bar[(tick - first) * width :][:width]
    return cells


def _cell(action: Action, schedule: Schedule) -> str:
    of_stage = f"@{action.stage}" if schedule.stages_per_rank > 1 else ""
    return f"{action.direction}{action.micro}{of_stage}"


def _make(name: str, ranks: int, micro_batches: int, per_rank: int | None, backward: int, max_cells: int) -> Schedule:
    """A schedule from what a user typed, proved."""
    stages_per_rank = _PER_RANK if per_rank is None else per_rank
    for option, value in (
        ("--stages", ranks), ("--micro-batches", micro_batches), ("--per-rank", stages_per_rank),
        ("--backward", backward),
    ):  # fmt: skip
        if value < 1:
            raise ConfigError(f"{option} {value}: give a whole number of 1 or more")
    stages = stages_per_rank if name == "interleaved" else 1
    if per_rank is not None and per_rank != stages and name in ("gpipe", "1f1b"):
        raise ConfigError(
            f"--per-rank {per_rank}: with --schedule {name} each rank has one stage. Give --schedule interleaved, or "
            "leave it out"
        )
    cells = ranks * (stages * micro_batches + ranks - 1) * (1 + backward)
    if cells > max_cells:
        readers = "anybody reads" if max_cells == _MAX_CELLS else "is worth waiting for"
        raise ConfigError(
            f"a table of {cells} cells is more than {readers} ({max_cells}). Give fewer --micro-batches or "
            "--stages: the pattern repeats"
        )
    schedule = make_schedule(cast("PipelineSchedule", name), ranks, micro_batches, stages_per_rank=stages_per_rank)
    check_schedule(schedule)
    return schedule


def _save_if_readable(schedule: Schedule, times: Timeline, path: Path, *, is_asked_for: bool) -> str | None:
    """The picture's path, or None if there is none; what is too large to be looked at is drawn only if asked for."""
    if not is_asked_for and schedule.ranks * times.duration > _MAX_CELLS:
        return None
    return None if save_picture(schedule, times, path) else str(path)


def _check_path(path: Path) -> None:
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--out {path}: the picture's name has to end in one of {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}. Make it, or choose another one")


def _as_json(schedule: Schedule, times: Timeline) -> JsonObject:
    ranks: list[JsonValue] = []
    for rank, ran in enumerate(times.spans):
        actions: list[JsonValue] = [{**s.action._asdict(), "start": s.start, "end": s.end} for s in ran]
        ranks.append({"rank": rank, "held": times.held[rank], "actions": actions})
    return {
        "schedule": schedule.name, "stages": schedule.ranks, "per_rank": schedule.stages_per_rank,
        "micro_batches": schedule.micro_batches, "ticks": times.duration, "bubble": times.bubble,
        "ideal_bubble": ideal_bubble(schedule), "ranks": ranks,
    }  # fmt: skip
