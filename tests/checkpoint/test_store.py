"""Checkpoints: what comes back, and that a kill at any moment leaves the previous one whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smolcluster.checkpoint import store
from smolcluster.checkpoint.store import latest_checkpoint, load_weights, prune, save_weights
from smolcluster.errors import CheckpointError, TrainingStopped

SOURCE = str(Path(__file__).parent.parent.parent / "src")


def make_tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    flat = torch.arange(12, dtype=torch.float64) * value
    weight = torch.full((3, 2), value, dtype=torch.bfloat16)
    return {
        "first": flat[:4],  # views of one buffer, as gradient buckets and flat parameters make them
        "second": flat[4:].view(2, 4),
        "turned": torch.arange(6.0).view(2, 3).t() * value,
        "embedding": weight,
        "head": weight,
        "flags": torch.tensor([True, False]),
        "count": torch.tensor(7),
    }


def test_tensors_come_back_bit_for_bit_with_their_meta(tmp_path: Path) -> None:
    saved = make_tensors()
    path = save_weights(tmp_path / "checkpoints", 100, saved, {"algorithm": "single"})
    assert path.name == "step_00000100"
    loaded, index = load_weights(path)
    assert set(loaded) == set(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert (index["step"], index["meta"]) == (100, {"algorithm": "single"})


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    path = save_weights(tmp_path, 1, make_tensors(), {})
    loaded, index = load_weights(path)
    assert index["aliases"] == {"head": "embedding"}
    assert loaded["head"] is loaded["embedding"]
    assert (path / "weights.safetensors").stat().st_size < 1200  # all tensors once: 190 bytes and a header


def test_a_folder_of_checkpoints_means_its_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_weights(tmp_path, step, make_tensors(step), {})
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    assert load_weights(tmp_path)[1]["step"] == 3


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    save_weights(tmp_path, 1, make_tensors(1), {})
    damaged = save_weights(tmp_path, 2, make_tensors(2), {}) / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000002.weights\.safetensors is damaged"):
        load_weights(damaged.parent)
    assert latest_checkpoint(tmp_path).name == "step_00000001"
    assert load_weights(tmp_path)[1]["step"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ('{"format": "other"}', "no index of a smolcluster checkpoint")],
)
def test_a_foreign_index_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = save_weights(tmp_path, 1, make_tensors(), {})
    (path / "index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(path)
    assert "index.json" in str(error.value)


def test_a_newer_format_and_a_short_file_are_refused(tmp_path: Path) -> None:
    path = save_weights(tmp_path, 1, make_tensors(), {})
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        load_weights(path)
    (path / "index.json").write_text(json.dumps(index))
    (path / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="has 5 bytes"):
        load_weights(path)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_weights(tmp_path)


def test_saving_a_step_again_keeps_a_whole_one_and_repairs_a_damaged_one(tmp_path: Path) -> None:
    path = save_weights(tmp_path, 1, make_tensors(), {})
    written = (path / "weights.safetensors").stat().st_mtime_ns
    save_weights(tmp_path, 1, make_tensors(), {})
    assert (path / "weights.safetensors").stat().st_mtime_ns == written
    (path / "weights.safetensors").write_bytes(b"")
    save_weights(tmp_path, 1, make_tensors(), {})
    assert load_weights(path)[1]["step"] == 1


def test_pruning_keeps_the_newest_and_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_weights(tmp_path, step, make_tensors(step), {})
    (tmp_path / "latest").write_text("step_00000001\n")
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest", "step_00000001", "step_00000003", "step_00000004"
    ]  # fmt: skip
    prune(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_cannot_be_written_stops_training_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder belongs")
    with pytest.raises(TrainingStopped, match="the checkpoint of step 5 cannot be written"):
        save_weights(tmp_path / "checkpoints", 5, make_tensors(), {})


# For each of the calls that touch the disk while step 2 is written: a process that kills itself at that call.
# They are forks of one process (in a script of its own: no threads there), so that torch is imported once.
KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
from smolcluster.checkpoint import store

calls = 0

def counted(function, last_call):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == last_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def save(folder, last_call):
    store.save_weights(folder, 1, {"w": torch.full((1000,), 1.0)}, {})
    store.save_file = counted(store.save_file, last_call)
    os.fsync, os.replace = counted(os.fsync, last_call), counted(os.replace, last_call)
    Path.write_text = counted(Path.write_text, last_call)
    store.save_weights(folder, 2, {"w": torch.full((1000,), 2.0)}, {})
    return calls

last_call, returncode = 0, -signal.SIGKILL
while returncode == -signal.SIGKILL:
    last_call += 1
    pid = os.fork()
    if pid == 0:
        save(Path(sys.argv[1], f"killed{last_call}"), last_call)
        os._exit(0)
    returncode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert returncode == 0
print(last_call - 1)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL and fork")
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    kills = int(killed.stdout)
    assert kills >= 8  # the weights, the index, syncs, renames, the pointer
    for kill in range(1, kills + 1):
        folder = tmp_path / f"killed{kill}"
        tensors, index = load_weights(folder)
        assert index["step"] in (1, 2)
        assert torch.equal(tensors["w"], torch.full((1000,), float(str(index["step"]))))
        # and the next save cleans up
        save_weights(folder, 3, {"w": torch.zeros(1)}, {})
        assert not [path for path in folder.iterdir() if path.name.startswith(store._TEMPORARY)]
