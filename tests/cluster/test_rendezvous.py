"""Static rendezvous: any order of start, who is missing, who is refused, and that a failed one leaves nothing open."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.worlds import DEADLINE, TOKEN, Attempt, Meeting, first_errors
from smolcluster.cluster import rendezvous
from smolcluster.cluster.world import World
from smolcluster.errors import AuthFailed, ConfigError, PeerLost, RendezvousTimeout, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.transport.base import Hello
from smolcluster.transport.tcp import CONTROL

KINDS = pytest.mark.parametrize("kind", ["inproc", "tcp"])


@contextlib.contextmanager
def meeting(kind: str, world_size: int, patience: float = 5.0) -> Iterator[Meeting]:
    place = Meeting(kind, world_size, patience)
    try:
        yield place
    finally:
        place.close()


def finish(worlds: list[World]) -> None:
    for world in worlds:
        world.leave()
    for world in worlds:
        world.close()


# --- who comes when


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_order_of_start_works(order: tuple[int, ...]) -> None:
    with meeting("tcp", 3) as place:
        attempts = {}
        for rank in order:
            attempts[rank] = Attempt(lambda rank=rank: place.join(rank))
            threading.Event().wait(0.03)  # so that each is well under way before the next
        worlds = [attempts[rank].get() for rank in range(3)]
        assert [world.rank for world in worlds] == [0, 1, 2]
        assert [sorted(world._links) for world in worlds] == [[1, 2], [0, 2], [0, 1]]
        finish(worlds)


@KINDS
def test_ranks_may_come_further_apart_than_the_patience(kind: str) -> None:
    patience = 0.4
    with meeting(kind, 3, patience) as place:
        early = [Attempt(lambda rank=rank: place.join(rank)) for rank in (0, 1)]
        threading.Event().wait(2 * patience)
        late = Attempt(lambda: place.join(2))
        worlds = [attempt.get() for attempt in (*early, late)]
        assert first_errors(worlds, 2 * patience) == [None, None, None]
        finish(worlds)


@KINDS
def test_one_rank_alone_is_a_world(kind: str) -> None:
    with meeting(kind, 1) as place:
        world = place.join(0)
        assert world.world_size == 1
        finish([world])


def test_the_run_gets_an_id_of_its_own() -> None:
    ids = set()
    for _ in range(3):
        with meeting("inproc", 1) as place:
            world = place.join(0)
            ids.add(world.view().run_id)
            finish([world])
    assert len(ids) == 3


@KINDS
def test_missing_ranks_are_named(kind: str) -> None:
    with meeting(kind, 4) as place:
        leader = Attempt(lambda: place.join(0, timeout=0.6))
        there = Attempt(lambda: place.join(2, timeout=DEADLINE))
        with pytest.raises(RendezvousTimeout, match=r"ranks 1, 3 of 4 did not come to .*:.* within 0\.6 s"):
            leader.get()
        with pytest.raises(PeerLost, match="rank 0 ended before all ranks were there") as caught:
            there.get()
        assert caught.value.rank == 0


def test_a_single_missing_rank_is_named_in_the_singular() -> None:
    with meeting("inproc", 2) as place, pytest.raises(RendezvousTimeout, match="rank 1 of 2 did not come"):
        place.join(0, timeout=0.1)


def test_a_rank_whose_leader_never_comes_says_so() -> None:
    with meeting("tcp", 2) as place:
        place.listeners[0].close()
        with pytest.raises(RendezvousTimeout, match=r"rank 1 waited for rank 0: could not reach tcp://"):
            place.join(1, timeout=0.2)


@KINDS
def test_a_rank_that_waits_for_the_others_gives_up_in_time(kind: str) -> None:
    with meeting(kind, 3) as place:
        leader = Attempt(lambda: place.join(0, timeout=1.0))
        with pytest.raises(RendezvousTimeout, match=r"rank 1 waited 0\.3 s at .*: other ranks are missing"):
            place.join(1, timeout=0.3)
        with pytest.raises(RendezvousTimeout, match="ranks 1, 2 of 3 did not come"):  # rank 1 has gone away again
            leader.get()


@KINDS
def test_a_rank_that_went_away_before_the_start_may_come_again(kind: str) -> None:
    with meeting(kind, 3) as place:
        leader = Attempt(lambda: place.join(0))
        with pytest.raises(RendezvousTimeout):
            place.join(1, timeout=0.3)
        again = Attempt(lambda: place.join(1, place.listen(1)))
        last = Attempt(lambda: place.join(2))
        finish([attempt.get() for attempt in (leader, again, last)])


# --- who is refused


class LogWatch(logging.Handler):
    """Waits for a line in the rendezvous' log."""

    def __init__(self, text: str) -> None:
        super().__init__(logging.INFO)
        self._text = text
        self._came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self._came.set()

    def __enter__(self) -> LogWatch:
        rendezvous.logger.addHandler(self)
        self._level = rendezvous.logger.level
        rendezvous.logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *exc: object) -> None:
        rendezvous.logger.removeHandler(self)
        rendezvous.logger.setLevel(self._level)

    def wait(self) -> None:
        assert self._came.wait(DEADLINE)


