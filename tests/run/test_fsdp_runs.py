"""Real runs of fsdp through the command line: one that loses a rank, one that starts again by itself."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from run.real_runs import PATIENCE, kill_rank_after_a_checkpoint, start, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="SIGKILL")]
RUN = [
    *("--preset", "fsdp_gpt", "--local", "3", "--max-steps", "100", "--override", "model.num_layers=4"),
    *("--override", "training.eval_steps=null", "--override", "checkpoint.steps=20"),
    *("--override", f"cluster.patience={PATIENCE:g}", "--override", "cluster.staleness_bound=1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nothing happens to, in stage 2."""
    folder = tmp_path_factory.mktemp("fsdp") / "whole"
    process = start(folder, *RUN, "--override", "cluster.fsdp_stage=2")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return summary_of(folder)


@pytest.mark.timeout(240)
def test_a_killed_rank_ends_the_run_in_time_and_it_goes_on_from_its_checkpoint(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(folder, *RUN, "--override", "cluster.fsdp_stage=1")
    kill_rank_after_a_checkpoint(process, folder)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < PATIENCE + 2
    assert process.returncode == 3
    assert "rank 1 died (signal 9)" in err
    assert "the newest checkpoint is" in err
    assert summary_of(folder)["lost_ranks"] == [1]
    process = start(folder, "--resume", "latest", "--local", "3")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    # A stage divides memory, and changes no bit of what is computed; neither does an interruption.
    assert summary_of(folder)["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.timeout(240)
def test_respawn_goes_on_by_itself(whole: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, *RUN, "--respawn")
    kill_rank_after_a_checkpoint(process, folder)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "starting all ranks again from" in err
    summary = summary_of(folder)
    assert (summary["restarts"], summary["steps"]) == (1, whole["steps"])
    assert summary["weights_sha256"] == whole["weights_sha256"]
    assert summary["rank_weights_sha256"] == [None, None, None], "in stage 3 no rank has the whole model"
    assert whole["rank_weights_sha256"] == [whole["weights_sha256"]] * 3
    for key in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert all(mine <= theirs for mine, theirs in zip(summary[key], whole[key], strict=True)), key
