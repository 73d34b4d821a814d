from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data.dealt import rank_indices
from smolcluster.data import loader as loader_module
from smolcluster.data.batch import Batch, Reads, read_only
from smolcluster.data.datasets import ClassesDataset, Dataset, Kind, TextDataset
from smolcluster.data.loader import (
    MAX_PREFETCHED_STEPS,
    MIN_PREFETCHED_STEPS,
    BatchLoader,
    Step,
    eval_batches,
    sampled_steps,
)
from smolcluster.data.sampler import Sampler
from smolcluster.data.source import MemoryData
from smolcluster.kinds import JsonObject

DEADLINE = 20.0


class Numbers:
    """Sample i is the number i. `on_batch` runs inside `batch`, with the number of the call from 0."""

    name = "numbers"
    kind: Kind = "classes"
    num_classes = 10
    vocab_size = None
    input_dim = 1

    def __init__(self, length: int, on_batch: Callable[[int], None] = lambda call: None) -> None:
        self.length = length
        self.on_batch = on_batch
        self.calls = 0
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.threads.add(threading.current_thread().name)
        self.calls += 1
        self.on_batch(self.calls - 1)
        return indices.float()[:, None], indices

    def targets_per_sample(self, indices: Tensor) -> int:
        return len(indices)

    def graded(self, indices: Tensor) -> Tensor | None:
        return None


class Halves(Numbers):
    """Of which every second is graded."""

    def graded(self, indices: Tensor) -> Tensor:
        return indices[:, None] % 2 == 0


def loader_of(
    dataset: Dataset,
    sampler: Sampler,
    rank: int,
    micro_batches: int = 1,
    start_step: int = 0,
    max_steps: int | None = None,
    **options: Any,
) -> BatchLoader:
    def steps_from(position: JsonObject, weights: Sequence[float]) -> Iterator[Step]:
        shared = Sampler(sampler.length, sampler.global_batch, sampler.seed, weights)
        return sampled_steps(dataset, shared, rank, micro_batches, int(str(position["step"])), max_steps, **options)

    return BatchLoader(steps_from, sampler.weights, {"step": start_step}, rank, sampler.global_batch)


def numbers_of(micro_batches: list[Batch]) -> list[int]:
    return torch.cat([batch.targets for batch in micro_batches]).tolist()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("smolcluster-loader")]


@pytest.fixture(autouse=True)
def no_thread_left() -> object:
    yield
    assert loader_threads() == []


# --- which samples


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_step_holds_the_ranks_samples_in_order(rank: int) -> None:
    sampler = Sampler(25, 8, seed=1, shares=[1.0, 2.0, 1.0])
    with loader_of(Numbers(25), sampler, rank, max_steps=10) as loader:
        steps = list(loader)
    assert len(steps) == 10
    for step, micro_batches in enumerate(steps):
        assert numbers_of(micro_batches) == rank_indices(sampler, step, rank).tolist()


def test_a_loader_that_starts_later_gives_the_same_steps() -> None:
    sampler = Sampler(25, 8, seed=1, shares=2)
    with loader_of(Numbers(25), sampler, 1, max_steps=9) as loader:
        whole = [numbers_of(step) for step in loader]
    with loader_of(Numbers(25), Sampler(25, 8, 1, 2), 1, start_step=5, max_steps=9) as loader:
        assert [numbers_of(step) for step in loader] == whole[5:]
    with loader_of(Numbers(25), sampler, 1, start_step=9, max_steps=9) as loader:
        assert list(loader) == []


def test_the_position_is_behind_the_last_step_given_whatever_was_prepared() -> None:
    sampler = Sampler(25, 8, seed=1, shares=2)
    with loader_of(Numbers(25), sampler, 1, start_step=5, max_steps=9) as loader:
        assert loader.position() == {"step": 5}
        positions = []
        for _ in loader:
            positions.append(loader.position())
    assert positions == [{"step": step, "samples": 25} for step in (6, 7, 8, 9)]
    assert loader.position() == positions[-1]


