"""One rank from start to end, the same for all ways to start it: build, train, report what it gave."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from smolcluster.checkpoint.ranks import SharedReader, save_from_all_ranks
from smolcluster.checkpoint.store import discard_after, open_checkpoint, prune
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.plan import Plan
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.config.schema import reads_text
from smolcluster.data.loader import BatchLoader
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.models.weights import streamed_sha256, weights_sha256
from smolcluster.monitoring.gradients import GradientNorms, ReportedNorms
from smolcluster.monitoring.links import LinkMetrics, SessionLinks, measure_links
from smolcluster.monitoring.metrics import EverySteps
from smolcluster.monitoring.resources import ProcessUsage, peak_rss_bytes
from smolcluster.monitoring.trace import OptimizerSpans, RunTrace
from smolcluster.run.build import Assembly, Parts, Start, assemble
from smolcluster.run.resume import RunMeta, RunProgress, inherited_samples, kept_split
from smolcluster.training.rng import rng_state
from smolcluster.training.role import RunContext, TrainerRole
from smolcluster.training.strategy import DividesModel, Strategy
from smolcluster.training.trainer import MetricsSink, Progress, TrainResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankResult:
    """What a rank's run gave, the same on every rank.

    Attributes:
        run: values of summary.json that belong to the whole run.
        ranks: every rank's report, in rank order.
        stopped: somebody asked to stop before the last step.
        note: what else the user should know; on rank 0 only.
    """

    run: JsonObject
    ranks: list[JsonObject]
    stopped: bool
    note: str | None = None


def run_rank(
    parts: Parts,
    comm: Communicator,
    context: RunContext,
    *,
    checkpoints: Path | None = None,
    resume: Path | None = None,
    skip_nonfinite: bool = False,
    trace: Path | None = None,
    name: str | None = None,
    deliver: Callable[[Communicator], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> RankResult:
    """Train to the end and exchange the results. Blocks; every rank calls it.

    Args:
        parts: this rank's.
        comm: all ranks.
        context: where rows go, and how to stop.
        checkpoints: rank 0: where checkpoints are written; None: nowhere.
        resume: rank 0: the checkpoint to go on from; None: the run begins.
        skip_nonfinite: pass over updates that are not finite instead of stopping.
        trace: rank 0: the trace of all ranks; None: no trace is recorded.
        name: of this rank's machine, for the trace.
        deliver: brings the rows so far to the disk, so that no checkpoint is ahead of them. Called before each one and
            when training has ended, on every rank at the same point: it may communicate.
        say: rank 0: shows the user a line, such as which rank has which layers.
    """
    checkpoint = None if resume is None else open_checkpoint(resume)
    if checkpoint is not None and checkpoints is not None and checkpoint.path.parent.resolve() == checkpoints.resolve():
        discard_after(checkpoint.path)
    reader = SharedReader.open(comm, checkpoint)
    meta = None if reader is None else RunMeta.model_validate(reader.meta)
    restarts = 0 if meta is None else meta.restarts + 1
    if isinstance(comm, TcpCommunicator):
        kept = None if meta is None or meta.world_size != comm.world_size else meta.collectives
        comm.tune(None if kept is None else Plan.from_json(kept))
    saver = _Saver(parts, comm, checkpoints, restarts, deliver) if comm.exchange(checkpoints is not None)[0] else None
    recording = RunTrace(comm, trace, name or f"rank{comm.rank}") if comm.exchange(trace is not None)[0] else None
    assembly = assemble(
        parts,
        comm,
        save=None if saver is None else saver.save,
        start=None if reader is None or meta is None else _start(reader, meta, parts, comm),
        skip_nonfinite=skip_nonfinite,
        say=say,
    )
    if saver is not None:
        saver.split = assembly.split
    (optimizer,) = assembly.optimizers
    cluster = parts.config.cluster
    links = measure_links(comm, cluster.metrics_log_interval) if cluster.track_network_metrics else None
    strategy = assembly.strategy
    norms: GradientNorms | ReportedNorms | None = None
    if parts.config.training.track_gradients:
        if isinstance(strategy, DividesModel):
            norms = ReportedNorms(strategy.take_gradient_norms)
        else:
            norms = GradientNorms(strategy.model, optimizer)
    sink = ExtendedRows(context.metrics, parts, norms, links)
    logger.info("training rank=%d world_size=%d steps=%d", parts.rank, comm.world_size, assembly.steps)
    if recording is not None:
        OptimizerSpans(comm.telemetry, assembly.optimizers)
    with assembly.loader, recording or contextlib.nullcontext():
        result = TrainerRole(assembly.trainer).run(RunContext(sink, comm, context.stop))
    logger.info("trained rank=%d steps=%d stopped=%s", parts.rank, result.steps, result.stopped)
    if deliver is not None:
        deliver(comm)
    note = None if recording is None else recording.write()  # before the reports: its bytes count
    own, known = _report(assembly, result, comm)
    sha256 = comm.exchange(known)[0]
    reports = [report for report in comm.exchange(own) if isinstance(report, dict)]
    values = run_values(parts, _parameters(strategy), result, sha256) | {"restarts": restarts}
    return RankResult(values, reports, result.stopped, note)


def run_values(parts: Parts, parameters: int, result: TrainResult, sha256: JsonValue) -> JsonObject:
    """What summary.json says of the whole run, of a model of so many parameters."""
    return {
        "steps": result.steps,
        "samples": result.samples,
        "tokens": result.tokens,
        "wall_s": result.wall_s,
        "tokens_per_s": result.tokens / result.train_s if result.train_s > 0 else None,
        "train_loss": result.train_loss,
        "val_loss": result.val_loss,
        "val_accuracy": result.val_accuracy,
        "val_perplexity": result.val_perplexity if reads_text(parts.config) else None,
        "parameters": parameters,
        "weights_sha256": sha256,
    }


def _parameters(strategy: Strategy) -> int:
    if isinstance(strategy, DividesModel):
        return strategy.parameters
    return sum(param.numel() for param in strategy.model.parameters())


def _report(assembly: Assembly, result: TrainResult, comm: Communicator) -> tuple[JsonObject, str | None]:
    """What summary.json says of one rank; and the hash of the model, on rank 0 of a divided one."""
    strategy = assembly.strategy
    if isinstance(strategy, DividesModel):
        holds_whole = strategy.holds_whole_model
        sha256: str | None = _divided_sha256(strategy, comm) if not holds_whole else weights_sha256(strategy.model)
        # A rank that is alone has all of it, even where no module does.
        own_sha256 = sha256 if holds_whole or comm.world_size == 1 else None
        parameter_bytes, gradient_bytes, state_bytes = strategy.held_bytes()
    else:
        params = list(strategy.model.parameters())
        sha256 = own_sha256 = weights_sha256(strategy.model)
        parameter_bytes = held_bytes(params)
        gradient_bytes = held_bytes([param.grad for param in params if param.grad is not None])
        state_bytes = optimizer_bytes(assembly.optimizers)
    report: JsonObject = {
        "samples": result.rank_samples,
        "weights_sha256": own_sha256,
        "parameter_bytes": parameter_bytes,
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": state_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "sent_bytes": round(comm.telemetry.counter("link/sent_bytes")),
        "recv_bytes": round(comm.telemetry.counter("link/recv_bytes")),
    }
    return report, sha256


def _divided_sha256(strategy: DividesModel, comm: Communicator) -> str | None:
    """The hash of a model that no rank holds, tensor by tensor, on rank 0. Every rank calls it."""
    model = strategy.model
    firsts = {id(param): name for name, param in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    first_names = {name: firsts[id(param)] for name, param in every.items()}
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in every}

    def read(name: str) -> torch.Tensor | None:
        return others[name] if name in others else strategy.whole_parameter(name)

    sha256 = streamed_sha256(model, first_names, read)
    return sha256 if comm.rank == 0 else None


def optimizer_bytes(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of memory behind what the optimizers remember."""
    slots = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return held_bytes([value for value in slots if isinstance(value, torch.Tensor)])


