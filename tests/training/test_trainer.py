from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from data.dealt import rank_indices
from smolcluster.algorithms.classicdp import ClassicDP
from smolcluster.algorithms.single import Single
from smolcluster.collectives.local import LocalCommunicator, LocalGroup
from smolcluster.data.batch import Batch
from smolcluster.data.sampler import Sampler
from smolcluster.errors import TrainingStopped
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.role import RunContext, TrainerRole
from smolcluster.training.step import evaluate_batch
from smolcluster.training.trainer import Progress, Trainer, TrainResult, stop_on_interrupt

ADAMW = optimizer_factory("adamw", 1e-2)


class Rows:
    """A sink that keeps all."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.done: list[tuple[int, int]] = []

    def write(self, row: Any) -> None:
        json.dumps(row, allow_nan=False)  # a row must be valid JSON
        self.rows.append(dict(row))

    def progress(self, done: int, total: int, row: Any) -> None:
        assert row == self.rows[-1]
        self.done.append((done, total))

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows if name in row]


INPUTS = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(2))


def batches(steps: int, rank: int = 0, world_size: int = 1, planned: int = 8) -> Iterator[list[Batch]]:
    sampler = Sampler(24, 8, seed=0, shares=world_size)
    for step in range(steps):
        indices = rank_indices(sampler, step, rank)
        yield [Batch(INPUTS[indices], TARGETS[indices], planned)]


def held_out(rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The last 6 samples, dealt so unequally that ranks have another number of batches."""
    if world_size == 1:
        yield Batch(INPUTS[24:], TARGETS[24:])
    elif rank == 0:
        yield Batch(INPUTS[24:25], TARGETS[24:25])
    else:
        yield Batch(INPUTS[25:28], TARGETS[25:28])
        yield Batch(INPUTS[28:], TARGETS[28:])


def single(**options: Any) -> Single:
    return Single(SimpleNN(12, 9, 5), ADAMW, **options)


def test_every_step_gives_one_row_with_the_names_of_the_contract() -> None:
    sink = Rows()
    result = Trainer(single(), batches(9), 9).run(sink)
    assert sink.column("step") == list(range(9))
    assert set(sink.rows[0]) == {
        *("time", "rank", "step", "train/loss", "train/grad_norm", "train/lr", "train/samples"),
        *("train/tokens_per_s", "time/step_s"),
    }
    assert sink.done == [(i, 9) for i in range(1, 10)]
    assert (result.steps, result.samples, result.rank_samples, result.tokens) == (9, 72, 72, 72)
    assert result.train_loss == sink.rows[-1]["train/loss"]
    assert result.val_loss is None
    assert not result.stopped
    assert 0 < result.train_s <= result.wall_s


def test_ranks_report_the_same_losses_and_their_own_traffic() -> None:
    def train(comm: LocalCommunicator) -> tuple[Rows, TrainResult]:
        sink = Rows()
        comm.telemetry.count("link/sent_bytes", 1000.0)  # before the first step, such as the broadcast of the weights
        strategy = ClassicDP(SimpleNN(12, 9, 5, comm.rank), ADAMW, comm)
        inner = strategy.train_step

        def train_step(micro_batches: Any) -> Any:
            comm.telemetry.count("link/sent_bytes", 10.0)
            return inner(micro_batches)

        strategy.train_step = train_step  # type: ignore[method-assign]
        data = batches(6, comm.rank, comm.world_size)
        return sink, Trainer(strategy, data, 6).run(sink, comm)

    (first, first_result), (second, second_result) = LocalGroup(2).run(train)
    alone = Rows()
    Trainer(single(), batches(6), 6).run(alone)
    assert first.column("train/loss") == second.column("train/loss")
    assert first.column("train/loss") == pytest.approx(alone.column("train/loss"), abs=1e-6)
    assert (first.column("rank"), second.column("rank")) == ([0] * 6, [1] * 6)
    # The local engine counts nothing by itself.
    assert first.column("link/sent_bytes") == [1010.0] + [10.0] * 5
    for name in ("time/comm_wait_s", "time/all_reduce_s", "time/forward_s", "time/backward_s"):
        assert len(first.column(name)) == 6
        assert min(first.column(name)) >= 0
    assert min(first.column("time/backward_s")) > 0
    for row in first.rows:
        assert row["time/all_reduce_hidden_s"] <= row["time/all_reduce_s"]
    assert first_result.samples == second_result.samples == 48
    assert first_result.rank_samples + second_result.rank_samples == 48


