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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MEASURED, IMAGES = HERE / "servers.json", HERE.parent / "images"

ALGORITHMS = ("syncps", "edp")
RANKS = 4
PIECE_S = 0.9
STEPS = {"syncps": 24, "edp": 72}  # edp's are one push each

INK = "#707b89"  # reads on white and on black: the picture has no background of its own
COLORS = {
    "forward": "#7aa6c2", "backward": "#2f6d9a", "comm_wait": "#b9c2cd", "update": "#8c4f9f", "push": "#e0782f",
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
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    style = {"svg.fonttype": "none", "svg.hashsalt": algorithm, "font.family": "sans-serif", "font.size": 10.5}
    with plt.rc_context({**style, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure, axes = plt.subplots(figsize=(8.6, 3.3))
        for span in spans:
            thin = span["name"] == "push"
            place, height = 1.5 * span["rank"] + (0.58 if thin else 0.0), 0.22 if thin else 0.8
            bar = (1000 * span["start"], 1000 * (span["end"] - span["start"]))
            axes.broken_barh([bar], (place - height / 2, height), color=COLORS[span["name"]], linewidth=0)
        labels = ["server", *(f"worker {rank}" for rank in range(1, RANKS))]
        axes.set_yticks([1.5 * rank for rank in range(RANKS)], labels)
        axes.set_xlim(0, 1000 * PIECE_S)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        axes.tick_params(length=0)
        axes.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        handles = [Patch(color=color, label=NAMES[name]) for name, color in COLORS.items()]
        axes.legend(handles=handles, ncols=5, loc="lower center", bbox_to_anchor=(0.46, 1.0), frameon=False)
        figure.tight_layout()
        figure.savefig(IMAGES / f"{algorithm}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    for name, spans in json.loads(MEASURED.read_text(encoding="utf-8"))["runs"].items():
        draw(name, spans)
