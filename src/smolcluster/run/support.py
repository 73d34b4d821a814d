"""What this release can run. Checked before a process is started; imports no torch."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from smolcluster.config.schema import Config
from smolcluster.errors import ConfigError
from smolcluster.transport.tcp import TcpOptions

# Carrier-grade NAT, which Tailscale uses, and the range for measuring networks: nobody routes them.
_OWN_NETWORKS = (ipaddress.IPv4Network("100.64.0.0/10"), ipaddress.IPv4Network("198.18.0.0/15"))
# A server that computes nothing, and workers that come and go.
PARAMETER_SERVERS = ("syncps", "edp")
# Ranks that hold consecutive layers of the model, and all compute the same batch.
STAGED = ("mp", "mp_pipeline")


def check_supported(config: Config, world_size: int) -> None:
    """Refuse what comes in a later release, instead of running something else.

    Args:
        config: the resolved configuration.
        world_size: ranks of the run.

    Raises:
        ConfigError: names the key, and what there is.
    """
    if config.algorithm == "single" and world_size != 1:
        raise ConfigError(
            f"algorithm single is one process, but {world_size} ranks are asked for. Leave out --local, or choose "
            "--algorithm classicdp"
        )
    if config.algorithm in PARAMETER_SERVERS:
        _check_parameter_server(config, world_size)
    if config.algorithm == "ep" and config.model.type != "moe":
        raise ConfigError(
            f"algorithm ep divides experts, and model.type {config.model.type} has none. Set model.type to moe, or "
            "choose another algorithm"
        )
    if config.algorithm in STAGED and config.model.type == "moe":
        raise ConfigError(
            f"model.type moe is not cut into layers: its balancing loss is one of all layers. Choose algorithm ep "
            f"instead of {config.algorithm}"
        )
    if config.algorithm in STAGED and config.cluster.compression != "none":
        raise ConfigError(
            f"cluster.compression {config.cluster.compression} encodes gradients that are summed over ranks; with "
            f"algorithm {config.algorithm} none are. Set it to none"
        )
    if config.algorithm != "single":  # which has no cluster: so one file serves both sides of a comparison
        if config.algorithm not in PARAMETER_SERVERS and min_ranks(config, world_size) < world_size:
            raise ConfigError(
                f"cluster.min_ranks below {world_size} ranks comes in a later release. Take it out of the configuration"
            )
        if config.cluster.tls and config.backend != "tcp":
            raise ConfigError(
                f"cluster.tls is of backend tcp; {config.backend} does not encrypt. Take cluster.tls out, or choose "
                "--backend tcp"
            )


def _check_parameter_server(config: Config, world_size: int) -> None:
    algorithm = config.algorithm
    if world_size < 2:
        raise ConfigError(f"algorithm {algorithm} needs a server and a worker. Give --local 2 or more")
    if config.backend != "tcp":
        raise ConfigError(
            f"algorithm {algorithm} lets workers come and go, which backend {config.backend} cannot. Choose "
            "--backend tcp"
        )
    if config.data.streaming:
        raise ConfigError(
            f"algorithm {algorithm} lends single samples, and a stream cannot be read at any place. Set "
            "data.streaming to false"
        )
    if not 2 <= min_ranks(config, world_size) <= world_size:
        raise ConfigError(
            f"cluster.min_ranks is {config.cluster.min_ranks}; with {world_size} ranks, the server among them, it must "
            f"be 2 to {world_size}"
        )


def min_ranks(config: Config, world_size: int) -> int:
    """Fewest ranks that a run goes on with: all, or with a parameter server the server and one worker."""
    if config.algorithm in PARAMETER_SERVERS:
        return config.cluster.min_ranks or 2
    return config.cluster.min_ranks or world_size


def computing_ranks(config: Config, world_size: int) -> int:
    """How many of the ranks compute gradients: all but a parameter server."""
    return world_size - 1 if config.algorithm in PARAMETER_SERVERS else world_size


def sharing_ranks(config: Config, world_size: int) -> int:
    """How many ranks a step's samples are divided among."""
    return 1 if config.algorithm in STAGED else computing_ranks(config, world_size)