def test_the_traffic_of_all_rows_is_that_of_the_run_with_evaluations_and_checkpoints() -> None:
    (comm,) = LocalGroup(1).communicators
    sink = Rows()

    def held_out_sent() -> Iterator[Batch]:
        comm.telemetry.count("link/sent_bytes", 100.0)
        yield from held_out()

    def checkpoint(progress: Progress) -> None:
        comm.telemetry.count("link/sent_bytes", 1000.0)

    for _ in range(2):  # a second run on the same communicator counts only its own
        Trainer(
            single(), batches(4), 4, eval_batches=held_out_sent, eval_steps=2, checkpoint=checkpoint, checkpoint_steps=3
        ).run(sink, comm)
    # After step 1 an evaluation, after step 2 a checkpoint, at the end both, the checkpoint after the last row.
    assert sink.column("link/sent_bytes") == [0.0, 100.0, 0.0, 1100.0, 1000.0, 100.0, 0.0, 1100.0]


def test_delayed_results_are_rows_of_their_own_step_and_carry_its_spans() -> None:
    def train(comm: LocalCommunicator) -> Rows:
        sink = Rows()
        strategy = ClassicDP(SimpleNN(12, 9, 5), ADAMW, comm, staleness_bound=2)
        Trainer(strategy, batches(5, comm.rank, comm.world_size), 5).run(sink, comm)
        return sink

    for sink in LocalGroup(2).run(train):
        assert sink.column("step") == list(range(5))
        assert len(sink.column("time/all_reduce_s")) == 5
        assert max(sink.column("time/all_reduce_s")) > 0  # one that came while another's end was noted took no time
        assert min(sink.column("time/backward_s")) > 0


def test_evaluation_covers_the_split_once_over_all_ranks() -> None:
    def train(comm: LocalCommunicator) -> tuple[TrainResult, Any, Rows]:
        sink = Rows()
        strategy = ClassicDP(SimpleNN(12, 9, 5), ADAMW, comm)
        trainer = Trainer(
            strategy,
            batches(6, comm.rank, comm.world_size),
            6,
            eval_batches=lambda: held_out(comm.rank, comm.world_size),
            eval_steps=2,
        )
        return trainer.run(sink, comm), strategy.model, sink

    (result, model, sink), (other, _, _) = LocalGroup(2).run(train)
    whole = evaluate_batch(model, next(held_out()))
    assert result.val_loss == other.val_loss == pytest.approx(whole.loss_sum / 6, rel=1e-6)
    assert result.val_accuracy == other.val_accuracy == whole.correct / 6
    assert result.val_perplexity == pytest.approx(math.exp(whole.loss_sum / 6), rel=1e-6)
    assert [row["step"] for row in sink.rows if "val/loss" in row] == [1, 3, 5]
    assert sink.rows[-1]["val/loss"] == result.val_loss


@pytest.mark.parametrize("delay", [0, 2])
def test_the_last_evaluation_sees_the_final_weights_and_is_made_once(delay: int) -> None:
    calls = []

    def held_out_counted() -> Iterator[Batch]:
        calls.append(1)
        return held_out()

    strategy, sink = single(staleness_bound=delay), Rows()
    result = Trainer(strategy, batches(6), 6, eval_batches=held_out_counted, eval_steps=None).run(sink)
    assert len(calls) == 1
    assert result.val_loss == pytest.approx(strategy.eval_step(next(held_out())).loss_sum / 6)
    assert [row["step"] for row in sink.rows if "val/loss" in row] == [5]
    assert len(sink.rows) == 6