def refusals(kind: str, *, other: dict[str, Any], match: str, first: dict[str, Any] | None = None) -> None:
    """Ranks 0 and 1 are there; `other` tries to join, is refused with `match`, and the run goes on without it."""
    with meeting(kind, 3) as place:
        leader = Attempt(lambda: place.join(0, **(first or {})))
        with LogWatch("rank joined rank=1") as log:
            one = Attempt(lambda: place.join(1, **(first or {})))
            log.wait()
        stranger = {"rank": 2, "listener": place.listen(9), **other}
        attempt = Attempt(lambda: place.join(**stranger))
        with pytest.raises(ConfigError, match=match):
            attempt.get()
        assert attempt.seconds < 5
        two = Attempt(lambda: place.join(2, **(first or {})))
        worlds = [attempt.get() for attempt in (leader, one, two)]
        assert [member.name for member in worlds[2].view().members] == ["rank0", "rank1", "rank2"]
        finish(worlds)


@KINDS
def test_a_doubled_rank_is_refused_and_the_first_stays(kind: str) -> None:
    refusals(
        kind,
        other={"rank": 1, "name": "somebody"},
        match="refused 'somebody': 'somebody' wants rank 1, but 'rank1' .*is here already; is the same machine started",
    )


@KINDS
def test_a_doubled_name_is_refused_and_the_first_stays(kind: str) -> None:
    refusals(kind, other={"name": "rank1"}, match=r"'rank1' wants rank 2, but 'rank1' \(rank 1\) is here already")


@KINDS
def test_the_leaders_name_is_taken_too(kind: str) -> None:
    refusals(kind, other={"name": "rank0"}, match=r"'rank0' wants rank 2, but 'rank0' \(rank 0\) is here already")


@KINDS
def test_another_world_size_is_refused(kind: str) -> None:
    refusals(kind, other={"name": "x", "world_size": 4}, match="'x' expects 4 ranks, rank 0 expects 3")


@KINDS
def test_a_rank_outside_the_run_is_refused(kind: str) -> None:
    refusals(kind, other={"name": "x", "rank": 3}, match="'x' wants rank 3, but the ranks are 0 to 2")


@KINDS
def test_different_options_are_refused_by_name(kind: str) -> None:
    refusals(
        kind,
        first={"options": {"training.seed": "1", "training.batch_size": "8", "model.name": "gpt"}},
        other={"name": "x", "options": {"training.seed": "2", "model.name": "gpt", "data.name": "text"}},
        match=r"the options differ: data.name is text on x and None on rank 0; training.batch_size is None on x and 8 "
        r"on rank 0; training.seed is 2 on x and 1 on rank 0\. Start every machine with the same options",
    )


def test_at_most_three_differences_are_shown() -> None:
    options = {f"key{n}": "1" for n in range(5)}
    refusals("inproc", first={"options": options}, other={"options": {}}, match=r"key2 is .*\(and 2 more\)")


def test_a_wrong_token_is_refused_and_the_run_comes_together_without_it() -> None:
    with meeting("tcp", 2) as place:
        leader = Attempt(lambda: place.join(0))
        with pytest.raises(AuthFailed, match="the cluster tokens differ"):
            place.join(1, place.listen(1), network=None, token=TOKEN + b"!")
        one = Attempt(lambda: place.join(1))
        finish([leader.get(), one.get()])


def test_another_run_is_refused_and_the_run_comes_together_without_it() -> None:
    with meeting("tcp", 2) as place:
        leader = Attempt(lambda: place.join(0))
        with pytest.raises(AuthFailed, match="belongs to another run"):
            place.join(1, place.listen(1), run_id="run-6", timeout=0.3)
        one = Attempt(lambda: place.join(1))
        finish([leader.get(), one.get()])


