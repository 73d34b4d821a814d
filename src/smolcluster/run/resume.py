"""Which checkpoint a run goes on from, and what of the first start stays as it was.

The top imports no torch: the process that starts ranks needs it only to verify a checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, NonNegativeInt, ValidationError

from smolcluster.config.schema import Config
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.kinds import Algorithm
from smolcluster.run.support import STAGED, sharing_ranks

RUNS = Path("runs")
LATEST = "latest"
CHECKPOINTS = "checkpoints"
# With another value of these the rest of the run would be that of another run.
_FIXED = (
    *("model", "data.dataset", "data.train_split", "data.text_column", "data.tokenizer", "data.streaming"),
    *("training.precision", "training.optimizer", "cluster.seed", "cluster.staleness_bound"),
)


class RunProgress(BaseModel):
    """training.trainer.Progress, as it comes from a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    steps: NonNegativeInt
    computed: NonNegativeInt
    is_drained: bool
    samples: NonNegativeInt
    rank_samples: NonNegativeInt
    tokens: NonNegativeInt
    wall_s: float
    train_s: float
    train_loss: float | None


class RunMeta(BaseModel):
    """What a checkpoint says of its run, beside the tensors."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    algorithm: Algorithm
    config: Config
    world_size: int
    global_batch: int
    """Samples of a step over all ranks."""
    progress: RunProgress
    rank_samples: list[int]
    """Samples that each rank has computed."""
    position: dict[str, JsonValue]
    """Where the data goes on."""
    restarts: int = 0
    """How often the run was resumed before."""
    collectives: dict[str, JsonValue] | None = None
    """How tensors were cut when they were reduced (collectives/plan.py), which decides a sum's last bits."""
    layer_cuts: list[NonNegativeInt] | None = None
    """mp, mp_pipeline: the first layer of each stage, and the number of layers. Older checkpoints do not say."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        checkpoint: its folder.
        run: the run folder that it belongs to.
        step: updates that it has.
        meta: what it says of its run.
        notes: what the user should know of the choice.
        is_newest: no whole checkpoint of the run is newer, but for its end where gradients would have waited.
    """

    checkpoint: Path
    run: Path
    step: int
    meta: RunMeta
    notes: tuple[str, ...] = ()
    is_newest: bool = True


def find_resume_point(what: str, out: Path | None, wanted: Mapping[str, str]) -> ResumePoint:
    """The checkpoint that `--resume` means; blocks while it is verified.

    Args:
        what: `latest`, or the path of a checkpoint, a folder of checkpoints or a run folder.
        out: `--out`, if given.
        wanted: with `latest` and no `out`: `algorithm` and `model.type` of the run, as far as they are given.

    Raises:
        CheckpointError: there is none.
    """
    if what != LATEST:
        path = Path(what)
        if not path.exists():
            raise CheckpointError(f"--resume {path}: there is no such folder. Name a run folder or a checkpoint")
        if (path / "index.json").exists() or path.name.startswith("step_"):
            point = _point(path, path.parent)
            return replace(point, notes=(_drained_note(path),)) if point.meta.progress.is_drained else point
        return _newest(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)
    if out is not None:
        if not (out / CHECKPOINTS).is_dir():
            raise CheckpointError(
                f"--resume latest: {out} has no checkpoints. To begin anew, leave out --resume and give --out a folder "
                "that holds no run"
            )
        return _newest(out / CHECKPOINTS)
    for run in _runs_by_age():
        if not _is_like(run, wanted):
            continue
        with contextlib.suppress(CheckpointError):
            return _newest(run / CHECKPOINTS)
    of = " with " + " and ".join(f"{key} {value}" for key, value in wanted.items()) if wanted else ""
    raise CheckpointError(f"--resume latest: no run{of} under {RUNS}/ has a checkpoint. Name one: --resume PATH")


def check_same_run(point: ResumePoint, config: Config) -> None:
    """Refuse settings with which the rest would be that of another run.

    Raises:
        ConfigError: names the first key that differs.
    """
    for key in _FIXED:
        for name, before, now in _differences(key, _at(point.meta.config, key), _at(config, key)):
            raise ConfigError(
                f"{name} is {now!r}, but the run that {point.checkpoint} is of has {before!r}. Leave it as it was, or "
                "start a new run without --resume"
            )


def kept_split(meta: RunMeta, config: Config, world_size: int) -> list[range] | None:
    """The layers of each stage that the run had, if they are to stay; None: they are decided anew.

    With as many ranks as before they stay, whatever is measured now, so that what follows has the same bits; unless the
    user has changed what they were decided by.

    Args:
        meta: of the checkpoint.
        config: of the run that goes on.
        world_size: its ranks.
    """
    before, now = meta.config.cluster, config.cluster
    is_changed = before.shares != now.shares or before.layer_distribution != now.layer_distribution
    if meta.layer_cuts is None or meta.world_size != world_size or is_changed:
        return None
    return [range(begin, end) for begin, end in itertools.pairwise(meta.layer_cuts)]


def out_of(point: ResumePoint, out: Path | None) -> Path:
    """The run folder that the resumed run writes into.

    Raises:
        ConfigError: it would overwrite what the run did after this checkpoint.
    """
    if out is not None and out.resolve() != point.run.resolve():
        return out
    if not point.is_newest:
        raise ConfigError(
            f"{point.checkpoint} is not the newest checkpoint of its run. To keep what came after it, give another "
            "folder with --out; to go on from the newest: --resume " + str(point.run)
        )
    return point.run


