"""The examples run, alone and over two processes, and say the same."""

from __future__ import annotations

import os
import runpy
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from smolcluster.config.hosts import members, roles, serving_hosts
from smolcluster.config.load import check_file, load_config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)


def run_here(example: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a script in this process, which has torch already; what it printed."""
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    return capsys.readouterr().out


def run_over_two_processes(example: str) -> list[str]:
    """Run it as a launcher would, rank 1 first; what each rank printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SMOLCLUSTER_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": str(ROOT / "src"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / example)],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [out for out, _ in reversed(outputs)]


def test_the_loop_by_hand_says_the_same_over_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    alone = run_here("classicdp_by_hand.py", capsys)
    losses = [float(line.split()[3]) for line in alone.splitlines() if line.startswith("step")]
    assert len(losses) == 3
    assert losses[2] < losses[0] - 0.05
    leader, other = run_over_two_processes("classicdp_by_hand.py")
    assert other == ""
    # To the four digits that it prints.
    assert leader == alone


def test_the_custom_model_learns_what_it_shall(capsys: pytest.CaptureFixture[str]) -> None:
    out = run_here("custom_model.py", capsys)
    percent = float(out.split("%")[0].split()[-1])
    assert "100 steps, 3200 samples" in out
    assert percent > 95  # one in six by chance


def test_the_own_dataset_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run_here("own_dataset.py", capsys).splitlines()
    assert first.startswith("at step 60: ")
    assert second.startswith("at step 120: ")
    losses = [float(line.split()[4].rstrip(",")) for line in (first, second)]
    assert losses[1] < losses[0] < 1  # ln 8 = 2.08 by chance


def test_a_run_that_waits_for_nobody_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    trained, replayed = run_here("edp_replay.py", capsys).splitlines()
    assert trained.startswith("60 updates by ")
    assert float(replayed.split()[-1]) < 1e-11  # float64, and the sums are made in the same order


def test_all_stages_of_fsdp_learn_the_same_in_less_and_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    words = [line.split() for line in run_here("fsdp_memory.py", capsys).splitlines()]
    assert [int(row[1]) for row in words] == [0, 1, 2, 3]
    assert len({row[3] for row in words}) == 1, "another loss in another stage"
    totals = [int(row[5]) + int(row[8]) + int(row[11]) for row in words]
    assert totals == sorted(totals, reverse=True)
    assert totals[3] < 0.5 * totals[0]


def test_a_pipeline_waits_less_than_layers_that_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_here("pipeline_schedules.py", capsys).splitlines()
    losses = {line.split("loss ")[1].split()[0] for line in lines}
    assert len(losses) == 1, "another loss in another order"
    alone, layers, gpipe, one_f_one_b = (int(line.split()[-4]) for line in lines)
    assert layers > 0.9 * alone
    assert max(gpipe, one_f_one_b) < 0.8 * layers


def test_experts_on_three_ranks_learn_what_one_process_learns(capsys: pytest.CaptureFixture[str]) -> None:
    alone, shared = run_here("expert_load.py", capsys).splitlines()
    assert alone.split("loss ")[1] == shared.split("loss ")[1]


def test_the_output_on_the_pages_is_the_examples_own(capsys: pytest.CaptureFixture[str]) -> None:
    alone = run_here("classicdp_by_hand.py", capsys)
    assert alone in (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")


def test_the_cluster_file_names_three_ranks_in_order() -> None:
    path = EXAMPLES / "cluster_three_terminals.yaml"
    report = check_file(path)
    assert (report.errors, report.warnings) == ((), ())
    hosts = members(load_config("classicdp_gpt", (), [path], environ={}).config)
    assert [(host.rank, host.name) for host in hosts] == [(0, "mini1"), (1, "mini2"), (2, "mini3")]
    assert len({host.port for host in hosts}) == 3


def test_the_cluster_file_with_a_server_names_it_and_two_workers() -> None:
    path = EXAMPLES / "cluster_server.yaml"
    report = check_file(path)
    assert (report.errors, report.warnings) == ((), ())
    server, *workers = roles(load_config("single_mnist", (), [path], environ={}).config)
    assert (server.name, server.role, server.listens) == ("desktop", "server", (("127.0.0.1", 65432),))
    assert [(worker.name, worker.role, worker.dials) for worker in workers] == [
        ("laptop", "worker", ("127.0.0.1", 65432)),
        ("mini", "worker", ("127.0.0.1", 65432)),
    ]


def test_the_cluster_file_for_serving_names_a_controller_and_two_nodes() -> None:
    path = EXAMPLES / "cluster_serving.yaml"
    report = check_file(path)
    assert report.errors == ()
    hosts = serving_hosts(load_config(None, (), [path], environ={}).config)
    assert (hosts.controller.name, hosts.has_layers) == ("mini1", True)
    assert [(node.name, node.dials) for node in hosts.nodes] == [
        ("mini2", ("127.0.0.1", 65432)),
        ("mini3", ("127.0.0.1", 65432)),
    ]
