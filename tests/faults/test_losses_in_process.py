"""What the storm of benchmarks/faults.py found, rank by rank, with ranks that are threads of the test."""

from __future__ import annotations

import contextlib
import gc
import math
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cluster.worlds import DEADLINE, RUN, TOKEN, Attempt, Meeting, first_errors, formed, silence
from smolcluster.cluster.heartbeat import MARGIN, Heartbeat
from smolcluster.cluster.world import BEATS_PER_PATIENCE, DOUBT, World, clock_with_sleep
from smolcluster.collectives.groups import inproc_group, tcp_group
from smolcluster.collectives.lane import Lane
from smolcluster.collectives.lane_spans import LaneSpans
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import PeerLost
from smolcluster.telemetry import Telemetry
from smolcluster.transport import frame, tcp
from smolcluster.transport.base import Channel, Hello
from smolcluster.transport.frame import KIND_MESSAGE, Prelude
from smolcluster.transport.inproc import FaultPlan, FaultyChannel
from smolcluster.transport.tcp import CONTROL, TcpNetwork, TcpOptions
from smolcluster.transport.tensors import dtype_code

PATIENCE = 0.6


@contextlib.contextmanager
def closing(comms: list[TcpCommunicator]) -> Iterator[list[TcpCommunicator]]:
    try:
        yield comms
    finally:
        for comm in comms:
            comm.close()


# --- half a frame


@pytest.mark.parametrize("nbytes", [20, 500])  # within the prelude, within the payload
def test_a_rank_that_sends_half_a_frame_and_only_beats_from_then_on_is_lost(nbytes: int) -> None:
    def hook(rank: int, hello: Hello, channel: Channel) -> Channel:
        stalls = (rank, hello.rank, hello.lane) == (0, 1, "bulk:world")
        return FaultyChannel(channel, FaultPlan(stall_after_bytes=nbytes)) if stalls else channel

    with closing(inproc_group(3, hook=hook, patience=PATIENCE)) as comms:
        began = time.monotonic()
        works = [comm.all_reduce(torch.ones(1000)) for comm in comms]
        with pytest.raises(PeerLost, match=r"rank 1 is lost: it sent half a frame, then nothing for 0\.6 s"):
            works[0].wait(DEADLINE)
        errors = first_errors([comm.world for comm in comms], DEADLINE)  # rank 2 has all it needs, but it is told
        assert [error.rank for error in errors if isinstance(error, PeerLost)] == [1] * 3
        assert PATIENCE < time.monotonic() - began < PATIENCE + 2.0


class Trickle:
    """A channel from which a frame comes in the pieces that the test gives it."""

    def __init__(self) -> None:
        self.here = bytearray()

    def try_recv_into(self, buffer: memoryview) -> int:
        piece = self.here[: len(buffer)]
        buffer[: len(piece)] = piece
        del self.here[: len(piece)]
        return len(piece)


class Taker:
    """Takes every payload, if it is told to."""

    def __init__(self) -> None:
        self.expects_any = True

    def place(self, lane: Lane, prelude: Prelude, dims: bytes) -> memoryview | None:
        return memoryview(bytearray(prelude.nbytes)) if self.expects_any else None

    def arrived(self, lane: Lane, prelude: Prelude) -> None:
        pass


def test_a_lane_stalls_only_within_a_frame_that_is_being_read() -> None:
    channel: Any = Trickle()
    taker: Any = Taker()
    lane = Lane(1, channel, taker, LaneSpans(Telemetry(), "world", 0, 1, messages=False))
    prelude = Prelude(KIND_MESSAGE, 0, 0, dtype_code(torch.float32), 0, 1, 0, 0, 0, 25, 100)
    whole = bytes(frame.pack(prelude, (25,))) + bytes(100)
    taker.expects_any = False

    def stalled_after(piece: bytes, now: float) -> float:
        channel.here += piece
        lane.pump()
        return lane.stalled_for(now)

    assert stalled_after(b"", 10.0) == 0.0  # no frame
    assert stalled_after(b"", 20.0) == 0.0
    assert stalled_after(whole[:20], 30.0) == 0.0  # within the prelude
    assert stalled_after(b"", 31.0) == 1.0
    assert stalled_after(b"", 39.0) == 9.0
    assert stalled_after(whole[20:60], 40.0) == 0.0  # its head is complete, and nobody expects it yet
    assert stalled_after(b"", 50.0) == 0.0
    taker.expects_any = True
    assert stalled_after(b"", 60.0) == 0.0
    assert stalled_after(b"", 62.0) == 2.0  # within the payload
    assert stalled_after(whole[60:61], 63.0) == 0.0
    assert stalled_after(b"", 64.0) == 1.0
    assert stalled_after(whole[61:], 65.0) == 0.0
    assert stalled_after(b"", 99.0) == 0.0


