"""Memory of streamed data does not grow with the data: benchmarks/results/streaming_memory.json in short."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "streaming_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="peak RSS is exact only where the kernel tells it by process")
@pytest.mark.parametrize("kind", ["jsonl", "one-row-group"])
def test_the_peak_grows_by_at_most_a_twentieth_as_the_data_grows_fourfold(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra data")
    spec = importlib.util.spec_from_file_location("streaming_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    peaks = []
    for megabytes in (4, 16):
        path = tmp_path / "data"
        benchmark.write_data(kind, megabytes * 10**6, path)
        command = [sys.executable, str(SCRIPT), "--measure", kind, str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
        peaks.append(json.loads(printed)["peak_rss_bytes"])
    assert peaks[1] <= 1.05 * peaks[0], peaks
