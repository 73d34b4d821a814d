"""Streaming: each step has the same samples however many ranks there are; none twice, none lost, also resumed."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from data.text_files import KINDS, Sample, numbered_rows, samples_in, samples_of, write_rows
from smolcluster.data import rows as rows_module
from smolcluster.data import stream as stream_module
from smolcluster.data.batch import NO_TARGET, Batch, Reads
from smolcluster.data.datasets import WindowsDataset
from smolcluster.data.source import StreamedData, TrainingData, open_data
from smolcluster.errors import CheckpointError, ConfigError, DataError
from smolcluster.kinds import JsonObject

T = 16
GLOBAL_BATCH = 24
ROWS = numbered_rows(400)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units and groups in little data."""
    monkeypatch.setattr(rows_module, "UNIT_BYTES", 600)
    monkeypatch.setattr(stream_module, "GROUP_CHARS", 1000)
    monkeypatch.setattr(stream_module, "HELD_OUT_WINDOWS", 32)


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Locks of `datasets` are not left in the user's cache."""
    with contextlib.suppress(ImportError):
        monkeypatch.setattr(importlib.import_module("datasets.config"), "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def opened(kind: str, folder: Path, rows: list[str] | None = None) -> TrainingData:
    dataset, path = write_rows(kind, folder, ROWS if rows is None else rows)
    return open_data(dataset, path=path, max_seq_len=T, streaming=True)


def steps_of(
    data: TrainingData, world_size: int, steps: int, start: JsonObject | None = None, weights: list[float] | None = None
) -> tuple[list[list[list[Sample]]], list[JsonObject]]:
    """The samples of each step by rank, and the positions behind the steps, the same on every rank."""
    by_rank, positions = [], []
    for rank in range(world_size):
        shares = weights or [1.0] * world_size
        with data.loader(rank, shares, global_batch=GLOBAL_BATCH, seed=7, micro_batches=2, start=start) as loader:
            by_rank.append([])
            positions.append([loader.position()])
            for micro_batches in islice(loader, steps):
                by_rank[-1].append(samples_in(micro_batches))
                positions[-1].append(json.loads(json.dumps(loader.position())))
    assert all(other == positions[0] for other in positions)
    return [list(step) for step in zip(*by_rank, strict=True)], positions[0]


def joined(steps: list[list[list[Sample]]]) -> list[list[Sample]]:
    return [[sample for part in step for sample in part] for step in steps]


def trained_samples(data: TrainingData) -> Counter[Sample]:
    """All samples but those that validate."""
    inputs, targets = data.validation.batch(torch.arange(len(data.validation)))
    held_out = Counter(zip(map(tuple, inputs.tolist()), map(tuple, targets.tolist()), strict=True))
    everything = Counter(samples_of(ROWS, T))
    assert held_out <= everything
    return everything - held_out


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_of_three_ranks_with_a_resume_on_two_has_every_sample_once(kind: str, tmp_path: Path) -> None:
    data = opened(kind, tmp_path / "rows")
    expected = trained_samples(data)
    per_epoch = data.steps_per_epoch(GLOBAL_BATCH)
    assert per_epoch == -(-expected.total() // GLOBAL_BATCH)
    middle = per_epoch // 2
    first, positions = steps_of(data, 3, middle)
    # A fresh start, as another process would make it, and other ranks.
    again = opened(kind, tmp_path / "rows")
    second, _ = steps_of(again, 2, per_epoch - middle, positions[-1])
    steps = joined(first) + joined(second)
    assert [len(step) for step in steps[:-1]] == [GLOBAL_BATCH] * (per_epoch - 1)
    assert Counter(sample for step in steps for sample in step) == expected
    # And it is what a run without interruption sees, in the same order.
    assert steps == joined(steps_of(data, 1, per_epoch)[0])


def test_it_resumes_exactly_at_every_step_over_several_epochs(tmp_path: Path) -> None:
    data = opened("jsonl", tmp_path)
    steps = 2 * data.steps_per_epoch(GLOBAL_BATCH) + 3
    whole, positions = steps_of(data, 1, steps)
    assert [position["step"] for position in positions] == list(range(steps + 1))
    for done in range(steps):
        (after,), _ = steps_of(data, 1, 1, positions[done])
        assert after == whole[done], done


def test_the_last_step_of_an_epoch_may_be_full(tmp_path: Path) -> None:
    rows = [f"{i:03d}" for i in range(5 * GLOBAL_BATCH)]  # one window each
    (tmp_path / "train.txt").write_text("\n".join(rows))
    (tmp_path / "valid.txt").write_text("held out\n")
    data = open_data("text", path=tmp_path, max_seq_len=T, streaming=True)
    assert data.steps_per_epoch(GLOBAL_BATCH) == 5
    whole, positions = steps_of(data, 2, 10)
    epochs = [Counter(chain.from_iterable(joined(part))) for part in (whole[:5], whole[5:])]
    assert epochs[0] == epochs[1] == Counter(samples_of(rows, T))
    assert steps_of(data, 2, 5, positions[5])[0] == whole[5:]


def test_epochs_and_seeds_have_other_orders(tmp_path: Path) -> None:
    data = opened("jsonl", tmp_path)
    per_epoch = data.steps_per_epoch(GLOBAL_BATCH)
    whole = joined(steps_of(data, 1, 2 * per_epoch)[0])
    assert Counter(chain.from_iterable(whole[:per_epoch])) == Counter(chain.from_iterable(whole[per_epoch:]))
    assert whole[0] != whole[per_epoch]
    with data.loader(0, [1.0], global_batch=GLOBAL_BATCH, seed=8) as loader:
        assert samples_in(next(loader)) != whole[0]
    rows_of_step = {bytes(inputs[:2]) for inputs, _ in whole[0]}
    assert len(rows_of_step) > 2  # not a stretch of the file


def test_unequal_shares_change_who_computes_a_sample_and_never_when(tmp_path: Path) -> None:
    data = opened("parquet", tmp_path)
    even, _ = steps_of(data, 3, 6)
    uneven, _ = steps_of(data, 3, 6, weights=[1.0, 0.0, 3.0])
    assert joined(even) == joined(uneven)
    assert [len(part) for part in uneven[0]] == [6, 0, 18]


def test_the_planned_count_is_that_of_all_ranks(tmp_path: Path) -> None:
    data = opened("jsonl", tmp_path)
    counted, planned = [], []
    for rank in range(3):
        with data.loader(rank, [1.0] * 3, global_batch=GLOBAL_BATCH, seed=7, micro_batches=3, max_steps=9) as loader:
            for micro_batches in loader:
                planned.append({batch.planned_count for batch in micro_batches})
                counted.append(sum(int((batch.targets != NO_TARGET).sum()) for batch in micro_batches))
    assert len(counted) == 27
    by_step = [sum(counted[step::9]) for step in range(9)]
    assert planned == [{by_step[index % 9]} for index in range(27)]


def test_a_rank_without_samples_gets_an_empty_batch_of_the_right_shape(tmp_path: Path) -> None:
    data = opened("text", tmp_path)
    with data.loader(1, [1.0, 0.0], global_batch=4, seed=0) as loader:
        (batch,) = next(loader)
    assert (batch.inputs.shape, batch.targets.shape) == ((0, T), (0, T))
    assert batch.planned_count > 0


@pytest.mark.parametrize("reads", ["inputs", "targets", "nothing"])
def test_a_rank_gets_what_it_looks_at_in_each_step_and_after_a_resume(
    reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened("jsonl", tmp_path)
    per_epoch = data.steps_per_epoch(GLOBAL_BATCH)
    middle, end = per_epoch // 2, 2 * per_epoch + 1

    def steps(reads: Reads, start: JsonObject | None) -> tuple[list[list[Batch]], list[JsonObject]]:
        # More micro-batches than the last step of an epoch has samples.
        with data.loader(
            0, [1.0], global_batch=GLOBAL_BATCH, seed=7, micro_batches=23, start=start, max_steps=end, reads=reads
        ) as loader:
            found = [(step, loader.position()) for step in loader]
        return [step for step, _ in found], [position for _, position in found]

    everything, positions = steps("all", None)
    assert len(everything) == end
    assert sum(batch.samples for batch in everything[per_epoch - 1]) < 23
    made: list[int] = []
    make = WindowsDataset.batch

    def counted(windows: WindowsDataset, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(len(indices))
        return make(windows, indices)

    monkeypatch.setattr(WindowsDataset, "batch", counted)
    for first, start in ((0, None), (middle, positions[middle - 1])):
        found, places = steps(reads, start)
        assert places == positions[first:]
        for ours, theirs in zip(found, everything[first:], strict=True):
            assert [batch.samples for batch in ours] == [batch.samples for batch in theirs]
            for mine, whole in zip(ours, theirs, strict=True):
                assert len(mine.inputs) == len(mine.targets) == mine.samples
                if reads == "inputs":
                    assert torch.equal(mine.inputs, whole.inputs)
                else:
                    assert mine.inputs.shape == (whole.samples, 0)
                if reads == "targets":
                    assert torch.equal(mine.targets, whole.targets)
                    assert mine.planned_count == whole.planned_count > 0
                else:
                    assert mine.targets.shape == (whole.samples, 0)
                    assert mine.planned_count == 0
    assert bool(made) == (reads != "nothing")  # who looks at nothing makes no tensors of it


def test_micro_first_the_ranks_have_the_same_micro_batch_of_one_process(tmp_path: Path) -> None:
    data = opened("jsonl", tmp_path)

    def steps(rank: int, weights: list[float], micro_first: bool) -> list[list[list[Sample]]]:
        with data.loader(
            rank, weights, global_batch=GLOBAL_BATCH, seed=7, micro_batches=5, max_steps=12, micro_first=micro_first
        ) as loader:
            return [[samples_in([batch]) for batch in step] for step in loader]

    alone = steps(0, [1.0], False)
    assert steps(0, [1.0], True) == alone
    weights = [1.0, 2.0, 1.0]
    ranks = [steps(rank, weights, True) for rank in range(3)]
    for step, wholes in enumerate(alone):
        for number, whole in enumerate(wholes):
            assert [sample for rank in ranks for sample in rank[step][number]] == whole


def test_max_steps_counts_from_the_start_of_the_run(tmp_path: Path) -> None:
    data = opened("jsonl", tmp_path)
    _, positions = steps_of(data, 1, 4)
    with data.loader(0, [1.0], global_batch=GLOBAL_BATCH, seed=7, start=positions[-1], max_steps=6) as loader:
        assert len(list(loader)) == 2
        assert loader.position()["step"] == 6


def test_held_out_rows_are_spread_over_the_data_and_the_same_every_time(tmp_path: Path) -> None:
    data, again = opened("jsonl", tmp_path), opened("jsonl", tmp_path)
    inputs, _ = data.validation.batch(torch.arange(len(data.validation)))
    assert torch.equal(inputs, again.validation.batch(torch.arange(len(again.validation)))[0])
    numbers = sorted({int(bytes(row[:4])) for row in inputs.tolist() if bytes(row[:4]).isdigit()})
    assert len(numbers) > 8
    assert numbers[0] < 40
    assert numbers[-1] > 300


def test_without_a_need_nothing_is_counted_and_otherwise_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened("jsonl", tmp_path)
    assert isinstance(data, StreamedData)
    passes: list[object] = []
    count = stream_module.TextStream.count_samples
    monkeypatch.setattr(stream_module.TextStream, "count_samples", lambda stream: passes.append(1) or count(stream))
    with data.loader(0, [1.0], global_batch=4, seed=0) as loader:
        next(loader)
    assert not passes
    assert data.steps_per_epoch(24) < data.steps_per_epoch(12)
    assert len(passes) == 1


def test_a_position_of_something_else_is_refused(tmp_path: Path) -> None:
    data = opened("jsonl", tmp_path / "a")
    other = opened("jsonl", tmp_path / "b", ROWS[:300])
    _, positions = steps_of(other, 1, 2)
    for start, message in (
        ({"step": 3}, r"no place in streamed data"),
        (positions[-1] | {"row": -1}, r"no place in streamed data"),
        (positions[-1] | {"row": "1"}, r"no place in streamed data"),
        (positions[-1], r"has \d+ bytes in \d+ parts, but the checkpoint was written with \d+ bytes"),
    ):
        with pytest.raises(CheckpointError, match=message):
            data.loader(0, [1.0], global_batch=4, seed=0, start=start)
    with pytest.raises(ConfigError, match="global batch"):
        data.loader(0, [1.0], global_batch=0, seed=0)
    with pytest.raises(ConfigError, match=r"cluster\.shares"):
        data.loader(0, [0.0], global_batch=1, seed=0)


def test_data_without_text_is_an_error_instead_of_an_endless_search(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n \n\n")
    (tmp_path / "valid.txt").write_text("held out\n")
    data = open_data("text", path=tmp_path, max_seq_len=T, streaming=True)
    with data.loader(0, [1.0], global_batch=4, seed=0) as loader, pytest.raises(DataError, match="no text to train on"):
        next(loader)
    (tmp_path / "one.txt").write_text("only one row\n")
    with pytest.raises(DataError, match="no text to validate on"):
        open_data("text", path=tmp_path / "one.txt", max_seq_len=T, streaming=True)


def test_what_fits_in_memory_cannot_be_streamed() -> None:
    with pytest.raises(DataError, match=r"mnist is always in memory\. Set data\.streaming=false"):
        open_data("mnist", streaming=True)


def test_a_broken_row_reaches_the_consumer_after_the_steps_before_it(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i}"}) for i in range(100)]
    lines[60] = '{"text": "cut o'
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "valid.jsonl").write_text(lines[0])
    data = open_data("jsonl", path=tmp_path, max_seq_len=T, streaming=True)
    with (
        data.loader(0, [1.0], global_batch=4, seed=0) as loader,
        pytest.raises(DataError, match=r"train\.jsonl line 61: not a JSON object"),
    ):
        for _ in loader:
            pass
