"""MNIST over 3 ranks against one process: five seeds in fp32, one in fp64, where the accuracy is the same number.

    python benchmarks/mnist_accuracy.py            needs SMOLCLUSTER_DATA or a network

784-128-10, AdamW 1e-3 constant, 3 epochs, global batch 129 (3 x 43), inputs normalised.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import save

SETTINGS = {
    "model.type": "simple_nn",
    "data.dataset": "mnist",
    "training.learning_rate": 0.001,
    "lr_schedule.kind": "constant",
    "lr_schedule.warmup_iters": 0,
    "training.epochs": 3,
    "training.eval_steps": 100000,
}


def train(algorithm: str, ranks: int, batch: int, seed: int, precision: str, folder: Path) -> dict[str, Any]:
    """One run through the command line; its summary."""
    settings = {**SETTINGS, "training.batch_size": batch, "cluster.seed": seed, "training.precision": precision}
    overrides = [word for key, value in settings.items() for word in ("--override", f"{key}={value}")]
    out = folder / f"{algorithm}-{seed}-{precision}"
    local = ["--local", str(ranks)] if ranks > 1 else []
    command = [sys.executable, "-m", "smolcluster", "train", "--algorithm", algorithm, *local, "--quiet"]
    subprocess.run([*command, "--out", str(out), *overrides], check=True)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def main() -> None:
    """Run all, print and save."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, precision in [*((seed, "fp32") for seed in range(1, 6)), (1, "fp64")]:
            ours = train("classicdp", 3, 43, seed, precision, folder)
            single = train("single", 1, 129, seed, precision, folder)
            assert len(set(ours["rank_weights_sha256"])) == 1
            row = {
                "seed": seed,
                "precision": precision,
                "classicdp": ours["val_accuracy"],
                "single": single["val_accuracy"],
                "points_apart": round(100 * abs(ours["val_accuracy"] - single["val_accuracy"]), 4),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    mean = statistics.mean(row["classicdp"] for row in rows if row["precision"] == "fp32")
    print(f"mean of 5 seeds over 3 ranks: {mean:.4%}")
    save("mnist_accuracy", {"mean": mean, "runs": rows})


if __name__ == "__main__":
    main()
