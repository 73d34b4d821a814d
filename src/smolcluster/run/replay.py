"""`single --replay RUN`: repeat a run over a parameter server from its application log, in one process.

The log says of every update whose gradients it was made of, of which samples, and on which version of the weights each
was computed; and which versions were sent to whom. That is all there is to an asynchronous run: whoever computes the
same gradients on the same weights, and applies them in the same order, gets the same weights (in float64 to 1e-11).

This is written as plainly as `single`: it knows the rule of edp, and none of its code.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from smolcluster.checkpoint.ledger import read_ledger
from smolcluster.checkpoint.store import load_weights
from smolcluster.collectives.base import Codec
from smolcluster.collectives.codec import Int8Codec, codec_for
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config, reads_text, resolved_batch_size
from smolcluster.data.loader import eval_batches
from smolcluster.data.sampler import Sampler
from smolcluster.data.source import MemoryData
from smolcluster.errors import CheckpointError
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.models.weights import weights_sha256
from smolcluster.monitoring.reporters import Reporter
from smolcluster.run.build import prepare
from smolcluster.run.folder import Ran, RunFolder
from smolcluster.training.leased import leased_batches, seed_for
from smolcluster.training.optim import OptimizerFactory, optimizer_factory
from smolcluster.training.schedule import LrSchedule, lr_schedule
from smolcluster.training.step import (
    EvalSums,
    StepResult,
    clip_gradients,
    count_targets,
    evaluate_batch,
    forward_backward,
    prepare_model,
)
from smolcluster.training.trainer import evaluation_numbers, json_number

APPLICATIONS = "applications.jsonl"


class Head(BaseModel):
    """What the updates after it have in common: the first line, and one for a resumed run whose settings are others."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    global_batch: int = Field(ge=1)
    schedule_steps: int = Field(ge=0)
    settings: dict[str, dict[str, object]] = {}


class _Part(BaseModel):
    """One lease's gradient within a push."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    lease: int
    base: int
    ranges: tuple[tuple[int, int, int], ...]


class _Push(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    session: int
    rank: int
    scale: float
    parts: tuple[_Part, ...]


class _Sent(BaseModel):
    """Weights went to a worker."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    session: int
    version: int


