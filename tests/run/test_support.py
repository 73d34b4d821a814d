"""What is refused before a process starts, whose share is how large, and what a launcher says."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smolcluster.cluster.world import Member, View
from smolcluster.config.schema import Config
from smolcluster.errors import ConfigError
from smolcluster.run.connect import _address_towards, exposed
from smolcluster.run.launcher import Launch, launch_from_environment
from smolcluster.run.support import check_supported, exposure, rank_weights, shared_options, tcp_options

NAMES = ["mini1", "mini2", "mini3"]


def make_config(**sections: Any) -> Config:
    return Config.model_validate({"algorithm": "classicdp", **sections})


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"algorithm": "ep"}, "ep divides experts, and model.type simple_nn has none"),
        ({"algorithm": "mp", "cluster": {"compression": "int8"}}, "with algorithm mp none are"),
        ({"backend": "gloo", "cluster": {"tls": True}}, "cluster.tls is of backend tcp; gloo does not encrypt"),
        ({"algorithm": "syncps", "backend": "gloo"}, "lets workers come and go, which backend gloo cannot"),
        ({"algorithm": "edp", "data": {"streaming": True}}, "a stream cannot be read at any place"),
        ({"algorithm": "edp", "cluster": {"min_ranks": 4}}, "min_ranks is 4; with 3 ranks, the server among them"),
        ({"cluster": {"min_ranks": 2}}, "cluster.min_ranks below 3 ranks"),
    ],
)
def test_what_comes_later_is_refused_by_name_instead_of_ignored(sections: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        check_supported(make_config(**sections), 3)


def test_what_this_release_has_passes() -> None:
    check_supported(make_config(cluster={"min_ranks": 3, "compression": "bf16"}), 3)
    check_supported(make_config(cluster={"use_quantization": True}), 3)
    check_supported(make_config(cluster={"tls": True}), 3)
    check_supported(make_config(algorithm="single"), 1)


def test_single_is_one_process() -> None:
    with pytest.raises(ConfigError, match="2 ranks are asked for"):
        check_supported(make_config(algorithm="single"), 2)


def test_single_passes_over_what_is_said_of_the_cluster() -> None:
    cluster = {"compression": "int8", "shares": [1, 2], "min_ranks": 1, "tls": True}
    config = make_config(algorithm="single", cluster=cluster)
    check_supported(config, 1)
    assert rank_weights(config, ["rank0"]) == [1.0]


def test_shares_become_weights_in_rank_order() -> None:
    assert rank_weights(make_config(), NAMES) == [1.0, 1.0, 1.0]
    assert rank_weights(make_config(cluster={"shares": [3, 1, 2]}), NAMES) == [3, 1, 2]
    by_name = {"mini3": 2, "mini1": 3, "mini2": 1}
    assert rank_weights(make_config(cluster={"shares": by_name}), NAMES) == [3, 1, 2]


@pytest.mark.parametrize("shares", [[1, 2], {"mini1": 1, "mini2": 1}, {"mini1": 1, "mini2": 1, "mini4": 1}])
def test_shares_of_other_ranks_are_refused(shares: Any) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.shares"):
        rank_weights(make_config(cluster={"shares": shares}), NAMES)


def test_options_that_change_the_result_are_shared_and_those_of_one_machine_are_not() -> None:
    options = shared_options(make_config())
    assert options["training.batch_size"] == "None"
    changes: list[dict[str, Any]] = [
        *({"training": {"learning_rate": 0.5}}, {"cluster": {"seed": 7}}, {"model": {"hidden": 9}}),
        *({"checkpoint": {"steps": 7}}, {"data": {"tokenizer": "other"}}, {"cluster": {"tls": True}}),
    ]
    for change in changes:
        assert shared_options(make_config(**change)) != options
    for change in ({"training": {"device": "cpu"}}, {"logging": {"log_interval": 3}}, {"data": {"path": "x"}}):
        assert shared_options(make_config(**change)) == options


def test_a_model_folder_may_lie_elsewhere_on_another_machine() -> None:
    here, there, other = (
        shared_options(make_config(model={"type": "hf", "hf_model_name": name}))
        for name in ("/home/a/llama", "models/llama/", "models/qwen")
    )
    assert here == there != other


ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_sockets_are_encrypted_where_the_cluster_says_so() -> None:
    assert tcp_options(make_config(cluster={"tls": True})).tls
    assert not tcp_options(make_config()).tls


def test_shared_memory_is_used_unless_it_is_switched_off() -> None:
    assert tcp_options(make_config()).shared_memory
    assert not tcp_options(make_config(cluster={"shared_memory": "off"})).shared_memory


def test_a_launcher_is_recognised_by_its_variables() -> None:
    assert launch_from_environment({}) is None
    assert launch_from_environment({"MASTER_ADDR": "left over"}) is None
    assert launch_from_environment(ENVIRONMENT) == Launch(1, 4, 0, "10.0.0.1", 29500, False)
    torchrun = {**ENVIRONMENT, "LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert launch_from_environment(torchrun) == Launch(1, 4, 1, "10.0.0.1", 29500, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4"),
        ({"RANK": "one"}, "RANK='one'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0"),
        ({"MASTER_ADDR": None}, "but not MASTER_ADDR"),
    ],
)
def test_a_launcher_that_makes_no_sense_is_refused(changes: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in {**ENVIRONMENT, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        launch_from_environment(environment)


def test_the_own_address_towards_a_host_is_one_that_it_can_reach() -> None:
    assert _address_towards("127.0.0.1", 9) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=no such host"):
        _address_towards("no such host", 9)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "192.168.1.10", "10.10.0.1", "172.31.0.1", "169.254.3.4", "100.64.0.1", "198.18.0.1"),
        *("::1", "fe80::1", "fd7a::1", "::ffff:10.0.0.1", "mini1.local"),
    ],
)
def test_an_own_network_is_no_reason_to_warn(host: str) -> None:
    assert exposure([host], tls=False) is None


@pytest.mark.parametrize("host", ["8.8.8.8", "100.128.0.1", "172.32.0.1", "2a00:1450::1", "::ffff:8.8.8.8"])
def test_an_address_that_is_not_private_is_named_with_the_remedy_unless_tls_is_on(host: str) -> None:
    warning = exposure(["10.0.0.1", host], tls=False)
    assert warning is not None
    assert warning.startswith(f"{host} is not a private address")
    assert "cluster.tls: true" in warning
    assert exposure(["10.0.0.1", host], tls=True) is None


def test_a_launchers_job_warns_of_the_addresses_that_its_ranks_listen_at() -> None:
    members = (Member(0, "rank0", "tcp://10.0.0.1:7000"), Member(1, "rank1", "tcp://[2a00:1450::1]:7001"))
    view = View(generation=1, members=members, leader=0, run_id="run")
    world: Any = SimpleNamespace(view=lambda: view)
    warning = exposed(world, tls=False)
    assert warning is not None
    assert warning.startswith("2a00:1450::1 is not a private address")
    assert exposed(world, tls=True) is None


@pytest.mark.parametrize("tls", [False, True])
def test_a_machine_with_a_public_address_warns_on_one_line_before_it_listens(tmp_path: Path, tls: bool) -> None:
    from smolcluster.monitoring.reporters import QuietReporter
    from smolcluster.run.node import NodeOptions, run_node

    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    hosts = {"host_ip": {"mini1": "8.8.8.8", "mini2": "8.8.4.4"}, "port": 65432, "tls": tls}
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"cannot listen on tcp://8\.8\.8\.8"):
        run_node(
            make_config(cluster=hosts), "mini1", NodeOptions(tmp_path / "run", QuietReporter(), token), said.append
        )
    warnings = [line for line in said if line.startswith("warning: 8.8.8.8, 8.8.4.4 is not a private address")]
    assert len(warnings) == (0 if tls else 1)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    from smolcluster.monitoring.reporters import QuietReporter
    from smolcluster.run.node import NodeOptions, run_node

    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        hosts = {"host_ip": {"mini1": "127.0.0.1", "mini2": "127.0.0.1"}, "port": {"mini1": port, "mini2": port + 1}}
        said: list[str] = []
        with pytest.raises(ConfigError, match=str(port)):
            run_node(
                make_config(cluster=hosts), "mini1", NodeOptions(tmp_path / "run", QuietReporter(), token), said.append
            )
    assert said == [
        f"mini1 is rank 0 of 2 (classicdp over tcp), at 127.0.0.1:{port}; it leads, keeps the run folder and waits for "
        "mini2 (rank 1)"
    ]
