"""How well does edp train? Real runs against `single` with as many samples, and the rule without 1/(1 + tau).

    python benchmarks/edp_rule.py --workload mnist --seeds 5
    python benchmarks/edp_rule.py --workload gpt --seeds 3 [--interval 6] [--int8]

A run is `smolcluster train --algorithm edp --local 4`: three workers and a server over TCP, as fast as this machine
lets them. So their staleness is what it is. Where four processes share two cores an answer waits for a core; with
`--quota` there is always one for it, as where every worker has a machine of its own. `--interval` makes it larger: a
worker asks for weights only after so many leases. For the rule without 1/(1 + tau) the log of that run is repeated in
one process: the same gradients are computed on weights of the same versions and applied in the same order, with a
learning rate that knows no staleness. `--int8` repeats it with the rule as it is, and pushes and weights through the
codec: two runs with and without would differ by their staleness too. What may be by chance is shown by a third
repetition, from weights changed in the seventh digit.

Printed and saved, for each seed: validation loss and accuracy of the three, mean staleness, the largest share of its
time that a worker waited, and whether there were as many updates as pushes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import save
from unequal import confine, quotas, started

from smolcluster.config.load import load_config
from smolcluster.config.schema import resolved_batch_size
from smolcluster.data.loader import eval_batches
from smolcluster.data.source import MemoryData
from smolcluster.run.build import prepare
from smolcluster.run.replay import APPLICATIONS, Head, Replay, UpdateLine, schedule_of
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.step import EvalSums, StepResult, evaluate_batch

WORKERS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {
        "batch": 64, "settings": ["training.epochs=20"], "preset": "single_mnist", "learning_rate": 2e-3,
    },
    # A lease takes long enough here for an answer to come within a small part of it.
    "gpt": {
        "batch": 32, "settings": [
            "training.max_steps=null", "training.epochs=4", "training.eval_steps=100000", "model.max_seq_len=128",
            "lr_schedule.warmup_iters=20",
        ], "preset": "single_gpt", "learning_rate": 1e-2,
    },
}  # fmt: skip


class Int8(Replay):
    """The same events, through another codec."""

    def follow(self, head: Head) -> None:
        super().follow(head.model_copy(update={"settings": {**head.settings, "cluster": {"compression": "int8"}}}))


class Disturbed(Replay):
    """The same events from weights that differ in the seventh digit: what may be by chance."""

    @torch.no_grad()
    def run(self) -> Iterator[StepResult]:
        for param in self.model.parameters():
            param.mul_(1 + 1e-6 * torch.randn_like(param))
        return super().run()


class Unscaled(Replay):
    """The same events with another rule."""

    def learning_rate(self, update: UpdateLine) -> float:
        return super().learning_rate(update) * (1 + (update.tau or 0))


def train(
    out: Path, preset: str, settings: list[str], *arguments: str, quota: float | None = None
) -> dict[str, Any]:  # fmt: skip
    """One run through the command line, its workers with so many cores each; its summary."""
    command = [sys.executable, "-m", "smolcluster.train", "--preset", preset, "--quiet", "--out", str(out), *arguments]
    for setting in settings:
        command += ["--override", setting]
    process = subprocess.Popen(command)
    with quotas([None, *[quota] * WORKERS]) as groups:
        if quota is not None:
            for rank, pid in started(out, len(groups)).items():
                confine(groups[rank], pid)
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads((out / "summary.json").read_text())


def replayed(run: Path, kind: type[Replay]) -> EvalSums:
    """The run's log once more, with another rule or codec; validation at its end."""
    config = load_config(files=[run / "config.yaml"]).config
    training = config.training
    parts = prepare(config.model_copy(update={"algorithm": "single"}), 0, ["rank0"])
    assert isinstance(parts.data, MemoryData)
    factory = optimizer_factory(training.optimizer, training.learning_rate, training.weight_decay)
    replay = kind(
        run, config, parts.data, parts.model, factory,
        schedule_of,
    )  # fmt: skip
    for _ in replay.run():
        pass
    sums = EvalSums(0.0, 0, 0, 0)
    for batch in eval_batches(parts.data.validation, resolved_batch_size(config)):
        sums = sums + evaluate_batch(replay.model, batch, training.precision)
    return sums