def test_without_max_steps_there_is_no_end() -> None:
    with loader_of(Numbers(4), Sampler(4, 2, 0), 0) as loader:
        assert len(list(islice(loader, 50))) == 50


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 4), st.integers(1, 6))
def test_a_step_is_split_into_micro_batches_as_equal_as_can_be(
    length: int, global_batch: int, world_size: int, micro_batches: int
) -> None:
    sampler = Sampler(length, global_batch, 0, world_size)
    last = sampler.steps_per_epoch - 1
    for rank in range(world_size):
        with loader_of(Numbers(length), sampler, rank, micro_batches, last, last + 1) as loader:
            (step,) = loader
        sizes = [batch.samples for batch in step]
        expected = len(rank_indices(sampler, last, rank))
        assert sum(sizes) == expected
        assert len(sizes) == micro_batches
        assert max(sizes) - min(sizes) <= 1


def test_a_rank_without_samples_gets_empty_batches_of_the_right_shape() -> None:
    dataset = ClassesDataset("d", torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), 2)
    with loader_of(dataset, Sampler(3, 2, 0, 4), 3, micro_batches=2, max_steps=1) as loader:
        (batches,) = loader
    assert len(batches) == 2
    for batch in batches:
        assert (batch.samples, batch.inputs.shape, batch.planned_count) == (0, (0, 1, 2, 2), 2)


def test_the_planned_count_is_that_of_all_ranks_on_every_rank() -> None:
    dataset = TextDataset("t", torch.arange(40), max_seq_len=3, vocab_size=256)  # 13 windows
    planned, counted = [], torch.zeros(4, dtype=torch.int64)
    for rank in range(3):
        with loader_of(dataset, Sampler(13, 4, 0, 3), rank, micro_batches=2, max_steps=4) as loader:
            for step, micro_batches in enumerate(loader):
                planned += [(step, batch.planned_count) for batch in micro_batches]
                counted[step] += sum(batch.targets.numel() for batch in micro_batches)
    assert counted.tolist() == [12, 12, 12, 3]  # 4 windows of 3 targets, and the ragged end
    assert set(planned) == set(enumerate(counted.tolist()))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_first_the_ranks_have_the_same_micro_batch_of_one_process(world_size: int) -> None:
    sampler = Sampler(25, 8, seed=1, shares=world_size)  # the last step of an epoch has one sample for 3 micro-batches
    ranks = []
    for rank in range(world_size):
        with loader_of(Numbers(25), sampler, rank, 3, 0, 8, micro_first=True) as loader:
            ranks.append(list(loader))
    with loader_of(Numbers(25), Sampler(25, 8, seed=1), 0, 3, 0, 8) as loader:
        alone = list(loader)
    for step, wholes in enumerate(alone):
        for number, whole in enumerate(wholes):
            assert numbers_of([steps[step][number] for steps in ranks]) == whole.targets.tolist()
            assert {steps[step][number].planned_count for steps in ranks} == {whole.planned_count}


# --- what a rank looks at


READS: list[Reads] = ["all", "inputs", "targets", "nothing"]


def windows() -> TextDataset:
    return TextDataset("t", torch.arange(40), max_seq_len=3, vocab_size=256)  # 13 windows


def sees(batch: Batch) -> tuple[bool, bool]:
    """Whether there are inputs and targets, of the same number of samples anyhow."""
    assert len(batch.inputs) == len(batch.targets) == batch.samples
    return batch.inputs.shape[1:] != (0,), batch.targets.shape[1:] != (0,)


def same(ours: Tensor, theirs: Tensor, is_read: bool) -> bool:
    return torch.equal(ours, theirs) if is_read else ours.shape == (len(theirs), 0)


@pytest.mark.parametrize("micro_batches", [1, 3, 5])
@pytest.mark.parametrize("reads", READS)
def test_a_rank_gets_what_it_looks_at_of_the_samples_that_all_ranks_have(reads: Reads, micro_batches: int) -> None:
    sampler = Sampler(13, 4, seed=2)  # steps of 4, 4, 4 and 1: some micro-batches have no sample
    with loader_of(windows(), sampler, 0, micro_batches, max_steps=9) as loader:
        everything = list(loader)
    with loader_of(windows(), sampler, 0, micro_batches, max_steps=9, reads=reads) as loader:
        steps = list(loader)
    wants_inputs, wants_targets = reads in ("all", "inputs"), reads in ("all", "targets")
    for ours, theirs in zip(steps, everything, strict=True):
        assert [batch.samples for batch in ours] == [batch.samples for batch in theirs]
        assert len(ours) == micro_batches
        for mine, whole in zip(ours, theirs, strict=True):
            assert sees(mine) == (wants_inputs, wants_targets)
            assert same(mine.inputs, whole.inputs, wants_inputs)
            assert same(mine.targets, whole.targets, wants_targets)
            # The last rank, which knows the targets, tells the others how many there are.
            assert mine.planned_count == (whole.planned_count if wants_targets else 0)
            assert whole.planned_count > 0
    assert min(batch.samples for step in steps for batch in step) == (1 if micro_batches == 1 else 0)


