"""Whether the router of a mixture of experts keeps their load even, and how many tokens a capacity of 1.0 drops.

    python benchmarks/expert_balance.py [--seeds 3]     tiny Shakespeare in $SMOLCLUSTER_DATA, two ranks, a few minutes

Trains `ep` for 300 steps, 8 samples a rank, and notes `moe/expert_load_max`, the largest load of an expert of any block
over the even one, and `moe/dropped_tokens`, those that at least one of their experts had no room for, of both blocks:
once without a limit, once with model.capacity_factor 1.0, once without the load-balancing loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import save

ROOT = Path(__file__).parent.parent
STEPS = 300
SETTINGS = {
    "unlimited": ("model.capacity_factor=null",),
    "capacity 1.0": ("model.capacity_factor=1.0",),
    "without balancing": ("model.capacity_factor=null", "model.aux_loss_weight=0"),
}


def train(seed: int, settings: tuple[str, ...], text: Path) -> list[dict[str, Any]]:
    """Rank 0's rows of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        overrides = [
            *settings, f"cluster.seed={seed}", "data.dataset=text", f"data.path={text}", "training.batch_size=8",
            "training.eval_steps=null",
        ]  # fmt: skip
        command = [
            sys.executable, "-m", "smolcluster", "train", "--preset", "ep_moe", "--local", "2", "--quiet",
            "--max-steps", str(STEPS), "--out", str(folder),
        ]  # fmt: skip
        command += [part for value in overrides for part in ("--override", value)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["rank"] == 0 and "train/loss" in row]


def main() -> None:
    """Measure, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    text = Path(os.environ["SMOLCLUSTER_DATA"]) / "tinyshakespeare" / "input.txt"
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        runs = [train(seed, settings, text) for seed in seeds]
        last = [statistics.median(row["moe/expert_load_max"] for row in rows[-10:]) for rows in runs]
        found[name] = {
            "load_max_of_last_10_steps": [round(load, 3) for load in last],
            "load_max_every_50_steps": [[round(row["moe/expert_load_max"], 2) for row in rows[::50]] for rows in runs],
            "dropped_tokens_of_all_steps": [round(sum(row["moe/dropped_tokens"] for row in rows)) for rows in runs],
            "last_loss": [round(rows[-1]["train/loss"], 4) for rows in runs],
        }
        print(name, json.dumps(found[name]), flush=True)
    save("expert_balance", found)


if __name__ == "__main__":
    main()
