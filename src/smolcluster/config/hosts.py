"""Which machines take part: rank, name, role and addresses of each, from the cluster section.

`num_workers` counts all ranks where every rank computes alike (classicdp, fsdp, ep, mp_pipeline), and the ranks without
the server where there is one (edp, syncps, mp, serving). In a file with a server, the address of a worker in `host_ip`
that is the server's own is not where the worker is, but the address at which it reaches the server.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from smolcluster.config.schema import ClusterConfig, Config, TopologyHost
from smolcluster.errors import ConfigError

DEFAULT_PORT = 65432
# Every rank listens and computes; a `server` is no more than the name of rank 0.
ALL_ALIKE = ("classicdp", "fsdp", "ep", "mp_pipeline")

Address: TypeAlias = tuple[str, int]  # IP address or host name, TCP port


@dataclass(frozen=True, slots=True)
class Host:
    """One rank's machine. It listens on, and is dialled at, `ip` and `port`."""

    rank: int
    name: str
    ip: str
    port: int


@dataclass(frozen=True, slots=True)
class Member:
    """One rank's part in a cluster with a server, or among equals.

    Attributes:
        rank: 0 to N - 1.
        name: the machine's name.
        role: `server`, `worker`, or `rank` where all are alike. The server of mp and of serving computes too.
        listens: where it listens. None for a worker that only dials, or whose own address the file does not give.
        dials: where it reaches the server; None for the server, and where all are alike.
    """

    rank: int
    name: str
    role: Literal["server", "worker", "rank"]
    listens: tuple[Address, ...]
    dials: Address | None = None


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
    hosts = _hosts(config, serves=False)
    _refuse_shared_addresses({host.name: ((host.ip, host.port),) for host in hosts})
    return hosts


def roles(
    config: Config, *, serves: bool = False, hostname: str | None = None, local_addresses: Collection[str] = ()
) -> tuple[Member, ...]:
    """Who is server and who is worker, where each listens, and which address each worker dials; in rank order.

    Args:
        config: with the machines.
        serves: for serving a model, whatever the algorithm.
        hostname: this machine's name.
        local_addresses: the IP addresses that this machine has. A file may give a worker an address of the server's
            that only the two machines themselves can recognise: the server then listens there too, the worker dials it.

    Raises:
        ConfigError: as `members`; or a parameter server is not named.
    """
    if not serves and config.cluster.server is None and config.algorithm in ("syncps", "edp"):
        raise ConfigError(f"algorithm {config.algorithm} needs cluster.server, the name of the server's machine")
    hosts = _hosts(config, serves)
    if not serves and config.algorithm in ALL_ALIKE:
        found = tuple(Member(host.rank, host.name, "rank", ((host.ip, host.port),)) for host in hosts)
        _refuse_shared_addresses({member.name: member.listens for member in found})
        return found
    server = next((host for host in hosts if host.name == config.cluster.server), hosts[0])
    dialled = _dialled_addresses(server, hosts, hostname, local_addresses)
    found = (
        Member(server.rank, server.name, "server", tuple((ip, server.port) for ip in dialled)),
        *(_worker(host, server, dialled, hostname, local_addresses) for host in hosts if host != server),
    )
    pushes_only = not serves and config.algorithm in ("syncps", "edp")
    listening = {member.name: member.listens for member in found if member.role == "server" or not pushes_only}
    _refuse_shared_addresses(listening)
    return tuple(sorted(found, key=lambda member: member.rank))


@dataclass(frozen=True, slots=True)
class ServingHosts:
    """Who serves a model.

    Attributes:
        controller: the machine with engine and API.
        has_layers: whether it computes as well.
        nodes: the others, which compute, in order.
    """

    controller: Member
    has_layers: bool
    nodes: tuple[Member, ...]


def serving_hosts(
    config: Config, *, hostname: str | None = None, local_addresses: Collection[str] = ()
) -> ServingHosts:
    """Which machines serve: `serving.controller` without layers where it is set, else the server or rank 0 with them.

    Args:
        config: with the machines.
        hostname, local_addresses: see `roles`.

    Raises:
        ConfigError: as `roles`; or the controller has no address, or nobody is left to compute.
    """
    name = config.serving.controller
    found = roles(config, serves=True, hostname=hostname, local_addresses=local_addresses)
    server = next(member for member in found if member.role == "server")
    if name is None or name == server.name:
        nodes = tuple(member for member in found if member is not server)
        if not nodes and name is not None:
            raise ConfigError(f"serving.controller is {name}, and there is no other machine to compute. Name one")
        return ServingHosts(server, name is None, nodes)
    if name not in config.cluster.host_ip:
        known = ", ".join(config.cluster.host_ip)
        raise ConfigError(f"serving.controller is {name}, which has no address in cluster.host_ip ({known})")
    address = (config.cluster.host_ip[name], port_of(config.cluster, name))
    hosts = tuple(host for host in _hosts(config, serves=True) if host.name != name)
    nodes = tuple(Member(host.rank, host.name, "worker", ((host.ip, host.port),), address) for host in hosts)
    _refuse_shared_addresses({name: (address,)} | {node.name: node.listens for node in nodes})
    return ServingHosts(Member(0, name, "server", (address,)), False, nodes)


