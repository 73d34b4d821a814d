"""Weights on disk: whole or not at all.

    checkpoints/step_00000100/weights.safetensors   the tensors
    checkpoints/step_00000100/index.json            what belongs to it: sizes, hashes, tied names, how it was made
    checkpoints/latest                              the name of the newest one

A checkpoint is written under a temporary name, synced to the disk and renamed, and only then does `latest` name it. So
a kill or a power cut at any moment leaves the one before as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolcluster.errors import CheckpointError, TrainingStopped
from smolcluster.kinds import JsonObject

FORMAT = "smolcluster-checkpoint"
VERSION = 1
INDEX = "index.json"
WEIGHTS = "weights.safetensors"
LATEST = "latest"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = "writing-"
_HASH_PIECE_BYTES = 1 << 20


def save_weights(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: JsonObject) -> Path:
    """Write a checkpoint; blocks until it is on the disk.

    Args:
        folder: the run's `checkpoints/`; made if it is not there.
        step: updates so far; becomes `step_00000100`. A whole checkpoint of this step is left as it is: a step of a
            run has one set of weights.
        tensors: by name, on any device. Names that share one memory (tied weights) are stored once.
        meta: anything JSON that a reader needs, such as the configuration.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingStopped: the disk is full or the folder cannot be written.
    """
    target = folder / f"step_{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        if not _is_whole(target):
            _write_and_rename(folder, target, step, tensors, meta)
        _replace_text(folder / LATEST, target.name + "\n")
    except (OSError, SafetensorError) as exc:
        with contextlib.suppress(OSError):
            _remove_unfinished(folder)  # on a full disk every byte counts
        raise TrainingStopped(
            f"the checkpoint of step {step} cannot be written to {folder} ({getattr(exc, 'strerror', None) or exc}). "
            "Free some space, or give --out a folder on another disk; earlier checkpoints are whole"
        ) from exc
    return target


def load_weights(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """Read a checkpoint back, on the CPU.

    Args:
        path: a checkpoint, or a folder of checkpoints: then the one that `latest` names, or where that is damaged
            the newest whole one.

    Returns:
        The tensors by name, tied ones as one tensor under all their names; and the index, with `step` and `meta`.

    Raises:
        CheckpointError: there is none, or a file is damaged or no checkpoint of ours; names the file.
    """
    if not (path / INDEX).is_file() and not _STEP_NAME.fullmatch(path.name):
        path = latest_checkpoint(path)
    index = _read_index(path)
    file = path / WEIGHTS
    _check_file(file, index)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{file} cannot be read ({exc}). Use another checkpoint") from exc
    aliases = index["aliases"]
    assert isinstance(aliases, dict)
    for name, stored in aliases.items():
        tensors[name] = tensors[str(stored)]
    return tensors, index


def latest_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint of a folder: what `latest` names, else the highest step.

    Raises:
        CheckpointError: there is none.
    """
    names = _step_names(folder)[::-1]
    with contextlib.suppress(OSError):
        named = (folder / LATEST).read_text(encoding="utf-8").strip()
        if _STEP_NAME.fullmatch(named):
            names.insert(0, named)
    for name in names:
        if _is_whole(folder / name):
            return folder / name
    raise CheckpointError(
        f"there is no whole checkpoint in {folder}. Name another folder, or train with checkpoint.steps set"
    )


def prune(folder: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; None keeps all. Never the one that `latest` names."""
    if keep is None:
        return
    with contextlib.suppress(OSError):
        named = (folder / LATEST).read_text(encoding="utf-8").strip()
        for name in _step_names(folder)[:-keep]:
            if name != named:
                # Renamed first: a kill in between leaves something that is plainly no checkpoint.
                doomed = folder / f"{_TEMPORARY}removed-{name}"
                os.replace(folder / name, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _write_and_rename(folder: Path, target: Path, step: int, tensors: Mapping[str, Tensor], meta: JsonObject) -> None:
    temporary = folder / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    temporary.mkdir()
    stored, aliases = _untied(tensors)
    save_file(stored, temporary / WEIGHTS, metadata={"format": "pt"})
    index: JsonObject = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "files": {WEIGHTS: {"bytes": (temporary / WEIGHTS).stat().st_size, "sha256": _sha256(temporary / WEIGHTS)}},
        "tensors": {
            name: {
                "file": WEIGHTS,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
            }
            for name, tensor in stored.items()
        },
        "aliases": dict(aliases.items()),
        "meta": meta,
    }
    (temporary / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for file in (temporary / WEIGHTS, temporary / INDEX, temporary):
        _sync(file)
    if target.exists():  # damaged: it was looked at before
        shutil.rmtree(target)
    os.replace(temporary, target)
    _sync(folder)


def _untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors, each memory once; and for every further name of a memory the stored one."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in names:
            aliases[name] = names[memory]
            continue
        names[memory] = name
        # Views of one buffer (gradient buckets, flat parameters) may not reach safetensors as such: it refuses them.
        cpu = tensor.to("cpu").contiguous()
        owns_storage = cpu.untyped_storage().nbytes() == cpu.nbytes
        stored[name] = cpu if owns_storage else cpu.clone()
    return stored, aliases


def _read_index(path: Path) -> JsonObject:
    file = path / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(
            f"{file} cannot be read ({getattr(exc, 'strerror', None) or 'not JSON'}), so {path} is no whole "
            "checkpoint. Use another one"
        ) from exc
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no index of a smolcluster checkpoint. Use another folder")
    if index.get("version") != VERSION:
        raise CheckpointError(
            f"{file} has format version {index.get('version')}, this release reads {VERSION}. Use the release that "
            "wrote it"
        )
    if not isinstance(index.get("files"), dict) or not isinstance(index.get("aliases"), dict):
        raise CheckpointError(f"{file} is damaged: parts are missing. Use another checkpoint")
    return index


def _check_file(file: Path, index: JsonObject) -> None:
    files = index["files"]
    expected = files.get(file.name) if isinstance(files, dict) else None
    if not isinstance(expected, dict) or not file.is_file():
        raise CheckpointError(f"{file} is missing, so its checkpoint is not whole. Use another one")
    if file.stat().st_size != expected.get("bytes"):
        raise CheckpointError(
            f"{file} has {file.stat().st_size} bytes, {INDEX} says {expected.get('bytes')}. Use another checkpoint"
        )
    if _sha256(file) != expected.get("sha256"):
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not that of {INDEX}. Use another checkpoint")


def _is_whole(path: Path) -> bool:
    try:
        index = _read_index(path)
        files = index["files"]
        assert isinstance(files, dict)
        for name in files:
            _check_file(path / name, index)
    except (CheckpointError, OSError):
        return False
    return True


def _step_names(folder: Path) -> list[str]:
    """Names of all checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [item.name for item in folder.iterdir() if _STEP_NAME.fullmatch(item.name)]
    return sorted(found, key=lambda name: int(name.removeprefix("step_")))


def _remove_unfinished(folder: Path) -> None:
    """What an earlier process was killed over. One process writes a folder, so nobody is still at it."""
    for item in folder.iterdir():
        if item.name.startswith(_TEMPORARY):
            shutil.rmtree(item, ignore_errors=True)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder; its file system journals the rename
    # Windows syncs only descriptors that may write.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASH_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
