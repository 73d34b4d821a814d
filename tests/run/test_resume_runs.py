"""Real runs that are killed and go on, through the command line. Few: each rank imports torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from smolcluster import cli

SOURCE = str(Path(__file__).parent.parent.parent / "src")
pytestmark = pytest.mark.slow
# Long enough that the kill, which comes with the first checkpoint, finds it in the middle: some 2 s.
STEPS = 1500
COMMON = [
    *("--preset", "classicdp_digits", "--max-steps", str(STEPS), "--override", "training.epochs=null"),
    *("--override", "training.precision=fp64", "--override", "training.eval_steps=null"),
    *("--override", "cluster.staleness_bound=1", "--override", "checkpoint.steps=40"),
]


def start(*arguments: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", "from smolcluster.cli import main; main()", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "PYTHONPATH": SOURCE},
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out + err


def losses(folder: Path, rank: int = 0) -> list[float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row["rank"] == rank]
    assert [row["step"] for row in mine] == list(range(mine[-1]["step"] + 1)), "each step once, in order"
    return [row["train/loss"] for row in mine]


@pytest.mark.timeout(240)
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_run_that_is_killed_goes_on_with_fewer_ranks_as_if_nothing_had_happened(tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    victim = start(*COMMON, "--local", "3", "--override", "training.batch_size=16", "--out", str(cut))
    deadline = time.monotonic() + 60
    while not (cut / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline
        assert victim.poll() is None, victim.communicate()[1]
        time.sleep(0.005)  # a poll of the file system; nothing tells of a new file on all platforms
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=30)
    before = json.loads((cut / "checkpoints" / (cut / "checkpoints" / "latest").read_text().strip() / "index.json")
                        .read_text())["step"]  # fmt: skip
    assert 0 < before < STEPS
    # Neither preset nor overrides: a run that goes on keeps its settings.
    said = finish(start("--resume", "latest", "--local", "2", "--out", str(cut)))
    assert f"step_{before:08d} ({before} steps)" in said
    assert "training.batch_size 16 is ignored: the run's global batch of 48 samples is kept" in said
    finish(start(*COMMON, "--algorithm", "single", "--override", "training.batch_size=48", "--out", str(whole)))
    # float64, sums in another order: the bound is the issue's
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-9, rel=0)
    summary, reference = (json.loads((folder / "summary.json").read_text()) for folder in (cut, whole))
    assert (summary["steps"], summary["samples"]) == (reference["steps"], reference["samples"])
    assert sum(summary["rank_samples"]) == summary["samples"]
    assert (summary["world_size"], summary["restarts"]) == (2, 1)
    assert summary["val_accuracy"] == pytest.approx(reference["val_accuracy"], abs=0.003)  # one of 360 images
    assert (cut / "loss.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume", "latest", "--out", "nothing"], "nothing has no checkpoints"),
        (["--resume", "latest"], "no run under runs"),
        (["--resume", "nowhere"], "--resume nowhere: there is no such folder"),
    ],
)
def test_a_checkpoint_that_is_not_there_exits_2_with_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli._run(["train", *arguments], "smolcluster") == 2  # not `main`, which ends the process
    err = capfd.readouterr().err
    assert says in err
    assert len(err.splitlines()) == 1