def rank_count(config: Config) -> int:
    """Ranks of a run over the machines of the configuration; 1 where it does not say."""
    try:
        return len(_hosts(config, serves=False))
    except ConfigError:
        return _expected_count(config, serves=False) or 1


def host_names(config: Config) -> tuple[str, ...]:
    """The machines' names in rank order; empty where they are not named, or wrongly."""
    try:
        return tuple(host.name for host in _hosts(config, serves=False))
    except ConfigError:
        return ()


def address_clashes(config: Config, serves: bool = False) -> Iterator[tuple[tuple[str, ...], str]]:
    """Hosts that would listen at one address and port: (path of the key, what is wrong), for warnings."""
    cluster = config.cluster
    if cluster.allToAllTopology is not None:
        listed = [(h, h.ip or cluster.host_ip.get(h.hostname)) for h in cluster.allToAllTopology.workers.regular]
        addresses = {h.hostname: (ip, h.port or port_of(cluster, h.hostname)) for h, ip in listed if ip}
        for (ip, port), names in _shared({name: (address,) for name, address in addresses.items()}).items():
            key = ("cluster", "allToAllTopology")
            yield key, f"cluster.allToAllTopology: {', '.join(names)} share the address {ip} port {port}"
    if not serves and config.algorithm in ("syncps", "edp"):
        return  # only the server listens
    dialling = _dialling(config, serves)
    named = {name: ((ip, port_of(cluster, name)),) for name, ip in cluster.host_ip.items() if name not in dialling}
    for (ip, port), names in _shared(named).items():
        yield ("cluster", "host_ip"), f"cluster.host_ip: {', '.join(names)} share the address {ip} port {port}"


def count_clash(config: Config, serves: bool, knows_algorithm: bool) -> str | None:
    """Why `num_workers` cannot be right beside the machines that the file names; None: it can, or it names none.

    Args:
        config: of one file.
        serves: the file is for serving.
        knows_algorithm: the file says which algorithm its machines are for. If not, any reading that agrees will do.
    """
    found = None
    for reading in (serves,) if knows_algorithm else (False, True):
        names, expected = _names(config, reading), _expected_count(config, reading)
        if not names or expected is None or len(names) == expected:
            return None
        counts = f"{config.cluster.num_workers} ({_counted(config, reading)})" if knows_algorithm else expected
        found = found or f"cluster.num_workers: {counts}, but {len(names)} machines are named ({', '.join(names)})"
    return found


def readings(config: Config, serves: bool = False) -> Iterator[tuple[tuple[str, ...], str]]:
    """How keys of the cluster are read that could be meant otherwise: (path of the key, how), for warnings."""
    cluster = config.cluster
    if cluster.server is None:
        return
    dialling = _dialling(config, serves)
    if dialling:
        text = (
            f"cluster.host_ip: {', '.join(dialling)} with the address of the server {cluster.server}: read as the "
            "address that they dial; the server listens there"
        )
        yield ("cluster", "host_ip"), text
    if cluster.num_workers is None or (config.algorithm == "single" and not serves):
        return
    total = _expected_count(config, serves)
    if total == cluster.num_workers:
        text = f"{total} is read as all ranks, the server {cluster.server} among them"
    else:
        text = f"{cluster.num_workers} is read as the ranks beside the server {cluster.server}: {total} in all"
    yield ("cluster", "num_workers"), f"cluster.num_workers: {text}"


def port_of(cluster: ClusterConfig, name: str) -> int:
    """The TCP port of a host: its own in the map, else the map's `default`, else 65432."""
    if isinstance(cluster.port, int):
        return cluster.port
    return cluster.port.get(name, cluster.port.get("default", DEFAULT_PORT))


# --- who dials whom


