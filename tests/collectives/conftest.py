"""Fixtures of the contract suite: `engine` runs a test once per engine, `run_ranks` runs a function on N ranks."""

from __future__ import annotations

from typing import Any

import pytest

from collectives.contract import ENGINES, RankFunction, RunRanks, open_group, run_group


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of the engine under test."""
    return str(request.param)


@pytest.fixture
def run_ranks(engine: str) -> RunRanks:
    """run_ranks(world_size, fn): the results of fn(comm) on every rank, in rank order."""

    def run(world_size: int, fn: RankFunction, timeout: float = 60.0) -> list[Any]:
        return run_group(open_group(engine, world_size), fn, timeout)

    return run
