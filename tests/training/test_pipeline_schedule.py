"""Schedules as data: what they promise, and that `check_schedule` accepts what ends and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolcluster.errors import ConfigError
from smolcluster.kinds import PipelineSchedule
from smolcluster.training.pipeline_schedule import (
    Action,
    Schedule,
    check_schedule,
    ideal_bubble,
    make_schedule,
    needs,
    timeline,
)

KINDS: list[tuple[PipelineSchedule, int]] = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)]
every_kind = pytest.mark.parametrize(("name", "stages_per_rank"), KINDS)
every_rank_count = pytest.mark.parametrize("ranks", range(1, 9))
# Sums of whole numbers and one division: what two ways of writing a fraction may differ by.
ROUNDING = 1e-12


def schedules(name: PipelineSchedule, ranks: int, stages_per_rank: int) -> Iterator[Schedule]:
    """For 1 to 32 micro-batches."""
    for micro_batches in range(1, 33):
        yield make_schedule(name, ranks, micro_batches, stages_per_rank=stages_per_rank)


@every_kind
@every_rank_count
def test_check_schedule_accepts_what_make_schedule_makes(
    name: PipelineSchedule, stages_per_rank: int, ranks: int
) -> None:
    for schedule in schedules(name, ranks, stages_per_rank):
        check_schedule(schedule)


@every_kind
@every_rank_count
def test_in_time_a_backward_follows_its_forward_and_a_stage_the_one_before(
    name: PipelineSchedule, stages_per_rank: int, ranks: int
) -> None:
    for schedule in schedules(name, ranks, stages_per_rank):
        spans = [span for of_rank in timeline(schedule).spans for span in of_rank]
        start = {span.action: span.start for span in spans}
        end = {span.action: span.end for span in spans}
        assert len(spans) == len(start) == 2 * schedule.stages * schedule.micro_batches
        for stage in range(schedule.stages):
            for micro in range(schedule.micro_batches):
                forward, backward = Action("F", stage, micro), Action("B", stage, micro)
                assert start[backward] >= end[forward]
                if stage:
                    assert start[forward] >= end[Action("F", stage - 1, micro)]
                    assert start[Action("B", stage - 1, micro)] >= end[backward]


@every_kind
@every_rank_count
def test_each_stage_takes_the_micro_batches_in_order(name: PipelineSchedule, stages_per_rank: int, ranks: int) -> None:
    for schedule in schedules(name, ranks, stages_per_rank):
        for rank, actions in enumerate(schedule.actions):
            for stage in range(rank, schedule.stages, ranks):
                for direction in ("F", "B"):
                    order = [a.micro for a in actions if (a.direction, a.stage) == (direction, stage)]
                    assert order == list(range(schedule.micro_batches))


@every_kind
@every_rank_count
def test_a_rank_does_one_thing_at_a_time(name: PipelineSchedule, stages_per_rank: int, ranks: int) -> None:
    for schedule in schedules(name, ranks, stages_per_rank):
        for of_rank in timeline(schedule, 1, 1).spans:
            ticks = [span.start for span in of_rank]
            assert all(float(tick).is_integer() for tick in ticks)
            assert len(set(ticks)) == len(ticks)
            assert all(later.start >= span.end for span, later in itertools.pairwise(of_rank))


@every_kind
@every_rank_count
@pytest.mark.parametrize("backward", [1, 2])
def test_the_bubble_is_the_least_there_can_be(
    name: PipelineSchedule, stages_per_rank: int, ranks: int, backward: int
) -> None:
    for schedule in schedules(name, ranks, stages_per_rank):
        bubble = timeline(schedule, 1, backward).bubble
        # With fewer micro-batches than ranks the first one is not back at rank 0 when the last one has left it.
        if stages_per_rank == 1 or schedule.micro_batches >= ranks:
            assert bubble == pytest.approx(ideal_bubble(schedule), abs=ROUNDING)
        else:
            assert bubble >= ideal_bubble(schedule) - ROUNDING


@every_rank_count
def test_gpipe_holds_all_micro_batches_and_1f1b_as_many_as_ranks_are_behind(ranks: int) -> None:
    for micro_batches in range(1, 33):
        gpipe, one_f_one_b = (make_schedule(name, ranks, micro_batches) for name in ("gpipe", "1f1b"))
        assert timeline(gpipe).held == (micro_batches,) * ranks
        assert timeline(one_f_one_b).held == tuple(min(micro_batches, ranks - rank) for rank in range(ranks))


@pytest.mark.parametrize("stages_per_rank", [2, 3])
@every_rank_count
def test_interleaved_holds_no_more_than_two_ways_through_the_ranks_and_a_group_per_further_stage(
    ranks: int, stages_per_rank: int
) -> None:
    for schedule in schedules("interleaved", ranks, stages_per_rank):
        group = min(2 * ranks - 1, schedule.micro_batches)  # micro-batches go through in groups of P to 2 P - 1
        for rank, held in enumerate(timeline(schedule).held):
            assert held <= min(
                schedule.stages_per_rank * schedule.micro_batches,
                2 * (ranks - 1 - rank) + (stages_per_rank - 1) * group + 1,
            )


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("bound", [1, 2, 3])
@every_rank_count
def test_a_pipeline_that_is_never_drained_passes_and_holds_what_it_is_behind(
    name: PipelineSchedule, bound: int, ranks: int
) -> None:
    for micro_batches in range(1, 33):
        schedule = make_schedule(name, ranks, micro_batches, max_lag=bound * micro_batches)
        check_schedule(schedule)
        assert max(schedule.lag) <= bound * micro_batches
        assert schedule.lag[-1] == (micro_batches if name == "gpipe" else 0)
        for rank, held in enumerate(timeline(schedule).held):
            assert held == schedule.lag[rank] + (micro_batches if name == "gpipe" else 1)


def test_a_step_with_a_lag_runs_the_last_steps_backwards_between_its_forwards() -> None:
    schedule = make_schedule("1f1b", 3, 4, max_lag=4)
    assert schedule.lag == (2, 1, 0)
    assert [(a.direction, a.micro) for a in schedule.actions[0]] == [
        ("F", 0), ("B", -2), ("F", 1), ("B", -1), ("F", 2), ("B", 0), ("F", 3), ("B", 1),
    ]  # fmt: skip


def test_interleaved_runs_all_its_own_backwards_whatever_the_lag_may_be() -> None:
    assert make_schedule("interleaved", 3, 4, max_lag=8) == make_schedule("interleaved", 3, 4)


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches", "message"),
    [
        ("gpipe", 0, 4, "ranks 0 cannot be: give 1 or more"),
        ("1f1b", 2, 0, "micro_batches 0 cannot be"),
        ("zigzag", 2, 4, "schedule zigzag is unknown. Use one of gpipe, 1f1b, interleaved"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(
    name: PipelineSchedule, ranks: int, micro_batches: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_schedule(name, ranks, micro_batches)


def broken(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    """With another table for one rank."""
    tables = [*schedule.actions[:rank], tuple(actions), *schedule.actions[rank + 1 :]]
    return replace(schedule, actions=tuple(tables))


F, B = "F", "B"
WHOLE = make_schedule("1f1b", 2, 2)  # rank 0: F0 F1 B0 B1; rank 1: F0 B0 F1 B1


@pytest.mark.parametrize(
    ("rank", "actions", "message"),
    [
        (0, [(F, 0, 0), (F, 0, 1), (B, 0, 0)], "rank 0 lacks the backward of micro-batch 1 in stage 0"),
        (
            0,
            [(F, 0, 0), (B, 0, 0), (B, 0, 1)],
            "rank 0 has the backward of micro-batch 1 in stage 0 before its forward",
        ),
        (
            0,
            [(F, 0, 0), (F, 0, 1), (F, 0, 0), (B, 0, 0), (B, 0, 1)],
            "rank 0 has the forward of micro-batch 0 in stage 0 twice",
        ),
        (
            1,
            [(B, 1, 0), (F, 1, 0), (F, 1, 1), (B, 1, 1)],
            "rank 1 has the backward of micro-batch 0 in stage 1 before its forward",
        ),
        (
            1,
            [(F, 0, 0), (B, 1, 0), (F, 1, 1), (B, 1, 1)],
            r"rank 1 has the forward of micro-batch 0 in stage 0. What it may have: stages \[1\]",
        ),
        (
            1,
            [(F, 1, 2), (F, 1, 0), (B, 1, 0), (F, 1, 1), (B, 1, 1)],
            "the forward of micro-batch 2 in stage 1. What it may have: .* micro-batches 0 to 1",
        ),
        (
            1,
            [(F, 1, 0), (B, 1, -1), (F, 1, 1), (B, 1, 0)],
            "the backward of micro-batch -1 in stage 1. What it may have: .* backwards of 0 to 1",
        ),
        (1, [], "rank 1 lacks the forward of micro-batch 0 in stage 1"),
    ],
)
def test_a_broken_table_is_refused_with_what_is_wrong(
    rank: int, actions: list[tuple[str, int, int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_schedule(broken(WHOLE, rank, [Action(*action) for action in actions]))  # type: ignore[arg-type]


def test_ranks_that_wait_for_each_other_are_found() -> None:
    """Rank 0 wants micro-batch 0 back before it sends 1; rank 1 begins with 1."""
    schedule = broken(WHOLE, 0, [Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)])
    check_schedule(schedule)
    schedule = broken(schedule, 1, [Action("F", 1, 1), Action("B", 1, 1), Action("F", 1, 0), Action("B", 1, 0)])
    with pytest.raises(ConfigError) as caught:
        check_schedule(schedule)
    assert str(caught.value) == (
        "the schedule comes to a halt, as ranks wait for each other: rank 0 has to run the backward of micro-batch 0 "
        "in stage 0; rank 1 has to run the forward of micro-batch 1 in stage 1"
    )
    with pytest.raises(ConfigError, match="comes to a halt"):
        timeline(schedule)


def test_a_step_that_waits_for_the_next_one_is_found() -> None:
    """Rank 0 runs the backward of this step's last micro-batch, which rank 1 leaves for the next step."""
    schedule = replace(make_schedule("1f1b", 2, 2), lag=(0, 1))
    table = [Action("F", 1, 0), Action("B", 1, -1), Action("F", 1, 1), Action("B", 1, 0)]
    with pytest.raises(ConfigError, match="rank 0 has to run the backward of micro-batch 1 in stage 0"):
        check_schedule(broken(schedule, 1, table))