def batch_note(point: ResumePoint, config: Config, batch_size: int, world_size: int) -> str | None:
    """What to say where the global batch of the files is not the one that is kept."""
    before = point.meta
    computing = 1 if config.algorithm == "single" else sharing_ranks(config, world_size)
    if batch_size * computing == before.global_batch:
        return None
    kept = (
        f"training.batch_size {batch_size} is ignored: the run's global batch of {before.global_batch} samples is kept"
    )
    if config.algorithm in STAGED and world_size > 1:
        return f"{kept}; the layers are cut over {world_size} ranks, and every rank computes all samples"
    return f"{kept} and dealt anew to {computing} {'rank' if computing == 1 else 'ranks'}"


def inherited_samples(meta: RunMeta, config: Config, world_size: int) -> list[int]:
    """Samples that each rank of the run that goes on counts as computed before, also those whose gradients wait.

    Where layers are divided every rank computes all samples, elsewhere each its own. What lost ranks have computed
    counts as rank 0's, so that the sum stays.

    Args:
        meta: of the checkpoint.
        config: of the run that goes on.
        world_size: its ranks.
    """
    own = list(meta.rank_samples)
    if meta.config.algorithm in STAGED:
        own = [max(own)]  # all computed the same ones
    if config.algorithm in STAGED:
        return [sum(own)] * world_size
    found = [0] * world_size
    for rank, samples in enumerate(own):
        found[rank if rank < world_size else 0] += samples
    return found


def schedule_note(point: ResumePoint, config: Config) -> str | None:
    """What to say where the run gets another length than its learning rate was planned for."""
    before = point.meta.config
    is_as_long = all(getattr(config.training, key) == getattr(before.training, key) for key in ("max_steps", "epochs"))
    if is_as_long or config.lr_schedule.kind == "constant":
        return None
    return (
        f"the run gets another length, and lr_schedule.kind {config.lr_schedule.kind} is stretched over it from here "
        "on: what follows is not what a run of that length gives from the start. With lr_schedule.kind constant it is"
    )


def _newest(checkpoints: Path) -> ResumePoint:
    from smolcluster.checkpoint.store import newest_whole

    path, skipped = newest_whole(checkpoints)
    point = _point(path, checkpoints)
    notes = [f"skipped: {reason}" for reason in skipped]
    if point.meta.progress.is_drained:
        before = _before_draining(point, checkpoints)
        if before is None:
            notes.append(_drained_note(path))
        else:
            point = before
    return ResumePoint(point.checkpoint, point.run, point.step, point.meta, tuple(notes))


def _drained_note(path: Path) -> str:
    return (
        f"{path.name} is the end of a run with staleness_bound > 0: no gradient waits in it, so what follows differs a "
        "little from a run that was longer from the start"
    )


def _before_draining(point: ResumePoint, checkpoints: Path) -> ResumePoint | None:
    """The checkpoint of the same point of the run in which the last gradients still wait."""
    for path in checkpoints.glob("step_*"):
        try:
            other = _point(path, checkpoints)
        except CheckpointError:
            continue
        if other.step < point.step == other.meta.progress.computed:
            return other
    return None


def _point(path: Path, checkpoints: Path) -> ResumePoint:
    from smolcluster.checkpoint.store import open_checkpoint

    checkpoint = open_checkpoint(path)
    try:
        meta = RunMeta.model_validate(checkpoint.meta)
    except ValidationError as exc:
        raise CheckpointError(
            f"{path} does not say which run it is of ({exc.errors()[0]['msg']}). Use a checkpoint that smolcluster "
            "train wrote"
        ) from exc
    later = [other for other in checkpoints.glob("step_*") if other.name > path.name]
    return ResumePoint(path, checkpoints.parent, checkpoint.step, meta, is_newest=not later)


def _is_like(run: Path, wanted: Mapping[str, str]) -> bool:
    """Whether the newest checkpoint's index says so. Its files may be large, so they are not verified for that."""
    from smolcluster.checkpoint.index import read_index

    try:
        name = (run / CHECKPOINTS / LATEST).read_text(encoding="utf-8").strip()
        meta = RunMeta.model_validate(read_index(run / CHECKPOINTS / name).meta)
    except (CheckpointError, OSError, ValueError):  # the newest is damaged; an older one may not be
        return not wanted
    found = {"algorithm": meta.algorithm, "model.type": meta.config.model.type}
    return all(found[key] == value for key, value in wanted.items())


def _runs_by_age() -> list[Path]:
    """Run folders under runs/, the one with the newest checkpoint first."""
    stamps = [path for path in RUNS.glob(f"*/{CHECKPOINTS}/{LATEST}") if path.is_file()]
    return [path.parent.parent for path in sorted(stamps, key=lambda path: path.stat().st_mtime_ns, reverse=True)]


def _at(config: Config, key: str) -> JsonValue:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _differences(key: str, before: JsonValue, now: JsonValue) -> list[tuple[str, JsonValue, JsonValue]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [(f"{key}.{name}", before.get(name), now[name]) for name in now if before.get(name) != now[name]]
    return [(key, before, now)] if before != now else []
