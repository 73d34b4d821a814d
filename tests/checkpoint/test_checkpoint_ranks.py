"""Checkpoints of many ranks of which only the first has the folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint.states import META, make_pieces, make_shards, save_sharded
from collectives.contract import ENGINES, open_group, run_group
from smolcluster.checkpoint import disk
from smolcluster.checkpoint.ranks import SharedReader, save_from_all_ranks
from smolcluster.checkpoint.state import Shard
from smolcluster.checkpoint.store import open_checkpoint, save_checkpoint
from smolcluster.collectives.base import Communicator
from smolcluster.errors import CheckpointError, CollectiveMismatch, PeerLost, TrainingStopped


def run(world_size: int, fn: object, engine: str = "inproc") -> list[object]:
    return run_group(open_group(engine, world_size), fn)  # type: ignore[arg-type]  # each test's own function


def save_everything(comm: Communicator, folder: Path, step: int = 1) -> None:
    """Rank 0 has the model, three ranks a piece of one tensor, a fourth nothing."""
    pieces = make_pieces()[1]
    shards = pieces[comm.rank] if comm.rank < 3 else {}
    if comm.rank == 0:
        shards = {**make_shards(), **shards}
    save_from_all_ranks(comm, folder if comm.rank == 0 else None, step, shards, META)


def open_shared(comm: Communicator, path: Path) -> SharedReader:
    reader = SharedReader.open(comm, open_checkpoint(path) if comm.rank == 0 else None)
    assert reader is not None
    return reader


# ---- saving


@pytest.mark.parametrize("engine", ENGINES)
def test_what_four_ranks_hold_becomes_one_checkpoint(tmp_path: Path, engine: str) -> None:
    run(4, lambda comm: save_everything(comm, tmp_path), engine)
    saved, expected = open_checkpoint(tmp_path), open_checkpoint(save_sharded(tmp_path / "expected"))
    assert (saved.names(), saved.meta, saved.step) == (expected.names(), META, 1)
    for name in saved.names():
        assert torch.equal(saved.read(name), expected.read(name))
        assert saved.kind(name) == expected.kind(name)
    assert sorted(path.name for path in saved.path.iterdir()) == sorted(path.name for path in expected.path.iterdir())


def test_one_rank_saves_without_anybody(tmp_path: Path) -> None:
    run(1, lambda comm: save_from_all_ranks(comm, tmp_path, 1, make_shards(), META), "local")
    assert open_checkpoint(tmp_path).meta == META


def test_every_dtype_and_empty_and_dimensionless_tensors_come_from_another_rank(tmp_path: Path) -> None:
    theirs = make_shards()
    run(2, lambda comm: save_from_all_ranks(
        comm, tmp_path if comm.rank == 0 else None, 1, theirs if comm.rank else {}, META
    ))  # fmt: skip
    checkpoint = open_checkpoint(tmp_path)
    for name, shard in theirs.items():
        assert checkpoint.dtype(name) == shard.tensor.dtype
        assert torch.equal(checkpoint.read(name), shard.tensor)


@pytest.mark.parametrize("is_midway", [False, True])
@pytest.mark.parametrize("calls_before", [0, 1, 2, 3])
def test_a_disk_that_fills_up_stops_all_ranks_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls_before: int, is_midway: bool
) -> None:
    real, left = disk.write_tensors, [calls_before]  # weights, state, rank 1, rank 2

    def fill_up(file: Path, described: dict[str, torch.Tensor], values: Callable[[str], torch.Tensor]) -> None:
        if left[0] == 0:
            if is_midway:
                values(disk.write_order(described)[0])  # the rank has more to send
            raise OSError(28, "No space left on device")
        left[0] -= 1
        real(file, described, values)

    monkeypatch.setattr(disk, "write_tensors", fill_up)

    def fn(comm: Communicator) -> str:
        with pytest.raises(TrainingStopped, match="No space left on device") as error:
            save_everything(comm, tmp_path)
        comm.barrier()  # the ranks still agree on what comes next
        return str(error.value)

    messages = run(4, fn)
    assert len(set(map(str, messages))) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_there_already_is_left_and_nobody_waits(tmp_path: Path) -> None:
    def fn(comm: Communicator) -> None:
        save_everything(comm, tmp_path)
        save_everything(comm, tmp_path)
        save_everything(comm, tmp_path, step=2)

    run(4, fn)
    assert open_checkpoint(tmp_path).step == 2


def test_a_rank_with_a_dtype_that_cannot_be_stored_stops_all_ranks(tmp_path: Path) -> None:
    def fn(comm: Communicator) -> None:
        mine = {f"model/{comm.rank}": Shard(torch.zeros(1, dtype=torch.complex128), "buffer")} if comm.rank == 1 else {}
        with pytest.raises(TrainingStopped, match=r"rank 1: tensor 'model/1' is torch\.complex128"):
            save_from_all_ranks(comm, tmp_path if comm.rank == 0 else None, 1, mine, {})
        comm.barrier()

    run(3, fn)
    assert list(tmp_path.iterdir()) == []


def test_ranks_at_different_steps_do_not_write(tmp_path: Path) -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(CollectiveMismatch, match="saves step"):
            save_from_all_ranks(comm, tmp_path if comm.rank == 0 else None, comm.rank, {}, {})

    run(2, fn)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_dies_while_it_sends_ends_the_save_and_leaves_nothing(tmp_path: Path) -> None:
    comms = open_group("inproc", 3)
    errors: list[BaseException | None] = [None] * 3

    def save(comm: Communicator) -> None:
        shards = {f"residual/{comm.rank}": Shard(torch.ones(10), "residual")}
        try:
            if comm.rank == 2:  # says that it has a shard, and is gone when it is asked
                comm.exchange({"step": 1, "shards": 1, "problem": None})
                comm.abort(PeerLost("rank 2 is gone", 2))
            else:
                save_from_all_ranks(comm, tmp_path if comm.rank == 0 else None, 1, shards, {})
        except PeerLost as exc:
            errors[comm.rank] = exc

    threads = [threading.Thread(target=save, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    for comm in comms:
        comm.close()
    assert isinstance(errors[0], PeerLost)
    assert isinstance(errors[1], PeerLost)
    assert list(tmp_path.iterdir()) == []


# ---- reading


@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_read_what_only_rank_0_has(tmp_path: Path, engine: str) -> None:
    path = save_sharded(tmp_path, step=7)
    expected = open_checkpoint(path)

    def fn(comm: Communicator) -> None:
        reader = open_shared(comm, path)
        assert (reader.step, reader.meta) == (7, META)
        assert reader.names() == expected.names()
        assert reader.names("optim/") == expected.names("optim/")
        for name in reader.names():
            assert torch.equal(reader.read(name), expected.read(name))
            assert (reader.shape(name), reader.dtype(name), reader.kind(name)) == (
                expected.shape(name), expected.dtype(name), expected.kind(name)
            )  # fmt: skip

    run(3, fn, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_gets_the_slice_it_asks_for(tmp_path: Path, engine: str) -> None:
    path = save_sharded(tmp_path)
    flat = make_pieces()[0].flatten()
    slices = [(0, 7), (7, 0), (7, 13)], [(19, 1), (0, 20), (5, 5)], [(4, 6), (4, 6), (4, 6)], [(0, 0), (0, 0), (0, 0)]

    def fn(comm: Communicator) -> None:
        reader = open_shared(comm, path)
        for wishes in slices:
            start, count = wishes[comm.rank]
            assert torch.equal(reader.read_slice("model/split", start, count), flat[start : start + count])

    run(3, fn, engine)


def test_one_rank_reads_for_itself(tmp_path: Path) -> None:
    path = save_sharded(tmp_path)

    def fn(comm: Communicator) -> None:
        reader = open_shared(comm, path)
        assert torch.equal(reader.read("model/split"), make_pieces()[0])
        assert reader.read_slice("model/split", 3, 2).tolist() == [3.0, 4.0]

    run(1, fn, "local")


def test_no_checkpoint_on_rank_0_is_none_on_all_ranks() -> None:
    assert run(3, lambda comm: SharedReader.open(comm, None)) == [None, None, None]


def test_a_checkpoint_of_many_tensors_is_made_known(tmp_path: Path) -> None:
    # Its list is longer than what an exchange carries.
    shards = {f"optim/{number}/{'x' * 200}": Shard(torch.tensor(number), "optim") for number in range(5000)}
    path = save_checkpoint(tmp_path, 1, shards, {})
    assert run(2, lambda comm: open_shared(comm, path).names()) == [sorted(shards)] * 2


@pytest.mark.parametrize("slices", [[(0, 4)] * 3, [(0, 1), (1, 1), (2, 2)]])
def test_a_file_that_is_damaged_meanwhile_stops_all_ranks_with_one_message(
    tmp_path: Path, slices: list[tuple[int, int]]
) -> None:
    path = save_sharded(tmp_path)

    def fn(comm: Communicator) -> list[str]:
        reader = open_shared(comm, path)
        comm.barrier()
        if comm.rank == 0:
            (path / "weights.safetensors").write_bytes(b"")
        messages = []
        with pytest.raises(CheckpointError, match=r"weights\.safetensors has become shorter") as error:
            reader.read("model/second")
        messages.append(str(error.value))
        with pytest.raises(CheckpointError, match=r"weights\.safetensors has become shorter") as error:
            reader.read_slice("model/first", *slices[comm.rank])
        messages.append(str(error.value))
        assert reader.read("scaler").tolist() == [65536.0, 3.0]  # the ranks still agree on what comes next
        return messages

    assert len(set(map(str, run(3, fn)))) == 1


def test_a_slice_that_is_too_long_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    path = save_sharded(tmp_path)

    def fn(comm: Communicator) -> None:
        reader = open_shared(comm, path)
        with pytest.raises(CheckpointError, match=r"shape \(5, 4\), elements 15 to 25 were asked for"):
            reader.read_slice("model/split", 15, 10 if comm.rank == 1 else 5)
        with pytest.raises(CheckpointError, match="has no tensor 'model/absent'"):
            reader.read("model/absent")
        comm.barrier()

    run(3, fn)


def test_ranks_that_read_different_tensors_are_told(tmp_path: Path) -> None:
    path = save_sharded(tmp_path)

    def fn(comm: Communicator) -> None:
        reader = open_shared(comm, path)
        name = "model/first" if comm.rank else "model/second"
        with pytest.raises(CollectiveMismatch, match=f"reads tensor '{name}'"):
            reader.read(name)
        with pytest.raises(CollectiveMismatch, match=f"reads tensor '{name}'"):
            reader.read_slice(name, 0, 1)

    run(2, fn)