def test_a_schedule_without_a_table_for_each_rank_is_refused() -> None:
    for actions, lag in ((WHOLE.actions[:1], (0, 0)), (WHOLE.actions, (0,)), ((*WHOLE.actions, ()), (0, 0))):
        with pytest.raises(ConfigError, match="of 2 ranks, but has actions for"):
            check_schedule(replace(WHOLE, actions=actions, lag=lag))


def ends(schedule: Schedule) -> bool:
    """The simulator, as naive as it can be: tick by tick, each rank runs its next action if what that needs is done."""
    left = [list(actions) for actions in schedule.actions]
    done: set[Action] = set()
    while any(left):
        able = [of_rank for of_rank in left if of_rank and _may_run(of_rank[0], done, schedule.stages)]
        if not able:
            return False
        for of_rank in able:
            done.add(of_rank.pop(0))
    return True


def _may_run(action: Action, done: set[Action], stages: int) -> bool:
    direction, stage, micro = action
    if direction == "F":
        return stage == 0 or ("F", stage - 1, micro) in done
    return ("F", stage, micro) in done and (stage == stages - 1 or ("B", stage + 1, micro) in done)


@st.composite
def shuffled(draw: st.DrawFn) -> Schedule:
    """A schedule with some pairs of neighbours swapped, or with tables in any order at all."""
    name, stages_per_rank = draw(st.sampled_from(KINDS))
    schedule = make_schedule(name, draw(st.integers(1, 3)), draw(st.integers(1, 3)), stages_per_rank=stages_per_rank)
    tables = [list(actions) for actions in schedule.actions]
    if draw(st.booleans()):
        return replace(schedule, actions=tuple(tuple(draw(st.permutations(actions))) for actions in tables))
    for table in tables:
        for _ in range(draw(st.integers(0, 4))):
            place = draw(st.integers(0, len(table) - 2))
            table[place], table[place + 1] = table[place + 1], table[place]
    return replace(schedule, actions=tuple(map(tuple, tables)))


@given(shuffled())
def test_check_schedule_accepts_exactly_what_ends(schedule: Schedule) -> None:
    try:
        check_schedule(schedule)
    except ConfigError:
        assert not ends(schedule)
    else:
        assert ends(schedule)


def test_needs_names_what_comes_before() -> None:
    assert needs(Action("F", 0, 5), 4) is None
    assert needs(Action("F", 2, 5), 4) == Action("F", 1, 5)
    assert needs(Action("B", 3, 5), 4) == Action("F", 3, 5)
    assert needs(Action("B", 2, 5), 4) == Action("B", 3, 5)
