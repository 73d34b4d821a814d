"""A run over a parameter server, from start to end: the server's process and a worker's, however they were started."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from smolcluster.checkpoint import disk
from smolcluster.checkpoint.ledger import LEDGER, Ledger, read_ledger
from smolcluster.checkpoint.reader import Checkpoint
from smolcluster.checkpoint.store import discard_after, open_checkpoint, prune, save_checkpoint
from smolcluster.cluster.sessions import Newcomer, Reception, SessionWorld, join_session
from smolcluster.collectives.codec import codec_for
from smolcluster.collectives.flat import FlatLayout
from smolcluster.collectives.param_server import ServerPort, Worker
from smolcluster.collectives.param_worker import WorkerPort
from smolcluster.config.schema import resolved_batch_size
from smolcluster.data.loader import eval_batches
from smolcluster.data.sampler import Sampler
from smolcluster.data.source import MemoryData
from smolcluster.errors import CheckpointError, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.models.weights import weights_sha256
from smolcluster.monitoring.gradients import GradientNorms
from smolcluster.monitoring.links import SessionLinks
from smolcluster.monitoring.resources import peak_rss_bytes
from smolcluster.monitoring.session_trace import ServerTrace, WorkerTrace
from smolcluster.monitoring.trace import OptimizerSpans
from smolcluster.run.build import (
    Parts,
    ServerParts,
    assemble_server,
    assemble_worker,
    counts_pushes,
    planned_global_batches,
    planned_steps,
)
from smolcluster.run.replay import APPLICATIONS, log_head
from smolcluster.run.resume import RunMeta, RunProgress
from smolcluster.run.session import ExtendedRows, RankResult, held_bytes, optimizer_bytes, run_values
from smolcluster.run.support import min_ranks
from smolcluster.telemetry import Telemetry
from smolcluster.training.flat import constants, trained
from smolcluster.training.leased import LeasedBatches
from smolcluster.training.role import RunContext, TrainerRole
from smolcluster.training.server import REPORT_PATIENCES, Crew, ServerRole
from smolcluster.training.step import EvalSums, evaluate_batch, prepare_model
from smolcluster.training.trainer import Progress, Trainer, TrainResult
from smolcluster.transport.base import Listener, Network

logger = logging.getLogger(__name__)

GENERATION = "generation.json"
# A worker goes on as long as the server lends to it; no number of its own ends it.
NO_END = 1 << 62
# A server that is gone is looked for so many patiences: somebody has to start it again, and it has to import torch.
SEARCH_PATIENCES = 60
# Workers send their traces before their last word: so many patiences are these waited for then.
TRACE_PATIENCES = 12


def run_server(
    parts: Parts,
    listeners: Sequence[Listener],
    names: Sequence[str],
    context: RunContext,
    *,
    options: Mapping[str, str],
    folder: Path,
    resume: Path | None = None,
    restarts: int = 0,
    skip_nonfinite: bool = False,
    trace: Path | None = None,
    deliver: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
    opened: Callable[[Worker, SessionWorld], None] | None = None,
    ended: Callable[[], SmolError | None] | None = None,
) -> RankResult:
    """Serve the workers of a run to its end. Blocks.

    Args:
        parts: the server's.
        listeners: where workers knock; closed at the end.
        names: of all ranks, the server's first.
        context: where rows go, and how to stop.
        options: settings that the workers must have too.
        folder: the run folder.
        resume: the checkpoint to go on from; None: the run begins.
        restarts: how often the server was started before by whoever starts it again; without that, and with a
            checkpoint, what that says counts.
        skip_nonfinite: pass over updates that are not finite instead of stopping.
        trace: the trace of the server and all workers; None: no trace is recorded.
        deliver: brings the rows so far to the disk; called before each checkpoint and at the end.
        note: shows the user a line.
        opened: called with each new session, before anything is received in it.
        ended: asked now and then what has ended the run from outside; None: nothing.
    """
    config = parts.config
    checkpoint = None if resume is None else open_checkpoint(resume)
    checkpoints = folder / "checkpoints"
    if checkpoint is not None and checkpoint.path.parent.resolve() == checkpoints.resolve():
        discard_after(checkpoint.path)
    meta = None if checkpoint is None else RunMeta.model_validate(checkpoint.meta)
    position = _Position.begin() if meta is None else _Position.of(meta)
    ledger = _open_log(folder / LEDGER, checkpoint, position.ledger_lines)
    applications = None
    if config.algorithm == "edp":
        applications = _open_log(folder / APPLICATIONS, checkpoint, position.application_lines)
        kept = parts.global_batch if meta is None else meta.global_batch
        head = log_head(config, kept, planned_global_batches(parts, kept))
        heads = [line for line in read_ledger(folder / APPLICATIONS) if line.get("event") == "run"]
        if heads[-1:] != [head]:
            applications.append([head])
    generations = _Generations(folder / GENERATION, names[0])
    model = prepare_model(parts.model, config.training.precision, parts.device)
    telemetry = Telemetry()
    recording = None if trace is None else ServerTrace(telemetry, trace, names[0])

    links = _links(parts)

    def session_opened(worker: Worker, world: SessionWorld) -> None:
        if links is not None:
            links.open(world)
        if recording is not None:
            recording.open(world)
        if opened is not None:
            opened(worker, world)

    port = ServerPort(
        names,
        FlatLayout(trained(model)),
        patience=config.cluster.patience,
        constants=constants(model),
        codec=codec_for(config.cluster.compression),
        generation=max(position.generation, generations.last),
        record=generations.record,
        telemetry=telemetry,
        opened=session_opened,
    )
    global_batch = parts.global_batch if meta is None else meta.global_batch
    built = assemble_server(parts, port, global_batch=global_batch, skip_nonfinite=skip_nonfinite)
    if checkpoint is not None:
        built.rule.load_state(checkpoint)
        built.pool.load_state(position.pool)
    samples = [0] * len(names) if meta is None else _fitted(meta.rank_samples, len(names))
    restarts = max(restarts, 0 if meta is None else meta.restarts + 1)
    saver = _Saver(parts, built, port, ledger, applications, checkpoints, samples, restarts, len(names), deliver)
    role = ServerRole(
        built.rule,
        port,
        workers=len(names) - 1,
        min_workers=min_ranks(config, len(names)) - 1,
        patience=config.cluster.patience,
        planned_steps=planned_steps(parts, global_batch),
        ledger=ledger,
        applications=applications,
        evaluate=lambda model: _evaluate(parts, model),
        evaluates_beside=counts_pushes(config),
        eval_steps=config.training.eval_steps,
        checkpoint=saver.save,
        checkpoint_steps=config.checkpoint.steps,
        start=None if meta is None else Progress(**meta.progress.model_dump()),
        note=note,
        ended=ended,
        rank_samples=samples,
        report_patiences=REPORT_PATIENCES if recording is None else TRACE_PATIENCES,
    )
    reception = Reception(
        listeners,
        name=names[0],
        patience=config.cluster.patience,
        options=options,
        grant=port.grant,
        begin=port.begin,
        revoke=port.revoke,
    )
    with contextlib.ExitStack() as closing:
        closing.callback(ledger.close)
        if applications is not None:
            closing.callback(applications.close)
        closing.callback(port.close)
        closing.callback(reception.close)
        (optimizer,) = built.optimizers
        if recording is not None:
            OptimizerSpans(telemetry, built.optimizers)
            closing.enter_context(recording)
        norms = GradientNorms(model, optimizer) if parts.config.training.track_gradients else None
        rows = ExtendedRows(context.metrics, parts, norms, links)
        result = role.run(RunContext(rows, None, context.stop))
    if deliver is not None:
        deliver()
    shown = None if recording is None else recording.write()
    return _server_result(parts, built, port, result, role.crew, samples, restarts, shown)


def run_worker(
    parts: Parts,
    network: Network,
    server_address: Callable[[], str],
    name: str,
    context: RunContext,
    *,
    run_id: str,
    address: str,
    options: Mapping[str, str],
    attach: Callable[[WorkerPort], None] | None = None,
    began: Callable[[SessionWorld], None] | None = None,
) -> TrainResult:
    """Compute what the server lends, to the end of the run. Blocks.

    Args:
        parts: this worker's.
        network: how to dial.
        server_address: where the server is now.
        name: this worker's machine.
        context: where rows go, and how to stop.
        run_id: what the machines have in common before they talk.
        address: `tcp://host:port` of this machine; nobody has to be able to reach it.
        options: settings that must be the server's.
        attach: called with the port, whose `abort` ends this worker from any thread.
        began: called with each new session.
    """
    config = parts.config
    patience = config.cluster.patience
    newcomer = Newcomer(parts.rank, name, secrets.token_hex(8), address)
    model = prepare_model(parts.model, config.training.precision, parts.device)

    def connect(ended: Callable[[], SmolError | None]) -> SessionWorld:
        return join_session(
            newcomer,
            network,
            server_address,
            run_id=run_id,
            patience=patience,
            timeout=SEARCH_PATIENCES * patience,
            options=options,
            ended=ended,
        )

    telemetry = Telemetry()
    trace = WorkerTrace(telemetry, parts.rank, name)
    links = _links(parts)

    def session_began(world: SessionWorld) -> None:
        if links is not None:
            links.open(world)
        trace.begin(world)
        if began is not None:
            began(world)

    port = WorkerPort(
        parts.rank,
        connect,
        FlatLayout(trained(model)),
        constants=constants(model),
        codec=codec_for(config.cluster.compression),
        telemetry=telemetry,
        began=session_began,
        spans_by_lease=counts_pushes(config),
    )
    if attach is not None:
        attach(port)
    assert isinstance(parts.data, MemoryData), "check_supported refuses streams"
    sampler = Sampler(len(parts.data.train), parts.global_batch, config.cluster.seed)
    batches = LeasedBatches(port, parts.data.train, sampler, config.training.micro_batches)
    trainer = Trainer(assemble_worker(parts, port), batches, NO_END, endpoint=port)
    try:
        rows = ExtendedRows(context.metrics, parts, None, links)
        result = TrainerRole(trainer).run(RunContext(rows, None, context.stop))
        port.last_word(trace.send)
        port.report(_worker_report(parts, port))
        return result
    finally:
        port.close()


def _links(parts: Parts) -> SessionLinks | None:
    """What measures them, if it is wanted."""
    cluster = parts.config.cluster
    return SessionLinks(cluster.metrics_log_interval) if cluster.track_network_metrics else None


@dataclass(frozen=True, slots=True)
class _Position:
    """Where a checkpoint's data goes on.

    Attributes:
        pool: the sample pool's state.
        ledger_lines: lines of the ledger.
        application_lines: lines of the application log.
        generation: the last one.
    """

    pool: JsonObject
    ledger_lines: int
    application_lines: int
    generation: int

    @classmethod
    def begin(cls) -> _Position:
        return cls({}, 0, 0, 0)

    @classmethod
    def of(cls, meta: RunMeta) -> _Position:
        """Raises CheckpointError: it was written by another kind of run."""
        match meta.position:
            case {
                "pool": dict(pool),
                "ledger_lines": int(lines),
                "application_lines": int(applications),
                "generation": int(generation),
            } if lines >= 0 and applications >= 0:
                return cls(pool, lines, applications, generation)
        raise CheckpointError(
            f"the checkpoint's data position {meta.position} is none of a parameter server. Resume with the algorithm "
            f"of the run that wrote it, {meta.algorithm}"
        )


class _Generations:
    """Writes `generation.json` whenever the membership changes: number, leader, members. Thread-safe by its caller."""

    def __init__(self, path: Path, server: str) -> None:
        self._path = path
        self._server = server
        self.last = 0
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            self.last = int(json.loads(path.read_text(encoding="utf-8"))["generation"])

    def record(self, generation: int, workers: Sequence[Worker]) -> None:
        """On the disk before it returns: no step of a generation is made before."""
        members = [{"rank": 0, "name": self._server, "session": 0}]
        members += [{"rank": w.rank, "name": w.name, "session": w.session} for w in workers]
        text = json.dumps({"generation": generation, "leader": 0, "members": members}, indent=2) + "\n"
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            disk.write_text(temporary, text)
            disk.sync_file(temporary)
            os.replace(temporary, self._path)
            disk.sync_folder(self._path.parent)
        except OSError as exc:  # a full disk ends the run where the ledger is written, not on a session's thread
            logger.error("generation not written path=%s reason=%s", self._path, exc)


class _Saver:
    """Writes the server's checkpoints."""

    def __init__(
        self,
        parts: Parts,
        built: ServerParts,
        port: ServerPort,
        ledger: Ledger,
        applications: Ledger | None,
        folder: Path,
        rank_samples: list[int],
        restarts: int,
        world_size: int,
        deliver: Callable[[], None] | None,
    ) -> None:
        self._parts = parts
        self._built = built
        self._port = port
        self._ledger = ledger
        self._applications = applications
        self._folder = folder
        self._rank_samples = rank_samples
        self._restarts = restarts
        self._world_size = world_size
        self._deliver = deliver

    def save(self, progress: Progress) -> None:
        """Write one; blocks until it is on the disk."""
        config = self._parts.config
        if self._deliver is not None:
            self._deliver()
        shards = dict(self._built.rule.state())
        if not config.checkpoint.save_optimizer:
            shards = {name: shard for name, shard in shards.items() if shard.kind != "optim"}
        meta = RunMeta(
            algorithm=config.algorithm,
            config=config,
            world_size=self._world_size,
            global_batch=self._built.pool.global_batch,
            progress=RunProgress(**asdict(progress)),
            rank_samples=self._rank_samples,
            position={
                "pool": self._built.pool.state(),
                "ledger_lines": self._ledger.lines,
                "application_lines": 0 if self._applications is None else self._applications.lines,
                "generation": self._port.generation(),
            },
            restarts=self._restarts,
        )
        save_checkpoint(self._folder, progress.steps, shards, meta.model_dump(mode="json"))
        prune(self._folder, config.checkpoint.keep)
        logger.info("checkpoint written step=%d", progress.steps)


