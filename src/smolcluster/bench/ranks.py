"""The processes of a measurement: a parent that starts N ranks, and what a rank needs to meet the others.

A rank is `python -m MODULE`. It reads one JSON line, its job, from standard input (the token with it: never an
argument), and writes JSON lines to standard output: first rank 0's address, at the end its result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, cast

from smolcluster.cluster.world import World
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import ClusterError, ConfigError
from smolcluster.kinds import JsonObject
from smolcluster.transport.security import new_token

PATIENCE = 20.0  # a measurement may fill both cores of a small machine
START_TIMEOUT = 120.0


def run_ranks(
    module: str,
    world_size: int,
    job: JsonObject,
    *,
    hosts: Sequence[str] | None = None,
    prefix: Callable[[int], Sequence[str]] = lambda rank: (),
    timeout: float = 3600.0,
) -> list[JsonObject]:
    """Run `python -m module` once for each rank; blocks. No process is left when it returns or raises.

    Args:
        module: what a rank runs.
        world_size: ranks.
        job: what every rank is told, besides where and who it is.
        hosts: the address each rank listens at; None: loopback.
        prefix: what stands in front of a rank's command, such as `ip netns exec NAME`.
        timeout: seconds for all of it.

    Returns:
        Each rank's last line, in rank order.

    Raises:
        ClusterError: a rank failed; with what it wrote to standard error.
    """
    token = new_token().hex()
    deadline = time.monotonic() + timeout
    processes: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="smolcluster-") as folder:
        meeting = (Path(folder) / "meeting").as_uri()  # where torch.distributed's ranks find each other
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        try:
            leader = ""
            for rank in range(world_size):
                with logs[rank].open("w") as log:
                    command = [*prefix(rank), sys.executable, "-m", module]
                    processes.append(_start(command, log))
                host = "127.0.0.1" if hosts is None else hosts[rank]
                place: JsonObject = {
                    "rank": rank,
                    "world_size": world_size,
                    "host": host,
                    "leader": leader,
                    "token": token,
                }
                _tell(processes[rank], {**job, **place, "meeting": meeting})
                if rank == 0:
                    leader = str(_line(processes[0], logs[0]).get("address"))
            outputs = [_line(process, log) for process, log in zip(processes, logs, strict=True)]
            for process in processes:
                process.wait(max(1.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
    return outputs


def meet(job: JsonObject, *, shared_memory: bool = False) -> TcpCommunicator:
    """In a rank: say where this rank listens, if it is the first, and meet the others."""
    from smolcluster.cluster.rendezvous import join_world
    from smolcluster.transport.tcp import TcpNetwork, TcpOptions, listen

    token = str(job["token"]).encode()
    rank, world_size = cast("int", job["rank"]), cast("int", job["world_size"])
    options = TcpOptions(PATIENCE, shared_memory=shared_memory)
    listener = listen(str(job["host"]), 0, token=token, run_id="bench", rank=rank, options=options)
    if rank == 0:
        say({"address": listener.address})
    world: World = join_world(
        rank=rank, world_size=world_size, name=f"rank{rank}", listener=listener, token=token,
        leader_address=str(job["leader"]), run_id="bench", patience=PATIENCE, timeout=START_TIMEOUT,
        network=TcpNetwork(token, options),
    )  # fmt: skip
    comm = TcpCommunicator(world)
    comm.tune()
    return comm


def read_job() -> JsonObject:
    """In a rank: the job from standard input."""
    return cast("JsonObject", json.loads(sys.stdin.readline()))


def say(message: JsonObject) -> None:
    """In a rank: a line for the parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def largest(comm: Communicator, seconds: float) -> float:
    """The longest time that any rank measured."""
    return max(cast("list[float]", comm.exchange(seconds)))


def _start(command: Sequence[str], log: IO[str]) -> subprocess.Popen[str]:
    # One OpenMP thread from the start: setting it later leaves the others' pool behind.
    inherited = {key: value for key, value in os.environ.items() if key != "SMOLCLUSTER_TOKEN"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    except OSError as exc:
        raise ConfigError(f"{command[0]} cannot be started ({exc.strerror or exc})") from exc


def _tell(process: subprocess.Popen[str], job: JsonObject) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()


def _line(process: subprocess.Popen[str], log: Path) -> JsonObject:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        wrote = log.read_text(errors="replace").strip().splitlines()
        raise ClusterError(f"a rank of the measurement failed: {wrote[-1] if wrote else f'exit {process.returncode}'}")
    return cast("JsonObject", json.loads(line))
