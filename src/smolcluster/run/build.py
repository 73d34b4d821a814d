"""From a configuration to something that trains: the only place that knows every algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from smolcluster.algorithms.classicdp import ClassicDP
from smolcluster.algorithms.single import Single
from smolcluster.collectives.base import Communicator
from smolcluster.config.schema import Config, resolved_batch_size, resolved_staleness_bound, total_steps
from smolcluster.data.datasets import Dataset, load_splits
from smolcluster.data.loader import BatchLoader, eval_batches
from smolcluster.data.sampler import Sampler
from smolcluster.device import prepare_process, resolve_device
from smolcluster.models.build import build_model
from smolcluster.run.support import check_supported, rank_weights
from smolcluster.training.optim import OptimizerFactory, optimizer_factory
from smolcluster.training.schedule import lr_schedule
from smolcluster.training.strategy import Strategy
from smolcluster.training.trainer import Trainer

Save: TypeAlias = Callable[[int, nn.Module], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a rank has before it needs the others.

    Attributes:
        config: the resolved configuration.
        rank: this rank.
        train: the training split.
        validation: the validation split.
        model: initialised from the seed, on the CPU.
        sampler: the global batch, and which part of it is whose.
        steps: updates of the whole run.
        device: where this rank computes.
    """

    config: Config
    rank: int
    train: Dataset
    validation: Dataset
    model: nn.Module
    sampler: Sampler
    steps: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class Assembly:
    """A rank that is ready to train. `loader` is to be closed; `optimizers` is what the strategy made."""

    trainer: Trainer
    strategy: Strategy
    loader: BatchLoader
    optimizers: Sequence[torch.optim.Optimizer]


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
    device = resolve_device(config.training.device, local_rank)
    train, validation = load_splits(
        config.data.dataset,
        path=config.data.path,
        tokenizer=config.data.tokenizer,
        max_seq_len=config.model.max_seq_len,
        train_split=config.data.train_split,
    )
    seed = config.cluster.seed
    model = build_model(config.model, seed=seed, vocab_size=train.vocab_size, num_classes=train.num_classes)
    global_batch = resolved_batch_size(config) * len(names)
    sampler = Sampler(len(train), global_batch, seed, rank_weights(config, list(names)))
    # Dropout: other masks on every rank, the same in every run.
    torch.manual_seed(seed + rank)
    return Parts(config, rank, train, validation, model, sampler, total_steps(config, sampler.steps_per_epoch), device)


def assemble(parts: Parts, comm: Communicator, *, save: Save | None = None, skip_nonfinite: bool = False) -> Assembly:
    """Make strategy and trainer. All ranks call it; it may broadcast the weights.

    Args:
        parts: this rank's.
        comm: all ranks; of world size 1 for `single`.
        save: called with (updates so far, model) when a checkpoint is due; None: this rank writes none.
        skip_nonfinite: pass over updates that are not finite instead of stopping.
    """
    config, rank, world_size = parts.config, parts.rank, comm.world_size
    optimizers: list[torch.optim.Optimizer] = []
    strategy = _strategy(parts, comm, _remembering(_optimizer_factory(config), optimizers), skip_nonfinite)
    loader = BatchLoader(
        parts.train, parts.sampler, rank, micro_batches=config.training.micro_batches, max_steps=parts.steps
    )
    trainer = Trainer(
        strategy,
        loader,
        parts.steps,
        eval_batches=lambda: eval_batches(parts.validation, resolved_batch_size(config), rank, world_size),
        eval_steps=config.training.eval_steps,
        checkpoint=None if save is None else lambda step: save(step, strategy.model),
        checkpoint_steps=config.checkpoint.steps,
    )
    return Assembly(trainer, strategy, loader, optimizers)


def _strategy(parts: Parts, comm: Communicator, optimizers: OptimizerFactory, skip_nonfinite: bool) -> Strategy:
    config = parts.config
    training, cluster = config.training, config.cluster
    schedule = lr_schedule(
        config.lr_schedule.kind,
        training.learning_rate,
        config.lr_schedule.warmup_iters,
        config.lr_schedule.min_lr,
        parts.steps,
    )
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
        )
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
