"""mp and mp_pipeline: every layout and schedule equals `single`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from algorithms.equality import VOCAB, Case, Outcome, build_simple_nn, check_equal, run_single
from collectives.contract import open_group, run_group
from models.hf_folders import hf_config, transformers
from smolcluster.algorithms.model_parallel import ModelParallel
from smolcluster.algorithms.pipeline import Pipeline
from smolcluster.collectives.base import Communicator
from smolcluster.data.batch import Batch
from smolcluster.data.sampler import split_by_shares
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.hf import HFModel, init_hf_parameters
from smolcluster.models.stage import layers_of
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.schedule import lr_schedule


def build_gpt(seed: int, blocks: int = 6) -> nn.Module:
    return GPT(GPTConfig(VOCAB, 8, blocks, 2, 12, 0.0, 8), seed)


def build_llama(seed: int) -> nn.Module:
    config = hf_config("llama", vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=6)
    with torch.random.fork_rng(devices=[]):
        inner = transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        init_hf_parameters(inner, seed)
    return HFModel(inner, None).train()


def even_split(layers: int, stages: int) -> list[range]:
    counts = split_by_shares(layers, [1.0] * stages)
    starts = [sum(counts[:number]) for number in range(stages + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def run_staged(
    case: Case, world_size: int, kind: Callable[..., Any], engine: str = "local", **options: Any
) -> list[Outcome]:
    """Train with the layers over `world_size` ranks; the first one sees no targets, the last one no inputs."""
    stages = world_size * (2 if options.get("schedule") == "interleaved" else 1)

    def blind(batch: Batch, rank: int) -> Batch:
        inputs, targets = batch.inputs, batch.targets
        if rank != 0:
            inputs = torch.empty(batch.samples, 0)
        if rank != world_size - 1:
            targets = torch.empty(batch.samples, 0)
        return Batch(inputs, targets, batch.planned_count)

    def train(comm: Communicator) -> Outcome:
        model = case.build(comm.rank)
        schedule = lr_schedule("cosine", 3e-3, 5, 1e-4, case.steps)
        strategy = kind(
            model, optimizer_factory("adamw", 3e-3, 0.1), comm, split=even_split(len(layers_of(model)), stages),
            precision=case.precision, lr_schedule=schedule, **case.options, **options,
        )  # fmt: skip
        batches = [[blind(batch, comm.rank) for batch in case.rank_batches(step, 0, 1)] for step in range(case.steps)]
        results = [strategy.train_step(batch) for batch in batches]
        results = [result for result in results if result is not None] + strategy.finish()
        whole = {
            name: strategy.whole_parameter(name)
            for name in [n for n, _ in strategy.model.named_parameters(remove_duplicate=False)]
        }
        own = {name: param.detach() for name, param in strategy._stages.params.items()}
        return Outcome(results, {name: value for name, value in whole.items() if value is not None} or own)

    return run_group(open_group(engine, world_size), train)


CASE = Case(build=build_gpt)


@pytest.mark.parametrize("bound", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_mp_equals_single(world_size: int, bound: int) -> None:
    case = replace(CASE, micro_batches=2).with_options(grad_clip_norm=0.5, staleness_bound=bound)
    check_equal(run_single(case), run_staged(case, world_size, ModelParallel), "fp64")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
@pytest.mark.parametrize("micro_batches", [1, 3, 4, 8])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_pipeline_equals_single(world_size: int, micro_batches: int, schedule: str) -> None:
    case = replace(CASE, micro_batches=micro_batches).with_options(grad_clip_norm=0.5)
    check_equal(run_single(case), run_staged(case, world_size, Pipeline, schedule=schedule), "fp64")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
@pytest.mark.parametrize("bound", [1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_pipeline_that_is_never_drained_equals_single(world_size: int, bound: int, schedule: str) -> None:
    case = replace(CASE, micro_batches=3).with_options(grad_clip_norm=0.5, staleness_bound=bound)
    check_equal(run_single(case), run_staged(case, world_size, Pipeline, schedule=schedule), "fp64")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_llama_equals_single(schedule: str) -> None:
    case = replace(CASE, build=build_llama, micro_batches=3)
    check_equal(run_single(case), run_staged(case, 3, Pipeline, schedule=schedule), "fp64")


def test_a_network_without_blocks_equals_single() -> None:
    case = replace(CASE, build=build_simple_nn, is_text=False)
    check_equal(run_single(case), run_staged(case, 2, ModelParallel), "fp64")