def test_batches_that_end_early_end_the_run_and_are_evaluated() -> None:
    sink = Rows()
    result = Trainer(single(), batches(3), 10, eval_batches=held_out).run(sink)
    assert result.steps == 3
    assert not result.stopped
    assert sink.rows[-1]["val/loss"] == result.val_loss


def test_checkpoints_are_written_by_step_number_before_the_last_gradients_are_applied_and_at_the_end() -> None:
    for delay, expected in ((0, [2, 4, 5]), (2, [2, 3, 5])):
        saved: list[Progress] = []
        trainer = Trainer(single(staleness_bound=delay), batches(5), 5, checkpoint=saved.append, checkpoint_steps=2)
        trainer.run()
        assert [progress.steps for progress in saved] == expected
        assert [progress.computed for progress in saved] == [min(5, steps + delay) for steps in expected]
        assert [progress.is_drained for progress in saved] == [delay > 0 and steps == 5 for steps in expected]
        assert [progress.samples for progress in saved] == [8 * steps for steps in expected]


@pytest.mark.parametrize("saves", [False, True])
def test_a_stop_on_one_rank_ends_all_after_the_same_step_and_loses_no_pending_gradient(saves: bool) -> None:
    stops = [threading.Event(), threading.Event()]
    saved: list[Progress] = []

    def train(comm: LocalCommunicator) -> TrainResult:
        def data() -> Iterator[list[Batch]]:
            for step, micro_batches in enumerate(batches(1000, comm.rank, comm.world_size)):
                if step == 3 and comm.rank == 1:
                    stops[1].set()
                yield micro_batches

        strategy = ClassicDP(SimpleNN(12, 9, 5), ADAMW, comm, staleness_bound=1)
        checkpoint = saved.append if saves else None
        trainer = Trainer(strategy, data(), 1000, eval_batches=held_out, checkpoint=checkpoint)
        return trainer.run(None, comm, stops[comm.rank])

    first, second = LocalGroup(2).run(train)
    assert first.stopped
    assert second.stopped
    # Steps 0 to 3, which carried the vote. Step 4 was pending when its sum arrived: kept where there is a checkpoint.
    assert first.steps == second.steps == (4 if saves else 5)
    assert first.val_loss is None, "the evaluation may take longer than a user waits after Ctrl-C"
    assert [(progress.steps, progress.computed) for progress in saved] == [(4, 5), (4, 5)] * saves


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    def data() -> Iterator[list[Batch]]:
        yield from batches(2)
        yield [Batch(INPUTS[:8] * math.nan, TARGETS[:8], 8)]

    sink = Rows()
    with pytest.raises(TrainingStopped, match="step 2"):
        Trainer(single(), data(), 10).run(sink)
    assert len(sink.rows) == 2


def test_a_skipped_step_has_a_row_without_numbers_that_json_lacks() -> None:
    sink = Rows()
    data = [[Batch(INPUTS[:8] * math.nan, TARGETS[:8], 8)]]
    result = Trainer(single(skip_nonfinite=True), data, 1).run(sink)
    assert sink.rows[0]["train/loss"] is None
    assert result.train_loss is None


def test_a_torch_dataloader_can_be_trained_on() -> None:
    dataset = torch.utils.data.TensorDataset(INPUTS, TARGETS)
    result = Trainer(single(), torch.utils.data.DataLoader(dataset, batch_size=8), 10).run()
    assert (result.steps, result.samples) == (4, 30)


def test_the_first_interrupt_stops_after_the_step_and_the_second_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = threading.Event()
    with stop_on_interrupt(stop):
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_trainer_role_turns_an_interrupt_into_a_stop() -> None:
    def data() -> Iterator[list[Batch]]:
        for step, micro_batches in enumerate(batches(1000)):
            if step == 4:
                signal.raise_signal(signal.SIGINT)
            yield micro_batches

    sink = Rows()
    result = TrainerRole(Trainer(single(), data(), 1000)).run(RunContext(metrics=sink))
    assert result.stopped
    assert result.steps == len(sink.rows) == 5
