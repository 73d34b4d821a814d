"""The pictures of docs/syncps.md and docs/edp.md: what a server and its workers do at a time.

    python docs/figures/servers.py            draws syncps.svg and edp.svg from servers.json
    python docs/figures/servers.py measure    measures servers.json first, with --trace: a minute

The measurement trains a small GPT with a server and three workers on this machine, one run with each algorithm, and
keeps a piece from the middle of the trace.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from drawing import BACKWARD, FORWARD, NETWORK, UPDATE, WAITING, bar, bars_over_time

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MEASURED, IMAGES = HERE / "servers.json", HERE.parent / "images"

ALGORITHMS = ("syncps", "edp")
RANKS = 4
PIECE_S = 0.9
STEPS = {"syncps": 24, "edp": 72}  # edp's are one push each

COLORS = {
    "forward": FORWARD, "backward": BACKWARD, "comm_wait": WAITING, "update": UPDATE, "push": NETWORK,
}  # fmt: skip
NAMES = {
    "forward": "forward", "backward": "backward", "comm_wait": "waiting", "update": "server's update",
    "push": "gradient on its way",
}  # fmt: skip


def measure() -> None:
    """Run both and keep a piece of each trace."""
    pieces = {}
    for algorithm in ALGORITHMS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [
                sys.executable, "-m", "smolcluster", "train", "--algorithm", algorithm, "--preset", "single_gpt",
                "--local", str(RANKS), "--max-steps", str(STEPS[algorithm]), "--trace", "--quiet", "--out", str(out),
            ]  # fmt: skip
            for setting in ("training.batch_size=32", "model.max_seq_len=128", "training.eval_steps=100000"):
                command += ["--override", setting]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
            pieces[algorithm] = _piece(json.loads((out / "trace.json").read_text(encoding="utf-8"))["traceEvents"])
    figures = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "runs": pieces}
    MEASURED.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _piece(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the middle of the run: name, rank, start and end in seconds."""
    spans = []
    for event in events:
        if event["ph"] != "X":
            continue
        name = event["name"].split(" (")[0]
        if event["args"].get("dst") == 0 and event["name"].startswith("send "):
            name = "push"  # a worker's bytes to the server
        if name in COLORS and event["cat"] != "pushes":
            start = event["ts"] / 1e6
            spans.append({"name": name, "rank": event["pid"], "start": start, "end": start + event["dur"] / 1e6})
    updates = sorted(span["start"] for span in spans if span["name"] == "update")
    begin = updates[len(updates) // 2]
    piece = [span for span in spans if span["end"] > begin and span["start"] < begin + PIECE_S]
    for span in piece:
        span["start"] = round(max(0.0, span["start"] - begin), 5)
        span["end"] = round(min(PIECE_S, span["end"] - begin), 5)
    return sorted(piece, key=lambda span: (span["rank"], span["start"]))


def draw(algorithm: str, spans: list[dict[str, Any]]) -> None:
    """A row for each rank, and a thin one below it for its gradients on their way."""
    rows = [(1.5 * rank, f"worker {rank}" if rank else "server") for rank in range(RANKS)]
    legend = {COLORS[name]: text for name, text in NAMES.items()}
    with bars_over_time(IMAGES / f"{algorithm}.svg", rows, legend) as axes:
        for span in spans:
            is_push = span["name"] == "push"
            row, height = 1.5 * span["rank"] + (0.58 if is_push else 0.0), 0.22 if is_push else 0.8
            bar(axes, row, span["start"], span["end"], COLORS[span["name"]], height)
        axes.set_xlim(0, 1000 * PIECE_S)


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    for name, spans in json.loads(MEASURED.read_text(encoding="utf-8"))["runs"].items():
        draw(name, spans)
