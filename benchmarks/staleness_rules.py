"""How an update that is tau versions late should be scaled: rules compared in one process, without a network.

    python benchmarks/staleness_rules.py                   # a perceptron on digits, constant learning rate
    python benchmarks/staleness_rules.py --workload gpt    # a small GPT on pydoc, cosine: an hour of one core

edp applies every push with lr * n / global_batch * factor(tau). Here the gradient of a push is computed on the weights
of tau updates ago, kept in a queue, and applied to those of now. tau is the same for all pushes, or follows a pattern:
`4:2:1` is what three workers of these speeds see if the weights take as long as a lease to come. Each push has the
samples of one of three workers. The optimizer is AdamW; gradients are clipped to a norm of 1, as in `smolcluster
train`. `single` is one process with the whole global batch.

Printed and saved: validation accuracy, for the GPT loss, at the end, as the mean over seeds with the lowest and the
highest.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from machine import save
from torch import Tensor, nn

from smolcluster.config.load import load_config
from smolcluster.data.batch import Batch
from smolcluster.data.loader import eval_batches
from smolcluster.data.sampler import Sampler
from smolcluster.data.source import MemoryData
from smolcluster.run.build import prepare
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.schedule import lr_schedule
from smolcluster.training.step import EvalSums, clip_gradients, evaluate_batch, forward_backward

WORKERS = 3
PUSH = 16  # samples
# Of seven pushes in a row four are of the fastest worker, two of the next, one of the slowest.
PATTERNS: dict[str, Sequence[int]] = {
    "0": [0], "2": [2], "5": [5], "10": [10], "4:2:1": [2, 6, 2, 13, 2, 6, 2],
}  # fmt: skip
BOUND = 8
RULES: dict[str, Callable[[int], float]] = {
    "1": lambda tau: 1.0,
    "1/sqrt(1+tau)": lambda tau: (1 + tau) ** -0.5,
    "1/(1+tau)": lambda tau: 1 / (1 + tau),
    f"1 or refused above {BOUND}": lambda tau: float(tau <= BOUND),
}
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Workload:
    """What is trained, and how long.

    Attributes:
        preset: where model and data are from.
        schedule: kind of the learning rate's, and updates of its warm-up.
        epochs: of the runs.
        learning_rates: of `single`'s updates.
        rows: (rule, pattern of tau, samples of an update). The bound makes no difference where tau is always the same.
        percent: accuracy is printed, else the loss.
    """

    preset: str
    schedule: tuple[str, int]
    epochs: Sequence[int]
    learning_rates: Sequence[float]
    rows: Sequence[tuple[str, str, int]]
    percent: bool

    def prepare(self, seed: int) -> tuple[nn.Module, MemoryData]:
        """Model and data."""
        overrides = ["algorithm=single", f"cluster.seed={seed}"]
        parts = prepare(load_config(preset=self.preset, overrides=overrides).config, 0, ["rank0"])
        assert isinstance(parts.data, MemoryData)
        return parts.model, parts.data


def workloads() -> dict[str, Workload]:
    """All there are."""
    first, root, inverse, _bound = RULES
    same = [(rule, tau, PUSH) for tau in ("2", "5", "10") for rule in (first, root, inverse)]
    mixed = [(rule, "4:2:1", PUSH) for rule in RULES]
    single, fresh = ("single", "0", WORKERS * PUSH), (inverse, "0", PUSH)
    return {
        "digits": Workload(
            "classicdp_digits", ("constant", 0), [10], (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
            [single, fresh, *same, *mixed], True,
        ),
        "gpt": Workload(
            "single_gpt", ("cosine", 20), [8, 24], (3e-3, 1e-2),
            [single, *((rule, tau, PUSH) for tau in ("2", "10") for rule in (first, inverse))], False,
        ),
    }  # fmt: skip


def train(
    workload: Workload, seed: int, epochs: int, batch: int, lr: float, taus: Sequence[int],
    factor: Callable[[int], float],
) -> EvalSums:  # fmt: skip
    """Train with gradients that are so many updates old; what the validation split says at the end."""
    model, data = workload.prepare(seed)
    params = list(model.parameters())
    optimizer = optimizer_factory("adamw", lr, WEIGHT_DECAY)(params)
    sampler = Sampler(len(data.train), batch, seed)
    updates = epochs * sampler.steps_per_epoch
    kind, warmup = workload.schedule
    whole = WORKERS * PUSH  # the schedule counts global batches
    schedule = lr_schedule(kind, lr, warmup, 0.0, updates * batch // whole)
    past: deque[list[Tensor]] = deque([copy_of(params)], maxlen=max(taus) + 1)
    for update, wanted in zip(range(updates), itertools.cycle(taus), strict=False):
        tau = min(wanted, len(past) - 1)  # of the first pushes: nothing older is there
        if not factor(tau):
            continue
        indices = sampler.global_indices(update)  # the last of an epoch are fewer
        optimizer.param_groups[0]["lr"] = schedule(update * batch // whole) * len(indices) / whole * factor(tau)
        optimizer.zero_grad()
        samples = Batch(*data.train.batch(indices))
        if tau:
            load(params, past[-1 - tau])
        forward_backward(model, [samples], 1 / samples.targets.numel())
        if tau:
            load(params, past[-1])
        clip_gradients(params, CLIP_NORM)
        optimizer.step()
        past.append(copy_of(params))
    sums = EvalSums(0.0, 0, 0, 0)
    for validation in eval_batches(data.validation, 256):
        sums = sums + evaluate_batch(model, validation)
    return sums


def copy_of(params: list[nn.Parameter]) -> list[Tensor]:
    """The weights of now."""
    return [param.detach().clone() for param in params]


@torch.no_grad()
def load(params: list[nn.Parameter], weights: list[Tensor]) -> None:
    """Set the weights."""
    for param, value in zip(params, weights, strict=True):
        param.copy_(value)


def measure(
    workload: Workload, rule: str, pattern: str, batch: int, lr: float, epochs: int, seeds: int
) -> dict[str, Any]:
    """One cell of the table."""
    factor = RULES.get(rule, RULES["1"])
    found = [
        train(workload, seed, epochs, batch, lr, PATTERNS[pattern], factor) for seed in range(seeds)
    ]  # fmt: skip
    accuracies, losses = [sums.correct / sums.count for sums in found], [sums.loss_sum / sums.count for sums in found]
    return {
        "factor": rule, "tau": pattern, "learning_rate": lr, "epochs": epochs,
        "val_accuracy": statistics.fmean(accuracies), "accuracies": accuracies,
        "val_loss": statistics.fmean(losses), "losses": losses,
    }  # fmt: skip


def shown(row: dict[str, Any], percent: bool) -> str:
    """Mean (lowest to highest)."""
    values = [100 * value for value in row["accuracies"]] if percent else row["losses"]
    digits = 1 if percent else 3
    low, mean, high = (f"{value:.{digits}f}" for value in (min(values), statistics.fmean(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low}-{high})"


def main() -> None:
    """Train all, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(workloads()), default="digits")
    parser.add_argument("--epochs", type=int, action="append", help="default: digits 10; gpt 8 and 24")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    workload = workloads()[arguments.workload]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began = time.process_time()
    rows = []
    print(f"validation {'accuracy in %' if workload.percent else 'loss'}, mean (lowest to highest)")
    for epochs in arguments.epochs or workload.epochs:
        print(f"{epochs} epochs")
        print(f"{'factor':>20} {'tau':>5}", *(f"{lr:>20g}" for lr in workload.learning_rates))
        for rule, pattern, batch in workload.rows:
            line = [
                measure(workload, rule, pattern, batch, lr, epochs, arguments.seeds) for lr in workload.learning_rates
            ]
            print(f"{rule:>20} {pattern:>5}", *(f"{shown(row, workload.percent):>20}" for row in line), flush=True)
            rows += line
    seconds = round(time.process_time() - began, 1)
    print(f"{seconds} s of one core")
    figures = {
        "workload": arguments.workload, "seeds": arguments.seeds, "workers": WORKERS, "samples_of_a_push": PUSH,
        "patterns": PATTERNS, "core_s": seconds,
    }  # fmt: skip
    name = "staleness_rules" if arguments.workload == "digits" else f"staleness_rules_{arguments.workload}"
    save(name, {**figures, "runs": rows})


if __name__ == "__main__":
    main()