def test_a_frame_that_waits_for_its_call_is_no_loss() -> None:
    # It has come in part only: the rest does not fit into the socket's buffer, and nobody reads on.
    with closing(tcp_group(2, patience=PATIENCE)) as comms:
        early = comms[1].all_reduce(torch.ones(4_000_000))
        comms[0].recv(1, 7)  # keeps the loop of rank 0 going
        threading.Event().wait(2.5 * PATIENCE)
        assert comms[0].world.error() is None
        comms[0].all_reduce(torch.ones(4_000_000)).wait(DEADLINE)
        early.wait(DEADLINE)


# --- groups that are closed


def test_a_world_forgets_a_closed_group() -> None:
    with closing(inproc_group(2)) as comms:
        world = comms[0].world
        before = len(world._on_failure)
        parts = [Attempt(lambda comm=comm: comm.split([0, 1], "part")) for comm in comms]
        groups = [attempt.get() for attempt in parts]
        gone = weakref.ref(groups[0])
        for group in groups:
            group.close()
        del parts, groups, group
        gc.collect()
        assert gone() is None
        assert len(world._on_failure) == before


# --- before the run has begun


def test_a_leader_that_freezes_while_others_wait_for_the_last_is_lost_to_them() -> None:
    leader = tcp.listen("127.0.0.1", 0, token=TOKEN, run_id=RUN)
    with contextlib.closing(leader), contextlib.closing(Meeting("tcp", 2, PATIENCE)) as meeting:
        follower = Attempt(lambda: meeting.join(1, meeting.listen(1), leader_address=leader.address))
        _, link = leader.accept_control(DEADLINE)
        assert (link.receive(DEADLINE) or {})["kind"] == "join"
        threading.Event().wait(1.5 * PATIENCE)  # it imports torch, and says nothing yet
        link.send({"kind": "beat"})
        frozen = time.monotonic()
        with pytest.raises(PeerLost, match=r"rank 0 was silent for 0\.6 s") as lost:
            follower.get()
        assert PATIENCE - 0.1 < time.monotonic() - frozen < PATIENCE + 1.0
        assert lost.value.rank == 0
        link.close()


def test_those_who_wait_for_the_last_rank_do_not_give_the_leader_up() -> None:
    with contextlib.closing(Meeting("tcp", 3, PATIENCE)) as meeting:
        early = [Attempt(lambda rank=rank: meeting.join(rank)) for rank in (0, 1)]
        # A newcomer proves the token and then says nothing: the leader waits for its name, and must beat meanwhile.
        mute = TcpNetwork(TOKEN).dial_control(meeting.leader, Hello(2, CONTROL, RUN, 0), DEADLINE)
        threading.Event().wait(2.5 * PATIENCE)
        mute.close()
        worlds = [attempt.get() for attempt in (*early, Attempt(lambda: meeting.join(2)))]
        assert [world.error() for world in worlds] == [None] * 3
        for world in worlds:
            world.leave()
        for world in worlds:
            world.close()


