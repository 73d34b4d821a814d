"""Several ranks in one process, each with a communicator of its own: for tests, benchmarks and learning."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence

from smolcluster.cluster.rendezvous import join_world
from smolcluster.cluster.world import World
from smolcluster.collectives.plan import Plan
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import SmolError
from smolcluster.transport import tcp
from smolcluster.transport.inproc import Hook, InprocNetwork
from smolcluster.transport.security import new_token

START_TIMEOUT = 30.0


def inproc_group(
    world_size: int, *, hook: Hook | None = None, plan: Plan | None = None, patience: float = 5.0
) -> list[TcpCommunicator]:
    """The tcp engine over in-process channels; communicators in rank order. `hook` may wrap channels in faults."""
    network = InprocNetwork(hook)
    listeners = [network.listen(f"rank{rank}", rank) for rank in range(world_size)]

    def join(rank: int) -> World:
        return join_world(
            rank=rank, world_size=world_size, name=f"rank{rank}", listener=listeners[rank],
            leader_address=listeners[0].address, network=network, patience=patience, timeout=START_TIMEOUT,
        )  # fmt: skip

    return _connect(world_size, join, plan)


def tcp_group(
    world_size: int,
    *,
    plan: Plan | None = None,
    patience: float = 5.0,
    tls: bool = False,
    shared_memory: bool = False,
    hosts: Sequence[str] | None = None,
) -> list[TcpCommunicator]:
    """The tcp engine over real, authenticated loopback connections, encrypted or not; communicators in rank order.

    `shared_memory`: between ranks with the same address. `hosts`: where each rank listens; None: 127.0.0.1.
    """
    token, run_id = new_token(), secrets.token_hex(8)
    options = tcp.TcpOptions(patience=patience, tls=tls, shared_memory=shared_memory)
    listeners = [
        tcp.listen(host, 0, token=token, run_id=run_id, rank=rank, options=options)
        for rank, host in enumerate(hosts or ["127.0.0.1"] * world_size)
    ]

    def join(rank: int) -> World:
        return join_world(
            rank=rank, world_size=world_size, name=f"rank{rank}", listener=listeners[rank], token=token,
            leader_address=listeners[0].address, run_id=run_id, patience=patience, timeout=START_TIMEOUT,
            network=tcp.TcpNetwork(token, options),
        )  # fmt: skip

    return _connect(world_size, join, plan)


def _connect(world_size: int, join: Callable[[int], World], plan: Plan | None) -> list[TcpCommunicator]:
    comms: dict[int, TcpCommunicator] = {}
    errors: list[SmolError] = []

    def run(rank: int) -> None:
        try:
            world = join(rank)
            try:
                comms[rank] = TcpCommunicator(world, plan=plan)
            except SmolError:
                world.close()
                raise
        except SmolError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"join rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        for comm in comms.values():
            comm.close()
        raise errors[0]
    return [comms[rank] for rank in range(world_size)]
