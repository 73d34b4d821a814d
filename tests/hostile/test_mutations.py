"""The million of benchmarks/results/hostile.json in short: every reader of foreign bytes, a few hundred cases each."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator

import pytest

from hostile.mutator import MAX_CASE_BYTES
from hostile.targets import Target, targets
from smolcluster.transport.messages import MAX_MESSAGE_BYTES

CASES = 200
NAMES = [
    "live listener",
    "listener, without token",
    "listener, with token",
    "dialler, to one without the token",
    "dialler, to one with the token",
    "shared memory offers",
    "control frames, without the key",
    "control frames, with the key",
    "join and view",
    "messages of a run",
    "collective frames",
    "messages between two ranks",
]


@pytest.fixture
def all_targets() -> Iterator[dict[str, Target]]:
    with targets() as found:
        yield {target.name: target for target in found}


def test_each_case_is_refused_taken_or_ends_in_an_error_of_ours(all_targets: dict[str, Target]) -> None:
    assert list(all_targets) == NAMES
    for name, target in all_targets.items():
        ended: Counter[str] = Counter()
        for case in range(CASES):
            dice = random.Random(f"4/{name}/{case}")
            try:
                ended[target.attack(dice)] += 1
            except Exception as error:
                raise AssertionError(f"python benchmarks/hostile.py --only {name!r} --case {case}") from error
        # A mutator that breaks everything at once tests nothing but the first check.
        assert len(ended) > 1, (name, ended)


def test_no_stranger_makes_this_process_ask_for_more_than_the_limits(all_targets: dict[str, Target]) -> None:
    # The declared limit of a control message, what parsing it takes, and what the case itself is made of.
    limit = 4 * MAX_MESSAGE_BYTES + 10 * MAX_CASE_BYTES
    names = [name for name in NAMES if name.startswith(("listener", "dialler", "shared", "control"))]
    tracemalloc.start()
    try:
        for name in names:
            for case in range(60):
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                all_targets[name].attack(random.Random(f"5/{name}/{case}"))
                _, peak = tracemalloc.get_traced_memory()
                assert peak - before < limit, (name, case)
    finally:
        tracemalloc.stop()
