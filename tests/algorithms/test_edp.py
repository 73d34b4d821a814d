"""edp: every push is applied, scaled by its staleness, and logged; nobody waits, and nothing is lost."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algorithms.equality import Case, build_simple_nn
from algorithms.param_servers import NEVER, ParamServerRun, Setting, audit, wait_until
from smolcluster.algorithms.edp import EdpServer, EdpWorker
from smolcluster.checkpoint.ledger import LEDGER, read_ledger
from smolcluster.collectives.param_messages import Answer, PushNote
from smolcluster.collectives.param_server import Push, Worker
from smolcluster.collectives.param_worker import Ticket, WorkerPort
from smolcluster.telemetry import Telemetry
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.outbox import MAX_WAITING, Outbox
from smolcluster.training.schedule import lr_schedule
from smolcluster.training.shares import WorkerShares


class EdpRun(ParamServerRun):
    """A run of edp."""

    def make_rule(self) -> Any:
        case, setting = self.case, self.setting
        return EdpServer(
            self.model, optimizer_factory("adamw", 3e-3, 0.1), self.port, self.pool,
            steps=NEVER if setting.epochs is not None else case.steps,
            shares=WorkerShares(case.shares or [1.0] * setting.workers),
            precision=case.precision, lr_schedule=lr_schedule("cosine", 3e-3, 5, 1e-4, case.steps),
            **{**case.options, **setting.server},
        )  # fmt: skip

    def make_worker(self, model: nn.Module, port: WorkerPort) -> Any:
        return EdpWorker(model, port, precision=self.case.precision, **self.setting.worker)


def updates(run: EdpRun) -> list[dict[str, Any]]:
    return [row for row in run.rows.rows if "train/loss" in row]  # type: ignore[misc]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("compression", ["none", "int8"])
def test_every_sample_counts_once(workers: int, compression: str, tmp_path: Path) -> None:
    case = Case(precision="fp32")
    run = EdpRun(case, Setting(workers, epochs=3, compression=compression, folder=tmp_path)).start()
    result = run.result()
    assert not run.worker_errors
    assert result.samples == 3 * case.length
    assert run.rule.refused == 0
    audit(tmp_path / LEDGER, case.length, epochs=3)


def test_applied_updates_are_pushes(tmp_path: Path) -> None:
    run = EdpRun(Case(), Setting(3, epochs=3, folder=tmp_path)).start()
    result = run.result()
    log = run.log.updates()
    pushes = [push for line in log for push in line["pushes"]]
    assert result.steps == len(log) == len(pushes)
    answered = sum(len([row for row in rows.rows if "train/loss" in row]) for rows in run.worker_rows.values())
    assert answered == result.steps
    leases = [part["lease"] for push in pushes for part in push["parts"]]
    assert sorted(leases) == sorted({line["lease"] for line in read_ledger(tmp_path / LEDGER)})


def test_the_learning_rate_is_scaled_by_share_and_staleness() -> None:
    case = Case(steps=60)
    run = EdpRun(case, Setting(3)).start()
    run.result()
    schedule = lr_schedule("cosine", 3e-3, 5, 1e-4, case.steps)
    seen = 0
    log = run.log.updates()
    for version, line in enumerate(log):
        (push,) = line["pushes"]
        tau = max(version - part["base"] for part in push["parts"])
        assert line["tau"] == tau
        expected = schedule(seen // case.global_batch) * line["samples"] / case.global_batch / (1 + tau)
        assert line["lr"] == pytest.approx(expected, rel=1e-15)
        seen += line["samples"]


def test_a_push_on_the_newest_weights_is_not_scaled_down() -> None:
    """One worker that waits for its weights each time would be plain training; here the first push is fresh."""
    run = EdpRun(Case(steps=1), Setting(1)).start()
    run.result()
    (line,) = run.log.updates()
    assert line["tau"] == 0


@pytest.mark.parametrize("bound", [1, 3])
def test_k_gates(bound: int) -> None:
    """A worker K ahead of the slowest computes; one K + 1 ahead is held until that one has caught up."""
    case = Case(length=200, steps=30)
    run = EdpRun(case, Setting(2, server={"staleness_bound": bound}))
    gate = threading.Event()
    run.gates = {2: gate}  # worker 2 finishes nothing before it opens
    run.start()
    finished = run.wait_until_idle(1)
    gate.set()
    run.result()
    assert finished == bound + 1


def test_without_a_bound_nobody_is_held() -> None:
    run = EdpRun(Case(length=200, steps=25), Setting(2))
    run.gates = {2: threading.Event()}
    run.start()
    run.wait_for_steps(15)
    run.gates[2].set()
    run.result()


def test_a_slow_worker_does_not_hold_up_the_others(tmp_path: Path) -> None:
    run = EdpRun(Case(), Setting(3, epochs=2, seconds_per_step={3: 0.3}, folder=tmp_path)).start()
    run.result()
    samples = dict.fromkeys((1, 2, 3), 0)
    for line in read_ledger(tmp_path / LEDGER):
        samples[line["rank"]] += line["samples"]  # type: ignore[index, operator]
    assert samples[3] < min(samples[1], samples[2]) / 2


def test_a_lost_workers_samples_are_lent_again(tmp_path: Path) -> None:
    case = Case()
    run = EdpRun(case, Setting(3, epochs=3, seconds_per_step={1: 0.01, 2: 0.01, 3: 0.01}, folder=tmp_path)).start()
    run.wait_for_steps(5)
    run.lose(2)
    run.result()
    assert run.worker_ports[2].sessions == 2
    audit(tmp_path / LEDGER, case.length, epochs=3)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    case = Case(length=60, global_batch=12)
    first = EdpRun(case, Setting(2, epochs=3), checkpoint=(tmp_path, 10)).start()
    first.result()
    second = EdpRun(case, Setting(2, epochs=3, folder=tmp_path), resume=tmp_path / "step_00000010").start()
    result = second.result()
    assert updates(second)[0]["step"] == 10
    assert result.samples == 3 * 60 - sum(row["train/samples"] for row in updates(first)[:10])


class HeldPort:
    """A worker's port whose pushes are answered when the test says so."""

    def __init__(self) -> None:
        self.rank, self.sessions, self.is_closed, self.telemetry = 1, 1, False, Telemetry()
        self.pushed: list[tuple[list[Tensor], PushNote, Ticket]] = []
        self.came = threading.Semaphore(0)
        self.server: str | None = "first"

    def lineage(self) -> str | None:
        return self.server

    def push(self, gradients: list[Tensor], note: PushNote) -> Ticket:
        ticket = Ticket(Telemetry(), lambda: None)
        self.pushed.append((gradients, note, ticket))
        self.came.release()
        return ticket


