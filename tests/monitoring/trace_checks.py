"""What every trace.json must hold, and how to read one."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]
# What the issue allows between a send and its receive on the common clock.
CLOCK_TOLERANCE_US = 1000


class TraceFile:
    """A trace that is valid: the constructor fails if it is not."""

    def __init__(self, path: Path) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        self.other: dict[str, Any] = document["otherData"]
        self.events: list[Event] = document["traceEvents"]
        for event in self.events:
            assert {"name", "ph", "ts", "pid", "tid"} <= event.keys(), event
            assert event["ts"] >= 0, event
            assert event["ph"] in ("X", "M", "s", "f"), event
            assert event["ph"] != "X" or event["dur"] >= 0, event
        self.threads = {
            (event["pid"], event["tid"]): event["args"]["name"]
            for event in self.events
            if event["name"] == "thread_name"
        }
        assert len({tid for _, tid in self.threads}) == len(self.threads), "a viewer looks them up by tid alone"
        self.processes = {
            event["pid"]: event["args"]["name"] for event in self.events if event["name"] == "process_name"
        }

    def spans(self, rank: int, track: str, name: str | None = None) -> list[Event]:
        """The spans of a row, in the order of the file."""
        return [
            event
            for event in self.events
            if event["ph"] == "X" and event["pid"] == rank and self.threads[rank, event["tid"]] == track
            if name is None or event["name"] == name
        ]

    def total_s(self, rank: int, name: str) -> float:
        """Seconds of all spans of this name on the training thread."""
        return sum(event["dur"] for event in self.spans(rank, "compute", name)) / 1e6

    def transfers(self) -> dict[tuple[Any, ...], dict[str, Event]]:
        """(group, call, sequence, source, destination) -> its "send" and "recv"."""
        found: dict[tuple[Any, ...], dict[str, Event]] = defaultdict(dict)
        for event in self.events:
            if event["ph"] == "X" and "dst" in event["args"]:
                args = event["args"]
                side, what = event["name"].split(maxsplit=1)
                assert what == (f"bucket {args['bucket']}" if "bucket" in args else args["call"])
                key = (args["group"], args["call"], args["sequence"], args["src"], args["dst"])
                assert side not in found[key], event
                found[key][side] = event
        return found


def assert_spans_nest(trace: TraceFile) -> None:
    """Two spans of one thread are apart, or one lies in the other."""
    by_thread: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in trace.events:
        if event["ph"] == "X":
            by_thread[event["pid"], event["tid"]].append(event)
    assert by_thread
    for events in by_thread.values():
        open_until: list[int] = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1], event
            open_until.append(end)


def assert_transfers_are_whole_and_in_order(trace: TraceFile) -> None:
    """Every send has its receive, of as many bytes, that neither begins nor ends before it; an arrow joins them."""
    transfers = trace.transfers()
    assert transfers
    for key, sides in transfers.items():
        assert sides.keys() == {"send", "recv"}, key
        send, recv = sides["send"], sides["recv"]
        assert (send["pid"], recv["pid"]) == key[-2:]
        assert send["args"]["bytes"] == recv["args"]["bytes"] > 0
        assert recv["ts"] >= send["ts"] - CLOCK_TOLERANCE_US, key
        assert recv["ts"] + recv["dur"] >= send["ts"] + send["dur"] - CLOCK_TOLERANCE_US, key
    starts = {event["id"]: event for event in trace.events if event["ph"] == "s"}
    ends = {event["id"]: event for event in trace.events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == len(transfers)
    assert all(starts[flow]["ts"] <= end["ts"] + CLOCK_TOLERANCE_US for flow, end in ends.items())


def overlap_us(spans: list[Event], others: list[Event]) -> int:
    """Microseconds that lie in both lists; spans of a list do not overlap each other."""
    return sum(
        max(0, min(a["ts"] + a["dur"], b["ts"] + b["dur"]) - max(a["ts"], b["ts"])) for a in spans for b in others
    )
