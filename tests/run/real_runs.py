"""Real runs through the command line, and a rank of theirs that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

SOURCE = str(Path(__file__).parent.parent.parent / "src")
PATIENCE = 2.0


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Begin `smolcluster train` with these arguments."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", "from smolcluster.cli import main; main()", "train", "--out", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "PYTHONPATH": SOURCE},
    )


def summary_of(folder: Path) -> dict[str, Any]:
    """What summary.json says."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def kill_rank_after_a_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait for the first checkpoint, then end rank 1 of three."""
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)  # a poll of the file system; nothing tells of a new file on all platforms
    ranks = [child for child in psutil.Process(process.pid).children() if "smolcluster.run.rank" in child.cmdline()]
    assert len(ranks) == 3
    ranks[1].send_signal(signal.SIGKILL)
