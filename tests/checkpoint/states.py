"""Small states to store, and a way to forge an index, for the tests of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smolcluster.checkpoint.index import digest
from smolcluster.checkpoint.reader import sha256_of
from smolcluster.checkpoint.state import Shard
from smolcluster.checkpoint.store import save_checkpoint

META: Any = {"algorithm": "single", "seen": [1, 2.5, None], "name": "käse"}


def make_shards(value: float = 1.0) -> dict[str, Shard]:
    """Rank 0's part: parameters (two are tied, two views of one buffer), buffers, and what else there may be."""
    flat = torch.arange(12, dtype=torch.float64) * value
    embedding = torch.full((3, 2), value, dtype=torch.bfloat16)
    return {
        "model/first": Shard(
            flat[:4], "param"
        ),  # views of one buffer, as gradient buckets and flat parameters make them
        "model/second": Shard(flat[4:].view(2, 4), "param"),
        "model/turned": Shard(torch.arange(6.0).view(2, 3).t() * value, "param"),
        "model/embedding": Shard(embedding, "param"),
        "model/head": Shard(embedding, "param"),
        "model/flags": Shard(torch.tensor([True, False]), "buffer"),
        "model/count": Shard(torch.tensor(7), "buffer"),
        "model/nothing": Shard(torch.empty(0, 3), "buffer"),
        "optim/first/exp_avg": Shard(flat[:4] * 2, "optim"),
        "optim/first/step": Shard(torch.tensor(value), "optim"),
        "rng/0": Shard(torch.arange(16, dtype=torch.uint8), "rng"),
        "scaler": Shard(torch.tensor([65536.0, 3.0], dtype=torch.float64), "scaler"),
        "spectrum": Shard(torch.tensor([1 + 2j], dtype=torch.complex64), "residual"),
    }


def make_pieces() -> tuple[torch.Tensor, list[dict[str, Shard]]]:
    """A tensor (5, 4), and the part of three ranks that hold pieces of it; the second rank's comes last."""
    whole = torch.arange(20.0).view(5, 4)
    flat, shape = whole.flatten(), (5, 4)
    return whole, [
        {"model/split": Shard(flat[:7], "param", shape, 0)},
        {"model/split": Shard(flat[15:], "param", shape, 15), "residual/1/0": Shard(torch.full((3,), 1.0), "residual")},
        {"model/split": Shard(flat[7:15], "param", shape, 7)},
    ]


def save_sharded(folder: Path, step: int = 1) -> Path:
    """A checkpoint of three ranks: all that `make_shards` and `make_pieces` give."""
    _, (mine, *theirs) = make_pieces()
    return save_checkpoint(folder, step, {**make_shards(), **mine}, META, list(enumerate(theirs, start=1)))


def forge(path: Path, change: Callable[[Any], object]) -> None:
    """Change a checkpoint's index and sign it again, as somebody would who means harm."""
    index = json.loads((path / "index.json").read_text())
    del index["sha256"]
    change(index)
    (path / "index.json").write_text(json.dumps({**index, "sha256": digest(index)}))


def accept_files(path: Path) -> None:
    """Make the index agree with the lengths and hashes of the files, whatever they hold now."""

    def describe(index: Any) -> None:
        for name in index["files"]:
            index["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}

    forge(path, describe)
