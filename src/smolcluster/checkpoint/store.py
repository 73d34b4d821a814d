"""The state of a run on disk: whole or not at all.

    checkpoints/step_00000100/weights.safetensors         parameters and buffers, under their names in the model
    checkpoints/step_00000100/state.safetensors           what else the next step depends on
    checkpoints/step_00000100/state-rank0001.safetensors  what only rank 1 held, where there is such
    checkpoints/step_00000100/index.json                  all tensors, sizes, hashes, how it was made: see index.py
    checkpoints/latest                                    the name of the newest one

A checkpoint is written under a temporary name, synced to the disk and renamed, and only then does `latest` name it. So
a kill or a power cut at any moment leaves the one before as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from smolcluster.checkpoint import disk
from smolcluster.checkpoint.index import (
    DTYPES,
    INDEX,
    STATE,
    WEIGHTS,
    FileEntry,
    Index,
    Part,
    TensorEntry,
    find_problem,
)
from smolcluster.checkpoint.reader import Checkpoint, sha256_of
from smolcluster.checkpoint.state import Shard
from smolcluster.errors import CheckpointError, TrainingStopped
from smolcluster.kinds import JsonObject

__all__ = [
    "Checkpoint",
    "save_checkpoint",
    "open_checkpoint",
    "load_weights",
    "newest_whole",
    "latest_checkpoint",
    "prune",
]

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MODEL = "model/"
_STEP_NAME = re.compile(r"step_([0-9]{8,})")
_TEMPORARY = "writing-"


def save_checkpoint(
    folder: Path,
    step: int,
    shards: Mapping[str, Shard],
    meta: JsonObject,
    others: Iterable[tuple[int, Mapping[str, Shard]]] = (),
    confirm: Callable[[], None] | None = None,
) -> Path:
    """Write a checkpoint; blocks until it is on the disk.

    Args:
        folder: the run's `checkpoints/`; made if it is not there.
        step: updates so far; becomes `step_00000100`. A whole checkpoint of this step is left as it is: a step of a
            run has one state. `others` is then not touched.
        shards: this rank's part of the state, by name, on any device. Names under `model/` that share one memory
            (tied weights) are stored once.
        meta: anything JSON that a reader needs, such as the configuration.
        others: (rank, that rank's part), taken one by one, and asked for the values of one tensor after the other
            (Shard.load, in the order of disk.write_order). Together with `shards` they hold every element of every
            tensor exactly once.
        confirm: called before what is written counts. It raises if the folder may be another process's by now: then
            nothing in it is touched any more.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingStopped: the disk is full, the folder cannot be written, or a tensor's dtype cannot be stored.
    """
    if (problem := find_unstorable(shards)) is not None:
        raise TrainingStopped(f"the checkpoint of step {step} cannot be written: {problem}")
    target = folder / f"step_{step:08d}"
    is_done, is_ours = False, True

    def check() -> None:
        nonlocal is_ours
        if confirm is not None:
            is_ours = False
            confirm()
            is_ours = True

    try:
        disk.make_folder(folder)
        _remove_unfinished(folder)
        if not _is_whole(target):
            _write_and_rename(folder, target, step, shards, meta, others, check)
        _point_latest(folder, target.name, check)
        is_done = True
    except (OSError, SafetensorError) as exc:
        raise TrainingStopped(
            f"the checkpoint of step {step} cannot be written to {folder} ({getattr(exc, 'strerror', None) or exc}). "
            "Free some space, or give --out a folder on another disk; earlier checkpoints are whole"
        ) from exc
    finally:
        if not is_done and is_ours:  # on a full disk every byte counts
            with contextlib.suppress(OSError):
                _remove_unfinished(folder)
    return target


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint and make it readable; blocks while it reads every byte once.

    Args:
        path: a checkpoint, or a folder of checkpoints or of a run: then its newest whole one, see `newest_whole`.

    Raises:
        CheckpointError: there is none, or a file is missing, damaged or no checkpoint of ours; names the file.
    """
    return _open(path)[0]


def load_weights(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """Read a model's parameters and buffers, on the CPU.

    Args:
        path: as for `open_checkpoint`.

    Returns:
        The tensors by their names in the model, tied ones as one tensor under all their names; and `step`, `aliases`,
        `meta`, and `skipped`: why newer checkpoints were passed over, see `newest_whole`.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    checkpoint, skipped = _open(path)
    aliases: JsonObject = {
        alias.removeprefix(MODEL): name.removeprefix(MODEL) for alias, name in checkpoint.aliases.items()
    }
    names = [name for name in checkpoint.names(MODEL) if name not in checkpoint.aliases]
    tensors = {name.removeprefix(MODEL): checkpoint.read(name) for name in names}
    for alias, name in aliases.items():
        tensors[alias] = tensors[str(name)]
    return tensors, {"step": checkpoint.step, "aliases": aliases, "meta": checkpoint.meta, "skipped": [*skipped]}


def newest_whole(path: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of a folder of checkpoints or of a run: what `latest` names, else the highest step.

    Returns:
        Its folder, and for each newer one that was passed over a clause that says why and names the file.

    Raises:
        CheckpointError: there is none.
    """
    checkpoint, skipped = _open_newest(path)
    return checkpoint.path, skipped


def latest_checkpoint(path: Path) -> Path:
    """As `newest_whole`, for those who do not ask what was passed over.

    Raises:
        CheckpointError: there is none.
    """
    return newest_whole(path)[0]


def prune(folder: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; None keeps all. Never the one that `latest` names."""
    if keep is None:
        return
    with contextlib.suppress(OSError):
        latest = _read_latest(folder)
        for name in _step_names(folder)[::-1][keep:]:
            if name != latest:
                _remove(folder, name)


def discard_after(checkpoint: Path) -> None:
    """Delete the later checkpoints of a run that goes on from this one: they would stand in for its own."""
    folder = checkpoint.parent
    with contextlib.suppress(OSError):
        _point_latest(folder, checkpoint.name)
        names = _step_names(folder)
        for name in names[names.index(checkpoint.name) + 1 :]:
            _remove(folder, name)


def find_unstorable(shards: Mapping[str, Shard]) -> str | None:
    """A sentence on the first tensor of a dtype that a checkpoint cannot hold; None if there is none."""
    for name, shard in shards.items():
        if shard.tensor.dtype not in DTYPES:
            return (
                f"tensor {name!r} is {shard.tensor.dtype}, which a checkpoint cannot hold. Convert it, or register it "
                "as a buffer with persistent=False"
            )
    return None


class _Draft:
    """What has been written of a checkpoint so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, FileEntry] = {}
        self._tensors: dict[str, TensorEntry] = {}
        self._aliases: dict[str, str] = {}

    def write_weights(self, shards: Mapping[str, Shard]) -> None:
        """Whole tensors of the model, each memory once, under the names that the model has for them."""
        stored: dict[str, Shard] = {}
        names: dict[tuple[object, ...], str] = {}
        for name in sorted(shards):
            tensor = shards[name].tensor
            memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel() and memory in names:
                self._aliases[name] = names[memory]
            else:
                names[memory] = name
                stored[name] = shards[name]
        self.write(WEIGHTS, stored, without_prefix=MODEL)

    def write(self, file_name: str, shards: Mapping[str, Shard], without_prefix: str = "") -> None:
        """A file with one rank's shards; none if there are none."""
        self._aliases |= {name: shard.alias_of for name, shard in shards.items() if shard.alias_of is not None}
        shards = {name: shard for name, shard in shards.items() if shard.alias_of is None}
        if not shards:
            return
        by_key = {name.removeprefix(without_prefix): shard for name, shard in sorted(shards.items())}
        for name in sorted(shards):
            self._enter(name, shards[name], file_name, name.removeprefix(without_prefix))
        file = self._folder / file_name
        described = {key: shard.tensor for key, shard in by_key.items()}
        disk.write_tensors(file, described, lambda key: _values(by_key[key]))
        self._files[file_name] = FileEntry(bytes=file.stat().st_size, sha256=sha256_of(file))
        disk.sync_file(file)

    def write_index(self, step: int, meta: JsonObject) -> None:
        """The last file. Then all that the folder holds is on the disk."""
        index = Index(step=step, files=self._files, tensors=self._tensors, aliases=self._aliases, meta=meta)
        if (problem := find_problem(index)) is not None:
            raise ValueError(f"the ranks' shards of step {step} do not fit together: {problem}")
        file = self._folder / INDEX
        disk.write_text(file, index.to_text())
        disk.sync_file(file)
        disk.sync_folder(self._folder)

    def _enter(self, name: str, shard: Shard, file_name: str, key: str) -> None:
        dtype, shape = DTYPES[shard.tensor.dtype][0], list(shard.global_shape)
        entry = self._tensors.setdefault(name, TensorEntry(kind=shard.kind, dtype=dtype, shape=shape, parts=[]))
        if (entry.kind, entry.dtype, entry.shape) != (shard.kind, dtype, shape):
            raise ValueError(f"the ranks disagree on tensor {name!r}: {entry} and {shard.kind}, {dtype}, {shape}")
        entry.parts.append(Part(file=file_name, key=key, offset=shard.offset, count=shard.tensor.numel()))


def _write_and_rename(
    folder: Path,
    target: Path,
    step: int,
    shards: Mapping[str, Shard],
    meta: JsonObject,
    others: Iterable[tuple[int, Mapping[str, Shard]]],
    check: Callable[[], None],
) -> None:
    temporary = folder / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    disk.make_folder(temporary)
    draft = _Draft(temporary)
    weights = {name: shard for name, shard in shards.items() if _is_weight(name, shard)}
    draft.write_weights(weights)
    draft.write(STATE, {name: shard for name, shard in shards.items() if name not in weights})
    for rank, of_rank in others:
        draft.write(f"state-rank{rank:04d}.safetensors", of_rank)
    draft.write_index(step, meta)
    check()
    disk.remove(target)  # a damaged one: it was looked at before
    disk.rename(temporary, target)
    disk.sync_folder(folder)


def _remove(folder: Path, name: str) -> None:
    # Renamed first: a kill in between leaves something that is plainly no checkpoint.
    doomed = folder / f"{_TEMPORARY}removed-{name}"
    disk.remove(doomed)
    disk.rename(folder / name, doomed)
    disk.remove(doomed)


def _is_weight(name: str, shard: Shard) -> bool:
    return name.startswith(MODEL) and shard.kind in ("param", "buffer") and shard.shape is None


def _values(shard: Shard) -> Tensor:
    """A shard's values, contiguous, on the CPU."""
    tensor = shard.tensor if shard.load is None else shard.load()
    return tensor.detach().to("cpu").contiguous()


def _open(path: Path) -> tuple[Checkpoint, list[str]]:
    if os.path.lexists(path / INDEX) or _STEP_NAME.fullmatch(path.name):
        return Checkpoint(path), []
    return _open_newest(path)


def _open_newest(path: Path) -> tuple[Checkpoint, list[str]]:
    folder = path / CHECKPOINTS if os.path.isdir(path / CHECKPOINTS) else path
    names: list[str] = []
    try:
        with contextlib.suppress(FileNotFoundError):
            names = _step_names(folder)[::-1]
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise CheckpointError(
            f"{folder} cannot be read ({reason}). Name the folder of a checkpoint or of a run"
        ) from exc
    latest = _read_latest(folder)
    if latest is not None:
        names = [latest, *(name for name in names if name != latest)]
    skipped: list[str] = []
    for name in names:
        try:
            return Checkpoint(folder / name), skipped
        except CheckpointError as exc:
            skipped.append(str(exc))
    reasons = f": {skipped[0]}" if skipped else ""
    raise CheckpointError(
        f"there is no whole checkpoint in {folder}{reasons}. Name another folder, or train with checkpoint.steps set"
    )


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    with contextlib.suppress(CheckpointError):
        Checkpoint(path)
        return True
    return False


def _step_names(folder: Path) -> list[str]:
    """Names of all checkpoints of a folder, oldest first."""
    found = [name for name in os.listdir(folder) if _STEP_NAME.fullmatch(name)]
    return sorted(found, key=lambda name: int(name.removeprefix("step_")))


def _read_latest(folder: Path) -> str | None:
    """The name in `latest`; None if there is no such file, or something else is in it."""
    with contextlib.suppress(OSError, ValueError):
        name = (folder / LATEST).read_text(encoding="utf-8").strip()
        if _STEP_NAME.fullmatch(name):
            return name
    return None


def _point_latest(folder: Path, name: str, check: Callable[[], None] | None = None) -> None:
    temporary = folder / f"{_TEMPORARY}{LATEST}"
    disk.write_text(temporary, name + "\n")
    disk.sync_file(temporary)
    if check is not None:
        check()
    disk.rename(temporary, folder / LATEST)
    disk.sync_folder(folder)


def _remove_unfinished(folder: Path) -> None:
    """What an earlier process was killed over. One process writes a folder, so nobody is still at it."""
    for name in os.listdir(folder):
        if name.startswith(_TEMPORARY):
            disk.remove(folder / name)
