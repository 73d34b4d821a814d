"""Whether the router of a mixture of experts keeps their load even, and how many tokens a limit of their room drops.

    python benchmarks/expert_balance.py [--seeds 4]     tiny Shakespeare in $SMOLCLUSTER_DATA, two ranks, minutes

Trains `ep` for 300 steps with the batch of preset ep_moe, 8 samples over both ranks. Notes `moe/expert_load_max`, the
largest load of an expert of any block over the even one, and `moe/dropped_tokens`, those that at least one of their
experts had no room for, of both blocks: with the default model.capacity_factor, without a limit, and with 1.0. To
compare: with weight 0.01 of the load-balancing loss, as in Switch, and without that loss.

Exit code 1: in a run of the first three the median load of the last ten steps is above 2. With other --steps than 300
nothing is saved.
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
MAX_LOAD = 2.0
BALANCED = {
    "default, capacity 1.25": (),
    "unlimited": ("model.capacity_factor=null",),
    "capacity 1.0": ("model.capacity_factor=1.0",),
}
COMPARED = {
    "weight 0.01": ("model.aux_loss_weight=0.01",),
    "without balancing": ("model.capacity_factor=null", "model.aux_loss_weight=0"),
}


def train(seed: int, settings: tuple[str, ...], text: Path, steps: int) -> list[dict[str, Any]]:
    """Rank 0's rows of a run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        overrides = [
            *settings, f"cluster.seed={seed}", "data.dataset=text", f"data.path={text}", "training.eval_steps=null",
        ]  # fmt: skip
        command = [
            sys.executable, "-m", "smolcluster", "train", "--preset", "ep_moe", "--local", "2", "--quiet",
            "--max-steps", str(steps), "--out", str(folder),
        ]  # fmt: skip
        command += [part for value in overrides for part in ("--override", value)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["rank"] == 0 and "train/loss" in row]


def main() -> int:
    """Measure, save, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    text = Path(os.environ["SMOLCLUSTER_DATA"]) / "tinyshakespeare" / "input.txt"
    found: dict[str, Any] = {"steps": arguments.steps}
    uneven: list[str] = []
    for name, settings in (BALANCED | COMPARED).items():
        runs = [train(seed, settings, text, arguments.steps) for seed in seeds]
        last = [statistics.median(row["moe/expert_load_max"] for row in rows[-10:]) for rows in runs]
        found[name] = {
            "load_max_of_last_10_steps": [round(load, 3) for load in last],
            "load_max_every_50_steps": [[round(row["moe/expert_load_max"], 2) for row in rows[::50]] for rows in runs],
            "dropped_tokens_of_all_steps": [round(sum(row["moe/dropped_tokens"] for row in rows)) for rows in runs],
            "last_loss": [round(rows[-1]["train/loss"], 4) for rows in runs],
        }
        print(name, json.dumps(found[name]), flush=True)
        if name in BALANCED and max(last) > MAX_LOAD:
            uneven.append(f"{name}: {max(last):.2f}")
    found["largest_load_of_balanced"] = max(max(found[name]["load_max_of_last_10_steps"]) for name in BALANCED)
    if arguments.steps == STEPS:
        save("expert_balance", found)
    print(f"above {MAX_LOAD}: {', '.join(uneven)}" if uneven else f"no load above {MAX_LOAD}")
    return 1 if uneven else 0


if __name__ == "__main__":
    sys.exit(main())
