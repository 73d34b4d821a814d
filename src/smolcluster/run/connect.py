"""How the ranks of a run become one communicator, for every backend and every way to start them."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from smolcluster.cluster.rendezvous import join_world
from smolcluster.cluster.world import World
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.local import LocalGroup
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.collectives.torch_dist import init_torch_dist
from smolcluster.device import prepare_process
from smolcluster.errors import ConfigError, RendezvousTimeout
from smolcluster.kinds import Backend
from smolcluster.run.launcher import Launch, launch_from_environment
from smolcluster.run.support import exposure
from smolcluster.transport.base import Listener
from smolcluster.transport.security import load_token
from smolcluster.transport.tcp import TcpNetwork, TcpOptions, listen, parse_address

logger = logging.getLogger(__name__)

# Machines are started by hand, one terminal after the other, and a Raspberry Pi takes half a minute to import torch:
# with the default patience of 5 s there are 5 minutes until all have to be there.
JOIN_PATIENCES = 60
DEFAULT_PATIENCE = 5.0
_LEADER_KEY = "smolcluster/leader"


def connect(
    backend: Backend = "tcp",
    *,
    patience: float = DEFAULT_PATIENCE,
    token_file: Path | None = None,
    tls: bool = False,
    shared_memory: bool = True,
) -> Communicator:
    """The communicator of this process: the launcher's job, or world size 1 without one.

    Blocks until every rank of the job has called it. Also sets what every computing process needs: one torch thread,
    denormals flushed to zero. `close()` it at the end, on every rank.

    Args:
        backend: our own TCP engine, or torch.distributed's gloo or nccl.
        patience: seconds until a silent rank counts as lost.
        token_file: where the cluster token is, for tcp; None: `SMOLCLUSTER_TOKEN`, or the user's config folder.
        tls: encrypt all connections, for tcp.
        shared_memory: exchange tensors in shared memory with ranks at the same address, for tcp.

    Raises:
        ConfigError: the launcher's variables or the token are wrong.
        RendezvousTimeout: not every rank came in time.
    """
    prepare_process()
    launch = launch_from_environment()
    if launch is None or launch.world_size == 1:
        return alone()
    if backend != "tcp":
        if tls:
            raise ConfigError(f"tls is of backend tcp; {backend} does not encrypt")
        return join_torch(backend, launch.rank, launch.world_size, "env://", patience)
    token = load_token(token_file)
    world, comm = join_launch(launch, token, patience=patience, options={}, tls=tls, shared_memory=shared_memory)
    warning = exposed(world, tls=tls)
    if warning and launch.rank == 0:
        logger.warning("%s", warning)
    return comm


def exposed(world: World, *, tls: bool) -> str | None:
    """What to warn of now that all addresses are known; see support.exposure."""
    return exposure([parse_address(member.address)[0] for member in world.view().members], tls=tls)


def alone() -> Communicator:
    """World size 1: every collective is done at once, and no socket is opened."""
    return LocalGroup(1).communicators[0]


def join_tcp(
    *,
    rank: int,
    world_size: int,
    name: str,
    listener: Listener,
    token: bytes,
    leader_address: str,
    run_id: str,
    patience: float,
    options: Mapping[str, str],
    buffer_bytes: int | None = None,
    tls: bool = False,
    shared_memory: bool = True,
) -> tuple[World, Communicator]:
    """Meet the other ranks and open the connections to them; blocks until all are there.

    Args:
        rank: this rank; rank 0 leads.
        world_size: all ranks.
        name: this rank's name, unique.
        listener: where this rank accepts connections.
        token: the cluster token.
        leader_address: where rank 0 listens.
        run_id: what the ranks have in common before they talk.
        patience: seconds until a silent rank counts as lost.
        options: what must be equal on all ranks.
        buffer_bytes: of the sockets that this rank dials; the listener has its own. None: the kernel tunes.
        tls: whether the sockets that this rank dials are encrypted; the listener's must be alike.
        shared_memory: whether to share memory with ranks at the same address that this rank dials.

    Raises:
        RendezvousTimeout: not all came in time.
        ConfigError: rank 0 refused this rank.
    """
    world = join_world(
        rank=rank,
        world_size=world_size,
        name=name,
        listener=listener,
        token=token,
        leader_address=leader_address,
        run_id=run_id,
        patience=patience,
        timeout=JOIN_PATIENCES * patience,
        options=options,
        network=TcpNetwork(token, TcpOptions(patience, buffer_bytes, tls, shared_memory)),
    )
    return world, TcpCommunicator(world)


def join_torch(
    backend: Backend, rank: int, world_size: int, init_method: str, patience: float, min_ranks: int | None = None
) -> Communicator:
    """Join over torch.distributed's gloo or nccl; blocks until all ranks are there.

    Args:
        backend: gloo or nccl.
        rank: this rank.
        world_size: all ranks.
        init_method: `file://…`, `tcp://host:port` or `env://`: where the ranks find each other.
        patience: seconds that decide how long joining may take, and a collective: these backends have no heartbeats,
            so a rank that hangs is told from one that computes only by a time that no step takes.
        min_ranks: `cluster.min_ranks`; fewer than world_size is refused.

    Raises:
        RendezvousTimeout: not all came in time.
    """
    limit = JOIN_PATIENCES * patience
    return init_torch_dist(
        backend, rank, world_size, init_method, timeout=limit, start_timeout=limit, min_ranks=min_ranks
    )


def join_launch(
    launch: Launch,
    token: bytes,
    *,
    patience: float,
    options: Mapping[str, str],
    buffer_bytes: int | None = None,
    tls: bool = False,
    shared_memory: bool = True,
) -> tuple[World, Communicator]:
    """Join a launcher's job over our TCP engine; blocks until all ranks are there.

    Rank 0 listens at MASTER_ADDR and MASTER_PORT. torchrun keeps a store of its own at that port: there rank 0 takes
    a free port and the store tells the others which.
    """
    host = launch.master_addr
    run_id = _job_id()
    if launch.rank == 0:
        at, port = host, 0 if launch.agent_store else launch.master_port
    else:
        at, port = _address_towards(host, launch.master_port), 0
    options_here = TcpOptions(patience, buffer_bytes, tls, shared_memory)
    listener = listen(at, port, token=token, run_id=run_id, rank=launch.rank, options=options_here)
    leader_address = f"tcp://{host}:{launch.master_port}"
    if launch.agent_store:
        leader_address = _through_agent_store(launch, listener.address, JOIN_PATIENCES * patience)
    logger.info("joining rank=%d world_size=%d leader=%s", launch.rank, launch.world_size, leader_address)
    return join_tcp(
        rank=launch.rank,
        world_size=launch.world_size,
        name=f"rank{launch.rank}",
        listener=listener,
        token=token,
        leader_address=leader_address,
        run_id=run_id,
        patience=patience,
        options=options,
        buffer_bytes=buffer_bytes,
        tls=tls,
        shared_memory=shared_memory,
    )


def _job_id() -> str:
    """Tells jobs apart that one launcher runs at the same time."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    return hashlib.sha256("/".join(os.environ.get(name, "") for name in names).encode()).hexdigest()[:16]


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the way to `host`: where `host` can reach it. Sends nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as exc:
        raise ConfigError(
            f"MASTER_ADDR={host} cannot be reached from this machine ({exc.strerror or exc}). Set it to an address of "
            "rank 0's machine"
        ) from exc


def _through_agent_store(launch: Launch, address: str, timeout: float) -> str:
    """Rank 0 leaves its address in torchrun's store, the others fetch it."""
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch exports it without saying so

    key = f"{_LEADER_KEY}/{_job_id()}"
    try:
        store = TCPStore(launch.master_addr, launch.master_port, is_master=False, timeout=timedelta(seconds=timeout))
        if launch.rank == 0:
            store.set(key, address)
            return address
        return str(store.get(key).decode())
    except RuntimeError as exc:  # torch.distributed.DistError is one
        raise RendezvousTimeout(
            f"rank {launch.rank} found no address of rank 0 in torchrun's store at {launch.master_addr}:"
            f"{launch.master_port} within {timeout:g} s. Look at the output of rank 0"
        ) from exc
