"""How an update that is tau versions late should be scaled: rules compared in one process, without a network.

    python benchmarks/staleness_rules.py [--epochs 10] [--seeds 3]

edp applies every push with lr * n / global_batch * factor(tau). Here the gradient of a push is computed on the weights
of tau updates ago, kept in a queue, and applied to those of now. tau is the same for all pushes, or follows a pattern:
`4:2:1` is what three workers of these speeds see if the weights take as long as a lease to come. Each push has the
samples of one of three workers. The perceptron learns the dataset `digits` with AdamW and a constant learning rate;
gradients are clipped to a norm of 1, as in `smolcluster train`. `single` is one process with the whole global batch.

Printed and saved: validation accuracy and loss at the end, as the mean over seeds with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from machine import save
from torch import Tensor, nn

from smolcluster.config.schema import ModelConfig
from smolcluster.data.batch import Batch
from smolcluster.data.sampler import Sampler
from smolcluster.data.source import MemoryData, open_data
from smolcluster.models.build import build_model
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.step import clip_gradients, evaluate_batch, forward_backward

WORKERS = 3
PUSH = 16  # samples
LEARNING_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
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


def train(
    data: MemoryData, seed: int, epochs: int, batch: int, lr: float, taus: Sequence[int], factor: Callable[[int], float]
) -> tuple[float, float]:
    """Train with gradients that are so many updates old; (validation accuracy, validation loss)."""
    model = build_model(ModelConfig(type="simple_nn", input_dim=64), seed=seed)
    params = list(model.parameters())
    optimizer = optimizer_factory("adamw", lr, WEIGHT_DECAY)(params)
    past: deque[list[Tensor]] = deque([copy_of(params)], maxlen=max(taus) + 1)
    for samples, wanted in zip(pushes(data, seed, epochs, batch), itertools.cycle(taus), strict=False):
        tau = min(wanted, len(past) - 1)  # of the first pushes: nothing older is there
        if not factor(tau):
            continue
        optimizer.param_groups[0]["lr"] = lr * len(samples) / (WORKERS * PUSH) * factor(tau)
        optimizer.zero_grad()
        if tau:
            load(params, past[-1 - tau])
        forward_backward(model, [Batch(*data.train.batch(samples))], 1 / len(samples))
        if tau:
            load(params, past[-1])
        clip_gradients(params, CLIP_NORM)
        optimizer.step()
        past.append(copy_of(params))
    sums = evaluate_batch(model, Batch(*data.validation.batch(torch.arange(len(data.validation)))))
    return sums.correct / sums.count, sums.loss_sum / sums.count


def pushes(data: MemoryData, seed: int, epochs: int, batch: int) -> Iterator[Tensor]:
    """The samples of one push after the other."""
    sampler = Sampler(len(data.train), batch, seed)
    for step in range(epochs * sampler.steps_per_epoch):
        yield sampler.global_indices(step)


def copy_of(params: list[nn.Parameter]) -> list[Tensor]:
    """The weights of now."""
    return [param.detach().clone() for param in params]


@torch.no_grad()
def load(params: list[nn.Parameter], weights: list[Tensor]) -> None:
    """Set the weights."""
    for param, value in zip(params, weights, strict=True):
        param.copy_(value)


def cases() -> Iterator[tuple[str, str, int]]:
    """(rule, pattern of tau, samples of an update). The bound makes no difference where tau is always the same."""
    first, root, inverse, bound = RULES
    yield "single", "0", WORKERS * PUSH
    yield inverse, "0", PUSH
    for pattern in ("2", "5", "10"):
        for rule in (first, root, inverse):
            yield rule, pattern, PUSH
    for rule in (first, root, inverse, bound):
        yield rule, "4:2:1", PUSH


def measure(
    data: MemoryData, rule: str, pattern: str, batch: int, lr: float, epochs: int, seeds: int
) -> dict[str, Any]:
    """One cell of the table."""
    factor = RULES.get(rule, RULES["1"])
    results = [train(data, seed, epochs, batch, lr, PATTERNS[pattern], factor) for seed in range(seeds)]
    accuracies, losses = zip(*results, strict=True)
    return {
        "factor": rule, "tau": pattern, "learning_rate": lr,
        "val_accuracy": statistics.fmean(accuracies), "accuracies": accuracies,
        "val_loss": statistics.fmean(losses), "losses": losses,
    }  # fmt: skip


def main() -> None:
    """Train all, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = open_data("digits")
    assert isinstance(data, MemoryData)
    began = time.process_time()
    rows = []
    print("validation accuracy in %, mean (lowest to highest)")
    print(f"{'factor':>20} {'tau':>5}", *(f"{lr:>18g}" for lr in LEARNING_RATES))
    for rule, pattern, batch in cases():
        line = [measure(data, rule, pattern, batch, lr, arguments.epochs, arguments.seeds) for lr in LEARNING_RATES]
        cells = [
            f"{100 * row['val_accuracy']:.1f} ({100 * min(row['accuracies']):.1f}-{100 * max(row['accuracies']):.1f})"
            for row in line
        ]
        print(f"{rule:>20} {pattern:>5}", *(f"{cell:>18}" for cell in cells), flush=True)
        rows += line
    seconds = round(time.process_time() - began, 1)
    print(f"{seconds} s of one core")
    figures = {
        "epochs": arguments.epochs, "seeds": arguments.seeds, "workers": WORKERS, "samples_of_a_push": PUSH,
        "patterns": PATTERNS, "core_s": seconds,
    }  # fmt: skip
    save("staleness_rules", {**figures, "runs": rows})


if __name__ == "__main__":
    main()