def note_of(lease: int, base: int, count: int, loss: float = 1.0) -> PushNote:
    return PushNote(
        leases=(lease,), bases=(base,), loss_sum=loss, count=count, samples=count, scale=1 / count, compute_s=0.1
    )


def test_what_does_not_fit_into_the_queue_is_added_up_and_not_dropped() -> None:
    port = HeldPort()
    outbox = Outbox(port)  # type: ignore[arg-type]
    counts = [4, 2, 8, 2, 16]
    sums = [torch.full((3,), float(i + 1)) for i in range(5)]  # of the losses' gradients
    for i, (count, gradient) in enumerate(zip(counts, sums, strict=True)):
        if i == 1:
            assert port.came.acquire(timeout=5)  # the first is on its way
        outbox.put([gradient / count], note_of(i, base=i, count=count))
    port.pushed[0][2].finish(Answer(status="applied", step=0))
    assert port.came.acquire(timeout=5)
    gradients, note, ticket = port.pushed[1]
    assert (note.leases, note.bases) == ((1, 2, 3, 4), (1, 2, 3, 4))
    assert (note.count, note.samples, note.loss_sum) == (28, 28, 4.0)
    mean = gradients[0] / (note.scale * note.count)
    assert torch.allclose(mean, sum(sums[1:]) / 28)  # type: ignore[arg-type]
    ticket.finish(Answer(status="applied", step=1))
    results = outbox.close()
    assert [result.step for result in results] == [0, 1]
    assert MAX_WAITING == 1


def test_results_of_a_server_that_went_back_to_its_checkpoint_are_dropped() -> None:
    port = HeldPort()
    outbox = Outbox(port)  # type: ignore[arg-type]
    for number in range(2):
        outbox.put([torch.ones(3)], note_of(number, base=number, count=4))
        assert port.came.acquire(timeout=5)
        port.pushed[number][2].finish(Answer(status="applied", step=number))
    wait_until(lambda: len(outbox._results) == 2)
    port.server = None  # it may come back as it was: then what it did counts
    assert outbox.next_result() is None
    port.server = "first"
    first = outbox.next_result()
    assert first is not None
    assert first.step == 0
    port.server = "second"
    assert outbox.next_result() is None
    assert outbox.close() == []


