"""Strangers at a listener: how many are kept, who goes first, what the log says, and that honest ranks still get in."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from smolcluster.errors import ConnectFailed, ConnectionLost
from smolcluster.transport import admission, tcp
from smolcluster.transport.admission import MAX_UNAUTHENTICATED, RefusalLog, Strangers
from smolcluster.transport.base import Hello
from smolcluster.transport.tcp import TcpListener, TcpNetwork, listen, parse_address

TOKEN = b"correct horse battery staple"
RUN = "run-7"
PATIENCE = 10.0


@pytest.fixture
def listener() -> Iterator[TcpListener]:
    with contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id=RUN)) as opened:
        yield opened


def visit(listener: TcpListener, rank: int = 1) -> None:
    """An honest rank comes in and goes."""
    near = TcpNetwork(TOKEN).dial_channel(listener.address, Hello(rank, "bulk:world", RUN), PATIENCE)
    far = listener.accept_channel(rank, "bulk:world", PATIENCE)
    near.abort(ConnectionLost("the visit is over"))
    far.abort(ConnectionLost("the visit is over"))


def handshake_threads() -> int:
    return sum(thread.name.startswith("handshake") for thread in threading.enumerate())


def test_a_rank_gets_in_while_silent_strangers_hold_and_renew_all_places(listener: TcpListener) -> None:
    stop, most = threading.Event(), [0]

    def crowd() -> None:
        kept: deque[socket.socket] = deque()
        while not stop.is_set():
            kept.append(socket.create_connection(parse_address(listener.address), timeout=PATIENCE))
            if len(kept) > 2 * MAX_UNAUTHENTICATED:
                kept.popleft().close()
            most[0] = max(most[0], handshake_threads())
        for sock in kept:
            sock.close()

    thread = threading.Thread(target=crowd, name="test-crowd")
    thread.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while most[0] < MAX_UNAUTHENTICATED and time.monotonic() < deadline:
            stop.wait(0.01)
        began = time.monotonic()
        for rank in range(1, 6):
            visit(listener, rank)
        assert time.monotonic() - began < tcp.HANDSHAKE_TIMEOUT  # not when the strangers' time was over
    finally:
        stop.set()
        thread.join()
    # One is counted twice when its place is taken before its thread is quite gone.
    assert MAX_UNAUTHENTICATED <= most[0] <= MAX_UNAUTHENTICATED + 2


class Crowd:
    """Strangers of several hosts, each with a thread that ends once its connection is shut down."""

    def __init__(self) -> None:
        self.strangers = Strangers()
        self.ended: list[str] = []
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self.prove = threading.Event()

    def come(self, name: str, host: str, *, proves: bool = False, stubborn: bool = False) -> None:
        near, far = socket.socketpair()
        near.settimeout(PATIENCE)
        far.settimeout(PATIENCE)
        self._pairs.append((near, far))
        proved = threading.Event()

        def greet() -> None:
            if proves:
                self.strangers.proved()
            proved.set()
            if stubborn:
                self.prove.wait(PATIENCE)
            far.recv(1)
            if self.strangers.evicted() is not None:
                self.ended.append(name)
            self.strangers.remove(threading.current_thread())

        thread = threading.Thread(target=greet, name=f"test-{name}")
        self.strangers.add(thread, far, host)
        self._threads.append(thread)
        thread.start()
        proved.wait(PATIENCE)

    def go(self) -> None:
        self.prove.set()
        for near, _ in self._pairs:
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for pair in self._pairs:
            for sock in pair:
                sock.close()


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    made = Crowd()
    yield made
    made.go()


def test_the_host_with_the_most_gives_up_its_oldest(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_UNAUTHENTICATED", 5)
    for name, host in (("b1", "b"), ("b2", "b"), ("a1", "a"), ("a2", "a"), ("a3", "a")):
        crowd.come(name, host)
    crowd.come("c1", "c")
    assert crowd.ended == ["a1"]
    crowd.come("c2", "c")  # a and b have two each, and b was first
    assert crowd.ended in (["a1", "b1"], ["a1", "a2"])
    crowd.come("c3", "c")
    assert len(crowd.ended) == 3


def test_whoever_has_proved_the_token_keeps_its_place(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_UNAUTHENTICATED", 2)
    crowd.come("rank", "a", proves=True)
    for number in range(4):
        crowd.come(f"stranger{number}", "a")
    assert crowd.ended == ["stranger0", "stranger1"]


def test_a_stranger_that_does_not_go_costs_the_newcomer_its_place(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_UNAUTHENTICATED", 1)
    monkeypatch.setattr(admission, "EVICTION_TIMEOUT", 0.05)
    crowd.come("stubborn", "a", stubborn=True)
    with pytest.raises(ConnectionLost, match="too many unauthenticated"):
        crowd.come("late", "b")


# --- the log


def test_refusals_are_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    log = RefusalLog("tcp://here:1")
    for number in range(3):
        log.refused(f"tcp://there:{number}", "not a smolcluster handshake")
    log.look(at_end=True)
    assert [record.getMessage() for record in caplog.records] == [
        f"connection refused peer=tcp://there:{number} reason=not a smolcluster handshake" for number in range(3)
    ]


def test_a_flood_of_refusals_is_counted_instead_of_written_down(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RefusalLog("tcp://here:1")
    for _ in range(1000):
        log.refused("tcp://there:1", "no")
    assert len(caplog.records) == admission.LINES_PER_WINDOW
    monkeypatch.setattr(admission, "LINES_WINDOW", 0.0)  # its time is over
    log.look()
    assert caplog.records[-1].getMessage() == "connections refused, and 980 more address=tcp://here:1"
    log.refused("tcp://there:1", "no")
    assert caplog.records[-1].getMessage() == "connection refused peer=tcp://there:1 reason=no"


def test_a_flood_does_not_hide_another_reason(caplog: pytest.LogCaptureFixture) -> None:
    log = RefusalLog("tcp://here:1")
    for port in range(100):
        log.refused(f"tcp://there:{port}", f"tcp://there:{port} closed the connection during the handshake")
    for port in range(100, 200):
        log.refused(f"tcp://there:{port}", "the cluster tokens differ")
    log.look(at_end=True)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == admission.LINES_PER_WINDOW + 2
    assert lines[-2:] == [
        "connection refused peer=tcp://there:100 reason=the cluster tokens differ",
        "connections refused, and 179 more address=tcp://here:1",
    ]


def test_a_flood_with_a_new_reason_each_time_is_counted_too(caplog: pytest.LogCaptureFixture) -> None:
    log = RefusalLog("tcp://here:1")
    for number in range(1000):
        log.refused("tcp://there:1", "x" * number)
    assert len(caplog.records) <= admission.LINES_PER_WINDOW + admission.KINDS_PER_WINDOW


def test_a_scan_of_a_thousand_ports_leaves_few_lines(listener: TcpListener, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "smolcluster"):
        for _ in range(200):
            socket.create_connection(parse_address(listener.address), timeout=PATIENCE).close()
        visit(listener)
        listener.close()
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    shown = len(lines) - 1
    # One more for whoever had to make room, if the machine was that slow.
    assert admission.LINES_PER_WINDOW <= shown <= admission.LINES_PER_WINDOW + 1
    assert lines[-1].startswith(f"connections refused, and {200 - shown} more")


# --- the system has no more


class Listening:
    """Stands for the listening socket; `accept` first does what the test wants."""

    def __init__(self, sock: socket.socket, first: Any) -> None:
        self._sock = sock
        self._first = first
        self.calls = 0

    def accept(self) -> Any:
        self.calls += 1
        accepted = self._first(self)
        return self._sock.accept() if accepted is None else accepted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_a_process_without_free_descriptors_neither_dies_nor_spins(
    listener: TcpListener, caplog: pytest.LogCaptureFixture
) -> None:
    full = threading.Event()
    full.set()

    def accept(sock: Listening) -> None:
        if full.is_set():
            raise OSError(errno.EMFILE, "Too many open files")

    listening = Listening(listener._sock, accept)
    listener._sock = listening  # type: ignore[assignment] # it has all that is used
    time.sleep(1.0)  # what would spin does so
    assert listening.calls < 15
    assert "accept failed (Too many open files)" in caplog.text
    full.clear()
    visit(listener)


def test_a_system_without_more_threads_does_not_end_the_listener(
    listener: TcpListener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, refused = threading.Thread.start, threading.Event()

    def fail_once(self: threading.Thread) -> None:
        if self.name.startswith("handshake") and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fail_once)
    visit(listener)
    assert refused.is_set()
    assert "can't start new thread" in caplog.text


def test_a_stranger_without_an_address_is_nobody(listener: TcpListener) -> None:
    # macOS: it hung up before it was accepted.
    near, far = socket.socketpair()
    given: list[Any] = [(far, None)]
    listening = Listening(listener._sock, lambda sock: given.pop() if given else None)
    listener._sock = listening  # type: ignore[assignment] # it has all that is used
    visit(listener)
    assert near.recv(1) == b""
    near.close()


def test_connections_that_nobody_claims_are_kept_up_to_a_limit(
    listener: TcpListener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tcp, "MAX_UNCLAIMED", 3)
    near = [
        TcpNetwork(TOKEN).dial_channel(listener.address, Hello(rank, "bulk:world", RUN), PATIENCE)
        for rank in range(1, 5)
    ]
    with pytest.raises(ConnectFailed):
        listener.accept_channel(4, "bulk:world", 0.3)
    assert [record.getMessage().split("reason=")[1] for record in caplog.records] == ["3 connections wait here already"]
    for channel in near:
        channel.abort(ConnectionLost("the test is over"))
    listener.accept_channel(1, "bulk:world", PATIENCE).abort(ConnectionLost("the test is over"))
    visit(listener, 4)  # its name was not taken
