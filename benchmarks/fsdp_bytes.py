"""Bytes that a rank sends in a step of fsdp, in each stage: by the formula, by our counter, and on the interface.

    python benchmarks/fsdp_bytes.py --netlab PATH     Linux, root: each rank is a network namespace; see links.py

Two runs of each stage differ in their number of updates. What they sent differs by those updates alone: meeting,
broadcasting the weights and leaving are the same in both. The formula is that of smolcluster.algorithms.fsdp, for
payload: (N-1)/N times the bytes of what is gathered and of what is reduced. It exits 1 if a row is 2 % away from it.

`interface` is tx_bytes of the namespace's only interface, less 66 bytes for each packet that it counts: the headers of
Ethernet, IP and TCP. (A packet there is up to 64 KiB, which a real card would cut into pieces with headers of their
own.) Everything is the mean over the ranks, per step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from links import hosts
from machine import save
from train_against_ddp import GPT

from smolcluster.bench.train import Options, measure_training
from smolcluster.config.load import load_config
from smolcluster.models.build import build_model
from smolcluster.models.partition import split_into_units

WORLD_SIZE = 3
STAGES, MICRO_BATCHES = (0, 1, 2, 3), (1, 2)
SHORT, LONG = 2, 8  # updates that are counted of the two runs
# Slow enough that the plan of the collectives always has rings for what is larger than 64 KiB. On faster links stage 0
# sums the smallest buckets in one round, which takes less time and more bytes: see collectives/plan.py.
RATE = "200mbit"
HEADER_BYTES = 14 + 20 + 32  # Ethernet, IPv4, TCP with time stamps
WITHIN = 0.02


@dataclass(frozen=True)
class Sent:
    """Means over the ranks: what our counter says, and tx_bytes and tx_packets of the interface."""

    counter: float
    interface: float
    packets: float

    def per_step(self, shorter: Sent) -> Sent:
        """Of a step, from the difference to a shorter run."""
        steps = LONG - SHORT
        return Sent(
            (self.counter - shorter.counter) / steps,
            (self.interface - shorter.interface) / steps,
            (self.packets - shorter.packets) / steps,
        )


def payload_bytes(unit_bytes: Sequence[int], stage: int, micro_batches: int) -> float:
    """The formula: what a rank sends in a step. `unit_bytes`: of the rest of the model, and then of each unit."""
    whole, units = sum(unit_bytes), sum(unit_bytes[1:])
    first, last = unit_bytes[1], unit_bytes[-1]
    if stage < 2:
        moved = 2 * whole
    elif stage == 2:
        moved = (micro_batches + 1) * whole
    else:
        # The first unit stays from one micro-batch's backward to the next one's forward.
        gathered = whole - units + micro_batches * (2 * units - last) - (micro_batches - 1) * first
        moved = micro_batches * whole + gathered
    return (WORLD_SIZE - 1) / WORLD_SIZE * moved


def namespace(rank: int) -> str:
    """What `links.hosts` calls the host of a rank."""
    return f"bench{os.getpid()}x{rank + 1}"


def interface_counter(rank: int, name: str) -> int:
    """tx_bytes or tx_packets of a host's interface."""
    path = f"/sys/class/net/eth0/statistics/{name}"
    command = ["ip", "netns", "exec", namespace(rank), "cat", path]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(overrides: Sequence[str], steps: int) -> Sent:
    """Train so many updates and one to warm up, as `smolcluster train` would; what a rank sent meanwhile."""
    config = load_config(overrides=overrides, flags={"algorithm": "fsdp"}).config
    before = [[interface_counter(rank, f"tx_{kind}") for kind in ("bytes", "packets")] for rank in range(WORLD_SIZE)]
    measurement = measure_training(
        config,
        WORLD_SIZE,
        Options(None, pairs=1, steps=steps, warmup_steps=1, congestion="default"),
        hosts=[f"198.18.0.{rank + 1}" for rank in range(WORLD_SIZE)],
        prefix=lambda rank: ["ip", "netns", "exec", namespace(rank)],
    )
    after = [[interface_counter(rank, f"tx_{kind}") for kind in ("bytes", "packets")] for rank in range(WORLD_SIZE)]
    sent, packets = (
        sum(new[which] - old[which] for new, old in zip(after, before, strict=True)) / WORLD_SIZE for which in (0, 1)
    )
    return Sent(sum(measurement.sent_bytes) / WORLD_SIZE, sent, packets)


def measure(overrides: Sequence[str], unit_bytes: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each stage and number of micro-batches."""
    rows: list[dict[str, Any]] = []
    for stage in STAGES:
        for micro_batches in MICRO_BATCHES:
            chosen = [*overrides, f"cluster.fsdp_stage={stage}", f"training.micro_batches={micro_batches}"]
            step = run(chosen, LONG).per_step(run(chosen, SHORT))
            formula = payload_bytes(unit_bytes, stage, micro_batches)
            interface = step.interface - HEADER_BYTES * step.packets
            rows.append({
                "stage": stage, "micro_batches": micro_batches, "formula_bytes": formula,
                "counter_bytes": step.counter, "interface_bytes": interface, "with_headers_bytes": step.interface,
                "counter_ratio": step.counter / formula, "interface_ratio": interface / formula,
                "with_headers_ratio": step.interface / formula,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--netlab", type=Path, required=True)
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="as of smolcluster train")
    arguments = parser.parse_args()
    overrides = [*GPT, "training.batch_size=2", "cluster.shared_memory=off", *arguments.override]
    model_config = load_config(overrides=overrides).config.model
    model = build_model(model_config, seed=0, vocab_size=256)
    params = dict(model.named_parameters())
    unit_bytes = [sum(params[name].nbytes for name in unit.parameters) for unit in split_into_units(model)]
    with hosts(arguments.netlab.resolve(), WORLD_SIZE, RATE):
        rows = measure(overrides, unit_bytes)
    save("fsdp_bytes", {"world": WORLD_SIZE, "unit_bytes": unit_bytes, "rows": rows})
    far = [row for row in rows if max(abs(row[f"{by}_ratio"] - 1) for by in ("counter", "interface")) > WITHIN]
    if far:
        sys.exit(f"{len(far)} of {len(rows)} rows are more than {WITHIN:.0%} from the formula")


if __name__ == "__main__":
    main()
