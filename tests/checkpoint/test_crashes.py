"""Power cuts and kills at every moment of saving and pruning: the newest whole checkpoint is there, and right."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.crashes import Call, Recorder, crashes, materialise
from smolcluster.checkpoint.state import Shard
from smolcluster.checkpoint.store import newest_whole, open_checkpoint, prune, save_checkpoint
from smolcluster.errors import CheckpointError

REPOSITORY = Path(__file__).parent.parent.parent


def save(folder: Path, step: int) -> None:
    """A checkpoint of two ranks whose values tell its step."""
    mine = {
        "model/w": Shard(torch.full((30,), float(step)), "param"),
        "optim/w": Shard(torch.tensor(step), "optim"),
    }
    theirs = {"residual/1": Shard(torch.full((3,), float(step)), "residual")}
    save_checkpoint(folder, step, mine, {"step": step}, [(1, theirs)])
    prune(folder, 1)


def holds_step(path: Path) -> int:
    """The checkpoint's step, which all its values must tell too."""
    checkpoint = open_checkpoint(path)
    values = [checkpoint.read(name).flatten() for name in ("model/w", "optim/w", "residual/1")]
    assert {value for tensor in values for value in tensor.tolist()} == {checkpoint.step}
    assert checkpoint.meta == {"step": checkpoint.step}
    return checkpoint.step


def find_loss(note: int, folder: Path, may_skip: bool = False) -> str | None:
    """What is wrong with a folder after a crash, when the save of step `note` had returned before; None: nothing."""
    try:
        path, skipped = newest_whole(folder)
    except CheckpointError as error:
        return str(error) if note else None
    found = holds_step(path)
    if found not in (note, note + 1):
        return f"step {found} after step {note} was saved"
    return None if may_skip else next(iter(skipped), None)  # `latest` never names what is not there


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Call]]:
    """Three checkpoints, of which one is kept, into a folder that is not there at first: the calls, and their root."""
    root = tmp_path / "disk"
    root.mkdir()
    recorder = Recorder(monkeypatch)
    for step in (1, 2, 3):
        save(root / "run" / "checkpoints", step)
        recorder.note(step)
    return root, recorder.calls


def test_after_a_crash_at_any_call_the_newest_whole_checkpoint_is_the_previous_or_the_new_one(
    tmp_path: Path, recorded: tuple[Path, list[Call]]
) -> None:
    root, calls = recorded
    assert len(calls) > 50
    seen = set()
    for number, (note, state) in enumerate(crashes(calls, root, count=10)):
        after = tmp_path / "after" / str(number)
        materialise(state, after)
        folder = after / "run" / "checkpoints"
        assert find_loss(note, folder) is None
        if folder.is_dir() and any(name.startswith("step_") for name in os.listdir(folder)):
            seen.add((note, holds_step(newest_whole(folder)[0])))
        save(folder, 4)  # and the next save works, and leaves nothing of the crash behind
        assert holds_step(newest_whole(folder)[0]) == 4
        assert not [name for name in os.listdir(folder) if name.startswith("writing-")]
        shutil.rmtree(after)
    assert seen == {(0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3)}


def test_a_crash_while_a_damaged_checkpoint_is_replaced_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    recorder = Recorder(monkeypatch)
    save(root, 1)
    recorder.note(1)
    damaged = root / "step_00000002"
    damaged.mkdir()
    (damaged / "index.json").write_text("{}")
    begin = [Call("make", damaged), Call("write", damaged / "index.json", b"{}"), Call("sync_folder", root)]
    calls = [*recorder.calls, *begin]
    recorder.calls.clear()
    save_checkpoint(root, 2, {"model/w": Shard(torch.full((30,), 2.0), "param")}, {"step": 2})
    for number, (_, state) in enumerate(crashes([*calls, *recorder.calls], root, count=6)):
        after = tmp_path / "after" / str(number)
        materialise(state, after)
        if "latest" in state:
            assert open_checkpoint(after).step in (1, 2)


@pytest.mark.parametrize("what", ["sync_file", "sync_folder"])
def test_the_replay_notices_a_store_that_does_not_sync(
    tmp_path: Path, recorded: tuple[Path, list[Call]], what: str
) -> None:
    root, calls = recorded
    careless = [call for call in calls if call.what != what]
    losses = []
    for number, (note, state) in enumerate(crashes(careless, root, count=10)):
        materialise(state, tmp_path / "after" / str(number))
        losses.append(find_loss(note, tmp_path / "after" / str(number) / "run" / "checkpoints"))
    assert any(losses)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL and fork")
def test_ten_kills_while_saving_and_pruning_leave_whole_checkpoints(tmp_path: Path) -> None:
    # The hundred of benchmarks/results/checkpoint_kills.json, in short.
    script = REPOSITORY / "benchmarks" / "checkpoint_kills.py"
    command = [sys.executable, str(script), "--kills", "10", "--out", str(tmp_path / "result.json")]
    subprocess.run(command, check=True, timeout=100, cwd=tmp_path, capture_output=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["kills"], result["whole_after_kill"]) == (10, 10)
