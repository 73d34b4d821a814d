"""A worker's part of a trace, on the clock of the server that it has at the end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

from smolcluster.monitoring.session_trace import WorkerTrace
from smolcluster.telemetry import COMPUTE, Telemetry


class ServerStub:
    """The worker's side of a session with a server that answers at once; its clock is some seconds ahead."""

    def __init__(self, clock: Callable[[], float], ahead: float) -> None:
        self.handlers: dict[str, Callable[[int, dict[str, Any]], None]] = {}
        self.texts: list[str] = []
        self._clock, self._ahead = clock, ahead

    def on(self, kind: str, handler: Callable[[int, dict[str, Any]], None]) -> None:
        self.handlers[kind] = handler

    def send(self, _rank: int, kind: str, message: dict[str, Any]) -> None:
        if kind == "clock":
            self.handlers["time"](0, {"at": self._clock() + self._ahead})
        else:
            self.texts.append(message["text"])

    def begin(self, trace: WorkerTrace, began: float) -> None:
        trace.begin(self)  # type: ignore[arg-type]
        self.handlers["trace"](0, {"began": began})

    def spans(self) -> dict[str, tuple[int, int]]:
        events = [event for text in self.texts for event in json.loads(f"[{text}]")]
        return {event["name"]: (event["ts"], event["dur"]) for event in events if event["ph"] == "X"}


def ticking() -> Callable[[], float]:
    """A clock that goes on by a microsecond whenever it is read, from 10 s on."""
    ticks = itertools.count()
    return lambda: 10.0 + 1e-6 * next(ticks)


def test_a_workers_spans_are_on_the_servers_clock() -> None:
    clock, telemetry = ticking(), Telemetry()
    trace, server = WorkerTrace(telemetry, 1, "mini", clock), ServerStub(clock, ahead=100.0)
    server.begin(trace, began=109.0)
    telemetry.record("forward", 11.0, 11.5, 0, track=COMPUTE)
    trace.send(server)  # type: ignore[arg-type]
    start, length = server.spans()["forward"]
    assert abs(start - 2_000_000) < 50
    assert length == 500_000
    assert telemetry.trace is None


def test_a_server_that_was_started_again_gets_nothing_from_before_it_began() -> None:
    clock, telemetry = ticking(), Telemetry()
    trace = WorkerTrace(telemetry, 1, "mini", clock)
    ServerStub(clock, ahead=100.0).begin(trace, began=109.0)
    telemetry.record("forward", 11.0, 11.5, 0, track=COMPUTE)
    again = ServerStub(clock, ahead=-7.0)  # another machine's clock
    again.begin(trace, began=5.0)
    telemetry.record("backward", 13.0, 13.25, 1, track=COMPUTE)
    trace.send(again)  # type: ignore[arg-type]
    spans = again.spans()
    assert spans.keys() == {"backward"}
    assert abs(spans["backward"][0] - 1_000_000) < 50


def test_nothing_is_recorded_or_sent_where_the_server_wants_no_trace() -> None:
    clock, telemetry = ticking(), Telemetry()
    trace, server = WorkerTrace(telemetry, 1, "mini", clock), ServerStub(clock, ahead=0.0)
    trace.begin(server)  # type: ignore[arg-type]
    assert telemetry.trace is None
    trace.send(server)  # type: ignore[arg-type]
    assert not server.texts
