"""`cluster.shares: auto`: parts of the global batch in proportion to measured speed, and no change for noise."""

from __future__ import annotations

from typing import Any

import pytest

from smolcluster.collectives.base import Communicator
from smolcluster.collectives.local import LocalGroup
from smolcluster.training.shares import ShareBalancer, WorkerShares, adjusted


def test_weights_follow_speeds() -> None:
    assert adjusted([1.0, 1.0, 1.0], [400.0, 200.0, 100.0]) == [400.0, 200.0, 100.0]


@pytest.mark.parametrize("speeds", [[100.0, 105.0], [None, None], [0.0, None]])
def test_noise_and_ignorance_change_nothing(speeds: list[float | None]) -> None:
    assert adjusted([1.0, 1.0], speeds) is None


def test_a_rank_of_unknown_speed_gets_the_mean() -> None:
    assert adjusted([1.0, 1.0, 1.0], [300.0, 100.0, None]) == [300.0, 100.0, 200.0]


def test_workers_shares_settle_at_their_speeds() -> None:
    shares = WorkerShares([1.0, 1.0, 1.0], measures=True)
    for _ in range(20):
        for rank, speed in ((1, 400.0), (2, 200.0), (3, 100.0)):
            shares.measured(rank, 10, 10 / speed)
    assert [round(shares.part(rank), 2) for rank in (1, 2, 3)] == [0.57, 0.29, 0.14]


def test_given_shares_stay() -> None:
    shares = WorkerShares([3.0, 1.0])
    shares.measured(1, 10, 100.0)
    assert (shares.weight(1), shares.part(2)) == (3.0, 0.25)


class Resharing:
    """A loader that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[list[float]] = []

    def reshare(self, weights: list[float]) -> None:
        self.told.append(weights)


def test_ranks_in_lock_step_change_at_the_same_step() -> None:
    group = LocalGroup(2)
    speeds = [300.0, 100.0]

    def train(comm: Communicator) -> list[tuple[int, list[float]]]:
        loader: Any = Resharing()
        balancer = ShareBalancer(comm, loader)
        seen = []
        for step in range(40):
            before = len(loader.told)
            balancer.after_step(12, 12 / speeds[comm.rank])
            if len(loader.told) > before:
                seen.append((step, loader.told[-1]))
        return seen

    from collectives.contract import run_group

    first, second = run_group(group.communicators, train)
    assert first == second == [(1, [300.0, 100.0])]
