"""What the contract cannot ask of every engine: latency, fragments, cuts, stalls, hostile bytes, threads and sockets.

Ranks are threads of the test; channels are `inproc` where a fault is injected and loopback TCP elsewhere.
"""

from __future__ import annotations

import contextlib
import random
import select
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.worlds import Meeting, die, silence
from collectives.contract import raw_bytes, run_group, same_bits
from smolcluster.collectives import progress
from smolcluster.collectives import tcp as tcp_communicator
from smolcluster.collectives.base import ReduceOp
from smolcluster.collectives.codec import Bf16Codec, Fp16Codec
from smolcluster.collectives.groups import inproc_group, tcp_group
from smolcluster.collectives.plan import Plan
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import (
    AuthFailed,
    CollectiveMismatch,
    CollectiveTimeout,
    ConnectFailed,
    ConnectionLost,
    FrameError,
    PeerLost,
    SmolError,
)
from smolcluster.transport import frame, tcp
from smolcluster.transport.base import Channel, Hello
from smolcluster.transport.frame import KIND_COLLECTIVE, KIND_MESSAGE, Prelude
from smolcluster.transport.inproc import FaultPlan, FaultyChannel, Hook
from transport.leaks import no_leftovers

WAIT = 20.0  # for what ought to happen
PATIENCE = 0.6
SMALL_PLAN = Plan(one_round_bytes=1024, chunk_bytes=512, window=3)  # many frames with few bytes


@pytest.fixture(autouse=True)
def closes_everything() -> Iterator[None]:
    """Fails a test that leaves a thread or a socket behind."""
    with no_leftovers():
        yield


Group = list[TcpCommunicator]


@contextlib.contextmanager
def group(make: Callable[..., Group], world_size: int, **settings: Any) -> Iterator[Group]:
    """The communicators of all ranks; closed afterwards."""
    comms = make(world_size, **settings)
    try:
        yield comms
    finally:
        for comm in comms:
            comm.close()


class OnThreads:
    """fn(comm) on a thread per rank; `outcomes()` are the results or errors, in rank order."""

    def __init__(self, comms: Group, fn: Callable[[TcpCommunicator], Any]) -> None:
        self._fn = fn
        self._found: list[Any] = [None] * len(comms)
        self.seconds = [0.0] * len(comms)
        self._threads = [threading.Thread(target=self._run, args=(n, comm)) for n, comm in enumerate(comms)]
        for thread in self._threads:
            thread.start()

    def outcomes(self) -> list[Any]:
        for thread in self._threads:
            thread.join(WAIT + 10)
        assert not any(thread.is_alive() for thread in self._threads), "a rank still waits"
        return self._found

    def _run(self, index: int, comm: TcpCommunicator) -> None:
        start = time.monotonic()
        try:
            self._found[index] = self._fn(comm)
        except Exception as exc:  # noqa: BLE001 - top of the thread: an outcome
            self._found[index] = exc
        self.seconds[index] = time.monotonic() - start


def faults(plan_of: Callable[[int, Hello], FaultPlan | None]) -> Hook:
    """A hook that wraps the ends for which `plan_of(rank, hello)` gives a plan."""

    def hook(rank: int, hello: Hello, channel: Channel) -> Channel:
        plan = plan_of(rank, hello)
        return channel if plan is None else FaultyChannel(channel, plan)

    return hook


def end_of(rank: int, lane: str, plan: FaultPlan) -> Hook:
    """A fault at one end of one connection: `rank`'s end of what rank 2 dialled for `lane`."""
    return faults(lambda r, hello: plan if (r, hello.rank, hello.lane) == (rank, 2, lane) else None)


# --- the same bits, whatever the network does


