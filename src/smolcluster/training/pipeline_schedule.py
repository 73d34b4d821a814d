"""Pipeline schedules as data: for each rank the list of forward and backward passes that it runs, in order.

A model is cut into stages; stage s lies on rank s mod P, so with V stages a rank there are V * P of them. A batch is
cut into M micro-batches. Forward of micro-batch m goes through the stages upwards, backward downwards. A schedule says
only in which order each rank works; when it works follows from what it has to wait for.

    gpipe        all forwards, then all backwards: simple, and M micro-batches' activations are held at once
    1f1b         as soon as a backward can run it does: the same bubble, at most P micro-batches are held
    interleaved  1f1b with V > 1 stages a rank: filling the pipeline takes a V-th of the time, V times as many messages

A schedule is one step's. With `lag` it is the steady state of a pipeline that is never drained: then some backwards
belong to steps before, and have negative numbers.

Source: Huang et al. 2019, GPipe, arXiv:1811.06965, section 2.3; Narayanan et al. 2021, Efficient Large-Scale Language
Model Training on GPU Clusters Using Megatron-LM, arXiv:2104.04473, section 2.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from smolcluster.errors import ConfigError
from smolcluster.kinds import PipelineSchedule

Direction = Literal["F", "B"]


class Action(NamedTuple):
    """One forward ("F") or backward ("B") pass of a micro-batch through a stage."""

    direction: Direction
    stage: int
    micro: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """What each rank does in one step.

    Attributes:
        name: of the kind.
        ranks: P.
        stages_per_rank: V; stage s lies on rank s mod P.
        micro_batches: M.
        actions: for each rank, in order.
        lag: for each rank by how many micro-batches its backwards are behind; 0: each step ends with all of its own.
    """

    name: PipelineSchedule
    ranks: int
    stages_per_rank: int
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]
    lag: tuple[int, ...]

    @property
    def stages(self) -> int:
        """How many there are over all ranks."""
        return self.ranks * self.stages_per_rank


def make_schedule(
    name: PipelineSchedule, ranks: int, micro_batches: int, *, stages_per_rank: int = 2, max_lag: int = 0
) -> Schedule:
    """A schedule by its name.

    Args:
        name: "gpipe", "1f1b" or "interleaved".
        ranks: P.
        micro_batches: M.
        stages_per_rank: V, for "interleaved"; the others have 1.
        max_lag: micro-batches of earlier steps whose backward a step may still have to run (K * M). "interleaved"
            runs all its own.

    Raises:
        ConfigError: a number is below 1.
    """
    if name != "interleaved":
        stages_per_rank = 1
    for key, value in (("ranks", ranks), ("micro_batches", micro_batches), ("stages_per_rank", stages_per_rank)):
        if value < 1:
            raise ConfigError(f"a pipeline with {key} {value}: it must be at least 1")
    lag = [0] * ranks
    if max_lag and name != "interleaved":
        # What is filled once and never drained: each rank is as far behind as it would be after filling.
        lag = [min(max_lag, micro_batches if name == "gpipe" else ranks - 1 - rank) for rank in range(ranks)]
    if name == "gpipe":
        actions = [_gpipe(rank, micro_batches, lag[rank]) for rank in range(ranks)]
    elif any(lag):
        actions = [_stream(rank, micro_batches, lag[rank]) for rank in range(ranks)]
    else:
        actions = [_one_f_one_b(rank, ranks, micro_batches, stages_per_rank) for rank in range(ranks)]
    return Schedule(name, ranks, stages_per_rank, micro_batches, tuple(map(tuple, actions)), tuple(lag))


def _gpipe(rank: int, micro_batches: int, lag: int) -> list[Action]:
    forward = [Action("F", rank, micro) for micro in range(micro_batches)]
    return forward + [Action("B", rank, micro - lag) for micro in range(micro_batches)]


def _stream(rank: int, micro_batches: int, lag: int) -> list[Action]:
    each = [(Action("F", rank, micro), Action("B", rank, micro - lag)) for micro in range(micro_batches)]
    return [action for pair in each for action in pair]


def _one_f_one_b(rank: int, ranks: int, micro_batches: int, stages_per_rank: int) -> list[Action]:
    """Warm up with so many forwards that the first backward can follow, then one of each, then the rest.

    With several stages a rank, micro-batches go through in groups: each group through all its stages before the next
    one begins. A group has at least P of them, or a rank would wait between two of its stages; so M need not be a
    multiple of P.
    """
    groups = _groups(micro_batches, ranks)
    of_rank = [rank + number * ranks for number in range(stages_per_rank)]
    forwards = [Action("F", stage, micro) for group in groups for stage in of_rank for micro in group]
    backwards = [Action("B", stage, micro) for group in groups for stage in reversed(of_rank) for micro in group]
    warm_up = ranks - 1 - rank
    if stages_per_rank > 1:
        # There and back is twice the way, and all but the last stage come first.
        warm_up = 2 * warm_up + (stages_per_rank - 1) * len(groups[0])
    warm_up = min(warm_up, len(forwards))
    steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
    return forwards[:warm_up] + steady + backwards[len(forwards) - warm_up :]


def _groups(micro_batches: int, ranks: int) -> list[range]:
    """Runs of micro-batches, as equal as they can be, none shorter than `ranks` unless there are fewer."""
    number = max(1, micro_batches // ranks)
    size, longer = divmod(micro_batches, number)
    starts = [group * size + min(group, longer) for group in range(number + 1)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


@dataclass(frozen=True, slots=True)
class Span:
    """When an action runs, in units of time from 0."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a schedule gives if every stage takes equally long and messages take no time.

    Attributes:
        spans: for each rank, in order.
        duration: from the first action's start to the last one's end.
        bubble: part of the ranks' time in which they wait.
        held: for each rank the micro-batches, times stages, whose activations it holds at most at once.
    """

    spans: tuple[tuple[Span, ...], ...]
    duration: float
    bubble: float
    held: tuple[int, ...]


def check_schedule(schedule: Schedule) -> None:
    """Prove a schedule before anything is launched; any table, also one that `make_schedule` did not make.

    Each forward and backward of each micro-batch is there once, on the rank of its stage, the backward after its
    forward, and if every rank waits for what an action needs, all come to their end: no deadlock. With a lag this is
    shown for so many steps as hold it twice.

    Raises:
        ConfigError: it is not so; with the first action that is wrong.
    """
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.stage % schedule.ranks != rank or not 0 <= action.stage < schedule.stages:
                raise ConfigError(f"the schedule gives rank {rank} {describe(action)}, a stage that it does not have")
    steps = 1 if not any(schedule.lag) else 2 + 2 * -(-max(schedule.lag) // schedule.micro_batches)
    tables = [list(unrolled(schedule, rank, steps)) for rank in range(schedule.ranks)]
    for rank, table in enumerate(tables):
        _check_table(schedule, rank, table, steps * schedule.micro_batches)
    _run(schedule, tables, 1.0, 1.0)


def timeline(schedule: Schedule, forward: float = 1.0, backward: float = 2.0) -> Timeline:
    """Run one step of a schedule in thought.

    Args:
        schedule: without lag.
        forward: how long a stage's forward takes.
        backward: how long its backward takes; usually twice as long, and with activation checkpointing three times.

    Raises:
        ConfigError: the ranks wait for each other for ever.
    """
    spans = _run(schedule, [list(actions) for actions in schedule.actions], forward, backward)
    duration = max((ran[-1].end for ran in spans if ran), default=0.0)
    busy = sum(span.end - span.start for ran in spans for span in ran)
    bubble = 1 - busy / (duration * schedule.ranks) if duration else 0.0
    return Timeline(tuple(map(tuple, spans)), duration, bubble, tuple(_held(table) for table in schedule.actions))


def ideal_bubble(schedule: Schedule) -> float:
    """(P - 1) / (V M + P - 1), the least with these stages where backward takes a fixed multiple of forward's time."""
    fill = schedule.ranks - 1
    return fill / (schedule.stages_per_rank * schedule.micro_batches + fill)


