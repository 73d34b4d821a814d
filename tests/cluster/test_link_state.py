"""What a world knows of its links: round trips over a slow link, and every byte, those of control messages too."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from cluster.worlds import DEADLINE, Attempt, Meeting, formed, silence
from smolcluster.cluster.world import World
from smolcluster.transport.tcp import parse_address

ONE_WAY = 0.03


@dataclass
class Relay:
    """Stands between two ranks: passes each piece on `one_way` seconds later, and counts the bytes of both ways."""

    target: tuple[str, int]
    one_way: float
    passed: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})

    def __post_init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._server]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(DEADLINE)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            near, _ = self._server.accept()
            far = socket.create_connection(self.target)
            self._sockets += [near, far]
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for way, source, sink in (("up", near, far), ("down", far, near)):
                thread = threading.Thread(target=self._pass_on, args=(way, source, sink))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                threading.Event().wait(self.one_way)
                self.passed[way] += len(piece)
                sink.sendall(piece)


@contextlib.contextmanager
def far_apart(one_way: float) -> Iterator[tuple[list[World], Relay]]:
    """Two worlds whose control link goes through a relay."""
    meeting = Meeting("tcp", 2)
    relay = Relay(parse_address(meeting.leader), one_way)
    with contextlib.closing(relay):
        attempts = [Attempt(lambda: meeting.join(0)), Attempt(lambda: meeting.join(1, leader_address=relay.address))]
        worlds = [attempt.get() for attempt in attempts]
        try:
            yield worlds, relay
        finally:
            for world in worlds:
                world.leave()
            for world in worlds:
                world.close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.005)


def test_a_round_trip_takes_what_the_link_takes() -> None:
    with far_apart(ONE_WAY) as (worlds, _):
        for asked, peer in ((worlds[0], 1), (worlds[1], 0)):
            found = []
            for _ in range(4):  # one may wait behind a heartbeat
                asked.ping()
                count = len(asked._round_trips[peer])
                eventually(lambda a=asked, p=peer, c=count: len(a._round_trips[p]) > c)
                found.append(asked.link_state(peer).round_trip)
            # above: the relay's own threads wake up late on a busy machine
            assert 2 * ONE_WAY <= found[-1] < 2 * ONE_WAY + 0.05
            assert found == sorted(found, reverse=True)  # the fastest of them counts


def test_a_peer_that_computes_makes_a_link_no_slower() -> None:
    with formed("tcp", 2) as worlds:
        handler = worlds[1]._links[0]._on_message
        assert handler is not None

        def late(message: dict[str, object]) -> None:
            if message["kind"] == "ping":
                threading.Event().wait(0.3)
            handler(message)

        worlds[1]._links[0]._on_message = late
        worlds[0].ping()
        eventually(lambda: worlds[0].link_state(1).round_trip is not None)
        assert worlds[0].link_state(1).round_trip < 0.25


def test_only_the_last_pings_count() -> None:
    with formed("inproc", 2) as worlds:
        silence(worlds[0])
        for seconds in (0.001, 0.2, 0.3, 0.4, 0.5):
            worlds[0]._round_trips[1].append(seconds)
        assert worlds[0].link_state(1).round_trip == 0.001
        worlds[0]._round_trips[1].append(0.6)
        assert worlds[0].link_state(1).round_trip == 0.2


@pytest.mark.parametrize(
    "pong",
    [
        {},
        {"sent": 1.0},
        {"sent": "1", "held": 0.0},
        {"sent": 10**400, "held": 0},
        {"sent": -1.0, "held": 0.0},
        {"sent": 1.0, "held": 1e300},
        {"sent": float("nan"), "held": 0.0},
    ],
)
def test_a_pong_that_answers_nothing_is_ignored(pong: dict[str, object]) -> None:
    with formed("inproc", 2) as worlds:
        worlds[0]._received(1, {"kind": "pong", **pong})  # type: ignore[dict-item]
        assert worlds[0].link_state(1).round_trip is None


def test_every_byte_of_a_control_link_is_counted() -> None:
    with far_apart(0.0) as (worlds, relay):
        worlds[1].send(0, "row", {"row": {"text": "x" * 10_000}})
        for world in worlds:
            silence(world)

        def counted() -> bool:
            near, far = worlds[1].link_state(0), worlds[0].link_state(1)
            passed = (relay.passed["up"], relay.passed["down"])
            return (near.sent_bytes, near.recv_bytes) == passed == (far.recv_bytes, far.sent_bytes)

        eventually(counted)
        assert relay.passed["up"] > 10_000
        up, down = relay.passed["up"], relay.passed["down"]
        assert worlds[1].new_bytes() == (up, down)
        assert worlds[1].new_bytes() == (0, 0)
        assert worlds[0].new_bytes() == (down, up)


def test_a_bulk_connection_counts_from_its_handshake_on() -> None:
    with formed("tcp", 2) as worlds:
        opening = Attempt(lambda: worlds[0].open_channel(1, "bulk:world", DEADLINE))
        dialled = worlds[1].open_channel(0, "bulk:world", DEADLINE)
        accepted = opening.get()
        hello = 48 + len("bulk:world") + len(worlds[0].view().run_id)
        assert (dialled.sent_bytes, dialled.recv_bytes) == (hello + 40, 80)
        assert (accepted.sent_bytes, accepted.recv_bytes) == (80, hello + 40)
        before = worlds[1].link_state(0).sent_bytes
        assert dialled.try_send([memoryview(bytes(1000))]) == 1000
        assert worlds[1].link_state(0).sent_bytes >= before + 1000
        assert worlds[1].link_state(0).buffer_bytes == dialled.socket_state().buffer_bytes
        for channel in (dialled, accepted):
            channel.abort(worlds[0].error() or ConnectionError())  # type: ignore[arg-type]
