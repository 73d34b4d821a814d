"""Sums along a chain: what they give to the bit, who speaks to whom, and that nobody waits who only polls."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import cast

import pytest
import torch
from torch import Tensor

from cluster.worlds import die
from collectives.contract import PATIENCE, RunRanks, open_group, run_group, same_bits, values
from smolcluster.collectives.base import Communicator, Work
from smolcluster.collectives.chain import ChainSum, EndsSum, Pollable
from smolcluster.collectives.groups import tcp_group
from smolcluster.collectives.local import LocalGroup
from smolcluster.collectives.work import PendingWork
from smolcluster.errors import PeerLost, SmolError
from smolcluster.telemetry import TraceRecorder
from transport.leaks import no_leftovers

TAG = 40
LOCAL_AND_TCP = [("local", 1), ("local", 2), ("local", 3), ("local", 4), ("tcp", 1), ("tcp", 2), ("tcp", 4)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
SHAPES = ((0,), (1,), (), (0, 5), (3, 5, 7), (70_001,))
on_engines = pytest.mark.parametrize(("engine", "world_size"), LOCAL_AND_TCP)
on_engines_of_two = pytest.mark.parametrize(("engine", "world_size"), [one for one in LOCAL_AND_TCP if one[1] > 1])


def rough(rank: int, count: int = 1001) -> Tensor:
    """Float32 numbers of very different sizes: every order of adding them rounds to other bits."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, generator=generator) * 10.0 ** torch.randint(-4, 5, (count,), generator=generator)


def added(parts: Sequence[Tensor]) -> Tensor:
    """The sum from the first part on, one after the other."""
    total = parts[0].clone()
    for part in parts[1:]:
        total = total + part
    return total


KINDS = list(itertools.product(DTYPES, SHAPES))


def of_kind(kind: int, rank: int) -> Tensor:
    """What a rank brings into a sum of tensors of one of KINDS."""
    dtype, shape = KINDS[kind]
    return values(torch.Size(shape).numel(), dtype, rank).reshape(shape)


