"""Heartbeats: who counts as silent, and that a process that was suspended itself blames nobody."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from cluster.worlds import first_errors, formed, silence
from smolcluster.cluster.heartbeat import BEATS_PER_PATIENCE, Heartbeat
from smolcluster.errors import PeerLost

PATIENCE = 0.5


class FakeWorld:
    """What a Heartbeat needs of a world."""

    rank = 0

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.heard = {1: 100.0, 2: 100.0}
        self.reported: list[tuple[int, str, bool]] = []
        self.beats: list[float] = []
        self.beaten = threading.Semaphore(0)

    def silent_since(self) -> dict[int, float]:
        return dict(self.heard)

    def send(self, rank: int, kind: str, payload: dict[str, Any]) -> None:
        assert kind == "beat"
        self.beats.append(time.monotonic())
        self.beaten.release()

    def report_lost(self, rank: int, reason: str, *, may_return: bool) -> None:
        self.reported.append((rank, reason, may_return))

    def note_sleep(self, until: float) -> None:
        self.slept = until

    def note_awake(self, now: float) -> None:
        pass


@pytest.fixture
def resting() -> Any:
    """A heartbeat of patience 5 whose thread has ended; its `look` can be called at any time of our choice."""
    world: Any = FakeWorld(5.0)
    heartbeat = Heartbeat(world)
    heartbeat.close()
    world.reported.clear()
    return heartbeat, world


def test_a_rank_is_lost_after_the_patience_and_not_before(resting: Any) -> None:
    heartbeat, world = resting
    world.heard[2] = 103.0
    heartbeat.look(now=104.9, overslept=0.0)
    assert world.reported == []
    heartbeat.look(now=105.1, overslept=0.0)
    assert world.reported == [(1, "it was silent for 5.1 s (cluster.patience is 5)", True)]


def test_all_silent_ranks_are_reported(resting: Any) -> None:
    heartbeat, world = resting
    heartbeat.look(now=106.0, overslept=0.1)
    assert [rank for rank, *_ in world.reported] == [1, 2]


def test_a_process_that_was_suspended_blames_nobody_at_first(resting: Any) -> None:
    heartbeat, world = resting
    heartbeat.look(now=160.0, overslept=59.0)  # everybody seems silent for a minute
    assert world.reported == []
    world.heard[1] = 160.5  # meanwhile the waiting beats of rank 1 were read; rank 2 is really gone
    heartbeat.look(now=161.0, overslept=0.0)
    assert [rank for rank, *_ in world.reported] == [2]


def test_a_short_delay_is_no_suspension(resting: Any) -> None:
    heartbeat, world = resting
    heartbeat.look(now=106.0, overslept=2.4)
    assert [rank for rank, *_ in world.reported] == [1, 2]


def test_a_slow_send_is_no_suspension() -> None:
    # One peer that reads nothing makes every round long. It must be found silent all the same.
    class SlowWorld(FakeWorld):
        def send(self, rank: int, kind: str, payload: dict[str, Any]) -> None:
            threading.Event().wait(self.patience)
            super().send(rank, kind, payload)

    world: Any = SlowWorld(0.1)
    world.heard = {1: time.monotonic(), 2: time.monotonic()}
    reported = threading.Event()
    world.report_lost = lambda rank, reason, may_return: reported.set()
    heartbeat = Heartbeat(world)
    assert reported.wait(5)
    heartbeat.close()


def test_everybody_gets_a_beat_at_once_and_then_regularly() -> None:
    world: Any = FakeWorld(PATIENCE)
    start = time.monotonic()
    heartbeat = Heartbeat(world)
    for _ in range(2 * 4):
        assert world.beaten.acquire(timeout=10)
    heartbeat.close()
    assert world.beats[1] - start < PATIENCE / BEATS_PER_PATIENCE
    assert world.beats[7] - start >= 3 * PATIENCE / BEATS_PER_PATIENCE


@pytest.mark.parametrize("kind", ["inproc", "tcp"])
def test_a_rank_that_hangs_is_noticed_within_the_patience_and_a_second(kind: str) -> None:
    with formed(kind, 3, PATIENCE) as worlds:
        silence(worlds[2])
        start = time.monotonic()
        errors = first_errors(worlds[:2], PATIENCE + 5)
        assert PATIENCE * 0.5 < time.monotonic() - start < PATIENCE + 1
        for error in errors:
            assert isinstance(error, PeerLost)
            assert error.rank == 2
            assert "silent for 0." in str(error)
            assert "cluster.patience is 0.5" in str(error)


@pytest.mark.parametrize("kind", ["inproc", "tcp"])
def test_a_rank_that_hung_and_wakes_up_knows_that_it_is_the_lost_one(kind: str) -> None:
    with formed(kind, 3, PATIENCE) as worlds:
        silence(worlds[2])
        (error,) = first_errors(worlds[2:], PATIENCE + 5)
        assert isinstance(error, PeerLost)
        assert error.rank == 2


@pytest.mark.parametrize("kind", ["inproc", "tcp"])
def test_an_idle_run_lives_by_its_beats(kind: str) -> None:
    with formed(kind, 3, PATIENCE) as worlds:
        assert first_errors(worlds, 2.2 * PATIENCE) == [None, None, None]