class _Gathered(BaseModel):
    """What was pushed for a step before a checkpoint that has only the sum."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    pushes: tuple[_Push, ...]


class UpdateLine(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    pushes: tuple[_Push, ...]
    samples: int
    tau: int | None
    lr: float
    applied: bool


@dataclass(slots=True)
class _Session:
    """One worker's connection, as the server had it.

    Attributes:
        has: with a codec, the weights that the worker has, of each dtype.
        lost: with a codec, what its pushes have lost so far.
        versions: the weights that were sent, by version, as the worker got them; kept as long as they are needed.
    """

    has: list[Tensor] = field(default_factory=list)
    lost: list[Tensor] = field(default_factory=list)
    versions: dict[int, list[Tensor]] = field(default_factory=dict)


class Replay:
    """Repeats a run, update by update."""

    def __init__(
        self,
        run: Path,
        config: Config,
        data: MemoryData,
        model: nn.Module,
        optimizer_factory: OptimizerFactory,
        make_schedule: Callable[[Config, int], LrSchedule],
    ) -> None:
        """Read the log.

        Args:
            run: the run folder.
            config: of that run.
            data: what it trained on.
            model: initialised as it was.
            optimizer_factory: as its server's.
            make_schedule: from settings, and the run's length in global batches, to its learning rates.

        Raises:
            CheckpointError: it has no application log, or one that is damaged.
        """
        head, *events = _read(run / APPLICATIONS)
        assert isinstance(head, Head), "`_read` has checked it"
        self.model = prepare_model(model, config.training.precision, "cpu")
        self._config = config
        self._data = data
        self._sampler = Sampler(len(data.train), head.global_batch, config.cluster.seed)
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._optimizer = optimizer_factory(self._params)
        self._make_schedule = make_schedule
        self._global_batch = head.global_batch
        self.follow(head)
        self._events = events
        self._needed = Counter(
            (push.session, part.base)
            for event in self._events
            if isinstance(event, UpdateLine)
            for push in event.pushes
            for part in push.parts
        )
        self._sessions: dict[int, _Session] = {}
        self._samples = 0

    @property
    def updates(self) -> int:
        """How many the log has."""
        return sum(isinstance(event, UpdateLine) for event in self._events)

    def run(self) -> Iterator[StepResult]:
        """Make the updates; the result of each."""
        for event in self._events:
            if isinstance(event, _Sent):
                self._send(event)
            elif isinstance(event, Head):
                self.follow(event)
            else:
                yield self._apply(event)

    def follow(self, head: Head) -> None:
        """What comes now was made with these settings."""
        sections = {
            name: getattr(self._config, name).model_copy(update=values) for name, values in head.settings.items()
        }
        self._config = config = self._config.model_copy(update=sections)
        self._lr_schedule = self._make_schedule(config, head.schedule_steps)
        self._codec = codec_for(config.cluster.compression)
        for group in self._optimizer.param_groups:
            group["weight_decay"] = config.training.weight_decay

    def _send(self, sent: _Sent) -> None:
        """A worker gets the weights of now: whole the first time, with a codec the encoded change later."""
        session = self._sessions.setdefault(sent.session, _Session())
        flats = self._flatten([param.detach() for param in self._params])
        if self._codec is None or not session.has:
            session.has = flats
        else:
            for has, flat in zip(session.has, flats, strict=True):
                has.add_(_through(self._codec, flat - has))
        if self._needed[sent.session, sent.version]:
            session.versions[sent.version] = [flat.clone() for flat in session.has]

    def _apply(self, update: UpdateLine) -> StepResult:
        total: list[Tensor] = []
        has_gradient = [False] * len(self._params)
        loss_sum, count, first_scale = 0.0, 0, 1.0
        for push in update.pushes:
            flats, push_loss, push_count, scale, present = self._gradient(push)
            if not total:
                total, first_scale = flats, scale
            else:
                for flat, other in zip(total, flats, strict=True):
                    flat.add_(other, alpha=first_scale / scale)
            loss_sum, count = loss_sum + push_loss, count + push_count
            has_gradient = [known or new for known, new in zip(has_gradient, present, strict=True)]

        for param, grad, is_known in zip(self._params, self._parts(total), has_gradient, strict=True):
            param.grad = grad.clone() if is_known else None
        norm = clip_gradients(self._params, self._config.training.grad_clip_norm, 1.0 / (first_scale * max(count, 1)))
        lr = self.learning_rate(update)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if update.applied:
            self._optimizer.step()
        self._samples += update.samples
        loss = loss_sum / max(count, 1)
        return StepResult(update.step, loss, count, update.samples, norm, lr, update.applied)

    def learning_rate(self, update: UpdateLine) -> float:
        """edp's rule; without a staleness (K = 0) the schedule's own."""
        if update.tau is None:
            return self._lr_schedule(update.step)
        part = update.samples / self._global_batch
        return self._lr_schedule(self._samples // self._global_batch) * part / (1 + update.tau)

    def _gradient(self, push: _Push) -> tuple[list[Tensor], float, int, float, list[bool]]:
        """A push: (flat gradients as the server got them, loss sum, targets, scale, which parameters have one)."""
        session = self._sessions[push.session]
        current = [param.detach().clone() for param in self._params]
        flats: list[Tensor] = []
        present = [False] * len(self._params)
        loss_sum, count, scale = 0.0, 0, push.scale
        for part in push.parts:
            self._load(session.versions[part.base])
            self._needed[push.session, part.base] -= 1
            if not self._needed[push.session, part.base]:
                del session.versions[part.base]
            seed_for(self._sampler.seed, part.ranges)
            micro_batches = self._config.training.micro_batches
            batches = leased_batches(self._data.train, self._sampler, part.ranges, micro_batches)
            targets = count_targets(batches)
            part_scale = push.scale if len(push.parts) == 1 else 1.0 / max(targets, 1)
            for param in self._params:
                param.grad = None
            loss_sum += float(forward_backward(self.model, batches, part_scale, self._config.training.precision))
            count += targets
            grads = self._flatten([param.grad for param in self._params])
            if not flats:
                flats, scale = grads, part_scale
            else:
                for flat, other in zip(flats, grads, strict=True):
                    flat.add_(other, alpha=scale / part_scale)
            present = [known or param.grad is not None for known, param in zip(present, self._params, strict=True)]
        with torch.no_grad():
            for param, weights in zip(self._params, current, strict=True):
                param.copy_(weights)
        if self._codec is not None:
            flats = self._encoded(session, flats)
        return flats, loss_sum, count, scale, present

    def _encoded(self, session: _Session, flats: list[Tensor]) -> list[Tensor]:
        """What the server decoded: the gradient and what earlier pushes had lost, through the codec."""
        assert self._codec is not None
        if not session.lost:
            session.lost = [torch.zeros_like(flat) for flat in flats]
        decoded = []
        for flat, lost in zip(flats, session.lost, strict=True):
            data = torch.empty(self._codec.encoded_nbytes(flat.numel()), dtype=torch.uint8)
            out = torch.empty_like(flat)
            if isinstance(self._codec, Int8Codec):
                self._codec.encode_with_feedback(flat, lost, data)
                self._codec.decode(data, out)
            else:
                lost.add_(flat)
                self._codec.encode(lost, data)
                self._codec.decode(data, out)
                lost.sub_(out)
                lost.masked_fill_(~torch.isfinite(lost), 0.0)
            decoded.append(out)
        return decoded

    @torch.no_grad()
    def _load(self, flats: Sequence[Tensor]) -> None:
        for param, weights in zip(self._params, self._parts(flats), strict=True):
            param.copy_(weights)

    def _dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(param.dtype for param in self._params))

    def _flatten(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """One flat tensor for each dtype, in the order of parameters; zeros for None."""
        return [
            torch.cat(
                [
                    torch.zeros(param.numel(), dtype=dtype) if tensor is None else tensor.reshape(-1)
                    for param, tensor in zip(self._params, tensors, strict=True)
                    if param.dtype == dtype
                ]
            )
            for dtype in self._dtypes()
        ]

    def _parts(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Views into flat tensors, for each parameter."""
        places = dict.fromkeys(self._dtypes(), 0)
        of_dtype = dict(zip(self._dtypes(), flats, strict=True))
        parts = []
        for param in self._params:
            start = places[param.dtype]
            places[param.dtype] += param.numel()
            parts.append(of_dtype[param.dtype][start : start + param.numel()].view(param.shape))
        return parts


