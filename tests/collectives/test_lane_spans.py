from __future__ import annotations

import itertools

import torch

from collectives.contract import run_group
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.groups import inproc_group
from smolcluster.collectives.plan import Plan
from smolcluster.telemetry import TraceEvent, TraceRecorder
from smolcluster.transport.frame import PRELUDE_BYTES


def traced(comm: Communicator) -> TraceRecorder:
    recorder = TraceRecorder()
    comm.telemetry.trace = recorder
    comm.barrier()  # what comes now is recorded on both sides
    return recorder


def after_barrier(recorder: TraceRecorder) -> list[TraceEvent]:
    return [event for event in recorder.events() if event.name != "barrier"]


def of_track(recorder: TraceRecorder, track: str) -> list[TraceEvent]:
    return [event for event in after_barrier(recorder) if event.track == track]


def assert_apart(events: list[TraceEvent]) -> None:
    assert all(event.start <= event.end for event in events)
    assert all(first.end <= second.start for first, second in itertools.pairwise(events))


def test_each_message_is_a_span_of_its_own_on_both_sides() -> None:
    lengths = [10, 300_000, 0, 7]

    def exchange(comm: Communicator) -> tuple[list[TraceEvent], list[TraceEvent]]:
        recorder, other = traced(comm), 1 - comm.rank
        works = [comm.send(torch.zeros(length), other, tag) for tag, length in enumerate(lengths)]
        for tag in range(len(lengths)):
            comm.recv(other, tag).wait()
        for work in works:
            work.wait()
        name = f"rank {other} (messages)"
        return of_track(recorder, f"send to {name}"), of_track(recorder, f"recv from {name}")

    (sent_0, received_0), (sent_1, received_1) = run_group(inproc_group(2), exchange)
    for sent, received in ((sent_0, received_1), (sent_1, received_0)):
        assert_apart(sent)
        assert_apart(received)
        assert [event.details["tag"] for event in sent] == [0, 1, 2, 3]
        # each with its prelude and one dim
        assert [event.details["bytes"] for event in sent] == [PRELUDE_BYTES + 8 + 4 * length for length in lengths]
        assert [event.details for event in received] == [event.details for event in sent]
        for there, here in zip(sent, received, strict=True):
            assert here.start >= there.start
            assert here.end >= there.end


def test_a_call_of_many_frames_is_one_span_per_peer_and_direction() -> None:
    def reduce(comm: Communicator) -> TraceRecorder:
        recorder = traced(comm)
        works = [comm.all_reduce(torch.ones(9000)) for _ in range(3)]
        for work in works:
            work.wait()
        return recorder

    plan = Plan(one_round_bytes=1000, chunk_bytes=1024)
    for rank, recorder in enumerate(run_group(inproc_group(3, plan=plan), reduce)):
        right, left = (rank + 1) % 3, (rank - 1) % 3
        sent, received = of_track(recorder, f"send to rank {right}"), of_track(recorder, f"recv from rank {left}")
        assert len(after_barrier(recorder)) == 6, "a ring speaks to its neighbours only"
        assert_apart(sent)
        assert_apart(received)
        for events in (sent, received):
            sequences = [int(event.details["sequence"]) for event in events]
            assert sequences == [sequences[0], sequences[0] + 1, sequences[0] + 2]
            # 12 pieces of up to 3 chunks, each of 4 frames: 2 (N-1) hops of a third of the bytes
            assert [event.details["bytes"] for event in events] == [4 * 12000 + 12 * 4 * PRELUDE_BYTES] * 3


def test_a_group_that_was_split_off_has_rows_of_its_own_by_the_runs_ranks() -> None:
    def reduce(comm: Communicator) -> set[str]:
        part = comm.split([2, 0], "pair")
        recorder = traced(comm)
        if part is not None:
            part.all_reduce(torch.ones(4)).wait()
            part.close()
        return {event.track for event in after_barrier(recorder)}

    tracks = run_group(inproc_group(3), reduce)
    assert tracks == [{"send to rank 2 of pair", "recv from rank 2 of pair"}, set(),
                      {"send to rank 0 of pair", "recv from rank 0 of pair"}]  # fmt: skip


def test_nothing_is_kept_while_no_trace_is_recorded() -> None:
    def reduce(comm: Communicator) -> TraceRecorder:
        recorder = traced(comm)
        comm.telemetry.trace = None
        comm.all_reduce(torch.ones(4)).wait()
        return recorder

    assert [after_barrier(recorder) for recorder in run_group(inproc_group(2), reduce)] == [[], []]
