"""Checkpoints: what is in the files, and that all of it comes back."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.states import META, make_pieces, make_shards, save_sharded
from smolcluster.checkpoint import disk
from smolcluster.checkpoint.state import Shard
from smolcluster.checkpoint.store import (
    latest_checkpoint,
    load_weights,
    newest_whole,
    open_checkpoint,
    prune,
    save_checkpoint,
)
from smolcluster.errors import CheckpointError, PeerLost, TrainingStopped


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_bit_for_bit_with_its_kinds_and_meta(tmp_path: Path) -> None:
    saved = make_shards()
    path = save_checkpoint(tmp_path / "checkpoints", 100, saved, META)
    checkpoint = open_checkpoint(path)
    assert path.name == "step_00000100"
    assert (checkpoint.path, checkpoint.step, checkpoint.meta) == (path, 100, META)
    assert checkpoint.names() == sorted(saved)
    assert checkpoint.names("optim/first") == ["optim/first/exp_avg", "optim/first/step"]
    for name, shard in saved.items():
        assert checkpoint.kind(name) == shard.kind
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(shard.tensor.shape), shard.tensor.dtype)
        assert torch.equal(checkpoint.read(name), shard.tensor)


def test_numbers_of_meta_that_are_not_finite_come_back(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, 1, {}, {"loss": [math.nan, math.inf]}))
    loss = checkpoint.meta["loss"]
    assert isinstance(loss, list)
    assert (str(loss[0]), loss[1]) == ("nan", math.inf)


def test_weights_are_a_plain_safetensors_file_under_the_model_s_own_names(tmp_path: Path) -> None:
    saved = make_shards()
    path = save_checkpoint(tmp_path, 1, saved, META)
    assert names_in(path) == ["index.json", "state.safetensors", "weights.safetensors"]
    weights = load_file(path / "weights.safetensors")
    assert sorted(weights) == ["count", "embedding", "first", "flags", "nothing", "second", "turned"]
    for name, tensor in weights.items():
        assert torch.equal(tensor, saved[f"model/{name}"].tensor)


def test_whoever_may_read_the_index_may_read_the_tensors(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, make_shards(), {})
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_load_weights_gives_the_model_without_the_rest(tmp_path: Path) -> None:
    saved = make_shards()
    tensors, index = load_weights(save_checkpoint(tmp_path, 3, saved, META))
    assert {f"model/{name}" for name in tensors} == {name for name in saved if name.startswith("model/")}
    assert all(torch.equal(tensor, saved[f"model/{name}"].tensor) for name, tensor in tensors.items())
    assert index == {"step": 3, "aliases": {"head": "embedding"}, "meta": META, "skipped": []}


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, make_shards(), {})
    checkpoint = open_checkpoint(path)
    assert checkpoint.aliases == {"model/head": "model/embedding"}
    assert torch.equal(checkpoint.read("model/head"), checkpoint.read("model/embedding"))
    tensors, _ = load_weights(path)
    assert tensors["head"] is tensors["embedding"]


def test_pieces_of_many_ranks_are_one_tensor_again(tmp_path: Path) -> None:
    whole, _ = make_pieces()
    path = save_sharded(tmp_path)
    assert "state-rank0001.safetensors" in names_in(path)
    assert "state-rank0002.safetensors" in names_in(path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.shape("model/split") == (5, 4)
    assert torch.equal(checkpoint.read("model/split"), whole)
    assert torch.equal(load_weights(path)[0]["split"], whole)


def test_a_slice_of_every_start_and_length_comes_back(tmp_path: Path) -> None:
    flat = make_pieces()[0].flatten()
    checkpoint = open_checkpoint(save_sharded(tmp_path))
    for start in range(21):
        for count in range(21 - start):
            assert torch.equal(checkpoint.read_slice("model/split", start, count), flat[start : start + count])


def test_a_slice_reads_only_its_own_bytes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model/big": Shard(torch.arange(1_000_000.0), "param")}, {})
    checkpoint = open_checkpoint(path)
    file = path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-400_000:] = b"\xff" * 400_000  # nobody looks at the hash again
    file.write_bytes(content)
    assert torch.equal(checkpoint.read_slice("model/big", 899_990, 10), torch.arange(899_990.0, 900_000.0))
    assert checkpoint.read_slice("model/big", 900_000, 1).isnan().all()


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 5), (4, 1), (2, -1), (2**70, 1)])
def test_a_slice_beyond_the_tensor_is_refused(tmp_path: Path, start: int, count: int) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, 1, make_shards(), {}))
    with pytest.raises(CheckpointError, match="'model/first' of the checkpoint has shape"):
        checkpoint.read_slice("model/first", start, count)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, 1, make_shards(), {}))
    for ask in (checkpoint.read, checkpoint.shape, checkpoint.dtype, checkpoint.kind):
        with pytest.raises(CheckpointError, match="has no tensor 'model/absent'"):
            ask("model/absent")


def test_what_is_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, make_shards(), {})
    first = open_checkpoint(path).read("model/first")
    (path / "weights.safetensors").write_bytes(b"")
    assert torch.equal(first, make_shards()["model/first"].tensor)


# ---- where it is


def test_a_run_and_its_checkpoints_mean_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "checkpoints", step, make_shards(step), {})
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000003\n"
    for path in (tmp_path, tmp_path / "checkpoints"):
        assert open_checkpoint(path).step == 3
        assert newest_whole(path) == (tmp_path / "checkpoints" / "step_00000003", [])


def test_latest_decides_which_of_many_whole_ones_is_meant(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, make_shards(), {})
    (tmp_path / "latest").write_text("step_00000001\n")
    assert latest_checkpoint(tmp_path).name == "step_00000001"


@pytest.mark.parametrize("content", [b"", b"../step_00000001", b"\xff\xfe", b"step_1", b"step_00000009"])
def test_a_useless_latest_is_passed_over(tmp_path: Path, content: bytes) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, make_shards(), {})
    (tmp_path / "latest").write_bytes(content)
    assert newest_whole(tmp_path)[0].name == "step_00000002"


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, make_shards(1), {})
    damaged = save_checkpoint(tmp_path, 2, make_shards(2), {}) / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    path, skipped = newest_whole(tmp_path)
    assert path.name == "step_00000001"
    assert len(skipped) == 1
    assert str(damaged) in skipped[0]
    assert open_checkpoint(tmp_path).step == 1
    with pytest.raises(CheckpointError, match="is damaged"):  # who names it wants this one
        open_checkpoint(damaged.parent)


@pytest.mark.parametrize("name", ["empty", "absent", "a_file", "nul\0", "step_00000009", "x" * 5000])
def test_a_place_without_checkpoints_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    with pytest.raises(CheckpointError, match=name.replace("\0", ".+")):
        open_checkpoint(tmp_path / name)


def test_pruning_keeps_the_newest_and_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, make_shards(step), {})
    (tmp_path / "latest").write_text("step_00000001\n")
    prune(tmp_path, 2)
    assert names_in(tmp_path) == ["latest", "step_00000001", "step_00000003", "step_00000004"]
    prune(tmp_path, None)
    assert len(names_in(tmp_path)) == 4
    prune(tmp_path / "absent", 1)


# ---- writing


def test_saving_a_step_again_keeps_a_whole_one_and_repairs_a_damaged_one(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, make_shards(), {})
    written = (path / "weights.safetensors").stat().st_mtime_ns
    save_checkpoint(tmp_path, 1, make_shards(2), {})
    assert (path / "weights.safetensors").stat().st_mtime_ns == written
    (path / "state.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 1, make_shards(2), {})
    assert torch.equal(open_checkpoint(path).read("model/first"), make_shards(2)["model/first"].tensor)


def test_only_one_rank_s_shards_are_asked_for_at_a_time(tmp_path: Path) -> None:
    written: list[list[str]] = []

    def others() -> Iterator[tuple[int, Mapping[str, Shard]]]:
        for rank in (1, 2):
            written.append([name for folder in tmp_path.iterdir() for name in names_in(folder)])
            yield rank, {f"residual/{rank}": Shard(torch.ones(1), "residual")}

    save_checkpoint(tmp_path, 1, {}, {}, others())
    assert written == [[], ["state-rank0001.safetensors"]]


def test_a_folder_that_cannot_be_written_stops_training_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder belongs")
    with pytest.raises(TrainingStopped, match="the checkpoint of step 5 cannot be written"):
        save_checkpoint(tmp_path / "checkpoints", 5, make_shards(), {})


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits there")
def test_a_full_disk_stops_training_and_leaves_nothing_behind(tmp_path: Path) -> None:
    import resource

    save_checkpoint(tmp_path, 1, make_shards(), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(TrainingStopped, match="File too large"):
            save_checkpoint(tmp_path, 2, {"model/big": Shard(torch.ones(1_000_000), "param")}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == ["latest", "step_00000001"]
    assert open_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("operation", ["write_tensors", "write_text", "sync_file", "sync_folder", "rename"])
def test_any_error_of_the_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    save_checkpoint(tmp_path, 1, make_shards(), {})

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, operation, fail)
    with pytest.raises(TrainingStopped, match="No space left on device"):
        save_checkpoint(tmp_path, 2, make_shards(), {})
    monkeypatch.undo()
    assert not [name for name in names_in(tmp_path) if name.startswith("writing-")]
    assert newest_whole(tmp_path)[0].name == "step_00000001"


def test_a_rank_that_is_lost_while_saving_leaves_nothing_behind(tmp_path: Path) -> None:
    def others() -> Iterator[tuple[int, Mapping[str, Shard]]]:
        raise PeerLost("rank 1 is gone", 1)
        yield

    save_checkpoint(tmp_path, 1, make_shards(), {})
    with pytest.raises(PeerLost):
        save_checkpoint(tmp_path, 2, make_shards(), {}, others())
    assert names_in(tmp_path) == ["latest", "step_00000001"]


def test_a_dtype_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"'model/z' is torch\.complex128, which a checkpoint cannot hold"):
        save_checkpoint(tmp_path, 1, {"model/z": Shard(torch.zeros(1, dtype=torch.complex128), "buffer")}, {})


@pytest.mark.parametrize(
    ("offset", "count", "problem"),
    [(0, 2, "is there twice"), (3, 1, "is missing at element 2"), (2, 1, "has 3 elements"), (2, 9, "has 11 elements")],
)
def test_shards_that_do_not_fit_together_are_our_own_mistake(
    tmp_path: Path, offset: int, count: int, problem: str
) -> None:
    mine = {"model/w": Shard(torch.ones(2), "param", (4,), 0)}
    theirs = {"model/w": Shard(torch.ones(count), "param", (4,), offset)}
    with pytest.raises(ValueError, match=problem):
        save_checkpoint(tmp_path, 1, mine, {}, [(1, theirs)])
    with pytest.raises(ValueError, match="disagree on tensor 'model/w'"):
        save_checkpoint(tmp_path, 1, mine, {}, [(1, {"model/w": Shard(torch.ones(2), "buffer", (4,), 2)})])


def test_the_index_says_what_the_documentation_says(tmp_path: Path) -> None:
    path = save_sharded(tmp_path)
    index = json.loads((path / "index.json").read_text())
    assert (index["format"], index["version"], index["step"]) == ("smolcluster-checkpoint", 2, 1)
    assert index["tensors"]["model/split"] == {
        "kind": "param",
        "dtype": "float32",
        "shape": [5, 4],
        "parts": [
            {"file": "state.safetensors", "key": "model/split", "offset": 0, "count": 7},
            {"file": "state-rank0001.safetensors", "key": "model/split", "offset": 15, "count": 5},
            {"file": "state-rank0002.safetensors", "key": "model/split", "offset": 7, "count": 8},
        ],
    }
    assert index["tensors"]["model/first"]["parts"] == [
        {"file": "weights.safetensors", "key": "first", "offset": 0, "count": 4}
    ]
    for name, entry in index["files"].items():
        assert entry["bytes"] == os.path.getsize(path / name)
