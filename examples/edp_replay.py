"""edp over three processes of this machine, and then the same run once more in one process.

    python examples/edp_replay.py

The first command trains with a server and two workers that wait for nobody. Which gradient meets which weights depends
on who is faster, so no two runs are the same. But the run folder has a log of every update, and `--replay` repeats it:
same gradients, same weights, in the same order. In float64 what differs is rounding.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = ("training.precision=fp64", "training.eval_steps=null")


def train(*options: str) -> str:
    """Run `smolcluster train`; what it told on the way."""
    command = [sys.executable, "-m", "smolcluster", "train", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr


def main() -> None:
    """Train, then replay."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "elastic")
        overrides = [word for setting in SETTINGS for word in ("--override", setting)]
        train(
            "--algorithm", "edp", "--preset", "classicdp_digits", "--local", "3", "--max-steps", "60", *overrides,
            "--out", str(run),
        )  # fmt: skip
        lines = (run / "applications.jsonl").read_text(encoding="utf-8").splitlines()
        updates = [event for event in map(json.loads, lines) if event["event"] == "update"]
        workers = {push["rank"] for update in updates for push in update["pushes"]}
        late = max(update["tau"] for update in updates)
        print(f"{len(updates)} updates by {len(workers)} workers, at most {late} versions late")

        told = train("--replay", str(run), "--out", str(Path(folder, "again")))
        difference = next(line.split()[-1] for line in told.splitlines() if line.startswith("the weights differ"))
        print(f"replayed in one process, the weights differ by at most {difference}")


if __name__ == "__main__":
    main()
