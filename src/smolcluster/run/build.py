"""From a configuration to something that trains: the only place that knows every algorithm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from smolcluster.algorithms.classicdp import ClassicDP
from smolcluster.algorithms.edp import EdpServer, EdpWorker
from smolcluster.algorithms.expert_parallel import ExpertParallel
from smolcluster.algorithms.fsdp import FSDP
from smolcluster.algorithms.model_parallel import ModelParallel
from smolcluster.algorithms.pipeline import Pipeline
from smolcluster.algorithms.single import Single
from smolcluster.algorithms.syncps import SyncPsServer, SyncPsWorker
from smolcluster.checkpoint.state import StateReader
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.param_server import ServerPort
from smolcluster.collectives.param_worker import WorkerPort
from smolcluster.config.schema import (
    Config,
    resolved_batch_size,
    resolved_epochs,
    resolved_staleness_bound,
    total_steps,
)
from smolcluster.data.batch import Reads
from smolcluster.data.leases import SamplePool, range_indices
from smolcluster.data.loader import BatchLoader, eval_batches
from smolcluster.data.sampler import Sampler
from smolcluster.data.source import MemoryData, TrainingData, open_data
from smolcluster.device import give_memory_back, is_out_of_memory, prepare_process, resolve_device, spare_collector
from smolcluster.errors import ConfigError
from smolcluster.kinds import JsonObject
from smolcluster.models.build import build_model
from smolcluster.models.checkpointing import checkpoint_activations
from smolcluster.models.partition import Unit
from smolcluster.models.source import model_source
from smolcluster.run.layers import blocks_per_rank, decide_split, describe_split
from smolcluster.run.support import STAGED, check_supported, rank_weights, sharing_ranks
from smolcluster.training.optim import OptimizerFactory, optimizer_factory
from smolcluster.training.rng import load_rng_state
from smolcluster.training.schedule import LrSchedule, lr_schedule
from smolcluster.training.server import Rule
from smolcluster.training.shares import ShareBalancer, WorkerShares
from smolcluster.training.strategy import Strategy
from smolcluster.training.trainer import Progress, Trainer

logger = logging.getLogger(__name__)

# Updates of a run that ends with its samples.
NO_LIMIT = 1 << 62

Save: TypeAlias = Callable[[Strategy, BatchLoader, Progress], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a rank has before it needs the others.

    Attributes:
        config: the resolved configuration.
        rank: this rank.
        data: what is trained on and validated on.
        model: initialised from the seed, on the CPU.
        global_batch: samples of a step over all ranks.
        weights: the relative shares of it of the ranks that compute, in rank order.
        device: where this rank computes.
        values: the parameters of a unit of the model, where they are on the meta device; None: they are not.
        blocks: how many of the model's blocks each rank gets, where layers are divided; None: by cost.
    """

    config: Config
    rank: int
    data: TrainingData
    model: nn.Module
    global_batch: int
    weights: Sequence[float]
    device: torch.device
    values: Callable[[Unit], Mapping[str, Tensor]] | None = None
    blocks: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Where a resumed run goes on; see run/resume.py.

    Attributes:
        state: of the strategy and of the random generators.
        progress: this rank's.
        global_batch: samples of a step over all ranks: that of the first start, whatever their number is now.
        position: where the data goes on.
        split: the layers of each stage that are to stay as they were; None: they are decided anew.
    """

    state: StateReader
    progress: Progress
    global_batch: int
    position: JsonObject
    split: Sequence[range] | None = None


@dataclass(frozen=True, slots=True)
class Assembly:
    """A rank that is ready to train its `steps`.

    Attributes:
        steps: updates of the whole run.
        trainer: runs them.
        strategy: the algorithm.
        loader: of this rank's samples; to be closed.
        optimizers: what the strategy made.
        split: the layers of each stage over all ranks, where layers are divided.
    """

    steps: int
    trainer: Trainer
    strategy: Strategy
    loader: BatchLoader
    optimizers: Sequence[torch.optim.Optimizer]
    split: Sequence[range] | None = None


def prepare(config: Config, rank: int, names: Sequence[str], local_rank: int = 0) -> Parts:
    """Load the data and build the model; speaks to nobody. Blocks, perhaps for a download.

    Args:
        config: the resolved configuration.
        rank: this rank.
        names: the names of all ranks, in rank order.
        local_rank: this rank's number among those of this machine, which share its GPUs.

    Raises:
        ConfigError: this release, machine or data cannot do what the configuration asks for.
        DataError: the data is missing.
    """
    check_supported(config, len(names))
    prepare_process()
    if config.data.streaming or config.training.activation_checkpointing:
        # Who asks for these has little memory: a steady peak before speed. Without it checkpointing saves a tenth of
        # the peak of 12 or 16 blocks of width 256 on the CPU, with it a third to a half.
        give_memory_back()
    device = resolve_device(config.training.device, local_rank)
    data = open_data(
        config.data.dataset,
        path=config.data.path,
        text_column=config.data.text_column,
        tokenizer=config.data.tokenizer,
        max_seq_len=config.model.max_seq_len,
        train_split=config.data.train_split,
        streaming=config.data.streaming,
    )
    seed = config.cluster.seed
    sizes = {"vocab_size": data.vocab_size, "num_classes": data.num_classes}
    # Where no rank is to hold the whole model, it begins without values; a user's own class has to be built whole.
    is_divided = config.algorithm in (*STAGED, "ep") or (config.algorithm == "fsdp" and config.cluster.fsdp_stage == 3)
    source = model_source(config.model, seed=seed, **sizes) if is_divided else None
    try:
        model = build_model(config.model, seed=seed, **sizes) if source is None else source.build()
    except (RuntimeError, MemoryError) as exc:
        if not is_out_of_memory(exc):
            raise
        raise ConfigError("the model does not fit into this machine's memory. Make the sizes of model smaller") from exc
    if config.training.activation_checkpointing:
        checkpoint_activations(model)
    global_batch = resolved_batch_size(config) * sharing_ranks(config, len(names))
    _steps(config, data, global_batch)  # a stream is counted here, where nobody waits for this rank
    # Dropout: other masks on every rank, the same in every run.
    torch.manual_seed(seed + rank)
    spare_collector()
    weights = rank_weights(config, list(names))
    values = None if source is None else source.values
    blocks = blocks_per_rank(config, names) if config.algorithm in STAGED else None
    return Parts(config, rank, data, model, global_batch, weights, device, values, blocks)


def assemble(
    parts: Parts,
    comm: Communicator,
    *,
    save: Save | None = None,
    start: Start | None = None,
    skip_nonfinite: bool = False,
    say: Callable[[str], None] | None = None,
) -> Assembly:
    """Make strategy and trainer. All ranks call it; it may broadcast the weights.

    Args:
        parts: this rank's.
        comm: all ranks; of world size 1 for `single`.
        save: called on every rank when a checkpoint is due; None: there are none.
        start: where to go on; None: at the beginning.
        skip_nonfinite: pass over updates that are not finite instead of stopping.
        say: shows the user a line; None: nobody looks.

    Raises:
        CheckpointError: `start` is of another model.
    """
    config, rank, world_size = parts.config, parts.rank, comm.world_size
    progress = Progress() if start is None else start.progress
    global_batch = parts.global_batch if start is None else start.global_batch
    steps = _steps(config, parts.data, global_batch)
    optimizers: list[torch.optim.Optimizer] = []
    is_staged = config.algorithm in STAGED
    split = _split(parts, comm, None if start is None else start.split, say) if is_staged else None
    factory = _remembering(_optimizer_factory(config), optimizers)
    strategy = _strategy(parts, steps, comm, factory, skip_nonfinite, split)
    if start is not None:
        strategy.load_state(start.state)
        load_rng_state(start.state, rank, world_size, parts.device, config.cluster.seed)
    # Where layers are divided all ranks compute the same samples, and look at what their layers need of them.
    share, weights = (0, [1.0]) if is_staged else (rank, parts.weights)
    reads = _reads(rank, world_size) if is_staged else "all"
    loader = parts.data.loader(
        share,
        weights,
        global_batch=global_batch,
        seed=config.cluster.seed,
        micro_batches=config.training.micro_batches,
        start=None if start is None else start.position,
        max_steps=steps,
        # Experts compute the tokens of all ranks at once, so the ranks have to be at the same micro-batch.
        micro_first=config.algorithm == "ep",
        reads=reads,
    )
    loader.telemetry = comm.telemetry
    is_auto = config.cluster.shares == "auto" and config.algorithm != "single" and not is_staged
    trainer = Trainer(
        strategy,
        loader,
        steps,
        balance=ShareBalancer(comm, loader).after_step if is_auto else None,
        eval_batches=lambda: eval_batches(
            parts.data.validation, resolved_batch_size(config), share, len(weights), reads=reads
        ),
        eval_steps=config.training.eval_steps,
        checkpoint=None if save is None else lambda progress: save(strategy, loader, progress),
        checkpoint_steps=config.checkpoint.steps,
        start=progress,
    )
    return Assembly(steps, trainer, strategy, loader, optimizers, split)


@dataclass(frozen=True, slots=True)
class ServerParts:
    """A parameter server's algorithm, the samples that it lends, and the optimizers that it made."""

    rule: Rule
    pool: SamplePool
    optimizers: Sequence[torch.optim.Optimizer]


