"""One fault of each kind against real runs: the short form of benchmarks/faults.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
STORM = ROOT / "benchmarks" / "faults.py"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the storm needs Linux (pidfd, /proc)")
@pytest.mark.timeout(150)
def test_whatever_happens_to_a_rank_the_others_end_in_time_and_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    # Moments within the first 3.5 s: starting, connecting, training. Given, so that no run has to be measured.
    out.write_text(json.dumps({"trials": [], "run_s": {"nodes": 3.5, "hosts": 3.5}}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(STORM), "--count", "1", "--first", "3", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = {trial["kind"] for trial in json.loads(out.read_text())["trials"]}
    assert kinds in ({"kill", "stop", "half", "link"}, {"kill", "stop", "half"})  # link only where it may make networks
