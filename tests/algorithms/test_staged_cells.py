"""mp and mp_pipeline equal `single` in half precision, with an untied head, with frozen stages, with dropout."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from algorithms.equality import VOCAB, Case, Outcome, check_equal
from algorithms.staged import (
    build_gpt,
    build_llama,
    even_split,
    make_staged,
    outcome_of,
    run_staged,
    single,
    staged_batches,
)
from collectives.contract import open_group, run_group
from smolcluster.collectives.base import Communicator
from smolcluster.models.checkpointing import checkpoint_activations
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.stage import layers_of, tied_parameters

# mp, which has no schedule, and mp_pipeline.
ALGORITHMS: list[dict[str, Any]] = [{}, {"schedule": "gpipe"}, {"schedule": "1f1b"}, {"schedule": "interleaved"}]
FEW: list[dict[str, Any]] = [{}, {"schedule": "1f1b"}]
# Eight layers on three ranks: 0 to 2, 3 to 5, 6 and 7.
STAGES = ("entry and blocks 0 and 1", "blocks 2 to 4", "block 5 and exit")


def build_untied(seed: int) -> nn.Module:
    return build_llama(seed, tie_word_embeddings=False)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("build", "micro_batches"), [(build_gpt, 1), (build_untied, 3)])
def test_half_precision_gives_the_bits_of_single(
    build: Callable[[int], nn.Module], micro_batches: int, precision: str, algorithm: dict[str, Any]
) -> None:
    """Ranks compute what one process does, in its order; the gradient of a tied head is the sum of two, so M = 1."""
    case = Case(build=build, precision=precision, micro_batches=micro_batches, steps=12)
    reference, outcomes = single(case), run_staged(case, 3, **algorithm)
    assert all(outcome.results == outcomes[0].results for outcome in outcomes)
    losses = [result.loss for result in reference.results]
    assert [result.loss for result in outcomes[0].results] == losses
    assert outcomes[0].weights.keys() == reference.weights.keys()
    for name, tensor in reference.weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(outcomes[0].weights[name], tensor), name
    in_full = single(replace(case, precision="fp32"))
    assert [result.loss for result in in_full.results] != losses, "autocast does nothing here"


@pytest.mark.parametrize("algorithm", FEW, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_with_everything_else_follows_single(precision: str, algorithm: dict[str, Any]) -> None:
    case = Case(build=build_gpt, precision=precision, micro_batches=4, steps=25)
    case = case.with_options(grad_clip_norm=0.5, staleness_bound=2)
    outcomes = run_staged(case, 3, **algorithm)
    assert all(outcome.results == outcomes[0].results for outcome in outcomes)
    reference = single(case)
    # Sums in another order, rounded to 3 digits: 0.02 as for the other algorithms, and a norm within some percent.
    for found, expected in zip(outcomes[0].results, reference.results, strict=True):
        assert found.loss == pytest.approx(expected.loss, abs=0.02)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=0.05)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_an_untied_head_equals_single(algorithm: dict[str, Any]) -> None:
    model = build_untied(0)
    assert not tied_parameters(model, layers_of(model))
    case = Case(build=build_untied, micro_batches=3, steps=20).with_options(grad_clip_norm=0.5)
    reference, outcomes = single(case), run_staged(case, 3, **algorithm)
    check_equal(reference, outcomes, "fp64")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= outcomes[0].weights.keys()
    assert "lm_head.weight" in outcomes[2].weights
    assert "lm_head.weight" not in outcomes[1].weights


def build_checkpointed_llama(seed: int) -> nn.Module:
    model = build_llama(seed)
    assert checkpoint_activations(model) == 6
    return model


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("algorithm", FEW, ids=str)
def test_activation_checkpointing_of_a_llama_changes_nothing(algorithm: dict[str, Any], bound: int) -> None:
    case = Case(build=build_checkpointed_llama, micro_batches=3, steps=20).with_options(staleness_bound=bound)
    check_equal(single(replace(case, build=build_llama)), run_staged(case, 3, **algorithm), "fp64")


def freeze(model: nn.Module, stages: tuple[int, ...], stages_in_all: int = 3) -> nn.Module:
    """Freeze all parameters of these stages; a tied head too, as its matrix is the entry's."""
    every = layers_of(model)
    split = even_split(len(every), stages_in_all)
    for stage in stages:
        for layer in split[stage]:
            for name in every.modules(layer):
                model.get_submodule(name).requires_grad_(False)
    return model


