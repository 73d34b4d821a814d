"""docs/protocol.md is enough to write a peer: plain_peer.py knows only that page, and here it meets the real thing.

The peer runs without site-packages, so it cannot import torch or smolcluster. It is rank 1 in a run whose rank 0 is
ours ("follower"), or rank 0 in a run whose rank 1 is ours ("leader").
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from smolcluster.cluster.rendezvous import join_world
from smolcluster.cluster.world import World
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import AuthFailed, ConfigError, ConnectionLost, PeerLost, RendezvousTimeout
from smolcluster.transport.tcp import TcpListener, listen, parse_address

PLAIN_PEER = Path(__file__).with_name("plain_peer.py")
RUN_ID = "golden"
TOKEN = b"correct horse battery staple"
WRONG_TOKEN = b"battery staple horse correct"
TO_ECHO, ECHOED, STOP = 7, 8, 9
PEER_RANK = {"follower": 1, "leader": 0}

TENSORS = {
    "float32": torch.tensor([0.0, -0.0, 1.5, float("nan"), float("-inf"), 3.4e38, 1e-45]),
    "float64": torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64),
    "bfloat16": torch.arange(-50, 50).to(torch.bfloat16),
    "int64": torch.tensor([-(2**63), -1, 0, 2**63 - 1]),
    "bool": torch.tensor([True, False, True]),
    "uint8": torch.arange(256, dtype=torch.int64).to(torch.uint8),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0),
    "empty with dims": torch.empty(3, 0, 2, dtype=torch.int64),
    "3 dims": torch.arange(2 * 3 * 5, dtype=torch.float32).view(2, 3, 5),
    "larger than socket buffers": torch.arange(2_000_000),
}


def start_peer(rank: int, address: str, token: bytes = TOKEN, patience: float = 5.0) -> subprocess.Popen[str]:
    host, port = parse_address(address)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(PLAIN_PEER), host, str(port), RUN_ID, "2", str(rank)],
        env={**os.environ, "PEER_TOKEN": token.decode(), "PEER_PATIENCE": str(patience)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def ending(peer: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever happens, the process is gone and its pipe closed afterwards."""
    with peer:
        try:
            yield
        finally:
            peer.kill()


def join(listener: TcpListener, rank: int, **settings: Any) -> World:
    """Our side of the run."""
    settings = {"token": TOKEN, "timeout": 20.0, **settings}
    return join_world(rank=rank, world_size=2, name="real", listener=listener, run_id=RUN_ID, **settings)


def start_leader(patience: float = 5.0) -> tuple[subprocess.Popen[str], str]:
    """A plain rank 0 and its address."""
    peer = start_peer(0, "tcp://127.0.0.1:0", patience=patience)
    assert peer.stdout is not None
    word, host, port = peer.stdout.readline().split()
    assert word == "listening"
    return peer, f"tcp://{host}:{port}"


@contextlib.contextmanager
def meeting(role: str, patience: float = 5.0) -> Iterator[tuple[World, TcpCommunicator, subprocess.Popen[str]]]:
    """A run of two: we and the plain peer in this role."""
    with contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id=RUN_ID)) as listener:
        leader = ""
        if role == "leader":
            peer, leader = start_leader(patience)
        else:
            peer = start_peer(1, listener.address, patience=patience)
        with ending(peer):
            world = join(listener, 1 - PEER_RANK[role], leader_address=leader, patience=patience)
            with contextlib.closing(TcpCommunicator(world)) as comm:
                yield world, comm, peer


@pytest.fixture
def listener() -> Iterator[TcpListener]:
    with contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id=RUN_ID)) as listener:
        yield listener


@pytest.fixture(scope="module", params=["follower", "leader"])
def echoing(request: pytest.FixtureRequest) -> Iterator[tuple[TcpCommunicator, int]]:
    """A communicator with a plain peer that echoes, and the peer's rank; one process for all tests of a role."""
    with meeting(request.param) as (_, comm, _):
        yield comm, PEER_RANK[request.param]


