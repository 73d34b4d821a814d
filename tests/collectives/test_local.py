"""What LocalGroup adds to the contract: run(), messages that name ranks, and what happens to those left behind."""

from __future__ import annotations

import threading

import pytest
import torch

from smolcluster.collectives.base import Codec, ReduceOp
from smolcluster.collectives.codec import Bf16Codec, codec_for
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.errors import ClusterError, CollectiveMismatch, PeerLost, SmolError

PATIENCE = 10.0


def test_run_returns_the_results_in_rank_order_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    assert LocalGroup(3).run(lambda comm: comm.rank * 10) == [0, 10, 20]
    assert set(threading.enumerate()) <= before


def test_run_raises_the_first_error_and_frees_the_ranks_that_wait() -> None:
    seen: list[SmolError] = []

    def fn(comm: LocalCommunicator) -> None:
        if comm.rank == 1:
            raise KeyError("a bug in a test")
        with pytest.raises(PeerLost, match="a bug in a test") as caught:
            comm.barrier()
        seen.append(caught.value)

    with pytest.raises(KeyError, match="a bug"):
        LocalGroup(3).run(fn)
    assert [error.rank for error in seen if isinstance(error, PeerLost)] == [1, 1]


def test_a_group_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="at least one"):
        LocalGroup(0)


def test_the_generation_is_what_the_group_was_made_with() -> None:
    def fn(comm: LocalCommunicator) -> tuple[int, int]:
        part = comm.split([0, 1], "part")
        assert part is not None
        return comm.generation, part.generation

    assert LocalGroup(2, generation=7).run(fn) == [(7, 7)] * 2


def test_every_rank_learns_what_every_rank_called() -> None:
    def fn(comm: LocalCommunicator) -> str:
        comm.barrier()
        work = comm.broadcast(torch.ones(3), 1) if comm.rank == 1 else comm.all_reduce(torch.ones(5))
        with pytest.raises(CollectiveMismatch) as caught:
            work.wait(PATIENCE)
        with pytest.raises(CollectiveMismatch):  # the group is not used any further
            comm.barrier()
        return str(caught.value)

    for message in LocalGroup(3).run(fn):
        assert "call 1" in message
        assert "rank 0 called all_reduce sum of 5 float32" in message
        assert "rank 1 called broadcast from rank 1 of 3 float32" in message
        assert "rank 2 called all_reduce" in message


def test_sums_are_made_in_rank_order() -> None:
    # 1e8 + 1 - 1e8 in float32: rank order gives 0, any order that adds the large ones first gives 1.
    parts = [1e8, 1.0, -1e8]

    def fn(comm: LocalCommunicator) -> float:
        tensor = torch.tensor([parts[comm.rank]])
        comm.all_reduce(tensor).wait(PATIENCE)
        return tensor.item()

    assert LocalGroup(3).run(fn) == [0.0] * 3


@pytest.mark.parametrize("compression", ["bf16", "fp16"])
def test_a_codec_is_applied_to_every_contribution_and_once_to_the_result(compression: str) -> None:
    codec = codec_for(compression)
    assert codec is not None
    inputs = [torch.randn(501, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]

    def seen(tensor: torch.Tensor, codec: Codec = codec) -> torch.Tensor:
        encoded, decoded = torch.empty(2 * tensor.numel(), dtype=torch.uint8), torch.empty_like(tensor)
        codec.encode(tensor, encoded)
        codec.decode(encoded, decoded)
        return decoded

    def fn(comm: LocalCommunicator) -> torch.Tensor:
        tensor = inputs[comm.rank].clone()
        comm.all_reduce(tensor, ReduceOp.AVG, codec).wait(PATIENCE)
        return tensor

    expected = seen((seen(inputs[0]) + seen(inputs[1]) + seen(inputs[2])) / 3)
    for result in LocalGroup(3).run(fn):
        assert torch.equal(result, expected)


def test_a_rank_that_leaves_ends_what_the_others_wait_for() -> None:
    waiting = [threading.Event(), threading.Event(), threading.Event()]

    def fn(comm: LocalCommunicator) -> None:
        if comm.rank == 1:
            assert waiting[0].wait(PATIENCE)
            assert waiting[2].wait(PATIENCE)
            return
        pending = [comm.all_reduce(torch.ones(3)), comm.recv(1, 0)] if comm.rank == 0 else [comm.recv(1, 0)]
        waiting[comm.rank].set()
        for work in pending:
            with pytest.raises(PeerLost, match="rank 1") as caught:
                work.wait(PATIENCE)
            assert caught.value.rank == 1
        later = [comm.send(torch.ones(1), 1, 0), comm.recv(1, 0), comm.all_reduce(torch.ones(3))]
        for work in later:
            assert isinstance(work.exception(), PeerLost)

    LocalGroup(3).run(fn)


def test_messages_that_were_sent_before_their_sender_left_still_arrive() -> None:
    left = threading.Event()

    def fn(comm: LocalCommunicator) -> list[float]:
        if comm.rank == 0:
            comm.send(torch.tensor([1.0, 2.0]), 1, 5).wait(PATIENCE)
            comm.close()
            left.set()
            return []
        assert left.wait(PATIENCE)
        received: list[float] = comm.recv(0, 5).result()[0].tolist()
        return received

    assert LocalGroup(2).run(fn)[1] == [1.0, 2.0]


def test_leaving_in_the_middle_of_a_call_ends_it_for_all() -> None:
    left = threading.Event()

    def fn(comm: LocalCommunicator) -> None:
        if comm.rank == 0:
            work = comm.all_reduce(torch.ones(3))
            comm.close()
            left.set()
            assert isinstance(work.exception(), PeerLost)
        else:
            assert left.wait(PATIENCE)
            with pytest.raises(PeerLost, match="rank 0"):
                comm.all_reduce(torch.ones(3)).wait(PATIENCE)

    LocalGroup(2).run(fn)


def test_a_computation_that_fails_is_raised_on_all_ranks_instead_of_hanging() -> None:
    class BrokenCodec(Bf16Codec):
        def encode(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
            raise ZeroDivisionError("broken codec")

    def fn(comm: LocalCommunicator) -> str:
        try:
            comm.all_reduce(torch.ones(3), codec=BrokenCodec()).wait(PATIENCE)
        except (ZeroDivisionError, ClusterError) as exc:
            return repr(exc)
        return "no error"

    assert all("broken codec" in result for result in LocalGroup(2).run(fn))