@pytest.mark.parametrize(("algorithm", "bound"), [({}, 1), ({"schedule": "1f1b"}, 0)], ids=["mp", "mp_pipeline"])
@pytest.mark.parametrize("build", [build_gpt, build_untied])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=lambda of: ", ".join(STAGES[n] for n in of))
def test_frozen_stages_stay_and_let_gradients_through(
    frozen: tuple[int, ...], build: Callable[[int], nn.Module], algorithm: dict[str, Any], bound: int
) -> None:
    case = Case(build=lambda seed: freeze(build(seed), frozen), micro_batches=2, steps=12)
    case = case.with_options(grad_clip_norm=0.5, staleness_bound=bound)
    reference, outcomes = single(case), run_staged(case, 3, **algorithm)
    check_equal(reference, outcomes, "fp64")
    stays = {name: not param.requires_grad for name, param in case.build(0).named_parameters()}
    assert set(stays.values()) == {False, True}
    for name, param in case.build(0).named_parameters():
        assert torch.equal(outcomes[0].weights[name], param.double()) is stays[name], name


def build_dropping(seed: int, dropout: float = 0.3) -> nn.Module:
    return GPT(GPTConfig(VOCAB, 8, 6, 2, 12, dropout, 8), seed)


def test_dropout_on_one_rank_gives_the_bits_of_single() -> None:
    """Ranks are threads here and have one generator: on several of them who draws first is not determined."""
    case = Case(build=build_dropping, precision="fp32", micro_batches=2, steps=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        reference = single(case)
        torch.manual_seed(5)
        (outcome,) = run_staged(case, 1, schedule="1f1b")
    assert [result.loss for result in outcome.results] == [result.loss for result in reference.results]
    assert all(torch.equal(outcome.weights[name], tensor) for name, tensor in reference.weights.items())


@pytest.mark.parametrize("algorithm", FEW, ids=str)
def test_every_stage_drops_in_training_and_none_in_evaluation(algorithm: dict[str, Any]) -> None:
    dropped: set[str] = set()
    lock = threading.Lock()

    def note(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def look(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            if not torch.equal(out, args[0]):
                with lock:
                    dropped.add(f"{'training' if module.training else 'evaluation'}: {name}")

        return look

    case = Case(build=build_dropping, precision="fp32", micro_batches=2, steps=3).with_options(**algorithm)

    def train(comm: Communicator) -> tuple[Any, Any]:
        strategy = make_staged(case.build(comm.rank), comm, case)
        for stage in strategy._stages.own.values():
            for name, module in stage.module.named_modules():
                if isinstance(module, nn.Dropout):
                    module.register_forward_hook(note(name))
        batches = [staged_batches(case, step, comm.rank, comm.world_size) for step in range(case.steps)]
        results = [strategy.train_step(batch) for batch in batches]
        sums = [strategy.add_up(strategy.eval_step(batches[0][0])) for _ in range(2)]
        assert sums[0] == sums[1]
        return outcome_of(strategy, results), sums

    outcomes = [outcome for outcome, _ in run_group(open_group("local", 3), train)]
    assert all(outcome.results == outcomes[0].results for outcome in outcomes)
    without = single(replace(case, build=lambda seed: build_dropping(seed, 0.0)))
    assert outcomes[0].results[0].loss != without.results[0].loss
    names = [name for name, module in build_dropping(0).named_modules() if isinstance(module, nn.Dropout)]
    assert {f"training: {name}" for name in names} == dropped


def run_on(devices: tuple[str, ...], case: Case) -> list[Outcome]:
    """A rank on each of these devices, in one process."""

    def train(comm: Communicator) -> Outcome:
        strategy = make_staged(case.build(comm.rank), comm, case.with_options(device=devices[comm.rank]))
        assert {param.device.type for param in strategy._stages.params.values()} == {devices[comm.rank]}
        batches = [staged_batches(case, step, comm.rank, comm.world_size) for step in range(case.steps)]
        return outcome_of(strategy, [strategy.train_step(batch) for batch in batches])

    return run_group(open_group("local", len(devices)), train)


def check_devices(devices: tuple[str, ...], precision: str) -> None:
    """What `single` on the CPU does, but for the order in which a device adds."""
    case = Case(build=build_gpt, precision=precision, micro_batches=4)
    case = case.with_options(schedule="1f1b", grad_clip_norm=0.5, staleness_bound=1)
    reference, (first, last) = single(case), run_on(devices, case)
    assert first.results == last.results
    tolerance = {"fp64": 1e-9, "fp32": 1e-3}.get(precision, 0.05)
    losses = [result.loss for result in reference.results]
    assert [result.loss for result in first.results] == pytest.approx(losses, abs=tolerance)
    if precision == "fp64":
        for name, tensor in reference.weights.items():
            torch.testing.assert_close(first.weights[name].cpu(), tensor, rtol=0, atol=1e-9)


def test_a_pipeline_of_two_devices_is_built() -> None:
    """The next test's code, where there is no other device."""
    check_devices(("cpu", "cpu"), "fp64")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")], ids=" and ".join)
def test_a_pipeline_of_two_stages_on_cuda_follows_single(devices: tuple[str, ...], precision: str) -> None:
    check_devices(devices, precision)
