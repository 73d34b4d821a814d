"""What a pipeline of two ranks on two cores gains over one process on one core: the GPT of train_against_pipelining.py.

    python benchmarks/pipeline_speedup.py
    python benchmarks/pipeline_speedup.py --schedule gpipe --micro-batches 16

The pipeline takes turns, in the same processes, with `single` in rank 0 while rank 1 sleeps; each process has one
thread. `accumulating`: single computes the same M micro-batches one after the other. `whole_batch`: it computes the
batch at once, as one does who has the memory for it. The goal is 1.6; the bubble leaves PM / (M + P - 1), 1.78 with
P = 2 and M = 8.

`two_at_once` is what the two cores are worth: tokens per second of two processes that train at the same time and have
nothing to do with each other, over those of one of them while the other sleeps.

`--more` adds its blocks to those that results/pipeline_speedup_NAME.json has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from machine import RESULTS, save
from train_against_pipelining import GPT, LINKS, SCHEDULES

from smolcluster.algorithms.single import Single
from smolcluster.bench.intervals import bootstrap_interval
from smolcluster.bench.train import Block, Measurement, Options, Pair, measure_training, summarise
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.data.batch import Batch
from smolcluster.device import prepare_process
from smolcluster.models.build import build_model
from smolcluster.training.optim import optimizer_factory

WORLD_SIZE = 2
SINGLES = {"accumulating": False, "whole_batch": True}
BLOCK_STEPS = 1


def main() -> None:
    """Measure, print, save; or be one of the processes that train at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", choices=SCHEDULES, default="1f1b")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--link", choices=list(LINKS), default="shm", help="shm: as ranks of one host have it")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of blocks")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="as of smolcluster train")
    parser.add_argument("--name", help="of the result")
    parser.add_argument("--more", action="store_true", help="add to the pairs that the result has")
    parser.add_argument("--trains", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    overrides = [
        *GPT, f"training.schedule={arguments.schedule}", f"training.micro_batches={arguments.micro_batches}",
        f"cluster.shared_memory={LINKS[arguments.link]}", *arguments.override,
    ]  # fmt: skip
    config = load_config(overrides=overrides, flags={"algorithm": "mp_pipeline"}).config
    if arguments.trains:
        train_when_told(config)
        return
    name = f"pipeline_speedup_{arguments.name or f'{arguments.schedule}_m{arguments.micro_batches}_{arguments.link}'}"
    kept: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8")) if arguments.more else {}
    figures: dict[str, Any] = {"schedule": arguments.schedule}
    measured: dict[str, list[Any]] = {}
    for single, whole_batch in SINGLES.items():
        before = [Pair(Block(**p["ours"]), Block(**p["against"])) for p in kept.get(single, [])]
        options = Options("single", arguments.pairs, BLOCK_STEPS, warmup_steps=1, whole_batch=whole_batch)
        new = measure_training(config, WORLD_SIZE, options)
        pairs = [*before, *new.pairs]
        both = Measurement(pairs, new.steps, new.congestion, new.parameters, new.losses)
        figures[single] = summarise(both, config, WORLD_SIZE, options)
        measured[single] = [{"ours": asdict(p.ours), "against": p.against and asdict(p.against)} for p in pairs]
    gains = [*kept.get("two_at_once", []), *gains_of_two(arguments.pairs)]
    figures["two_at_once"] = {"ratio": statistics.median(gains)}
    figures["two_at_once"]["ratio_interval"] = [*bootstrap_interval(gains, statistics.median)]
    print(json.dumps(figures, indent=2))
    save(name, {"figures": figures, **measured, "two_at_once": gains})


def gains_of_two(pairs: int) -> list[float]:
    """(tokens per second of two processes at the same time) / (of one by itself), for each pair of blocks."""
    command = [sys.executable, __file__, *sys.argv[1:], "--trains"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(WORLD_SIZE)
    ]

    def seconds(number: int) -> float:
        for process in processes[:number]:
            assert process.stdin is not None
            process.stdin.write("train\n")
            process.stdin.flush()
        return max(float(process.stdout.readline()) for process in processes[:number] if process.stdout is not None)

    try:
        seconds(WORLD_SIZE)
        gains = []
        for pair in range(pairs):
            blocks = {number: seconds(number) for number in ((1, 2) if pair % 2 == 0 else (2, 1))}
            gains.append(WORLD_SIZE * blocks[1] / blocks[2])
        return gains
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def train_when_told(config: Config) -> None:
    """One step of `single` for every line that comes; says how many seconds it took."""
    prepare_process()
    model = build_model(config.model, seed=0, vocab_size=256)
    single = Single(model, optimizer_factory("adamw", config.training.learning_rate))
    assert config.training.batch_size is not None
    count, length = config.training.batch_size // config.training.micro_batches, config.model.max_seq_len
    tokens = [torch.randint(0, 256, (count, length + 1)) for _ in range(config.training.micro_batches)]
    batches = [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in tokens]
    for _ in sys.stdin:
        start = time.perf_counter()
        single.train_step(batches)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