@pytest.fixture
def only_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for something that is not there yet fails."""
    wait = PendingWork.wait

    def checked(self: PendingWork, timeout: float | None = None) -> None:
        assert self.done(), "poll waits"
        wait(self, timeout)

    monkeypatch.setattr(PendingWork, "wait", checked)


def poll_in_turn(sums: Sequence[Pollable]) -> None:
    """Poll all of them until all are done."""
    deadline = time.monotonic() + PATIENCE
    while sums := [one for one in sums if not one.poll()]:
        assert time.monotonic() < deadline, "polling makes no progress"
        time.sleep(0)  # bytes of the tcp engine move on other threads


# --- ChainSum


@on_engines
def test_a_chain_sum_adds_from_rank_0_upwards_and_is_the_same_bits_everywhere(
    run_ranks: RunRanks, world_size: int
) -> None:
    def fn(comm: Communicator) -> Tensor:
        tensor = rough(comm.rank)
        ChainSum(comm, tensor, TAG).wait()
        return tensor

    parts = [rough(rank) for rank in range(world_size)]
    assert same_bits([added(parts), *run_ranks(world_size, fn)])
    if world_size > 2:  # of two the order does not matter
        assert not same_bits([added(parts), added(parts[::-1])])


@on_engines_of_two
def test_a_chain_sum_takes_any_dtype_and_shape(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        for kind in range(len(KINDS)):
            tensor = of_kind(kind, comm.rank)
            address = tensor.data_ptr()
            ChainSum(comm, tensor, TAG).wait()
            assert tensor.data_ptr() == address
            assert same_bits([added([of_kind(kind, rank) for rank in range(world_size)]), tensor]), KINDS[kind]

    run_ranks(world_size, fn)


@on_engines
def test_many_chain_sums_may_be_under_way_and_each_rank_may_begin_and_end_them_in_an_order_of_its_own(
    run_ranks: RunRanks, world_size: int
) -> None:
    count = 7

    def part(number: int, rank: int) -> Tensor:
        return rough(100 * number + rank, 10 ** (number % 5))

    def fn(comm: Communicator) -> list[Tensor]:
        tensors = [part(number, comm.rank) for number in range(count)]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(comm.rank)).tolist()
        begun = {number: ChainSum(comm, tensors[number], 3 * number) for number in order}
        # A sum moves on only while each rank looks after it. If every rank waited for one alone, another on each, all
        # would wait for ever.
        poll_in_turn([*begun.values()])
        for number in reversed(order):
            begun[number].wait()
        return tensors

    found = run_ranks(world_size, fn)
    for number in range(count):
        parts = [part(number, rank) for rank in range(world_size)]
        assert same_bits([added(parts), *(tensors[number] for tensors in found)])


@on_engines
def test_a_tag_may_be_used_again_once_its_sum_is_done(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> list[list[float]]:
        found: list[list[float]] = []
        for step in range(20):
            tensor = torch.tensor([1.0 + comm.rank, float(step)])
            ChainSum(comm, tensor, TAG).wait()
            found.append(tensor.tolist())
        return found

    ranks = world_size * (world_size + 1) / 2
    assert run_ranks(world_size, fn) == [[[ranks, float(world_size * step)] for step in range(20)]] * world_size


def test_a_rank_that_was_passed_its_part_adds_and_sends_on_when_it_is_polled_and_no_sooner() -> None:
    comms = LocalGroup(3).communicators
    tensors = [torch.tensor([10.0**rank]) for rank in range(3)]
    # The last rank comes first, the one between never, for now.
    last = ChainSum(comms[2], tensors[2], TAG)
    first = ChainSum(comms[0], tensors[0], TAG)
    assert [last.poll(), first.poll(), last.poll()] == [False] * 3
    between = ChainSum(comms[1], tensors[1], TAG)
    assert not last.poll()
    assert not between.poll()  # what came from below has gone up
    assert [first.poll(), last.poll()] == [False, True]
    assert tensors[2].tolist() == [111.0]
    assert not first.poll()
    assert between.poll()  # and the total down
    assert first.poll()
    assert [tensor.tolist() for tensor in tensors] == [[111.0]] * 3
    for one in (first, between, last):
        one.wait()
    assert [tensor.tolist() for tensor in tensors] == [[111.0]] * 3


@pytest.mark.usefixtures("only_polls")
@on_engines
def test_polls_of_one_thread_bring_all_ranks_to_the_end(engine: str, world_size: int) -> None:
    """It would never end if a poll on one rank waited for another rank."""
    with no_leftovers():
        comms = open_group(engine, world_size)
        try:
            tensors = [rough(rank, 30_000) for rank in range(world_size)]
            ends = [rough(10 + rank, 30_000) for rank in range(world_size)]
            expected = added(tensors), ends[0] + ends[-1]
            sums: list[Pollable] = [ChainSum(comm, tensors[rank], 1) for rank, comm in enumerate(comms)]
            if world_size > 1:
                brings = {0, world_size - 1}
                sums += [EndsSum(comm, ends[rank] if rank in brings else None, 2) for rank, comm in enumerate(comms)]
            poll_in_turn(sums)
            for one in sums:
                one.wait()  # which has nothing to wait for any more
            assert same_bits([expected[0], *tensors])
            if world_size > 1:
                assert same_bits([expected[1], ends[0], ends[-1]])
        finally:
            for comm in comms:
                comm.close()


# --- EndsSum


@on_engines_of_two
def test_the_ends_have_the_same_sum_and_the_ranks_between_bring_nothing(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> Tensor | None:
        tensor = rough(comm.rank) if comm.rank in (0, world_size - 1) else None
        pending = EndsSum(comm, tensor, TAG)
        pending.wait()
        pending.wait()  # adds nothing again
        return tensor

    found = run_ranks(world_size, fn)
    assert same_bits([rough(0) + rough(world_size - 1), found[0], found[-1]])
    assert found[1:-1] == [None] * (world_size - 2)


@on_engines_of_two
def test_an_ends_sum_takes_any_dtype_and_shape(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        for kind in range(len(KINDS)):
            tensor = of_kind(kind, comm.rank) if comm.rank in (0, world_size - 1) else None
            EndsSum(comm, tensor, TAG).wait()
            if tensor is not None:
                assert same_bits([of_kind(kind, 0) + of_kind(kind, world_size - 1), tensor]), KINDS[kind]

    run_ranks(world_size, fn)


@on_engines_of_two
def test_ends_sums_and_a_chain_sum_at_once_do_not_mix(run_ranks: RunRanks, world_size: int) -> None:
    """As a step of layers on several ranks has them, in other orders on other ranks."""

    def fn(comm: Communicator) -> list[Tensor]:
        is_end = comm.rank in (0, world_size - 1)
        total = rough(comm.rank)
        tied = [rough(10 * number + comm.rank, 500 * number) for number in (1, 2, 3)]
        order = [0, 1, 2, 3] if comm.rank % 2 == 0 else [2, 3, 1, 0]
        begun: list[Pollable] = [
            ChainSum(comm, total, TAG) if number == 0 else EndsSum(comm, tied[number - 1] if is_end else None, number)
            for number in order
        ]
        poll_in_turn(begun)
        for one in begun:
            one.wait()
        return [total, *tied]

    found = run_ranks(world_size, fn)
    assert same_bits([added([rough(rank) for rank in range(world_size)]), *(tensors[0] for tensors in found)])
    for number in (1, 2, 3):
        sum_of_ends = rough(10 * number, 500 * number) + rough(10 * number + world_size - 1, 500 * number)
        assert same_bits([sum_of_ends, found[0][number], found[-1][number]])
        for rank in range(1, world_size - 1):
            assert same_bits([rough(10 * number + rank, 500 * number), found[rank][number]])


class SlowSends:
    """Rank 0 of two, as a communicator: answers come at once, and what is sent has gone when `gone` is finished."""

    rank, world_size = 0, 2

    def __init__(self, answer: Tensor) -> None:
        self._answer = answer
        self.sent: list[Tensor] = []
        self.gone = PendingWork(None, lambda: "send", [])

    def send(self, tensor: Tensor, dst: int, tag: int) -> Work:
        self.sent.append(tensor)
        return self.gone

    def recv(self, src: int, tag: int, out: Tensor | None = None) -> Work:
        work = PendingWork(None, lambda: "recv", [self._answer])
        work.finish()
        return work


def test_an_end_adds_what_has_come_only_when_its_own_has_gone() -> None:
    """Engines send from the tensor itself."""
    tensor = torch.tensor([1.0, 2.0])
    comm = SlowSends(torch.tensor([10.0, 20.0]))
    pending = EndsSum(cast(Communicator, comm), tensor, TAG)
    assert not pending.poll()
    assert not pending.poll()
    assert [sent.tolist() for sent in comm.sent] == [[1.0, 2.0]]
    comm.gone.finish()
    assert pending.poll()
    pending.wait()
    assert tensor.tolist() == [11.0, 22.0]


# --- who speaks to whom


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_pass_between_neighbours_only_and_as_many_as_the_docstring_says(world_size: int) -> None:
    count = 1000

    def fn(comm: Communicator) -> list[tuple[int, int, int]]:
        comm.telemetry.trace = TraceRecorder()
        ChainSum(comm, torch.zeros(count), 1).wait()
        EndsSum(comm, torch.zeros(count) if comm.rank in (0, world_size - 1) else None, 2).wait()
        comm.barrier(PATIENCE)
        return [
            (int(event.details["src"]), int(event.details["dst"]), int(event.details["tag"]))
            for event in comm.telemetry.trace.events()
            if event.track.startswith("send") and "tag" in event.details and int(event.details["bytes"]) >= 4 * count
        ]

    found = run_group(list(tcp_group(world_size)), fn)
    pairs = [*itertools.pairwise(range(world_size))]
    expected = Counter((*ends, tag) for pair in pairs for ends in (pair, pair[::-1]) for tag in (1, 2))
    assert Counter(itertools.chain(*found)) == expected
    assert all(src == rank for rank, events in enumerate(found) for src, _, _ in events)
    assert expected.total() == 2 * 2 * (world_size - 1)


# --- losses


def lose(comm: Communicator) -> None:
    """The rank is gone, as far as the others can tell."""
    world = getattr(comm, "_world", None)
    if world is None:
        comm.close()
    else:
        die(world)


@pytest.mark.parametrize("engine", ["local", "tcp"])
@pytest.mark.parametrize(
    ("kind", "lost", "polls"), list(itertools.product(("chain", "ends"), (0, 1, 2), (False, True)))
)
def test_a_lost_rank_ends_what_waits_for_it(engine: str, kind: str, lost: int, polls: bool) -> None:
    """Wherever it was in the chain, its neighbours hear of it."""
    comms = open_group(engine, 3)
    begun = threading.Barrier(3)
    errors: dict[int, SmolError] = {}

    def fn(comm: Communicator) -> None:
        if comm.rank == lost:
            begun.wait(PATIENCE)
            lose(comm)
            return
        tensor = torch.ones(100_000)
        pending: Pollable = (
            ChainSum(comm, tensor, TAG) if kind == "chain" else EndsSum(comm, tensor if comm.rank != 1 else None, TAG)
        )
        begun.wait(PATIENCE)
        try:
            if polls:
                poll_in_turn([pending])
            pending.wait()
        except SmolError as error:
            errors[comm.rank] = error
            lose(comm)  # so goes one after the other, as processes of a run do

    run_group(comms, fn)
    assert errors.keys() == {0, 1, 2} - {lost}
    assert all(isinstance(error, PeerLost) for error in errors.values()), errors
    neighbours = [rank for rank in errors if abs(rank - lost) == 1]
    assert all(errors[rank].rank == lost for rank in neighbours), errors  # type: ignore[attr-defined]
