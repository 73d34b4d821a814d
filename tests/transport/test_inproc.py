"""Channels in one process, and the faults that other tests inject with them: each must do what its plan says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from smolcluster.errors import ConnectFailed, ConnectionLost
from smolcluster.transport.base import Channel, Hello
from smolcluster.transport.inproc import FaultPlan, FaultyChannel, InprocNetwork

HELLO = Hello(1, "bulk:world", "run")
DEADLINE = 10.0


@contextlib.contextmanager
def connected(plan: FaultPlan | None = None) -> Iterator[tuple[Channel, Channel]]:
    """A sender and a receiver; the receiver is faulty."""
    network = InprocNetwork()
    listener = network.listen("rank0", 0)
    near = network.dial_channel("inproc://rank0", HELLO, DEADLINE)
    far = listener.accept_channel(1, "bulk:world", DEADLINE)
    receiver = far if plan is None else FaultyChannel(far, plan)
    yield near, receiver
    for channel in (near, receiver):
        channel.abort(ConnectionLost("the test is over"))
    listener.close()


def send(channel: Channel, data: bytes) -> None:
    assert channel.try_send([memoryview(data)]) == len(data)


def receive(channel: Channel, count: int, seconds: float = DEADLINE) -> tuple[bytes, list[int]]:
    """Up to `count` bytes within `seconds`, and in which portions they came."""
    target, portions, deadline = bytearray(count), [], time.monotonic() + seconds
    while sum(portions) < count and time.monotonic() < deadline:
        if got := channel.try_recv_into(memoryview(target)[sum(portions) :]):
            portions.append(got)
    return bytes(target[: sum(portions)]), portions


def test_bytes_pass_in_both_directions() -> None:
    with connected() as (near, far):
        send(near, b"hello")
        send(far, b"there")
        assert receive(far, 5)[0] == b"hello"
        assert receive(near, 5)[0] == b"there"


def test_nobody_listening_is_said() -> None:
    with pytest.raises(ConnectFailed, match=r"nobody listens at inproc://rank9 after 0\.01 s"):
        InprocNetwork().dial_channel("inproc://rank9", HELLO, 0.01)


def test_the_hook_sees_both_ends_with_their_owner() -> None:
    seen = []

    def hook(rank: int, hello: Hello, channel: Channel) -> Channel:
        seen.append((rank, hello))
        return channel

    network = InprocNetwork(hook)
    listener = network.listen("rank0", 0)
    near = network.dial_channel("inproc://rank0", HELLO, DEADLINE)
    near.abort(ConnectionLost("the test is over"))
    listener.close()
    assert seen == [(0, HELLO), (1, HELLO)]


def test_chunks_are_at_most_as_large_as_planned_and_nothing_is_lost() -> None:
    data = bytes(range(256)) * 40
    with connected(FaultPlan(max_chunk=100)) as (near, far):
        send(near, data)
        got, portions = receive(far, len(data))
        assert got == data
        assert max(portions) <= 100


def test_sending_is_cut_into_chunks_too() -> None:
    with connected(FaultPlan(max_chunk=10)) as (near, far):
        taken = far.try_send([memoryview(bytes(50)), memoryview(bytes(50))])
        assert 1 <= taken <= 10
        assert len(receive(near, taken)[0]) == taken


def test_latency_holds_bytes_back_and_says_until_when() -> None:
    with connected(FaultPlan(seed=3, max_latency=0.2)) as (near, far):
        send(near, b"x")
        assert far.due() is None
        assert far.try_recv_into(memoryview(bytearray(1))) == 0  # taken from the socket, held back
        due = far.due()
        assert due is not None
        assert time.monotonic() < due < time.monotonic() + 0.2
        assert receive(far, 1)[0] == b"x"
        assert time.monotonic() >= due
        assert far.due() is None


def test_latency_does_not_change_the_order() -> None:
    with connected(FaultPlan(seed=1, max_latency=0.01)) as (near, far):
        got = b""
        for n in range(30):
            send(near, bytes([n]))
            got += receive(far, 1, 0.0005)[0]
        got += receive(far, 30 - len(got))[0]
        assert got == bytes(range(30))


def test_the_same_seed_gives_the_same_latencies() -> None:
    def latency(seed: int) -> float:
        with connected(FaultPlan(seed=seed, max_latency=100.0)) as (near, far):
            send(near, b"x")
            far.try_recv_into(memoryview(bytearray(1)))
            return round((far.due() or 0.0) - time.monotonic())

    assert latency(5) == latency(5)
    assert len({latency(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("limit", [0, 1, 48, 1000])
def test_a_cut_comes_after_exactly_so_many_bytes(limit: int) -> None:
    with connected(FaultPlan(cut_after_bytes=limit)) as (near, far):
        send(near, bytes(2000))
        assert len(receive(far, limit)[0]) == limit
        with pytest.raises(ConnectionLost, match="cut by the fault plan"):
            receive(far, 1)
        assert _is_cut(near)


@pytest.mark.parametrize("limit", [0, 1, 48, 1000])
def test_a_stall_comes_after_exactly_so_many_bytes_and_the_connection_stays(limit: int) -> None:
    with connected(FaultPlan(stall_after_bytes=limit)) as (near, far):
        send(near, bytes(2000))
        assert len(receive(far, 2000, 0.05)[0]) == limit
        assert far.wants(sending=False) == (False, False)  # nothing to wait for
        send(near, b"still open")


def _is_cut(channel: Channel) -> bool:
    deadline = time.monotonic() + DEADLINE
    with contextlib.suppress(ConnectionLost):
        while time.monotonic() < deadline:
            channel.try_recv_into(memoryview(bytearray(1)))
        return False
    return True