def _dialling(config: Config, serves: bool) -> list[str]:
    """Workers whose entry in host_ip is the server's address."""
    cluster = config.cluster
    if cluster.server is None or (not serves and config.algorithm in ALL_ALIKE):
        return []
    address = cluster.host_ip.get(cluster.server)
    return [name for name, ip in cluster.host_ip.items() if ip == address and name != cluster.server]


def _dialled_addresses(
    server: Host, hosts: tuple[Host, ...], hostname: str | None, local_addresses: Collection[str]
) -> tuple[str, ...]:
    """The addresses of the server that stand in the file, its own entry first."""
    here = local_addresses if hostname == server.name else ()
    return tuple(dict.fromkeys([server.ip, *(host.ip for host in hosts if host.ip in here)]))


def _worker(
    host: Host, server: Host, dialled: Collection[str], hostname: str | None, local_addresses: Collection[str]
) -> Member:
    is_elsewhere = hostname == host.name and bool(local_addresses) and host.ip not in local_addresses
    if host.ip in dialled or is_elsewhere:
        return Member(host.rank, host.name, "worker", (), (host.ip, server.port))
    return Member(host.rank, host.name, "worker", ((host.ip, host.port),), (server.ip, server.port))


# --- who takes part


def _hosts(config: Config, serves: bool) -> tuple[Host, ...]:
    cluster = config.cluster
    if cluster.allToAllTopology is not None and cluster.allToAllTopology.workers.regular:
        hosts = _from_topology(cluster, cluster.allToAllTopology.workers.regular)
    else:
        hosts = _from_host_ip(config, serves)
    _refuse_wrong_count(config, hosts, serves)
    return hosts


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


def _from_host_ip(config: Config, serves: bool) -> tuple[Host, ...]:
    cluster = config.cluster
    if not cluster.host_ip:
        raise ConfigError(
            "no machines are named: cluster.allToAllTopology and cluster.host_ip are both empty; "
            "give a --cluster FILE, or --local N to stay on this machine"
        )
    names = _names(config, serves)
    for name in names:
        if name not in cluster.host_ip:
            raise ConfigError(f"cluster: {name} has no address in cluster.host_ip ({', '.join(cluster.host_ip)})")
    return tuple(Host(rank, name, cluster.host_ip[name], port_of(cluster, name)) for rank, name in enumerate(names))


def _names(config: Config, serves: bool) -> list[str]:
    """The machines that take part, in rank order; empty: the configuration names none."""
    cluster = config.cluster
    if cluster.allToAllTopology is not None and cluster.allToAllTopology.workers.regular:
        return [host.hostname for host in sorted(cluster.allToAllTopology.workers.regular, key=lambda host: host.rank)]
    first = [cluster.server] if cluster.server is not None else []
    if cluster.workers is not None:
        return [*first, *cluster.workers]
    names = [*first, *(name for name in cluster.host_ip if name != cluster.server)]
    # The file may list more machines than take part.
    return names[: _expected_count(config, serves)]


def _expected_count(config: Config, serves: bool) -> int | None:
    """Ranks that num_workers asks for; None: it is not set."""
    count, server = config.cluster.num_workers, config.cluster.server
    if count is None:
        return None
    if not serves and config.algorithm in ("syncps", "edp"):
        return count + 1
    return count + 1 if (serves or config.algorithm == "mp") and server is not None else count


def _refuse_wrong_count(config: Config, hosts: tuple[Host, ...], serves: bool) -> None:
    expected = _expected_count(config, serves)
    if expected is not None and expected != len(hosts):
        names = ", ".join(host.name for host in hosts)
        raise ConfigError(
            f"cluster.num_workers is {config.cluster.num_workers} ({_counted(config, serves)}), "
            f"but {len(hosts)} machines are named ({names}); make them agree"
        )


def _counted(config: Config, serves: bool) -> str:
    """What num_workers counts."""
    is_all = _expected_count(config, serves) == config.cluster.num_workers
    purpose = "serving" if serves else config.algorithm
    return f"{'all ranks' if is_all else 'the ranks without the server'}, for {purpose}"


def _refuse_shared_addresses(listening: Mapping[str, tuple[Address, ...]]) -> None:
    for (ip, port), names in _shared(listening).items():
        raise ConfigError(f"cluster: {' and '.join(names)} would all listen at {ip} port {port}; give each its own")


def _shared(listening: Mapping[str, tuple[Address, ...]]) -> dict[Address, list[str]]:
    by_address: dict[Address, list[str]] = {}
    for name, addresses in listening.items():
        for address in addresses:
            by_address.setdefault(address, []).append(name)
    return {address: names for address, names in by_address.items() if len(names) > 1}
