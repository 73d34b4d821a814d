from __future__ import annotations

import pytest

from smolcluster.errors import ConfigError
from smolcluster.training.schedule import lr_schedule


def test_warm_up_is_linear_and_reaches_the_base_with_its_last_update() -> None:
    lr_at = lr_schedule("constant", 1.0, warmup_iters=4)
    assert [lr_at(i) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_cosine_begins_at_the_base_is_half_way_in_the_middle_and_ends_at_the_minimum() -> None:
    lr_at = lr_schedule("cosine", 1.0, warmup_iters=10, min_lr=0.2, total_updates=110)
    assert lr_at(9) == lr_at(10) == 1.0
    assert lr_at(60) == pytest.approx(0.6)
    assert lr_at(110) == pytest.approx(0.2)
    assert lr_at(1000) == pytest.approx(0.2)
    rates = [lr_at(i) for i in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_constant_without_warm_up_is_constant() -> None:
    lr_at = lr_schedule("constant", 3e-4)
    assert {lr_at(i) for i in (0, 1, 10_000)} == {3e-4}


def test_a_warm_up_longer_than_the_run_is_possible() -> None:
    assert lr_schedule("cosine", 1.0, warmup_iters=10, total_updates=5)(4) == 0.5


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lr_schedule.kind is 'step'. Set it to cosine or constant"):
        lr_schedule("step", 1.0)
    with pytest.raises(ConfigError, match="min_lr"):
        lr_schedule("cosine", 1e-4, min_lr=1e-3, total_updates=10)
