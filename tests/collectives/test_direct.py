"""A ring of direct messages: in order, of any size, both ways at once, and ended when a rank is lost."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from smolcluster.cluster.generations import meet
from smolcluster.cluster.world import Member, View
from smolcluster.collectives.direct import DirectRing
from smolcluster.errors import CollectiveMismatch, CollectiveTimeout, PeerLost, SmolError
from smolcluster.transport import frame
from smolcluster.transport.tcp import TcpNetwork, TcpOptions, listen

PATIENCE = 1.0
TOKEN = b"a token of 32 bytes for the tests"


def on_ring(world_size: int, fn: Callable[[DirectRing], Any], *, tls: bool = False) -> list[Any]:
    """Run fn(ring) on a thread for each rank; what it gives or raises, in rank order."""
    run_id, options = secrets.token_hex(4), TcpOptions(PATIENCE, None, tls, False)
    listeners = [
        listen("127.0.0.1", 0, token=TOKEN, run_id=run_id, rank=rank, options=options) for rank in range(world_size)
    ]
    members = tuple(Member(rank, f"rank{rank}", listener.address) for rank, listener in enumerate(listeners))
    view = View(7, members, 0, run_id)
    found: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            network = TcpNetwork(TOKEN, options)
            world = meet(rank, view, listeners[rank], network, patience=PATIENCE, timeout=20)
            with contextlib.ExitStack() as undo:
                undo.callback(world.close)
                ring = DirectRing(world, timeout=20)
                undo.pop_all()
            with contextlib.closing(ring):
                found[rank] = fn(ring)
        except SmolError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_messages_go_round_in_order(world_size: int, tls: bool) -> None:
    sizes = [0, 1, 3000, 70_001, 2_000_003, 5]

    def go(ring: DirectRing) -> bool:
        for number, size in enumerate(sizes):
            whole = bytes([10 * number + ring.rank]) * size
            mine = [whole[: size // 3], memoryview(whole)[size // 3 :]]
            if ring.rank == 0:
                ring.send(mine)
            before = ring.receive()
            assert before == bytes([10 * number + (ring.rank - 1) % world_size]) * size
            if ring.rank > 0:
                ring.send(mine)
        return True

    if tls:
        pytest.importorskip("cryptography")
    assert on_ring(world_size, go, tls=tls) == [True] * world_size


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_are_under_way_at_once(world_size: int) -> None:
    def go(ring: DirectRing) -> list[int]:
        for number in range(50):
            ring.send([bytes([number]) * 2000])
        return [int(ring.receive()[-1]) for _ in range(50)]

    assert on_ring(world_size, go) == [list(range(50))] * world_size


@pytest.mark.parametrize("waits", [False, True])
def test_a_rank_that_gives_up_ends_it_for_all(waits: bool) -> None:
    def go(ring: DirectRing) -> None:
        if ring.rank == 1:
            time.sleep(0.2 if waits else 0)
            ring.abort(PeerLost("rank 1 has had enough", 1))
        ring.receive()

    found = on_ring(3, go)
    assert [type(error) for error in found] == [PeerLost] * 3
    assert all("had enough" in str(error) for error in found)


def test_a_message_that_is_not_the_next_one_is_refused() -> None:
    def go(ring: DirectRing) -> None:
        if ring.rank == 0:
            ring._sent += 1
            ring.send([bytes(3)])
        ring.receive()

    found = on_ring(2, go)
    assert all(isinstance(error, CollectiveMismatch) for error in found)
    assert "message 0 of generation 7" in str(found[1])


class Cut:
    """A channel that sends the first bytes of a message only, and says that it has sent all."""

    def __init__(self, channel: Any, count: int) -> None:
        self._channel, self._count = channel, count

    def try_send(self, buffers: list[memoryview]) -> int:
        self._channel.try_send([memoryview(b"".join(buffers))[: self._count]])
        return sum(len(buffer) for buffer in buffers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


@pytest.mark.parametrize("count", [1, frame.PRELUDE_BYTES + 8, frame.PRELUDE_BYTES + 50])
def test_half_a_frame_and_then_nothing_is_a_loss(count: int) -> None:
    def go(ring: DirectRing) -> None:
        if ring.rank == 1:
            ring._out = Cut(ring._out, count)
            ring.send([bytes(100)])
        ring.receive()

    began = time.monotonic()
    found = on_ring(3, go)
    assert time.monotonic() - began < 3 * PATIENCE
    assert [error.rank for error in found] == [1, 1, 1]
    assert all("half a frame, then nothing for 1 s" in str(error) for error in found)


def test_who_computes_for_longer_than_patience_is_not_lost() -> None:
    def go(ring: DirectRing) -> int:
        if ring.rank == 1:
            threading.Event().wait(1.5 * PATIENCE)
        ring.send([bytes(100)])
        return len(ring.receive())

    assert on_ring(2, go) == [100, 100]


def test_a_ring_in_which_nothing_comes_in_time_is_over() -> None:
    def go(ring: DirectRing) -> object:
        began = time.monotonic()
        with pytest.raises(CollectiveTimeout if ring.rank == 0 else SmolError):
            ring.receive(timeout=0.5 if ring.rank == 0 else 60)
        return time.monotonic() - began

    first, second = on_ring(2, go)
    assert 0.5 <= first < 3 * PATIENCE
    assert isinstance(second, float)
