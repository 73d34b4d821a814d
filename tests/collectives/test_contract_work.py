"""The contract of every Communicator, part 3: the life of a Work, ranks out of step, timeouts, abort and close."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from collectives.contract import PATIENCE, RunRanks
from smolcluster.collectives.base import Communicator, ReduceOp, Work
from smolcluster.collectives.codec import codec_for
from smolcluster.errors import CollectiveMismatch, CollectiveTimeout, PeerLost, SmolError
from smolcluster.telemetry import Telemetry

# How long a test waits for what must not happen: long enough to catch it in nearly every run, short enough to repeat.
SHORT = 0.05


def test_a_communicator_says_who_it_is(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> tuple[int, int, int, bool]:
        return comm.rank, comm.world_size, comm.generation, isinstance(comm.telemetry, Telemetry)

    ranks = run_ranks(3, fn)
    assert [(rank, world_size) for rank, world_size, _, _ in ranks] == [(0, 3), (1, 3), (2, 3)]
    assert len({generation for _, _, generation, _ in ranks}) == 1
    assert all(telemetry for _, _, _, telemetry in ranks)


# --- asynchronous order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_many_works_in_flight_may_be_waited_for_in_any_order(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        tensors = [torch.full((1 + 997 * (n % 5),), float(n)) for n in range(100)]
        works = [comm.all_reduce(tensor) for tensor in tensors]
        for work in reversed(works):
            work.wait(PATIENCE)
        for n, tensor in enumerate(tensors):
            assert bool((tensor == n * world_size).all()), n

    run_ranks(world_size, fn)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_different_collectives_in_flight_do_not_mix(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        for _ in range(10):
            reduced = torch.full((501,), float(comm.rank))
            gathered = torch.empty(world_size * 3, dtype=torch.int64)
            part = torch.empty(7, dtype=torch.float64)
            copied = torch.full((9,), float(comm.rank))
            rows = torch.empty(world_size, 2)
            works = [
                comm.all_reduce(reduced),
                comm.all_gather(gathered, torch.full((3,), comm.rank)),
                comm.reduce_scatter(part, torch.full((world_size * 7,), 2.0, dtype=torch.float64)),
                comm.broadcast(copied, world_size - 1),
                comm.all_to_all(rows, torch.full((world_size, 2), float(comm.rank))),
            ]
            for work in reversed(works):
                work.wait(PATIENCE)
            assert bool((reduced == sum(range(world_size))).all())
            assert gathered.tolist() == [r for r in range(world_size) for _ in range(3)]
            assert bool((part == 2.0 * world_size).all())
            assert bool((copied == world_size - 1).all())
            assert rows[:, 0].tolist() == list(range(world_size))

    run_ranks(world_size, fn)


def test_a_call_returns_before_the_other_ranks_have_called(run_ranks: RunRanks) -> None:
    issued = threading.Event()

    def fn(comm: Communicator) -> None:
        tensor = torch.ones(10)
        if comm.rank == 0:
            work = comm.all_reduce(tensor)
            assert not work.done()
            assert work.exception() is None
            issued.set()
        else:
            assert issued.wait(PATIENCE)
            work = comm.all_reduce(tensor)
        work.wait(PATIENCE)
        assert work.done()
        assert work.exception() is None

    run_ranks(2, fn)


@pytest.mark.parametrize("world_size", [1, 2])
def test_result_waits_and_returns_the_output_tensor(run_ranks: RunRanks, world_size: int) -> None:
    def fn(comm: Communicator) -> None:
        tensor = torch.ones(10)
        (output,) = comm.all_reduce(tensor).result()
        assert output.data_ptr() == tensor.data_ptr()
        assert bool((output == world_size).all())
        gathered = torch.empty(10 * world_size)
        assert comm.all_gather(gathered, tensor).result()[0].data_ptr() == gathered.data_ptr()
        part = torch.empty(1)
        assert comm.reduce_scatter(part, torch.ones(world_size)).result()[0].data_ptr() == part.data_ptr()

    run_ranks(world_size, fn)


def test_one_work_can_be_waited_for_from_several_threads(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        tensor = torch.ones(10)
        waited = []
        if comm.rank == 0:
            work = comm.all_reduce(tensor)
            threads = [
                threading.Thread(target=lambda: waited.append(work.wait(PATIENCE)), name=f"test-waiter-{n}")
                for n in range(3)
            ]
            for thread in threads:
                thread.start()
            comm.send(torch.ones(1), 1, 0).wait(PATIENCE)
            for thread in threads:
                thread.join()
            assert waited == [None] * 3
        else:
            comm.recv(0, 0).wait(PATIENCE)
            comm.all_reduce(tensor).wait(PATIENCE)

    run_ranks(2, fn)


def test_collectives_can_be_issued_from_another_thread_than_the_one_that_waits(run_ranks: RunRanks) -> None:
    # Buckets are issued by autograd's thread and waited for by the training loop's.
    def fn(comm: Communicator) -> None:
        tensors = [torch.ones(1000) for _ in range(5)]
        works: list[Work] = []
        thread = threading.Thread(target=lambda: works.extend(map(comm.all_reduce, tensors)), name="test-issue")
        thread.start()
        thread.join()
        for work in works:
            work.wait(PATIENCE)
        assert all(bool((tensor == 3).all()) for tensor in tensors)

    run_ranks(3, fn)


# --- callbacks ------------------------------------------------------------------------------------------------------


def test_a_callback_is_called_once_with_its_work_when_it_is_done(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        tensor = torch.ones(10)
        called: list[tuple[Work, bool]] = []
        event = threading.Event()

        def callback(work: Work) -> None:
            called.append((work, work.done()))
            event.set()

        if comm.rank == 0:
            work = comm.all_reduce(tensor)
            work.add_done_callback(callback)
            assert not called
            comm.send(torch.ones(1), 1, 0).wait(PATIENCE)
        else:
            comm.recv(0, 0).wait(PATIENCE)
            work = comm.all_reduce(tensor)
            work.add_done_callback(callback)
        work.wait(PATIENCE)
        assert event.wait(PATIENCE)
        assert called == [(work, True)]
        # Done already: at once, on this thread.
        late: list[str] = []
        work.add_done_callback(lambda _: late.append(threading.current_thread().name))
        assert late == [threading.current_thread().name]

    run_ranks(2, fn)


def test_a_callback_is_called_when_the_work_fails(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            event = threading.Event()
            work = comm.all_reduce(torch.ones(10))
            work.add_done_callback(lambda _: event.set())
            comm.abort(PeerLost("rank 1 was unplugged", 1))
            assert event.wait(PATIENCE)
            assert isinstance(work.exception(), PeerLost)

    run_ranks(2, fn)


# --- out of step ----------------------------------------------------------------------------------------------------

Call = Callable[[Communicator], Work]

OUT_OF_STEP: dict[str, tuple[Call, Call]] = {
    "another count": (
        lambda comm: comm.all_reduce(torch.ones(1000)),
        lambda comm: comm.all_reduce(torch.ones(1001)),
    ),
    "a much larger count": (
        lambda comm: comm.all_reduce(torch.ones(1)),
        lambda comm: comm.all_reduce(torch.ones(400_000)),
    ),
    "nothing against something": (
        lambda comm: comm.all_reduce(torch.ones(0)),
        lambda comm: comm.all_reduce(torch.ones(5)),
    ),
    "another dtype of the same size": (
        lambda comm: comm.all_reduce(torch.ones(1000)),
        lambda comm: comm.all_reduce(torch.ones(1000, dtype=torch.int32)),
    ),
    "another operation": (
        lambda comm: comm.all_reduce(torch.ones(1000)),
        lambda comm: comm.all_reduce(torch.ones(1000), ReduceOp.MAX),
    ),
    "another collective": (
        lambda comm: comm.all_reduce(torch.ones(1000)),
        lambda comm: comm.broadcast(torch.ones(1000)),
    ),
    "reduce_scatter against all_gather": (
        lambda comm: comm.reduce_scatter(torch.ones(10), torch.ones(10 * comm.world_size)),
        lambda comm: comm.all_gather(torch.ones(10 * comm.world_size), torch.ones(10)),
    ),
    "another source": (
        lambda comm: comm.broadcast(torch.ones(1000), 0),
        lambda comm: comm.broadcast(torch.ones(1000), 1),
    ),
    "a codec on one side only": (
        lambda comm: comm.all_reduce(torch.ones(1000)),
        lambda comm: comm.all_reduce(torch.ones(1000), codec=codec_for("bf16")),
    ),
    "two codecs of the same size": (
        lambda comm: comm.all_reduce(torch.ones(1000), codec=codec_for("fp16")),
        lambda comm: comm.all_reduce(torch.ones(1000), codec=codec_for("bf16")),
    ),
    "rows that one side does not send": (
        lambda comm: comm.all_to_all(torch.ones(comm.world_size, 2), torch.ones(comm.world_size, 2)),
        lambda comm: comm.all_to_all(torch.ones(2 * comm.world_size, 2), torch.ones(2 * comm.world_size, 2)),
    ),
}


@pytest.mark.parametrize("case", OUT_OF_STEP)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_out_of_step_raise_collective_mismatch_instead_of_adding_wrong_bytes(
    run_ranks: RunRanks, world_size: int, case: str
) -> None:
    usual, odd = OUT_OF_STEP[case]

    def fn(comm: Communicator) -> SmolError | None:
        try:
            (odd if comm.rank == world_size - 1 else usual)(comm).wait(PATIENCE)
            # A rank may finish before the odd one is noticed (broadcast's source, for one), but no further.
            comm.barrier(PATIENCE)
        except SmolError as exc:
            comm.abort(exc)
            return exc
        return None

    errors = run_ranks(world_size, fn)
    # Whoever sees it says so; the rest see at least that a peer gave up. Nobody goes on.
    assert all(isinstance(error, SmolError) for error in errors), errors
    assert not any(isinstance(error, CollectiveTimeout) for error in errors), errors
    assert any(isinstance(error, CollectiveMismatch) for error in errors), errors
    message = next(str(error) for error in errors if isinstance(error, CollectiveMismatch))
    assert "rank" in message


def test_a_rank_that_is_one_collective_behind_is_noticed(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> SmolError | None:
        try:
            works = []
            if comm.rank != 1:
                works.append(comm.broadcast(torch.ones(8)))
            works.append(comm.all_reduce(torch.ones(8)))
            for work in works:
                work.wait(PATIENCE)
            comm.barrier(PATIENCE)
        except SmolError as exc:
            comm.abort(exc)
            return exc
        return None

    errors = run_ranks(3, fn)
    assert all(isinstance(error, SmolError) for error in errors), errors
    assert any(isinstance(error, CollectiveMismatch) for error in errors), errors


# --- timeouts -------------------------------------------------------------------------------------------------------


def test_wait_raises_collective_timeout_and_the_work_goes_on(run_ranks: RunRanks) -> None:
    timed_out = threading.Event()

    def fn(comm: Communicator) -> None:
        tensor = torch.ones(10)
        if comm.rank == 0:
            work = comm.all_reduce(tensor)
            with pytest.raises(CollectiveTimeout, match=f"{SHORT}"):
                work.wait(SHORT)
            assert not work.done()
            with pytest.raises(CollectiveTimeout):
                work.wait(0)
            timed_out.set()
        else:
            assert timed_out.wait(PATIENCE)
            work = comm.all_reduce(tensor)
        work.wait(PATIENCE)
        assert bool((tensor == 2).all())

    run_ranks(2, fn)


def test_recv_wait_raises_collective_timeout_and_the_message_may_still_come(run_ranks: RunRanks) -> None:
    timed_out = threading.Event()

    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            work = comm.recv(1, 5)
            with pytest.raises(CollectiveTimeout):
                work.wait(SHORT)
            timed_out.set()
            assert work.result()[0].tolist() == [1]
        else:
            assert timed_out.wait(PATIENCE)
            comm.send(torch.tensor([1]), 0, 5).wait(PATIENCE)

    run_ranks(2, fn)


@pytest.mark.parametrize("call", ["exchange", "barrier"])
def test_exchange_and_barrier_raise_collective_timeout(run_ranks: RunRanks, call: str) -> None:
    timed_out = threading.Event()

    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(CollectiveTimeout):
                comm.exchange("anyone?", SHORT) if call == "exchange" else comm.barrier(SHORT)
            timed_out.set()
        else:
            assert timed_out.wait(PATIENCE)

    run_ranks(2, fn)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_barrier_lets_nobody_through_before_the_last_has_come(run_ranks: RunRanks, world_size: int) -> None:
    arrived: list[int] = []
    others_wait = threading.Event()

    def fn(comm: Communicator) -> int:
        if comm.rank == world_size - 1:
            if world_size > 1:
                assert others_wait.wait(PATIENCE)
            arrived.append(comm.rank)
            comm.barrier(PATIENCE)
        else:
            arrived.append(comm.rank)
            if len(arrived) == world_size - 1:
                others_wait.set()
            comm.barrier(PATIENCE)
        return len(arrived)

    assert run_ranks(world_size, fn) == [world_size] * world_size


# --- abort and close ------------------------------------------------------------------------------------------------


def test_abort_from_another_thread_fails_pending_and_later_calls(run_ranks: RunRanks) -> None:
    checked = threading.Event()
    error = PeerLost("rank 1 was unplugged", 1)

    def fn(comm: Communicator) -> None:
        if comm.rank == 1:
            assert checked.wait(PATIENCE)
            return
        pending = [comm.all_reduce(torch.ones(10)), comm.all_reduce(torch.ones(10)), comm.recv(1, 0)]
        thread = threading.Thread(target=comm.abort, args=(error,), name="test-abort")
        thread.start()
        for work in pending:
            with pytest.raises(PeerLost, match="unplugged") as caught:
                work.wait(PATIENCE)
            assert caught.value.rank == 1
            assert work.done()
            assert isinstance(work.exception(), PeerLost)
            with pytest.raises(PeerLost, match="unplugged"):
                work.result()
        thread.join()
        later: list[Callable[[], object]] = [
            lambda: comm.all_reduce(torch.ones(10)).wait(PATIENCE),
            lambda: comm.all_gather(torch.ones(20), torch.ones(10)).wait(PATIENCE),
            lambda: comm.send(torch.ones(1), 1, 0).wait(PATIENCE),
            lambda: comm.recv(1, 0).wait(PATIENCE),
            lambda: comm.exchange("hello", PATIENCE),
            lambda: comm.barrier(PATIENCE),
        ]
        for call in later:
            with pytest.raises(PeerLost, match="unplugged"):
                call()
        checked.set()

    run_ranks(2, fn)


def test_abort_wakes_a_thread_that_waits_in_a_barrier_without_timeout(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            timer = threading.Timer(SHORT, comm.abort, args=(PeerLost("rank 1 was unplugged", 1),))
            timer.start()
            with pytest.raises(PeerLost):
                comm.barrier()
            timer.join()

    run_ranks(2, fn)


def test_an_aborted_rank_ends_what_its_peers_wait_for(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> SmolError | None:
        if comm.rank == 2:
            comm.recv(0, 0).wait(PATIENCE)
            comm.recv(1, 0).wait(PATIENCE)
            comm.abort(PeerLost("rank 2 gives up", 2))
            return None
        work = comm.all_reduce(torch.ones(100_000))
        comm.send(torch.ones(1), 2, 0)  # not waited for: rank 2 may give up before this rank knows that it was sent
        with pytest.raises(SmolError) as caught:
            work.wait(PATIENCE)
        assert not isinstance(caught.value, CollectiveTimeout), caught.value
        # As a training loop would: it gives up too, and so frees those that wait for it.
        comm.abort(caught.value)
        return caught.value

    assert run_ranks(3, fn)[2] is None


def test_abort_also_fails_the_groups_that_were_split_off(run_ranks: RunRanks) -> None:
    # Whoever notices a death knows the run's communicator only, and everybody must wake.
    checked = threading.Event()

    def fn(comm: Communicator) -> None:
        lane = comm.split([1, 0], "lane")
        assert lane is not None
        if comm.rank == 1:
            assert checked.wait(PATIENCE)
        else:
            pending = [lane.all_reduce(torch.ones(10)), lane.recv(0, 3)]
            comm.abort(PeerLost("rank 1 was unplugged", 1))
            for work in pending:
                with pytest.raises(PeerLost, match="unplugged"):
                    work.wait(PATIENCE)
            with pytest.raises(PeerLost, match="unplugged"):
                lane.barrier(PATIENCE)
            checked.set()
        lane.close()

    run_ranks(2, fn)


def test_a_second_abort_does_not_replace_the_first_error(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.abort(PeerLost("the first", 1))
            comm.abort(PeerLost("the second", 1))
            with pytest.raises(PeerLost, match="the first"):
                comm.all_reduce(torch.ones(1)).wait(PATIENCE)

    run_ranks(2, fn)


def test_close_can_be_called_twice_and_leaves_no_thread(run_ranks: RunRanks) -> None:
    before = set(threading.enumerate())

    def fn(comm: Communicator) -> None:
        comm.all_reduce(torch.ones(10)).wait(PATIENCE)
        lane = comm.split(range(comm.world_size), "lane")
        assert lane is not None
        lane.barrier(PATIENCE)
        comm.barrier(PATIENCE)
        lane.close()
        comm.close()
        comm.close()

    run_ranks(3, fn)
    left = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    assert not left, left


def test_close_closes_what_was_split_off(run_ranks: RunRanks) -> None:
    before = set(threading.enumerate())

    def fn(comm: Communicator) -> None:
        lane = comm.split([2, 0, 1], "lane")
        assert lane is not None
        part = lane.split([1, 0], "part")
        lane.barrier(PATIENCE)
        comm.barrier(PATIENCE)
        comm.close()
        for group in (lane, part):
            if group is not None:
                with pytest.raises(SmolError):
                    group.barrier(PATIENCE)

    run_ranks(3, fn)
    left = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    assert not left, left


def test_calls_after_close_raise_instead_of_hanging(run_ranks: RunRanks) -> None:
    def fn(comm: Communicator) -> None:
        comm.barrier(PATIENCE)
        comm.close()
        with pytest.raises(SmolError):
            comm.all_reduce(torch.ones(10)).wait(PATIENCE)

    run_ranks(2, fn)
