"""The pictures of docs/mp.md, docs/pipeline.md and docs/ep.md: one step of ranks that hold a model between them.

    python docs/figures/stages.py            draws mp.svg, pipeline.svg and ep.svg from stages.json
    python docs/figures/stages.py measure    measures stages.json first, with --trace: half a minute

The measurement trains a small GPT over two ranks on this machine, with each algorithm, and keeps the step of the trace
that took the median time. Two ranks, so that each has a core of its own on a small machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from drawing import BACKWARD, FORWARD, WAITING, bar, bars_over_time

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MEASURED, IMAGES = HERE / "stages.json", HERE.parent / "images"

RANKS, STEPS, WARM_UP = 2, 30, 8
# Of each run the preset, and what makes passes long enough to be seen.
WIDER = {"model.model_dim": 192, "model.ff_dim": 768, "training.batch_size": 24}
RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "mp": ("mp_gpt", WIDER),
    "pipeline": ("pipeline_gpt", {**WIDER, "training.micro_batches": 6, "training.schedule": "1f1b"}),
    "ep": ("ep_moe", {"model.model_dim": 128, "model.ff_dim": 384, "training.batch_size": 12}),
}
COLORS = {"forward": FORWARD, "backward": BACKWARD, "comm_wait": WAITING}
NAMES = {"forward": "forward", "backward": "backward", "comm_wait": "waiting"}


def measure() -> None:
    """Run both and keep a step of each trace."""
    runs = {}
    for name, (preset, settings) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [
                sys.executable, "-m", "smolcluster", "train", "--preset", preset, "--local", str(RANKS),
                "--max-steps", str(STEPS), "--trace", "--quiet", "--out", str(out),
            ]  # fmt: skip
            for key, value in {"training.eval_steps": 100000, **settings}.items():
                command += ["--override", f"{key}={value}"]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
            runs[name] = _step(json.loads((out / "trace.json").read_text(encoding="utf-8"))["traceEvents"])
    figures = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "runs": runs}
    MEASURED.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _step(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The step of median length: name, rank, micro-batch, start and end in seconds since it began."""
    spans: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        name = event["name"].split(" (")[0]
        if event["ph"] == "X" and name in COLORS and "step" in event["args"]:
            start = event["ts"] / 1e6
            span = {"name": name, "rank": event["pid"], "start": start, "end": start + event["dur"] / 1e6}
            span["micro_batch"] = event["args"].get("micro_batch")
            spans.setdefault(event["args"]["step"], []).append(span)

    def length(step: int) -> float:
        return max(span["end"] for span in spans[step]) - min(span["start"] for span in spans[step])

    steps = sorted((step for step in spans if step >= WARM_UP), key=length)
    step = spans[steps[len(steps) // 2]]
    begin = min(span["start"] for span in step)
    for span in step:
        span["start"], span["end"] = round(span["start"] - begin, 5), round(span["end"] - begin, 5)
    return sorted(step, key=lambda span: (span["rank"], span["start"]))


def draw(name: str, spans: list[dict[str, Any]]) -> None:
    """A row for each rank; passes bear the number of their micro-batch, if there are several."""
    rows = [(float(rank), f"rank {rank}") for rank in range(RANKS)]
    legend = {COLORS[kind]: text for kind, text in NAMES.items()}
    has_several = max(span["micro_batch"] or 0 for span in spans) > 0
    with bars_over_time(
        IMAGES / f"{name}.svg", rows, legend, unit="milliseconds since the step began", size=(8.6, 2.3)
    ) as axes:
        for span in spans:
            bar(axes, span["rank"], span["start"], span["end"], COLORS[span["name"]])
            if span["name"] != "comm_wait":
                axes.vlines(1000 * span["end"], span["rank"] - 0.4, span["rank"] + 0.4, color="#ffffff", linewidth=0.7)
                if has_several:
                    middle = 500 * (span["start"] + span["end"])
                    axes.text(
                        middle,
                        span["rank"],
                        str(span["micro_batch"]),
                        ha="center",
                        va="center",
                        color="#ffffff",
                        size=8,
                    )


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    for run, step in json.loads(MEASURED.read_text(encoding="utf-8"))["runs"].items():
        draw(run, step)
