"""Which machines take part: rank, name and address of each, from the cluster section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smolcluster.config.schema import ClusterConfig, Config, TopologyHost
from smolcluster.errors import ConfigError

DEFAULT_PORT = 65432


@dataclass(frozen=True, slots=True)
class Host:
    """One rank's machine. It listens on, and is dialled at, `ip` and `port`."""

    rank: int
    name: str
    ip: str
    port: int


def members(config: Config) -> tuple[Host, ...]:
    """The ranks of an algorithm with fixed membership, in rank order, 0 to N - 1.

    From `cluster.allToAllTopology` if it is set (what an entry leaves out comes from host_ip and port), else from
    `cluster.host_ip`: the server first, then `workers`, or where they are not set the other hosts of host_ip.

    Raises:
        ConfigError: no or too few machines are named, one has no address, or two would listen at the same address
            and port.
    """
    if config.algorithm == "single":
        raise ConfigError("algorithm single runs in one process and has no other machines; choose another --algorithm")
    if config.algorithm in ("syncps", "edp"):
        raise ConfigError(f"algorithm {config.algorithm} cannot be run over several machines yet; use --local N")
    cluster = config.cluster
    if cluster.allToAllTopology is not None and cluster.allToAllTopology.workers.regular:
        hosts = _from_topology(cluster, cluster.allToAllTopology.workers.regular)
    else:
        hosts = _from_host_ip(config)
    _refuse_wrong_count(config, hosts)
    for (ip, port), names in _shared_addresses(hosts).items():
        raise ConfigError(f"cluster: {' and '.join(names)} would all listen at {ip} port {port}; give each its own")
    return hosts


def address_clashes(cluster: ClusterConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Hosts of a cluster section with one address and port: (path of the key, what is wrong), for warnings."""
    if cluster.allToAllTopology is not None:
        listed = [(h, h.ip or cluster.host_ip.get(h.hostname)) for h in cluster.allToAllTopology.workers.regular]
        hosts = tuple(Host(h.rank, h.hostname, ip, h.port or port_of(cluster, h.hostname)) for h, ip in listed if ip)
        for (ip, port), names in _shared_addresses(hosts).items():
            key = ("cluster", "allToAllTopology")
            yield key, f"cluster.allToAllTopology: {', '.join(names)} share the address {ip} port {port}"
    named = tuple(Host(-1, name, ip, port_of(cluster, name)) for name, ip in cluster.host_ip.items())
    for (ip, port), names in _shared_addresses(named).items():
        yield ("cluster", "host_ip"), f"cluster.host_ip: {', '.join(names)} share the address {ip} port {port}"


def port_of(cluster: ClusterConfig, name: str) -> int:
    """The TCP port of a host: its own in the map, else the map's `default`, else 65432."""
    if isinstance(cluster.port, int):
        return cluster.port
    return cluster.port.get(name, cluster.port.get("default", DEFAULT_PORT))


def _from_topology(cluster: ClusterConfig, entries: tuple[TopologyHost, ...]) -> tuple[Host, ...]:
    hosts = []
    for entry in sorted(entries, key=lambda entry: entry.rank):
        listed = cluster.host_ip.get(entry.hostname)
        if entry.ip and listed and entry.ip != listed:
            raise ConfigError(
                f"cluster: {entry.hostname} is {entry.ip} in allToAllTopology and {listed} in host_ip; "
                "remove the wrong one"
            )
        ip = entry.ip or listed
        if ip is None:
            raise ConfigError(f"cluster.allToAllTopology: {entry.hostname} (rank {entry.rank}) has no ip")
        port = entry.port or port_of(cluster, entry.hostname)
        hosts.append(Host(entry.rank, entry.hostname, ip, port))
    return tuple(hosts)


def _from_host_ip(config: Config) -> tuple[Host, ...]:
    cluster = config.cluster
    if not cluster.host_ip:
        raise ConfigError(
            "no machines are named: cluster.allToAllTopology and cluster.host_ip are both empty; "
            "give a --cluster FILE, or --local N to stay on this machine"
        )
    first = [cluster.server] if cluster.server is not None else []
    if cluster.workers is not None:
        names = [*first, *cluster.workers]
    else:
        names = [*first, *(name for name in cluster.host_ip if name != cluster.server)]
        # The file may list more machines than take part.
        names = names[: _expected_count(config)]
    for name in names:
        if name not in cluster.host_ip:
            raise ConfigError(f"cluster: {name} has no address in cluster.host_ip ({', '.join(cluster.host_ip)})")
    return tuple(Host(rank, name, cluster.host_ip[name], port_of(cluster, name)) for rank, name in enumerate(names))


def _expected_count(config: Config) -> int | None:
    """Ranks that num_workers asks for; mp counts them without the server, which computes there as well."""
    count, server = config.cluster.num_workers, config.cluster.server
    if count is None:
        return None
    return count + 1 if config.algorithm == "mp" and server is not None else count


def _refuse_wrong_count(config: Config, hosts: tuple[Host, ...]) -> None:
    expected = _expected_count(config)
    if expected is not None and expected != len(hosts):
        counts = "the ranks without the server" if expected != config.cluster.num_workers else "all ranks"
        names = ", ".join(host.name for host in hosts)
        raise ConfigError(
            f"cluster.num_workers is {config.cluster.num_workers} ({counts}, for {config.algorithm}), "
            f"but {len(hosts)} machines are named ({names}); make them agree"
        )


def _shared_addresses(hosts: tuple[Host, ...]) -> dict[tuple[str, int], list[str]]:
    by_address: dict[tuple[str, int], list[str]] = {}
    for host in hosts:
        by_address.setdefault((host.ip, host.port), []).append(host.name)
    return {address: names for address, names in by_address.items() if len(names) > 1}
