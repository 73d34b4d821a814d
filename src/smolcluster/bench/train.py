"""Training, ours against torch's own ways (see COMPETITORS): in the same processes, on the same batches.

Each rank is a process that holds every contestant: our strategy as `smolcluster train` builds it, torch's, and both
once more without communication (but for pipelines, whose ranks cannot compute by themselves). A block is some updates
of one of them in a row, after some that are not counted; its time is that of the slowest rank. The order within a pair
of blocks is turned round from pair to pair. While one trains, the threads of the others sleep.

The ratio is the median over pairs of ours / theirs in tokens/s, with a bootstrap interval over the pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from smolcluster.bench.intervals import bootstrap_interval
from smolcluster.bench.ranks import run_ranks
from smolcluster.config.schema import Config
from smolcluster.errors import ClusterError, ConfigError
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.run.support import STAGED, check_supported, rank_weights

COMPETITORS = ("ddp", "fully_shard", "torch_pipelining", "single")
# Those that are no match for another algorithm.
_ALGORITHM_OF = {"fully_shard": "fsdp", "torch_pipelining": "mp_pipeline"}
PAIRS = 20
WARMUP_STEPS = 2
EXPOSED = (
    "time of a step, less that of the same step of the same processes at the same time without communication; ddp: "
    "under no_sync, fully_shard: each rank a mesh of its own, ours: each rank a world of its own"
)


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Attributes:
        against: one of COMPETITORS; None: nobody.
        pairs: blocks of each contestant.
        steps: updates of a block; None: so many as take about a second.
        warmup_steps: updates before each block that are not counted.
        congestion: "equal" gives torch's sockets the congestion control that ours choose on loopback, "default" leaves
            all as they are.
        exposed: measure how much of the communication shows; takes twice as long. Not with single, nor of a pipeline,
            whose ranks cannot compute by themselves.
        whole_batch: single computes a step's batch at once, instead of in training.micro_batches parts.
    """

    against: str | None = None
    pairs: int = PAIRS
    steps: int | None = None
    warmup_steps: int = WARMUP_STEPS
    congestion: str = "equal"
    exposed: bool = True
    whole_batch: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """(seconds of the slowest rank, targets over all ranks) of some updates of one contestant."""

    seconds: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Speed."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Pair:
    """Blocks that ran one after the other; None: not measured."""

    ours: Block
    against: Block | None = None
    ours_alone: Block | None = None
    against_alone: Block | None = None

    @property
    def ratio(self) -> float:
        """Our tokens/s / theirs."""
        assert self.against is not None
        return self.ours.tokens_per_s / self.against.tokens_per_s


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the ranks measured, before anything is made of it.

    Attributes:
        pairs: in the order of measuring.
        steps: updates of a block.
        congestion: congestion control of all sockets, or "each its own".
        parameters: of the model.
        losses: of each contestant's last update: equal up to rounding, or they did not train the same.
        sent_bytes: `link/sent_bytes` of each rank in the end: all that our side has sent, from the first frame on.
    """

    pairs: Sequence[Pair]
    steps: int
    congestion: str
    parameters: int
    losses: JsonObject
    sent_bytes: Sequence[float] = ()


def bench_train(config: Config, world_size: int, options: Options) -> JsonObject:
    """Measure on this machine; blocks.

    Args:
        config: the resolved configuration of a training run.
        world_size: ranks, each a process.
        options: how to measure.

    Returns:
        `tokens_per_s against_tokens_per_s ratio`, and how they came about; see `summarise`.

    Raises:
        ConfigError: this release, machine or data cannot do what is asked for.
        ClusterError: a rank failed.
    """
    return summarise(measure_training(config, world_size, options), config, world_size, options)


def measure_training(
    config: Config,
    world_size: int,
    options: Options,
    *,
    hosts: Sequence[str] | None = None,
    prefix: Callable[[int], Sequence[str]] = lambda rank: (),
) -> Measurement:
    """Measure; blocks. Raises as `bench_train` does.

    Args:
        config: the resolved configuration of a training run.
        world_size: ranks, each a process.
        options: how to measure.
        hosts: the address each rank listens at; None: loopback.
        prefix: see run_ranks.
    """
    check_competitor(options.against)
    _check_match(config, world_size, options.against)
    rank_weights(config, [f"rank{rank}" for rank in range(world_size)])
    job: JsonObject = {
        "config": config.model_dump(mode="json"),
        "against": options.against,
        "pairs": options.pairs,
        "steps": options.steps,
        "warmup_steps": options.warmup_steps,
        "congestion": options.congestion,
        "exposed": options.exposed,
        "whole_batch": options.whole_batch,
    }
    results = run_ranks("smolcluster.bench.train_rank", world_size, job, hosts=hosts, prefix=prefix)
    for result in results:
        if "error" in result:
            kind = ConfigError if result["exit_code"] == ConfigError.exit_code else ClusterError
            raise kind(str(result["error"]))
    result = results[0]
    pairs = cast("list[dict[str, tuple[float, int]]]", result["pairs"])
    return Measurement(
        pairs=[Pair(**{name: Block(*block) for name, block in pair.items()}) for pair in pairs],
        steps=cast("int", result["steps"]),
        congestion=str(result["congestion"]),
        parameters=cast("int", result["parameters"]),
        losses=cast("JsonObject", result["losses"]),
        sent_bytes=[cast("float", result["sent_bytes"]) for result in results],
    )


def check_competitor(against: str | None) -> None:
    """Refuse one that is not there.

    Raises:
        ConfigError: with those that are.
    """
    known = f"{', '.join(COMPETITORS[:-1])} or {COMPETITORS[-1]}"
    if against is not None and against not in COMPETITORS:
        raise ConfigError(f"--against {against} is unknown. Use {known}")


def _check_match(config: Config, world_size: int, against: str | None) -> None:
    algorithm = config.algorithm
    check_supported(config, world_size)
    if against in _ALGORITHM_OF and algorithm != _ALGORITHM_OF[against]:
        others = "single" if algorithm in STAGED else "ddp or single"
        raise ConfigError(
            f"--against {against} is for --algorithm {_ALGORITHM_OF[against]}, not {algorithm}. Use {others}"
        )
    if against == "ddp" and algorithm in STAGED:
        raise ConfigError(
            f"--against ddp: ddp gives each rank a batch of its own, {algorithm} all ranks the same one. Use single"
        )
    if against == "torch_pipelining":
        from smolcluster.bench.pipelining import check_offered

        check_offered(config, world_size)


def summarise(measurement: Measurement, config: Config, world_size: int, options: Options) -> JsonObject:
    """The figures of a measurement.

    Returns:
        `tokens_per_s`, with a competitor `against_tokens_per_s` and `ratio`: medians; `*_interval`: 95 % intervals;
        `*_s`: seconds of a step; `exposed_ratio`: our exposed communication / theirs, see EXPOSED.
    """
    pairs, steps = measurement.pairs, measurement.steps
    figures: JsonObject = {
        "tokens_per_s": statistics.median(pair.ours.tokens_per_s for pair in pairs),
        "step_s": statistics.median(pair.ours.seconds for pair in pairs) / steps,
    }
    if all(pair.against is not None for pair in pairs):
        figures |= _compared(pairs, steps)
    if all(pair.against_alone is not None for pair in pairs):
        figures |= _exposed(pairs, steps)
    return figures | {
        "against": options.against,
        "algorithm": config.algorithm,
        "world": world_size,
        "threads": 1,
        "precision": config.training.precision,
        "compression": config.cluster.compression,
        "backend": config.backend,
        "shared_memory": config.cluster.shared_memory,
        "micro_batches": config.training.micro_batches,
        "congestion": measurement.congestion,
        "parameters": measurement.parameters,
        "pairs": len(pairs),
        "steps_per_block": steps,
        "warmup_steps": options.warmup_steps,
        "losses": measurement.losses,
    }


def _compared(pairs: Sequence[Pair], steps: int) -> JsonObject:
    theirs = [pair.against for pair in pairs if pair.against is not None]
    return {
        "against_tokens_per_s": statistics.median(block.tokens_per_s for block in theirs),
        "against_step_s": statistics.median(block.seconds for block in theirs) / steps,
        "ratio": _median_ratio(pairs),
        "ratio_interval": [*bootstrap_interval(pairs, _median_ratio)],
    }


def _exposed(pairs: Sequence[Pair], steps: int) -> JsonObject:
    ours, theirs = _median_exposed(pairs)
    alone: dict[str, JsonValue] = {
        f"{name}_s": statistics.median(cast("Block", getattr(pair, name)).seconds for pair in pairs) / steps
        for name in ("ours_alone", "against_alone")
    }
    return {
        **alone,
        "exposed_s": ours / steps,
        "against_exposed_s": theirs / steps,
        "exposed_ratio": _exposed_ratio(pairs),
        "exposed_ratio_interval": [*bootstrap_interval(pairs, _exposed_ratio)],
        "exposed": EXPOSED,
    }


def _median_ratio(pairs: Sequence[Pair]) -> float:
    return statistics.median(pair.ratio for pair in pairs)


def _exposed_ratio(pairs: Sequence[Pair]) -> float:
    ours, theirs = _median_exposed(pairs)
    return ours / theirs if theirs else 0.0


def _median_exposed(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Median seconds of a block that are exposed communication, (ours, theirs)."""
    ours, theirs = [], []
    for pair in pairs:
        assert pair.against is not None
        assert pair.ours_alone is not None
        assert pair.against_alone is not None
        ours.append(pair.ours.seconds - pair.ours_alone.seconds)
        theirs.append(pair.against.seconds - pair.against_alone.seconds)
    return statistics.median(ours), statistics.median(theirs)