def assemble_server(parts: Parts, port: ServerPort, *, global_batch: int, skip_nonfinite: bool = False) -> ServerParts:
    """Make the server's side of the algorithm.

    Args:
        parts: the server's.
        port: to the workers.
        global_batch: samples of a step over all workers.
        skip_nonfinite: pass over updates that are not finite instead of stopping.
    """
    config, data = parts.config, _in_memory(parts.data)
    training, cluster = config.training, config.cluster
    sampler = Sampler(len(data.train), global_batch, cluster.seed)
    only_max_steps = training.max_steps is not None and training.epochs is None
    pool = SamplePool(sampler, None if only_max_steps else resolved_epochs(config))
    optimizers: list[torch.optim.Optimizer] = []
    factory = _remembering(_optimizer_factory(config), optimizers)
    bound = resolved_staleness_bound(config)
    steps = NO_LIMIT if training.max_steps is None else training.max_steps
    schedule = _schedule(config, planned_global_batches(parts, global_batch))
    shares = WorkerShares(parts.weights, measures=cluster.shares == "auto")
    rule: Rule
    if config.algorithm == "edp" and bound != 0:
        rule = EdpServer(
            parts.model,
            factory,
            port,
            pool,
            steps=steps,
            shares=shares,
            staleness_bound=bound,
            grad_clip_norm=training.grad_clip_norm,
            lr_schedule=schedule,
            precision=training.precision,
            device=parts.device,
            skip_nonfinite=skip_nonfinite,
        )
    else:
        is_edp = config.algorithm == "edp"  # with K = 0, which is strict syncps
        rule = SyncPsServer(
            parts.model,
            factory,
            port,
            pool,
            steps=steps,
            count_planned=lambda ranges: data.train.targets_per_sample(range_indices(sampler, ranges)),
            shares=shares,
            staleness_bound=bound or 0,
            timeout=None if is_edp else cluster.timeout,
            worker_update_interval=1 if is_edp else cluster.worker_update_interval,
            grad_clip_norm=training.grad_clip_norm,
            lr_schedule=schedule,
            precision=training.precision,
            device=parts.device,
            skip_nonfinite=skip_nonfinite,
        )
    return ServerParts(rule, pool, optimizers)


