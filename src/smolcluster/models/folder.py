"""A model in a Hugging Face folder: config.json, and weights in safetensors files. Nothing here needs transformers."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.hub import find_folder
from smolcluster.kinds import JsonObject

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def model_folder(name: str | None, *, with_weights: bool, key: str = "model.hf_model_name") -> Path:
    """The folder that a user named: a local one, or a Hugging Face id's, downloaded if need be.

    Args:
        name: a folder or an id.
        with_weights: False: the configuration alone is needed.
        key: what the user named it with, for messages.

    Raises:
        ConfigError: there is no name, it cannot be had, or has no config.json.
    """
    if not name:
        raise ConfigError(f"{key} is not set. Name a folder or a Hugging Face id")

    def is_whole(folder: Path) -> bool:
        if not with_weights:
            return (folder / CONFIG).is_file()
        try:
            return (folder / CONFIG).is_file() and all(file.is_file() for file in weight_files(folder))
        except ConfigError:
            return False

    patterns = [CONFIG, "generation_config.json"]
    if with_weights:
        patterns += [WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors"]
    folder = find_folder(name, key=key, patterns=patterns, is_whole=is_whole)
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{key} is {name}, but {folder} has no {CONFIG}. Name a folder of a model")
    return folder


def read_config(folder: Path) -> JsonObject:
    """What config.json says.

    Raises:
        ConfigError: it is unreadable.
    """
    return read_json(folder / CONFIG)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's weights; they need not be there.

    Raises:
        ConfigError: the folder names none.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        weight_map = read_json(folder / WEIGHTS_INDEX).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ConfigError(f"{folder / WEIGHTS_INDEX} does not say which files of the folder hold the weights")
        return sorted(folder / str(name) for name in names)
    if any(next(folder.glob(pattern), None) for pattern in _PICKLED):
        raise ConfigError(
            f"{folder} has weights as Python pickles only, which can execute anything and are never loaded. Use a "
            f"model with {WEIGHTS}, or convert it"
        )
    raise ConfigError(f"{folder} has no {WEIGHTS}. Name a folder with weights, or set model.init=random")


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder by name, on the CPU, in the files' dtypes.

    Raises:
        ConfigError: the folder names no weights.
        CheckpointError: a file is missing or damaged; names it.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(f"{file} cannot be read ({exc}). Download or copy it again") from exc
    return tensors


def read_json(file: Path) -> JsonObject:
    """A file of a folder.

    Raises:
        ConfigError: it is unreadable, or no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        reason = getattr(exc, "strerror", None) or "not JSON"
        raise ConfigError(f"{file} cannot be read ({reason}). Download or copy it again") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object. Download or copy it again")
    return content
