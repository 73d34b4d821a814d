"""A rank that is lost while the ranks still look for each other ends the start, and is the one that is named."""

from __future__ import annotations

import threading
import time

import pytest

from smolcluster.cluster.rendezvous import join_world
from smolcluster.cluster.world import World
from smolcluster.errors import PeerLost, SmolError
from smolcluster.transport import tcp
from smolcluster.transport.base import Hello
from smolcluster.transport.tcp import CONTROL, TcpNetwork, TcpOptions

TOKEN = b"a token of sixteen characters"
PATIENCE = 1.0
TIMEOUT = 20.0


@pytest.mark.parametrize("ending", ["dies", "freezes"])
def test_a_rank_lost_between_view_and_links_is_named_by_all_within_the_patience(ending: str) -> None:
    listeners = [tcp.listen("127.0.0.1", 0, token=TOKEN, run_id="start", rank=rank) for rank in range(3)]
    found: dict[int, World | SmolError] = {}
    ended: dict[int, float] = {}

    def join(rank: int) -> None:
        try:
            world = join_world(
                rank=rank, world_size=3, name=f"rank{rank}", listener=listeners[rank], token=TOKEN, run_id="start",
                leader_address=listeners[0].address, patience=PATIENCE, timeout=TIMEOUT,
            )  # fmt: skip
            failed = threading.Event()
            world.on_failure(lambda error: failed.set())
            failed.wait(TIMEOUT)
            found[rank] = world.error() or world
            world.close()
        except SmolError as error:
            found[rank] = error
        ended[rank] = time.monotonic()

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    network = TcpNetwork(TOKEN, TcpOptions(patience=PATIENCE))
    link = network.dial_control(listeners[0].address, Hello(2, CONTROL, "start"), TIMEOUT)
    join_message = {
        "kind": "join", "rank": 2, "name": "rank2", "world_size": 3, "address": listeners[2].address, "options": {},
    }  # fmt: skip
    link.send(join_message)
    view = link.receive(TIMEOUT)
    assert view is not None
    assert view["kind"] == "view"
    seen = time.monotonic()
    if ending == "dies":
        link.close()
    for thread in threads:
        thread.join(TIMEOUT)
    link.close()
    listeners[2].close()

    for rank in (0, 1):
        error = found[rank]
        assert isinstance(error, PeerLost), error
        assert error.rank == 2, error
        assert ended[rank] - seen < PATIENCE + 2.0