def held_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of memory behind the tensors, each memory once: gradients are views into shared buckets."""
    storages = {(tensor.device, storage.data_ptr()): storage for tensor in tensors if (storage := _storage(tensor))}
    return sum(storage.nbytes() for storage in storages.values())


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.detach().untyped_storage()


def _start(reader: SharedReader, meta: RunMeta, parts: Parts, comm: Communicator) -> Start:
    """Where this rank goes on."""
    rank_samples = inherited_samples(meta, parts.config, comm.world_size)
    progress = Progress(**meta.progress.model_dump() | {"rank_samples": rank_samples[comm.rank]})
    split = kept_split(meta, parts.config, comm.world_size)
    return Start(reader, progress, meta.global_batch, meta.position, split)


class _Saver:
    """Writes checkpoints; every rank has one, since every rank holds a part of the state.

    Attributes:
        split: the layers of each stage, where layers are divided; known once they are.
    """

    def __init__(
        self,
        parts: Parts,
        comm: Communicator,
        folder: Path | None,
        restarts: int,
        deliver: Callable[[Communicator], None] | None,
    ) -> None:
        self._parts = parts
        self._comm = comm
        self._folder = folder
        self._restarts = restarts
        self._deliver = deliver
        self.split: Sequence[range] | None = None

    def save(self, strategy: Strategy, loader: BatchLoader, progress: Progress) -> None:
        """Write one; blocks until it is on the disk. Every rank calls it at the same step."""
        config, comm = self._parts.config, self._comm
        if self._deliver is not None:
            self._deliver(comm)
        shards = dict(strategy.state())
        if not config.checkpoint.save_optimizer:
            shards = {name: shard for name, shard in shards.items() if shard.kind != "optim"}
        shards |= rng_state(comm.rank, self._parts.device)
        meta = RunMeta(
            algorithm=config.algorithm,
            config=config,
            world_size=comm.world_size,
            global_batch=loader.global_batch,
            progress=RunProgress(**asdict(progress)),
            rank_samples=comm.exchange(progress.rank_samples),
            position=loader.position(),
            restarts=self._restarts,
            collectives=comm.plan.to_json() if isinstance(comm, TcpCommunicator) else None,
            layer_cuts=None if self.split is None else [0, *(stage.stop for stage in self.split)],
        )
        save_from_all_ranks(comm, self._folder, progress.steps, shards, meta.model_dump(mode="json"), self._confirm)
        if self._folder is not None:
            self._confirm()
            keep = config.checkpoint.keep
            if keep is not None and progress.is_drained:
                keep = max(keep, 2)  # a longer run goes on from the one before, in which the last gradients wait
            prune(self._folder, keep)
            logger.info("checkpoint written step=%d", progress.steps)

    def _confirm(self) -> None:
        """A rank that was suspended, and is lost to the others, writes nothing more."""
        if isinstance(self._comm, TcpCommunicator):
            self._comm.world.confirm()


class ExtendedRows:
    """A sink that adds what the trainer does not know to a rank's rows: the process, its links, each gradient."""

    def __init__(
        self,
        sink: MetricsSink,
        parts: Parts,
        norms: GradientNorms | ReportedNorms | None,
        links: LinkMetrics | SessionLinks | None,
    ) -> None:
        """Add to the rows that go to `sink`; without norms or links there is less to add."""
        self._sink = sink
        self._every = EverySteps(parts.config.cluster.metrics_log_interval)
        self._norms = norms
        self._usage = ProcessUsage(parts.device)
        self._links = links

    def write(self, row: JsonObject) -> None:
        step, row_time = row.get("step"), row.get("time")
        if isinstance(step, int) and self._every.is_due(step):
            row = row | self._usage.row()
        if self._links is not None and isinstance(step, int) and isinstance(row_time, float):
            row = row | self._links.row(step, row_time)
        if self._norms is not None:
            row = row | self._norms.row(row)
        self._sink.write(row)

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        self._sink.progress(done, total, row)