def unrolled(schedule: Schedule, rank: int, steps: int) -> Iterator[Action]:
    """A rank's actions over several steps and until all is done, micro-batches numbered through."""
    late: list[Action] = []
    for step in range(steps):
        first = step * schedule.micro_batches
        for action in schedule.actions[rank]:
            if action.micro + first >= 0:
                yield action._replace(micro=action.micro + first)
    end = steps * schedule.micro_batches
    late = [Action("B", rank, micro) for micro in range(end - schedule.lag[rank], end)]
    yield from late


def describe(action: Action) -> str:
    """In words."""
    name = "forward" if action.direction == "F" else "backward"
    return f"the {name} of micro-batch {action.micro} in stage {action.stage}"


def needs(action: Action, stages: int) -> Action | None:
    """What has to be done before an action, on whichever rank; None: nothing."""
    if action.direction == "F":
        return action._replace(stage=action.stage - 1) if action.stage else None
    if action.stage == stages - 1:
        return action._replace(direction="F")
    return action._replace(stage=action.stage + 1)


def _check_table(schedule: Schedule, rank: int, table: Sequence[Action], micro_batches: int) -> None:
    done: set[Action] = set()
    for action in table:
        if action in done:
            raise ConfigError(f"the schedule of rank {rank} has {describe(action)} twice")
        if not 0 <= action.micro < micro_batches:
            raise ConfigError(f"the schedule of rank {rank} has {describe(action)}, but there is no such micro-batch")
        if action.direction == "B" and action._replace(direction="F") not in done:
            raise ConfigError(f"the schedule of rank {rank} has {describe(action)} before its forward")
        done.add(action)
    for stage in range(rank, schedule.stages, schedule.ranks):
        for micro in range(micro_batches):
            for direction in ("F", "B"):
                action = Action(direction, stage, micro)
                if action not in done:
                    raise ConfigError(f"the schedule of rank {rank} lacks {describe(action)}")


def _run(schedule: Schedule, tables: Sequence[Sequence[Action]], forward: float, backward: float) -> list[list[Span]]:
    ended: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in tables]
    is_moving = True
    while is_moving:
        is_moving = False
        for ran, table in zip(spans, tables, strict=True):
            while len(ran) < len(table):
                action = table[len(ran)]
                needed = needs(action, schedule.stages)
                if needed is not None and needed not in ended:
                    break
                start = max(ran[-1].end if ran else 0.0, ended[needed] if needed is not None else 0.0)
                ended[action] = start + (forward if action.direction == "F" else backward)
                ran.append(Span(action, start, ended[action]))
                is_moving = True
    stuck = [
        (rank, table[len(ran)])
        for rank, (ran, table) in enumerate(zip(spans, tables, strict=True))
        if len(ran) < len(table)
    ]
    if stuck:
        waiting = "; ".join(f"rank {rank} has to run {describe(action)}" for rank, action in stuck[:3])
        raise ConfigError(f"the schedule comes to a halt, as ranks wait for each other: {waiting}")
    return spans


def _held(table: Sequence[Action]) -> int:
    held = most = 0
    for action in table:
        held += 1 if action.direction == "F" else -1
        most = max(most, held)
    return most
