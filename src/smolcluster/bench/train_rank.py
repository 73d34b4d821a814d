"""One rank of `bench train`: holds all contestants and lets them train in alternating blocks. See train.py.

python -m smolcluster.bench.train_rank     its job comes on standard input; see ranks.py
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch

from smolcluster.algorithms.pipeline import Pipeline
from smolcluster.bench.congestion import equalise
from smolcluster.bench.ranks import largest, meet, read_job, say
from smolcluster.collectives.base import Communicator
from smolcluster.config.schema import Config
from smolcluster.data.batch import Batch
from smolcluster.errors import SmolError
from smolcluster.kinds import JsonObject
from smolcluster.run.build import Assembly, Parts, assemble, prepare
from smolcluster.run.connect import alone, join_torch
from smolcluster.run.support import STAGED
from smolcluster.training.step import count_targets
from smolcluster.training.strategy import Strategy

if TYPE_CHECKING:
    from smolcluster.bench.ddp import DdpTraining
    from smolcluster.bench.fully_shard import FullyShardTraining

# Made before the first block and used again and again: loading costs nobody time.
KEPT_STEPS = 16
# A block is to take about so long: short enough that both contestants see the same weather.
BLOCK_SECONDS = 1.0
MIN_STEPS, MAX_STEPS = 3, 500


@dataclass(frozen=True, slots=True)
class _Data:
    """Micro-batches of some steps, and how many targets each step has here."""

    steps: Sequence[Sequence[Batch]]
    tokens: Sequence[int]


@dataclass(slots=True)
class Contestant:
    """Somebody who trains.

    Attributes:
        step: does one update; gives the loss, if the step of it is done.
        takes_part: False: this rank waits meanwhile.
        data: its micro-batches, step by step; None: as the others'.
        steps: updates done so far; it also says which batch comes next, so that all see the same data.
        loss: of the last update.
    """

    step: Callable[[Sequence[Batch]], float | None]
    takes_part: bool = True
    data: _Data | None = None
    steps: int = 0
    loss: float = field(default=math.nan)


def main() -> None:
    """One rank."""
    job = read_job()
    config = Config.model_validate(job["config"])
    rank, world_size = cast("int", job["rank"]), cast("int", job["world_size"])
    comm = _meet(job, config, rank, world_size)
    try:
        result = _measure(job, config, comm)
        comm.barrier()
        comm.close()
    except SmolError as error:
        comm.abort(error)
        say({"error": str(error), "exit_code": error.exit_code})
        logging.shutdown()
        os._exit(error.exit_code)  # destructors of torch.distributed would wait for ranks that are gone
    say(result)
    sys.stdout.flush()
    os._exit(0)  # the same


def _meet(job: JsonObject, config: Config, rank: int, world_size: int) -> Communicator:
    if config.backend == "tcp" and world_size > 1:
        return meet(job, shared_memory=config.cluster.shared_memory == "auto")
    if rank == 0:
        say({"address": None})
    if world_size == 1:
        return alone()
    return join_torch(config.backend, rank, world_size, f"{job['meeting']}-ours", config.cluster.patience)


def _measure(job: JsonObject, config: Config, comm: Communicator) -> JsonObject:
    names = [f"rank{rank}" for rank in range(comm.world_size)]
    parts = prepare(config, comm.rank, names, local_rank=comm.rank)
    initial = copy.deepcopy(parts.model) if parts.values is None else _whole_model(parts, names)
    ours = assemble(parts, comm)
    contestants = {"ours": Contestant(_strategy_step(ours.strategy))}
    against = cast("str | None", job["against"])
    with_torch = against in ("ddp", "fully_shard", "torch_pipelining")
    if with_torch:
        _add_torch(contestants, job, parts, initial, ours.strategy, comm)
    elif against == "single":
        contestants["against"] = _single(parts, initial, comm, whole_batch=bool(job["whole_batch"]))
    blocks = _Blocks(_data(ours), comm, parts.device, cast("int", job["warmup_steps"]))
    for contestant in contestants.values():
        blocks.run(contestant, 1)  # connections are open and memory is there
    congestion = equalise() if job["congestion"] == "equal" else "each its own"
    step_s = max(blocks.run(contestant, 1)[0] for contestant in contestants.values())
    steps = cast("int | None", job["steps"]) or _fitting_steps(step_s)
    pairs: list[JsonObject] = []
    for pair in range(cast("int", job["pairs"])):
        order = list(contestants)[:: 1 if pair % 2 == 0 else -1]
        seconds_and_tokens = {name: blocks.run(contestants[name], steps) for name in order}
        pairs.append({name: [*seconds_and_tokens[name]] for name in contestants})
    losses = {name: _mean(comm.exchange(contestant.loss)) for name, contestant in contestants.items()}
    ours.strategy.finish()  # what is still on its way is sent as well
    sent_bytes = comm.telemetry.counter("link/sent_bytes")
    if with_torch:
        comm.barrier()
        torch.distributed.destroy_process_group()
    return {
        "pairs": [*pairs],
        "steps": steps,
        "congestion": congestion,
        "parameters": sum(param.numel() for param in initial.parameters()),  # ours may hold none between steps
        "losses": cast("JsonObject", losses),
        "sent_bytes": sent_bytes,
    }


def _single(parts: Parts, initial: torch.nn.Module, comm: Communicator, *, whole_batch: bool) -> Contestant:
    """Rank 0 by itself, on what it computes with the others; where they divide the layers that is the whole batch."""
    is_staged = parts.config.algorithm in STAGED
    config = parts.config.model_copy(update={"algorithm": "single"})
    weights = [1.0] if is_staged else parts.weights
    by_itself = replace(parts, config=config, model=copy.deepcopy(initial), values=None, weights=weights, rank=0)
    assembly = assemble(by_itself, alone())
    step = _strategy_step(assembly.strategy)
    return Contestant(
        _on_whole_batch(step) if whole_batch else step,
        takes_part=comm.rank == 0,
        # Of a divided model's batch rank 0 has read the inputs only.
        data=_data(assembly) if is_staged else None,
    )


def _data(assembly: Assembly) -> _Data:
    with assembly.loader as loader:
        steps = [list(step) for step in itertools.islice(loader, min(KEPT_STEPS, assembly.steps))]
    return _Data(steps, [count_targets(batches) for batches in steps])


def _whole_model(parts: Parts, names: Sequence[str]) -> torch.nn.Module:
    """What is built without values, where no rank is to hold all of it, with them."""
    if parts.config.algorithm in (*STAGED, "ep"):
        return prepare(parts.config.model_copy(update={"algorithm": "single"}), 0, names[:1]).model
    cluster = parts.config.cluster.model_copy(update={"fsdp_stage": 0})
    return prepare(parts.config.model_copy(update={"cluster": cluster}), parts.rank, names).model


def _add_torch(
    contestants: dict[str, Contestant],
    job: JsonObject,
    parts: Parts,
    initial: torch.nn.Module,
    strategy: Strategy,
    comm: Communicator,
) -> None:
    """torch's side; and, where exposed communication is asked for, both sides once more without communication."""
    config, against = parts.config, str(job["against"])
    torch.distributed.init_process_group(
        "nccl" if config.backend == "nccl" else "gloo",
        init_method=f"{job['meeting']}-{against}",
        rank=comm.rank,
        world_size=comm.world_size,
    )
    if against == "torch_pipelining":
        from smolcluster.bench.pipelining import PipeliningTraining, split_of

        assert isinstance(strategy, Pipeline), "checked before any process was started"
        split = split_of(strategy, comm)
        pipeline = PipeliningTraining(copy.deepcopy(initial), config, parts.device, split=split)
        contestants["against"] = Contestant(pipeline.train_step)
        return
    make = _torch_training(against)
    contestants["against"] = Contestant(make(copy.deepcopy(initial), config, parts.device).train_step)
    if not job["exposed"]:
        return
    ours_alone = assemble(replace(parts, model=copy.deepcopy(initial), values=None), alone())
    against_alone = make(copy.deepcopy(initial), config, parts.device, communicates=False)
    contestants["ours_alone"] = Contestant(_strategy_step(ours_alone.strategy))
    contestants["against_alone"] = Contestant(against_alone.train_step)


