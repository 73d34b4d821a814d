"""The control plane: messages, losses and who is blamed, aborts, leaving."""

from __future__ import annotations

import threading
import time

import pytest

from cluster.worlds import DEADLINE, Attempt, Meeting, die, first_errors, formed
from smolcluster import errors
from smolcluster.errors import (
    CheckpointError,
    CollectiveMismatch,
    ConnectFailed,
    ConnectionLost,
    PeerLost,
    SmolError,
    TrainingStopped,
)
from smolcluster.kinds import JsonObject

KINDS = pytest.mark.parametrize("kind", ["inproc", "tcp"])


class Inbox:
    """Messages of one kind, in order."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, JsonObject]] = []
        self._came = threading.Condition()

    def __call__(self, rank: int, message: JsonObject) -> None:
        with self._came:
            self.messages.append((rank, message))
            self._came.notify_all()

    def wait_for(self, count: int) -> list[tuple[int, JsonObject]]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.messages) >= count, DEADLINE)
            return list(self.messages)


# --- messages


@KINDS
def test_a_view_is_the_same_everywhere(kind: str) -> None:
    with formed(kind, 3) as worlds:
        views = [world.view() for world in worlds]
        assert views[0] == views[1] == views[2]
        assert views[0].generation == 1
        assert views[0].leader == 0
        assert [member.rank for member in views[0].members] == [0, 1, 2]
        assert [world.name(2) for world in worlds] == ["rank 2"] * 3


@KINDS
def test_messages_reach_the_handler_of_their_kind_in_order(kind: str) -> None:
    with formed(kind, 3) as worlds:
        rows, logs = Inbox(), Inbox()
        worlds[0].on("row", rows)
        worlds[0].on("log", logs)
        for n in range(10):
            worlds[1].send(0, "row", {"n": n})
            worlds[1].send(0, "log", {"n": -n})
        worlds[2].send(0, "row", {"n": 99})
        assert [m["n"] for rank, m in rows.wait_for(11) if rank == 1] == list(range(10))
        assert [m["n"] for rank, m in rows.wait_for(11) if rank == 2] == [99]
        assert [m["n"] for _, m in logs.wait_for(10)] == [-n for n in range(10)]


@KINDS
def test_messages_that_come_before_their_handler_are_kept_in_order(kind: str) -> None:
    with formed(kind, 2) as worlds:
        marker = Inbox()
        worlds[0].on("marker", marker)
        for n in range(5):
            worlds[1].send(0, "row", {"n": n})
        worlds[1].send(0, "marker", {})
        marker.wait_for(1)
        rows = Inbox()
        worlds[0].on("row", rows)
        worlds[1].send(0, "row", {"n": 5})
        assert [m["n"] for _, m in rows.wait_for(6)] == list(range(6))


def test_kinds_that_nobody_knows_do_no_harm() -> None:
    with formed("inproc", 2) as worlds:
        for n in range(3000):
            worlds[1].send(0, f"kind {n % 100}", {"n": n})
        marker = Inbox()
        worlds[0].on("marker", marker)
        worlds[1].send(0, "marker", {})
        marker.wait_for(1)
        assert sum(map(len, worlds[0]._early.values())) < 3000
        assert worlds[0].error() is None


# --- losses


@KINDS
def test_a_closed_link_is_noticed_at_once(kind: str) -> None:
    with formed(kind, 3, patience=60.0) as worlds:
        die(worlds[1])
        start = time.monotonic()
        found = first_errors([worlds[0], worlds[2]], DEADLINE)
        assert time.monotonic() - start < 2  # not the patience of a minute
        for error in found:
            assert isinstance(error, PeerLost)
            assert error.rank == 1
            assert "rank 1 is lost: it died or closed its connections" in str(error)


@KINDS
@pytest.mark.parametrize("victim", [0, 3])
def test_all_survivors_name_the_same_culprit(kind: str, victim: int) -> None:
    for _ in range(5):
        with formed(kind, 4) as worlds:
            survivors = [world for world in worlds if world.rank != victim]
            killer = Attempt(lambda: die(worlds[victim]))
            found = first_errors(survivors, DEADLINE)
            # Each survivor now ends its run and closes, as a process that raised PeerLost does.
            for world in survivors:
                world.leave()
                world.close()
            killer.join()
            assert [error.rank for error in found if isinstance(error, PeerLost)] == [victim] * 3
            assert [world.lost for world in survivors] == [[victim]] * 3


def test_a_survivor_that_closes_first_is_not_taken_for_the_culprit() -> None:
    # Rank 1 sees the death of rank 2, tells it and ends. Rank 0 hears of both ends, in this order.
    with formed("inproc", 3) as worlds:
        silence = worlds[0]._links[2]
        silence.on_close(lambda error: None)  # rank 0 itself does not notice that rank 2 died
        die(worlds[2])
        first_errors(worlds[1:2], DEADLINE)
        worlds[1].close()
        (error,) = first_errors(worlds[:1], DEADLINE)
        assert isinstance(error, PeerLost)
        assert error.rank == 2


@KINDS
def test_a_rank_that_closes_while_it_tells_the_others_is_not_taken_for_the_culprit(kind: str) -> None:
    with formed(kind, 3) as worlds:
        worlds[0]._links[2].on_close(lambda error: None)  # rank 0 itself does not notice that rank 2 died
        link = worlds[1]._links[0]
        send, sending = link.send, threading.Event()

        def slowly(message: JsonObject) -> None:
            if message["kind"] == "abort":
                sending.set()
                threading.Event().wait(0.2)
            send(message)

        link.send = slowly  # type: ignore[method-assign]
        die(worlds[2])
        assert sending.wait(DEADLINE)
        worlds[1].close()  # as a thread does that saw the error meanwhile
        (error,) = first_errors(worlds[:1], DEADLINE)
        assert isinstance(error, PeerLost)
        assert error.rank == 2


@KINDS
def test_a_broken_bulk_connection_waits_for_the_reason_and_then_blames_its_peer(kind: str) -> None:
    with formed(kind, 2) as worlds:
        start = time.monotonic()
        worlds[0].suspect(1, ConnectionLost("tcp://peer:1 is gone (reset)"), lambda left: None)
        worlds[0].suspect(1, ConnectionLost("and again"), lambda left: None)
        (error,) = first_errors(worlds[:1], DEADLINE)
        assert time.monotonic() - start > 0.3
        assert isinstance(error, PeerLost)
        assert "rank 1 is lost: tcp://peer:1 is gone (reset)" in str(error)


@KINDS
def test_the_reason_that_comes_meanwhile_counts(kind: str) -> None:
    with formed(kind, 3) as worlds:
        worlds[0].suspect(1, ConnectionLost("tcp://peer:1 closed the connection"), lambda left: None)
        worlds[1].abort(PeerLost("rank 2 is lost: it was silent", 2))
        (error,) = first_errors(worlds[:1], DEADLINE)
        assert isinstance(error, PeerLost)
        assert error.rank == 2


@KINDS
def test_a_suspect_that_left_is_not_lost_but_what_needs_it_fails(kind: str) -> None:
    with formed(kind, 2) as worlds:
        told: list[PeerLost] = []
        came = threading.Event()

        def on_left(error: PeerLost) -> None:
            told.append(error)
            came.set()

        worlds[0].suspect(1, ConnectionLost("tcp://peer:1 closed the connection"), on_left)
        worlds[1].leave()
        worlds[1].close()
        assert came.wait(DEADLINE)
        assert told[0].rank == 1
        assert "rank 1 has left the run, but this rank still needs it" in str(told[0])
        assert worlds[0].error() is None


@KINDS
def test_leaving_is_no_loss(kind: str) -> None:
    with formed(kind, 3, patience=0.4) as worlds:
        worlds[1].leave()
        worlds[1].close()
        assert first_errors([worlds[0], worlds[2]], 3 * 0.4) == [None, None]
        inbox = Inbox()
        worlds[2].on("row", inbox)
        worlds[0].send(1, "row", {})  # nobody hears it, nothing is raised
        worlds[0].send(2, "row", {})
        inbox.wait_for(1)
        assert worlds[0].lost == worlds[2].lost == []


def test_after_leaving_nobody_else_is_blamed() -> None:
    with formed("inproc", 2) as worlds:
        worlds[0].leave()
        die(worlds[1])
        worlds[0].report_lost(1, "it is gone")
        worlds[0].abort(SmolError("too late"))
        assert worlds[0].error() is None


# --- aborts


@KINDS
@pytest.mark.parametrize(
    "error",
    [
        CollectiveMismatch("rank 1 called all_reduce of 5"),
        TrainingStopped("the loss is nan at step 7"),
        CheckpointError("runs/x/step_00000007 is damaged"),
        SmolError("something else"),
        PeerLost("rank 2 is lost: it was silent", 2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_abort_arrives_everywhere_as_the_error_it_is(kind: str, error: SmolError) -> None:
    with formed(kind, 3) as worlds:
        Attempt(lambda: worlds[1].abort(error)).join()
        found = first_errors(worlds, DEADLINE)
        assert [type(e) for e in found] == [type(error)] * 3
        assert [str(e) for e in found] == [str(error)] * 3
        assert len({e.exit_code for e in found if isinstance(e, SmolError)}) == 1


@KINDS
def test_an_error_of_a_class_that_nobody_else_knows_names_the_rank_that_gave_up(kind: str) -> None:
    class Odd(SmolError):
        pass

    with formed(kind, 2) as worlds:
        worlds[1].abort(Odd("the dog ate it"))
        (error,) = first_errors(worlds[:1], DEADLINE)
        assert isinstance(error, PeerLost)
        assert error.rank == 1
        assert str(error) == "rank 1 gave up: the dog ate it"


@pytest.mark.parametrize(
    "message",
    [
        {"error": "PeerLost", "text": "no rank", "lost": 77},
        {"error": "PeerLost", "text": "no rank", "lost": -1},
        {"error": "PeerLost", "text": "no rank"},
        {"error": "annotations", "text": "no class"},
        {"error": "__builtins__", "text": "no error"},
        {"error": ["SmolError"], "text": 7},
        {},
    ],
    ids=str,
)
def test_a_strange_abort_still_ends_the_run(message: JsonObject) -> None:
    with formed("inproc", 2) as worlds:
        worlds[1].send(0, "abort", message)
        (error,) = first_errors(worlds[:1], DEADLINE)
        assert isinstance(error, PeerLost)
        assert error.rank == 1


@KINDS
@pytest.mark.parametrize(
    "text", ["x" * (1 << 21), "a file called \udcff", "größer\x00\x1b[31m"], ids=["long", "bytes", "odd"]
)
def test_no_text_can_stop_an_abort(kind: str, text: str) -> None:
    with formed(kind, 2) as worlds:
        worlds[1].abort(TrainingStopped(text))
        (error,) = first_errors(worlds[:1], DEADLINE)
        assert isinstance(error, TrainingStopped)
        assert str(error)[:2] == text[:2]


@KINDS
def test_the_first_error_stays(kind: str) -> None:
    with formed(kind, 2) as worlds:
        calls: list[SmolError] = []
        worlds[0].on_failure(calls.append)
        worlds[0].abort(CollectiveMismatch("the first"))
        worlds[0].abort(SmolError("the second"))
        worlds[0].report_lost(1, "the third")
        assert str(worlds[0].error()) == "the first"
        assert [str(error) for error in calls] == ["the first"]
        worlds[0].on_failure(calls.append)  # too late: at once
        assert [str(error) for error in calls] == ["the first", "the first"]
        assert worlds[0].lost == []


def test_every_error_class_can_travel() -> None:
    # `abort` makes the class from its name and one text; PeerLost is the only one that needs more.
    for name in dir(errors):
        found = getattr(errors, name)
        if isinstance(found, type) and issubclass(found, SmolError) and found is not PeerLost:
            assert str(found("text")) == "text"


# --- bulk channels


@KINDS
def test_both_sides_open_a_channel_of_the_same_lane(kind: str) -> None:
    with formed(kind, 2) as worlds:
        far = Attempt(lambda: worlds[0].open_channel(1, "bulk:test", DEADLINE))
        near = worlds[1].open_channel(0, "bulk:test", DEADLINE)
        assert near.try_send([memoryview(b"hello")]) == 5
        target = bytearray(5)
        deadline = time.monotonic() + DEADLINE
        while target != b"hello" and time.monotonic() < deadline:
            far.get().try_recv_into(memoryview(target))
        assert target == b"hello"
        near.abort(ConnectionLost("the test is over"))
        far.get().abort(ConnectionLost("the test is over"))


@KINDS
def test_a_channel_that_the_other_side_does_not_open_is_given_up(kind: str) -> None:
    with formed(kind, 2) as worlds, pytest.raises(ConnectFailed, match="rank 1 did not open its bulk:test"):
        worlds[0].open_channel(1, "bulk:test", 0.1)


# An inproc channel is there as soon as it is dialled.
@pytest.mark.parametrize(("kind", "waiting"), [("inproc", 0), ("tcp", 0), ("tcp", 1)])
def test_a_rank_that_dies_ends_the_wait_for_its_channel(
    kind: str, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolcluster.cluster.world.OPEN_SLICE", 0.1)
    with formed(kind, 2) as worlds:
        worlds[1 - waiting]._listener.close()  # as if its process was gone
        attempt = Attempt(lambda: worlds[waiting].open_channel(1 - waiting, "bulk:test", 60.0))
        die(worlds[1 - waiting])
        with pytest.raises(PeerLost) as caught:
            attempt.get()
        assert caught.value.rank == 1 - waiting
        assert attempt.seconds < 5


def test_closing_twice_is_harmless() -> None:
    meeting = Meeting("tcp", 1)
    world = meeting.join(0)
    world.leave()
    world.close()
    world.leave()
    world.close()
