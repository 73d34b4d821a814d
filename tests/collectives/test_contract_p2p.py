"""The contract of every Communicator, part 2: the point-to-point lane and groups made by split."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from collectives.contract import PATIENCE, RunRanks, values
from smolcluster.collectives.base import Communicator
from smolcluster.errors import CollectiveMismatch

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
SHAPES = ((0,), (1,), (), (0, 5), (3, 5, 7), (70_001,), (3 * 2**18 + 5,))


def test_a_message_arrives_with_its_shape_dtype_and_values(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        for tag, (dtype, shape) in enumerate(itertools.product(DTYPES, SHAPES)):
            tensor = values(torch.Size(shape).numel(), dtype, 3).reshape(shape)
            if comm.rank == 0:
                comm.send(tensor, 1, tag).wait(PATIENCE)
            else:
                work = comm.recv(0, tag)
                work.wait(PATIENCE)
                (received,) = work.result()
                assert received.shape == tensor.shape, (dtype, shape)
                assert received.dtype == dtype, (dtype, shape)
                assert torch.equal(received, tensor), (dtype, shape)

    run_ranks(2, fn)


def test_recv_writes_into_the_tensor_it_was_given(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        for tag, shape in enumerate(SHAPES):
            tensor = values(torch.Size(shape).numel(), torch.float32, 3).reshape(shape)
            if comm.rank == 0:
                comm.send(tensor, 1, tag).wait(PATIENCE)
            else:
                out = torch.zeros(shape)
                work = comm.recv(0, tag, out)
                work.wait(PATIENCE)
                assert torch.equal(out, tensor), shape  # the shape is the receiver's, count and dtype must agree
                assert work.result()[0].data_ptr() == out.data_ptr()

    run_ranks(2, fn)


@pytest.mark.parametrize(
    "out",
    [torch.zeros(5), torch.zeros(7), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int32)],
    ids=["too small", "too large", "wider", "another kind"],
)
def test_recv_into_a_tensor_that_does_not_fit_raises_mismatch_there_alone(
    run_ranks: RunRanks, out: torch.Tensor
) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.send(torch.ones(2, 3), 1, 4).wait(PATIENCE)
        else:
            with pytest.raises(CollectiveMismatch, match="rank 0"):
                comm.recv(0, 4, out).wait(PATIENCE)
            assert not bool(out.any())
        # The message is gone, and everything else goes on.
        comm.barrier(PATIENCE)
        if comm.rank == 0:
            comm.send(torch.ones(5), 1, 4).wait(PATIENCE)
        else:
            assert comm.recv(0, 4).result()[0].tolist() == [1.0] * 5

    run_ranks(2, fn)


def test_messages_of_one_source_and_tag_come_in_the_order_of_their_sends(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            works = [comm.send(torch.full((n % 7,), float(n)), 1, 4) for n in range(50)]
        else:
            works = [comm.recv(0, 4) for n in range(50)]
            for n, work in enumerate(works):
                assert work.result()[0].tolist() == [float(n)] * (n % 7)
        for work in works:
            work.wait(PATIENCE)

    run_ranks(2, fn)


def test_receives_are_matched_by_tag_whatever_the_order_of_the_sends(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        tags = [0, 1, 2, 1000, 2**20]
        if comm.rank == 0:
            works = [comm.send(torch.full((50_000,), float(tag)), 1, tag) for tag in tags]
            for work in works:
                work.wait(PATIENCE)
        else:
            for tag in reversed(tags):
                work = comm.recv(0, tag)
                work.wait(PATIENCE)
                assert bool((work.result()[0] == float(tag)).all()), tag

    run_ranks(2, fn)


def test_receives_are_matched_by_source(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        works = [comm.send(torch.tensor([comm.rank]), dst, 7) for dst in range(4) if dst != comm.rank]
        for src in reversed(range(4)):
            if src != comm.rank:
                assert comm.recv(src, 7).result()[0].tolist() == [src]
        for work in works:
            work.wait(PATIENCE)

    run_ranks(4, fn)


def test_both_directions_at_once_do_not_block_each_other(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        peer = 1 - comm.rank
        # 4 MiB: more than the socket buffers hold, so a blocking send on both sides would never end.
        sends = [comm.send(torch.full((2**20,), float(comm.rank)), peer, tag) for tag in range(3)]
        receives = [comm.recv(peer, tag) for tag in range(3)]
        for work in receives:
            assert bool((work.result()[0] == float(peer)).all())
        for work in sends:
            work.wait(PATIENCE)

    run_ranks(2, fn)


def test_a_receive_posted_before_its_send_is_filled_later(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 1:
            work = comm.recv(0, 3)
            assert not work.done()
            comm.barrier(PATIENCE)
            assert work.result()[0].tolist() == [1, 2]
        else:
            comm.barrier(PATIENCE)
            comm.send(torch.tensor([1, 2]), 1, 3).wait(PATIENCE)

    run_ranks(2, fn)


def test_a_message_does_not_wait_for_a_collective_that_the_peer_has_not_called(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        tensor = torch.ones(1000)
        if comm.rank == 0:
            work = comm.all_reduce(tensor)
            comm.send(torch.ones(100_000), 1, 0).wait(PATIENCE)
            assert comm.recv(1, 1).result()[0].tolist() == [5]
        else:
            assert comm.recv(0, 0).result()[0].sum().item() == 100_000
            comm.send(torch.tensor([5]), 0, 1).wait(PATIENCE)
            work = comm.all_reduce(tensor)
        work.wait(PATIENCE)
        assert bool((tensor == 2).all())

    run_ranks(2, fn)


def test_a_received_tensor_belongs_to_the_receiver(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            tensor = torch.ones(1000)
            comm.send(tensor, 1, 0).wait(PATIENCE)
            tensor.zero_()
            comm.barrier(PATIENCE)
        else:
            received = comm.recv(0, 0).result()[0]
            comm.barrier(PATIENCE)
            assert received.sum().item() == 1000

    run_ranks(2, fn)


def test_a_tensor_that_requires_grad_can_be_sent(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            activation = torch.ones(3, requires_grad=True) * 2
            comm.send(activation, 1, 0).wait(PATIENCE)
        else:
            received = comm.recv(0, 0).result()[0]
            assert received.tolist() == [2, 2, 2]
            assert not received.requires_grad

    run_ranks(2, fn)


def test_a_pipeline_of_three_ranks_passes_micro_batches_on(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> list[float]:
        if comm.rank == 0:
            works = [comm.send(torch.full((64, 32), float(m)), 1, m) for m in range(8)]
            for work in works:
                work.wait(PATIENCE)
            return []
        outputs = []
        for m in range(8):
            x = comm.recv(comm.rank - 1, m).result()[0]
            if comm.rank == 1:
                comm.send(x + 1, 2, m).wait(PATIENCE)
            else:
                outputs.append(x.mean().item())
        return outputs

    assert run_ranks(3, fn)[2] == [m + 1.0 for m in range(8)]


# --- split ----------------------------------------------------------------------------------------------------------


def test_split_gives_each_part_its_own_ranks_and_none_outside(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        even = comm.split([0, 2], "even")
        odd = comm.split([3, 1], "odd")
        mine, other = (even, odd) if comm.rank % 2 == 0 else (odd, even)
        assert other is None
        assert mine is not None
        # The order given decides: global rank 3 is rank 0 of the odd part.
        assert (mine.rank, mine.world_size) == ({0: 0, 2: 1, 3: 0, 1: 1}[comm.rank], 2)
        assert mine.generation == comm.generation
        tensor = torch.full((1001,), float(comm.rank))
        mine.all_reduce(tensor).wait(PATIENCE)
        assert bool((tensor == (2 if comm.rank % 2 == 0 else 4)).all())
        gathered = torch.empty(2, dtype=torch.int64)
        mine.all_gather(gathered, torch.tensor([comm.rank])).wait(PATIENCE)
        assert gathered.tolist() == ([0, 2] if comm.rank % 2 == 0 else [3, 1])
        assert mine.exchange(comm.rank, PATIENCE) == gathered.tolist()
        if mine.rank == 0:
            mine.send(torch.tensor([9]), 1, 0).wait(PATIENCE)
        else:
            assert mine.recv(0, 0).result()[0].tolist() == [9]
        comm.barrier(PATIENCE)
        mine.close()

    run_ranks(4, fn)


def test_a_split_lane_runs_while_a_collective_of_the_whole_group_is_pending(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        lane = comm.split([0, 1], "lane")
        assert lane is not None
        whole, part = torch.ones(1000), torch.ones(2000)
        if comm.rank == 0:
            whole_work = comm.all_reduce(whole)
            lane.all_reduce(part).wait(PATIENCE)
            lane.barrier(PATIENCE)
        else:
            lane.all_reduce(part).wait(PATIENCE)
            lane.barrier(PATIENCE)
            whole_work = comm.all_reduce(whole)
        whole_work.wait(PATIENCE)
        assert bool((whole == 2).all())
        assert bool((part == 2).all())
        comm.barrier(PATIENCE)
        lane.close()

    run_ranks(2, fn)


def test_two_lanes_are_used_from_two_threads_at_once(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        lane = comm.split([0, 1, 2], "lane")
        assert lane is not None
        failures: list[BaseException] = []

        def loop(group: Communicator, amount: float) -> None:
            try:
                for count in (1, 1001, 200_003) * 5:
                    tensor = torch.full((count,), amount)
                    group.all_reduce(tensor).wait(PATIENCE)
                    assert bool((tensor == 3 * amount).all())
            except BaseException as exc:  # noqa: BLE001 - top of the thread; checked below
                failures.append(exc)

        thread = threading.Thread(target=loop, args=(lane, 2.0), name="test-lane")
        thread.start()
        loop(comm, 1.0)
        thread.join()
        assert not failures, failures
        comm.barrier(PATIENCE)
        lane.close()

    run_ranks(3, fn)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_split_of_all_ranks_and_of_one_rank_work(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        everyone = comm.split(range(world_size), "everyone")
        assert everyone is not None
        alone = [comm.split([r], f"alone-{r}") for r in range(world_size)][comm.rank]
        assert alone is not None
        assert (alone.rank, alone.world_size) == (0, 1)
        tensor = torch.ones(10)
        alone.all_reduce(tensor).wait(PATIENCE)
        assert tensor.sum().item() == 10
        everyone.all_reduce(tensor).wait(PATIENCE)
        assert tensor.sum().item() == 10 * world_size
        comm.barrier(PATIENCE)
        alone.close()
        everyone.close()

    run_ranks(world_size, fn)


def test_a_split_can_be_split_again(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        three = comm.split([3, 1, 0], "three")
        if three is not None:
            two = three.split([2, 0], "two")
            if two is not None:
                assert two.exchange(comm.rank, PATIENCE) == [0, 3]
        comm.barrier(PATIENCE)
        for group in (three,):
            if group is not None:
                group.close()

    run_ranks(4, fn)
