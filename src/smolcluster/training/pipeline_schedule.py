"""Pipeline schedules as data: for each rank the list of forward and backward passes that it runs, in order.

A model is cut into stages; stage s lies on rank s mod P, so with V stages a rank there are V * P of them. A batch is
cut into M micro-batches. Forward of micro-batch m goes through the stages upwards, backward downwards. A schedule says
only in which order each rank works; when it works follows from what it has to wait for.

    gpipe        all forwards, then all backwards: simple, and M micro-batches' activations are held at once
    1f1b         as soon as a backward can run it does: the same bubble, at most P micro-batches are held
    interleaved  1f1b with V > 1 stages a rank: filling the pipeline takes a V-th of the time, V times as many messages

A schedule is one step's. With `lag` it is a step of a pipeline that is never drained: some backwards belong to steps
before, and have negative numbers.

Source: Huang et al. 2019, GPipe, arXiv:1811.06965, section 2.3; Narayanan et al. 2021, Efficient Large-Scale Language
Model Training on GPU Clusters Using Megatron-LM, arXiv:2104.04473, section 2.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

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
        ConfigError: there is no such schedule, or a number is below 1.
    """
    if name not in get_args(PipelineSchedule):
        raise ConfigError(f"schedule {name} is unknown. Use one of {', '.join(get_args(PipelineSchedule))}")
    if name != "interleaved":
        stages_per_rank = 1
    for key, value in (("ranks", ranks), ("micro_batches", micro_batches), ("stages_per_rank", stages_per_rank)):
        if value < 1:
            raise ConfigError(f"a pipeline with {key} {value} cannot be: give 1 or more")
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
    forward, and if every rank waits for what an action needs, all come to their end: no deadlock. A step with a lag
    begins with what the steps before have left and leaves the same: if one comes to its end, all do.

    Raises:
        ConfigError: it is not so; with the first action that is wrong.
    """
    if not len(schedule.actions) == len(schedule.lag) == schedule.ranks:
        raise ConfigError(
            f"the schedule is of {schedule.ranks} ranks, but has actions for {len(schedule.actions)} and a lag for "
            f"{len(schedule.lag)}. Give one of each per rank"
        )
    for rank in range(schedule.ranks):
        _check_rank(schedule, rank)
    _run(schedule, 1.0, 1.0)


def timeline(schedule: Schedule, forward: float = 1.0, backward: float = 2.0) -> Timeline:
    """Run one step of a schedule in thought.

    Args:
        schedule: of one with a lag the first micro-batch still has to come up through the ranks; the backwards of
            earlier steps need not wait.
        forward: how long a stage's forward takes.
        backward: how long its backward takes; usually twice as long, and with activation checkpointing three times.

    Raises:
        ConfigError: the ranks wait for each other for ever.
    """
    spans = _run(schedule, forward, backward)
    duration = max((ran[-1].end for ran in spans if ran), default=0.0)
    busy = sum(span.end - span.start for ran in spans for span in ran)
    bubble = 1 - busy / (duration * schedule.ranks) if duration else 0.0
    held = tuple(
        _held(actions, lag * schedule.stages_per_rank)
        for actions, lag in zip(schedule.actions, schedule.lag, strict=True)
    )
    return Timeline(tuple(map(tuple, spans)), duration, bubble, held)


def ideal_bubble(schedule: Schedule) -> float:
    """(P - 1) / (V M + P - 1), the least with these stages where backward takes a fixed multiple of forward's time."""
    fill = schedule.ranks - 1
    return fill / (schedule.stages_per_rank * schedule.micro_batches + fill)


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


def _check_rank(schedule: Schedule, rank: int) -> None:
    own, count, lag = range(rank, schedule.stages, schedule.ranks), schedule.micro_batches, schedule.lag[rank]
    due = [Action("F", stage, micro) for stage in own for micro in range(count)]
    due += [Action("B", stage, micro - lag) for stage in own for micro in range(count)]
    left, done = set(due), set[Action]()
    for action in schedule.actions[rank]:
        if action in done:
            raise ConfigError(f"the schedule of rank {rank} has {describe(action)} twice")
        if action not in left:
            raise ConfigError(
                f"the schedule of rank {rank} has {describe(action)}. What it may have: stages {list(own)}, forwards "
                f"of micro-batches 0 to {count - 1}, backwards of {-lag} to {count - 1 - lag}"
            )
        if action.direction == "B" and action.micro >= 0 and action._replace(direction="F") not in done:
            raise ConfigError(f"the schedule of rank {rank} has {describe(action)} before its forward")
        left.remove(action)
        done.add(action)
    if left:
        missing = next(action for action in due if action in left)
        raise ConfigError(f"the schedule of rank {rank} lacks {describe(missing)}")


def _run(schedule: Schedule, forward: float, backward: float) -> list[list[Span]]:
    """Let every rank go on as far as it can, in turn, until none can."""
    ended: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.actions]

    def ready_at(action: Action) -> float | None:
        needed = needs(action, schedule.stages)
        if needed is None or _was_before(needed, schedule):
            return 0.0
        return ended.get(needed)

    is_moving = True
    while is_moving:
        is_moving = False
        for ran, actions in zip(spans, schedule.actions, strict=True):
            for action in actions[len(ran) :]:
                ready = ready_at(action)
                if ready is None:
                    break
                start = max(ready, ran[-1].end if ran else 0.0)
                ended[action] = start + (forward if action.direction == "F" else backward)
                ran.append(Span(action, start, ended[action]))
                is_moving = True
    stuck = [
        f"rank {rank} has to run {describe(actions[len(ran)])}"
        for rank, (ran, actions) in enumerate(zip(spans, schedule.actions, strict=True))
        if len(ran) < len(actions)
    ]
    if stuck:
        raise ConfigError(f"the schedule comes to a halt, as ranks wait for each other: {'; '.join(stuck[:3])}")
    return spans


def _was_before(action: Action, schedule: Schedule) -> bool:
    """Whether an action was done in the steps before this one."""
    lag = 0 if action.direction == "F" else schedule.lag[action.stage % schedule.ranks]
    return action.micro < -lag


def _held(actions: Sequence[Action], before: int) -> int:
    held = most = before
    for action in actions:
        held += 1 if action.direction == "F" else -1
        most = max(most, held)
    return most
