"""What the programs around a run do when a rank is lost: the parent of --local, a machine that computes, a zombie."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.worlds import DEADLINE, formed
from smolcluster.checkpoint.state import Shard
from smolcluster.checkpoint.store import load_weights, save_checkpoint
from smolcluster.cluster.world import World
from smolcluster.config.load import load_config
from smolcluster.errors import PeerLost
from smolcluster.kinds import JsonObject
from smolcluster.monitoring.reporters import QuietReporter
from smolcluster.run.mail import Mail
from smolcluster.run.node import LOSS_LIMIT_S, NodeOptions, _NodeRun
from smolcluster.run.rank import Bootstrap, _Rank
from smolcluster.run.supervisor import ChildSpec, Supervisor

FAKE_RANK = str(Path(__file__).parent.parent / "run" / "fake_rank.py")
needs_posix_signals = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
PATIENCE = 1.0


class Eventually:
    """Fake ranks under a supervisor, to which something happens once all have started."""

    def __init__(self, folder: Path, scripts: list[list[str]], happens: Any) -> None:
        self.pids: dict[int, int] = {}
        self._count = len(scripts)
        self._happens = happens
        specs = [
            ChildSpec(rank, [sys.executable, FAKE_RANK], {"script": script}, folder / f"rank{rank}.log")
            for rank, script in enumerate(scripts)
        ]
        self.supervisor = Supervisor(specs, self._hear, patience=PATIENCE)
        self.outcome = self.supervisor.run()
        self.seconds = time.monotonic() - self.began

    def _hear(self, rank: int, message: JsonObject) -> None:
        if message.get("event") == "pid":
            self.pids[rank] = int(str(message["pid"]))
            if len(self.pids) == self._count:
                self.began = time.monotonic()
                self._happens(self)


@needs_posix_signals
def test_a_rank_that_is_suspended_before_it_has_joined_is_lost_after_the_patience(tmp_path: Path) -> None:
    run = Eventually(tmp_path, [["command"], ["hang"]], lambda run: os.kill(run.pids[1], signal.SIGSTOP))
    assert run.outcome.exit_code == 3
    assert run.outcome.failure is not None
    assert run.outcome.failure.message.startswith("rank 1 is lost: its process was suspended for 1.")
    assert run.outcome.failure.lost == 1
    assert run.outcome.killed == (1,)
    assert PATIENCE < run.seconds < PATIENCE + 2.0
    assert not any(psutil.pid_exists(pid) for pid in run.pids.values())


@needs_posix_signals
def test_a_rank_that_is_suspended_for_less_than_the_patience_is_not_lost(tmp_path: Path) -> None:
    def pause_and_end(run: Eventually) -> None:
        os.kill(run.pids[1], signal.SIGSTOP)
        threading.Event().wait(0.6 * PATIENCE)
        os.kill(run.pids[1], signal.SIGCONT)
        threading.Event().wait(PATIENCE)
        for rank in (0, 1):
            run.supervisor.tell(rank, {"command": "go on"})

    run = Eventually(
        tmp_path, [["command"], ["command"]], lambda run: threading.Thread(target=pause_and_end, args=(run,)).start()
    )
    assert run.outcome.exit_code == 0, run.outcome
    assert run.seconds >= 1.6 * PATIENCE


def test_a_rank_tells_its_parent_of_a_loss_at_once_and_only_once(tmp_path: Path) -> None:
    class Link:
        def __init__(self) -> None:
            self.told: list[JsonObject] = []

        def tell(self, message: JsonObject) -> None:
            self.told.append(message)

    config = load_config("classicdp_digits").config
    start = Bootstrap(
        rank=0, names=["rank0", "rank1"], config=config, token="00", run_id="r", init_file=None,
        log_path=tmp_path / "log", checkpoints=tmp_path,
    )  # fmt: skip
    link: Any = Link()
    rank = _Rank(link, start)
    with formed("inproc", 2) as worlds:
        worlds[0].on_failure(rank._tell_of_loss)
        worlds[0].report_lost(1, "it died")  # while the thread that trains computes
        assert [(event["lost"], event["consequence"]) for event in link.told] == [(1, True)]
        error = worlds[0].error()
        assert error is not None
        assert rank._fail(error, worlds[0], Aborted()) == 3  # that thread comes to it
    assert len(link.told) == 1


class Aborted:
    """A communicator whose run has ended."""

    def abort(self, error: Exception) -> None:
        pass


# --- a machine that computes for long while another one is lost


class FakeFolder:
    """A run folder in memory."""

    def __init__(self) -> None:
        self.rows: list[JsonObject] = []
        self.failed: list[list[int]] = []

    def write(self, row: JsonObject) -> None:
        self.rows.append(row)

    def fail(self, lost: list[int]) -> None:
        self.failed.append(list(lost))


def end_in_time(
    world: World, folder: FakeFolder, trained: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, list[int]]:
    ended, codes = threading.Event(), []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    config = load_config("classicdp_digits").config
    run = _NodeRun(config, world.rank, ["rank0", "rank1"], NodeOptions(Path("unused"), QuietReporter()))
    any_folder: Any = folder
    world.on_failure(lambda error: run._end_in_time(world, any_folder, trained, error))
    return ended, codes


def test_a_machine_that_computes_ends_soon_after_another_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = FakeFolder()
    with formed("inproc", 2) as worlds:
        ended, codes = end_in_time(worlds[0], folder, threading.Event(), monkeypatch)
        worlds[0].report_lost(1, "it died")
        assert ended.wait(DEADLINE)
    assert codes == [3]
    assert folder.failed == [[1]]
    assert capsys.readouterr().err == "error: rank 1 is lost: it died\n"


def test_a_machine_that_ends_by_itself_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = threading.Event()
    with formed("inproc", 2) as worlds:
        ended, codes = end_in_time(worlds[0], FakeFolder(), trained, monkeypatch)
        worlds[0].report_lost(1, "it died")
        trained.set()
        assert not ended.wait(1.5 * LOSS_LIMIT_S)
    assert codes == []


# --- a zombie writes nothing


def test_rows_of_others_are_written_with_the_next_row_of_rank_0() -> None:
    folder = FakeFolder()
    with formed("inproc", 2) as worlds, mail(worlds[0], folder) as box:
        worlds[1].send(0, "row", {"row": {"rank": 1, "step": 0}})
        wait_until(lambda: len(box._arrived) == 1)
        assert folder.rows == []
        box.write({"rank": 0, "step": 0})
        assert [row["rank"] for row in folder.rows] == [1, 0]


def test_rows_that_come_after_training_are_written_at_once() -> None:
    folder = FakeFolder()
    with formed("inproc", 2) as worlds:
        with mail(worlds[0], folder):
            pass
        worlds[1].send(0, "row", {"row": {"rank": 1, "step": 0}})
        wait_until(lambda: len(folder.rows) == 1)


def test_a_rank_0_that_was_given_up_writes_no_row() -> None:
    folder = FakeFolder()
    with formed("inproc", 2) as worlds:
        with mail(worlds[0], folder) as box:
            worlds[1].send(0, "row", {"row": {"rank": 1, "step": 0}})
            worlds[1].report_lost(0, "it was silent")
            wait_until(lambda: worlds[0].error() is not None)
            with pytest.raises(PeerLost):
                box.write({"rank": 0, "step": 0})
        worlds[1]._links[0].send({"kind": "row", "row": {"rank": 1, "step": 1}})
        wait_until(lambda: len(box._arrived) == 2)
        assert folder.rows == []


def mail(world: World, folder: FakeFolder) -> Mail:
    any_folder: Any = folder
    return Mail(world, any_folder, QuietReporter(), 5.0)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.005)


@pytest.mark.parametrize("at", ["the checkpoint's own name", "latest"])
def test_who_may_not_write_any_more_renames_nothing_and_removes_nothing(tmp_path: Path, at: str) -> None:
    def shards(value: float) -> dict[str, Shard]:
        return {"model/w": Shard(torch.full((3,), value), "param")}

    others = tmp_path / "writing-step_00000002-another-process"
    calls = []

    def given_up() -> None:
        calls.append(at)
        if len(calls) == (1 if at != "latest" else 2):
            others.mkdir()  # of the run that goes on
            raise PeerLost("rank 0 was suspended", 0)

    save_checkpoint(tmp_path, 1, shards(1.0), {})
    with pytest.raises(PeerLost):
        save_checkpoint(tmp_path, 2, shards(2.0), {}, confirm=given_up)
    assert others.is_dir()
    assert (tmp_path / "step_00000002").exists() == (at == "latest")
    weights, about = load_weights(tmp_path)
    assert (about["step"], weights["w"].tolist()) == (1, [1.0] * 3)


def test_a_log_line_that_comes_after_the_end_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = FakeFolder()
    any_folder: Any = folder
    any_folder.log_path = lambda rank: tmp_path / f"rank{rank}.log"
    with formed("inproc", 2) as worlds:
        with mail(worlds[0], folder) as box:
            worlds[1].send(0, "log", {"line": "in time"})
            wait_until(lambda: 1 in box._logs)
        worlds[1].send(0, "log", {"line": "late"})
        worlds[1].send(0, "row", {"row": {"rank": 1, "step": 0}})
        wait_until(lambda: len(folder.rows) == 1)  # the link still delivers
        assert worlds[0].error() is None
    assert (tmp_path / "rank1.log").read_text() == "in time\n"
