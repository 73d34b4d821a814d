"""The supervisor with fake ranks of the standard library: no torch, so each takes a fraction of a second."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from smolcluster.run.supervisor import ChildSpec, Outcome, Supervisor

HERE = Path(__file__).parent
FAKE_RANK = str(HERE / "fake_rank.py")
needs_posix_signals = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


class Run:
    """One supervised run of fake ranks: its outcome and all messages."""

    def __init__(self, folder: Path, *scripts: list[str], patience: float = 5.0) -> None:
        self.messages: list[tuple[int, dict[str, Any]]] = []
        specs = [
            ChildSpec(rank, [sys.executable, FAKE_RANK], {"script": script}, folder / f"rank{rank}.log")
            for rank, script in enumerate(scripts)
        ]
        self.supervisor = Supervisor(specs, self._hear, patience=patience)
        started = time.monotonic()
        self.outcome: Outcome = self.supervisor.run()
        self.seconds = time.monotonic() - started

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        self.messages.append((rank, message))
        if message.get("word") == "ask":
            self.supervisor.tell(rank, {"command": "leader", "address": "tcp://127.0.0.1:1"})

    @property
    def pids(self) -> list[int]:
        return [message["pid"] for _, message in self.messages if message["event"] == "pid"]


def test_a_run_whose_ranks_all_end_well_exits_0(tmp_path: Path) -> None:
    run = Run(tmp_path, ["hello"], ["hello"])
    assert run.outcome == Outcome(0, None, (), False, ())
    assert sorted(rank for rank, message in run.messages if message.get("word") == "hello") == [0, 1]


def test_a_message_reaches_the_rank_it_is_for(tmp_path: Path) -> None:
    run = Run(tmp_path, ["ask", "command"], ["hello"])
    answers = [(rank, message["command"]) for rank, message in run.messages if message["event"] == "command"]
    assert answers == [(0, {"command": "leader", "address": "tcp://127.0.0.1:1"})]


@needs_posix_signals
def test_a_killed_rank_is_the_cause_and_ends_the_others(tmp_path: Path) -> None:
    run = Run(tmp_path, ["command"], ["die"], ["command"])
    assert run.outcome.exit_code == 3
    assert run.outcome.failure is not None
    assert run.outcome.failure.message.startswith("rank 1 died (signal 9)")
    told = [message["command"]["command"] for _, message in run.messages if message["event"] == "command"]
    assert told == ["abort", "abort"]
    assert run.seconds < 5  # the others left by themselves, long before the patience was over
    assert not any(psutil.pid_exists(pid) for pid in run.pids)


@needs_posix_signals
def test_what_other_ranks_notice_does_not_hide_the_rank_that_died(tmp_path: Path) -> None:
    run = Run(tmp_path, ["lost"], ["command", "die"])  # rank 0 reports first, rank 1 is told to end
    assert run.outcome.failure is not None
    assert run.outcome.failure.rank == 0
    assert run.outcome.failure.consequence
    slow = Run(tmp_path, ["lost"], ["hello", "die"])
    assert slow.outcome.failure is not None
    assert slow.outcome.failure.message.startswith("rank 1 died (signal 9)")


def test_a_rank_that_hangs_is_killed_when_the_patience_is_over(tmp_path: Path) -> None:
    run = Run(tmp_path, ["hang"], ["error"], patience=0.5)
    assert run.outcome.exit_code == 2
    assert run.outcome.killed == (0,)
    assert run.seconds < 0.5 + 2 + 1  # a second for starting two interpreters
    assert not any(psutil.pid_exists(pid) for pid in run.pids)


def test_a_rank_that_the_others_call_lost_is_killed_soon_after_they_have_left(tmp_path: Path) -> None:
    run = Run(tmp_path, ["lost"], ["hang"], patience=60)
    assert run.outcome.killed == (1,)
    assert run.outcome.exit_code == 3
    assert run.seconds < 1.5  # 0.5 s; without knowing who is lost it would be 1.5 s and the start


def test_a_reported_error_gives_its_own_message_and_exit_code(tmp_path: Path) -> None:
    run = Run(tmp_path, ["command"], ["error"])
    assert run.outcome.exit_code == 2
    assert run.outcome.failure is not None
    assert (run.outcome.failure.rank, run.outcome.failure.message) == (1, "bad learning rate")


def test_a_rank_that_dies_with_a_traceback_is_quoted_with_its_log(tmp_path: Path) -> None:
    run = Run(tmp_path, ["traceback"])
    assert run.outcome.failure is not None
    assert "rank 0 died (exit code 1): RuntimeError: the disk caught fire" in run.outcome.failure.message
    assert "Traceback" in (tmp_path / "rank0.log").read_text()
    assert str(tmp_path / "rank0.log") in run.outcome.failure.message


def start_parent(*scripts: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A supervising process and the process ids of its ranks, once all have started."""
    command = [sys.executable, str(HERE / "fake_parent.py"), FAKE_RANK, *scripts]
    source = str(HERE.parent.parent / "src")
    environment = {**os.environ, "PYTHONPATH": source}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    messages = [json.loads(parent.stdout.readline()) for _ in scripts]
    return parent, [message["pid"] for message in messages]


def wait_until_gone(pids: list[int], seconds: float) -> None:
    """Block until none of the processes is left; fails after `seconds`."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@needs_posix_signals
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_asks_every_rank_to_stop_and_exits_130(signum: signal.Signals) -> None:
    parent, pids = start_parent("command", "command")
    parent.send_signal(signum)
    out, _ = parent.communicate(timeout=10)
    assert parent.returncode == 130
    assert out.count('"command": "stop"') == 2
    wait_until_gone(pids, 1)


@needs_posix_signals
def test_a_second_ctrl_c_ends_at_once_whatever_the_ranks_do() -> None:
    parent, pids = start_parent("hang", "hang")
    assert parent.stdout is not None
    started = time.monotonic()
    parent.send_signal(signal.SIGINT)
    assert "stopping" in parent.stdout.readline()
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=10)
    assert parent.returncode == 130
    assert time.monotonic() - started < 3  # far below the 7.5 s that one Ctrl-C would wait
    wait_until_gone(pids, 1)


@needs_posix_signals
@pytest.mark.slow
def test_one_ctrl_c_ends_within_ten_seconds_even_when_no_rank_listens() -> None:
    parent, pids = start_parent("hang", "hang")
    started = time.monotonic()
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=15)
    assert parent.returncode == 130
    assert time.monotonic() - started < 10
    wait_until_gone(pids, 1)


@needs_posix_signals
def test_ranks_leave_when_the_parent_is_killed() -> None:
    parent, pids = start_parent("lifeline", "lifeline")
    parent.kill()
    parent.communicate(timeout=5)
    wait_until_gone(pids, 5)
