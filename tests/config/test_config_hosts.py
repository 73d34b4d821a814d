"""Ranks, names and addresses of the machines of a cluster file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smolcluster.config.hosts import Host, Member, address_clashes, members, rank_count, readings, roles
from smolcluster.config.load import check_file, load_config
from smolcluster.config.schema import Config
from smolcluster.errors import ConfigError


def config(algorithm: str = "classicdp", **cluster: Any) -> Config:
    return Config.model_validate({"algorithm": algorithm, "cluster": cluster})


def topology(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"workers": {"regular": list(entries)}}


HOSTS = {"mini1": "10.10.0.1", "mini2": "10.10.0.2", "mini3": "10.10.0.3"}


def names(hosts: tuple[Host, ...]) -> list[str]:
    return [host.name for host in hosts]


def test_a_topology_gives_its_ranks_in_rank_order() -> None:
    listed = topology(
        {"hostname": "mini2", "rank": 1, "port": 65433, "ip": "10.10.0.2"},
        {"hostname": "mini1", "rank": 0, "port": 65432, "ip": "10.10.0.1"},
    )
    assert members(config(allToAllTopology=listed, num_workers=2)) == (
        Host(0, "mini1", "10.10.0.1", 65432),
        Host(1, "mini2", "10.10.0.2", 65433),
    )


def test_a_topology_takes_what_it_leaves_out_from_host_ip_and_port() -> None:
    listed = topology({"hostname": "mini1", "rank": 0}, {"hostname": "mini2", "rank": 1, "port": 7000})
    found = members(config(allToAllTopology=listed, host_ip=HOSTS, port={"default": 6000}))
    assert [(host.ip, host.port) for host in found] == [("10.10.0.1", 6000), ("10.10.0.2", 7000)]


def test_two_ranks_of_one_machine_have_ports_of_their_own() -> None:
    listed = topology(
        {"hostname": "a", "rank": 0, "port": 1, "ip": "127.0.0.1"},
        {"hostname": "b", "rank": 1, "port": 2, "ip": "127.0.0.1"},
    )
    assert len(members(config(allToAllTopology=listed))) == 2


def test_host_ip_gives_the_server_first_and_then_the_workers() -> None:
    assert names(members(config(host_ip=HOSTS, server="mini3", workers=["mini2", "mini1"]))) == [
        "mini3",
        "mini2",
        "mini1",
    ]


def test_host_ip_without_workers_gives_the_first_hosts_after_the_server() -> None:
    assert names(members(config(host_ip=HOSTS, server="mini2", num_workers=2))) == ["mini2", "mini1"]
    assert names(members(config(host_ip=HOSTS))) == ["mini1", "mini2", "mini3"]


def test_the_server_of_mp_is_not_counted_by_num_workers() -> None:
    assert len(members(config("mp", host_ip=HOSTS, server="mini1", num_workers=2))) == 3


def test_ports_come_from_the_map_its_default_or_the_one_number() -> None:
    assert [h.port for h in members(config(host_ip=HOSTS, port={"mini1": 1, "default": 2}))] == [1, 2, 2]
    assert [h.port for h in members(config(host_ip=HOSTS, port={"mini1": 1}))] == [1, 65432, 65432]
    assert [h.port for h in members(config(host_ip=HOSTS, port=5))] == [5, 5, 5]


SAME = {"ip": "10.0.0.1", "port": 5}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            config(),
            "no machines are named: cluster.allToAllTopology and cluster.host_ip are both empty; "
            "give a --cluster FILE, or --local N to stay on this machine",
        ),
        (
            config(
                allToAllTopology=topology({"hostname": "a", "rank": 0, **SAME}, {"hostname": "b", "rank": 1, **SAME})
            ),
            "cluster: a and b would all listen at 10.0.0.1 port 5; give each its own",
        ),
        (
            config(host_ip={"a": "10.0.0.1", "b": "10.0.0.1"}),
            "cluster: a and b would all listen at 10.0.0.1 port 65432; give each its own",
        ),
        (
            config(allToAllTopology=topology({"hostname": "a", "rank": 0})),
            "cluster.allToAllTopology: a (rank 0) has no ip",
        ),
        (
            config(
                allToAllTopology=topology({"hostname": "a", "rank": 0, "ip": "10.0.0.1"}), host_ip={"a": "10.0.0.2"}
            ),
            "cluster: a is 10.0.0.1 in allToAllTopology and 10.0.0.2 in host_ip; remove the wrong one",
        ),
        (
            config(host_ip=HOSTS, workers=["mini1", "mini2"], num_workers=3),
            "cluster.num_workers is 3 (all ranks, for classicdp), but 2 machines are named (mini1, mini2); "
            "make them agree",
        ),
        (
            config("mp", host_ip=HOSTS, server="mini1", workers=["mini2", "mini3"], num_workers=3),
            "cluster.num_workers is 3 (the ranks without the server, for mp), but 3 machines are named "
            "(mini1, mini2, mini3); make them agree",
        ),
        (
            config("single", host_ip=HOSTS),
            "algorithm single runs in one process and has no other machines; choose another --algorithm",
        ),
    ],
)
def test_machines_that_cannot_run_together_are_refused(found: Config, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        members(found)
    assert str(caught.value) == message


def test_a_shared_address_is_also_reported_as_a_clash() -> None:
    clashes = list(address_clashes(config(host_ip={"a": "10.0.0.1", "b": "10.0.0.1"})))
    assert clashes == [(("cluster", "host_ip"), "cluster.host_ip: a, b share the address 10.0.0.1 port 65432")]


# --- servers and workers

SERVED = {"mini1": "10.10.0.1", "macbook": "10.10.0.1", "pi5": "192.168.50.1", "win": "10.10.0.1"}
WITH_SERVER = {"host_ip": SERVED, "server": "mini1", "workers": ["pi5", "win", "macbook"], "num_workers": 3}


def test_a_worker_with_the_servers_address_dials_it_and_the_server_listens_there() -> None:
    assert roles(config("edp", **WITH_SERVER)) == (
        Member(0, "mini1", "server", (("10.10.0.1", 65432),)),
        Member(1, "pi5", "worker", (("192.168.50.1", 65432),), ("10.10.0.1", 65432)),
        Member(2, "win", "worker", (), ("10.10.0.1", 65432)),
        Member(3, "macbook", "worker", (), ("10.10.0.1", 65432)),
    )


def test_the_server_listens_on_its_other_address_too_where_it_recognises_it() -> None:
    found = roles(config("edp", **WITH_SERVER), hostname="mini1", local_addresses=["10.10.0.1", "192.168.50.1"])
    assert found[0].listens == (("10.10.0.1", 65432), ("192.168.50.1", 65432))
    assert found[1] == Member(1, "pi5", "worker", (), ("192.168.50.1", 65432))


def test_a_worker_dials_an_address_that_it_does_not_have_itself() -> None:
    found = roles(config("edp", **WITH_SERVER), hostname="pi5", local_addresses=["192.168.50.2"])
    assert found[1] == Member(1, "pi5", "worker", (), ("192.168.50.1", 65432))
    at_home = roles(config("edp", **WITH_SERVER), hostname="pi5", local_addresses=["192.168.50.1"])
    assert at_home[1].dials == ("10.10.0.1", 65432)


def test_where_all_are_alike_everybody_listens_and_nobody_is_server() -> None:
    found = roles(config("classicdp", host_ip=HOSTS, server="mini2"))
    assert [(m.name, m.role, m.dials) for m in found] == [(n, "rank", None) for n in ("mini2", "mini1", "mini3")]
    assert [m.listens for m in found] == [((HOSTS[m.name], 65432),) for m in found]


@pytest.mark.parametrize(
    ("algorithm", "serves", "server", "count"),
    [
        ("classicdp", False, "mini1", 2),
        ("fsdp", False, "mini1", 2),
        ("ep", False, "mini1", 2),
        ("mp_pipeline", False, "mini1", 2),
        ("edp", False, "mini1", 3),
        ("syncps", False, "mini1", 3),
        ("mp", False, "mini1", 3),
        ("mp", False, None, 2),
        ("single", True, "mini1", 3),
        ("classicdp", True, "mini1", 3),
    ],
)
def test_num_workers_counts_the_server_where_all_are_alike(
    algorithm: str, serves: bool, server: str | None, count: int
) -> None:
    assert len(roles(config(algorithm, host_ip=HOSTS, server=server, num_workers=2), serves=serves)) == count


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (config("edp", host_ip=HOSTS), "algorithm edp needs cluster.server, the name of the server's machine"),
        (
            config("syncps", host_ip=HOSTS, server="mini1", num_workers=3),
            "cluster.num_workers is 3 (the ranks without the server, for syncps), but 3 machines are named "
            "(mini1, mini2, mini3); make them agree",
        ),
        (
            config("classicdp", host_ip=SERVED, server="mini1"),
            "cluster: mini1 and macbook and win would all listen at 10.10.0.1 port 65432; give each its own",
        ),
        (
            config("mp", host_ip={"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.2"}, server="a"),
            "cluster: b and c would all listen at 10.0.0.2 port 65432; give each its own",
        ),
    ],
)
def test_roles_that_cannot_be_played_are_refused(found: Config, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        roles(found)
    assert str(caught.value) == message


def test_workers_that_only_push_may_share_an_address() -> None:
    hosts = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.2"}
    found = config("edp", host_ip=hosts, server="a")
    assert len(roles(found)) == 3
    assert list(address_clashes(found)) == []


def test_a_worker_that_dials_is_no_clash_but_is_said() -> None:
    found = config("mp", host_ip=HOSTS | {"mini4": "10.10.0.1"}, server="mini1", num_workers=3)
    assert list(address_clashes(found)) == []
    assert [text for _, text in readings(found)] == [
        "cluster.host_ip: mini4 with the address of the server mini1: read as the address that they dial; "
        "the server listens there",
        "cluster.num_workers: 3 is read as the ranks beside the server mini1: 4 in all",
    ]


def test_where_all_are_alike_the_server_among_them_is_said_and_a_shared_address_is_a_clash() -> None:
    found = config("classicdp", host_ip={"a": "10.0.0.1", "b": "10.0.0.1"}, server="a", num_workers=2)
    assert [text for _, text in address_clashes(found)] == [
        "cluster.host_ip: a, b share the address 10.0.0.1 port 65432"
    ]
    assert [text for _, text in readings(found)] == [
        "cluster.num_workers: 2 is read as all ranks, the server a among them"
    ]


TOPOLOGY = """
allToAllTopology:
  workers:
    regular:
      - {hostname: mini2, rank: 1}
      - {hostname: mini1, rank: 0}
