import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.dealt import rank_indices
from smolcluster.data.sampler import Sampler, micro_ranges, seeded_permutation, split_by_shares
from smolcluster.errors import ConfigError, DataError

SHARES = st.one_of(
    st.integers(1, 9),
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=9),
    st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any),
)


def world(shares: object) -> int:
    return shares if isinstance(shares, int) else len(shares)  # type: ignore[arg-type]


@given(st.integers(1, 200), st.integers(1, 80), st.integers(0, 2**63), SHARES, st.integers(0, 3))
def test_an_epoch_deals_every_sample_exactly_once(
    length: int, global_batch: int, seed: int, shares: int | list[float], epoch: int
) -> None:
    sampler = Sampler(length, global_batch, seed, shares)
    dealt: list[int] = []
    for position in range(sampler.steps_per_epoch):
        step = epoch * sampler.steps_per_epoch + position
        ranks = [rank_indices(sampler, step, rank) for rank in range(world(shares))]
        together = torch.cat(ranks)
        assert torch.equal(together, sampler.global_indices(step))  # disjoint, exact, consecutive
        is_last = position == sampler.steps_per_epoch - 1
        assert len(together) == (length - position * global_batch if is_last else global_batch)
        dealt += together.tolist()
    assert sorted(dealt) == list(range(length))


@given(st.integers(1, 100), st.integers(1, 40), st.integers(0, 99), SHARES, SHARES)
def test_who_computes_never_changes_what_is_computed(
    length: int, global_batch: int, seed: int, shares: int | list[float], other: int | list[float]
) -> None:
    first, second = Sampler(length, global_batch, seed, shares), Sampler(length, global_batch, seed, other)
    for step in range(2 * first.steps_per_epoch):
        assert torch.equal(first.global_indices(step), second.global_indices(step))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 99), st.lists(st.integers(0, 40), max_size=8))
def test_a_step_depends_on_its_number_alone(length: int, global_batch: int, seed: int, steps: list[int]) -> None:
    one = Sampler(length, global_batch, seed, 3)
    for step in steps:  # any order, as when a run resumes
        fresh = Sampler(length, global_batch, seed, 3)
        assert torch.equal(rank_indices(one, step, 1), rank_indices(fresh, step, 1))


def test_epochs_and_seeds_give_different_orders() -> None:
    sampler, other = Sampler(100, 100, seed=1), Sampler(100, 100, seed=2)
    orders = [sampler.global_indices(0), sampler.global_indices(1), other.global_indices(0)]
    for index, order in enumerate(orders):
        assert not torch.equal(order, torch.arange(100))
        assert not any(torch.equal(order, later) for later in orders[index + 1 :])


def test_the_order_is_the_same_in_every_version_and_process() -> None:
    expected = [8, 1, 6, 9, 4, 0, 2, 5, 7, 3]
    assert seeded_permutation(10, 42, 3).tolist() == expected
    code = "from smolcluster.data.sampler import seeded_permutation as p; print(p(10, 42, 3).tolist())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == str(expected)


def test_a_permutation_is_uniform() -> None:
    places = torch.zeros(4, 4)
    for seed in range(2000):
        places[torch.arange(4), seeded_permutation(4, seed, 0)] += 1
    # 500 expected in each place, deviation 19: 5 of them
    assert (places - 500).abs().max() < 97


@given(
    st.integers(0, 1000),
    st.lists(st.one_of(st.integers(0, 5), st.floats(0.0, 1e6)), min_size=1, max_size=9).filter(any),
)
def test_shares_add_up_and_are_within_one_of_their_proportion(count: int, weights: list[float]) -> None:
    counts = split_by_shares(count, weights)
    assert sum(counts) == count
    total = sum(Fraction(weight) for weight in weights)
    for got, weight in zip(counts, weights, strict=True):
        quota = count * Fraction(weight) / total
        assert abs(got - quota) < 1
        if quota.denominator == 1:
            assert got == quota  # so a rank with weight 0 gets nothing


def test_shares_are_rounded_by_largest_remainder_then_lower_rank() -> None:
    assert split_by_shares(10, [1, 1, 1, 1]) == [3, 3, 2, 2]
    assert split_by_shares(10, [5, 3, 1]) == [6, 3, 1]  # 5.56 3.33 1.11
    assert split_by_shares(2, [1, 1, 1]) == [1, 1, 0]
    assert split_by_shares(63, [1 / 3, 1 / 3, 1 / 3]) == [21, 21, 21]
    assert split_by_shares(8, [3, 0, 1]) == [6, 0, 2]


def test_the_world_size_is_the_number_of_shares() -> None:
    assert Sampler(9, 3, 0, 4).world_size == 4
    assert Sampler(9, 3, 0, [2.0, 1.0]).world_size == 2


@given(st.integers(0, 60), SHARES, st.integers(1, 12))
def test_ranks_divide_their_shares_into_micro_batches(
    count: int, shares: int | list[float], micro_batches: int
) -> None:
    weights = [1.0] * shares if isinstance(shares, int) else shares
    ranks = [micro_ranges(count, weights, rank, micro_batches) for rank in range(len(weights))]
    assert [place for ranges in ranks for part in ranges for place in part] == list(range(count))  # in order, each once
    for ranges, share in zip(ranks, split_by_shares(count, weights), strict=True):
        sizes = [len(part) for part in ranges]
        assert sum(sizes) == share
        assert len(sizes) == micro_batches  # also where samples are fewer
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


@given(st.integers(0, 60), SHARES, st.integers(1, 12))
def test_micro_first_the_ranks_share_each_micro_batch_of_one_process(
    count: int, shares: int | list[float], micro_batches: int
) -> None:
    weights = [1.0] * shares if isinstance(shares, int) else shares
    wholes = micro_ranges(count, [1.0], 0, micro_batches)
    assert wholes == micro_ranges(count, [1.0], 0, micro_batches, micro_first=True)
    ranks = [micro_ranges(count, weights, rank, micro_batches, micro_first=True) for rank in range(len(weights))]
    assert {len(ranges) for ranges in ranks} == {micro_batches}
    for number, whole in enumerate(wholes):
        parts = [ranges[number] for ranges in ranks]
        assert [place for part in parts for place in part] == list(whole)
        assert [len(part) for part in parts] == split_by_shares(len(whole), weights)


def test_what_is_left_over_goes_to_the_first_micro_batches() -> None:
    assert micro_ranges(7, [1.0], 0, 3) == [range(3), range(3, 5), range(5, 7)]
    assert micro_ranges(2, [1.0], 0, 4) == [range(1), range(1, 2), range(2, 2), range(2, 2)]
    # Two ranks with 4 and 3 of 7 samples; and with 2 and 1, then 1 and 1 twice.
    assert [micro_ranges(7, [1, 1], rank, 3) for rank in (0, 1)] == [
        [range(2), range(2, 3), range(3, 4)],
        [range(4, 5), range(5, 6), range(6, 7)],
    ]
    assert [micro_ranges(7, [1, 1], rank, 3, micro_first=True) for rank in (0, 1)] == [
        [range(2), range(3, 4), range(5, 6)],
        [range(2, 3), range(4, 5), range(6, 7)],
    ]


@pytest.mark.parametrize("shares", [0, [], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf")]])
def test_impossible_shares_are_refused(shares: int | list[float]) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.shares"):
        Sampler(10, 2, 0, shares)


def test_an_empty_dataset_and_an_empty_batch_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        Sampler(0, 2, 0)
    with pytest.raises(ConfigError, match=r"training\.batch_size"):
        Sampler(10, 0, 0)
