"""Link metrics against what the kernel counted on the interfaces of a network of our own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from netns import lab
from netns.test_shaped_network import start

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(lab.missing() is not None, reason=lab.missing() or ""),
]

STEPS = 16
INTERVAL = 4


@pytest.fixture
def shaped_network() -> Iterator[lab.Lab]:
    with lab.network(2, rate="200mbit") as hosts:
        yield hosts


def counted(hosts: lab.Lab, host: int) -> tuple[int, int]:
    """(sent, received) bytes of the host's interface."""
    shown = subprocess.run(
        ["ip", "-n", f"{hosts.prefix}{host}", "-s", "-j", "link", "show", "eth0"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    counters = json.loads(shown.stdout)[0]["stats64"]
    return counters["tx"]["bytes"], counters["rx"]["bytes"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_bytes_and_bandwidth_are_what_the_interfaces_counted(shaped_network: lab.Lab, tmp_path: Path) -> None:
    # 0.9 M parameters: 3.6 MB a step each way, so that nearly everything is gradients.
    arguments = [
        "--algorithm", "classicdp", "--override", "data.dataset=digits", "--override", "model.type=simple_nn",
        "--override", "model.input_dim=64", "--override", "model.hidden=12000", "--override", "training.batch_size=4",
        "--override", f"cluster.metrics_log_interval={INTERVAL}", "--override", "cluster.buffer_size={host0: 1}",
        "--max-steps", str(STEPS),
    ]  # fmt: skip
    processes = start(shaped_network, tmp_path, arguments)
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    folder = tmp_path / "run0"
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for rank in range(2):
        # 2 %: headers. The interfaces count one for each of the large packets that the kernel builds.
        ours = summary["sent_bytes"][rank], summary["recv_bytes"][rank]
        assert ours == pytest.approx(counted(shaped_network, rank), rel=0.02)
        mine = [row for row in rows if row["rank"] == rank]
        check_columns(mine, f"link/host{1 - rank}/")
    (granted,) = {row["link/host1/buffer_bytes"] for row in rows if "link/host1/buffer_bytes" in row}
    assert granted <= 1 << 20  # an old kernel's limit is lower
    assert f"lane=bulk:world asked={1 << 20} sent={granted} " in (folder / "logs" / "rank0.log").read_text()


def check_columns(rows: list[dict[str, Any]], link: str) -> None:
    """The columns stand in due rows only, and bandwidth is what the bytes of all rows say."""
    due = [row for row in rows if f"{link}bandwidth_bytes_per_s" in row]
    assert [row["step"] for row in due] == list(range(0, STEPS, INTERVAL))
    assert all(any(key.startswith(link) for key in row) == (row in due) for row in rows)
    moved = 0.0
    for before, row in pairwise(due):
        moved += row[f"{link}bandwidth_bytes_per_s"] * (row["time"] - before["time"])
        assert 0 < row[f"{link}rtt_ms"] < 60  # the queue of the shaped link holds up to 50 ms
        assert row[f"{link}queued_bytes"] >= 0
    between = [row for row in rows if due[0]["step"] < row["step"] <= due[-1]["step"]]
    assert moved == pytest.approx(sum(row["link/sent_bytes"] + row["link/recv_bytes"] for row in between), rel=0.01)