def behaviour(run: Path) -> dict[str, Any]:
    """What the run's files say of staleness, waiting and pushes."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    log = [json.loads(line) for line in (run / APPLICATIONS).read_text().splitlines()]
    pushes = [push for line in log if line["event"] == "update" for push in line["pushes"]]
    waiting = []
    for rank in range(1, WORKERS + 1):
        own = [row for row in rows if row["rank"] == rank and "time/step_s" in row]
        waiting.append(sum(row.get("time/comm_wait_s", 0.0) for row in own) / sum(row["time/step_s"] for row in own))
    return {
        "tau": statistics.mean(row["staleness/mean"] for row in rows if "staleness/mean" in row),
        "waiting": max(waiting),
        "updates": sum(line["event"] == "update" for line in log),
        "pushes": len(pushes),
        "leases": sum(len(push["parts"]) for push in pushes),
    }


def compare(name: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The three, with one seed."""
    workload = SETTINGS[name]
    rate = options.learning_rate or workload["learning_rate"]
    common = [*workload["settings"], f"cluster.seed={seed}", *options.override]
    single_rate = options.single_learning_rate or rate
    batch = options.batch or workload["batch"]
    whole = [*common, f"training.learning_rate={single_rate}", f"training.batch_size={WORKERS * batch}"]
    single = train(folder / f"single{seed}", workload["preset"], whole)
    own = [*common, f"training.learning_rate={rate}", f"training.batch_size={batch}"]
    own.append(f"cluster.worker_update_interval={options.interval}")
    run = folder / f"edp{seed}"
    local = ["--algorithm", "edp", "--local", str(WORKERS + 1)]
    edp = train(run, workload["preset"], own, *local, quota=options.quota)
    assert edp["samples"] == single["samples"]
    sums = None if options.skip_unscaled else replayed(run, Unscaled)
    int8 = replayed(run, Int8) if options.int8 else None
    disturbed = replayed(run, Disturbed) if options.int8 else None
    return {
        "seed": seed, "learning_rate": rate, "single_learning_rate": single_rate, "samples": edp["samples"],
        "single_loss": single["val_loss"], "single_accuracy": single["val_accuracy"],
        "edp_loss": edp["val_loss"], "edp_accuracy": edp["val_accuracy"],
        "unscaled_loss": None if sums is None else sums.loss_sum / sums.count,
        "unscaled_accuracy": None if sums is None else sums.correct / sums.count,
        "int8_loss": None if int8 is None else int8.loss_sum / int8.count,
        "disturbed_loss": None if disturbed is None else disturbed.loss_sum / disturbed.count,
        "int8_accuracy": None if int8 is None else int8.correct / int8.count,
        **behaviour(run),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(SETTINGS), default="mnist")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--interval", type=int, default=1, help="leases after which a worker asks for weights")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--quota", type=float, help="cores of each worker (root): what is left is the server's")
    parser.add_argument("--batch", type=int, help="samples of a lease")
    parser.add_argument("--override", action="append", default=[])
    parser.add_argument("--skip-unscaled", action="store_true")
    parser.add_argument("--name", help="of the results file; default: edp_rule_WORKLOAD_intervalN")
    parser.add_argument("--single-learning-rate", type=float, help="default: that of edp")
    parser.add_argument("--int8", action="store_true", help="repeat the log with int8 both ways too")
    options = parser.parse_args()
    found = []
    for seed in range(1, options.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(options.workload, seed, options, Path(folder)))
        line = found[-1]
        print(
            f"seed {seed}: loss single {line['single_loss']:.4f}, edp {line['edp_loss'] / line['single_loss']:.3f} x, "
            + (f"unscaled {line['unscaled_loss'] / line['single_loss']:.3f} x, " if line["unscaled_loss"] else "")
            + (f"int8 {line['int8_loss'] / line['edp_loss']:.4f} of edp's, " if line["int8_loss"] else "")
            + (f"disturbed {line['disturbed_loss'] / line['edp_loss']:.4f}, " if line["disturbed_loss"] else "")
            + f"accuracy {100 * line['single_accuracy']:.2f} and {100 * line['edp_accuracy']:.2f} %; tau "
            f"{line['tau']:.2f}, waiting {100 * line['waiting']:.1f} %, {line['updates']} updates of {line['pushes']} "
            f"pushes with {line['leases']} leases",
            flush=True,
        )
    ratios = [line["edp_loss"] / line["single_loss"] for line in found]
    points = [100 * (line["edp_accuracy"] - line["single_accuracy"]) for line in found]
    print(f"loss x {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); ", end="")
    print(f"accuracy {statistics.median(points):+.2f} points ({min(points):+.2f} to {max(points):+.2f})")
    name = options.name or f"edp_rule_{options.workload}_interval{options.interval}"
    save(name, {"options": vars(options), "runs": found})


if __name__ == "__main__":
    main()
