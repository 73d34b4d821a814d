"""The demo, with a model that has hardly learned: everything happens, only the text is bad."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import smolcluster

SOURCE = Path(smolcluster.__file__).parent.parent


@pytest.mark.slow
def test_the_demo_trains_over_three_processes_writes_text_and_says_where_everything_is(tmp_path: Path) -> None:
    small = [
        "training.max_steps=6",
        "model.model_dim=32",
        "model.num_layers=1",
        "model.ff_dim=64",
        "model.max_seq_len=64",
    ]
    overrides = [word for value in small for word in ("--override", value)]
    command = [sys.executable, "-c", "from smolcluster.cli import main; main()", "demo", "--tokens", "80", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    demo = subprocess.run(
        command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert demo.returncode == 0, demo.stderr
    assert "3 processes" in demo.stderr
    assert "step 6/6" in demo.stderr
    assert "3 ranks over tcp: 6 steps" in demo.stdout
    assert re.search(r"validation loss \d\.\d{4} nats per byte", demo.stdout)
    assert "80 bytes, written by the model after 'The '\nThe " in demo.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"classicdp-gpt-\d{8}-\d{6}", folder.name)
    for name in ("loss.png", "metrics.jsonl", "summary.json", "config.yaml"):
        assert f"{Path('runs') / folder.name / name} " in demo.stdout
        assert (folder / name).stat().st_size > 0
