"""A trained model as a Hugging Face folder, which transformers loads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from safetensors import SafetensorError
from torch import nn

from smolcluster.checkpoint.disk import make_folder, remove, rename, sync_file, sync_folder
from smolcluster.errors import ConfigError
from smolcluster.hub import first_line
from smolcluster.models.gpt import GPT
from smolcluster.models.gpt2 import save_gpt2
from smolcluster.models.weights import weights_sha256
from smolcluster.run.trained import Trained, load_trained


@runtime_checkable
class CanBeSaved(Protocol):
    """A model that writes its own Hugging Face folder: those of transformers, and a user's that likes to."""

    def save_pretrained(self, folder: str) -> object:
        """Write config.json and model.safetensors into a folder that is there."""
        ...


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        files: their names.
        model: `model.type`.
        step: updates that the weights had.
        weights_sha256: of the weights; the number of summary.json, where they are those of the last step.
        skipped: why newer checkpoints of the run were passed over, a clause for each.
    """

    folder: Path
    files: list[str]
    model: str
    step: int
    weights_sha256: str
    skipped: list[str]


def export_model(source: Path, folder: Path) -> Exported:
    """Write a run's model as a Hugging Face folder: config.json, model.safetensors, tokenizer files. Blocks.

    `gpt` becomes GPT-2, with the same logits; `hf` its own architecture. The folder appears whole or not at all.

    Args:
        source: a run folder, a folder of checkpoints, or one checkpoint.
        folder: where to; made, it may be there if it is empty.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: the folder is taken or cannot be written, or the model has no such form.
    """
    folder = Path(os.path.abspath(folder))
    _check_free(folder)
    trained = load_trained(source)
    model = trained.model
    if not isinstance(model, GPT | CanBeSaved):
        raise ConfigError(
            f"model.type {trained.config.model.type} has no Hugging Face form. gpt and hf have one, and a class of "
            "your own with a method save_pretrained(folder)"
        )
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        make_folder(folder.parent)
        temporary.mkdir()
        files = _write(trained, model, temporary)
        if folder.is_dir():
            folder.rmdir()  # an empty one, which Windows would not replace
        rename(temporary, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"{folder} cannot be written ({reason}). Name another folder, or free some space") from exc
    finally:
        remove(temporary)
    return Exported(
        folder, files, trained.config.model.type, trained.step, weights_sha256(model), skipped=trained.skipped
    )


def _check_free(folder: Path) -> None:
    try:
        is_free = not os.path.lexists(folder) or (folder.is_dir() and next(folder.iterdir(), None) is None)
    except OSError as exc:
        raise ConfigError(f"{folder} cannot be read ({exc.strerror or exc}). Name another folder") from exc
    if not is_free:
        raise ConfigError(f"{folder} is not empty. Name a new folder: nothing is ever overwritten")


def _write(trained: Trained, model: nn.Module, folder: Path) -> list[str]:
    """All files, on the disk; their names."""
    tokenizer = trained.tokenizer
    if isinstance(model, GPT):
        save_gpt2(model, folder, eos_id=None if tokenizer is None else tokenizer.eos_id)
    else:
        assert isinstance(model, CanBeSaved)
        try:
            model.save_pretrained(str(folder))
        except OSError:
            raise
        except Exception as exc:
            raise ConfigError(
                f"save_pretrained of model.type {trained.config.model.type} fails ({first_line(exc)}). Mend it"
            ) from exc
    if tokenizer is not None:
        tokenizer.save(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        sync_file(file)
    sync_folder(folder)
    return [file.relative_to(folder).as_posix() for file in files]
