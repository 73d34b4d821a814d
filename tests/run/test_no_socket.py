"""`single` is plain PyTorch in one process: nothing listens, nothing dials."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

def refuse(event, arguments):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.__new__"):
        raise SystemExit(f"single used a socket: {event} {arguments}")

import torch  # what it does while it is imported is not ours
sys.addaudithook(refuse)
from smolcluster.cli import main
main(["train", *sys.argv[1:]])
"""


def test_single_trains_evaluates_and_saves_without_opening_a_socket(tmp_path: Path) -> None:
    settings = ["data.dataset=digits", "model.type=simple_nn", "model.input_dim=64", "cluster.staleness_bound=1"]
    overrides = [word for setting in settings for word in ("--override", setting)]
    command = ["--algorithm", "single", "--max-steps", "3", "--quiet", "--out", str(tmp_path / "run"), *overrides]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