@pytest.mark.parametrize("name", TENSORS)
def test_a_message_comes_back_unchanged(echoing: tuple[TcpCommunicator, int], name: str) -> None:
    comm, peer_rank = echoing
    tensor = TENSORS[name]

    sent = comm.send(tensor, peer_rank, TO_ECHO)
    back = comm.recv(peer_rank, ECHOED).result()[0]
    sent.wait(10)

    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))  # bits: NaN and -0.0 too


@pytest.mark.parametrize("role", ["follower", "leader"])
def test_the_collectives_agree_and_the_peer_leaves(role: str) -> None:
    mine = torch.rand(10, generator=torch.Generator().manual_seed(1))
    plain = torch.arange(10, dtype=torch.float32)
    peer_rank = PEER_RANK[role]
    total = mine.clone()
    with meeting(role, patience=1.0) as (_, comm, peer):
        time.sleep(1.5)  # longer than the patience: the run lives by its beats
        comm.send(torch.zeros(1), peer_rank, STOP).wait(10)
        comm.barrier(10)
        found = comm.exchange({"peer": "real", "text": "größer"}, 10)
        comm.all_reduce(total).wait(10)
        comm.close()
        said, _ = peer.communicate(timeout=20)

    assert peer.returncode == 0, said
    assert found[peer_rank] == {"peer": "plain"}
    assert torch.equal(total, mine + plain)
    results = dict(line.split(" ", 1) for line in said.splitlines() if line.startswith(("exchanged ", "sum ")))
    assert json.loads(results["exchanged"]) == {"peer": "real", "text": "größer"}
    assert json.loads(results["sum"]) == total.tolist()


@pytest.mark.parametrize("role", ["follower", "leader"])
def test_a_peer_that_left_is_not_lost_when_its_bulk_connection_ends(role: str) -> None:
    with meeting(role) as (world, comm, peer):
        comm.send(torch.zeros(1), PEER_RANK[role], STOP).wait(10)
        comm.barrier(10)
        comm.exchange({}, 10)
        comm.all_reduce(torch.zeros(10)).wait(10)
        peer.communicate(timeout=20)  # it has sent `leave` and closed everything
        judged: queue.Queue[PeerLost] = queue.Queue()
        world.suspect(PEER_RANK[role], ConnectionLost("it closed"), judged.put)  # as the communicator when it sees that
        left = judged.get(timeout=10)
        error = world.error()
        with pytest.raises(PeerLost, match="has left the run"):  # what still needs it fails, and only that
            comm.recv(PEER_RANK[role], 3).wait(10)

    assert peer.returncode == 0
    assert left.rank == PEER_RANK[role]
    assert error is None


def test_a_peer_with_a_wrong_token_is_refused_and_stays_missing(listener: TcpListener) -> None:
    peer = start_peer(1, listener.address, token=WRONG_TOKEN)
    with ending(peer):
        with pytest.raises(RendezvousTimeout, match="rank 1 of 2 did not come"):
            join(listener, 0, timeout=2)
        said, _ = peer.communicate(timeout=20)

    assert peer.returncode == 3, said
    assert "refused: token" in said


def test_a_peer_with_other_options_is_refused_with_the_reason(listener: TcpListener) -> None:
    peer = start_peer(1, listener.address)
    with ending(peer):
        with pytest.raises(RendezvousTimeout, match="rank 1 of 2 did not come"):
            join(listener, 0, timeout=2, options={"seed": "1"})
        said, _ = peer.communicate(timeout=20)

    assert peer.returncode == 3, said
    assert "seed is None on plain and 1 on rank 0" in said


def test_a_plain_leader_refuses_a_wrong_token(listener: TcpListener) -> None:
    peer, address = start_leader()
    with ending(peer), pytest.raises(AuthFailed, match="tokens differ"):
        join(listener, 1, leader_address=address, token=WRONG_TOKEN)


def test_a_plain_leader_refuses_other_options_with_the_reason(listener: TcpListener) -> None:
    peer, address = start_leader()
    with ending(peer), pytest.raises(ConfigError, match="the options differ: rank 0 has none"):
        join(listener, 1, leader_address=address, options={"seed": "1"})
