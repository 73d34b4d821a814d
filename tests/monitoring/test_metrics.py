"""Rows on disk, the summary's keys, and what a process says of itself."""

import json
import math
import sys
from pathlib import Path

import pytest

from smolcluster.errors import TrainingStopped
from smolcluster.monitoring.metrics import EverySteps, MetricsFile, read_rows
from smolcluster.monitoring.resources import ProcessUsage, peak_rss_bytes
from smolcluster.monitoring.summary import build_summary, write_summary

# CONTRACT section 2, word for word
SUMMARY_KEYS = """
    algorithm model world_size steps samples tokens wall_s tokens_per_s train_loss val_loss val_accuracy
    val_perplexity parameters weights_sha256 lost_ranks joined_ranks restarts
    rank_samples rank_weights_sha256 parameter_bytes gradient_bytes optimizer_bytes peak_rss_bytes sent_bytes recv_bytes
"""


def test_rows_with_gaps_are_due_when_they_pass_a_multiple() -> None:
    every = EverySteps(4)
    # The 6 comes late, as an evaluation's row does; after it nothing has been passed that was not passed before.
    due = [step for step in (1, 2, 5, 7, 8, 10, 6, 11, 14) if every.is_due(step)]
    assert due == [5, 8, 14]
    assert [step for step in (1, 3, 5) if every.is_due(step)] == [5]  # the run has gone back to a checkpoint


def test_a_row_is_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "run" / "metrics.jsonl") as metrics:
        metrics.write({"step": 0, "train/loss": 0.1 + 0.2})
        assert list(read_rows(tmp_path / "run" / "metrics.jsonl")) == [{"step": 0, "train/loss": 0.1 + 0.2}]


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write({"train/loss": math.nan, "nested": {"list": [math.inf, 1.5]}})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "train/loss": None,
        "nested": {"list": [None, 1.5]},
    }


def test_a_row_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "tr')
    assert list(read_rows(tmp_path / "metrics.jsonl")) == [{"step": 0}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_a_full_disk_stops_training_and_names_the_file() -> None:
    metrics = MetricsFile(Path("/dev/full"))
    with pytest.raises(TrainingStopped, match="/dev/full"):
        metrics.write({"step": 0})
    metrics.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on a file's length")
def test_a_disk_that_fills_up_within_a_row_leaves_whole_rows(tmp_path: Path) -> None:
    import resource
    import signal

    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # the system then takes a part of the row, and refuses the rest
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for step in range(2):  # 45 bytes each
            metrics.write({"step": step, "text": "x" * 20})
        with pytest.raises(TrainingStopped, match=r"metrics\.jsonl"):
            metrics.write({"step": 2, "text": "x" * 20})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]
    metrics.write({"step": 2})  # there is space again
    metrics.close()
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]


def test_a_summary_has_every_key_and_null_for_what_is_unknown(tmp_path: Path) -> None:
    reports = [{"samples": 5, "weights_sha256": "ab", "sent_bytes": 3}, None]
    summary = build_summary({"algorithm": "classicdp", "world_size": 2, "lost_ranks": [1]}, reports)
    write_summary(tmp_path / "summary.json", summary)
    read = json.loads((tmp_path / "summary.json").read_text())
    assert list(read) == SUMMARY_KEYS.split()
    assert read["rank_samples"] == [5, None]
    assert read["rank_weights_sha256"] == ["ab", None]
    assert read["val_loss"] is None
    assert (read["lost_ranks"], read["joined_ranks"], read["restarts"]) == ([1], [], 0)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_process_knows_its_memory_and_its_peak() -> None:
    rss = ProcessUsage().row()["sys/rss_bytes"]
    assert isinstance(rss, int)
    block = bytearray(64 << 20)
    assert peak_rss_bytes() >= rss + (len(block) * 3) // 4  # some of it may reuse memory that was free
