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

from drawing import BACKWARD, FORWARD, NETWORK, WAITING, bar, bars_over_time

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MEASURED, PICTURE = HERE / "overlap.json", HERE.parent / "images" / "overlap.svg"

RATE = "100mbit"
RANKS, STEPS, WARM_UP = 2, 16, 4
BATCH, TIME = 40, 128  # backward then takes about as long as the all-reduce on one core of a server

COLORS = {"forward": FORWARD, "backward": BACKWARD, "all_reduce": NETWORK, "comm_wait": WAITING}
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
    ranks = json.loads(MEASURED.read_text(encoding="utf-8"))["ranks"]
    rows = []
    for rank in range(len(ranks)):
        rows += [(2.6 * rank, f"rank {rank}  processor"), (2.6 * rank + 1, "network")]
    legend = {COLORS[name]: text for name, text in NAMES.items()}
    with bars_over_time(PICTURE, rows, legend, unit="milliseconds since the step began") as axes:
        for rank, spans in enumerate(ranks):
            for span in spans:
                row = 2.6 * rank + (span["name"] == "all_reduce")
                bar(axes, row, span["start"], span["end"], COLORS[span["name"]])
                axes.vlines(1000 * span["end"], row - 0.4, row + 0.4, color="#ffffff", linewidth=0.7)


if __name__ == "__main__":
    if sys.argv[1:] == ["rank"]:
        run_rank()
    else:
        if sys.argv[1:] == ["measure"]:
            measure()
        draw()