def rank_weights(config: Config, names: list[str]) -> list[float]:
    """The relative shares of the global batch (mp, mp_pipeline: the speeds) of the ranks that compute, in rank order.

    Args:
        config: `cluster.shares` decides.
        names: the ranks' names, in rank order.

    Raises:
        ConfigError: the shares are not those of these ranks.
    """
    shares = config.cluster.shares
    names = names[len(names) - computing_ranks(config, len(names)) :]
    if isinstance(shares, str) or config.algorithm == "single":
        return [1.0] * len(names)
    if isinstance(shares, dict):
        if set(shares) != set(names):
            raise ConfigError(
                f"cluster.shares has {', '.join(shares)}, but who computes is {', '.join(names)}. Name each of them "
                "once, or give a list in rank order"
            )
        return [shares[name] for name in names]
    if len(shares) != len(names):
        raise ConfigError(
            f"cluster.shares has {len(shares)} weights for {len(names)} ranks that compute. Give one for each, or "
            "`even`"
        )
    return list(shares)


def tcp_options(config: Config, host: str | None = None) -> TcpOptions:
    """How this machine's sockets are set up: `cluster.patience`, `tls`, `shared_memory`, its part of `buffer_size`.

    Args:
        config: the resolved configuration.
        host: this machine's name in the cluster file; None: there is no such file, and the system's own name counts.
    """
    asked = config.cluster.buffer_size
    if isinstance(asked, dict):
        own = socket.gethostname()
        names = [own, own.partition(".")[0]] if host is None else [host]
        asked = next((asked[name] for name in names if name in asked), None)
    buffer_bytes, shared_memory = None if asked is None else asked << 20, config.cluster.shared_memory == "auto"
    return TcpOptions(config.cluster.patience, buffer_bytes, config.cluster.tls, shared_memory)


def exposure(hosts: Iterable[str], *, tls: bool) -> str | None:
    """What to warn of: hosts that tensors travel to in the clear over networks of others; None: nothing.

    Args:
        hosts: addresses or names of the run's machines. Where a name leads is not known here.
        tls: whether the connections are encrypted.
    """
    public = [host for host in hosts if not _is_private(host)]
    if tls or not public:
        return None
    return (
        f"{', '.join(public)} is not a private address: whoever is on the way can read and change the tensors. Set "
        "cluster.tls: true on every machine (backend tcp), or use addresses of your own network"
    )


def _is_private(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    if isinstance(address, ipaddress.IPv4Address) and any(address in network for network in _OWN_NETWORKS):
        return True
    return address.is_private or address.is_loopback or address.is_link_local


def shared_options(config: Config) -> dict[str, str]:
    """The settings that decide what is computed and sent, flat and as text: the same on every machine of a run.

    Left out is what may differ from machine to machine: where files lie, what is shown, who listens where.
    """
    values = config.model_dump(mode="json")
    sections = ("model", "training", "lr_schedule", "data", "checkpoint")  # every rank takes part in a checkpoint
    keys = {f"{section}.{key}": value for section in sections for key, value in values[section].items()}
    for key in ("training.device", "data.path", "checkpoint.keep"):
        del keys[key]
    for key in ("model.hf_model_name", "data.tokenizer"):  # a folder may lie elsewhere on another machine
        keys[key] = str(keys[key]).replace("\\", "/").rstrip("/").rpartition("/")[2]
    keys["algorithm"] = values["algorithm"]
    for key in (
        "seed", "staleness_bound", "fsdp_stage", "patience", "shares", "compression", "bucket_bytes", "min_ranks",
        "tls", "timeout", "worker_update_interval", "layer_distribution",
    ):  # fmt: skip
        keys[f"cluster.{key}"] = values["cluster"][key]
    return {key: str(value) for key, value in keys.items()}
