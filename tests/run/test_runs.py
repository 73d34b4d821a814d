"""Real runs through the command line, in separate processes: what users do, and what they do when it goes wrong.

Each rank imports torch (3 seconds of processor time), so runs are few, small, and shared between tests.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from monitoring.trace_checks import TraceFile, assert_spans_nest, assert_transfers_are_whole_and_in_order, overlap_us
from smolcluster.checkpoint.store import load_weights

SOURCE = str(Path(__file__).parent.parent.parent / "src")
needs_posix_signals = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
pytestmark = pytest.mark.slow
# digits: 1437 samples. A global batch of 48 leaves a ragged last one; 40 steps go beyond the first epoch (30 steps).
COMMON = [
    "--preset", "classicdp_digits", "--max-steps", "40",
    "--override", "training.precision=fp64", "--override", "training.eval_steps=20",
]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from smolcluster.cli import main; main()", *arguments]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "PYTHONPATH": SOURCE, **more}


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    )


@dataclass
class Run:
    """A finished run and its folder."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def losses(self, rank: int = 0) -> list[float]:
        return [row["train/loss"] for row in self.rows if row["rank"] == rank]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_weights(self.folder / "checkpoints")[0]


def train(folder: Path, *arguments: str) -> Run:
    process = start("train", *COMMON, "--out", str(folder), *arguments)
    out, err = process.communicate(timeout=100)
    return Run(process.returncode, out, err, folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The reference: 48 samples a step in one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    return train(folder, "--algorithm", "single", "--override", "training.batch_size=48")


@pytest.fixture(scope="module")
def local3(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same 48 samples over three processes."""
    folder = tmp_path_factory.mktemp("local3") / "run"
    return train(folder, "--local", "3", "--override", "training.batch_size=16", "--trace")


def assert_equal_runs(run: Run, reference: Run) -> None:
    """float64: sums of 48 gradients in another order differ by some 1e-16 per step, which 40 steps amplify."""
    assert run.code == 0, run.err
    assert run.losses() == pytest.approx(reference.losses(), abs=1e-11)
    assert run.summary["val_loss"] == pytest.approx(reference.summary["val_loss"], abs=1e-11)
    weights, expected = run.weights(), reference.weights()
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float64
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-11), name


def test_a_run_of_one_process_leaves_a_complete_folder(single: Run) -> None:
    assert single.code == 0, single.err
    names = {path.name for path in single.folder.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "summary.json", "loss.png", "checkpoints", "logs"}
    assert (single.folder / "checkpoints" / "latest").read_text() == "step_00000040\n"
    assert [row["step"] for row in single.rows] == list(range(40))
    assert [row["step"] for row in single.rows if "val/loss" in row] == [19, 39]
    assert "sys/rss_bytes" in single.rows[0]
    summary = single.summary
    # 29 full steps and the ragged 45 samples of the first epoch, then ten more
    assert (summary["steps"], summary["samples"], summary["rank_samples"]) == (40, 39 * 48 + 45, [39 * 48 + 45])
    assert summary["parameters"] == 64 * 128 + 128 + 128 * 10 + 10
    assert summary["parameter_bytes"] == summary["gradient_bytes"] == [summary["parameters"] * 8]
    # AdamW: two moments per parameter and a step count per tensor
    assert summary["optimizer_bytes"][0] == pytest.approx(2 * 8 * summary["parameters"], rel=0.001)
    assert summary["weights_sha256"] == summary["rank_weights_sha256"][0]
    assert (summary["lost_ranks"], summary["restarts"]) == ([], 0)
    assert "run folder:" in single.out
    assert "step 40/40" in single.err


def test_three_processes_equal_one(single: Run, local3: Run) -> None:
    assert_equal_runs(local3, single)
    assert set(local3.summary["rank_weights_sha256"]) == {local3.summary["weights_sha256"]}
    assert local3.summary["samples"] == single.summary["samples"]
    assert sum(local3.summary["rank_samples"]) == single.summary["samples"]
    assert local3.losses(1) == local3.losses(2) == local3.losses(0)
    assert all(sent > 0 for sent in local3.summary["sent_bytes"])
    logs = {path.name for path in (local3.folder / "logs").iterdir()}
    assert {"rank0.log", "rank1.log", "rank2.log"} <= logs


def test_a_trace_shows_all_ranks_on_one_clock_and_agrees_with_the_metrics(local3: Run) -> None:
    trace = TraceFile(local3.folder / "trace.json")
    assert trace.processes == {rank: f"rank {rank} (rank{rank})" for rank in range(3)}
    assert_spans_nest(trace)
    assert_transfers_are_whole_and_in_order(trace)
    for rank in range(3):
        waits, buckets = trace.spans(rank, "compute", "comm_wait (all_reduce)"), trace.spans(rank, "buckets")
        waited_us = 1e6 * sum(row["time/comm_wait_s"] for row in local3.rows if row["rank"] == rank)
        assert sum(event["dur"] for event in waits) == pytest.approx(waited_us, rel=0.05)
        assert overlap_us(buckets, waits) == pytest.approx(waited_us, rel=0.05)
        assert [event["args"]["step"] for event in buckets] == list(range(40))  # one bucket a step
        assert len(trace.spans(rank, "loader", "load")) >= 40
    assert f"the trace is {local3.folder / 'trace.json'}; open it in https://ui.perfetto.dev" in local3.err


def test_unequal_shares_over_gloo_equal_one_process(single: Run, tmp_path: Path) -> None:
    shares = ["--override", "training.batch_size=24", "--override", "cluster.shares=[1, 3]"]
    run = train(tmp_path / "run", "--local", "2", "--backend", "gloo", "--quiet", *shares)
    assert_equal_runs(run, single)
    assert len(set(run.summary["rank_weights_sha256"])) == 1
    own, other = run.summary["rank_samples"]
    assert other == pytest.approx(3 * own, rel=0.01)
    assert (run.out, run.err) == ("", "")


def test_activation_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    runs = [
        train_gpt(tmp_path / str(value), "--override", f"training.activation_checkpointing={value}")
        for value in ("false", "true")
    ]
    assert [run.code for run in runs] == [0, 0], [run.err for run in runs]
    # The same bits, although dropout draws random numbers: those of the forward pass are drawn again.
    assert runs[0].losses() == runs[1].losses()
    assert len(runs[1].losses()) == 5
    assert runs[0].summary["weights_sha256"] == runs[1].summary["weights_sha256"]


def train_gpt(folder: Path, *arguments: str) -> Run:
    options = ["--preset", "classicdp_gpt", "--local", "2", "--max-steps", "5", "--override", "model.dropout=0.1"]
    process = start("train", *options, "--override", "training.device=cpu", "--out", str(folder), *arguments)
    out, err = process.communicate(timeout=100)
    return Run(process.returncode, out, err, folder)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def cluster_file(folder: Path, count: int) -> Path:
    hosts = [
        {"hostname": f"mini{rank}", "rank": rank, "ip": "127.0.0.1", "port": port}
        for rank, port in enumerate(free_ports(count))
    ]
    path = folder / "cluster.yaml"
    path.write_text(json.dumps({"num_workers": count, "allToAllTopology": {"workers": {"regular": hosts}}}))
    return path


@pytest.mark.timeout(200)
def test_machines_started_by_hand_in_any_order_equal_local(local3: Run, tmp_path: Path) -> None:
    cluster = cluster_file(tmp_path, 3)
    token = tmp_path / "token"
    made = subprocess.run(command("token", "new", "--file", str(token)), env=environment(), check=True, timeout=30)
    assert made.returncode == 0
    arguments = [
        "--cluster", str(cluster), *COMMON, "--override", "training.batch_size=16", "--token-file", str(token)
    ]  # fmt: skip
    nodes = [
        start("node", "--hostname", name, *arguments, "--out", str(tmp_path / name))
        for name in ("mini2", "mini0", "mini1")
    ]
    outputs = [node.communicate(timeout=100) for node in nodes]
    run = Run(nodes[1].returncode, *outputs[1], tmp_path / "mini0")
    assert_equal_runs(run, local3)
    assert [node.returncode for node in nodes] == [0, 0, 0]
    assert run.summary["weights_sha256"] == local3.summary["weights_sha256"]
    assert run.losses(1) == run.losses(2) == run.losses(0)
    assert "mini2 is rank 2 of 3" in outputs[0][1]
    assert "mini0 is rank 0 of 3" in outputs[1][1]
    assert "trained rank=2" in (run.folder / "logs" / "rank2.log").read_text()
    assert not (tmp_path / "mini1").exists()  # only rank 0 keeps a run folder


@pytest.mark.timeout(200)
def test_a_machine_started_twice_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    common = ["--cluster", str(cluster_file(tmp_path, 2)), *COMMON]
    token = {"SMOLCLUSTER_TOKEN": "a token for this test only"}
    first = start("node", "--hostname", "mini1", *common, **token)
    assert first.stderr is not None
    assert "mini1 is rank 1 of 2" in first.stderr.readline()
    second = start("node", "--hostname", "mini1", *common, **token)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    leader = start("node", "--hostname", "mini0", *common, "--out", str(tmp_path / "run"), **token)
    _, leader_err = leader.communicate(timeout=100)
    first.communicate(timeout=30)
    assert (leader.returncode, first.returncode) == (0, 0), leader_err


def test_a_wrong_machine_name_is_refused_with_the_right_ones(tmp_path: Path) -> None:
    node = start("node", "--cluster", str(cluster_file(tmp_path, 2)), "--hostname", "mini9", *COMMON)
    _, err = node.communicate(timeout=60)
    assert node.returncode == 2
    assert (
        err
        == "error: the cluster has no machine 'mini9'; its machines are mini0, mini1. Give one of these to --hostname\n"
    )


@pytest.mark.timeout(200)
@pytest.mark.parametrize("backend", ["tcp", "gloo"])
def test_a_launchers_environment_joins_its_job(single: Run, tmp_path: Path, backend: str) -> None:
    variables = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "SMOLCLUSTER_TOKEN": "a token for this test only",
    }
    arguments = ["train", *COMMON, "--backend", backend, "--override", "training.batch_size=24"]
    ranks = [start(*arguments, "--out", str(tmp_path / "run"), **variables, RANK=str(rank)) for rank in (1, 0)]
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    run = Run(ranks[1].returncode, *outputs[1], tmp_path / "run")
    assert ranks[0].returncode == 0, outputs[0][1]
    assert_equal_runs(run, single)
    assert run.losses(1) == run.losses(0)
    assert outputs[0] == ("", "")  # a launcher mixes the output of its processes: one shows progress


ENDLESS = ["train", "--preset", "classicdp_digits", "--override", "training.epochs=100000"]


def start_endless(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run that is in the middle of training, and its ranks' processes."""
    process = start(*ENDLESS, "--out", str(folder), *arguments)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    return process, psutil.Process(process.pid).children()


@needs_posix_signals
@pytest.mark.parametrize(
    ("arguments", "signum"),
    [
        (["--local", "2"], signal.SIGINT),
        (["--algorithm", "single"], signal.SIGINT),
        (["--algorithm", "single"], signal.SIGTERM),
    ],
)
def test_ctrl_c_finishes_the_step_and_saves_within_ten_seconds(
    tmp_path: Path, arguments: list[str], signum: signal.Signals
) -> None:
    process, ranks = start_endless(tmp_path / "run", *arguments)
    started = time.monotonic()
    process.send_signal(signum)
    out, err = process.communicate(timeout=20)
    run = Run(process.returncode, out, err, tmp_path / "run")
    assert run.code == 130, err
    assert time.monotonic() - started < 10
    assert "Traceback" not in err
    steps = run.summary["steps"]
    assert len(run.losses()) == steps > 0
    assert load_weights(run.folder / "checkpoints")[1]["step"] == steps
    assert psutil.wait_procs(ranks, timeout=1)[1] == []


@needs_posix_signals
@pytest.mark.parametrize("backend", ["tcp", "gloo"])
def test_a_killed_rank_ends_the_run_within_the_patience_and_two_seconds(tmp_path: Path, backend: str) -> None:
    process, ranks = start_endless(tmp_path / "run", "--local", "3", "--backend", backend)
    started = time.monotonic()
    ranks[1].kill()
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 5 + 2
    run = Run(process.returncode, out, err, tmp_path / "run")
    assert run.code == 3
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: rank 1 died (signal 9). Its log: {tmp_path / 'run' / 'logs' / 'rank1.log'}"]
    assert run.summary["lost_ranks"] == [1]
    assert run.summary["steps"] == len(run.losses()) > 0
    assert psutil.wait_procs(ranks, timeout=1)[1] == []


@needs_posix_signals
def test_a_frozen_rank_ends_the_run_within_the_patience_and_two_seconds(tmp_path: Path) -> None:
    process, ranks = start_endless(tmp_path / "run", "--local", "2", "--override", "cluster.patience=2")
    started = time.monotonic()
    ranks[1].suspend()
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 2 + 2
    assert process.returncode == 3
    assert "error: rank 1 is lost: it was silent" in err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["lost_ranks"] == [1]
    assert psutil.wait_procs(ranks, timeout=1)[1] == []


def test_training_that_diverges_exits_4_and_says_what_to_do(tmp_path: Path) -> None:
    wild = ["training.optimizer=sgd", "training.learning_rate=1e30", "training.grad_clip_norm=null"]
    overrides = [word for value in wild for word in ("--override", value)]
    run = train(tmp_path / "run", "--local", "2", *overrides)
    assert run.code == 4
    assert "Lower training.learning_rate" in run.err
    assert "Traceback" not in run.err
    assert run.summary["lost_ranks"] == []


def test_data_that_is_missing_exits_2_with_the_message_of_one_rank(tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", "--local", "2", "--override", "data.dataset=text", "--override", "model.type=gpt",
        "--override", "data.path=no-such-file.txt",
    )  # fmt: skip
    assert run.code == 2
    assert run.err.splitlines() == [
        "error: data.path no-such-file.txt cannot be read (No such file or directory). Name a file or folder"
    ]