@KINDS
def test_whoever_comes_after_the_start_is_told_at_once(kind: str) -> None:
    with meeting(kind, 2) as place:
        worlds = [attempt.get() for attempt in [Attempt(lambda rank=rank: place.join(rank)) for rank in range(2)]]
        start = time.monotonic()
        with pytest.raises(ConfigError, match="the run of 2 ranks has begun already; is 'rank1' started twice"):
            place.join(1, place.listen(1))
        assert time.monotonic() - start < 5
        assert first_errors(worlds, 0.0) == [None, None]
        finish(worlds)


JOIN: JsonObject = {"kind": "join", "rank": 1, "name": "x", "world_size": 2, "address": "tcp://h:1", "options": {}}


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"kind": "view"},
        {**JOIN, "rank": True},
        {**JOIN, "rank": "1"},
        {**JOIN, "rank": 1.5},
        {**JOIN, "rank": 0},
        {**JOIN, "name": None},
        {**JOIN, "name": ["x"]},
        {**JOIN, "address": None},
        {**JOIN, "address": 7},
        {key: value for key, value in JOIN.items() if key != "address"},
        {**JOIN, "options": ["seed"]},
        {**JOIN, "world_size": "2"},
        {**JOIN, "world_size": None},
    ],
    ids=str,
)
def test_a_malformed_join_is_refused_and_does_not_stop_the_leader(message: JsonObject) -> None:
    with meeting("inproc", 2) as place:
        leader = Attempt(lambda: place.join(0))
        link = place.network().dial_control(place.leader, Hello(1, CONTROL, "run-7"), DEADLINE)
        link.send(message)
        answer = link.receive(DEADLINE)
        assert answer is not None
        assert answer["kind"] == "refused"
        link.close()
        finish([attempt.get() for attempt in (leader, Attempt(lambda: place.join(1)))])


def test_a_newcomer_that_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolcluster.cluster.rendezvous.JOIN_TIMEOUT", 0.2)
    with meeting("inproc", 2) as place:
        leader = Attempt(lambda: place.join(0))
        link = place.network().dial_control(place.leader, Hello(1, CONTROL, "run-7"), DEADLINE)
        answer = link.receive(DEADLINE)
        assert answer is not None
        assert answer["kind"] == "refused"
        link.close()
        finish([attempt.get() for attempt in (leader, Attempt(lambda: place.join(1)))])


@KINDS
def test_a_rank_that_was_given_the_address_of_another_rank_than_0_is_told(kind: str) -> None:
    with meeting(kind, 3) as place:
        lost = Attempt(lambda: place.join(2, place.listen(2), name="x", leader_address=place.listeners[1].address))
        attempts = [Attempt(lambda rank=rank: place.join(rank)) for rank in range(3)]
        worlds = [attempt.get() for attempt in attempts]
        # Over TCP the handshake says so.
        with pytest.raises((AuthFailed, ConfigError), match=r"another rank than the one|this is rank 1, not rank 0"):
            lost.get()
        assert first_errors(worlds, 0.0) == [None, None, None]
        finish(worlds)


@pytest.mark.parametrize(
    "view",
    [
        {"kind": "view"},
        {"kind": "view", "generation": 1, "leader": 0, "run_id": "r", "members": []},
        {"kind": "view", "generation": 1, "leader": 0, "run_id": "r", "members": [{"name": "a", "address": "b"}, 7]},
        {"kind": "view", "generation": 1, "leader": 0, "run_id": "r", "members": [{"name": "a"}, {"name": "b"}]},
        {"kind": "view", "generation": "1", "leader": 0, "run_id": "r", "members": [{}, {}]},
    ],
    ids=str,
)
def test_a_malformed_view_is_an_error_and_not_a_crash(view: JsonObject) -> None:
    with meeting("inproc", 2) as place:
        one = Attempt(lambda: place.join(1))
        _, link = place.listeners[0].accept_control(DEADLINE)
        link.receive(DEADLINE)
        link.send(view)
        with pytest.raises(SmolError, match="malformed view"):
            one.get()
        link.close()


# --- nothing stays open: the folder's `closes_everything` looks for threads and sockets


@KINDS
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_join_closes_the_listener(kind: str, rank: int) -> None:
    place = Meeting(kind, 2)
    with pytest.raises(SmolError):
        place.join(rank, timeout=0.2)
    if rank == 1:
        place.listeners[0].close()
    else:
        place.listeners[1].close()


def test_a_refused_rank_leaves_nothing_open() -> None:
    with meeting("tcp", 2) as place:
        leader = Attempt(lambda: place.join(0, timeout=0.6))
        with pytest.raises(ConfigError):
            place.join(1, place.listen(1), world_size=3)
        with pytest.raises(RendezvousTimeout):
            leader.get()