"""
TWO_HOSTS = "host_ip: {mini1: 10.0.0.1, mini2: 10.0.0.2}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "num_workers: 3\nalgorithm: fsdp" + TOPOLOGY,
            "3 (all ranks, for fsdp), but 2 machines are named (mini1, mini2)",
        ),
        ("num_workers: 3" + TOPOLOGY, "3, but 2 machines are named (mini1, mini2)"),
        (
            "num_workers: 2\nalgorithm: edp\nserver: mini1\nworkers: [mini2]\n" + TWO_HOSTS,
            "2 (the ranks without the server, for edp), but 2 machines are named (mini1, mini2)",
        ),
        (
            "num_workers: 2\nweb_interface: {api_port: 80}\nserver: mini1\n" + TWO_HOSTS,
            "2 (the ranks without the server, for serving), but 2 machines are named (mini1, mini2)",
        ),
    ],
)
def test_check_refuses_a_number_of_workers_that_the_named_machines_contradict(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    assert check_file(file).errors == (f"{file}:1: cluster.num_workers: {message}",)
    assert load_config(cluster_files=[file], environ={}).config.cluster.num_workers  # --local N does not use it


@pytest.mark.parametrize("count", [1, 2])
def test_check_leaves_open_what_workers_are_counted_for_where_the_file_does_not_say(tmp_path: Path, count: int) -> None:
    file = tmp_path / "a.yaml"
    for algorithm in ("", "algorithm: single\n"):
        file.write_text(
            f"num_workers: {count}\n{algorithm}server: mini1\nworkers: [mini2]\n{TWO_HOSTS}", encoding="utf-8"
        )
        assert check_file(file).errors == ()


def test_the_ranks_are_counted_without_names_too() -> None:
    assert rank_count(config()) == 1
    assert rank_count(config(num_workers=3)) == 3
    assert rank_count(config("syncps", num_workers=3)) == 4
    assert rank_count(config(host_ip=HOSTS)) == 3
