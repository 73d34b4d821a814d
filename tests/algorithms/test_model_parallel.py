"""mp and mp_pipeline: every layout and schedule equals `single`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algorithms.equality import Case, build_simple_nn, check_equal
from algorithms.staged import (
    build_gpt,
    build_gpt2,
    build_llama,
    drawn,
    even_split,
    make_staged,
    run_staged,
    single,
    staged_batches,
)
from collectives.contract import open_group, run_group
from smolcluster.algorithms.model_parallel import ModelParallel
from smolcluster.collectives.base import Communicator, Work
from smolcluster.errors import ConfigError, TrainingStopped
from smolcluster.models.checkpointing import checkpoint_activations
from smolcluster.training.late_weights import LateWeights
from smolcluster.training.optim import optimizer_factory

CASE = Case(build=build_gpt)
SCHEDULES = ["gpipe", "1f1b", "interleaved"]


def named(schedule: str | None) -> dict[str, str]:
    """mp has no schedule."""
    return {} if schedule is None else {"schedule": schedule}


@pytest.mark.parametrize("bound", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_mp_equals_single(world_size: int, bound: int) -> None:
    case = replace(CASE, micro_batches=2).with_options(grad_clip_norm=0.5, staleness_bound=bound)
    check_equal(single(case), run_staged(case, world_size), "fp64")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("micro_batches", [1, 3, 4, 8])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_pipeline_equals_single(world_size: int, micro_batches: int, schedule: str) -> None:
    """45 samples in steps of 10: micro-batches of unequal size, also some without samples."""
    case = replace(CASE, micro_batches=micro_batches).with_options(grad_clip_norm=0.5)
    check_equal(single(case), run_staged(case, world_size, schedule=schedule), "fp64")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_of_one_rank_equals_single(schedule: str) -> None:
    case = replace(CASE, micro_batches=3)
    check_equal(single(case), run_staged(case, 1, schedule=schedule), "fp64")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bound", [1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_pipeline_that_is_never_drained_equals_single(world_size: int, bound: int, schedule: str) -> None:
    case = replace(CASE, micro_batches=3).with_options(grad_clip_norm=0.5, staleness_bound=bound)
    check_equal(single(case), run_staged(case, world_size, schedule=schedule), "fp64")


@pytest.mark.parametrize("micro_batches", [1, 3, 4, 8])
@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_llama_equals_single(world_size: int, schedule: str | None, micro_batches: int) -> None:
    case = replace(CASE, build=build_llama, micro_batches=micro_batches)
    check_equal(single(case), run_staged(case, world_size, **named(schedule)), "fp64")


@pytest.mark.parametrize("schedule", [None, "1f1b"])
def test_a_hugging_face_gpt2_equals_single(schedule: str | None) -> None:
    case = replace(CASE, build=build_gpt2, micro_batches=3)
    check_equal(single(case), run_staged(case, 3, **named(schedule)), "fp64")


@pytest.mark.parametrize("schedule", [None, "1f1b"])
def test_float32_equals_single(schedule: str | None) -> None:
    case = replace(CASE, precision="fp32", micro_batches=4).with_options(grad_clip_norm=0.5)
    check_equal(single(case), run_staged(case, 3, **named(schedule)), "fp32")


@pytest.mark.parametrize("engine", ["tcp", "gloo"])
@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_over_sockets(schedule: str | None, engine: str) -> None:
    case = replace(CASE, micro_batches=4, steps=12)
    check_equal(single(case), run_staged(case, 3, engine, **named(schedule)), "fp64")


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_simple_network_equals_single(world_size: int) -> None:
    """Over three ranks the first one has nothing to train."""
    case = replace(CASE, build=build_simple_nn, is_text=False)
    check_equal(single(case), run_staged(case, world_size), "fp64")


def build_checkpointed(seed: int) -> nn.Module:
    model = build_gpt(seed)
    assert checkpoint_activations(model) == 6
    return model


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_activation_checkpointing_changes_nothing(schedule: str, bound: int) -> None:
    """Forward runs again within backward: with the weights of its own step."""
    case = replace(CASE, build=build_checkpointed, micro_batches=4).with_options(staleness_bound=bound)
    check_equal(single(case), run_staged(case, 3, schedule=schedule), "fp64")


def build_frozen(seed: int) -> nn.Module:
    """Embeddings and the first two blocks are not trained."""
    model = build_gpt(seed)
    for name, param in model.named_parameters():
        param.requires_grad = not name.startswith(("token", "position", "blocks.0.", "blocks.1."))
    return model


@pytest.mark.parametrize("schedule", [None, "1f1b"])
def test_frozen_layers_stay(schedule: str | None) -> None:
    case = replace(CASE, build=build_frozen, micro_batches=2)
    check_equal(single(case), run_staged(case, 4, **named(schedule)), "fp64")


def test_every_layer_has_a_gradient_and_changes() -> None:
    case = replace(CASE, micro_batches=4, steps=3)
    before = {name: param.double() for name, param in build_gpt(0).named_parameters()}
    after = run_staged(case, 4, schedule="1f1b")[0].weights
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())

    def norms(comm: Communicator) -> dict[str, float] | None:  # decay alone changes weights as well
        strategy = make_staged(case.build(comm.rank), comm, case)
        strategy.train_step(staged_batches(case, 0, comm.rank, comm.world_size))
        return strategy.take_gradient_norms()

    for found in run_group(open_group("local", 4), norms):
        assert found is not None
        assert found.keys() == before.keys()


def build_sequential(_seed: int) -> nn.Module:
    """With an activation that runs twice, one that works in place, and a batch normalisation."""
    twice = nn.Tanh()
    return drawn(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(12, 9), twice, nn.Linear(9, 9), nn.ReLU(inplace=True), nn.BatchNorm1d(9), twice,
            nn.Linear(9, 5),
        )
    )  # fmt: skip


@pytest.mark.parametrize("schedule", [None, "1f1b"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_sequential_equals_single(world_size: int, schedule: str | None) -> None:
    case = replace(CASE, build=build_sequential, is_text=False, micro_batches=2, length=50)
    reference = single(case)
    buffers = {name for name in reference.weights if name.startswith("5.") and "running" in name}
    outcomes = run_staged(case, world_size, **named(schedule))
    assert buffers
    kept = {name: tensor for name, tensor in reference.weights.items() if name in outcomes[0].weights}
    check_equal(replace(reference, weights=kept), outcomes, "fp64")

    def buffers_after(comm: Communicator) -> dict[str, Tensor]:
        strategy = make_staged(case.build(comm.rank), comm, case.with_options(**named(schedule)))
        for step in range(case.steps):
            strategy.train_step(staged_batches(case, step, comm.rank, comm.world_size))
        strategy.finish()
        return {name: strategy.model.get_buffer(name).clone() for name in buffers}

    for found in run_group(open_group("local", world_size), buffers_after):
        assert all(torch.allclose(found[name], reference.weights[name], rtol=0, atol=1e-11) for name in buffers)


def build_words(_seed: int) -> nn.Module:
    """Its entry is empty, so that a rank may have nothing to do but to pass ids on."""
    return drawn(lambda: nn.Sequential(nn.Embedding(19, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 19)))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ids_pass_by_a_rank_without_layers(world_size: int) -> None:
    case = replace(CASE, build=build_words, micro_batches=2)
    check_equal(single(case), run_staged(case, world_size, schedule="1f1b"), "fp64")


def test_a_module_that_runs_twice_and_is_trained_is_refused() -> None:
    linear = nn.Linear(12, 12)
    model = nn.Sequential(linear, nn.Tanh(), linear, nn.Linear(12, 5))

    def build(comm: Communicator) -> None:
        with pytest.raises(ConfigError, match=r"shared by layers \[1, 3\]"):
            ModelParallel(model, optimizer_factory("adamw", 1e-3, 0.1), comm)

    run_group(open_group("local", 1), build)


def test_with_staleness_every_step_has_as_many_micro_batches() -> None:
    case = replace(CASE, micro_batches=2).with_options(schedule="1f1b", staleness_bound=1)

    def train(comm: Communicator) -> None:
        strategy = make_staged(case.build(comm.rank), comm, case)
        strategy.train_step(staged_batches(case, 0, comm.rank, comm.world_size))
        with pytest.raises(ConfigError, match="3 micro-batches after steps of 2"):
            strategy.train_step(staged_batches(replace(case, micro_batches=3), 1, comm.rank, comm.world_size))

    run_group(open_group("local", 1), train)


def test_a_stash_goes_when_its_backward_is_done() -> None:
    case = replace(CASE, micro_batches=2).with_options(schedule="1f1b", staleness_bound=3)

    def train(comm: Communicator) -> list[bool]:
        strategy = make_staged(case.build(comm.rank), comm, case)
        for step in range(6):
            strategy.train_step(staged_batches(case, step, comm.rank, comm.world_size))
        kept = [bool(passes.params) for passes in strategy._under_way]
        strategy.finish()
        return kept

    of_ranks = run_group(open_group("local", 3), train)
    assert of_ranks[2] == [False, False, False], "the last rank is never behind"
    assert all(sum(kept) <= 1 for kept in of_ranks)


class CountingCommunicator:
    """Counts what is sent to whom; passes everything on."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.sent: dict[int, int] = {}
        self.others: list[str] = []

    def send(self, tensor: Tensor, dst: int, tag: int) -> Work:
        self.sent[dst] = self.sent.get(dst, 0) + tensor.nbytes
        return self._comm.send(tensor, dst, tag)

    def __getattr__(self, name: str) -> Any:
        if name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "exchange", "barrier"):
            self.others.append(name)
        return getattr(self._comm, name)


