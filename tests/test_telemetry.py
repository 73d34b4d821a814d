from __future__ import annotations

from smolcluster.telemetry import BUCKETS, COMPUTE, LOADER, Telemetry, TraceEvent, TraceRecorder


def test_increases_of_a_counter_add_up_to_it() -> None:
    telemetry = Telemetry()
    assert telemetry.increase("link/sent_bytes") == 0.0
    for amount in (3.0, 4.0):
        telemetry.count("link/sent_bytes", amount)
    assert telemetry.increase("link/sent_bytes") == 7.0
    assert telemetry.increase("link/sent_bytes") == 0.0
    telemetry.count("link/sent_bytes", 5.0)
    assert telemetry.increase("link/sent_bytes") == 5.0
    assert telemetry.counter("link/sent_bytes") == 12.0


def test_without_a_trace_only_recorded_spans_are_kept() -> None:
    telemetry = Telemetry()
    with telemetry.traced("evaluate"):
        telemetry.record("forward", 0.0, 1.0)
    assert [span.name for span in telemetry.drain()] == ["forward"]


def test_a_trace_keeps_what_is_drained_too_with_its_row_and_details() -> None:
    telemetry = Telemetry()
    telemetry.trace = TraceRecorder()
    telemetry.step = 4
    telemetry.record("forward", 0.0, 1.0)
    telemetry.record("all_reduce", 1.0, 2.0, 3, track=BUCKETS, details={"bucket": 0})
    assert [span.name for span in telemetry.drain()] == ["forward", "all_reduce"]
    assert telemetry.trace.events() == [
        TraceEvent(COMPUTE, "forward", 0.0, 1.0, {"step": 4}),
        TraceEvent(BUCKETS, "all_reduce", 1.0, 2.0, {"step": 3, "bucket": 0}),
    ]


def test_what_is_made_for_the_trace_alone_is_not_drained() -> None:
    telemetry = Telemetry()
    telemetry.trace = TraceRecorder()
    with telemetry.traced("load", LOADER):
        pass
    assert telemetry.drain() == []
    ((track, name, start, end, details),) = telemetry.trace.events()
    assert (track, name, details) == (LOADER, "load", {"step": 0})
    assert start <= end


def test_a_recorder_keeps_the_newest_and_counts_the_others() -> None:
    recorder = TraceRecorder(max_events=2)
    for name in "abc":
        recorder.add(COMPUTE, name, 0.0, 1.0, {})
    assert [event.name for event in recorder.events()] == ["b", "c"]
    assert recorder.dropped() == 1
