"""Checkpoints as a run leaves them, without the run."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from smolcluster.checkpoint.state import Shard
from smolcluster.checkpoint.store import save_checkpoint
from smolcluster.config.schema import Config


def save_model(folder: Path, model: nn.Module, config: Config, step: int = 1) -> Path:
    """One checkpoint in `folder`, with the weights and the configuration; its path."""
    shards = {f"model/{name}": Shard(tensor, "param") for name, tensor in model.state_dict().items()}
    return save_checkpoint(folder, step, shards, {"config": config.model_dump(mode="json")})
