"""World size 1 against a bare PyTorch loop: what the library costs where it has nothing to distribute.

    python benchmarks/world_size_1.py [--runs 7]

Ways of training the same model on the same batches, alternating, one torch thread: a bare loop (AdamW with torch's
defaults, loss.item() every step), `ClassicDP` and `Single` called from Python, and `train`: the whole trainer with
prefetching loader, metrics file and schedule. Ratio: bare loop's time / ours; above 1 is faster than bare.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import save
from torch import Tensor, nn

from smolcluster.algorithms.classicdp import ClassicDP
from smolcluster.algorithms.single import Single
from smolcluster.collectives.local import LocalGroup
from smolcluster.data.batch import Batch
from smolcluster.data.datasets import ClassesDataset, Dataset, TextDataset
from smolcluster.data.loader import BatchLoader, sampled_steps
from smolcluster.data.sampler import Sampler
from smolcluster.device import prepare_process
from smolcluster.kinds import JsonObject
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.monitoring.metrics import MetricsFile
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.trainer import Trainer

STEPS = {"simple_nn": 400, "gpt": 12}
BATCH = {"simple_nn": 128, "gpt": 8}


def build(name: str) -> nn.Module:
    """The two models: one where a step takes a millisecond, one where it takes a hundred."""
    if name == "simple_nn":
        return SimpleNN(784, 128, 10, 0)
    return GPT(GPTConfig(256, 192, 4, 4, 768, 0.0, 128), 0)


def dataset(name: str) -> Dataset:
    """Random data of the right shape."""
    generator = torch.Generator().manual_seed(0)
    if name == "simple_nn":
        images = torch.rand(20_000, 1, 28, 28, generator=generator)
        return ClassesDataset("random", images, torch.randint(0, 10, (20_000,), generator=generator), 10)
    return TextDataset("random", torch.randint(0, 256, (200_000,), generator=generator), 128, 256)


def bare_loop(name: str, steps: int) -> float:
    """Seconds a step of plain PyTorch, gathering its batches itself."""
    data, model = dataset(name), build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.randperm(len(data))
    batches = [order[i * BATCH[name] % len(data) :][: BATCH[name]] for i in range(steps)]

    def step(indices: Tensor) -> None:
        inputs, targets = data.batch(indices)
        optimizer.zero_grad()
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        loss.backward()
        optimizer.step()
        loss.item()

    return timed(step, batches)


def strategy_loop(name: str, steps: int, make: Callable[[nn.Module, Any], Any]) -> float:
    """Seconds a step of one of our strategies on the same work."""
    data, model = dataset(name), build(name)
    strategy = make(model, optimizer_factory("adamw", 1e-3, 0.01))
    order = torch.randperm(len(data))
    batches = [order[i * BATCH[name] % len(data) :][: BATCH[name]] for i in range(steps)]

    def step(indices: Tensor) -> None:
        strategy.train_step([Batch(*data.batch(indices))])

    return timed(step, batches)


class Rows(MetricsFile):
    """The run folder's file, without a progress bar."""

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """See MetricsSink."""


def trainer_loop(name: str, steps: int, make: Callable[[nn.Module, Any], Any]) -> float:
    """Seconds a step of the whole trainer, as `smolcluster train` runs it."""
    data, model = dataset(name), build(name)
    sampler = Sampler(len(data), BATCH[name], 0, 1)
    with tempfile.TemporaryDirectory() as folder, Rows(Path(folder) / "metrics.jsonl") as metrics:
        loader = BatchLoader(
            lambda _position, _weights: sampled_steps(data, sampler, 0, max_steps=steps),
            sampler.weights, {"step": 0}, 0, sampler.global_batch,
        )  # fmt: skip
        trainer = Trainer(make(model, optimizer_factory("adamw", 1e-3, 0.01)), loader, steps)
        start = time.perf_counter()
        trainer.run(metrics, None)
        return (time.perf_counter() - start) / steps


def timed(step: Callable[[Tensor], None], batches: list[Tensor]) -> float:
    """Mean seconds of a step, after two that are not counted."""
    for indices in batches[:2]:
        step(indices)
    start = time.perf_counter()
    for indices in batches[2:]:
        step(indices)
    return (time.perf_counter() - start) / (len(batches) - 2)


def classicdp(model: nn.Module, factory: Any) -> ClassicDP:
    """World size 1."""
    return ClassicDP(model, factory, LocalGroup(1).communicators[0])


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    prepare_process()
    figures: dict[str, Any] = {}
    for name, steps in STEPS.items():
        ways: dict[str, Callable[[], float]] = {
            "bare": lambda name=name, steps=steps: bare_loop(name, steps),
            "Single": lambda name=name, steps=steps: strategy_loop(name, steps, Single),
            "ClassicDP": lambda name=name, steps=steps: strategy_loop(name, steps, classicdp),
            "train": lambda name=name, steps=steps: trainer_loop(name, steps, classicdp),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(runs):
            for way, measure in ways.items():
                times[way].append(measure())
        for way, seconds in times.items():
            ratios = [bare / own for bare, own in zip(times["bare"], seconds, strict=True)]
            figures[f"{name}/{way}"] = {
                "step_ms": round(1e3 * statistics.median(seconds), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
            }
            print(f"{name:10s} {way:10s} {figures[f'{name}/{way}']}", flush=True)
    save("world_size_1", {"runs": runs, "figures": figures})


if __name__ == "__main__":
    main()
