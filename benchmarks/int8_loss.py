"""What int8 gradients cost in loss: a small GPT on Python's documentation, two ranks, five seeds, int8 against fp32.

    python benchmarks/int8_loss.py [--steps 400] [--seeds 5]

The ranks are threads of this process (LocalGroup): codec, error feedback, buckets and algorithm are those of a run over
TCP with the same configuration. Within a rank every encoding is the same; what differs over TCP is only which rank's
sum is encoded in which pieces. Compared are the validation loss at the end and the mean training loss of the last
steps, each as the mean over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from machine import save

from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.kinds import JsonObject
from smolcluster.run.build import assemble, prepare

NAMES = ["rank0", "rank1"]
SETTINGS = (
    "model.type=gpt", "model.model_dim=128", "model.num_layers=4", "model.num_heads=4", "model.ff_dim=512",
    "model.dropout=0", "model.max_seq_len=64", "data.dataset=pydoc", "data.tokenizer=bytes", "training.batch_size=8",
    "training.learning_rate=1e-3", "training.device=cpu", "lr_schedule.kind=cosine", "lr_schedule.warmup_iters=20",
)  # fmt: skip
LAST_STEPS = 50


class LossKeeper:
    """A metrics sink that keeps the training losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def write(self, row: JsonObject) -> None:
        """See MetricsSink."""
        loss = row.get("train/loss")
        if isinstance(loss, float):
            self.losses.append(loss)

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """See MetricsSink."""


def run(compression: str, seed: int, steps: int) -> tuple[float, float]:
    """(validation loss at the end, mean training loss of the last steps) of one run."""
    overrides = [*SETTINGS, f"cluster.compression={compression}", f"cluster.seed={seed}"]
    overrides += [f"training.max_steps={steps}", f"training.eval_steps={steps}"]
    config = load_config(overrides=overrides, flags={"algorithm": "classicdp"}).config
    return LocalGroup(len(NAMES)).run(lambda comm: train(config, comm))[0]


def train(config: Config, comm: LocalCommunicator) -> tuple[float, float]:
    """One rank's run."""
    assembly = assemble(prepare(config, comm.rank, NAMES), comm)
    keeper = LossKeeper()
    with assembly.loader:
        result = assembly.trainer.run(keeper, comm)
    assert result.val_loss is not None
    return result.val_loss, statistics.fmean(keeper.losses[-LAST_STEPS:])


def main() -> None:
    """Train, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        row: dict[str, Any] = {"seed": seed}
        for compression in ("none", "int8"):
            row[f"{compression}_val"], row[f"{compression}_train"] = run(compression, seed, arguments.steps)
        runs.append(row)
        print({key: round(value, 4) for key, value in row.items()}, flush=True)
    figures = {}
    for kind in ("val", "train"):
        exact, lossy = (statistics.fmean(row[f"{name}_{kind}"] for row in runs) for name in ("none", "int8"))
        figures[f"{kind}_loss"] = {"fp32": exact, "int8": lossy, "difference_percent": 100 * (lossy / exact - 1)}
        figures[f"{kind}_loss"]["worst_seed_percent"] = max(
            100 * abs(row[f"int8_{kind}"] / row[f"none_{kind}"] - 1) for row in runs
        )
    print(figures)
    save("int8_loss", {"steps": arguments.steps, "world": len(NAMES), "figures": figures, "runs": runs})


if __name__ == "__main__":
    main()
