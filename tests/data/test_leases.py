"""Leases: while nothing comes back they are the sampler's steps; whatever happens, each sample counts exactly once."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch

from data.dealt import rank_indices
from smolcluster.data.leases import Lease, SamplePool, range_indices
from smolcluster.data.sampler import Sampler
from smolcluster.errors import CheckpointError
from smolcluster.kinds import JsonObject


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [4.0, 2.0, 1.0], [1.0, 0.0]])
def test_deals_are_the_steps_of_the_sampler(length: int, weights: list[float]) -> None:
    sampler = Sampler(length, 64, seed=3, shares=weights)
    pool = SamplePool(Sampler(length, 64, seed=3), epochs=2)
    for step in range(2 * sampler.steps_per_epoch):
        leases = pool.deal(weights)
        assert len(leases) == len(weights)
        for rank, lease in enumerate(leases):
            assert torch.equal(range_indices(sampler, lease.ranges), rank_indices(sampler, step, rank))
            assert pool.commit(lease.number) == lease
    assert pool.is_finished
    assert pool.deal(weights) == []


def test_what_comes_back_is_lent_first_and_in_order() -> None:
    pool = SamplePool(Sampler(100, 10, seed=0), epochs=1)
    (first,) = pool.deal([1.0])
    (second,) = pool.deal([1.0])
    (third,) = pool.deal([1.0])
    pool.give_back(third.number)
    pool.give_back(first.number)
    (again,) = pool.deal([1.0], limit=15)
    assert again.ranges == ((0, 0, 10), (0, 20, 25))
    (last,) = pool.deal([1.0])
    assert last.ranges == ((0, 25, 30), (0, 30, 35))
    assert pool.commit(second.number) == second
    assert sorted(pool.lent) == [again.number, last.number]


def test_a_lease_counts_once_whoever_asks_again() -> None:
    pool = SamplePool(Sampler(10, 10, seed=0), epochs=1)
    (lease,) = pool.deal([1.0])
    assert pool.commit(lease.number) == lease
    assert pool.commit(lease.number) is None
    assert pool.give_back(lease.number) is None
    assert pool.is_finished


def test_while_the_last_lease_is_out_nothing_is_lent_but_the_pool_is_not_finished() -> None:
    pool = SamplePool(Sampler(10, 10, seed=0), epochs=1)
    (lease,) = pool.deal([1.0])
    assert pool.deal([1.0]) == []
    assert not pool.is_finished
    pool.give_back(lease.number)
    assert not pool.is_finished
    (again,) = pool.deal([1.0])
    assert again.number != lease.number
    pool.commit(again.number)
    assert pool.is_finished


@pytest.mark.parametrize("seed", range(20))
def test_each_sample_of_each_epoch_counts_once_whatever_happens(seed: int) -> None:
    """Workers that vanish, push too late, push twice, and a server that goes back to its last checkpoint."""
    chance = random.Random(seed)
    length, epochs = chance.randint(1, 300), chance.randint(1, 4)
    sampler = Sampler(length, chance.randint(1, 40), seed)
    pool = SamplePool(sampler, epochs)
    ledger: list[Lease] = []
    saved: tuple[str, int] = (json.dumps(pool.state()), 0)
    ever_lent: set[int] = set()
    for _ in range(100_000):
        if pool.is_finished:
            break
        action = chance.random()
        if action < 0.5:
            limit = chance.choice([None, chance.randint(1, 50)])
            for lease in pool.deal([chance.random() for _ in range(chance.randint(1, 4))], limit):
                ever_lent.add(lease.number)
        elif action < 0.9 and ever_lent:
            committed = pool.commit(chance.choice([*pool.lent, chance.choice(sorted(ever_lent))]))
            if committed is not None:
                ledger.append(committed)
        elif action < 0.98 and ever_lent:
            pool.give_back(chance.choice([*pool.lent, chance.choice(sorted(ever_lent))]))
        elif action < 0.99:
            saved = json.dumps(pool.state()), len(ledger)
        else:
            pool = SamplePool(sampler, epochs)
            pool.load_state(json.loads(saved[0]))
            del ledger[saved[1] :]
    assert pool.is_finished
    counted = Counter(
        (epoch, int(index))
        for lease in ledger
        for part in lease.ranges
        for epoch, index in zip([part[0]] * length, range_indices(sampler, (part,)).tolist(), strict=False)
    )
    assert counted == Counter((epoch, index) for epoch in range(epochs) for index in range(length))


def test_returned_ranges_join() -> None:
    pool = SamplePool(Sampler(1000, 1, seed=0), epochs=None)
    leases = [pool.deal([1.0])[0] for _ in range(1000)]
    random.Random(0).shuffle(leases)
    for lease in leases:
        pool.give_back(lease.number)
    assert pool.state()["returned"] == [[0, 0, 1000]]


BAD: list[JsonObject] = [
    {},
    {"fresh": [0, 0], "returned": [], "next": -1},
    {"fresh": [0, 100], "returned": [], "next": 0},
    {"fresh": [-1, 0], "returned": [], "next": 0},
    {"fresh": [0, 50], "returned": [[0, 5, 5]], "next": 9},
    {"fresh": [0, 50], "returned": [[0, 90, 101]], "next": 9},
    {"fresh": [0, 50], "returned": ["x"], "next": 9},
]


@pytest.mark.parametrize("state", BAD)
def test_a_state_of_other_data_is_refused(state: JsonObject) -> None:
    pool = SamplePool(Sampler(100, 10, seed=0), epochs=1)
    with pytest.raises(CheckpointError, match="do not fit to 100 samples"):
        pool.load_state(state)
    assert pool.deal([1.0])[0].ranges == ((0, 0, 10),)
