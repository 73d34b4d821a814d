"""Collectives of ranks that share memory: the bits of TCP, whoever is faster, and TCP where memory is not shared."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from collectives.contract import PATIENCE, run_group, same_bits
from smolcluster.collectives.base import Communicator, ReduceOp
from smolcluster.collectives.groups import tcp_group
from smolcluster.collectives.shm import BLOCK_BYTES
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.telemetry import TraceRecorder
from smolcluster.transport.frame import PRELUDE_BYTES
from smolcluster.transport.shm import BULK_RING_BYTES, MESSAGE_RING_BYTES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ranks of one host speak TCP on Windows")

BLOCK = BLOCK_BYTES // 4  # float32 elements


def shared_lanes(comm: Communicator) -> list[bool]:
    assert isinstance(comm, TcpCommunicator)
    return [lane.shares_memory for lane in [*comm._collective_lanes.values(), *comm._message_lanes.values()]]


def noise(count: int, dtype: torch.dtype, rank: int) -> Tensor:
    """Numbers whose sum depends on the order in which they are added, if they are floats."""
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 30, (count,), generator=generator).to(dtype)


def reduced(world_size: int, count: int, dtype: torch.dtype, op: ReduceOp, *, shared_memory: bool) -> list[Tensor]:
    def fn(comm: Communicator) -> Tensor:
        assert all(shared == shared_memory for shared in shared_lanes(comm))
        tensor = noise(count, dtype, comm.rank)
        comm.all_reduce(tensor, op).wait(PATIENCE)
        return tensor

    return run_group(tcp_group(world_size, shared_memory=shared_memory), fn)


@pytest.mark.parametrize("op", list(ReduceOp))
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_reduce_gives_the_bits_of_tcp(world_size: int, op: ReduceOp) -> None:
    count = 300_001  # several pieces of a ring, and of a swap, the last one odd
    through_memory = reduced(world_size, count, torch.float32, op, shared_memory=True)
    over_tcp = reduced(world_size, count, torch.float32, op, shared_memory=False)
    assert same_bits(through_memory + over_tcp)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64],
)
def test_two_ranks_reduce_every_dtype(dtype: torch.dtype) -> None:
    through_memory = reduced(2, 2 * BLOCK_BYTES // dtype.itemsize + 3, dtype, ReduceOp.SUM, shared_memory=True)
    expected = noise(2 * BLOCK_BYTES // dtype.itemsize + 3, dtype, 0)
    expected += noise(len(expected), dtype, 1)
    assert same_bits([*through_memory, expected])


def test_two_ranks_reduce_any_size_one_after_the_other() -> None:
    counts = [0, 1, 3, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 7, 3 * BLOCK + 5, BULK_RING_BYTES // 4 * 2 + 1, 2]

    def fn(comm: Communicator) -> list[Tensor]:
        tensors = [noise(count, torch.float32, comm.rank) for count in counts]
        works = [comm.all_reduce(tensor) for tensor in tensors]
        for work in works:
            work.wait(PATIENCE)
        return tensors

    results = run_group(tcp_group(2, shared_memory=True), fn)
    for count, mine, theirs in zip(counts, *results, strict=True):
        assert same_bits([mine, theirs, noise(count, torch.float32, 0) + noise(count, torch.float32, 1)])


def test_two_ranks_reduce_tensors_that_lie_anywhere() -> None:
    counts = [1, BLOCK + 3, 0, 3 * BLOCK, 7, BLOCK, BULK_RING_BYTES // 4 + 1]

    def fn(comm: Communicator) -> list[Tensor]:
        tensors = [noise(count, torch.float32, comm.rank).view(1, count) for count in counts]
        places = [tensor.data_ptr() for tensor in tensors]
        assert comm.all_reduce_scattered is not None
        comm.all_reduce_scattered(tensors).wait(PATIENCE)
        assert [tensor.data_ptr() for tensor in tensors] == places
        return tensors

    results = run_group(tcp_group(2, shared_memory=True), fn)
    for count, mine, theirs in zip(counts, *results, strict=True):
        expected = noise(count, torch.float32, 0) + noise(count, torch.float32, 1)
        assert same_bits([mine.flatten(), theirs.flatten(), expected])


def test_what_cannot_be_reduced_where_it_lies_is_refused() -> None:
    def fn(comm: Communicator) -> None:
        scattered = comm.all_reduce_scattered
        assert scattered is not None
        for tensors, what in (
            ([], "at least one"),
            ([torch.ones(2, 3).t()], "not contiguous"),
            ([torch.ones(2), torch.ones(2, dtype=torch.float64)], "of one dtype"),
            ([torch.ones(2), torch.ones(2, device="meta")], "on the CPU"),
        ):
            with pytest.raises(ValueError, match=what):
                scattered(tensors)
        comm.barrier(PATIENCE)

    run_group(tcp_group(2, shared_memory=True), fn)


@pytest.mark.parametrize(("world_size", "shared_memory"), [(2, False), (3, True)])
def test_others_copy_together_what_they_reduce(world_size: int, shared_memory: bool) -> None:
    def fn(comm: Communicator) -> None:
        assert comm.all_reduce_scattered is None
        comm.barrier(PATIENCE)

    run_group(tcp_group(world_size, shared_memory=shared_memory), fn)


def test_two_ranks_agree_on_the_sign_of_zero_and_on_nan() -> None:
    first = torch.tensor([0.0, -0.0, float("nan"), 1.0, -0.0, float("inf")])
    second = torch.tensor([-0.0, 0.0, 1.0, float("nan"), -0.0, float("-inf")])

    def fn(comm: Communicator) -> list[Tensor]:
        tensors = [(first if comm.rank == 0 else second).clone() for _ in ReduceOp]
        for tensor, op in zip(tensors, ReduceOp, strict=True):
            comm.all_reduce(tensor, op).wait(PATIENCE)
        return tensors

    for mine, theirs in zip(*run_group(tcp_group(2, shared_memory=True), fn), strict=True):
        assert same_bits([mine, theirs])


@pytest.mark.parametrize("late_rank", [0, 1])
def test_a_rank_that_comes_late_finds_what_the_other_has_sent(late_rank: int) -> None:
    has_begun = threading.Event()

    def fn(comm: Communicator) -> Tensor:
        tensor = noise(6 * BLOCK, torch.float32, comm.rank)
        if comm.rank == late_rank:
            assert has_begun.wait(PATIENCE)
        work = comm.all_reduce(tensor)
        has_begun.set()
        work.wait(PATIENCE)
        return tensor

    expected = noise(6 * BLOCK, torch.float32, 0) + noise(6 * BLOCK, torch.float32, 1)
    assert same_bits([*run_group(tcp_group(2, shared_memory=True), fn), expected])


def test_the_background_thread_finishes_what_nobody_waits_for() -> None:
    def fn(comm: Communicator) -> Tensor:
        tensor = noise(5 * BLOCK, torch.float32, comm.rank)
        is_done = threading.Event()
        comm.all_reduce(tensor).add_done_callback(lambda _: is_done.set())
        assert is_done.wait(PATIENCE)
        return tensor

    expected = noise(5 * BLOCK, torch.float32, 0) + noise(5 * BLOCK, torch.float32, 1)
    assert same_bits([*run_group(tcp_group(2, shared_memory=True), fn), expected])


def test_messages_larger_than_their_ring_pass_both_ways_beside_collectives() -> None:
    count = 3 * MESSAGE_RING_BYTES + 1

    def fn(comm: Communicator) -> tuple[Tensor, Tensor]:
        peer = 1 - comm.rank
        sent, summed = noise(count, torch.uint8, comm.rank), noise(3 * BLOCK, torch.float32, comm.rank)
        received = torch.empty(count, dtype=torch.uint8)
        works = [comm.send(sent, peer, 5), comm.all_reduce(summed), comm.recv(peer, 5, received)]
        for work in works:
            work.wait(PATIENCE)
        return received, summed

    (first, first_sum), (second, second_sum) = run_group(tcp_group(2, shared_memory=True), fn)
    assert same_bits([first, noise(count, torch.uint8, 1)])
    assert same_bits([second, noise(count, torch.uint8, 0)])
    assert same_bits([first_sum, second_sum, noise(3 * BLOCK, torch.float32, 0) + noise(3 * BLOCK, torch.float32, 1)])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of this host")
def test_only_ranks_with_the_same_address_share_memory() -> None:
    def fn(comm: Communicator) -> tuple[list[bool], Tensor]:
        tensor = noise(300_001, torch.float32, comm.rank)
        comm.all_reduce(tensor).wait(PATIENCE)
        return shared_lanes(comm), tensor

    hosts = ["127.0.0.2", "127.0.0.1", "127.0.0.1"]
    lanes, tensors = zip(*run_group(tcp_group(3, shared_memory=True, hosts=hosts), fn), strict=True)
    assert lanes == ([False] * 4, [False, True, False, True], [False, True, False, True])
    assert same_bits([*tensors, *reduced(3, 300_001, torch.float32, ReduceOp.SUM, shared_memory=False)])


def test_a_part_of_the_ranks_shares_memory_of_its_own() -> None:
    def fn(comm: Communicator) -> list[bool]:
        part = comm.split([0, 2], "ends")
        if part is None:
            return []
        try:
            tensor = torch.ones(BLOCK + 1)
            part.all_reduce(tensor).wait(PATIENCE)
            assert bool((tensor == 2).all())
            return shared_lanes(part)
        finally:
            part.close()

    assert run_group(tcp_group(3, shared_memory=True), fn) == [[True, True], [], [True, True]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_passes_through_memory_is_counted_like_tcp(world_size: int) -> None:
    def counted(shared_memory: bool) -> list[tuple[float, float]]:
        def fn(comm: Communicator) -> tuple[float, float]:
            assert isinstance(comm, TcpCommunicator)
            comm.barrier(PATIENCE)
            names = ("link/sent_bytes", "link/recv_bytes")
            before = [comm.telemetry.counter(name) for name in names]
            comm.all_reduce(torch.ones(2 * BLOCK)).wait(PATIENCE)
            sent, received = (
                comm.telemetry.counter(name) - earlier for name, earlier in zip(names, before, strict=True)
            )
            return sent, received

        return run_group(tcp_group(world_size, shared_memory=shared_memory), fn)

    payload = 2 * (world_size - 1) / world_size * 2 * BLOCK_BYTES
    for sent, received in counted(True) + counted(False):
        assert sent == pytest.approx(payload, rel=0.02)  # the heads of the frames, and heartbeats
        assert received == pytest.approx(payload, rel=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_closed_communicators_leave_no_segment() -> None:
    def segments() -> int:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        return sum("memfd:smolcluster" in line for line in maps.splitlines())

    def fn(comm: Communicator) -> int:
        comm.all_reduce(torch.ones(BLOCK)).wait(PATIENCE)
        return segments()

    gc.collect()
    before = segments()
    during = run_group(tcp_group(3, shared_memory=True), fn)
    gc.collect()
    assert max(during) >= before + 12  # three pairs, two lanes each, mapped by both ends
    assert segments() == before


def test_a_trace_has_all_bytes_of_a_swap() -> None:
    def fn(comm: Communicator) -> dict[str, object]:
        assert isinstance(comm, TcpCommunicator)
        trace = comm.telemetry.trace = TraceRecorder()
        comm.all_reduce(torch.ones(20 * BLOCK)).wait(PATIENCE)
        return {event.track: event.details["bytes"] for event in trace.events()}

    nbytes = 20 * BLOCK_BYTES + PRELUDE_BYTES
    assert run_group(tcp_group(2, shared_memory=True), fn) == [
        {"send to rank 1": nbytes, "recv from rank 1": nbytes},
        {"send to rank 0": nbytes, "recv from rank 0": nbytes},
    ]