def everything(comm: TcpCommunicator) -> list[Tensor]:
    """All kinds of calls with values of all sizes, several under way at once; all that came out."""
    rank, n = comm.rank, comm.world_size
    generator = torch.Generator().manual_seed(rank)

    def values(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(count, generator=generator).to(dtype)

    results: list[Tensor] = []
    works = []
    for count in (1, 100, 256, 257, 5000):  # up to 256 one round, then the ring
        for op in (ReduceOp.SUM, ReduceOp.AVG):
            results.append(values(count))
            works.append(comm.all_reduce(results[-1], op))
        for codec in (Bf16Codec(), Fp16Codec()):
            results.append(values(count, torch.float64))
            works.append(comm.all_reduce(results[-1], codec=codec))
    for tag in range(5):
        works.append(comm.send(values(1 + 300 * tag), (rank + 1) % n, tag))
    receives = [comm.recv((rank - 1) % n, tag) for tag in reversed(range(5))]
    part, whole = torch.empty(700), torch.empty(n * 700)
    works.append(comm.reduce_scatter(part, values(n * 700)))
    works.append(comm.all_gather(whole, values(700)))
    copied, rows = values(3000), torch.empty(n * 4, 50)
    works.append(comm.broadcast(copied, n - 1))
    works.append(comm.all_to_all(rows, values(n * 4 * 50).view(n * 4, 50)))
    ragged = comm.all_to_all_ragged([values(10 * (rank + dst)) for dst in range(n)])
    for work in works:
        work.wait(WAIT)
    for work in [*receives, ragged]:
        work.wait(WAIT)
        results += work.result()
    return [*results, part, whole, copied, rows]


def slow_and_fragmented(seed: int) -> Hook:
    def plan_of(rank: int, hello: Hello) -> FaultPlan:
        own = zlib.crc32(f"{seed} {rank} {hello.rank} {hello.lane}".encode())
        return FaultPlan(seed=own, max_latency=0.003, max_chunk=random.Random(own).choice([1500, 7000, 40_000]))

    return faults(plan_of)


@pytest.mark.parametrize("world_size", [2, 3])
def test_latency_and_fragments_change_no_bit(world_size: int) -> None:
    expected = run_group(list(inproc_group(world_size, plan=SMALL_PLAN)), everything)
    for seed in (1, 2):
        found = run_group(list(inproc_group(world_size, plan=SMALL_PLAN, hook=slow_and_fragmented(seed))), everything)
        for rank in range(world_size):
            for ours, theirs in zip(found[rank], expected[rank], strict=True):
                assert same_bits([ours, theirs])


def test_every_boundary_of_a_frame_may_be_met() -> None:
    # One byte at a time: prelude, dims and payload are cut everywhere.
    def fn(comm: TcpCommunicator) -> list[Tensor]:
        tensor = torch.full((5,), comm.rank + 1.0)
        sent = comm.send(torch.tensor([[1, 2], [3, 4]]), 1 - comm.rank, 7)
        work = comm.all_reduce(tensor)
        received = comm.recv(1 - comm.rank, 7).result()[0]
        assert comm.exchange({"rank": comm.rank}, WAIT) == [{"rank": 0}, {"rank": 1}]
        work.wait(WAIT)
        sent.wait(WAIT)
        return [tensor, received]

    hook = faults(lambda rank, hello: FaultPlan(max_chunk=1))
    for tensor, received in run_group(list(inproc_group(2, hook=hook)), fn):
        assert tensor.tolist() == [3.0] * 5
        assert received.tolist() == [[1, 2], [3, 4]]


def test_tcp_and_inproc_give_the_same_bits() -> None:
    expected = run_group(list(inproc_group(3, plan=SMALL_PLAN)), everything)
    found = run_group(list(tcp_group(3, plan=SMALL_PLAN)), everything)
    for rank in range(3):
        assert all(same_bits([a, b]) for a, b in zip(found[rank], expected[rank], strict=True))


@pytest.mark.parametrize("missing", ["poll", "sendmsg"])
def test_a_system_without_poll_or_sendmsg_gives_the_same_bits(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_group(list(tcp_group(2, plan=SMALL_PLAN)), everything)
    if missing == "poll":
        monkeypatch.delattr(select, "poll", raising=False)
    else:
        monkeypatch.setattr(tcp, "_HAS_SENDMSG", False)
    found = run_group(list(tcp_group(2, plan=SMALL_PLAN)), everything)
    for rank in range(2):
        assert all(same_bits([a, b]) for a, b in zip(found[rank], expected[rank], strict=True))


def test_each_rank_sends_the_bytes_that_the_algorithm_says() -> None:
    def fn(comm: TcpCommunicator) -> tuple[float, float]:
        before = comm.telemetry.counter("link/sent_bytes"), comm.telemetry.counter("link/recv_bytes")
        comm.all_reduce(torch.ones(3 * 128 * 4)).wait(WAIT)  # 4 pieces of 3 chunks of 512 bytes, 2 (N-1) hops each
        return (
            comm.telemetry.counter("link/sent_bytes") - before[0],
            comm.telemetry.counter("link/recv_bytes") - before[1],
        )

    frames = 4 * 4
    assert run_group(list(inproc_group(3, plan=SMALL_PLAN)), fn) == [(frames * (48 + 512), frames * (48 + 512))] * 3


# --- who makes progress


def test_a_collective_finishes_while_nobody_waits() -> None:
    with group(tcp_group, 2) as comms:
        tensors = [torch.ones(4_000_000) for _ in comms]  # 16 MB: more than the sockets' buffers hold
        done = [threading.Event() for _ in comms]
        works = [comm.all_reduce(tensor) for comm, tensor in zip(comms, tensors, strict=True)]
        for work, event in zip(works, done, strict=True):
            work.add_done_callback(lambda _, event=event: event.set())
        assert all(event.wait(WAIT) for event in done)
        assert all(bool((tensor == 2).all()) for tensor in tensors)


def test_a_message_is_taken_in_while_nobody_waits_for_it() -> None:
    with group(tcp_group, 2) as comms:
        received = comms[1].recv(0, 0)
        done = threading.Event()
        received.add_done_callback(lambda _: done.set())
        sent = comms[0].send(torch.arange(4_000_000), 1, 0)
        assert done.wait(WAIT)
        assert torch.equal(received.result()[0], torch.arange(4_000_000))
        sent.wait(WAIT)


@pytest.fixture(params=[True, False], ids=["with background thread", "waiters only"])
def background(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the progress thread works; without it, those who wait drive the loop, and nobody else."""
    if not request.param:
        monkeypatch.setattr(progress.ProgressLoop, "_run", lambda self: None)
    return bool(request.param)


def test_two_threads_wait_for_different_works_at_once(background: bool) -> None:
    with group(inproc_group, 2) as comms:
        works = [comms[0].recv(1, 0), comms[0].recv(1, 1)]
        order: list[int] = []

        def wait(index: int) -> None:
            works[index].wait(WAIT)
            order.append(index)

        threads = [threading.Thread(target=wait, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for index in (1, 0):  # whoever drives the loop finishes the other's work, and hands the loop on
            comms[1].send(torch.ones(1), 0, index).wait(WAIT)
            threads[index].join(WAIT)
        assert order == [1, 0]


def test_abort_from_another_thread_wakes_the_waiter_that_drives_the_loop(background: bool) -> None:
    with group(inproc_group, 2) as comms:
        waiter = OnThreads(comms[:1], lambda comm: comm.recv(1, 0).wait())
        threading.Event().wait(0.05)
        comms[0].abort(CollectiveMismatch("enough"))
        (error,) = waiter.outcomes()
        assert isinstance(error, CollectiveMismatch)
        assert str(error) == "enough"
        assert waiter.seconds[0] < 2


def test_whoever_wakes_by_an_abort_and_closes_at_once_does_not_keep_the_error_from_the_others() -> None:
    def fn(comm: TcpCommunicator) -> None:
        try:
            comm.recv(1 - comm.rank, 0).wait(WAIT)
        finally:
            comm.close()

    with group(inproc_group, 2) as comms:
        world = comms[0]._world
        abort = world.abort

        def slowly(error: SmolError) -> None:
            threading.Event().wait(0.1)
            abort(error)

        world.abort = slowly  # type: ignore[method-assign]
        ranks = OnThreads(comms, fn)
        comms[0].abort(CollectiveMismatch("enough"))
        assert [str(error) for error in ranks.outcomes()] == ["enough"] * 2


def test_waiting_alone_makes_all_the_progress_that_is_needed(background: bool) -> None:
    assert run_group(list(inproc_group(3, plan=SMALL_PLAN)), lambda comm: len(everything(comm))) == [32] * 3


def test_closing_wakes_the_waiter_that_drives_the_loop(background: bool) -> None:
    with group(inproc_group, 2) as comms:
        waiter = OnThreads(comms[:1], lambda comm: comm.recv(1, 0).wait())
        threading.Event().wait(0.05)
        comms[0].close()
        (error,) = waiter.outcomes()
        assert isinstance(error, CollectiveMismatch)
        assert "closed" in str(error)
        assert waiter.seconds[0] < 2


def fail_in_a_callback(_: object) -> None:
    raise ZeroDivisionError("a mistake of the caller")


def test_an_error_in_a_callback_fails_what_is_pending_instead_of_hanging_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with group(inproc_group, 2) as comms:
        later = comms[0].recv(1, 9)
        work = comms[0].recv(1, 0)

        work.add_done_callback(fail_in_a_callback)
        comms[1].send(torch.ones(1), 0, 0).wait(WAIT)
        with pytest.raises(SmolError, match=r"ZeroDivisionError.*a mistake of the caller"):
            later.wait(WAIT)
        assert isinstance(later.exception().__cause__, ZeroDivisionError)
        assert "a mistake of the caller" in caplog.text


def test_an_error_in_a_callback_does_not_keep_an_abort_from_anybody(caplog: pytest.LogCaptureFixture) -> None:
    with group(inproc_group, 2) as comms:
        works = [comms[0].recv(1, tag) for tag in range(10)]
        called: list[int] = []
        for tag, work in enumerate(works):
            work.add_done_callback(fail_in_a_callback)
            work.add_done_callback(lambda _, tag=tag: called.append(tag))
        comms[1].abort(CollectiveMismatch("enough"))
        for work in works:
            with pytest.raises(CollectiveMismatch, match="enough"):
                work.wait(WAIT)
        comms[0].close()
        assert sorted(called) == list(range(10))
        assert "a mistake of the caller" in caplog.text


def test_a_frame_that_nobody_expects_yet_costs_no_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [0]
    turn = progress.ProgressLoop._turn

    def counted(self: progress.ProgressLoop, *args: Any, **kwargs: Any) -> bool:
        turns[0] += self._thread.name.endswith("rank 1")
        return turn(self, *args, **kwargs)

    monkeypatch.setattr(progress.ProgressLoop, "_turn", counted)
    for hook in (None, slow_and_fragmented(3)):
        with group(inproc_group, 2, hook=hook) as comms:
            early = comms[0].all_reduce(torch.ones(10))  # rank 1 has not called it
            comms[1].recv(0, 0)  # which keeps rank 1's loop running
            comms[0].send(torch.ones(1), 1, 1).wait(WAIT)
            threading.Event().wait(0.1)
            turns[0] = 0
            threading.Event().wait(0.5)
            assert turns[0] < 20
            late = comms[1].all_reduce(torch.ones(10))
            early.wait(WAIT)
            late.wait(WAIT)


def test_who_has_waited_for_long_sleeps_at_once_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_communicator, "SPIN_SECONDS", 0.005)
    monkeypatch.setattr(tcp_communicator, "cores", lambda: 8)  # where ranks share cores, nobody spins
    turns = [0]
    turn = progress.ProgressLoop._turn

    def counted(self: progress.ProgressLoop, *args: Any, **kwargs: Any) -> bool:
        turns[0] += self._thread.name.endswith("rank 0")
        return turn(self, *args, **kwargs)

    def fn(comm: TcpCommunicator) -> tuple[int, bool]:
        seldom = []
        for _ in range(4):  # on a busy machine a rank may be late itself, and then it has not waited
            for call in range(11):
                if comm.rank == 0 and call == 1:
                    turns[0] = 0
                time.sleep(0.03 if comm.rank == 1 else 0.0)
                comm.all_reduce(torch.ones(10)).wait(WAIT)
            seldom.append(turns[0])
        learned = False
        for _ in range(100):  # and now what is waited for comes at once
            comm.all_reduce(torch.ones(10)).wait(WAIT)
            learned = learned or comm._loop._comes_soon
        return min(seldom), learned

    with group(tcp_group, 2) as comms:
        monkeypatch.setattr(progress.ProgressLoop, "_turn", counted)
        seldom, learned = OnThreads(comms, fn).outcomes()[0]
    assert seldom < 300, seldom  # who looks for 5 ms each time takes 7000
    assert learned


def test_many_threads_may_use_one_communicator() -> None:
    def fn(comm: TcpCommunicator) -> None:
        other = 1 - comm.rank
        errors: list[BaseException] = []

        def talk(tag: int) -> None:
            try:
                for n in range(20):
                    sent = comm.send(torch.full((1 + 50 * n,), tag * 1000.0 + n), other, tag)
                    got = comm.recv(other, tag).result()[0]
                    assert got.tolist() == [tag * 1000.0 + n] * (1 + 50 * n)
                    sent.wait(WAIT)
            except Exception as exc:  # noqa: BLE001 - top of the thread: raised below
                errors.append(exc)

        threads = [threading.Thread(target=talk, args=(tag,)) for tag in range(4)]
        for thread in threads:
            thread.start()
        for n in range(20):
            tensor = torch.full((300,), float(n))
            comm.all_reduce(tensor).wait(WAIT)
            assert bool((tensor == 2 * n).all())
        for thread in threads:
            thread.join()
        assert errors == []

    run_group(list(tcp_group(2, plan=SMALL_PLAN)), fn)


# --- losses


def reduce_until_it_fails(comm: TcpCommunicator) -> None:
    for _ in range(1000):
        comm.all_reduce(torch.ones(2000)).wait(WAIT)
    raise AssertionError("nothing failed")


@pytest.mark.parametrize("cut", [1, 47, 48, 49, 300, 560, 561, 5000])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_connection_that_is_cut_in_a_frame_ends_the_run_on_all_ranks(rank: int, cut: int) -> None:
    hook = end_of(rank, "bulk:world", FaultPlan(cut_after_bytes=cut, max_chunk=100))
    with group(inproc_group, 3, hook=hook, plan=SMALL_PLAN, patience=2.0) as comms:
        ranks = OnThreads(comms, reduce_until_it_fails)
        errors = ranks.outcomes()
        assert [type(error) for error in errors] == [PeerLost] * 3, errors
        assert max(ranks.seconds) < 2.0 + 2
        assert {error.rank for error in errors} <= {0, 1, 2}


def test_a_message_that_is_cut_ends_the_run() -> None:
    hook = end_of(0, "p2p:world", FaultPlan(cut_after_bytes=1000))
    with group(inproc_group, 3, hook=hook, patience=2.0) as comms:
        received = comms[0].recv(2, 0)
        comms[2].send(torch.ones(100_000), 0, 0)
        with pytest.raises(PeerLost):
            received.wait(WAIT)


def test_a_stalled_connection_with_live_heartbeats_is_a_timeout_where_one_was_given() -> None:
    hook = end_of(0, "bulk:world", FaultPlan(stall_after_bytes=100))
    with group(inproc_group, 3, hook=hook, patience=0.3) as comms:
        errors = OnThreads(comms, lambda comm: comm.all_reduce(torch.ones(100)).wait(0.9)).outcomes()
        assert isinstance(errors[0], CollectiveTimeout)
        assert "all_reduce sum of 100 float32 (call 1) was not finished after 0.9 s" in str(errors[0])
        assert [comm._world.error() for comm in comms] == [None] * 3  # everybody lives


@pytest.mark.parametrize("make", [inproc_group, tcp_group])
def test_a_process_that_hangs_is_lost_after_the_patience(make: Callable[..., Group]) -> None:
    with group(make, 3, patience=PATIENCE) as comms:
        works = [comm.all_reduce(torch.ones(100)) for comm in comms[:2]]
        silence(comms[2]._world)
        start = time.monotonic()
        for work in works:
            with pytest.raises(PeerLost, match="rank 2 is lost: it was silent") as caught:
                work.wait(WAIT)
            assert caught.value.rank == 2
        assert PATIENCE / 2 < time.monotonic() - start < PATIENCE + 1


@pytest.mark.parametrize("make", [inproc_group, tcp_group])
@pytest.mark.parametrize("victim", [0, 2, 3])
def test_all_survivors_of_a_death_name_the_same_rank(make: Callable[..., Group], victim: int) -> None:
    for repetition in range(4):
        with group(make, 4, plan=SMALL_PLAN) as comms:
            ranks = OnThreads(comms, reduce_until_it_fails)
            threading.Event().wait(0.01 + 0.005 * repetition)
            for lane in comms[victim]._loop._lanes:  # the process is gone: bulk first, then control
                lane.channel.abort(ConnectionLost("killed"))
            die(comms[victim]._world)
            comms[victim]._loop.fail(SmolError("killed"))  # its thread is gone too
            errors = ranks.outcomes()
            survivors = [error for rank, error in enumerate(errors) if rank != victim]
            assert [type(error) for error in survivors] == [PeerLost] * 3, errors
            assert [error.rank for error in survivors] == [victim] * 3, errors
            assert max(seconds for rank, seconds in enumerate(ranks.seconds) if rank != victim) < 5


def test_a_waiter_on_a_lost_rank_wakes_at_once() -> None:
    with group(tcp_group, 3, patience=60.0) as comms:
        waiting = [comms[0].recv(2, 0), comms[0].all_reduce(torch.ones(5)), comms[1].recv(0, 3)]
        start = time.monotonic()
        die(comms[2]._world)
        for work in waiting:
            with pytest.raises(PeerLost, match="rank 2 is lost: it died or closed its connections"):
                work.wait(WAIT)
        assert time.monotonic() - start < 2


def test_a_rank_that_computes_for_longer_than_the_patience_is_not_lost() -> None:
    # What the others send it stays unread meanwhile, and fills every buffer.
    size = 8_000_000
    with group(tcp_group, 2, patience=0.4) as comms:
        for sender, receiver in ((0, 1), (1, 0)):
            sent = comms[sender].send(torch.ones(size), receiver, 0)
            reduced = comms[sender].all_reduce(torch.ones(size))
            with pytest.raises(CollectiveTimeout):
                reduced.wait(1.2)
            late = comms[receiver].all_reduce(torch.ones(size))
            assert comms[receiver].recv(sender, 0).result()[0].numel() == size
            for work in (sent, reduced, late):
                work.wait(WAIT)


def test_a_rank_that_has_finished_may_close_before_the_others() -> None:
    def fn(comm: TcpCommunicator) -> float:
        comm.barrier(WAIT)
        if comm.rank == 0:
            return 0.0
        # The others go on without rank 0 for longer than its closed connections are only suspicious.
        works = [comm.recv(3 - comm.rank, 0), comm.send(torch.ones(10), 3 - comm.rank, 1)]
        threading.Event().wait(0.9)
        works += [comm.send(torch.full((1000,), 2.0), 3 - comm.rank, 0), comm.recv(3 - comm.rank, 1)]
        for work in works:
            work.wait(WAIT)
        return float(works[0].result()[0].sum())

    assert run_group(list(tcp_group(3)), fn) == [0.0, 2000.0, 2000.0]


def test_whoever_needs_a_rank_that_has_left_is_told() -> None:
    with group(tcp_group, 2) as comms:
        comms[0].close()
        start = time.monotonic()
        for call in (
            lambda: comms[1].recv(0, 0),
            lambda: comms[1].send(torch.ones(2_000_000), 0, 0),
            lambda: comms[1].all_reduce(torch.ones(5)),
        ):
            with pytest.raises(PeerLost, match="rank 0") as caught:
                call().wait(WAIT)
            assert caught.value.rank == 0
        assert time.monotonic() - start < 4
        assert comms[1]._world.lost == []


def test_a_message_of_a_rank_that_has_left_can_still_be_received() -> None:
    with group(tcp_group, 2) as comms:
        comms[0].send(torch.arange(1000), 1, 4).wait(WAIT)
        comms[0].close()
        threading.Event().wait(0.1)
        assert torch.equal(comms[1].recv(0, 4).result()[0], torch.arange(1000))


def test_a_part_that_one_rank_closes_early_serves_the_others() -> None:
    def fn(comm: TcpCommunicator) -> None:
        part = comm.split([0, 1, 2], "part")
        assert part is not None
        part.barrier(WAIT)
        if comm.rank == 0:
            part.close()
        else:
            received = part.recv(3 - comm.rank, 0)
            threading.Event().wait(0.9)
            sent = part.send(torch.ones(10), 3 - comm.rank, 0)
            received.wait(WAIT)
            sent.wait(WAIT)
        comm.barrier(WAIT)
        part.close()

    run_group(list(tcp_group(3)), fn)


# --- hostile or broken bytes


def inject(comms: Group, lane: str, data: bytes) -> None:
    """Rank 1's end of its `lane` to rank 0 sends these bytes."""
    lanes = comms[1]._collective_lanes if lane == "bulk" else comms[1]._message_lanes
    view = memoryview(data)
    while view:
        view = view[lanes[0].channel.try_send([view]) :]


MESSAGE = Prelude(KIND_MESSAGE, 0, 0, 1, 0, 1, 0, 0, 0, 2, 8)
CALL = Prelude(KIND_COLLECTIVE, frame.OP_ALL_REDUCE, 1, 1, 0, 1, 0, 0, 1, 3, 12)


def packed(prelude: Prelude, dims: tuple[int, ...] = (), **changes: int) -> bytes:
    return frame.pack(Prelude(**{**prelude._asdict(), **changes}), dims)


BAD_FRAMES: dict[str, tuple[str, bytes, type[SmolError], str]] = {
    "garbage": ("bulk", b"x" * 200, FrameError, "begins with 0x7878"),
    "garbage in messages": ("p2p", bytes(200), FrameError, "begins with 0x0000"),
    "unknown dtype": ("p2p", packed(MESSAGE, (2,), dtype=11), FrameError, "unknown dtype 11"),
    "a message on the bulk lane": ("bulk", packed(MESSAGE, (2,)), CollectiveMismatch, "rank 1 called message"),
    "a collective on the message lane": ("p2p", packed(CALL), CollectiveMismatch, "where a message of"),
    "another generation": ("bulk", packed(CALL, generation=2), CollectiveMismatch, "while this rank called"),
    "a message of another generation": ("p2p", packed(MESSAGE, (2,), generation=2), CollectiveMismatch, "generation 2"),
    "a message of the past": ("bulk", packed(CALL, sequence=0), CollectiveMismatch, r"\(call 0\)"),
    "another count": ("bulk", packed(CALL, count=4, nbytes=16), CollectiveMismatch, "all_reduce sum of 4 float32"),
    "fewer bytes than the call needs": ("bulk", packed(CALL, nbytes=8), CollectiveMismatch, "hop 0 with 8 bytes"),
    "more bytes than the call needs": ("bulk", packed(CALL, nbytes=1 << 40), CollectiveMismatch, "hop 0 with 12 bytes"),
    "another hop": ("bulk", packed(CALL, hop=1), CollectiveMismatch, "sent hop 1"),
    "dims where none belong": ("bulk", packed(CALL, (3,)), CollectiveMismatch, "while this rank called"),
    "dims that do not agree": ("p2p", packed(MESSAGE, (3,)), FrameError, "2 elements and 8 bytes"),
    "an enormous message": ("p2p", packed(MESSAGE, (1 << 40,), count=1 << 40, nbytes=1 << 42), FrameError, "at most"),
    "an enormous empty message": ("p2p", packed(MESSAGE, (1 << 63, 0), count=0, nbytes=0), FrameError, "at most"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_a_bad_frame_fails_what_is_pending_and_asks_for_no_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lane, data, error, words = BAD_FRAMES[case]
    empty = torch.empty

    def small(*shape: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*shape, **{**kwargs, "device": "meta"})
        assert tensor.nbytes < 1 << 20, f"{tensor.nbytes} bytes were asked for"
        return empty(*shape, **kwargs)

    monkeypatch.setattr(torch, "empty", small)
    with group(inproc_group, 2) as comms:
        works = [comms[0].all_reduce(torch.ones(3)), comms[0].recv(1, 0)]
        inject(comms, lane, data)
        for work in works:
            with pytest.raises(error, match=words):
                work.wait(WAIT)
        with pytest.raises(error, match=words):
            comms[0].barrier(WAIT)


def test_random_frames_only_ever_raise_our_errors() -> None:
    chance = random.Random(0)
    for repetition in range(40):
        with group(inproc_group, 2) as comms:
            works = [
                comms[0].all_reduce(torch.ones(3)),
                comms[0].recv(1, 0),
                comms[0].all_to_all_ragged([torch.ones(1)] * 2),
            ]
            data = bytearray()
            for _ in range(20):
                good = chance.choice([packed(CALL) + bytes(12), packed(MESSAGE, (2,)) + bytes(8)])
                place = chance.randrange(2, 64)
                if place < len(good):
                    good = good[:place] + bytes([chance.choice([0, 1, 2, 8, 255])]) + good[place + 1 :]
                data += good
            inject(comms, "bulk" if repetition % 2 else "p2p", bytes(data))
            for work in works:
                with contextlib.suppress(SmolError):
                    work.wait(0.05)


# --- shapes


def test_ragged_parts_may_be_scalars() -> None:
    def fn(comm: TcpCommunicator) -> list[Tensor]:
        return comm.all_to_all_ragged([torch.tensor(10.0 * comm.rank + dst) for dst in range(3)]).result()

    for rank, parts in enumerate(run_group(list(inproc_group(3)), fn)):
        assert [part.shape for part in parts] == [torch.Size([])] * 3
        assert [part.item() for part in parts] == [10.0 * src + rank for src in range(3)]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_call_with_a_dtype_that_does_not_travel_counts_for_nothing(dtype: torch.dtype) -> None:
    # It is a mistake of one rank on its own: the next calls of all ranks must still belong together.
    def fn(comm: TcpCommunicator) -> None:
        if comm.rank == 0:
            wrong = torch.zeros(2).to(dtype)
            for call in (
                lambda: comm.broadcast(wrong),
                lambda: comm.all_gather(torch.cat([wrong, wrong]), wrong),
                lambda: comm.all_to_all(wrong.clone(), wrong),
                lambda: comm.all_to_all_ragged([wrong, wrong]),
                lambda: comm.send(wrong, 1, 0),
            ):
                with pytest.raises(ValueError, match="cannot be sent"):
                    call()
        comm.barrier(WAIT)

    run_group(list(inproc_group(2)), fn)


def test_recv_gives_back_the_very_tensor_it_was_given() -> None:
    def fn(comm: TcpCommunicator) -> None:
        sent = comm.send(torch.full((3,), 5.0), 1 - comm.rank, 0)
        out = torch.nn.Parameter(torch.zeros(3))
        assert comm.recv(1 - comm.rank, 0, out=out).result()[0] is out
        assert out.tolist() == [5.0] * 3
        sent.wait(WAIT)

    run_group(list(inproc_group(2)), fn)


def test_a_message_that_came_first_is_copied_into_out_later() -> None:
    with group(inproc_group, 2) as comms:
        comms[1].send(torch.full((3,), 5.0), 0, 0).wait(WAIT)
        comms[1].send(torch.full((1,), 6.0), 0, 1).wait(WAIT)
        comms[0].recv(1, 1).wait(WAIT)  # so that the first one is here
        out = torch.zeros(3)
        assert comms[0].recv(1, 0, out=out).result()[0] is out
        assert out.tolist() == [5.0] * 3


# --- life


def test_a_rank_alone_fails_after_abort_and_after_close_too() -> None:
    with group(inproc_group, 1) as (comm,):
        assert comm.all_reduce(torch.ones(2)).result()[0].tolist() == [1.0, 1.0]
        comm.abort(CollectiveMismatch("enough"))
        with pytest.raises(CollectiveMismatch, match="enough"):
            comm.all_reduce(torch.ones(2)).wait(WAIT)
    with group(inproc_group, 1) as (comm,):
        comm.close()
        with pytest.raises(SmolError):
            comm.barrier(WAIT)


def test_a_communicator_that_cannot_connect_leaves_nothing_open() -> None:
    place = Meeting("tcp", 2)
    worlds: list[Any] = [None, None]
    thread = threading.Thread(target=lambda: worlds.__setitem__(1, place.join(1)))
    thread.start()
    worlds[0] = place.join(0)
    thread.join()
    before = set(threading.enumerate())
    with pytest.raises(ConnectFailed, match="rank 1 did not open its bulk:world"):
        TcpCommunicator(worlds[0], timeout=0.1)
    assert set(threading.enumerate()) <= before
    for world in worlds:
        world.leave()
    for world in worlds:
        world.close()


def test_a_group_that_does_not_come_together_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, rank: int, lane: str, timeout: float) -> Channel:
        raise AuthFailed(f"rank {rank} is somebody else")

    monkeypatch.setattr(tcp.TcpListener, "accept_channel", refuse)
    monkeypatch.setattr("smolcluster.cluster.world.OPEN_SLICE", 0.2)
    with pytest.raises((AuthFailed, PeerLost)):
        tcp_group(3)


def test_close_leaves_no_thread_and_no_socket_even_with_works_pending() -> None:
    with group(tcp_group, 3) as comms:
        parts = OnThreads(comms, lambda comm: comm.split([0, 1, 2], "part")).outcomes()
        pending = [comms[0].recv(1, 0), comms[0].all_reduce(torch.ones(4_000_000)), parts[0].recv(1, 0)]
        for part in parts:
            part.close()
        comms[0].close()
        for work in pending:
            with pytest.raises(SmolError):
                work.wait(WAIT)
    # and `closes_everything` looks for the rest


def test_a_closed_channel_does_not_confuse_the_poller() -> None:
    # A test hook, or TLS, may close a channel under the loop: its descriptor is -1 from then on.
    with group(inproc_group, 2) as comms:
        waiting = comms[0].recv(1, 0)
        comms[0]._message_lanes[1].channel.abort(ConnectionLost("closed under the loop"))
        with pytest.raises(PeerLost, match="closed under the loop"):
            waiting.wait(WAIT)


# --- devices


class FakeDevice:
    """Staging for tensors whose memory holds other bits than their values, as if it were another device's memory.

    Whoever reads or writes such a tensor without `to_host` and `from_host` gets nonsense.
    """

    def __init__(self) -> None:
        self._storages: dict[int, Tensor] = {}

    def place(self, values: Tensor) -> Tensor:
        """A tensor on the device."""
        tensor = values.clone()
        self._storages[tensor.untyped_storage().data_ptr()] = tensor
        self._flip(tensor)
        return tensor

    def read(self, tensor: Tensor) -> Tensor:
        """The values of a tensor on the device."""
        assert self._is_here(tensor)
        values = tensor.clone()
        self._flip(values)
        return values

    def to_host(self, tensor: Tensor) -> Tensor:
        return self.read(tensor) if self._is_here(tensor) else tensor

    def from_host(self, host: Tensor, tensor: Tensor) -> None:
        if self._is_here(tensor):
            tensor.copy_(host)
            self._flip(tensor)

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages

    @staticmethod
    def _flip(tensor: Tensor) -> None:
        tensor.view(-1).view(torch.uint8).bitwise_not_()


@contextlib.contextmanager
def staged(world_size: int) -> Iterator[tuple[Group, list[FakeDevice]]]:
    """Communicators whose ranks have a FakeDevice each."""
    place = Meeting("inproc", world_size)
    devices = [FakeDevice() for _ in range(world_size)]
    comms: dict[int, TcpCommunicator] = {}

    def join(rank: int) -> None:
        comms[rank] = TcpCommunicator(place.join(rank), plan=SMALL_PLAN, staging=devices[rank])

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        yield [comms[rank] for rank in range(world_size)], devices
    finally:
        for comm in comms.values():
            comm.close()


DEVICE_CALLS: dict[str, Callable[[TcpCommunicator, Callable[[Tensor], Tensor]], list[Tensor]]] = {}


def device_call(fn: Callable[[TcpCommunicator, Callable[[Tensor], Tensor]], list[Tensor]]) -> None:
    DEVICE_CALLS[fn.__name__] = fn


def ramp(comm: TcpCommunicator, count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32) * (comm.rank + 1)


@device_call
def one_round(comm: TcpCommunicator, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return comm.all_reduce(place(ramp(comm, 20))).result()


@device_call
def ring_and_average(comm: TcpCommunicator, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return comm.all_reduce(place(ramp(comm, 2000)), ReduceOp.AVG).result()


@device_call
def with_a_codec(comm: TcpCommunicator, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return comm.all_reduce(place(ramp(comm, 500)), codec=Bf16Codec()).result()


@device_call
def reduce_scatter(comm: TcpCommunicator, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return comm.reduce_scatter(place(torch.zeros(300)), place(ramp(comm, 300 * comm.world_size))).result()


@device_call
def all_gather(comm: TcpCommunicator, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return comm.all_gather(place(torch.zeros(300 * comm.world_size)), place(ramp(comm, 300))).result()


@device_call
def broadcast(comm: TcpCommunicator, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return comm.broadcast(place(ramp(comm, 700)), 1).result()


@device_call
def all_to_all(comm: TcpCommunicator, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    n = comm.world_size
    return comm.all_to_all(place(torch.zeros(n * 2, 5)), place(ramp(comm, n * 10).view(n * 2, 5))).result()


@device_call
def messages(comm: TcpCommunicator, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    n, rank = comm.world_size, comm.rank
    out = place(torch.zeros(4, 5))
    received = comm.recv((rank - 1) % n, 3, out=out)
    comm.send(place(ramp(comm, 20).view(4, 5)), (rank + 1) % n, 3).wait(WAIT)
    assert received.result()[0] is out
    return [out]


@pytest.mark.parametrize("name", DEVICE_CALLS)
@pytest.mark.parametrize("on_device", [(0, 1, 2), (0,)], ids=["all ranks", "rank 0 only"])
def test_every_call_goes_through_the_staging(name: str, on_device: tuple[int, ...]) -> None:
    call = DEVICE_CALLS[name]
    expected = run_group(list(inproc_group(3, plan=SMALL_PLAN)), lambda comm: call(comm, Tensor.clone))  # type: ignore[arg-type]
    with staged(3) as (comms, devices):

        def fn(comm: TcpCommunicator) -> list[Tensor]:
            device = devices[comm.rank]
            if comm.rank not in on_device:
                return call(comm, Tensor.clone)
            return [device.read(tensor) for tensor in call(comm, device.place)]

        for ours, theirs in zip(OnThreads(comms, fn).outcomes(), expected, strict=True):
            assert [raw_bytes(tensor) for tensor in ours] == [raw_bytes(tensor) for tensor in theirs]


def test_ragged_parts_are_read_through_the_staging() -> None:
    with staged(2) as (comms, devices):

        def fn(comm: TcpCommunicator) -> list[list[float]]:
            inputs = [devices[comm.rank].place(torch.full((dst + 1,), 10.0 * comm.rank + dst)) for dst in range(2)]
            return [part.tolist() for part in comm.all_to_all_ragged(inputs).result()]

        assert OnThreads(comms, fn).outcomes() == [[[0.0], [10.0]], [[1.0, 1.0], [11.0, 11.0]]]


def test_a_failed_receive_leaves_the_device_tensor_alone() -> None:
    with staged(2) as (comms, devices):
        out = devices[0].place(torch.full((3,), 7.0))
        received = comms[0].recv(1, 0, out=out)
        comms[0].abort(CollectiveMismatch("enough"))
        with pytest.raises(CollectiveMismatch, match="enough"):
            received.wait(WAIT)
        assert devices[0].read(out).tolist() == [7.0] * 3


def gpu() -> str | None:
    """The name of this machine's GPU, None if it has none."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


@pytest.mark.gpu
@pytest.mark.skipif(gpu() is None, reason="no GPU here")
@pytest.mark.parametrize("name", DEVICE_CALLS)
def test_a_gpu_and_a_cpu_may_be_ranks_of_one_group(name: str) -> None:
    call, device = DEVICE_CALLS[name], gpu()
    expected = run_group(list(inproc_group(3, plan=SMALL_PLAN)), lambda comm: call(comm, Tensor.clone))  # type: ignore[arg-type]

    def fn(comm: TcpCommunicator) -> list[Tensor]:
        results = call(comm, (lambda values: values.to(device)) if comm.rank == 0 else Tensor.clone)
        assert {tensor.device.type for tensor in results} == {device if comm.rank == 0 else "cpu"}
        return [tensor.cpu() for tensor in results]

    with group(inproc_group, 3, plan=SMALL_PLAN) as comms:
        for ours, theirs in zip(OnThreads(comms, fn).outcomes(), expected, strict=True):
            assert [raw_bytes(tensor) for tensor in ours] == [raw_bytes(tensor) for tensor in theirs]


def test_a_real_device_type_is_staged() -> None:
    script = Path(__file__).with_name("fake_device.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    if done.stdout.strip() == "no such API":
        pytest.skip("this torch cannot make a device in Python")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"
