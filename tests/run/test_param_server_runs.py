"""Runs over a parameter server through the command line, in processes of their own, over TCP; also when some die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from monitoring.trace_checks import TraceFile, assert_spans_nest, assert_transfers_are_whole_and_in_order

SOURCE = str(Path(__file__).parent.parent.parent / "src")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="POSIX signals")]
SAMPLES = 1437  # of digits
COMMON = [
    "--preset", "classicdp_digits", "--override", "training.precision=fp64", "--override", "training.eval_steps=null",
    "--override", "cluster.patience=3",
]  # fmt: skip


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", "from smolcluster.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "PYTHONPATH": SOURCE, **variables},
    )


def finish(process: subprocess.Popen[str], code: int = 0, timeout: float = 100) -> str:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, out + err
    return out + err


def train(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return start("train", *COMMON, "--out", str(folder), *arguments)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def rows(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in found if row["rank"] == rank and "train/loss" in row]


def process_of(folder: Path, rank: int) -> psutil.Process:
    """The newest process of a rank."""
    return psutil.Process(pid_of(folder, rank))


def pid_of(folder: Path, rank: int) -> int:
    """Of the newest process of a rank."""
    log = (folder / "logs" / f"rank{rank}.log").read_text()
    return int(re.findall(rf"rank started rank={rank} world_size=\d+ pid=(\d+)", log)[-1])


def wait_for(condition: Any, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def check_ledger(folder: Path, epochs: int) -> None:
    """Every sample of every epoch counts once."""
    seen: Counter[tuple[int, int]] = Counter()
    for line in (folder / "ledger.jsonl").read_text().splitlines():
        for epoch, begin, end in json.loads(line)["ranges"]:
            seen.update((epoch, place) for place in range(begin, end))
    assert seen == Counter((epoch, place) for epoch in range(epochs) for place in range(SAMPLES))


def assert_links(found: list[dict[str, Any]], peers: set[str]) -> None:
    """Every tenth row describes the link to each peer; the bytes are those of the rows in between."""
    described = [row for row in found if any(key.startswith("link/rank") for key in row)]
    assert [row["step"] for row in described] == [0, 10, 20, 30]
    for peer in peers:
        assert described[-1][f"link/{peer}/rtt_ms"] > 0
    before, last = described[-2:]
    moved = sum(last[f"link/{peer}/bandwidth_bytes_per_s"] for peer in peers) * (last["time"] - before["time"])
    counted = sum(row["link/sent_bytes"] + row["link/recv_bytes"] for row in found if 20 < row["step"] <= 30)
    assert moved == pytest.approx(counted, rel=0.25)  # weights of the next step may be on their way when one is counted


def test_syncps_equals_single_and_fills_the_run_folder(tmp_path: Path) -> None:
    shared = ["--max-steps", "40", "--override", "cluster.staleness_bound=1"]
    shared += ["--override", "cluster.metrics_log_interval=10"]
    servers = train(tmp_path / "ps", "--algorithm", "syncps", "--local", "3", *shared)
    finish(servers)
    kept = summary(tmp_path / "ps")
    size = rows(tmp_path / "ps")[0]["train/samples"]
    single = ["--algorithm", "single", "--override", f"training.batch_size={size}"]
    finish(train(tmp_path / "single", *single, *shared))
    reference = summary(tmp_path / "single")
    for mine, theirs in zip(rows(tmp_path / "ps"), rows(tmp_path / "single"), strict=True):
        assert (mine["step"], mine["train/samples"]) == (theirs["step"], theirs["train/samples"])
        assert abs(mine["train/loss"] - theirs["train/loss"]) < 1e-11
    assert abs(kept["val_loss"] - reference["val_loss"]) < 1e-11
    assert (kept["world_size"], kept["lost_ranks"], kept["joined_ranks"]) == (3, [], [])
    assert kept["rank_samples"] == [0, kept["samples"] // 2, kept["samples"] // 2]
    assert len(set(kept["rank_weights_sha256"])) == 1
    assert kept["optimizer_bytes"][1:] == [0, 0]
    # What a worker says of a step is what the server says.
    for rank in (1, 2):
        losses = {row["step"]: row["train/loss"] for row in rows(tmp_path / "ps", rank)}
        assert losses == {row["step"]: row["train/loss"] for row in rows(tmp_path / "ps")}
    assert_links(rows(tmp_path / "ps"), {"rank1", "rank2"})
    assert_links(rows(tmp_path / "ps", 1), {"rank0"})
    generation = json.loads((tmp_path / "ps" / "generation.json").read_text())
    assert [member["rank"] for member in generation["members"]] == [0, 1, 2]


def test_a_run_of_edp_replays_to_the_same_weights(tmp_path: Path) -> None:
    """With int8 both ways, whose residuals the replay keeps too."""
    options = ["--local", "4", "--max-steps", "60", "--override", "cluster.compression=int8"]
    finish(train(tmp_path / "edp", "--algorithm", "edp", *options))
    assert len(rows(tmp_path / "edp")) == 60
    told = finish(start("train", "--replay", str(tmp_path / "edp"), "--out", str(tmp_path / "replay")))
    (difference,) = re.findall(r"the weights differ from those of .* by at most (\S+)", told)
    assert float(difference) <= 1e-11
    assert abs(summary(tmp_path / "replay")["val_loss"] - summary(tmp_path / "edp")["val_loss"]) <= 1e-11


def test_a_run_that_was_resumed_with_other_settings_replays_too(tmp_path: Path) -> None:
    folder, options = tmp_path / "edp", ["--algorithm", "edp", "--local", "3", "--override", "lr_schedule.kind=cosine"]
    finish(train(folder, *options, "--max-steps", "30"))
    changed = ["--max-steps", "50"]
    # Constant: where pushes were merged the samples of a cosine, and its learning rate, end before the updates do.
    for setting in ("training.learning_rate=0.01", "lr_schedule.kind=constant", "cluster.compression=bf16"):
        changed += ["--override", setting]
    finish(train(folder, *options, *changed, "--resume", "latest"))
    told = finish(start("train", "--replay", str(folder), "--out", str(tmp_path / "replay")))
    (difference,) = re.findall(r"the weights differ from those of .* by at most (\S+)", told)
    assert float(difference) <= 1e-11
    assert summary(tmp_path / "replay")["steps"] == 50


def test_a_run_goes_on_without_a_worker_that_dies(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--algorithm", "syncps", "--local", "3", "--override", "training.epochs=8")
    wait_for(lambda: len(rows(tmp_path / "run")) > 5)
    process_of(tmp_path / "run", 2).kill()
    finish(run)
    assert summary(tmp_path / "run")["lost_ranks"] == [2]
    check_ledger(tmp_path / "run", 8)


def test_whoever_dies_is_started_again_and_the_server_goes_back_to_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = train(
        folder, "--algorithm", "syncps", "--local", "3", "--override", "training.epochs=20", "--respawn",
        "--override", "checkpoint.steps=20",
    )  # fmt: skip
    wait_for(lambda: len(rows(folder)) > 20)
    process_of(folder, 1).kill()
    wait_for(lambda: len(rows(folder)) > 60)
    process_of(folder, 0).kill()
    finish(run)
    kept = summary(folder)
    assert (kept["lost_ranks"], kept["restarts"]) == ([], 1)
    check_ledger(folder, 20)
    steps = [row["step"] for row in rows(folder)]
    assert steps == list(range(len(steps)))  # rows that belonged to lost weights are gone with them


def test_a_server_without_a_checkpoint_of_its_own_goes_back_to_the_one_that_it_was_given(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--algorithm", "syncps", "--local", "2"]
    finish(train(first, *options, "--max-steps", "30"))
    longer = ["--max-steps", "230", "--override", "training.batch_size=256"]
    run = train(second, *options, *longer, "--resume", str(first), "--respawn")
    wait_for(lambda: len(rows(second)) > 5)
    process_of(second, 0).kill()
    finish(run)
    assert [row["step"] for row in rows(second)] == [*range(30, 230)]
    assert summary(second)["restarts"] >= 1


@contextlib.contextmanager
def suspended_worker(folder: Path, epochs: int) -> Iterator[psutil.Process]:
    """A run of edp with two workers, of which the first is suspended; whatever happens, it goes on at last."""
    run = train(
        folder, "--algorithm", "edp", "--local", "3", "--override", f"training.epochs={epochs}",
        "--override", "cluster.patience=1.5",
    )  # fmt: skip
    wait_for(lambda: len(rows(folder)) > 20)
    worker = process_of(folder, 1)
    worker.suspend()
    try:
        yield worker
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()
    finish(run)


def has_ended(folder: Path) -> bool:
    """Whether the last update is made."""
    return "val/loss" in rows(folder)[-1]


def test_a_suspended_worker_is_taken_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = folder / "logs" / "rank0.log"
    with suspended_worker(folder, 80) as worker:
        wait_for(lambda: "worker rank1 is lost" in log.read_text())
        worker.resume()
        wait_for(lambda: log.read_text().count("worker joined rank=1") == 2)
    assert summary(folder)["joined_ranks"] == [1]
    check_ledger(folder, 80)


def test_a_suspended_worker_that_wakes_after_the_end_hears_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with suspended_worker(folder, 40):
        wait_for(lambda: has_ended(folder), 30)
    assert (summary(folder)["lost_ranks"], summary(folder)["joined_ranks"]) == ([], [1])
    check_ledger(folder, 40)


def test_a_worker_that_dies_after_the_end_is_no_failure(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with suspended_worker(folder, 40) as worker:
        wait_for(lambda: has_ended(folder), 30)
        wait_for(lambda: not psutil.pid_exists(pid_of(folder, 2)), 30)
        worker.kill()
    assert summary(folder)["lost_ranks"] == [1]


def test_a_run_without_staleness_that_was_stopped_in_a_step_replays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--algorithm", "edp", "--local", "3", "--override", "cluster.staleness_bound=0"]
    arguments += ["--override", "training.batch_size=400", "--override", "model.hidden=1024", "--max-steps", "80"]
    for _ in range(5):  # once in a while it is stopped between two steps
        resume = ["--resume", "latest"] if folder.exists() else []
        known = len(rows(folder))
        run = train(folder, *arguments, *resume)
        wait_for(lambda known=known: len(rows(folder)) > known + 4)
        run.send_signal(signal.SIGINT)
        finish(run, 130)
        if '"gathered"' in (folder / "applications.jsonl").read_text():
            break
    finish(train(folder, *arguments, "--resume", "latest"))
    assert '"gathered"' in (folder / "applications.jsonl").read_text()
    told = finish(start("train", "--replay", str(folder), "--out", str(tmp_path / "replay")))
    (difference,) = re.findall(r"the weights differ from those of .* by at most (\S+)", told)
    assert float(difference) <= 1e-11


@pytest.mark.parametrize("algorithm", ["syncps", "edp"])
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(algorithm: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["--algorithm", algorithm, "--local", "3", "--override", "training.epochs=12"]
    run = train(folder, *arguments)
    wait_for(lambda: len(rows(folder)) > 10)
    run.send_signal(signal.SIGINT)
    began = time.monotonic()
    finish(run, 130)
    assert time.monotonic() - began < 10
    finish(train(folder, *arguments, "--resume", "latest"))
    check_ledger(folder, 12)


def test_machines_of_a_cluster_file_and_one_that_comes_later(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"host_ip: {{desk: 127.0.0.1, left: 127.0.0.1, right: 127.0.0.1}}\nport: {port}\nserver: desk\n"
        "workers: [left, right]\npatience: 1.0\nseed: 4\n"
    )
    shared = ["--preset", "classicdp_digits", "--cluster", str(cluster), "--algorithm", "edp"]
    shared += ["--override", "training.epochs=120", "--override", "training.eval_steps=null"]
    token = {"SMOLCLUSTER_TOKEN": "a token for this test, 32 characters"}
    nodes = {
        name: start("node", *shared, "--hostname", name, "--out", str(tmp_path / "run"), **token)
        for name in ("left", "desk")
    }
    try:
        wait_for(lambda: len(rows(tmp_path / "run")) > 10)  # it waits six patiences for the other
        nodes["right"] = start("node", *shared, "--hostname", "right", **token)
        told = {name: finish(node) for name, node in nodes.items()}
    finally:
        for node in nodes.values():
            node.kill()
    assert "desk is the server of edp" in told["desk"]
    assert "right (rank 2) has joined: 2 workers" in told["desk"]
    assert "right is a worker of edp, rank 2 of 3" in told["right"]
    kept = summary(tmp_path / "run")
    assert (kept["joined_ranks"], kept["lost_ranks"]) == ([2], [])
    assert len(rows(tmp_path / "run", 1)) > 0
    assert (tmp_path / "run" / "logs" / "rank1.log").stat().st_size > 0
    check_ledger(tmp_path / "run", 120)


@pytest.mark.parametrize("algorithm", ["syncps", "edp"])
def test_a_trace_has_the_server_and_all_workers_on_one_clock(algorithm: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    told = finish(train(folder, "--algorithm", algorithm, "--local", "3", "--max-steps", "12", "--trace"))
    assert f"the trace is {folder / 'trace.json'}" in told
    trace = TraceFile(folder / "trace.json")
    assert set(trace.processes) == {0, 1, 2}
    assert_spans_nest(trace)
    assert_transfers_are_whole_and_in_order(trace)
    assert [event["args"]["step"] for event in trace.spans(0, "compute", "update")] == [*range(12)]
    assert [event["args"]["step"] for event in trace.spans(0, "compute", "optimizer")] == [*range(12)]
    steps = [event for rank in (1, 2) for event in trace.spans(rank, "compute", "step")]
    assert len(steps) >= (24 if algorithm == "syncps" else 12)
    if algorithm == "edp":
        log = [json.loads(line) for line in (folder / "applications.jsonl").read_text().splitlines()]
        pushed = [push for line in log if line["event"] == "update" for push in line["pushes"]]
        assert sum(len(trace.spans(rank, "pushes")) for rank in (1, 2)) >= len(pushed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm", "edp", "--local", "1"], "needs a server and a worker. Give --local 2 or more"),
        (["--algorithm", "syncps", "--local", "3", "--backend", "gloo"], "which backend gloo cannot"),
        (["--replay", "nowhere"], "there is no run folder. Give the folder of a run of edp"),
        (["--replay", "nowhere", "--algorithm", "edp"], "leave out --algorithm edp"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    told = finish(start("train", *COMMON, "--out", str(tmp_path / "run"), *arguments), 2)
    assert message in told
    assert "Traceback" not in told
