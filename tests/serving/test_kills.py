"""A few deaths of each kind: the short form of benchmarks/serving_kills.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from netns import lab

ROOT = Path(__file__).parent.parent.parent
STORM = ROOT / "benchmarks" / "serving_kills.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the storm needs Linux (pidfd, /proc)"),
]


def storm(out: Path, *arguments: str) -> list[str]:
    """Run it; the kinds of fault that there were."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    done = subprocess.run(
        [sys.executable, str(STORM), "--out", str(out), "--model", "llama", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads(out.read_text())["trials"]
    assert all(trial["is_identical"] and trial["chains"] for trial in trials)
    return [trial["variant"] or trial["kind"] for trial in trials]


@pytest.mark.timeout(150)
def test_every_answer_goes_on_when_stages_die_freeze_or_fall_silent(tmp_path: Path) -> None:
    # Of each kind one comes back, and one is followed by another loss.
    found = storm(tmp_path / "kills.json", "--kind", "kill", "--kind", "stop", "--first", "1", "--count", "2")
    assert found == ["kill", "kill", "stop", "stop"]
    assert storm(tmp_path / "half.json", "--kind", "half", "--first", "7", "--count", "1") == ["silent"]


@pytest.mark.netns
@pytest.mark.skipif(lab.missing() is not None, reason=lab.missing() or "")
@pytest.mark.timeout(150)
def test_every_answer_goes_on_when_a_machine_is_cut_off_and_comes_back(tmp_path: Path) -> None:
    assert storm(tmp_path / "link.json", "--kind", "link", "--first", "1", "--count", "1") == ["link"]
