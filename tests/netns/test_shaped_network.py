"""Runs over a network of our own: a shaped link, and a link that is cut."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from netns import lab
from smolcluster.transport.security import new_token

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(lab.missing() is not None, reason=lab.missing() or ""),
]

TOPOLOGY = """
num_workers: {n}
seed: 1
allToAllTopology:
  workers:
    regular:
"""


def cluster_file(folder: Path, hosts: lab.Lab) -> Path:
    lines = [TOPOLOGY.format(n=hosts.hosts)]
    for rank in range(hosts.hosts):
        lines.append(
            f"      - {{hostname: host{rank}, rank: {rank}, port: {7000 + rank}, ip: {hosts.address(rank)}}}\n"
        )
    path = folder / "cluster.yaml"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def start(hosts: lab.Lab, folder: Path, arguments: list[str]) -> list[Popen[str]]:
    """One `smolcluster node` on every host, rank 0 last: any order of start will do."""
    token = {"SMOLCLUSTER_TOKEN": new_token().hex(), "OMP_NUM_THREADS": "1"}
    base = [sys.executable, "-m", "smolcluster", "node", "--cluster", str(cluster_file(folder, hosts)), "--quiet"]
    processes = {}
    for rank in reversed(range(hosts.hosts)):
        command = [*base, "--hostname", f"host{rank}", "--out", str(folder / f"run{rank}"), *arguments]
        processes[rank] = hosts.popen(rank, command, token)
    return [processes[rank] for rank in range(hosts.hosts)]


@pytest.fixture
def fast_network() -> Iterator[lab.Lab]:
    with lab.network(3) as hosts:
        yield hosts


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_most_of_the_all_reduce_lies_under_the_same_steps_backward_at_100_mbit(tmp_path: Path) -> None:
    # 1.1 M parameters: 4.3 MB a step at world 2 are 0.36 s at 100 Mbit/s.
    arguments = [
        "--algorithm", "classicdp", "--override", "data.dataset=pydoc", "--override", "data.tokenizer=bytes",
        "--override", "model.type=gpt", "--override", "model.model_dim=144", "--override", "model.num_layers=4",
        "--override", "model.num_heads=4", "--override", "model.ff_dim=576", "--override", "model.max_seq_len=128",
        "--override", "model.dropout=0", "--override", "training.eval_steps=1000",
        "--override", "cluster.bucket_bytes=524288", "--max-steps", "14",
    ]  # fmt: skip
    # How long backward takes depends on the machine and on what else it does: the batch is adapted until backward is
    # as long as the all-reduce, within 40 %. Then one attempt must hide 60 %.
    batch, measured = 24, []
    for attempt in range(5):
        batch_size = ["--override", f"training.batch_size={batch}"]
        reduced, backward, hidden = overlap(tmp_path / str(attempt), [*arguments, *batch_size])
        measured.append((batch, reduced, backward, hidden))
        if 0.7 <= backward / reduced <= 1.4 and hidden >= 0.6:
            return
        batch = max(2, min(150, round(batch * reduced / backward)))
    pytest.fail(f"(batch, all-reduce s, backward s, part hidden): {measured}")


def overlap(folder: Path, arguments: list[str]) -> tuple[float, float, float]:
    """Per step: seconds of all-reduce and of backward, and the part of the first under the second; 100 Mbit/s."""
    folder.mkdir()
    with lab.network(2, rate="100mbit") as hosts:
        processes = start(hosts, folder, arguments)
        outputs = [process.communicate(timeout=80)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    rows = [json.loads(line) for line in (folder / "run0" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] >= 3 and "time/all_reduce_s" in row]
    reduced, hidden = (sum(row[f"time/all_reduce{part}_s"] for row in steps) for part in ("", "_hidden"))
    backward = sum(row["time/backward_s"] for row in steps)
    per_step = f"all-reduce {reduced / len(steps):.3f} s, backward {backward / len(steps):.3f} s"
    print(f"{per_step}, hidden {hidden / reduced:.0%}")
    assert reduced > 0.3 * len(steps), "faster than the link can be: the measurement says nothing"
    return reduced / len(steps), backward / len(steps), hidden / reduced


@pytest.mark.timeout(120)
def test_a_cut_link_ends_the_run_within_patience_and_names_the_lost_host(fast_network: lab.Lab, tmp_path: Path) -> None:
    patience = 2.0
    arguments = [
        "--algorithm", "classicdp", "--override", "data.dataset=digits", "--override", "model.type=simple_nn",
        "--override", "model.input_dim=64", "--override", f"cluster.patience={patience}", "--max-steps", "1000000",
    ]  # fmt: skip
    processes = start(fast_network, tmp_path, arguments)
    try:
        metrics = tmp_path / "run0" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size > 1000):  # training has begun
            assert time.monotonic() < deadline, [process.poll() for process in processes]
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        fast_network.cut(2)
        cut = time.monotonic()
        outputs = [process.communicate(timeout=30)[0] for process in processes[:2]]
        assert time.monotonic() - cut < patience + 2.0
        assert [process.returncode for process in processes[:2]] == [3, 3]
        assert all("rank 2 (host2) is lost" in output for output in outputs), outputs
    finally:
        for process in processes:
            process.kill()
            process.communicate()
