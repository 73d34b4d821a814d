"""Sessions: workers join when they like, one session for a rank, and a loss is a loss of one session only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.worlds import DEADLINE, Attempt, Meeting
from smolcluster.cluster.sessions import Granted, Newcomer, Reception, SessionWorld, Wait, join_session
from smolcluster.errors import AuthFailed, ConfigError, PeerLost, RendezvousTimeout
from smolcluster.transport import tcp
from smolcluster.transport.tcp import TcpNetwork, TcpOptions

PATIENCE = 1.0


class Server:
    """A reception that lets everybody in, and remembers."""

    def __init__(self, kind: str, grant: Callable[[Newcomer], Granted] | None = None) -> None:
        self.meeting = Meeting(kind, 1, PATIENCE)
        self.sessions: list[tuple[Newcomer, SessionWorld]] = []
        self.began = threading.Semaphore(0)
        self.number = 0
        self.worlds: list[SessionWorld] = []
        self.revoked: list[Granted] = []
        self.failing: set[str] = set()  # whose sessions do not begin
        self.reception = Reception(
            self.meeting.listeners, name="server", patience=PATIENCE, options={"seed": "1"}, grant=grant or self.grant,
            begin=self.begin, revoke=self.revoked.append,
        )  # fmt: skip

    def grant(self, newcomer: Newcomer) -> Granted:
        self.number += 1
        return Granted(self.number, 10 + self.number)

    def begin(self, newcomer: Newcomer, world: SessionWorld) -> None:
        if newcomer.name in self.failing:
            world.close()
            raise PeerLost("its connections did not come up", 1)
        self.sessions.append((newcomer, world))
        self.began.release()

    def join(self, rank: int, **settings: Any) -> SessionWorld:
        common: dict[str, Any] = {
            "run_id": "run-7", "patience": PATIENCE, "timeout": DEADLINE, "options": {"seed": "1"}, **settings,
        }  # fmt: skip
        newcomer = Newcomer(rank, f"worker{rank}", f"process{rank}", "tcp://127.0.0.1:0")
        world = join_session(newcomer, self.meeting.network(), lambda: self.meeting.leader, **common)
        self.worlds.append(world)
        return world

    def close(self) -> None:
        self.reception.close()
        for world in self.worlds:
            world.leave()
            world.close()
        for _, world in self.sessions:
            world.leave()
            world.close()


@pytest.fixture(params=["inproc", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(kind: str) -> Iterator[Server]:
    server = Server(kind)
    yield server
    server.close()


def ended(world: SessionWorld) -> threading.Event:
    event = threading.Event()
    world.on_failure(lambda _error: event.set())
    return event


def test_messages_travel_both_ways_and_generations_count(server: Server) -> None:
    first, second = server.join(1), server.join(2)
    assert server.began.acquire(timeout=DEADLINE)
    assert server.began.acquire(timeout=DEADLINE)
    assert (first.number, second.number) == (1, 2)
    assert (first.view().generation, second.view().generation) == (11, 12)
    assert (first.name(0), second.name(1)) == ("the server (server)", "worker worker2")
    heard: list[Any] = []
    came = threading.Event()
    theirs = next(world for newcomer, world in server.sessions if newcomer.rank == 2)
    theirs.on("hello", lambda rank, message: (heard.append((rank, message["n"])), came.set()))
    second.send(0, "hello", {"n": 7})
    assert came.wait(DEADLINE)
    assert heard == [(1, 7)]


def test_the_end_of_one_session_is_not_that_of_another(server: Server) -> None:
    first, second = server.join(1), server.join(2)
    assert server.began.acquire(timeout=DEADLINE)
    assert server.began.acquire(timeout=DEADLINE)
    theirs = {newcomer.rank: world for newcomer, world in server.sessions}
    gone = ended(theirs[1])
    first._heartbeat.close()
    for link in first._links.values():
        link.close()
    assert gone.wait(DEADLINE)
    assert "worker worker1 is lost" in str(theirs[1].error())
    assert theirs[2].error() is None
    assert second.error() is None


def test_a_server_that_falls_silent_is_noticed_by_the_worker(server: Server) -> None:
    world = server.join(1)
    assert server.began.acquire(timeout=DEADLINE)
    gone = ended(world)
    server.sessions[0][1]._heartbeat.close()
    assert gone.wait(DEADLINE)
    assert "the server (server) is lost: it was silent" in str(world.error())


def test_who_is_asked_to_wait_tries_again(kind: str) -> None:
    asked: list[int] = []

    def grant(newcomer: Newcomer) -> Granted:
        asked.append(newcomer.rank)
        if len(asked) < 3:
            raise Wait("its earlier session is not over yet")
        return Granted(5, 5)

    server = Server(kind, grant)
    try:
        assert server.join(1).number == 5
        assert asked == [1, 1, 1]
        assert server.began.acquire(timeout=DEADLINE)
    finally:
        server.close()


def test_who_is_never_let_in_is_told_why_at_last(kind: str) -> None:
    def grant(newcomer: Newcomer) -> Granted:
        raise Wait("its earlier session is not over yet")

    server = Server(kind, grant)
    try:
        with pytest.raises(RendezvousTimeout, match=r"was not let in .* its earlier session is not over yet"):
            server.join(1, timeout=0.5)
    finally:
        server.close()


def test_what_was_granted_and_did_not_begin_is_revoked(server: Server) -> None:
    server.failing = {"worker1"}
    server.join(1)
    deadline = time.monotonic() + DEADLINE
    while not server.revoked:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.revoked == [Granted(1, 11)]


def test_other_options_are_refused_by_name(server: Server) -> None:
    with pytest.raises(ConfigError, match="seed is 2 on worker1 and 1 on rank 0"):
        server.join(1, options={"seed": "2"})


def test_a_refusal_of_the_server_reaches_the_worker(kind: str) -> None:
    def grant(newcomer: Newcomer) -> Granted:
        raise ConfigError("'worker1' wants rank 1, but that is 'other'")

    server = Server(kind, grant)
    try:
        with pytest.raises(ConfigError, match="refused 'worker1': 'worker1' wants rank 1, but that is 'other'"):
            server.join(1)
    finally:
        server.close()


def test_a_malformed_join_is_refused(server: Server) -> None:
    from smolcluster.transport.base import Hello

    link = server.meeting.network().dial_control(server.meeting.leader, Hello(1, "control", "run-7", 0), DEADLINE)
    try:
        link.send({"kind": "join", "rank": "one"})
        assert link.receive(DEADLINE) == {"kind": "refused", "reason": "its join message is missing or malformed"}
    finally:
        link.close()


def test_a_worker_that_says_nothing_keeps_nobody_else_waiting(server: Server) -> None:
    from smolcluster.transport.base import Hello

    silent = server.meeting.network().dial_control(server.meeting.leader, Hello(1, "control", "run-7", 0), DEADLINE)
    try:
        assert server.join(2).number == 1
    finally:
        silent.close()


def test_a_wrong_token_is_refused_at_once() -> None:
    server = Server("tcp")
    try:
        network = TcpNetwork(b"another token altogether, longer", TcpOptions(patience=PATIENCE))
        newcomer = Newcomer(1, "worker1", "process1", "")
        with pytest.raises(AuthFailed):
            join_session(
                newcomer, network, lambda: server.meeting.leader, run_id="run-7", patience=PATIENCE, timeout=DEADLINE,
                options={"seed": "1"},
            )  # fmt: skip
    finally:
        server.close()


def test_a_worker_finds_the_server_at_its_new_address() -> None:
    """While it looks for a server that is gone, one is started elsewhere."""
    first, second = Server("tcp"), Server("tcp")
    first.close()
    addresses = [first.meeting.leader]
    newcomer = Newcomer(1, "worker1", "process1", "")
    attempt = Attempt(
        lambda: join_session(
            newcomer, second.meeting.network(), lambda: addresses[-1], run_id="run-7", patience=PATIENCE,
            timeout=DEADLINE, options={"seed": "1"},
        )
    )  # fmt: skip
    addresses.append(second.meeting.leader)
    try:
        world = attempt.get()
        second.worlds.append(world)
        assert second.began.acquire(timeout=DEADLINE)
        assert world.number == 1
    finally:
        second.close()


def test_the_listener_outlives_its_sessions() -> None:
    server = Server("tcp")
    try:
        first = server.join(1)
        assert server.began.acquire(timeout=DEADLINE)
        first.leave()
        first.close()
        server.sessions[0][1].close()
        assert server.join(1).number == 2
        assert server.began.acquire(timeout=DEADLINE)
    finally:
        server.close()


def test_closing_the_reception_closes_the_port() -> None:
    server = Server("tcp")
    host, port = tcp.parse_address(server.meeting.leader)
    server.close()
    with pytest.raises(RendezvousTimeout):
        server.join(1, timeout=0.3)
    tcp.listen(host, port, token=b"x" * 16, run_id="r").close()
