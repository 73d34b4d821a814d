"""syncps: strict, it equals `single`; with a time limit, who is late is refused and nothing is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from algorithms.equality import Case, build_simple_nn, run_single
from algorithms.param_servers import ParamServerRun, Setting, audit, check_against
from smolcluster.algorithms.syncps import SyncPsServer
from smolcluster.checkpoint.ledger import LEDGER, read_ledger
from smolcluster.collectives.flat import FlatLayout
from smolcluster.collectives.param_messages import Answer, PushNote
from smolcluster.collectives.param_server import Push, Worker
from smolcluster.data.leases import Lease, SamplePool
from smolcluster.data.sampler import Sampler
from smolcluster.errors import PeerLost
from smolcluster.training.flat import blend_weights
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.shares import WorkerShares


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("staleness_bound", [0, 1, 3])
def test_strict_equals_single_with_the_same_k(workers: int, staleness_bound: int) -> None:
    case = Case(options={"staleness_bound": staleness_bound, "grad_clip_norm": 0.5})
    run = ParamServerRun(case, Setting(workers)).start()
    result = run.result()
    assert not run.worker_errors
    assert result.steps == case.steps
    check_against(run_single(case), run, 1e-11)


@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0), (4.0, 2.0, 1.0), (1.0, 0.0, 0.01)])
def test_any_shares_give_the_same_numbers(shares: tuple[float, ...]) -> None:
    case = Case(shares=shares, micro_batches=2, steps=20)
    run = ParamServerRun(case, Setting(3)).start()
    run.result()
    check_against(run_single(case), run, 1e-11)


def test_float32_equals_single(tmp_path: Path) -> None:
    case = Case(precision="fp32", build=build_simple_nn, is_text=False)
    run = ParamServerRun(case, Setting(3)).start()
    run.result()
    check_against(run_single(case), run, 5e-5)


def test_all_workers_end_with_the_servers_weights() -> None:
    run = ParamServerRun(Case(steps=3), Setting(2)).start()
    run.result()
    for model in run.worker_models.values():
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, run.model.state_dict()[name]), name


def test_a_worker_that_joins_mid_run_begins_with_the_servers_weights(tmp_path: Path) -> None:
    case = Case(steps=30)
    run = ParamServerRun(case, Setting(2, seconds_per_step={1: 0.02}, folder=tmp_path)).start()
    run.wait_for_steps(5)
    run.add_worker(3)
    run.result()
    assert run.role.crew.joined == [3]
    assert {line["rank"] for line in read_ledger(tmp_path / LEDGER)} == {1, 2, 3}
    check_against(run_single(case), run, 1e-11)  # the samples of a step do not depend on who computes them


def test_a_lost_workers_samples_are_dealt_again(tmp_path: Path) -> None:
    case = Case()
    run = ParamServerRun(case, Setting(3, epochs=3, seconds_per_step={1: 0.02, 2: 0.02}, folder=tmp_path)).start()
    run.wait_for_steps(3)
    run.lose(2)
    run.result()
    # It has come back by itself: only its connection was cut.
    assert run.worker_ports[2].sessions == 2
    audit(tmp_path / LEDGER, case.length, epochs=3)


def test_a_late_push_is_refused_and_its_samples_are_dealt_again(tmp_path: Path) -> None:
    case = Case()
    setting = Setting(
        3, epochs=8, server={"timeout": 0.05}, seconds_per_step={1: 0.02, 2: 0.02}, expected=3, folder=tmp_path
    )
    run = ParamServerRun(case, setting)
    run.gates = {3: threading.Event()}
    run.start()
    run.wait_for_steps(2)  # of 40: the step that worker 3 has samples of is closed, and the run goes on for long
    run.gates[3].set()
    result = run.result()
    assert run.rule.refused > 0
    assert result.samples == 8 * case.length
    audit(tmp_path / LEDGER, case.length, epochs=8)


def test_nobody_waits_for_a_worker_that_was_late_before() -> None:
    case = Case(length=400, steps=40)
    setting = Setting(3, server={"timeout": 0.2}, seconds_per_step={1: 0.01, 2: 0.01, 3: 1.0})
    run = ParamServerRun(case, setting).start()
    run.wait_for_steps(1)
    began = time.monotonic()
    run.result()
    # One time limit at the beginning; if each step that the slow worker takes part in waited, there would be several.
    assert time.monotonic() - began < 40 * 0.03 + 2 * 0.2 + 1.0


def test_a_worker_that_is_in_time_again_is_awaited_again() -> None:
    """Its first push is late, then it is as fast as the others: from then on steps have its samples."""
    case = Case(length=400, steps=30)
    setting = Setting(2, server={"timeout": 0.1}, seconds_per_step={1: 0.02}, expected=2)
    run = ParamServerRun(case, setting)
    run.gates = {2: threading.Event()}
    run.start()
    run.wait_for_steps(2)
    run.gates[2].set()
    run.result()
    assert run.rule.refused == 1
    last = [row["train/samples"] for row in run.rows.rows if "train/loss" in row][-5:]
    assert last == [10] * 5


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_k_gates(bound: int) -> None:
    """A worker K ahead of the slowest computes; one K + 1 ahead is held."""
    case = Case(steps=12, options={"staleness_bound": bound})
    run = ParamServerRun(case, Setting(2))
    gate = threading.Event()
    run.gates = {2: gate}  # worker 2 finishes nothing before it opens
    run.start()
    finished = run.wait_until_idle(1)
    gate.set()
    run.result()
    assert finished == bound + 1
    check_against(run_single(case), run, 1e-11)


def test_polyaks_blend_keeps_a_part_of_the_workers_weights() -> None:
    model = build_simple_nn(0)
    params = list(model.parameters())
    layout = FlatLayout(params)
    before = [param.detach().clone() for param in params]
    server = [torch.full_like(flat, 2.0) for flat in layout.empty()]
    blend_weights(params, server, layout, alpha=0.25)
    for param, old in zip(params, before, strict=True):
        assert torch.allclose(param, 0.75 * 2.0 + 0.25 * old)


def test_weights_come_every_interval_steps() -> None:
    run = ParamServerRun(Case(steps=12), Setting(2, server={"worker_update_interval": 4})).start()
    run.result()
    # Of every four steps one is computed on weights of the same version, the others on older ones.
    staleness = [row["staleness/max"] for row in run.rows.rows if "train/loss" in row]
    assert staleness == [0, 1, 2, 3] * 3


@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_compressed_pushes_and_pulls_train_nearly_as_well(compression: str) -> None:
    case = Case(precision="fp32", length=60, global_batch=20, steps=60)
    plain = run_single(case).results[-1].loss
    run = ParamServerRun(case, Setting(2, compression=compression)).start()
    run.result()
    loss = [row["train/loss"] for row in run.rows.rows if "train/loss" in row][-1]
    assert abs(loss - plain) < 0.01 * plain


def test_too_few_workers_end_the_run_with_a_reason() -> None:
    case = Case(steps=1000)
    run = ParamServerRun(case, Setting(2, min_workers=2, seconds_per_step={1: 0.02, 2: 0.02}))
    run.role._patience = 0.05
    run.start()
    run.wait_for_steps(3)
    run.stop_worker(2)
    with pytest.raises(PeerLost, match="1 workers are here, the run needs 2"):
        run.result()


@pytest.mark.parametrize("bound", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(bound: int, tmp_path: Path) -> None:
    case = Case(options={"staleness_bound": bound})
    whole = ParamServerRun(case, Setting(2)).start()
    whole.result()
    first = ParamServerRun(case, Setting(2), checkpoint=(tmp_path, 20)).start()
    first.result()
    second = ParamServerRun(case, Setting(2), resume=tmp_path / "step_00000020").start()
    second.result()
    rows = [row["train/loss"] for row in whole.rows.rows]
    assert [row["train/loss"] for row in second.rows.rows] == rows[20:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_a_worker_five_times_slower_does_not_slow_the_others() -> None:
    """Samples per second that count: at least 0.9 of what the others give alone."""

    def rate(workers: int, slow: dict[int, float]) -> float:
        case = Case(length=400, global_batch=4 * workers, steps=60, build=build_simple_nn, is_text=False)
        seconds = {1: 0.05, 2: 0.05} | slow
        run = ParamServerRun(case, Setting(workers, server={"timeout": 0.1}, seconds_per_step=seconds)).start()
        result = run.result()
        if slow:
            assert run.rule.refused > 0
        return result.samples / result.wall_s

    pairs = [(rate(2, {}), rate(3, {3: 0.25})) for _ in range(3)]
    # The best of each: a busy machine slows either at random.
    assert max(slowed for _, slowed in pairs) >= 0.9 * max(alone for alone, _ in pairs)


class StubPort:
    """Notes what is lent, and to whom."""

    def __init__(self, layout: FlatLayout) -> None:
        self.layout = layout
        self.lent: list[tuple[Worker, int, int]] = []  # worker, lease, step

    def lend(self, worker: Worker, lease: Lease, *, step: int, **_details: object) -> None:
        self.lent.append((worker, lease.number, step))

    def answer(self, worker: Worker, push: int, answer: Answer) -> None:
        pass


@pytest.mark.parametrize("hold", [False, True])
def test_a_step_whose_workers_are_all_gone_is_dealt_again_though_later_ones_have_pushes(hold: bool) -> None:
    """K = 1: step 1 was dealt to one worker alone, step 2 also to a newcomer; then the first one dies."""
    model = nn.Linear(2, 2)
    port = StubPort(FlatLayout(list(model.parameters())))
    pool = SamplePool(Sampler(64, 8, 0), 1)
    rule = SyncPsServer(
        model, optimizer_factory("sgd", 0.1), port, pool, steps=1000,  # type: ignore[arg-type]
        count_planned=lambda ranges: 1, shares=WorkerShares([1.0, 1.0]), staleness_bound=1,
    )  # fmt: skip

    def push(worker: Worker) -> list[int]:
        """Push the oldest lease of a worker; the steps that are applied then."""
        lease = next(number for owner, number, _ in port.lent if owner == worker)
        port.lent = [entry for entry in port.lent if entry[1] != lease]
        note = PushNote(leases=(lease,), bases=(0,), loss_sum=1.0, count=8, samples=8, scale=1.0, compute_s=0.1)
        rule.pushed(Push(worker, lease, note, [flat.zero_() for flat in port.layout.empty()]))
        return [update.result.step for update in rule.advance()]

    first, second = Worker(1, 1, "first"), Worker(2, 2, "second")
    rule.joined(first)
    assert list(rule.advance()) == []
    rule.joined(second)
    assert push(first) == [0]
    rule.hold = hold
    rule.left(first)
    assert list(rule.advance()) == []
    assert push(second) == []  # of step 2; step 1 is not made yet
    assert not rule.is_settled() or not hold
    assert push(second) == ([] if hold else [1, 2])  # step 1, which it was dealt when the first was gone
    if hold:
        assert rule.is_settled()
        rule.hold = False
        assert [update.result.step for update in rule.advance()] == [1, 2]


def test_a_step_that_closes_without_a_worker_is_the_mean_of_what_has_come() -> None:
    """The gradient is scaled by what was planned, 8 targets; 4 have come."""
    model = nn.Linear(2, 2)
    before = [param.detach().clone() for param in model.parameters()]
    port = StubPort(FlatLayout(list(model.parameters())))
    rule = SyncPsServer(
        model, optimizer_factory("sgd", 0.1), port, SamplePool(Sampler(64, 8, 0), 1), steps=9,  # type: ignore[arg-type]
        count_planned=lambda ranges: sum(stop - start for _, start, stop in ranges), timeout=1e-9,
        shares=WorkerShares([1.0, 1.0]),
    )  # fmt: skip
    workers = [Worker(1, 1, "first"), Worker(2, 2, "second")]
    for worker in workers:
        rule.joined(worker)
    assert list(rule.advance()) == []
    (lease,) = [number for owner, number, _ in port.lent if owner == workers[0]]
    note = PushNote(leases=(lease,), bases=(0,), loss_sum=4.0, count=4, samples=4, scale=1 / 8, compute_s=0.1)
    summed = 3.0  # of the losses' gradients, in every element
    rule.pushed(Push(workers[0], 1, note, [flat.fill_(summed * note.scale) for flat in port.layout.empty()]))
    update = next(rule.advance())
    assert (update.result.loss, update.result.count) == (1.0, 4)
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.allclose(param, old - 0.1 * summed / 4)


def test_a_push_for_a_step_that_a_checkpoint_has_is_refused() -> None:
    """K = 1: step 1 would close without the straggler, and its sum is saved; what comes then is in no update."""
    model = nn.Linear(2, 2)
    port = StubPort(FlatLayout(list(model.parameters())))
    pool = SamplePool(Sampler(64, 8, 0), 1)
    rule = SyncPsServer(
        model, optimizer_factory("sgd", 0.1), port, pool, steps=1000,  # type: ignore[arg-type]
        count_planned=lambda ranges: 8, shares=WorkerShares([1.0, 1.0]), staleness_bound=1, timeout=1e-9,
    )  # fmt: skip
    workers = [Worker(1, 1, "first"), Worker(2, 2, "straggler")]
    for worker in workers:
        rule.joined(worker)
    assert list(rule.advance()) == []

    def push(worker: Worker, step: int) -> None:
        lease = next(number for owner, number, of in port.lent if (owner, of) == (worker, step))
        note = PushNote(leases=(lease,), bases=(0,), loss_sum=1.0, count=4, samples=4, scale=1.0, compute_s=0.1)
        rule.pushed(Push(worker, lease, note, [flat.fill_(1.0) for flat in port.layout.empty()]))

    push(workers[0], 0)
    assert next(rule.advance()).result.samples == 4
    push(workers[0], 1)
    rule.hold = True
    assert rule.is_settled()
    rule.state()
    push(workers[1], 1)
    assert rule.refused == 1
    rule.hold = False
    assert next(rule.advance()).result.samples == 4
    committed = [commit for commit in rule.take_commits() if commit.step == 1]
    assert sum(commit.lease.samples for commit in committed) == 4


def test_while_a_checkpoint_is_due_the_next_look_is_at_a_time_to_come() -> None:
    """A step that may close already is no reason to look again at once."""
    model = nn.Linear(2, 2)
    port = StubPort(FlatLayout(list(model.parameters())))
    rule = SyncPsServer(
        model, optimizer_factory("sgd", 0.1), port, SamplePool(Sampler(64, 8, 0), 1), steps=9,  # type: ignore[arg-type]
        count_planned=lambda ranges: 8, shares=WorkerShares([1.0, 1.0]), staleness_bound=1, timeout=0.05,
    )  # fmt: skip
    first, second = Worker(1, 1, "first"), Worker(2, 2, "second")
    rule.joined(first)
    rule.joined(second)
    assert list(rule.advance()) == []
    rule.hold = True
    for step in (0, 1):
        lease = next(number for owner, number, of in port.lent if (owner, of) == (first, step))
        note = PushNote(leases=(lease,), bases=(0,), loss_sum=1.0, count=4, samples=4, scale=1.0, compute_s=0.1)
        rule.pushed(Push(first, lease, note, [flat.fill_(1.0) for flat in port.layout.empty()]))
        time.sleep(0.03)
    assert (deadline := rule.deadline()) is not None
    assert deadline > time.monotonic() or rule.is_settled()


def test_a_worker_blends_with_its_own_weights() -> None:
    """Interval 1, one worker: w_server is known for every step, so the worker's weights are a recursion over them."""
    alpha, case = 0.5, Case(steps=6, precision="fp64")
    run = ParamServerRun(case, Setting(1, worker={"polyak_alpha": alpha}))
    computed: list[list[torch.Tensor]] = []
    served: list[list[torch.Tensor]] = []
    lend = run.port.lend

    def noting(worker: Worker, lease: Lease, **details: Any) -> None:
        served.append([flat.clone() for flat in details["weights"]])
        lend(worker, lease, **details)

    run.port.lend = noting  # type: ignore[method-assign, assignment]
    make_worker = run.make_worker

    def watched(model: nn.Module, port: Any) -> Any:
        strategy = make_worker(model, port)
        model.register_forward_pre_hook(
            lambda *_: computed.append(run.layout.flatten([param.detach() for param in model.parameters()]))
        )
        return strategy

    run.make_worker = watched  # type: ignore[method-assign]
    run.start()
    run.result()
    assert len(computed) == len(served) == 6
    expected = served[0]  # the first replace what it has
    for own, server in zip(computed, served, strict=True):
        if server is not served[0]:
            expected = [(1 - alpha) * new + alpha * old for new, old in zip(server, expected, strict=True)]
        for mine, wanted in zip(own, expected, strict=True):
            assert torch.allclose(mine, wanted, rtol=0, atol=1e-12)
    assert any(not torch.allclose(a, b) for a, b in zip(computed[-1], served[-1], strict=True))


def test_automatic_shares_follow_the_measured_speeds(tmp_path: Path) -> None:
    """One worker takes 0.2 s for what the other does at once: it is lent less and less."""
    case = Case(length=400, global_batch=20)
    setting = Setting(2, epochs=2, folder=tmp_path, server={"shares": WorkerShares([1.0, 1.0], measures=True)})
    run = ParamServerRun(case, setting)
    make_worker = run.make_worker

    def slowed(model: nn.Module, port: Any) -> Any:
        if port.rank == 2:
            model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        return make_worker(model, port)

    run.make_worker = slowed  # type: ignore[method-assign]
    run.start()
    run.result()
    parts = [line["samples"] for line in read_ledger(tmp_path / LEDGER) if line["rank"] == 2]
    assert parts[0] == 10
    assert parts[-1] <= 4  # type: ignore[operator]
    audit(tmp_path / LEDGER, 400, epochs=2)