def test_a_rank_that_looks_at_nothing_asks_the_dataset_for_nothing() -> None:
    dataset = Numbers(25)
    with loader_of(dataset, Sampler(25, 8, seed=1), 0, 3, max_steps=8, reads="nothing") as loader:
        assert [sum(batch.samples for batch in step) for step in loader] == [8, 8, 8, 1] * 2
    assert [batch.samples for batch in eval_batches(dataset, 10, reads="nothing")] == [10, 10, 5]
    assert dataset.calls == 0


@pytest.mark.parametrize("reads", READS)
def test_a_rank_goes_on_where_another_one_that_looked_at_something_else_stopped(reads: Reads) -> None:
    data = MemoryData(windows(), windows())

    def loader(reads: Reads, start: JsonObject | None = None) -> BatchLoader:
        return data.loader(0, [1.0], global_batch=4, seed=2, micro_batches=3, start=start, max_steps=9, reads=reads)

    positions = []
    with loader("all") as first:
        everything = []
        for step in first:
            everything.append(step)
            positions.append(first.position())
    for done, position in enumerate(positions, 1):
        with loader(reads, position) as second:
            for step, whole in zip(second, everything[done:], strict=True):
                assert [batch.samples for batch in step] == [batch.samples for batch in whole]
                for mine, theirs in zip(step, whole, strict=True):
                    assert same(mine.inputs, theirs.inputs, reads in ("all", "inputs"))
                    assert same(mine.targets, theirs.targets, reads in ("all", "targets"))
            assert second.position() == positions[-1]


@pytest.mark.parametrize("reads", READS)
def test_evaluation_gives_a_rank_what_it_looks_at(reads: Reads) -> None:
    wants_targets = reads in ("all", "targets")
    everything = list(eval_batches(Halves(11), 4))
    batches = list(eval_batches(Halves(11), 4, reads=reads))
    assert [batch.samples for batch in batches] == [4, 4, 3]
    for mine, whole in zip(batches, everything, strict=True):
        assert same(mine.inputs, whole.inputs, reads in ("all", "inputs"))
        assert same(mine.targets, whole.targets, wants_targets)
        assert (mine.graded is not None) == wants_targets
        assert whole.graded is not None
        if mine.graded is not None:
            assert torch.equal(mine.graded, whole.graded)


def test_read_only_keeps_a_batch_that_is_read_whole() -> None:
    batch = Batch(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), planned_count=5, graded=torch.ones(2, 1) > 0)
    whole = read_only(batch, "all")
    assert whole.inputs is batch.inputs
    assert whole.targets is batch.targets
    assert whole.graded is batch.graded
    assert whole.planned_count == 5
    targets = read_only(batch, "targets")
    assert targets.inputs.shape == (2, 0)
    assert targets.targets is batch.targets
    assert targets.graded is batch.graded
    assert targets.planned_count == 5


# --- the thread


def test_the_next_step_is_made_while_the_caller_holds_this_one() -> None:
    started, may_go_on = threading.Event(), threading.Event()

    def on_batch(call: int) -> None:
        if call == 1:
            started.set()
            assert may_go_on.wait(DEADLINE)

    dataset = Numbers(8, on_batch)
    with loader_of(dataset, Sampler(8, 2, 0), 0, max_steps=4) as loader:
        first = next(loader)
        # The caller has step 0 and does not ask for step 1; loading that one has begun all the same.
        assert started.wait(DEADLINE)
        assert numbers_of(first) == Sampler(8, 2, 0).global_indices(0).tolist()
        may_go_on.set()
        assert len(list(loader)) == 3
    assert dataset.threads == {"smolcluster-loader-0"}


def test_a_step_that_is_ready_is_given_while_the_next_one_still_loads() -> None:
    may_go_on = threading.Event()

    def on_batch(call: int) -> None:
        if call == 2:
            assert may_go_on.wait(DEADLINE)

    with loader_of(Numbers(8, on_batch), Sampler(8, 2, 0), 0, max_steps=4) as loader:
        next(loader)
        next(loader)  # would hang here if giving waited for loading
        may_go_on.set()
        assert len(list(loader)) == 2