def test_a_dialler_whose_run_has_ended_does_not_wait_for_a_frozen_listener() -> None:
    frozen = socket.create_server(("127.0.0.1", 0))  # the system accepts, the process never answers
    lost = PeerLost("rank 0 is lost", 0)
    ended: list[PeerLost] = []

    def dial() -> object:
        address = f"tcp://127.0.0.1:{frozen.getsockname()[1]}"
        return tcp.dial(
            address, Hello(1, "bulk:world", RUN, 0), TOKEN, DEADLINE, TcpOptions(), lambda: ended[0] if ended else None
        )

    with contextlib.closing(frozen):
        attempt = Attempt(dial)
        threading.Event().wait(0.3)
        ended.append(lost)
        told = time.monotonic()
        with pytest.raises(PeerLost):
            attempt.get()
        assert time.monotonic() - told < 1.0  # and not the 5 s of a handshake


# --- a process that was suspended


def suspend(world: World, seconds: float) -> None:
    """The heartbeat's thread did not run for so long: what a process that was stopped finds when it wakes."""
    silence(world)
    world.note_sleep(clock_with_sleep() - seconds)


def test_a_rank_that_is_awake_may_write_at_once() -> None:
    with formed("inproc", 2, PATIENCE) as worlds:
        began = time.monotonic()
        for _ in range(1000):
            worlds[0].confirm()
        assert time.monotonic() - began < PATIENCE / BEATS_PER_PATIENCE


@pytest.mark.parametrize("wakes_first", ["the thread that writes", "the heartbeat"])
def test_a_rank_that_was_suspended_together_with_all_others_writes_after_a_moment(wakes_first: str) -> None:
    with formed("inproc", 2, PATIENCE) as worlds:
        suspend(worlds[0], 10 * PATIENCE)
        if wakes_first == "the heartbeat":
            worlds[0].note_awake(clock_with_sleep())
        writing = Attempt(worlds[0].confirm)
        threading.Event().wait(0.05)
        assert writing._thread.is_alive()
        if wakes_first != "the heartbeat":
            worlds[0].note_awake(clock_with_sleep())
        writing.get()


@pytest.mark.parametrize("hears", ["that it is lost", "only that the others have closed"])
def test_a_rank_that_was_suspended_and_given_up_writes_nothing_and_knows_why(hears: str) -> None:
    with formed("tcp", 2, 20.0) as worlds:
        suspend(worlds[0], 25.0)
        writing = Attempt(worlds[0].confirm)
        if hears == "that it is lost":
            worlds[1].report_lost(0, "it was silent for 20.1 s")
        else:
            silence(worlds[1])
            worlds[1]._links[0].close()
        with pytest.raises(PeerLost, match=r"rank 0 was suspended for 25\.\d s, longer than cluster.patience") as lost:
            writing.get()
        assert lost.value.rank == 0
        assert worlds[0].lost == [0]


def test_a_rank_writes_on_when_another_one_is_lost() -> None:
    with formed("inproc", 3, 20.0) as worlds:
        worlds[0].report_lost(2, "it died")
        worlds[0].confirm()


def test_a_heartbeat_that_is_late_by_less_blames_the_one_that_is_lost() -> None:
    with formed("inproc", 3, 20.0) as worlds:
        suspend(worlds[0], 19.0)
        worlds[0].report_lost(2, "it died")
        assert worlds[0].lost == [2]
        assert DOUBT * 20.0 < 19.0 < math.inf


# --- how soon


class Listening:
    """What a Heartbeat needs of a world in which two others were heard at 100 s and 103 s."""

    rank = 0
    patience = 5.0

    def silent_since(self) -> dict[int, float]:
        return {1: 103.0, 2: 100.0}

    def send(self, rank: int, kind: str, payload: object) -> None: ...
    def note_sleep(self, until: float) -> None: ...
    def note_awake(self, now: float) -> None: ...


def test_a_silent_rank_is_looked_for_when_its_time_is_over_and_not_a_beat_later() -> None:
    world: Any = Listening()
    heartbeat = Heartbeat(world)
    heartbeat.close()
    assert heartbeat._seconds_to_next_look(101.0) == 1.0  # the next beat
    assert heartbeat._seconds_to_next_look(104.6) == pytest.approx(0.4 + MARGIN)
    assert heartbeat._seconds_to_next_look(110.0) == 1.0  # after a suspension: first what they sent is read
