"""The columns `link/<peer>/…`: when they come, and that they say what happened."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from smolcluster.collectives.groups import inproc_group, tcp_group
from smolcluster.collectives.local import LocalGroup
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import PeerLost
from smolcluster.monitoring import links
from smolcluster.monitoring.links import LinkMetrics, SessionLinks, measure_links
from smolcluster.transport.base import Channel, Hello
from smolcluster.transport.inproc import FaultPlan, FaultyChannel
from transport.leaks import no_leftovers

WAIT = 20.0
COLUMNS = {"bandwidth_bytes_per_s", "rtt_ms", "buffer_bytes", "queued_bytes"}
MB = torch.ones(250_000)


@pytest.fixture(autouse=True)
def closes_everything() -> Iterator[None]:
    with no_leftovers():
        yield


@contextlib.contextmanager
def opened(comms: list[TcpCommunicator]) -> Iterator[list[TcpCommunicator]]:
    try:
        yield comms
    finally:
        for comm in comms:
            comm.close()


def all_reduce(comms: list[TcpCommunicator]) -> None:
    """One MB over all ranks; with two, each sends one and receives one."""
    for work in [comm.all_reduce(MB.clone()) for comm in comms]:
        work.wait(WAIT)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.005)


def test_columns_come_every_interval_steps_for_every_peer() -> None:
    with opened(inproc_group(3)) as comms:
        metrics = measure_links(comms[1], 4)
        assert metrics is not None
        rows = {step: metrics.row(step, time.time()) for step in range(9)}
    assert [step for step, row in rows.items() if row] == [0, 4, 8]
    found = {key for key in rows[4] if "wire" not in key}
    assert found == {f"link/rank{peer}/{column}" for peer in (0, 2) for column in COLUMNS}


def test_engines_without_links_of_ours_have_no_columns() -> None:
    assert measure_links(LocalGroup(2).communicators[0], 1) is None


def test_sessions_have_columns_until_they_end() -> None:
    measured = SessionLinks(2)
    with opened(inproc_group(2)) as stays:
        with opened(inproc_group(2)) as goes:
            measured.open(goes[1].world)  # to rank0
            assert "link/rank0/rtt_ms" in measured.row(0, time.time())
            measured.open(stays[0].world)  # to rank1
            assert measured.row(1, time.time()) == {}
            assert {"link/rank0/rtt_ms", "link/rank1/rtt_ms"} <= measured.row(2, time.time()).keys()
        row = measured.row(4, time.time())
    assert {key for key in row if "wire" not in key} == {f"link/rank1/{column}" for column in COLUMNS}


def test_bandwidth_times_the_time_between_two_rows_is_what_was_sent_and_received() -> None:
    with opened(tcp_group(2)) as comms:
        metrics = LinkMetrics(comms[0].world, 1)
        metrics.row(0, 100.0)
        all_reduce(comms)
        row = metrics.row(1, 102.0)
    bandwidth = row["link/rank1/bandwidth_bytes_per_s"]
    assert isinstance(bandwidth, float)
    # headers of frames, and perhaps a heartbeat: below 1 %
    assert 2e6 <= bandwidth * 2.0 < 2.02e6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how many packets there were")
def test_wire_bytes_are_those_of_the_tensors_and_the_headers() -> None:
    with opened(tcp_group(2)) as comms:
        metrics = LinkMetrics(comms[0].world, 1)
        metrics.row(0, 100.0)
        for _ in range(10):
            all_reduce(comms)
        row = metrics.row(1, 101.0)
    payload, wire = row["link/rank1/bandwidth_bytes_per_s"], row["link/rank1/wire_bytes_per_s"]
    assert isinstance(payload, float)
    assert isinstance(wire, float)
    # 66 bytes a packet: loopback's packets are large, its acknowledgements some hundred for 20 MB. The kernel may still
    # hold what was sent last.
    assert 0.95 < wire / payload < 1.05


def test_what_the_peer_does_not_read_is_queued() -> None:
    def stalled(rank: int, hello: Hello, channel: Channel) -> Channel:
        return FaultyChannel(channel, FaultPlan(stall_after_bytes=0)) if rank == 1 and "p2p" in hello.lane else channel

    with opened(inproc_group(2, hook=stalled)) as comms:
        metrics = LinkMetrics(comms[0].world, 1)
        assert metrics.row(0, 100.0)["link/rank1/queued_bytes"] == 0
        comms[0].send(torch.ones(4_000_000), 1, 0)
        state = comms[0].world.link_state
        eventually(lambda: state(1).queued_bytes > 15_000_000)  # of 16 MB, whatever the kernel has taken
        assert state(1).sent_bytes < 4_000_000
        comms[0].abort(PeerLost("the test is over", 1))


def test_nothing_is_queued_when_everything_has_arrived() -> None:
    with opened(tcp_group(2)) as comms:
        all_reduce(comms)
        state = comms[0].world.link_state
        eventually(lambda: state(1).queued_bytes == 0)


@pytest.mark.parametrize("make_group", [inproc_group, tcp_group])
def test_the_first_row_has_a_round_trip_time(make_group: Callable[[int], list[TcpCommunicator]]) -> None:
    with opened(make_group(2)) as comms:
        metrics = LinkMetrics(comms[0].world, 1)
        eventually(lambda: comms[0].world.link_state(1).round_trip is not None)
        rtt_ms = metrics.row(0, time.time())["link/rank1/rtt_ms"]
    assert isinstance(rtt_ms, float)
    assert 0 < rtt_ms < 1000


def test_a_peer_that_never_answers_has_no_round_trip_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(inproc_group(2)) as comms:
        monkeypatch.setattr(comms[0].world, "ping", lambda: None)
        row = LinkMetrics(comms[0].world, 1).row(0, time.time())
    assert row["link/rank1/rtt_ms"] is None


@pytest.mark.parametrize(("interval", "expected"), [(0.0, 11), (1000.0, 1)])
def test_pings_go_out_at_most_once_an_interval(interval: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pings = []
    monkeypatch.setattr(links, "PING_INTERVAL", interval)
    with opened(inproc_group(2)) as comms:
        monkeypatch.setattr(comms[0].world, "ping", lambda: pings.append(1))
        metrics = LinkMetrics(comms[0].world, 50)
        for step in range(10):
            metrics.row(step, time.time())
    assert len(pings) == expected


def test_the_connections_of_a_part_of_the_group_count_too() -> None:
    with opened(inproc_group(2)) as comms:
        threads = [threading.Thread(target=lambda c=comm: parts.append(c.split([0, 1], "half"))) for comm in comms]
        parts: list[TcpCommunicator] = []
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        before = comms[0].world.link_state(1).sent_bytes, comms[0].telemetry.counter("link/sent_bytes")
        all_reduce(parts)
        assert comms[0].world.link_state(1).sent_bytes - before[0] > 1_000_000
        assert comms[0].telemetry.counter("link/sent_bytes") - before[1] > 1_000_000
        for part in parts:
            part.close()


def test_the_buffer_is_that_of_the_connection_that_carries_the_bytes() -> None:
    with opened(tcp_group(2)) as comms:
        sent = comms[0].send(MB, 1, 0)  # not over the first connection, which is that of all-reduces
        comms[1].recv(0, 0, out=torch.empty_like(MB)).wait(WAIT)
        sent.wait(WAIT)
        first, *others = comms[0].world._channels[1]
        assert first.sent_bytes < max(channel.sent_bytes for channel in others)
        (carries,) = [channel for channel in others if channel.sent_bytes > MB.nbytes]
        state = carries.socket_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(carries, "socket_state", lambda: replace(state, buffer_bytes=12345))
            assert comms[0].world.link_state(1).buffer_bytes == 12345
