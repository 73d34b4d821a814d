"""The network's timing decides nothing: the same bits with and without delays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from algorithms.equality import Case, Outcome, _outcome, check_equal, make_classicdp, run_single
from collectives.contract import run_group
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.groups import inproc_group
from smolcluster.collectives.plan import Plan
from smolcluster.models.weights import tensors_sha256
from smolcluster.transport.base import Channel, Hello
from smolcluster.transport.inproc import FaultPlan, FaultyChannel, Hook

WORLD_SIZE = 3
PLANS = {
    "one round": Plan(),
    "star": Plan(star_bytes=1 << 20),
    "ring": Plan(one_round_bytes=0, chunk_bytes=256, window=3),
}


def latencies(seed: int) -> Hook:
    """Every end of every connection delays each chunk by up to 2 ms, as its own seed says, and fragments it."""

    def wrap(rank: int, hello: Hello, channel: Channel) -> Channel:
        plan = FaultPlan(seed=seed * 1000 + rank * 10 + hello.rank, max_latency=2e-3, max_chunk=4000)
        return FaultyChannel(channel, plan)

    return wrap


def train(case: Case, plan: Plan, hook: Hook | None) -> list[Outcome]:
    def rank(comm: Communicator) -> Outcome:
        strategy = make_classicdp(case.build(comm.rank), comm, case)
        results = [strategy.train_step(case.rank_batches(step, comm.rank, WORLD_SIZE)) for step in range(case.steps)]
        return _outcome(strategy, results)

    return run_group(list(inproc_group(WORLD_SIZE, hook=hook, plan=plan)), rank)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("delay", [0, 2])
def test_random_latencies_change_no_bit_of_the_weights(plan: str, delay: int) -> None:
    case = Case(precision="fp32", steps=15, options={"staleness_bound": delay, "grad_clip_norm": 0.3})
    runs = [train(case, PLANS[plan], hook) for hook in (None, latencies(1), latencies(2))]
    hashes = {tensors_sha256(outcome.weights) for run in runs for outcome in run}
    assert len(hashes) == 1
    losses = {tuple(result.loss for result in outcome.results) for run in runs for outcome in run}
    assert len(losses) == 1
    check_equal(run_single(replace(case)), runs[1], "fp32")