@pytest.mark.parametrize(
    ("room_bytes", "prepared"),
    [
        (0, MIN_PREFETCHED_STEPS),  # large steps
        (10 * (2 * 4 + 2 * 8), 10),  # ten steps of 24 bytes
        (2**30, MAX_PREFETCHED_STEPS),
    ],
)
def test_no_more_is_prepared_than_the_bound(monkeypatch: pytest.MonkeyPatch, room_bytes: int, prepared: int) -> None:
    monkeypatch.setattr(loader_module, "PREFETCHED_BYTES", room_bytes)
    full = threading.Event()

    def on_batch(call: int) -> None:
        if call == prepared - 1:
            full.set()

    dataset = Numbers(1000, on_batch)
    with loader_of(dataset, Sampler(1000, 2, 0), 0):
        assert full.wait(DEADLINE)
    assert dataset.calls == prepared  # after close, so nothing can follow


def test_what_the_dataset_raises_reaches_the_caller_after_the_steps_before_it() -> None:
    def on_batch(call: int) -> None:
        if call == 2:
            raise ValueError("sample 7 is broken")

    loader = loader_of(Numbers(20, on_batch), Sampler(20, 2, 0), 0)
    assert numbers_of(next(loader)) == Sampler(20, 2, 0).global_indices(0).tolist()
    next(loader)
    for _ in range(2):
        with pytest.raises(ValueError, match="sample 7 is broken"):
            next(loader)
    assert loader_threads() == []


def test_the_thread_ends_with_the_last_step() -> None:
    loader = loader_of(Numbers(8), Sampler(8, 2, 0), 0, max_steps=3)
    assert loader_threads() == []  # building one starts nothing
    assert len(list(loader)) == 3
    assert loader_threads() == []
    with pytest.raises(StopIteration):
        next(loader)


def test_close_joins_the_thread_wherever_it_waits_and_ends_the_iteration() -> None:
    unused = loader_of(Numbers(8), Sampler(8, 2, 0), 0)
    unused.close()
    loader = loader_of(Numbers(8), Sampler(8, 2, 0), 0)
    next(loader)
    assert len(loader_threads()) == 1
    loader.close()
    loader.close()
    assert loader_threads() == []
    for closed in (unused, loader):
        with pytest.raises(StopIteration):
            next(closed)


def test_an_error_in_the_body_closes_the_loader() -> None:
    with pytest.raises(KeyError), loader_of(Numbers(8), Sampler(8, 2, 0), 0) as loader:  # noqa: PT012
        next(loader)
        raise KeyError("in the step")
    assert loader_threads() == []


# --- evaluation


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5))
def test_evaluation_sees_every_sample_once_over_all_ranks(length: int, batch_size: int, world_size: int) -> None:
    dataset = Numbers(length)
    ranks = [list(eval_batches(dataset, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1  # the same number of batches on every rank
    seen = [number for batches in ranks for batch in batches for number in batch.targets.tolist()]
    assert sorted(seen) == list(range(length))
    assert all(batch.samples <= batch_size for batches in ranks for batch in batches)
    most = -(-length // (batch_size * world_size))
    assert len(ranks[0]) == most


def test_evaluation_marks_what_the_dataset_grades() -> None:
    batches = list(eval_batches(Halves(5), 3))
    assert [batch.graded.flatten().tolist() for batch in batches if batch.graded is not None] == [
        [True, False, True],
        [False, True],
    ]


def test_evaluation_in_one_process_is_the_default() -> None:
    batches = list(eval_batches(Numbers(10), 4))
    assert [batch.targets.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("given", [0, 3, 7])
@pytest.mark.parametrize("max_steps", [8, 200])
def test_other_shares_count_from_the_next_step_on(given: int, max_steps: int) -> None:
    """Also for steps that were prepared already, and where all of them were."""
    dataset, even, uneven = Numbers(100), Sampler(100, 10, 3, [1, 1]), Sampler(100, 10, 3, [4, 1])
    with loader_of(dataset, even, rank=1, max_steps=max_steps) as loader:
        for step in range(given):
            assert numbers_of(next(loader)) == rank_indices(even, step, 1).tolist()
        loader.reshare([4, 1])
        for step in range(given, max_steps):
            assert numbers_of(next(loader)) == rank_indices(uneven, step, 1).tolist()
        with pytest.raises(StopIteration):
            next(loader)
