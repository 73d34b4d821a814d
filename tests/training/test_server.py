"""ServerRole: how a run ends, and what it does with too few workers."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from torch import nn

from algorithms.equality import Case
from algorithms.param_servers import PATIENCE, ParamServerRun, Setting, wait_until
from smolcluster.collectives.param_server import Push
from smolcluster.errors import TrainingStopped
from smolcluster.training.step import EvalSums


def updates(run: ParamServerRun) -> int:
    return sum("train/loss" in row for row in run.rows.rows)


def test_whoever_stops_a_run_does_not_wait_for_an_evaluation(tmp_path: Path) -> None:
    run = ParamServerRun(Case(steps=10_000), Setting(2), checkpoint=(tmp_path, 10_000))
    evaluating, may_end = threading.Event(), threading.Event()

    def evaluate(model: nn.Module) -> EvalSums:
        evaluating.set()
        may_end.wait(30)
        return EvalSums(1.0, 1, 1, 1)

    run.role._evaluate, run.role._evaluates_beside, run.role._eval_steps = evaluate, True, 3
    run.start()
    try:
        assert evaluating.wait(20)
        began = time.monotonic()
        run.stop.set()
        result = run.result(10)
    finally:
        may_end.set()
    assert time.monotonic() - began < 5
    assert result.stopped
    assert (tmp_path / f"step_{result.steps:08d}").is_dir()


def test_the_server_is_told_of_by_the_class_of_its_error() -> None:
    run = ParamServerRun(Case(), Setting(2))

    def full(push: Push) -> None:
        raise TrainingStopped("the disk is full")

    run.rule.pushed = full
    run.start()
    with pytest.raises(TrainingStopped):
        run.result()
    assert {(type(error), str(error)) for error in run.worker_errors.values()} == {
        (TrainingStopped, "the disk is full")
    }


def test_with_too_few_workers_the_run_waits() -> None:
    run = ParamServerRun(Case(steps=60), Setting(2, min_workers=2, seconds_per_step={1: 0.01, 2: 0.01})).start()
    run.wait_for_steps(10)
    run.stop_worker(2)
    wait_until(lambda: any("has left" in note for note in run.notes))
    known = updates(run)
    time.sleep(0.5)
    assert updates(run) <= known + 1  # one may have been complete
    run.add_worker(2, "another process")
    assert run.result().steps == 60


def test_a_run_that_is_resumed_at_its_end_tells_its_workers(tmp_path: Path) -> None:
    ParamServerRun(Case(steps=5), first := Setting(2), checkpoint=(tmp_path, 5)).start().result()
    run = ParamServerRun(Case(steps=5), first, resume=tmp_path / "step_00000005").start()
    assert run.result().steps == 5
    assert run.worker_errors == {}
    assert run.role.crew.reports.keys() == {1, 2}


def test_the_last_word_is_waited_for_from_when_the_last_weights_have_left() -> None:
    run = ParamServerRun(Case(steps=3), Setting(1))
    run.role._report_patiences = 0.5 / PATIENCE
    over = threading.Event()
    end, is_sending = run.port.end, run.port.is_sending
    ended_at = [0.0]

    def end_and_send_long(*arguments: object) -> None:
        ended_at[0] = time.monotonic()
        end(*arguments)  # type: ignore[arg-type]
        over.set()

    run.port.end = end_and_send_long  # type: ignore[method-assign]
    run.port.is_sending = lambda: is_sending() or time.monotonic() < ended_at[0] + 1.0  # type: ignore[method-assign]
    run.start()
    wait_until(lambda: 1 in run.worker_ports)
    report = run.worker_ports[1].report
    run.worker_ports[1].report = lambda told: (time.sleep(1.2), report(told))[1]  # type: ignore[method-assign]
    run.result()
    assert run.role.crew.reports.keys() == {1}
