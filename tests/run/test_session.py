"""One rank from start to end, in threads of this process: reports, gradient norms, rows of other ranks."""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smolcluster.checkpoint.store import load_weights
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.kinds import JsonObject
from smolcluster.monitoring.reporters import QuietReporter
from smolcluster.run import mail as mail_module
from smolcluster.run.build import prepare
from smolcluster.run.folder import RunFolder
from smolcluster.run.mail import Mail
from smolcluster.run.session import RankResult, held_bytes, run_rank
from smolcluster.training.role import RunContext


class Rows:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: JsonObject) -> None:
        self.rows.append(row)

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        pass


def make_config(*overrides: str, steps: int = 6) -> Config:
    fixed = [f"training.max_steps={steps}", "training.precision=fp64", "training.device=cpu"]
    return load_config("classicdp_digits", overrides=[*fixed, *overrides]).config


def train(
    comm: Communicator,
    config: Config,
    rows: Rows,
    checkpoints: Path | None = None,
    deliver: Callable[[Communicator], None] | None = None,
) -> RankResult:
    names = [f"rank{rank}" for rank in range(comm.world_size)]
    parts = prepare(config, comm.rank, names)
    context = RunContext(rows, comm, threading.Event())
    folder = checkpoints if comm.rank == 0 else None
    return run_rank(parts, comm, context, checkpoints=folder, deliver=deliver)


def test_every_rank_gets_the_same_result_with_a_report_of_each(tmp_path: Path) -> None:
    config = make_config()

    def rank(comm: LocalCommunicator) -> RankResult:
        return train(comm, config, Rows(), tmp_path)

    first, second = LocalGroup(2).run(rank)
    assert first.ranks == second.ranks
    assert first.run["weights_sha256"] == first.ranks[0]["weights_sha256"] == first.ranks[1]["weights_sha256"]
    assert first.run["samples"] == 6 * 32
    assert [report["samples"] for report in first.ranks] == [96, 96]
    assert (first.run["steps"], first.stopped) == (6, False)
    tensors, index = load_weights(tmp_path)
    assert index["step"] == 6
    assert index["meta"]["config"] == config.model_dump(mode="json")
    assert sum(tensor.numel() for tensor in tensors.values()) == first.run["parameters"]


def test_checkpoints_are_written_every_so_many_steps_and_only_the_newest_kept(tmp_path: Path) -> None:
    config = make_config("checkpoint.steps=2", "checkpoint.keep=2", steps=7)
    LocalGroup(1).run(lambda comm: train(comm, config, Rows(), tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000006", "step_00000007"]


def test_a_run_that_ended_with_gradients_under_way_keeps_what_a_longer_one_goes_on_from(tmp_path: Path) -> None:
    config = make_config("cluster.staleness_bound=2", "checkpoint.steps=1", "checkpoint.keep=1", steps=7)
    LocalGroup(1).run(lambda comm: train(comm, config, Rows(), tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000005", "step_00000007"]


def test_rows_are_delivered_before_a_checkpoint_that_is_ahead_of_them(tmp_path: Path) -> None:
    rows = [Rows(), Rows()]
    seen: list[tuple[int, bool]] = []

    def rank(comm: Communicator) -> None:
        def deliver(comm: Communicator) -> None:
            written = len(rows[comm.rank].rows)
            seen.append((written, (tmp_path / f"step_{written:08d}").exists()))
            comm.barrier()

        train(comm, make_config("checkpoint.steps=2", "checkpoint.keep=null"), rows[comm.rank], tmp_path, deliver)

    LocalGroup(2).run(rank)
    assert sorted(seen) == [(2, False)] * 2 + [(4, False)] * 2 + [(6, False)] * 2 + [(6, True)] * 2  # and at the end


def test_track_gradients_gives_each_parameters_share_of_the_norm_before_clipping() -> None:
    rows = Rows()
    config = make_config("training.track_gradients=true", "training.grad_clip_norm=0.01")
    LocalGroup(1).run(lambda comm: train(comm, config, rows))
    norms = [value for key, value in rows.rows[2].items() if key.startswith("grad_norm/")]
    assert len(norms) == 4  # two layers, each with weight and bias
    assert rows.rows[2]["train/grad_norm"] > 0.01
    assert math.hypot(*norms) == pytest.approx(rows.rows[2]["train/grad_norm"], rel=1e-12)
    assert not any(key.startswith("grad_norm/") for key in untracked_row())


def untracked_row() -> dict[str, Any]:
    rows = Rows()
    LocalGroup(1).run(lambda comm: train(comm, make_config(steps=1), rows))
    return rows.rows[0]


def test_system_metrics_come_every_metrics_log_interval_steps() -> None:
    rows = Rows()
    LocalGroup(1).run(lambda comm: train(comm, make_config("cluster.metrics_log_interval=3"), rows))
    assert [row["step"] for row in rows.rows if "sys/cpu_percent" in row] == [0, 3]


def test_memory_that_tensors_share_counts_once() -> None:
    flat = torch.zeros(100, dtype=torch.float64)
    assert held_bytes([flat[:10], flat[10:], torch.zeros(3)]) == 812


def test_without_control_links_the_rows_of_all_ranks_reach_the_folder_when_they_are_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail_module, "_ROWS_MESSAGE_BYTES", 100)  # several messages per rank, unequally many

    def rank(comm: LocalCommunicator) -> None:
        folder = RunFolder(tmp_path, make_config(), 3, QuietReporter()) if comm.rank == 0 else None
        with Mail(None, folder, QuietReporter(), 5.0) as mail:
            for step in range(comm.rank * 7):
                mail.write({"rank": comm.rank, "step": step, "text": "x" * 20})
            mail.deliver(comm)
            mail.write({"rank": comm.rank, "step": comm.rank * 7})
            mail.deliver(comm)
        if folder is not None:
            folder.close()

    LocalGroup(3).run(rank)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for sender in (1, 2):
        assert [row["step"] for row in rows if row["rank"] == sender] == list(range(sender * 7 + 1))
