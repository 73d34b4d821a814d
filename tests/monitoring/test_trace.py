from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collectives.contract import ENGINES, open_group, run_group
from monitoring.trace_checks import TraceFile, assert_spans_nest, assert_transfers_are_whole_and_in_order
from smolcluster.algorithms.classicdp import ClassicDP
from smolcluster.algorithms.single import Single
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.bucket import plan_buckets
from smolcluster.collectives.local import LocalGroup
from smolcluster.data.batch import Batch
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.monitoring.trace import (
    ClockReading,
    OptimizerSpans,
    RunTrace,
    chrome_events,
    on_rank_0s_clock,
    read_clock,
)
from smolcluster.telemetry import COMPUTE, TraceEvent, TraceRecorder
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.trainer import Progress, Trainer
from smolcluster.transport.frame import PRELUDE_BYTES

STEPS = 5
WORLD_SIZE = 3
FEATURES, HIDDEN, CLASSES = 64, 2000, 10


class Rows:
    """A sink that keeps all rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: Any) -> None:
        self.rows.append(dict(row))

    def progress(self, done: int, total: int, row: Any) -> None:
        pass


def batches(seed: int) -> Iterator[list[Batch]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        inputs = torch.randn(8, FEATURES, generator=generator)
        yield [Batch(inputs, torch.randint(0, CLASSES, (8,), generator=generator), 8 * WORLD_SIZE)]


def train(
    comm: Communicator, path: Path | None, staleness_bound: int, clock: Callable[[], float] = time.monotonic
) -> tuple[str | None, list[dict[str, Any]]]:
    recording = RunTrace(comm, path if comm.rank == 0 else None, f"mini{comm.rank}", clock)
    made: list[torch.optim.Optimizer] = []

    def make(params: Any) -> torch.optim.Optimizer:
        made.append(optimizer_factory("adamw", 1e-3)(params))
        return made[0]

    strategy = ClassicDP(SimpleNN(FEATURES, HIDDEN, CLASSES), make, comm, staleness_bound=staleness_bound)
    OptimizerSpans(comm.telemetry, made, clock)
    sink = Rows()

    def checkpoint(progress: Progress) -> None:
        pass

    with recording:
        Trainer(
            strategy, batches(comm.rank), STEPS, eval_batches=lambda: batches_once(comm.rank), checkpoint=checkpoint
        ).run(sink, comm)
    return recording.write(), sink.rows


def batches_once(rank: int) -> Iterator[Batch]:
    yield from next(batches(rank))


@dataclass
class Traced:
    """A finished run of three ranks."""

    trace: TraceFile
    path: Path
    notes: list[str | None]
    rows: list[list[dict[str, Any]]]


@pytest.fixture(scope="module", params=[("tcp", 0), ("inproc", 2)], ids=["tcp", "inproc-K2"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    engine, staleness_bound = request.param
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    results = run_group(open_group(engine, WORLD_SIZE), lambda comm: train(comm, path, staleness_bound))
    return Traced(TraceFile(path), path, [note for note, _ in results], [rows for _, rows in results])


def test_every_rank_is_a_process_with_the_same_rows(traced: Traced) -> None:
    assert traced.trace.processes == {0: "rank 0 (mini0)", 1: "rank 1 (mini1)", 2: "rank 2 (mini2)"}
    for rank in range(WORLD_SIZE):
        names = [name for (pid, _), name in sorted(traced.trace.threads.items()) if pid == rank]
        peers = [peer for peer in range(WORLD_SIZE) if peer != rank]
        assert names[:2] == ["compute", "buckets"]
        assert names[2:] == [f"recv from rank {peer}" for peer in peers] + [f"send to rank {peer}" for peer in peers]
    assert traced.notes == [f"the trace is {traced.path}; open it in https://ui.perfetto.dev", None, None]


def test_the_training_thread_shows_what_it_does(traced: Traced) -> None:
    for rank in range(WORLD_SIZE):
        counts: dict[str, int] = {}
        for event in traced.trace.spans(rank, "compute"):
            counts[event["name"]] = counts.get(event["name"], 0) + 1
        for name in ("step", "forward", "backward", "comm_wait (all_reduce)", "optimizer"):
            assert counts.pop(name) == STEPS, name
        assert counts.pop("next batch") == STEPS + 1  # the last finds that there is no more
        assert counts.pop("evaluate") == 1
        assert counts.pop("finish") == 1
        assert counts.pop("checkpoint") in (1, 2)  # K > 0: also before the last gradients are applied
        assert counts == {}


def test_spans_of_a_thread_nest(traced: Traced) -> None:
    assert_spans_nest(traced.trace)


def test_each_send_has_its_receive_in_order_on_the_common_clock(traced: Traced) -> None:
    assert_transfers_are_whole_and_in_order(traced.trace)


def test_every_bucket_of_every_step_is_there_on_every_rank(traced: Traced) -> None:
    model = SimpleNN(FEATURES, HIDDEN, CLASSES)
    params = list(model.parameters())
    layout = plan_buckets(params, 4 << 20)
    assert len(layout) > 1
    sizes = [sum(params[index].nbytes for index in bucket) for bucket in layout]
    sizes[-1] += (6 + len(params)) * 4  # the tail: see bucket.py
    for rank in range(WORLD_SIZE):
        spans = sorted(traced.trace.spans(rank, "buckets"), key=lambda event: event["args"]["sequence"])
        found = [(event["args"]["step"], event["args"]["bucket"], event["args"]["bytes"]) for event in spans]
        assert found == [(step, bucket, nbytes) for step in range(STEPS) for bucket, nbytes in enumerate(sizes)]
        sequences = {event["args"]["sequence"] for event in spans}
        assert sequences == {event["args"]["sequence"] for event in traced.trace.spans(0, "buckets")}
        assert len(sequences) == len(spans)


def test_bytes_on_the_wire_are_those_of_the_ring_and_of_one_round(traced: Traced) -> None:
    """A bucket of more than 256 KiB goes around the ring to one neighbour, a smaller one to everybody at once."""
    spans = traced.trace.spans(0, "buckets")
    large = [event for event in spans if event["args"]["bytes"] > 256 << 10]
    small = [event for event in spans if event["args"]["bytes"] <= 256 << 10]
    assert large
    assert small
    for event in spans:
        args = event["args"]
        key = ("world", "all_reduce", args["sequence"])
        sends = {dst: traced.trace.transfers().get((*key, 0, dst)) for dst in (1, 2)}
        for sides in sends.values():
            if sides is not None:
                assert (sides["send"]["args"]["step"], sides["send"]["args"]["bucket"]) == (
                    args["step"],
                    args["bucket"],
                )
        if event in small:
            for sides in sends.values():
                assert sides is not None
                assert sides["send"]["args"]["bytes"] == args["bytes"] + PRELUDE_BYTES
        else:
            assert sends[2] is None
            assert sends[1] is not None
            # Two pieces, each with 2 (N-1) hops of a third, rounded to whole elements, and its prelude
            expected = 4 * (args["bytes"] / 3 + 2 * PRELUDE_BYTES)
            assert sends[1]["send"]["args"]["bytes"] == pytest.approx(expected, abs=2 * 4 * 4)


def test_waits_agree_with_the_metrics(traced: Traced) -> None:
    for rank, rows in enumerate(traced.rows):
        waited = sum(row["time/comm_wait_s"] for row in rows)
        backward = sum(row["time/backward_s"] for row in rows)
        # The same measurement, in whole microseconds of a clock whose rate may be corrected.
        assert traced.trace.total_s(rank, "comm_wait (all_reduce)") == pytest.approx(waited, rel=1e-2, abs=1e-6 * STEPS)
        assert traced.trace.total_s(rank, "backward") == pytest.approx(backward, rel=1e-2, abs=1e-6 * STEPS)


def test_no_other_row_of_the_training_has_a_name_that_could_be_taken_for_the_wait(traced: Traced) -> None:
    for rank in range(WORLD_SIZE):
        spans = [span for track in ("compute", "buckets") for span in traced.trace.spans(rank, track)]
        for word in ("wait", "reduce"):
            assert {span["name"] for span in spans if word in span["name"]} == {"comm_wait (all_reduce)"}


def test_the_all_reduces_of_a_step_begin_in_its_backward_and_end_in_its_wait(traced: Traced) -> None:
    for rank in range(WORLD_SIZE):
        buckets = traced.trace.spans(rank, "buckets")
        for wait, backward in zip(
            traced.trace.spans(rank, "compute", "comm_wait (all_reduce)"),
            traced.trace.spans(rank, "compute", "backward"),
            strict=True,
        ):
            step = wait["args"]["step"]
            own = [event for event in buckets if event["args"]["step"] == step == backward["args"]["step"]]
            assert min(event["ts"] for event in own) >= backward["ts"]
            assert max(event["ts"] + event["dur"] for event in own) <= wait["ts"] + wait["dur"]


def test_clocks_are_described(traced: Traced) -> None:
    ranks = traced.trace.other["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1, 2]
    for rank in ranks:
        assert rank["dropped_events"] == 0
        # All ranks have one clock here, so what is measured is the error.
        assert abs(rank["clock_offset_s"]) * 1e6 <= rank["clock_error_us"] + 1


def rank_clock() -> float:
    """A clock for each rank, by the name of the thread that asks: 2 hours apart, at another rate."""
    found = re.search(r"rank[ -](\d+)$", threading.current_thread().name)
    assert found is not None, threading.current_thread().name
    rank = int(found[1])
    return 7200.0 * rank + time.monotonic() * (1 + 1e-3 * rank)


def test_ranks_with_clocks_of_their_own_are_put_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("telemetry", "collectives.bucket", "collectives.lane", "collectives.lane_spans"):
        monkeypatch.setattr(f"smolcluster.{module}.time", SimpleNamespace(monotonic=rank_clock))
    path = tmp_path / "trace.json"
    run_group(open_group("tcp", WORLD_SIZE), lambda comm: train(comm, path, 0, clock=rank_clock))
    trace = TraceFile(path)
    assert_spans_nest(trace)
    assert_transfers_are_whole_and_in_order(trace)
    ranks = trace.other["ranks"]
    assert [round(rank["clock_offset_s"] / 3600) for rank in ranks] == [0, -2, -4]
    first, *others = (trace.spans(rank, "compute", "finish")[0] for rank in range(WORLD_SIZE))
    for other in others:
        # The ranks end together, but on a busy machine not at once.
        assert abs(other["ts"] - first["ts"]) < 1e6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reading_is_wrong_by_its_error_at_most(engine: str) -> None:
    def read(comm: Communicator) -> tuple[float, float]:
        reading = read_clock(comm, lambda: time.monotonic() + 5.0 * comm.rank)
        return reading.offset, reading.error

    for rank, (offset, error) in enumerate(run_group(open_group(engine, 3), read)):
        assert abs(offset + 5.0 * rank) <= error + 1e-9
        assert error < 1.0


def test_between_two_readings_that_differ_the_offset_changes_evenly() -> None:
    to_common = on_rank_0s_clock(ClockReading(100.0, 7.0, 0.0), ClockReading(200.0, 8.0, 0.0))
    assert [to_common(at) for at in (100.0, 150.0, 200.0)] == [107.0, 157.5, 208.0]


def test_two_readings_that_agree_within_their_errors_give_one_offset() -> None:
    to_common = on_rank_0s_clock(ClockReading(100.0, 7.0, 0.5), ClockReading(200.0, 7.5, 0.25))
    assert [to_common(at) for at in (100.0, 200.0)] == [107.375, 207.375]


def test_a_run_of_one_process_has_forward_and_backward(tmp_path: Path) -> None:
    (comm,) = LocalGroup(1).communicators
    recording = RunTrace(comm, tmp_path / "trace.json", "rank0")
    strategy = Single(SimpleNN(FEATURES, 8, CLASSES), optimizer_factory("sgd", 0.1), telemetry=comm.telemetry)
    sink = Rows()
    Trainer(strategy, batches(0), STEPS).run(sink, comm)
    recording.write()
    trace = TraceFile(tmp_path / "trace.json")
    assert [event["args"]["step"] for event in trace.spans(0, "compute", "backward")] == list(range(STEPS))
    assert [event["args"]["step"] for event in trace.spans(0, "compute", "step")] == list(range(STEPS))
    assert_spans_nest(trace)
    assert "time/backward_s" in sink.rows[0]
    assert "time/comm_wait_s" not in sink.rows[0]  # nobody to wait for


def lose(comm: Communicator) -> None:
    with comm.telemetry.traced("evaluate"):
        pass
    raise RuntimeError("lost")


def test_after_a_failure_rank_0_writes_its_own_events(tmp_path: Path) -> None:
    (comm,) = LocalGroup(1).communicators
    recording = RunTrace(comm, tmp_path / "trace.json", "mini0")
    with pytest.raises(RuntimeError, match="lost"), recording:
        lose(comm)
    trace = TraceFile(tmp_path / "trace.json")
    assert len(trace.spans(0, "compute", "evaluate")) == 1
    assert "failed" in trace.other["incomplete"]
    assert comm.telemetry.trace is None


def test_a_file_that_cannot_be_written_is_one_line_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    def record(comm: Communicator) -> str | None:
        return RunTrace(comm, tmp_path / "missing" / "trace.json" if comm.rank == 0 else None, "x").write()

    note, *others = run_group(open_group("local", 3), record)
    assert note == (
        f"the trace cannot be written to {tmp_path / 'missing' / 'trace.json'} (No such file or directory). Free some "
        "space and run again"
    )
    assert others == [None, None]


def test_a_trace_larger_than_a_message_is_fetched_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolcluster.monitoring.trace.PIECE_BYTES", 1000)

    def record(comm: Communicator) -> None:
        recording = RunTrace(comm, tmp_path / "trace.json" if comm.rank == 0 else None, "x")
        for _ in range(50):
            with comm.telemetry.traced("evaluate"):
                pass
        recording.write()

    run_group(open_group("local", 3), record)
    trace = TraceFile(tmp_path / "trace.json")
    assert [len(trace.spans(rank, "compute", "evaluate")) for rank in range(3)] == [50] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_what_does_not_fit_is_dropped_from_the_beginning_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolcluster.monitoring.trace.TraceRecorder", lambda: TraceRecorder(max_events=2))
    (comm,) = LocalGroup(1).communicators
    recording = RunTrace(comm, tmp_path / "trace.json", "x")
    for name in ("first", "second", "third"):
        with comm.telemetry.traced(name):
            pass
    note = recording.write()
    assert note is not None
    assert "without the first 1 events" in note
    trace = TraceFile(tmp_path / "trace.json")
    assert [event["name"] for event in trace.spans(0, "compute")] == ["second", "third"]
    assert trace.other["ranks"][0]["dropped_events"] == 1


def test_times_are_whole_microseconds_so_that_sums_are_exact() -> None:
    events = [TraceEvent(COMPUTE, "a", 1.0000001, 1.0000014, {}), TraceEvent(COMPUTE, "b", 1.0000014, 1.0000021, {})]
    first, second = [event for event in chrome_events(events, 0, "x", lambda at: at) if event["ph"] == "X"]
    assert (first["ts"], first["dur"], second["ts"], second["dur"]) == (1_000_000, 1, 1_000_001, 1)
