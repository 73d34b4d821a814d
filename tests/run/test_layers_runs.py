"""Real runs of mp, mp_pipeline and ep through the command line: what they say, a rank that dies, another split."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from run.real_runs import PATIENCE, kill_rank_after_a_checkpoint, start, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="SIGKILL")]
LENGTH = 80
RUN = [
    *("--max-steps", str(LENGTH), "--override", "model.num_layers=4", "--override", "training.eval_steps=null"),
    *("--override", "checkpoint.steps=20", "--override", f"cluster.patience={PATIENCE:g}"),
    *("--override", "cluster.staleness_bound=1", "--override", "training.learning_rate=1e-3"),
]  # fmt: skip


def finish(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    process = start(folder, *arguments)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return summary_of(folder), err


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if row["rank"] == 0 and "train/loss" in row}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("preset", ["mp_gpt", "pipeline_gpt", "ep_moe"])
def test_a_killed_rank_ends_the_run_in_time_and_it_goes_on_from_its_checkpoint(preset: str, tmp_path: Path) -> None:
    run = ("--preset", preset, "--local", "3", *RUN)
    whole, _ = finish(tmp_path / "whole", *run)
    folder = tmp_path / "run"
    process = start(folder, *run)
    kill_rank_after_a_checkpoint(process, folder)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < PATIENCE + 2
    assert process.returncode == 3
    assert "rank 1 died (signal 9)" in err
    assert "the newest checkpoint is" in err
    assert summary_of(folder)["lost_ranks"] == [1]
    resumed, _ = finish(folder, "--resume", "latest", "--local", "3")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["rank_weights_sha256"] == [None, None, None], "no rank has the whole model"


@pytest.mark.timeout(300)
def test_respawn_goes_on_by_itself(tmp_path: Path) -> None:
    run = ("--preset", "pipeline_gpt", "--local", "3", *RUN, "--override", "training.schedule=gpipe")
    whole, _ = finish(tmp_path / "whole", *run)
    process = start(tmp_path / "run", *run, "--respawn")
    kill_rank_after_a_checkpoint(process, tmp_path / "run")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "starting all ranks again from" in err
    summary = summary_of(tmp_path / "run")
    assert (summary["restarts"], summary["steps"]) == (1, LENGTH)
    assert summary["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.timeout(300)
def test_layers_go_where_they_are_told_and_single_has_the_same_losses(tmp_path: Path) -> None:
    double = ("--max-steps", "8", "--override", "training.precision=fp64", "--override", "cluster.staleness_bound=0")
    _, err = finish(
        tmp_path / "mp",
        "--preset",
        "mp_gpt",
        "--local",
        "3",
        *double,
        "--override",
        "cluster.layer_distribution=[1, 1, 4]",
    )
    assert "rank 0 entry, block 0 (" in err
    assert "rank 2 blocks 2 to 5, exit (" in err
    finish(tmp_path / "pipeline", "--preset", "pipeline_gpt", "--local", "2", *double,
           "--override", "training.schedule=interleaved", "--override", "cluster.shares=auto")  # fmt: skip
    finish(tmp_path / "single", "--preset", "mp_gpt", "--algorithm", "single", *double)
    reference = losses(tmp_path / "single")
    for name in ("mp", "pipeline"):
        found = losses(tmp_path / name)
        assert found.keys() == reference.keys()
        assert max(abs(found[step] - loss) for step, loss in reference.items()) < 1e-11


@pytest.mark.timeout(300)
def test_experts_on_any_number_of_ranks_have_the_losses_of_single(tmp_path: Path) -> None:
    """With a capacity that drops tokens, in micro-batches; and another number of ranks goes on from the checkpoint."""
    double = ("--preset", "ep_moe", "--override", "training.precision=fp64", "--override", "model.capacity_factor=1.0")
    parts = ("--override", "training.micro_batches=2", "--override", "checkpoint.steps=8", "--max-steps", "16")
    finish(tmp_path / "single", *double, *parts, "--algorithm", "single", "--override", "training.batch_size=12")
    finish(tmp_path / "ep", *double, *parts, "--local", "3")
    reference, found = losses(tmp_path / "single"), losses(tmp_path / "ep")
    assert max(abs(found[step] - loss) for step, loss in reference.items()) < 1e-11
    rows = [json.loads(line) for line in (tmp_path / "ep" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("moe/dropped_tokens", 0) for row in rows) > 0
    checkpoint = tmp_path / "ep" / "checkpoints" / "step_00000008"
    finish(tmp_path / "resumed", "--resume", str(checkpoint), "--local", "2")
    resumed = losses(tmp_path / "resumed")
    assert set(resumed) >= set(range(8, 16))
    assert max(abs(resumed[step] - reference[step]) for step in range(8, 16)) < 1e-11


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("cluster.layer_distribution=[1, 2]",), "2 numbers for 3 ranks"),
        (("cluster.layer_distribution=[1, 2, 2]",), "but the model has 6. Give numbers that add up to 6"),
        (("model.num_layers=1", "model.type=gpt", "training.schedule=interleaved"), "too few for 6 stages"),
        (("cluster.compression=int8",), "Set it to none"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    options = [part for argument in arguments for part in ("--override", argument)]
    process = start(tmp_path / "run", "--preset", "pipeline_gpt", "--local", "3", "--max-steps", "2", *options)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2, err
    assert says in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
