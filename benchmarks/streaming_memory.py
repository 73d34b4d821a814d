"""Memory of streamed training data: peak RSS of one rank's loader as the data grows fourfold.

    python benchmarks/streaming_memory.py [--small-mb 100] [--runs 3] [--kinds jsonl parquet one-row-group]

A process for each measurement streams a whole epoch (byte tokenizer, windows of 128, a global batch of 64 dealt to 3
ranks, of which it is the first) and reports its peak. `one-row-group` is a parquet file that is a single row group,
which readers by default load whole.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("jsonl", "parquet", "one-row-group")
ROW_CHARS = 2000  # on average
GROWTH = 4


def texts(nbytes: int) -> Iterator[str]:
    """Rows of random words, about so many bytes in all; nothing that a dictionary would shrink."""
    generator = np.random.default_rng(0)
    written = 0
    while written < nbytes:
        letters = generator.choice(
            np.frombuffer(b"abcdefghijklmnop  ", dtype=np.uint8), generator.integers(1, 2 * ROW_CHARS)
        )
        written += len(letters)
        yield letters.tobytes().decode()


def write_data(kind: str, nbytes: int, path: Path) -> None:
    """Write `nbytes` of rows."""
    if kind == "jsonl":
        with path.open("w", encoding="utf-8") as file:
            for text in texts(nbytes):
                file.write(json.dumps({"text": text}) + "\n")
        return
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": list(texts(nbytes))})
    rows = table.num_rows if kind == "one-row-group" else 2000
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def stream_all(kind: str, path: Path) -> dict[str, Any]:
    """Stream an epoch in this process; what it took."""
    import torch

    from smolcluster.data.source import open_data
    from smolcluster.monitoring.resources import peak_rss_bytes

    torch.set_num_threads(1)
    dataset = "jsonl" if kind == "jsonl" else "parquet"
    data = open_data(dataset, path=path, max_seq_len=128, streaming=True)
    started, samples, steps = time.perf_counter(), 0, 0
    with data.loader(0, [1.0] * 3, global_batch=64, seed=0) as loader:
        for micro_batches in loader:
            if loader.position()["epoch"]:
                break
            samples += sum(batch.samples for batch in micro_batches)
            steps += 1
    seconds = time.perf_counter() - started
    return {"peak_rss_bytes": peak_rss_bytes(), "steps": steps, "rank_samples": samples, "seconds": round(seconds, 2)}


def measure(kind: str, path: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--measure", kind, str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures: dict[str, Any] = json.loads(printed)
    return figures


def grow(kind: str, small_bytes: int, runs: int, folder: Path) -> dict[str, Any]:
    """Peaks with little data and with four times as much, in turn."""
    sizes = {"small": small_bytes, "large": GROWTH * small_bytes}
    figures: dict[str, Any] = {}
    paths = {size: folder / f"{kind}-{size}" for size in sizes}
    for size, nbytes in sizes.items():
        write_data(kind, nbytes, paths[size])
    for _ in range(runs):
        for size, path in paths.items():
            figures.setdefault(size, []).append(measure(kind, path))
    peaks = {size: [run["peak_rss_bytes"] for run in figures[size]] for size in sizes}
    mb_per_s = [path.stat().st_size / 1e6 / run["seconds"] for size, path in paths.items() for run in figures[size]]
    for path in paths.values():
        path.unlink()
    return {
        "data_mb": [round(nbytes / 1e6) for nbytes in sizes.values()],
        "peak_rss_mb": {size: [round(peak / 1e6, 1) for peak in peaks[size]] for size in sizes},
        # The worst of the large runs against the best of the small ones.
        "growth_percent": round(100 * (max(peaks["large"]) / min(peaks["small"]) - 1), 2),
        "mb_per_s": [round(min(mb_per_s), 1), round(max(mb_per_s), 1)],
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small-mb", type=float, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "PATH"), help="only stream this file and print")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(stream_all(options.measure[0], Path(options.measure[1]))))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            figures[kind] = grow(kind, int(options.small_mb * 1e6), options.runs, Path(folder))
            print(f"{kind:14s} {json.dumps(figures[kind])}", flush=True)
    if not options.no_save:
        from machine import save

        save("streaming_memory", {"runs": options.runs, "figures": figures})


if __name__ == "__main__":
    main()
