"""The algorithms of ring.py and mesh.py as pure generators, over a network that is a few queues.

The network hands over what a sent tensor holds when it is received, as late as it may be, and runs the ranks in random
order: an algorithm that changes what is still under way, or that counts on an order, gives wrong numbers here.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from smolcluster.collectives import mesh, ring
from smolcluster.collectives.base import Codec, ReduceOp
from smolcluster.collectives.codec import Bf16Codec, Fp16Codec, Int8Codec
from smolcluster.collectives.wire import Arrival, Steps, combine

SIZES = [1, 2, 3, 4, 5]
COUNTS = [0, 1, 2, 7, 60, 1001]


class FakeWire:
    """One rank's end of the network."""

    def __init__(self, rank: int, world_size: int, queues: dict[tuple[int, int], deque[Tensor]]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.sent_bytes = 0
        self._queues = queues

    def send(self, dst: int, data: Tensor) -> None:
        assert dst != self.rank
        assert data.is_contiguous()
        self.sent_bytes += data.nbytes
        self._queues[(self.rank, dst)].append(data)

    def expect(self, src: int, into: Tensor | None, op: ReduceOp | None = None) -> Arrival:
        assert src != self.rank
        return Arrival(src, into, 0, op)


class Run:
    """Runs one generator per rank to its end. `rounds[rank]` counts how often rank had to wait."""

    def __init__(self, world_size: int, begin: Callable[[FakeWire], Steps], seed: int = 0) -> None:
        self.queues = {(s, d): deque[Tensor]() for s in range(world_size) for d in range(world_size)}
        self.wires = [FakeWire(rank, world_size, self.queues) for rank in range(world_size)]
        self.rounds = [0] * world_size
        running = {rank: begin(wire) for rank, wire in enumerate(self.wires)}
        waiting: dict[int, list[Arrival]] = {}
        chance = random.Random(seed)
        while running:
            ready = [rank for rank in running if all(self.queues[(a.src, rank)] for a in waiting.get(rank, ()))]
            assert ready, f"deadlock: ranks {sorted(running)} wait for each other"
            rank = chance.choice(ready)
            for arrival in waiting.pop(rank, ()):
                self._deliver(arrival, self.queues[(arrival.src, rank)].popleft())
            step = next(running[rank], None)
            if step is None:
                del running[rank]
            else:
                waiting[rank] = list(step)
                self.rounds[rank] += bool(step)
        assert not any(self.queues.values()), "something was sent that nobody received"

    @staticmethod
    def _deliver(arrival: Arrival, data: Tensor) -> None:
        if arrival.into is None:
            arrival.into = data.clone()
        else:
            assert arrival.into.shape == data.shape
            if arrival.op is None:
                arrival.into.copy_(data)
            else:
                combine(arrival.into, data, arrival.op)


def inputs(world_size: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A different tensor on every rank."""
    generator = torch.Generator().manual_seed(count + 1)
    if dtype.is_floating_point:
        return [torch.randn(count, generator=generator).to(dtype) for _ in range(world_size)]
    return [torch.randint(-99, 99, (count,), generator=generator).to(dtype) for _ in range(world_size)]


def naive(tensors: Sequence[Tensor], op: ReduceOp) -> Tensor:
    """In rank order, in the tensors' own dtype."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = torch.maximum(total, tensor) if op == ReduceOp.MAX else total + tensor
    return total / len(tensors) if op == ReduceOp.AVG else total


def through(codec: Codec, tensor: Tensor) -> Tensor:
    """What is left of `tensor` after encoding and decoding."""
    encoded = torch.empty(codec.encoded_nbytes(tensor.numel()), dtype=torch.uint8)
    codec.encode(tensor, encoded)
    decoded = torch.empty_like(tensor)
    codec.decode(encoded, decoded)
    return decoded


def chunks_of(tensor: Tensor, world_size: int) -> list[Tensor]:
    return list(tensor.tensor_split(world_size))


ALGORITHMS: dict[str, Callable[[FakeWire, Tensor, ReduceOp], Steps]] = {
    "ring": lambda wire, t, op: ring.ring_all_reduce(wire, chunks_of(t, wire.world_size), op),
    "one round": mesh.one_round_all_reduce,
    "star": mesh.star_all_reduce,
    "mesh bf16": lambda wire, t, op: mesh.mesh_all_reduce(wire, chunks_of(t, wire.world_size), op, Bf16Codec()),
    "mesh int8 with feedback": lambda wire, t, op: mesh.feedback_all_reduce(
        wire, chunks_of(t, wire.world_size), chunks_of(t / 99, wire.world_size), op, Int8Codec()
    ),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("op", list(ReduceOp), ids=lambda op: op.name)
@pytest.mark.parametrize("algorithm", ["ring", "one round", "star"])
def test_all_reduce_equals_the_naive_one(algorithm: str, op: ReduceOp, world_size: int, count: int) -> None:
    tensors = inputs(world_size, count, torch.float64)
    expected = naive(tensors, op)
    Run(world_size, lambda wire: ALGORITHMS[algorithm](wire, tensors[wire.rank], op))
    for tensor in tensors:
        # A ring adds in another order: 5 additions of values below 5, so 5 * 5 * 2^-52 at most.
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-14)
        assert torch.equal(tensor, tensors[0])


@pytest.mark.parametrize("world_size", SIZES)
def test_one_round_adds_in_rank_order_to_the_bit(world_size: int) -> None:
    tensors = inputs(world_size, 501)
    expected = naive(tensors, ReduceOp.AVG)
    Run(world_size, lambda wire: mesh.one_round_all_reduce(wire, tensors[wire.rank], ReduceOp.AVG))
    assert all(torch.equal(tensor, expected) for tensor in tensors)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("codec", [Bf16Codec(), Fp16Codec()], ids=lambda codec: codec.name)
def test_mesh_with_a_codec_adds_decoded_values_in_rank_order_to_the_bit(codec: Codec, world_size: int) -> None:
    tensors = inputs(world_size, 501)
    expected = through(codec, naive([through(codec, tensor) for tensor in tensors], ReduceOp.AVG))
    Run(
        world_size,
        lambda wire: mesh.mesh_all_reduce(wire, chunks_of(tensors[wire.rank], world_size), ReduceOp.AVG, codec),
    )
    assert all(torch.equal(tensor, expected) for tensor in tensors)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", SIZES)
def test_the_bits_do_not_depend_on_who_is_faster(algorithm: str, world_size: int) -> None:
    results = []
    for seed in range(10):
        tensors = inputs(world_size, 101)
        Run(world_size, lambda wire: ALGORITHMS[algorithm](wire, tensors[wire.rank], ReduceOp.SUM), seed)  # noqa: B023
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
        results.append(tensors[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MAX], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_reduced_in_their_own(dtype: torch.dtype, op: ReduceOp) -> None:
    for algorithm in ("ring", "one round"):
        tensors = [tensor.remainder(7) for tensor in inputs(3, 60, dtype)]  # sums are exact, in any order
        if dtype.is_floating_point:
            tensors = [tensor.round() for tensor in tensors]
        expected = naive(tensors, op)
        Run(3, lambda wire: ALGORITHMS[algorithm](wire, tensors[wire.rank], op))  # noqa: B023
        assert all(torch.equal(tensor, expected) for tensor in tensors)


@pytest.mark.parametrize("algorithm", ["ring", "one round"])
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MAX], ids=lambda op: op.name)
def test_nan_and_infinity_reach_every_rank(algorithm: str, op: ReduceOp) -> None:
    tensors = inputs(3, 9)
    tensors[1][2] = float("nan")
    tensors[2][7] = float("inf")
    Run(3, lambda wire: ALGORITHMS[algorithm](wire, tensors[wire.rank], op))
    for tensor in tensors:
        assert tensor.isnan().tolist() == [n == 2 for n in range(9)]
        assert tensor[7] == float("inf")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("codec", [None, Bf16Codec()], ids=["ring", "mesh"])
def test_reduce_scatter_leaves_each_rank_its_chunk(codec: Codec | None, world_size: int, count: int) -> None:
    tensors = inputs(world_size, count, torch.float64)
    wanted = naive([through(codec, t) for t in tensors] if codec else tensors, ReduceOp.AVG)

    def begin(wire: FakeWire) -> Steps:
        chunks = chunks_of(tensors[wire.rank], world_size)
        if codec is None:
            return ring.ring_reduce_scatter(wire, chunks, ReduceOp.AVG)
        return mesh.mesh_reduce_scatter(wire, chunks, ReduceOp.AVG, codec)

    Run(world_size, begin)
    for rank, tensor in enumerate(tensors):
        expected = chunks_of(wanted, world_size)[rank]
        torch.testing.assert_close(chunks_of(tensor, world_size)[rank], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("codec", [None, Fp16Codec()], ids=["ring", "mesh"])
def test_all_gather_gives_everybody_all_chunks(codec: Codec | None, world_size: int, count: int) -> None:
    whole = inputs(1, count)[0]
    tensors = [torch.full((count,), float("nan")) for _ in range(world_size)]
    for rank, tensor in enumerate(tensors):
        chunks_of(tensor, world_size)[rank].copy_(chunks_of(whole, world_size)[rank])

    def begin(wire: FakeWire) -> Steps:
        chunks = chunks_of(tensors[wire.rank], world_size)
        return ring.ring_all_gather(wire, chunks) if codec is None else mesh.mesh_all_gather(wire, chunks, codec)

    Run(world_size, begin)
    expected = through(codec, whole) if codec else whole
    assert all(torch.equal(tensor, expected) for tensor in tensors)


@pytest.mark.parametrize("world_size", SIZES)
def test_broadcast_passes_the_sources_piece_on(world_size: int) -> None:
    for src in range(world_size):
        tensors = inputs(world_size, 33)
        expected = tensors[src].clone()
        run = Run(world_size, lambda wire: ring.ring_broadcast(wire, tensors[wire.rank], src))  # noqa: B023
        assert all(torch.equal(tensor, expected) for tensor in tensors)
        assert [wire.sent_bytes for wire in run.wires].count(0) == 1  # the source's left neighbour
        assert sum(wire.sent_bytes for wire in run.wires) == (world_size - 1) * expected.nbytes


@pytest.mark.parametrize("world_size", SIZES)
def test_exchange_brings_every_part_to_its_rank(world_size: int) -> None:
    outgoing = [[torch.full((s + d,), 10.0 * s + d) for d in range(world_size)] for s in range(world_size)]
    sized = [[torch.empty(s + d) for s in range(world_size)] for d in range(world_size)]
    run = Run(world_size, lambda wire: mesh.mesh_exchange(wire, outgoing[wire.rank], sized[wire.rank]))
    for src in range(world_size):
        for dst in range(world_size):
            if src != dst:
                assert torch.equal(sized[dst][src], outgoing[src][dst])
        others = [outgoing[src][dst].nbytes for dst in range(world_size) if dst != src]
        assert run.wires[src].sent_bytes == sum(others)


def test_exchange_finds_what_it_did_not_size_in_the_arrivals() -> None:
    outgoing = [[torch.full((s + d,), 10.0 * s + d) for d in range(3)] for s in range(3)]
    found: dict[int, list[Arrival]] = {0: [], 1: [], 2: []}

    def begin(wire: FakeWire) -> Steps:
        for step in mesh.mesh_exchange(wire, outgoing[wire.rank], [None] * 3):
            found[wire.rank].extend(step)
            yield step

    Run(3, begin)
    for dst, arrivals in found.items():
        assert sorted(arrival.src for arrival in arrivals) == [src for src in range(3) if src != dst]
        for arrival in arrivals:
            assert arrival.into is not None
            assert torch.equal(arrival.into, outgoing[arrival.src][dst])


# --- the cost formulas of the docstrings, for S bytes that N divides

N, COUNT = 4, 240
S = COUNT * 4
CODED = COUNT * 2  # S': bf16 is half of float32

COSTS: dict[str, tuple[Callable[[FakeWire, Tensor], Steps], int, int]] = {
    # name: (algorithm, bytes that each rank sends, hops)
    "ring_all_reduce": (
        lambda w, t: ring.ring_all_reduce(w, chunks_of(t, N), ReduceOp.SUM), 2 * (N - 1) * S // N, 2 * (N - 1)
    ),
    "ring_reduce_scatter": (
        lambda w, t: ring.ring_reduce_scatter(w, chunks_of(t, N), ReduceOp.SUM), (N - 1) * S // N, N - 1
    ),
    "ring_all_gather": (lambda w, t: ring.ring_all_gather(w, chunks_of(t, N)), (N - 1) * S // N, N - 1),
    "one_round_all_reduce": (lambda w, t: mesh.one_round_all_reduce(w, t, ReduceOp.SUM), (N - 1) * S, 1),
    "mesh_all_reduce": (
        lambda w, t: mesh.mesh_all_reduce(w, chunks_of(t, N), ReduceOp.SUM, Bf16Codec()), 2 * (N - 1) * CODED // N, 2
    ),
    "mesh_reduce_scatter": (
        lambda w, t: mesh.mesh_reduce_scatter(w, chunks_of(t, N), ReduceOp.SUM, Bf16Codec()), (N - 1) * CODED // N, 1
    ),
    "mesh_all_gather": (
        lambda w, t: mesh.mesh_all_gather(w, chunks_of(t, N), Bf16Codec()), (N - 1) * CODED // N, 1
    ),
}  # fmt: skip


def test_in_a_star_rank_0_sends_to_all_and_the_others_only_to_it() -> None:
    tensors = inputs(N, S // 4, torch.float32)
    run = Run(N, lambda wire: mesh.star_all_reduce(wire, tensors[wire.rank], ReduceOp.SUM))
    assert [wire.sent_bytes for wire in run.wires] == [(N - 1) * S] + [S] * (N - 1)
    assert run.rounds == [N - 1] + [1] * (N - 1)


@pytest.mark.parametrize("name", COSTS)
def test_each_rank_sends_the_bytes_and_waits_the_hops_that_the_docstring_says(name: str) -> None:
    algorithm, sent_bytes, hops = COSTS[name]
    tensors = inputs(N, COUNT)
    run = Run(N, lambda wire: algorithm(wire, tensors[wire.rank]))
    assert [wire.sent_bytes for wire in run.wires] == [sent_bytes] * N
    assert run.rounds == [hops] * N


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rank_alone_sends_nothing(algorithm: str) -> None:
    (tensor,) = inputs(1, 11)
    expected = {
        "mesh bf16": through(Bf16Codec(), tensor),
        "mesh int8 with feedback": through(Int8Codec(), tensor + tensor / 99),
    }.get(algorithm, tensor.clone())
    run = Run(1, lambda wire: ALGORITHMS[algorithm](wire, tensor, ReduceOp.AVG))
    assert torch.equal(tensor, expected)
    assert run.wires[0].sent_bytes == 0
