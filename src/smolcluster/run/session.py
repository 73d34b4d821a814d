"""One rank from start to end, the same for all ways to start it: build, train, report what it gave."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from smolcluster.checkpoint.store import prune, save_weights
from smolcluster.collectives.base import Communicator
from smolcluster.config.schema import LANGUAGE_MODELS, Config
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.models.weights import weights_sha256
from smolcluster.monitoring.resources import ProcessUsage, peak_rss_bytes
from smolcluster.run.build import Assembly, Parts, assemble
from smolcluster.training.role import RunContext, TrainerRole
from smolcluster.training.trainer import MetricsSink, TrainResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankResult:
    """What a rank's run gave, the same on every rank.

    Attributes:
        run: values of summary.json that belong to the whole run.
        ranks: every rank's report, in rank order.
        stopped: somebody asked to stop before the last step.
    """

    run: JsonObject
    ranks: list[JsonObject]
    stopped: bool


def run_rank(
    parts: Parts,
    comm: Communicator,
    context: RunContext,
    *,
    checkpoints: Path | None = None,
    skip_nonfinite: bool = False,
    before_report: Callable[[Communicator], None] | None = None,
) -> RankResult:
    """Train to the end and exchange the results. Blocks; every rank calls it.

    Args:
        parts: this rank's.
        comm: all ranks.
        context: where rows go, and how to stop.
        checkpoints: where this rank writes checkpoints; None: it writes none.
        skip_nonfinite: pass over updates that are not finite instead of stopping.
        before_report: called when training has ended, on every rank at the same point: it may communicate.
    """
    save = None if checkpoints is None else _saving(parts.config, checkpoints)
    assembly = assemble(parts, comm, save=save, skip_nonfinite=skip_nonfinite)
    sink = _Extended(context.metrics, parts, assembly.strategy.model)
    logger.info("training rank=%d world_size=%d steps=%d", parts.rank, comm.world_size, parts.steps)
    with assembly.loader:
        result = TrainerRole(assembly.trainer).run(RunContext(sink, comm, context.stop))
    logger.info("trained rank=%d steps=%d stopped=%s", parts.rank, result.steps, result.stopped)
    if before_report is not None:
        before_report(comm)
    reports = [report for report in comm.exchange(_report(assembly, result, comm)) if isinstance(report, dict)]
    return RankResult(_run_values(parts, assembly, result, reports), reports, result.stopped)


def _run_values(parts: Parts, assembly: Assembly, result: TrainResult, reports: Sequence[JsonObject]) -> JsonObject:
    is_text = parts.config.model.type in LANGUAGE_MODELS
    return {
        "steps": result.steps,
        "samples": result.samples,
        "tokens": result.tokens,
        "wall_s": result.wall_s,
        "tokens_per_s": result.tokens / result.train_s if result.train_s > 0 else None,
        "train_loss": result.train_loss,
        "val_loss": result.val_loss,
        "val_accuracy": result.val_accuracy,
        "val_perplexity": result.val_perplexity if is_text else None,
        "parameters": sum(param.numel() for param in assembly.strategy.model.parameters()),
        "weights_sha256": reports[0]["weights_sha256"],
    }


def _report(assembly: Assembly, result: TrainResult, comm: Communicator) -> JsonObject:
    """What summary.json says of one rank."""
    model = assembly.strategy.model
    params = list(model.parameters())
    grads = [param.grad for param in params if param.grad is not None]
    state = [
        value
        for optimizer in assembly.optimizers
        for slots in optimizer.state.values()
        for value in slots.values()
        if isinstance(value, torch.Tensor)
    ]
    return {
        "samples": result.rank_samples,
        "weights_sha256": weights_sha256(model),
        "parameter_bytes": _held_bytes(params),
        "gradient_bytes": _held_bytes(grads),
        "optimizer_bytes": _held_bytes(state),
        "peak_rss_bytes": peak_rss_bytes(),
        "sent_bytes": round(comm.telemetry.counter("link/sent_bytes")),
        "recv_bytes": round(comm.telemetry.counter("link/recv_bytes")),
    }


def _held_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of memory behind the tensors, each memory once: gradients are views into shared buckets."""
    storages = {(tensor.device, storage.data_ptr()): storage for tensor in tensors if (storage := _storage(tensor))}
    return sum(storage.nbytes() for storage in storages.values())


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.detach().untyped_storage()


def _saving(config: Config, checkpoints: Path) -> Callable[[int, nn.Module], None]:
    meta: JsonObject = {"algorithm": config.algorithm, "config": config.model_dump(mode="json")}

    def save(step: int, model: nn.Module) -> None:
        path = save_weights(checkpoints, step, model.state_dict(), meta)
        prune(checkpoints, config.checkpoint.keep)
        logger.info("checkpoint written step=%d path=%s", step, path)

    return save


class _Extended:
    """A sink that adds to a rank's rows what the trainer does not know: the process, and each parameter's gradient."""

    def __init__(self, sink: MetricsSink, parts: Parts, model: nn.Module) -> None:
        self._sink = sink
        self._interval = parts.config.cluster.metrics_log_interval
        self._model = model if parts.config.training.track_gradients else None
        self._device = parts.device
        self._usage = ProcessUsage()

    def write(self, row: JsonObject) -> None:
        step = row.get("step")
        if isinstance(step, int) and step % self._interval == 0:
            row = row | self._usage.row()
            if self._device.type == "cuda":
                row["sys/gpu_memory_bytes"] = torch.cuda.memory_allocated(self._device)
        if self._model is not None and isinstance(row.get("train/grad_norm"), float):
            row = row | _gradient_norms(self._model, row["train/grad_norm"])
        self._sink.write(row)

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        self._sink.progress(done, total, row)


def _gradient_norms(model: nn.Module, true_norm: JsonValue) -> JsonObject:
    """`grad_norm/<parameter>` before clipping. By now the gradients are clipped: the global norm tells by how much."""
    norms = {name: param.grad.norm().item() for name, param in model.named_parameters() if param.grad is not None}
    total = math.hypot(*norms.values())
    factor = true_norm / total if isinstance(true_norm, float) and total > 0 else 1.0
    return {f"grad_norm/{name}": norm * factor for name, norm in norms.items()}
