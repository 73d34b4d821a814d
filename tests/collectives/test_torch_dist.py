"""What the torch.distributed engine adds to the contract: joining a job, real processes, torch's errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from collectives.contract import run_group
from collectives.gloo_threads import gloo_group
from smolcluster.collectives.base import Communicator, ReduceOp
from smolcluster.collectives.codec import codec_for
from smolcluster.collectives.torch_dist import TorchCommunicator, init_torch_dist
from smolcluster.collectives.torch_group import translate
from smolcluster.collectives.torch_lanes import SerialThread
from smolcluster.errors import (
    ClusterError,
    CollectiveMismatch,
    CollectiveTimeout,
    ConfigError,
    PeerLost,
    RendezvousTimeout,
    SmolError,
)

PATIENCE = 20.0


def run_processes(scenario: str, init_method: str) -> list[tuple[int, dict[str, Any]]]:
    """Exit code and report of both ranks."""
    script = Path(__file__).with_name("torch_dist_rank.py")
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), scenario, str(rank), "2", init_method],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    outcomes = []
    try:
        for process in processes:
            out, _ = process.communicate(timeout=60)
            outcomes.append((process.returncode, json.loads(out) if out else {}))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return outcomes


def test_two_processes_join_and_understand_each_other(tmp_path: Path) -> None:
    init_method = (tmp_path / "meet").as_uri()
    assert run_processes("collectives", init_method) == [
        (
            0,
            {
                "average": [1.5, 1.5],
                "gathered": [1, 0],
                "received": [300_000 * (1 - rank), "torch.int64"],
                "messages": [{"rank": 0}, {"rank": 1}],
            },
        )
        for rank in range(2)
    ]


def test_a_process_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    (code, report), (dead_code, _) = run_processes("death", (tmp_path / "meet").as_uri())
    assert dead_code == 9
    assert code == 0
    assert "closed its connection" in report["error"]
    # The kernel closes a dead process's connections; far below torch's own timeout of half an hour.
    assert report["seconds"] < 5


def test_abort_frees_both_processes_and_lets_them_end(tmp_path: Path) -> None:
    outcomes = run_processes("abort", (tmp_path / "meet").as_uri())
    assert outcomes == [(0, {"error": "own"}), (0, {"error": ["PeerLost", "PeerLost"]})]


# --- joining --------------------------------------------------------------------------------------------------------


def test_a_job_of_one_rank_needs_nobody(tmp_path: Path) -> None:
    comm = init_torch_dist("gloo", 0, 1, (tmp_path / "meet").as_uri(), min_ranks=1)
    tensor = torch.ones(3)
    comm.all_reduce(tensor, ReduceOp.AVG).wait(PATIENCE)
    assert tensor.tolist() == [1.0] * 3
    assert (comm.rank, comm.world_size, comm.generation) == (0, 1, 0)
    comm.close()


def test_ranks_that_do_not_come_are_reported_within_the_start_timeout(tmp_path: Path) -> None:
    with pytest.raises(RendezvousTimeout, match=r"all 2 ranks at file:.* within 0\.2 s"):
        init_torch_dist("gloo", 0, 2, (tmp_path / "meet").as_uri(), start_timeout=0.2)


def test_elastic_runs_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"min_ranks is 2 of 3.*fixed at the start.*--backend tcp"):
        init_torch_dist("gloo", 0, 3, "tcp://127.0.0.1:1", min_ranks=2)


@pytest.mark.parametrize(("backend", "says"), [("mpi", "gloo or nccl"), ("nccl", "CUDA")])
def test_a_backend_that_is_not_there_is_a_configuration_error(backend: str, says: str) -> None:
    if backend == "nccl" and torch.cuda.is_available():
        pytest.skip("this machine has what nccl needs")
    with pytest.raises(ConfigError, match=says):
        TorchCommunicator(dist.HashStore(), 0, 1, backend=backend)


# --- behind the contract --------------------------------------------------------------------------------------------


def test_every_rank_learns_what_every_rank_called() -> None:
    def fn(comm: Communicator) -> str:
        comm.barrier(PATIENCE)
        work = comm.broadcast(torch.ones(3), 1) if comm.rank == 1 else comm.all_reduce(torch.ones(5))
        with pytest.raises(CollectiveMismatch) as caught:
            work.wait(PATIENCE)
        return str(caught.value)

    for message in run_group(gloo_group(3), fn):
        assert "call 2" in message
        assert "rank 0 called all_reduce SUM of 5 float32" in message
        assert "rank 1 called broadcast from rank 1 of 3 float32" in message


def test_a_collective_after_a_peer_has_closed_raises_peer_lost() -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(PeerLost, match="rank 1 has closed") as caught:
                comm.all_reduce(torch.ones(3)).wait(PATIENCE)
            assert caught.value.rank == 1

    run_group(gloo_group(2), fn)


def test_no_progress_within_torchs_timeout_raises_collective_timeout_and_breaks_the_group() -> None:
    seen = threading.Event()

    def fn(comm: Communicator) -> None:
        if comm.rank == 1:
            assert seen.wait(PATIENCE)
            return
        for _ in range(2):
            with pytest.raises(CollectiveTimeout):
                comm.recv(1, 0).wait(PATIENCE)
        seen.set()

    run_group(gloo_group(2, timeout=0.2), fn)


def test_groups_of_one_name_can_be_made_again() -> None:
    def fn(comm: Communicator) -> list[int]:
        sums = []
        for round_number in range(3):
            lane = comm.split([0, 1], "lane")
            assert lane is not None
            tensor = torch.tensor([round_number])
            lane.all_reduce(tensor).wait(PATIENCE)
            sums.append(int(tensor))
            lane.close()
        return sums

    assert run_group(gloo_group(2), fn) == [[0, 2, 4]] * 2


def test_a_communicator_left_open_is_ended_before_the_interpreter_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    comms = gloo_group(2)
    pending = [comms[0].recv(1, 0), comms[1].all_reduce(torch.ones(3))]
    assert len(at_exit) == 2
    for end in at_exit:
        end()
    assert all(isinstance(work.exception(), SmolError) for work in pending)
    assert set(threading.enumerate()) <= before


def test_tags_that_are_not_used_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolcluster.collectives.torch_lanes.MAX_KEPT_LANES", 4)

    def fn(comm: Communicator) -> int:
        assert isinstance(comm, TorchCommunicator)
        for tag in range(50):
            work = comm.send(torch.ones(1), 1, tag) if comm.rank == 0 else comm.recv(0, tag)
            work.wait(PATIENCE)
        return len(comm._lanes._messages)

    # One more may be on its last instructions when the next begins.
    assert max(run_group(gloo_group(2), fn)) <= 6


def test_closing_a_communicator_closes_the_groups_split_from_it() -> None:
    before = set(threading.enumerate())

    def fn(comm: Communicator) -> None:
        lane = comm.split([0, 1], "lane")
        assert lane is not None
        lane.barrier(PATIENCE)
        comm.close()
        with pytest.raises(ClusterError, match="closed"):
            lane.barrier(PATIENCE)

    run_group(gloo_group(2), fn)
    assert set(threading.enumerate()) <= before


def test_without_comparing_the_calls_collectives_and_barriers_work() -> None:
    store = dist.HashStore()
    waited = threading.Event()

    def connect_and_run(rank: int, errors: list[BaseException]) -> None:
        try:
            comm = TorchCommunicator(store, rank, 2, verify=False)
            tensor = torch.ones(1000)
            comm.all_reduce(tensor).wait(PATIENCE)
            assert bool((tensor == 2).all())
            if rank == 0:
                with pytest.raises(CollectiveTimeout):
                    comm.barrier(0.05)
                waited.set()
            else:
                assert waited.wait(PATIENCE)
                comm.barrier(PATIENCE)
            assert comm.exchange(rank, PATIENCE) == [0, 1]
            output = torch.empty(3)
            comm.all_to_all(
                output, torch.full((3,), float(rank)), [1, 2] if rank == 0 else [2, 1], [1, 2][:: 1 - 2 * rank]
            )
            comm.close()
        except BaseException as exc:  # noqa: BLE001 - top of the thread, raised below
            errors.append(exc)

    errors: list[BaseException] = []
    threads = [threading.Thread(target=connect_and_run, args=(rank, errors)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class CountingStaging:
    """As if every tensor were on a device: a copy in, a copy back."""

    def __init__(self) -> None:
        self.back = 0

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def from_host(self, host: torch.Tensor, tensor: torch.Tensor) -> None:
        self.back += 1
        tensor.copy_(host)


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_tensors_outside_host_memory_pass_through_staging_and_back(compression: str) -> None:
    def fn(comm: Communicator) -> None:
        assert isinstance(comm, TorchCommunicator)
        staging = comm._staging = CountingStaging()
        n, codec = comm.world_size, codec_for(compression)
        ones, gathered, part = torch.ones(4), torch.zeros(4 * n), torch.zeros(4)
        copied, rows, into = torch.full((4,), float(comm.rank)), torch.zeros(n, 3), torch.zeros(4)
        comm.all_reduce(ones, codec=codec).wait(PATIENCE)
        comm.all_gather(gathered, torch.full((4,), float(comm.rank)), codec).wait(PATIENCE)
        comm.reduce_scatter(part, torch.ones(4 * n), codec=codec).wait(PATIENCE)
        comm.broadcast(copied, 1).wait(PATIENCE)
        comm.all_to_all(rows, torch.full((n, 3), float(comm.rank))).wait(PATIENCE)
        assert staging.back == 5
        sent = comm.send(torch.full((4,), float(comm.rank)), 1 - comm.rank, 0)
        comm.recv(1 - comm.rank, 0, into).wait(PATIENCE)
        sent.wait(PATIENCE)
        assert ones.tolist() == part.tolist() == [2.0] * 4
        assert gathered.tolist() == [0.0] * 4 + [1.0] * 4
        assert copied.tolist() == [1.0] * 4
        assert rows[:, 0].tolist() == [0.0, 1.0]
        assert into.tolist() == [1.0 - comm.rank] * 4

    run_group(gloo_group(2), fn)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("[unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", CollectiveTimeout),
        ("Wait timeout", CollectiveTimeout),
        ("[pair.cc:553] Connection closed by peer [127.0.0.1]:15034. This is typically caused by", PeerLost),
        ("Connection reset by peer", PeerLost),
        ("writev [10.0.0.7]:1: Broken pipe", PeerLost),
        ("Application timeout caused pair closure", CollectiveTimeout),
        ("something that nobody has seen before", ClusterError),
    ],
)
def test_errors_of_torch_are_translated(raised: str, expected: type[SmolError]) -> None:
    error = translate(RuntimeError(raised + "\nand a long C++ stack"), "all_reduce of 3 float32", 2)
    assert type(error) is expected
    assert raised in str(error)
    assert "C++" not in str(error)
    assert str(error).startswith("all_reduce of 3 float32")
    if isinstance(error, PeerLost):
        assert error.rank == 2


# --- the threads behind it --------------------------------------------------------------------------------------------


def test_jobs_run_in_order_on_one_thread_that_ends_when_there_are_none() -> None:
    lane = SerialThread("test-lane")
    done: list[tuple[int, str]] = []
    first = threading.Event()
    jobs: list[Callable[[], object]] = [lambda: first.wait(PATIENCE)]
    jobs += [lambda n=n: done.append((n, threading.current_thread().name)) for n in range(5)]  # type: ignore[misc]
    for job in jobs:
        lane.submit(lambda job=job: job() and None)  # type: ignore[misc]
    first.set()
    assert lane.close(PATIENCE)
    assert done == [(n, "test-lane") for n in range(5)]
    assert "test-lane" not in {thread.name for thread in threading.enumerate()}


def test_a_lane_that_is_stuck_is_reported_by_close() -> None:
    lane, go_on = SerialThread("test-stuck"), threading.Event()
    lane.submit(lambda: (go_on.wait(PATIENCE), None)[1])
    assert not lane.close(0.01)
    go_on.set()
    assert lane.close(PATIENCE)


def test_a_lingering_thread_ends_when_its_lane_is_closed() -> None:
    lane, ran = SerialThread("test-linger", linger=60.0), threading.Event()
    lane.submit(ran.set)
    assert ran.wait(PATIENCE)
    assert lane.close(PATIENCE)