def assemble_worker(parts: Parts, port: WorkerPort) -> Strategy:
    """Make a worker's side of the algorithm."""
    config, bound = parts.config, resolved_staleness_bound(parts.config)
    is_edp = config.algorithm == "edp"
    if is_edp and bound != 0:
        return EdpWorker(
            parts.model,
            port,
            worker_update_interval=config.cluster.worker_update_interval,
            precision=config.training.precision,
            device=parts.device,
        )
    return SyncPsWorker(
        parts.model,
        port,
        staleness_bound=bound or 0,
        polyak_alpha=0.0 if is_edp else config.training.polyak_alpha,
        precision=config.training.precision,
        device=parts.device,
    )


def planned_steps(parts: Parts, global_batch: int) -> int:
    """Updates that a run over a parameter server has if every sample counts at once."""
    config = parts.config
    if not counts_pushes(config):
        return _steps(config, parts.data, global_batch)
    lease = max(1, global_batch // len(parts.weights))
    return total_steps(config, parts.data.steps_per_epoch(lease))


def planned_global_batches(parts: Parts, global_batch: int) -> int:
    """The run's length in global batches, which is what a learning rate is planned for."""
    config = parts.config
    if not counts_pushes(config):
        return _steps(config, parts.data, global_batch)
    return -(-planned_steps(parts, global_batch) // len(parts.weights))


def counts_pushes(config: Config) -> bool:
    """Whether a step is one push and not one of all ranks."""
    return config.algorithm == "edp" and resolved_staleness_bound(config) != 0


def _in_memory(data: TrainingData) -> MemoryData:
    assert isinstance(data, MemoryData), "check_supported refuses streams"
    return data


def _schedule(config: Config, steps: int) -> LrSchedule:
    schedule, training = config.lr_schedule, config.training
    return lr_schedule(schedule.kind, training.learning_rate, schedule.warmup_iters, schedule.min_lr, steps)


def _steps(config: Config, data: TrainingData, global_batch: int) -> int:
    """Updates of the whole run. Where epochs do not matter, a stream need not be counted."""
    only_max_steps = config.training.max_steps is not None and config.training.epochs is None
    return total_steps(config, 0 if only_max_steps else data.steps_per_epoch(global_batch))


def _split(
    parts: Parts, comm: Communicator, kept: Sequence[range] | None, say: Callable[[str], None] | None
) -> list[range]:
    """The layers of each stage, over all ranks; shows the user what they are."""
    split = decide_split(
        parts.config,
        parts.model,
        parts.data,
        comm,
        blocks=parts.blocks,
        speeds=parts.weights,
        device=parts.device,
        kept=kept,
        say=say,
    )
    layers = describe_split(split, parts.model, comm.world_size)
    logger.info("layers %s", layers)
    if say is not None:
        say(layers)
    return split


def _strategy(
    parts: Parts,
    steps: int,
    comm: Communicator,
    optimizers: OptimizerFactory,
    skip_nonfinite: bool,
    split: Sequence[range] | None,
) -> Strategy:
    config = parts.config
    training, cluster = config.training, config.cluster
    schedule = _schedule(config, steps)
    if config.algorithm == "single":
        return Single(
            parts.model,
            optimizers,
            staleness_bound=resolved_staleness_bound(config) or 0,
            grad_clip_norm=training.grad_clip_norm,
            lr_schedule=schedule,
            precision=training.precision,
            device=parts.device,
            skip_nonfinite=skip_nonfinite,
            telemetry=comm.telemetry,
        )
    if config.algorithm == "fsdp":
        return FSDP(
            parts.model,
            optimizers,
            comm,
            stage=cluster.fsdp_stage,
            staleness_bound=resolved_staleness_bound(config) or 0,
            compression=cluster.compression,
            grad_clip_norm=training.grad_clip_norm,
            lr_schedule=schedule,
            precision=training.precision,
            device=parts.device,
            bucket_bytes=cluster.bucket_bytes,
            skip_nonfinite=skip_nonfinite,
            values=parts.values,
        )
    if config.algorithm == "ep":
        return ExpertParallel(
            parts.model,
            optimizers,
            comm,
            staleness_bound=resolved_staleness_bound(config) or 0,
            compression=cluster.compression,
            grad_clip_norm=training.grad_clip_norm,
            lr_schedule=schedule,
            precision=training.precision,
            device=parts.device,
            bucket_bytes=cluster.bucket_bytes,
            skip_nonfinite=skip_nonfinite,
            values=parts.values,
        )
    if config.algorithm in STAGED:
        arguments: dict[str, Any] = {
            "split": split,
            "staleness_bound": resolved_staleness_bound(config) or 0,
            "grad_clip_norm": training.grad_clip_norm,
            "lr_schedule": schedule,
            "precision": training.precision,
            "device": parts.device,
            "skip_nonfinite": skip_nonfinite,
            "values": parts.values,
        }
        if config.algorithm == "mp":
            return ModelParallel(parts.model, optimizers, comm, **arguments)
        return Pipeline(parts.model, optimizers, comm, schedule=training.schedule, **arguments)
    if config.algorithm != "classicdp":
        raise ConfigError(f"algorithm {config.algorithm} is not one of ranks that are all alike. Use smolcluster train")
    return ClassicDP(
        parts.model,
        optimizers,
        comm,
        staleness_bound=resolved_staleness_bound(config) or 0,
        compression=cluster.compression,
        grad_clip_norm=training.grad_clip_norm,
        lr_schedule=schedule,
        precision=training.precision,
        device=parts.device,
        bucket_bytes=cluster.bucket_bytes,
        skip_nonfinite=skip_nonfinite,
    )


def _reads(rank: int, world_size: int) -> Reads:
    """What the layers of a rank need of a batch: the first rank's inputs, the last one's targets."""
    if world_size == 1:
        return "all"
    return "inputs" if rank == 0 else "targets" if rank == world_size - 1 else "nothing"


def _optimizer_factory(config: Config) -> OptimizerFactory:
    training = config.training
    return optimizer_factory(training.optimizer, training.learning_rate, training.weight_decay)


def _remembering(factory: OptimizerFactory, made: list[torch.optim.Optimizer]) -> OptimizerFactory:
    """`factory`, with what it makes also put into `made`: summary.json counts the optimizer's memory."""

    def make(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = factory(params)
        made.append(optimizer)
        return optimizer

    return make
