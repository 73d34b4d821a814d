"""What a launcher (torchrun, Slurm, Kubernetes) says through the environment. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from smolcluster.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Launch:
    """This process's place in a launcher's job.

    Attributes:
        rank: this process.
        world_size: processes of the job.
        local_rank: this process's number among those of its machine.
        master_addr: host of rank 0.
        master_port: a port there.
        agent_store: True if torchrun itself listens at that port and keeps a key-value store there.
    """

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    agent_store: bool


def launch_from_environment(environ: Mapping[str, str] | None = None) -> Launch | None:
    """The launcher's job, or None if no launcher started this process.

    Raises:
        ConfigError: some of the variables are set, but not all, or they are no sensible numbers.
    """
    environ = os.environ if environ is None else environ
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None  # MASTER_ADDR alone is left over in many shells
    missing = [name for name in _NAMES if name not in environ]
    if missing:
        raise ConfigError(
            f"the environment sets RANK and WORLD_SIZE but not {', '.join(missing)}. Set all of "
            f"{', '.join(_NAMES)}, or none to start by yourself"
        )
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"the environment sets RANK={rank} and WORLD_SIZE={world_size}; ranks are 0 to WORLD_SIZE - 1"
        )
    local_rank = _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else 0
    port = _number(environ, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise ConfigError(f"the environment sets MASTER_PORT={port}; ports are 1 to 65535")
    agent_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(rank, world_size, local_rank, environ["MASTER_ADDR"], port, agent_store)


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError as exc:
        raise ConfigError(f"the environment sets {name}={environ[name]!r}, which is no whole number") from exc