def _open_log(path: Path, checkpoint: Checkpoint | None, lines: int) -> Ledger:
    """A ledger up to the checkpoint; copied where the run goes on in another folder."""
    if checkpoint is not None and lines:
        source = checkpoint.path.parent.parent / path.name
        if source.is_file() and not (path.exists() and source.samefile(path)):
            shutil.copyfile(source, path)
    return Ledger(path, lines)


def _fitted(samples: Sequence[int], count: int) -> list[int]:
    """Samples by rank for another number of ranks; those of ranks that are no more count as the server's."""
    fitted = [*samples[:count], *[0] * (count - len(samples))]
    fitted[0] += sum(samples[count:])
    return fitted


def _evaluate(parts: Parts, model: nn.Module) -> EvalSums:
    """The whole validation split."""
    sums = EvalSums(0.0, 0, 0, 0)
    for batch in eval_batches(parts.data.validation, resolved_batch_size(parts.config)):
        sums = sums + evaluate_batch(model, batch, parts.config.training.precision, parts.device)
    return sums


def _server_result(
    parts: Parts,
    built: ServerParts,
    port: ServerPort,
    result: TrainResult,
    crew: Crew,
    rank_samples: Sequence[int],
    restarts: int,
    note: str | None,
) -> RankResult:
    model = built.rule.model
    sha256 = weights_sha256(model)
    own: JsonObject = {
        "weights_sha256": sha256,
        "parameter_bytes": held_bytes(list(model.parameters())),
        "gradient_bytes": held_bytes([p.grad for p in model.parameters() if p.grad is not None]),
        "optimizer_bytes": optimizer_bytes(built.optimizers),
        "peak_rss_bytes": peak_rss_bytes(),
        "sent_bytes": round(port.telemetry.counter("link/sent_bytes")),
        "recv_bytes": round(port.telemetry.counter("link/recv_bytes")),
    }
    reports = [own, *(crew.reports.get(rank, {}) for rank in range(1, len(rank_samples)))]
    ranks = [report | {"samples": samples} for report, samples in zip(reports, rank_samples, strict=True)]
    values: JsonObject = {
        **run_values(parts, sum(param.numel() for param in model.parameters()), result, sha256),
        "restarts": restarts,
    }
    values["lost_ranks"], values["joined_ranks"] = [*sorted(crew.lost)], [*sorted(crew.joined)]
    return RankResult(values, ranks, result.stopped, note)


def _worker_report(parts: Parts, port: WorkerPort) -> JsonObject:
    model = parts.model
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    return {
        "weights_sha256": weights_sha256(model),
        "parameter_bytes": held_bytes(list(model.parameters())),
        "gradient_bytes": held_bytes(grads),
        "optimizer_bytes": 0,
        "peak_rss_bytes": peak_rss_bytes(),
        "sent_bytes": round(port.telemetry.counter("link/sent_bytes")),
        "recv_bytes": round(port.telemetry.counter("link/recv_bytes")),
    }