def _through(codec: Codec, tensor: Tensor) -> Tensor:
    """What arrives of `tensor`."""
    data, out = torch.empty(codec.encoded_nbytes(tensor.numel()), dtype=torch.uint8), torch.empty_like(tensor)
    codec.encode(tensor, data)
    codec.decode(data, out)
    return out


def _read(path: Path) -> list[Head | _Sent | UpdateLine]:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {APPLICATIONS}: only runs of edp write one. Give the folder of such a run to "
            "--replay"
        )
    try:
        lines = _with_gathered([_parse(line) for line in read_ledger(path)])
        _check_versions(lines)
    except (ValidationError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({first}). Copy it anew from where the run was made") from error
    if not lines or not isinstance(lines[0], Head):
        raise CheckpointError(f"{path} does not begin with a run's description. Copy it anew from where it was made")
    return lines


def _check_versions(lines: Sequence[Head | _Sent | UpdateLine]) -> None:
    """Raises ValueError: an update names weights that were not sent."""
    sent: set[tuple[int, int]] = set()
    for line in lines:
        if isinstance(line, _Sent):
            sent.add((line.session, line.version))
        elif isinstance(line, UpdateLine):
            for push in line.pushes:
                for part in push.parts:
                    if (push.session, part.base) not in sent:
                        raise ValueError(f"update {line.step} is of weights {part.base}, which nobody was sent")


def _with_gathered(lines: Sequence[Head | _Sent | _Gathered | UpdateLine]) -> list[Head | _Sent | UpdateLine]:
    """Each update with its pushes, also where they came before the checkpoint that the run went on from."""
    gathered: dict[int, tuple[_Push, ...]] = {}
    whole: list[Head | _Sent | UpdateLine] = []
    for line in lines:
        if isinstance(line, _Gathered):
            gathered[line.step] = line.pushes
        elif isinstance(line, UpdateLine) and not line.pushes:
            whole.append(line.model_copy(update={"pushes": gathered[line.step]}))
        else:
            whole.append(line)
    return whole


def _parse(line: JsonObject) -> Head | _Sent | _Gathered | UpdateLine:
    kinds: dict[JsonValue, type[Head] | type[_Sent] | type[_Gathered] | type[UpdateLine]] = {
        "run": Head,
        "weights": _Sent,
        "gathered": _Gathered,
        "update": UpdateLine,
    }
    return kinds[line.get("event")].model_validate(line)


def run_replay(run: Path, out: Path, reporter: Reporter) -> Ran:
    """Repeat the run of the folder `run`, and write a run folder of its own; blocks.

    Raises:
        CheckpointError: `run` is no folder of such a run.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"--replay {run}: there is no run folder. Give the folder of a run of edp")
    config = load_config(files=[run / "config.yaml"]).config
    alone = config.model_copy(update={"algorithm": "single", "backend": "tcp"})
    parts = prepare(alone, 0, ["rank0"])
    assert isinstance(parts.data, MemoryData), "edp refuses streams"
    training = config.training
    replay = Replay(
        run,
        config,
        parts.data,
        parts.model,
        optimizer_factory(training.optimizer, training.learning_rate, training.weight_decay),
        schedule_of,
    )
    with RunFolder(out, alone, 1, reporter) as folder:
        began = time.monotonic()
        steps, samples, tokens, last = 0, 0, 0, None
        for result in replay.run():
            last, steps = result, steps + 1
            samples, tokens = samples + result.samples, tokens + result.count
            row: JsonObject = {
                "time": time.time(),
                "rank": 0,
                "step": result.step,
                "train/loss": json_number(result.loss),
                "train/grad_norm": json_number(result.grad_norm),
                "train/lr": result.lr,
                "train/samples": result.samples,
            }
            folder.write(row)
            folder.progress(steps, replay.updates, row)
        sums = EvalSums(0.0, 0, 0, 0)
        for batch in eval_batches(parts.data.validation, resolved_batch_size(config)):
            sums = sums + evaluate_batch(replay.model, batch, training.precision)
        loss, accuracy, perplexity = evaluation_numbers(sums)
        folder.write({"time": time.time(), "rank": 0, "step": steps - 1, "val/loss": loss, "val/accuracy": accuracy})
        wall_s, sha256 = time.monotonic() - began, weights_sha256(replay.model)
        values: JsonObject = {
            "steps": steps, "samples": samples, "tokens": tokens, "wall_s": wall_s, "tokens_per_s": tokens / wall_s,
            "train_loss": None if last is None else json_number(last.loss), "val_loss": loss,
            "val_accuracy": accuracy, "val_perplexity": perplexity if reads_text(config) else None,
            "parameters": sum(param.numel() for param in replay.model.parameters()), "weights_sha256": sha256,
        }  # fmt: skip
        summary = folder.finish(values, [{"samples": samples, "weights_sha256": sha256}])
        folder.note(_comparison(run, replay.model, steps))
    return Ran(0, out, summary)


def log_head(config: Config, global_batch: int, schedule_steps: int) -> JsonObject:
    """The line of the log that says what the updates after it have in common."""
    return {
        "event": "run",
        "global_batch": global_batch,
        "schedule_steps": schedule_steps,
        "settings": {
            "training": config.training.model_dump(
                mode="json", include={"learning_rate", "weight_decay", "grad_clip_norm", "batch_size", "micro_batches"}
            ),
            "lr_schedule": config.lr_schedule.model_dump(mode="json"),
            "cluster": config.cluster.model_dump(mode="json", include={"compression"}),
        },
    }


def schedule_of(config: Config, steps: int) -> LrSchedule:
    """The learning rates of a run of so many global batches."""
    schedule = config.lr_schedule
    return lr_schedule(schedule.kind, config.training.learning_rate, schedule.warmup_iters, schedule.min_lr, steps)


def _comparison(run: Path, model: nn.Module, steps: int) -> str:
    """How far the weights are from those that the run ended with."""
    try:
        weights, described = load_weights(run)
    except CheckpointError:
        return f"{run} has no checkpoint to compare the weights with"
    if described["step"] != steps:
        return f"the newest checkpoint of {run} has {described['step']} updates, the log {steps}: not compared"
    own = model.state_dict()
    pairs = [(own[name], value) for name, value in weights.items() if name in own and value.numel()]
    differences = [float((mine - theirs).abs().max()) for mine, theirs in pairs]
    largest = math.nan if any(math.isnan(difference) for difference in differences) else max(differences, default=0.0)
    return f"the weights differ from those of {run} by at most {largest:.3g}"
