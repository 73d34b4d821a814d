"""How tensors are cut, and that all ranks agree on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from collectives.contract import run_group
from smolcluster.collectives.codec import Bf16Codec, Int8Codec
from smolcluster.collectives.groups import inproc_group
from smolcluster.collectives.plan import Link, Plan, plan_for
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import CheckpointError
from smolcluster.transport.frame import Prelude

LOOPBACK = Link(100e-6, 2e9)
GIGABIT = Link(200e-6, 118e6)
SLOW_AND_FAR = Link(2.6e-3, 12e6)


def test_a_fast_link_gets_large_chunks_and_a_slow_one_small_ones() -> None:
    assert [plan_for(2, link).chunk_bytes >> 10 for link in (LOOPBACK, GIGABIT, SLOW_AND_FAR)] == [1024, 128, 64]


def test_one_round_pays_for_longer_the_more_bytes_fit_into_the_latency() -> None:
    near, far = Link(1e-3, 12e6), Link(10e-3, 12e6)
    for world_size in (2, 3, 4, 8):
        assert plan_for(world_size, near).one_round_bytes < plan_for(world_size, far).one_round_bytes
    # a/b is 31 KB and N(2N-3)/((N-1)(N-2)) is 4.5: one round is faster up to 140 KB.
    assert plan_for(3, SLOW_AND_FAR).one_round_bytes == 128 << 10


def test_a_far_link_has_more_pieces_under_way() -> None:
    plan = plan_for(2, Link(50e-3, 118e6))
    assert plan.window * plan.chunk_bytes >= 2 * 50e-3 * 118e6


@pytest.mark.parametrize("elements", [1, 1000, 81_921, 100_000, 10_000_000])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_a_tensor_has_two_pieces_unless_they_would_be_tiny(elements: int, world_size: int) -> None:
    plan = Plan()
    chunk = plan.chunk_elements(elements, 4, world_size)
    assert 1 <= chunk * 4 <= plan.chunk_bytes
    assert chunk * world_size * 2 <= elements + 2 * world_size * 1024 or chunk * 4 == 64 << 10
    assert chunk % 1024 == 0
    assert -(-elements // (chunk * world_size)) <= max(2, -(-elements * 4 // (plan.chunk_bytes * world_size)))


@pytest.mark.parametrize("codec", [Bf16Codec(), Int8Codec()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chunk_is_as_large_on_the_wire_whatever_encodes_it(
    codec: Bf16Codec | Int8Codec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(one_round_bytes=0, chunk_bytes=64 << 10, window=2)

    comms = inproc_group(2, plan=plan)
    sizes: list[int] = []
    lane = comms[0]._collective_lanes[1]
    enqueue = lane.enqueue

    def counted(prelude: Prelude, *args: Any, **more: Any) -> None:
        sizes.append(prelude.nbytes)
        enqueue(prelude, *args, **more)

    monkeypatch.setattr(lane, "enqueue", counted)
    run_group(list(comms), lambda comm: comm.all_reduce(torch.ones(500_000, dtype=dtype), codec=codec).wait())
    assert 0.9 * plan.chunk_bytes < max(sizes) <= plan.chunk_bytes


def test_all_ranks_agree_on_what_rank_0_measures() -> None:
    def tune(comm: TcpCommunicator) -> Plan:
        comm.tune()
        return comm.plan

    first, *others = run_group(list(inproc_group(3)), tune)
    assert others == [first, first]


def test_the_plan_of_a_checkpoint_wins_over_what_is_measured() -> None:
    kept = Plan(3 << 10, 5 << 10, 7, 2 << 10)

    def tune(comm: TcpCommunicator) -> Plan:
        comm.tune(kept if comm.rank == 0 else None)
        return comm.plan

    assert run_group(list(inproc_group(2)), tune) == [kept, kept]
    assert Plan.from_json(kept.to_json()) == kept


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"one_round_bytes": 1, "chunk_bytes": 0, "window": 4, "star_bytes": 0},
        {"one_round_bytes": 1, "chunk_bytes": 1, "window": 4, "star_bytes": -1},
        {"chunk_bytes": "a"},
    ],
)
def test_a_damaged_plan_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="plan of the collectives is damaged"):
        Plan.from_json(dict(values))
