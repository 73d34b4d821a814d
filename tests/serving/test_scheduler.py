"""What is computed next: no network, no model."""

from __future__ import annotations

import pytest

from smolcluster.models.decoder import Segment
from smolcluster.serving import scheduler
from smolcluster.serving.scheduler import Limits, StreamState, plan


def writing(slot: int, known: int = 10, *, busy: bool = False) -> StreamState:
    return StreamState(slot, known, known if busy else known - 1, busy)


def prompt(slot: int, known: int, computed: int = 0) -> StreamState:
    return StreamState(slot, known, computed, False)


def test_streams_that_write_go_together_and_a_piece_of_a_prompt_with_them() -> None:
    streams = [writing(0), prompt(1, 100), writing(2, 7)]
    assert plan(streams, 0, Limits(chunk=16)) == [Segment(0, 9, 1), Segment(2, 6, 1), Segment(1, 0, 16)]


def test_the_last_piece_of_a_prompt_is_what_is_left_and_the_next_prompt_takes_the_room() -> None:
    streams = [prompt(1, 100, 90), prompt(0, 50)]
    assert plan(streams, 0, Limits(whole_chunk=32)) == [Segment(1, 90, 10), Segment(0, 0, 22)]


def test_nothing_while_enough_is_under_way() -> None:
    assert plan([writing(0)], 1, Limits(depth=1)) == []
    assert plan([writing(0, busy=True)], 0, Limits(depth=2)) == []


def test_streams_are_divided_so_that_every_stage_has_something_to_do() -> None:
    limits = Limits(depth=3)
    streams = [writing(slot) for slot in range(8)]
    sizes = []
    for under_way in range(3):
        segments = plan(streams, under_way, limits)
        sizes.append(len(segments))
        taken = {segment.slot for segment in segments}
        streams = [writing(stream.slot, busy=True) if stream.slot in taken else stream for stream in streams]
    assert sizes == [3, 3, 2]
    assert plan(streams, 2, limits) == []


def test_a_free_group_does_not_swallow_the_others() -> None:
    streams = [writing(slot, busy=slot < 2) for slot in range(8)]
    assert len(plan(streams, 1, Limits(depth=2))) == 4


def test_one_piece_of_a_prompt_at_a_time_while_others_write() -> None:
    limits = Limits(depth=2, chunk=16, whole_chunk=64)
    assert plan([writing(0), prompt(1, 100, 16)], 1, limits, has_room=False) == [Segment(0, 9, 1)]
    assert plan([writing(0, busy=True), prompt(1, 100, 16)], 1, limits, has_room=False) == []
    assert plan([prompt(1, 100, 16)], 1, limits, has_room=False) == [Segment(1, 16, 64)]


def test_a_piece_takes_about_as_long_as_a_step_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches under way; a step takes 40 ms, and 20 + 2 ms a token more with a piece of a prompt."""
    now = [0.0]
    monkeypatch.setattr(scheduler.time, "perf_counter", lambda: now[0])
    size, writer = scheduler.ChunkSize(), [Segment(0, 5, 1)]
    size.begin([Segment(0, 0, 50)])
    now[0] += 0.06
    size.end([Segment(0, 0, 50)])
    for _ in range(20):
        size.begin(writer)
        now[0] += 0.04
        size.end(writer)
    for _ in range(scheduler.ChunkSize.UNMEASURED - 2):
        assert size.has_room
        both = [*writer, Segment(1, 0, size.tokens)]
        size.begin(both)
        size.begin(writer)
        assert not size.has_room
        now[0] += 0.04 + 0.02 + 0.002 * size.tokens
        size.end(both)
        size.end(writer)  # as late: that is not what a step takes
    assert 0.9 * 0.034 < 0.02 + 0.002 * size.tokens < 1.3 * 0.034
    size.begin([*writer, Segment(1, 0, 8)])
    size.restart()
    assert size.has_room


def test_pieces_grow_with_the_number_of_streams_that_write_even_if_there_is_always_a_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(scheduler.time, "perf_counter", lambda: now[0])
    size = scheduler.ChunkSize()
    for writers, least, most in ((1, 8, 10), (8, 55, 75), (1, 8, 12)):
        pieces = 0
        for _ in range(300):
            segments = [Segment(slot, 5, 1) for slot in range(writers)]
            if size.has_room:
                segments.append(Segment(9, 0, size.tokens))
                pieces += 1
            size.begin(segments)
            now[0] += 0.01 * writers + 0.001 * sum(each.length for each in segments if each.length > 1)
            size.end(segments)
        assert least <= size.tokens <= most, writers
        assert pieces > 270


def test_pieces_of_fixed_size_depend_on_nothing_else() -> None:
    limits = Limits(chunk=4, whole_chunk=8, fixed_chunk=16)
    prompt_of_40 = [StreamState(0, 45, computed, False, 40) for computed in (0, 16, 32, 40, 43)]
    others: list[list[StreamState]] = [[], [writing(5)], [StreamState(6, 9, 0, False, 9)]]
    for other in others:
        found = [plan([stream, *other], 0, limits) for stream in prompt_of_40]
        pieces = [next(segment for segment in segments if segment.slot == 0).length for segments in found]
        assert pieces == [16, 16, 8, 1, 1]