class SendingCommunicator:
    """Notes when it sends to rank 0; passes everything on."""

    def __init__(self, comm: Communicator, events: list[str]) -> None:
        self._comm = comm
        self._events = events

    def send(self, tensor: Tensor, dst: int, tag: int) -> Work:
        if dst == 0 and tensor.dim() == 3:
            self._events.append("sent")
        return self._comm.send(tensor, dst, tag)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_gradients_of_weights_are_computed_when_those_of_activations_have_left(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, micro_batches=3).with_options(schedule=schedule)
    events: list[str] = []
    compute = LateWeights.compute

    def noted(late: LateWeights) -> None:
        events.append("computed")
        compute(late)

    monkeypatch.setattr(LateWeights, "compute", noted)

    def train(comm: Communicator) -> None:
        sending: Any = SendingCommunicator(comm, events)
        strategy = make_staged(case.build(comm.rank), sending, case)
        strategy.train_step(staged_batches(case, 0, comm.rank, comm.world_size))

    run_group(open_group("local", 2), train)
    assert events == ["sent", "computed"] * 3


@pytest.mark.parametrize("schedule", [None, "gpipe", "1f1b"])
def test_ranks_speak_to_their_neighbours_only(schedule: str | None) -> None:
    """Activations and gradients of (10, 8) tokens of width 8, the tied embedding's gradient, sums, and samples."""
    case = replace(CASE, micro_batches=2, precision="fp32")
    case = case.with_options(**named(schedule))

    def train(comm: Communicator) -> tuple[dict[int, int], list[str]]:
        counting: Any = CountingCommunicator(comm)
        strategy = make_staged(case.build(comm.rank), counting, case)
        counting.sent, counting.others = {}, []
        for step in range(4):
            strategy.train_step(staged_batches(case, step, comm.rank, comm.world_size))
        strategy.add_up(strategy.eval_step(staged_batches(case, 0, comm.rank, comm.world_size)[0]))
        return counting.sent, counting.others

    sent = run_group(open_group("local", 3), train)
    assert [sorted(peers) for peers, _ in sent] == [[1], [0, 2], [1]]
    assert all(not others for _, others in sent)
    activations = 4 * 10 * 8 * 8 * 4 + 5 * 8 * 8 * 4
    tied = 4 * 19 * 8 * 4
    sums = 4 * 8 * (6 + len(list(build_gpt(0).parameters()))) + 32
    samples = 4 * 8 * 2
    assert sent[0][0][1] == activations + tied + sums + samples


def test_a_split_that_is_not_the_models_is_refused() -> None:
    def build(comm: Communicator) -> None:
        with pytest.raises(ConfigError, match="8 layers in order"):
            ModelParallel(build_gpt(0), optimizer_factory("adamw", 1e-3, 0.1), comm, split=even_split(7, 2))

    run_group(open_group("local", 2), build)


def test_a_loss_that_is_not_finite_stops_all_ranks() -> None:
    def build_broken(seed: int) -> nn.Module:
        model = build_gpt(seed)
        with torch.no_grad():
            model.get_parameter("norm.weight").fill_(float("nan"))
        return model

    with pytest.raises(TrainingStopped, match="step 0"):
        run_staged(replace(CASE, build=build_broken), 3, schedule="1f1b")
