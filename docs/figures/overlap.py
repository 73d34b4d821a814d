"""The picture of one training step in docs/classicdp.md.

    python docs/figures/overlap.py            draws overlap.svg from overlap.json
    python docs/figures/overlap.py measure    measures overlap.json first: Linux, root, iproute2, half a minute

The measurement trains a GPT with `ClassicDP` on two hosts (network namespaces) joined by a link of 100 Mbit/s, and
keeps the spans that the communicator's telemetry recorded in one step.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MEASURED, PICTURE = HERE / "overlap.json", HERE.parent / "images" / "overlap.svg"

RATE = "100mbit"
RANKS, STEPS, WARM_UP = 2, 16, 4
BATCH, TIME = 40, 128  # backward then takes about as long as the all-reduce on one core of a server

INK = "#707b89"  # reads on white and on black: the picture has no background of its own
COLORS = {"forward": "#7aa6c2", "backward": "#2f6d9a", "all_reduce": "#e0782f", "comm_wait": "#b9c2cd"}
NAMES = {
    "forward": "forward",
    "backward": "backward",
    "all_reduce": "all-reduce of one bucket",
    "comm_wait": "waiting for the last buckets",
}


def measure() -> None:
    """Run the ranks on hosts of their own and keep one step of both."""
    sys.path.insert(0, str(ROOT / "tests"))
    from netns import lab

    if (reason := lab.missing()) is not None:
        sys.exit(f"error: {reason}")
    token = secrets.token_hex(32)
    with lab.network(RANKS, rate=RATE) as hosts:
        processes = [
            hosts.popen(
                rank,
                [sys.executable, __file__, "rank"],
                {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(RANKS),
                    "MASTER_ADDR": hosts.address(0),
                    "MASTER_PORT": "29500",
                    "SMOLCLUSTER_TOKEN": token,
                    "PYTHONPATH": str(ROOT / "src"),
                },
            )
            for rank in range(RANKS)
        ]
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("\n".join(outputs))
    ranks = [json.loads(output.splitlines()[-1]) for output in outputs]
    step = _typical(ranks)
    spans = [[span for span in rank["spans"] if span["step"] == step] for rank in ranks]
    start = min(span["start"] for rank in spans for span in rank)
    for span in (span for rank in spans for span in rank):
        span["start"], span["end"] = (round(span[key] - start, 5) for key in ("start", "end"))
    figures = {
        "link": RATE,
        "model": f"GPT of {ranks[0]['parameters']} parameters, {BATCH} x {TIME} bytes a rank",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "hidden_of_all_reduce": round(_hidden(ranks), 3),
        "step": step,
        "ranks": spans,
    }
    MEASURED.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _typical(ranks: list[dict[str, Any]]) -> int:
    """The step whose length is the median one."""

    def seconds(step: int) -> float:
        spans = [span for rank in ranks for span in rank["spans"] if span["step"] == step]
        return max(span["end"] for span in spans) - min(span["start"] for span in spans)

    steps = sorted(range(WARM_UP, STEPS), key=seconds)
    return steps[len(steps) // 2]


def _hidden(ranks: list[dict[str, Any]]) -> float:
    """Part of the all-reduce time that lies under the same step's backward; median over ranks and steps."""
    return statistics.median(share for rank in ranks for share in rank["hidden"][WARM_UP:])


def run_rank() -> None:
    """Train, and print this rank's spans as JSON; started by `measure`."""
    import torch

    import smolcluster as smol
    from smolcluster.models.gpt import GPT, GPTConfig
    from smolcluster.telemetry import overlap_s

    comm = smol.connect()
    model = GPT(GPTConfig(256, 144, 4, 4, 576, 0.0, TIME), seed=1)
    strategy = smol.ClassicDP(model, smol.optimizer_factory("adamw", 1e-3), comm, bucket_bytes=512 * 1024)
    generator = torch.Generator().manual_seed(comm.rank)
    kept, hidden = [], []
    for _ in range(STEPS):
        tokens = torch.randint(256, (BATCH, TIME + 1), generator=generator)
        strategy.train_step([smol.Batch(tokens[:, :-1], tokens[:, 1:], planned_count=RANKS * BATCH * TIME)])
        spans = comm.telemetry.drain()
        kept += [{"name": s.name, "start": s.start, "end": s.end, "step": s.step} for s in spans]
        reduced, under = overlap_s(
            [span for span in spans if span.name == "all_reduce"], [span for span in spans if span.name == "backward"]
        )
        hidden.append(under / reduced)
    strategy.finish()
    comm.close()
    parameters = sum(param.numel() for param in model.parameters())
    sys.stdout.write(json.dumps({"spans": kept, "hidden": hidden, "parameters": parameters}) + "\n")


def draw() -> None:
    """One row for the processor and one for the network of each rank."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figures = json.loads(MEASURED.read_text(encoding="utf-8"))
    style = {"svg.fonttype": "none", "svg.hashsalt": "overlap", "font.family": "sans-serif", "font.size": 10.5}
    with plt.rc_context({**style, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure, axes = plt.subplots(figsize=(8.6, 3.3))
        labels = []
        for rank, spans in enumerate(figures["ranks"]):
            row = 2.6 * rank
            labels += [(row, f"rank {rank}  processor"), (row + 1, "network")]
            for span in spans:
                height, place = (0.8, row + 1) if span["name"] == "all_reduce" else (0.8, row)
                bar = (1000 * span["start"], 1000 * (span["end"] - span["start"]))
                axes.broken_barh([bar], (place - height / 2, height), color=COLORS[span["name"]], linewidth=0)
                axes.vlines(sum(bar), place - height / 2, place + height / 2, color="#ffffff", linewidth=0.7)
        axes.set_yticks([place for place, _ in labels], [label for _, label in labels])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds since the step began")
        axes.tick_params(length=0)
        axes.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        handles = [Patch(color=color, label=NAMES[name]) for name, color in COLORS.items()]
        axes.legend(handles=handles, ncols=4, loc="lower center", bbox_to_anchor=(0.44, 1.0), frameon=False)
        figure.tight_layout()
        figure.savefig(PICTURE, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1:] == ["rank"]:
        run_rank()
    else:
        if sys.argv[1:] == ["measure"]:
            measure()
        draw()