def test_gradients_of_a_lost_session_are_not_pushed_in_the_next() -> None:
    port = HeldPort()
    outbox = Outbox(port)  # type: ignore[arg-type]
    outbox.put([torch.zeros(2)], note_of(0, 0, 1))
    assert port.came.acquire(timeout=5)
    outbox.put([torch.zeros(2)], note_of(1, 0, 1))
    port.sessions = 2  # the server lends the others' leases anew
    outbox.put([torch.zeros(2)], note_of(7, 0, 1))
    port.pushed[0][2].finish(Answer(status="lost"))
    assert port.came.acquire(timeout=5)
    port.pushed[1][2].finish(Answer(status="applied"))
    outbox.close()
    assert [note.leases for _, note, _ in port.pushed] == [(0,), (7,)]


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    case = Case(build=build_simple_nn, is_text=False)
    run = EdpRun(case, Setting(2))
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    run.start()
    with pytest.raises(Exception, match="the loss is nan"):
        run.result()


def test_a_push_on_weights_that_never_were_is_refused() -> None:
    """It would have a negative staleness, and at -1 no learning rate at all."""
    run = EdpRun(Case(steps=5), Setting(1))
    honest = run.port.next_event
    lies: list[Push] = []  # a worker that was refused comes again and counts from 1

    def lying(timeout: float | None) -> Any:
        event = honest(timeout)
        if isinstance(event, Push) and event.number == 1 and not lies:
            lies.append(event)
            event = replace(event, note=event.note.model_copy(update={"bases": (event.note.bases[0] + 1,)}))
        return event

    run.port.next_event = lying  # type: ignore[method-assign]
    run.start()
    with contextlib.suppress(Exception):
        run.wait_for_steps(1)
    run.stop.set()
    run.result()
    assert run.rule.refused == 1


@pytest.mark.parametrize("run_type", [EdpRun, ParamServerRun])
def test_a_mistake_of_the_server_ends_its_workers(run_type: type[ParamServerRun]) -> None:
    run = run_type(Case(), Setting(2))

    def mistake(push: Push) -> None:
        raise RuntimeError("a mistake of ours")

    run.rule.pushed = mistake
    run.start()
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run.result()
    assert {str(error) for error in run.worker_errors.values()} == {"a mistake of ours"}


def test_a_push_after_the_end_is_lost_at_once() -> None:
    run = EdpRun(Case(steps=1), Setting(1))
    told = threading.Event()
    pushed: list[bool] = []
    make_worker = run.make_worker

    def worker_that_pushes_late(model: nn.Module, port: WorkerPort) -> Any:
        strategy = make_worker(model, port)
        finish = strategy.finish

        def late() -> Any:
            told.set()
            pushed.append(port.push(port.layout.empty(), note_of(99, 0, 1)).done())
            return finish()

        strategy.finish = late
        return strategy

    run.make_worker = worker_that_pushes_late  # type: ignore[method-assign]
    run.start()
    run.result()
    assert told.is_set()
    assert pushed == [True]


def test_a_worker_that_comes_when_the_others_were_told_of_the_end_is_told_too() -> None:
    run = EdpRun(Case(steps=3), Setting(1)).start()
    end = run.port.end
    told = threading.Event()

    def end_and_let_one_in(*arguments: Any) -> None:
        end(*arguments)
        run.add_worker(2)
        run.worker_began.wait(10)
        told.set()

    run.port.end = end_and_let_one_in  # type: ignore[method-assign]
    run.result()
    assert told.is_set()
    assert not run.worker_errors


def test_weights_wait_until_those_before_them_have_left() -> None:
    """A slow link to a worker: older weights must not pile up in front of newer ones."""
    run = EdpRun(Case(steps=12), Setting(1))
    room, sent = [True], []
    run.port.has_room = lambda worker: room[0]  # type: ignore[method-assign]
    send_weights = run.port.send_weights

    def sending(worker: Worker, version: int, weights: Any) -> None:
        sent.append(version)
        room[0] = version >= 8
        send_weights(worker, version, weights)

    run.port.send_weights = sending  # type: ignore[method-assign]
    apply = run.rule._apply

    def applying(push: Push) -> Any:
        update = apply(push)
        if update.result.step == 7:
            room[0] = True
        return update

    run.rule._apply = applying
    run.start()
    run.result()
    assert sent[:2] == [1, 8]  # 2 to 7 were wanted and never sent
    logged = [row["version"] for row in run.log.rows if row["event"] == "weights"]
    assert logged == [0, *sent]
