"""What a machine of a cluster file is when a model is served: the controller, or a node that computes layers for it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from smolcluster.config.hosts import Member, ServingHosts, serving_hosts
from smolcluster.config.schema import Config
from smolcluster.errors import ConfigError
from smolcluster.run.node import check_interface
from smolcluster.run.stage import StagePlace
from smolcluster.run.stages import Machines, cluster_run_id
from smolcluster.run.support import exposure, tcp_options
from smolcluster.transport.security import load_token
from smolcluster.transport.tcp import TcpOptions, format_address


def find_part(
    config: Config, hostname: str | None, token_file: Path | None, say: Callable[[str], None]
) -> Machines | StagePlace:
    """The part of this machine.

    Args:
        config: with the machines.
        hostname: this machine's name there; None: it is the controller.
        token_file: where the cluster token is.
        say: tells the user.

    Returns:
        Machines: it is the controller; StagePlace: it is a node.

    Raises:
        ConfigError: no such machine, or this one does not have its address.
    """
    local = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    hosts = serving_hosts(config, hostname=hostname, local_addresses=local)
    names = [hosts.controller.name, *(node.name for node in hosts.nodes)]
    if hostname is not None and hostname not in names:
        raise ConfigError(
            f"the cluster has no machine {hostname!r}; its machines are {', '.join(names)}. Give one of these to "
            "--hostname"
        )
    addresses = [ip for member in (hosts.controller, *hosts.nodes) for ip, _ in member.listens]
    if warning := exposure(dict.fromkeys(addresses), tls=config.cluster.tls):
        say(f"warning: {warning}")
    token = load_token(token_file)
    if hostname is None or hostname == hosts.controller.name:
        check_interface(config, hosts.controller.name, hosts.controller.listens[0][0])
        return Machines(hosts, token, _sockets(config, hosts.controller.name), say)
    number = names.index(hostname)
    node = hosts.nodes[number - 1]
    host, port = _own_address(node)
    controller_host, controller_port = node.dials or hosts.controller.listens[0]
    controller = format_address(controller_host, controller_port)
    say(f"{node.name} computes layers for {hosts.controller.name} at {controller}; stop with Ctrl-C")
    sockets = _sockets(config, node.name)
    return StagePlace(number, node.name, host, port, controller, token, cluster_run_id(hosts), sockets)


def told_split(config: Config, hosts: ServingHosts, split: Sequence[int] | None) -> tuple[int, ...] | None:
    """Blocks of each stage, in order: as the flag says, else as cluster.layer_distribution does.

    Raises:
        ConfigError: a machine has none there.
    """
    told = config.cluster.layer_distribution
    if split is not None or told is None:
        return None if split is None else tuple(split)
    if not isinstance(told, dict):
        return told
    names = [*([hosts.controller.name] if hosts.has_layers else []), *(node.name for node in hosts.nodes)]
    names = names[: processes_of(config, hosts)]
    if missing := [name for name in names if name not in told]:
        raise ConfigError(
            f"cluster.layer_distribution gives no layers to {', '.join(missing)}. Name all that compute, or none"
        )
    return tuple(told[name] for name in names)


def processes_of(config: Config, hosts: ServingHosts) -> int:
    """How many machines compute; those above are spare.

    Raises:
        ConfigError: serving.num_nodes is more than there are.
    """
    there = len(hosts.nodes) + hosts.has_layers
    wanted = config.serving.num_nodes or there
    if wanted > there:
        raise ConfigError(
            f"serving.num_nodes is {wanted}, but {there} machines compute "
            f"({', '.join(member.name for member in ((hosts.controller,) * hosts.has_layers) + hosts.nodes)}). Lower it"
        )
    return wanted


def _sockets(config: Config, name: str) -> TcpOptions:
    # A stage sleeps until its socket has something (collectives/direct.py); memory that is shared wakes nobody.
    return replace(tcp_options(config, name), shared_memory=False)


def _own_address(node: Member) -> tuple[str, int]:
    """Where other stages reach this machine: as the file says, else where it would come from to its controller."""
    if node.listens:
        return node.listens[0]
    assert node.dials is not None, "a machine that does not listen dials"
    family = socket.AF_INET6 if ":" in node.dials[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect(node.dials)
        except OSError as exc:
            raise ConfigError(
                f"{node.name} has no way to its controller at {node.dials[0]} ({exc.strerror}). Check the cluster "
                "file's addresses and this machine's network"
            ) from exc
        return probe.getsockname()[0], 0