def _torch_training(against: str) -> type[DdpTraining] | type[FullyShardTraining]:
    """What trains with torch: a class of model, configuration and device, with a train_step."""
    if against == "ddp":
        from smolcluster.bench.ddp import DdpTraining

        return DdpTraining
    from smolcluster.bench.fully_shard import FullyShardTraining

    return FullyShardTraining


def _strategy_step(strategy: Strategy) -> Callable[[Sequence[Batch]], float | None]:
    def step(batches: Sequence[Batch]) -> float | None:
        result = strategy.train_step(batches)
        return None if result is None else result.loss

    return step


def _on_whole_batch(
    step: Callable[[Sequence[Batch]], float | None],
) -> Callable[[Sequence[Batch]], float | None]:
    def step_whole(batches: Sequence[Batch]) -> float | None:
        inputs, targets = (torch.cat(parts) for parts in zip(*((b.inputs, b.targets) for b in batches), strict=True))
        return step([Batch(inputs, targets, batches[0].planned_count)])

    return step_whole


class _Blocks:
    """Lets a contestant train for a while, on all ranks at the same time."""

    def __init__(self, data: _Data, comm: Communicator, device: torch.device, warmup_steps: int) -> None:
        self._data = data
        self._comm = comm
        self._device = device
        self._warmup_steps = warmup_steps

    def run(self, contestant: Contestant, steps: int) -> tuple[float, int]:
        """(seconds of the slowest rank, targets over all ranks) of `steps` updates, after some to warm up."""
        self._train(contestant, self._warmup_steps)
        self._comm.barrier()
        start = time.perf_counter()
        tokens = self._train(contestant, steps)
        seconds = time.perf_counter() - start if contestant.takes_part else 0.0
        return largest(self._comm, seconds), sum(cast("list[int]", self._comm.exchange(tokens)))

    def _train(self, contestant: Contestant, steps: int) -> int:
        if not contestant.takes_part:
            return 0
        tokens, data = 0, contestant.data or self._data
        for _ in range(steps):
            number = contestant.steps % len(data.steps)
            loss = contestant.step(data.steps[number])
            contestant.loss = contestant.loss if loss is None else loss
            contestant.steps += 1
            tokens += data.tokens[number]
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return tokens


def _fitting_steps(step_seconds: float) -> int:
    """Steps of a block; the same on every rank, since `step_seconds` is the slowest rank's."""
    return max(MIN_STEPS, min(MAX_STEPS, round(BLOCK_SECONDS / step_seconds)))


def _mean(losses: Sequence[object]) -> float | None:
    numbers = [loss for loss in losses if isinstance(loss, float) and math.isfinite(loss)]
    return sum(numbers) / len(numbers) if numbers else None


if __name__ == "__main__":
    main()
