"""Runs of mp and mp_pipeline for tests: the first rank sees no targets, the last one no inputs, others neither."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from algorithms.equality import VOCAB, Case, Outcome, run_single
from collectives.contract import open_group, run_group
from models.hf_folders import hf_config, transformers
from smolcluster.algorithms.model_parallel import ModelParallel
from smolcluster.algorithms.pipeline import Pipeline
from smolcluster.collectives.base import Communicator
from smolcluster.data.batch import Batch, Reads, read_only
from smolcluster.data.sampler import split_by_shares
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.hf import HFModel, init_hf_parameters
from smolcluster.models.stage import layers_of
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.schedule import lr_schedule
from smolcluster.training.step import StepResult

# Outcomes by the problem's text, and the problem itself: its functions must live as long as their addresses are in it.
_REFERENCES: dict[str, tuple[Case, Outcome]] = {}
_RANDOM = threading.Lock()  # ranks are threads here, and transformers draws from torch's global generator


def drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """A model whose constructor draws from torch's one generator: the same every time."""
    with _RANDOM, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def build_gpt(seed: int, blocks: int = 6) -> nn.Module:
    """Eight layers, so that four ranks can have two stages each; the head is tied to the embedding."""
    return GPT(GPTConfig(VOCAB, 8, blocks, 2, 12, 0.0, 8), seed)


def build_llama(seed: int, **changes: Any) -> nn.Module:
    """A random Llama with a tied head."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 6}
    return _build_hf(hf_config("llama", **{**sizes, **changes}), seed)


def build_gpt2(seed: int) -> nn.Module:
    """A random GPT-2 of transformers, whose linear layers are of a class of its own."""
    return _build_hf(hf_config("gpt2", vocab_size=VOCAB, n_embd=8, n_head=2, n_layer=6), seed)


def _build_hf(config: Any, seed: int) -> nn.Module:
    with _RANDOM, torch.random.fork_rng(devices=[]):
        inner = transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        init_hf_parameters(inner, seed)
    return HFModel(inner, None).train()


def even_split(layers: int, stages: int) -> list[range]:
    """As many layers in each stage as in any other."""
    counts = split_by_shares(layers, [1.0] * stages)
    starts = [sum(counts[:number]) for number in range(stages + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(starts)]


def make_staged(model: nn.Module, comm: Communicator, case: Case) -> ModelParallel | Pipeline:
    """mp, or mp_pipeline where the case's options name a schedule."""
    schedule = case.options.get("schedule")
    stages = comm.world_size * (2 if schedule == "interleaved" else 1)
    return (ModelParallel if schedule is None else Pipeline)(
        model,
        optimizer_factory("adamw", 3e-3, 0.1),
        comm,
        split=even_split(len(layers_of(model)), stages),
        precision=case.precision,
        lr_schedule=lr_schedule("cosine", 3e-3, 5, 1e-4, case.steps),
        **case.options,
    )


def staged_batches(case: Case, step: int, rank: int, world_size: int) -> list[Batch]:
    """The whole batch for every rank, each seeing what it needs."""
    reads: Reads = "all"
    if world_size > 1:
        reads = "inputs" if rank == 0 else "targets" if rank == world_size - 1 else "nothing"
    return [read_only(batch, reads) for batch in case.rank_batches(step, 0, 1)]


def outcome_of(strategy: ModelParallel | Pipeline, results: Sequence[StepResult | None]) -> Outcome:
    """On rank 0 all weights, on other ranks their own."""
    every_result = [result for result in results if result is not None] + strategy.finish()
    names = [name for name, _ in strategy.model.named_parameters(remove_duplicate=False)]
    whole = {name: strategy.whole_parameter(name) for name in names}
    weights = {name: value for name, value in whole.items() if value is not None}
    own = {name: param.detach().clone() for name, param in strategy._stages.params.items()}
    return Outcome(every_result, weights or own)


def single(case: Case) -> Outcome:
    """The reference, which knows no schedule. Many layouts are compared with one: it is computed once."""
    case = replace(case, options={name: value for name, value in case.options.items() if name != "schedule"})
    key = repr(case)
    if key not in _REFERENCES:
        _REFERENCES[key] = case, run_single(case)
    return _REFERENCES[key][1]


def run_staged(case: Case, world_size: int, engine: str = "local", **options: Any) -> list[Outcome]:
    """Train with the layers over `world_size` ranks, each from other initial weights; one outcome per rank."""
    case = case.with_options(**options)

    def train(comm: Communicator) -> Outcome:
        strategy = make_staged(case.build(comm.rank), comm, case)
        batches = [staged_batches(case, step, comm.rank, comm.world_size) for step in range(case.steps)]
        return outcome_of(strategy, [strategy.train_step(batch) for batch in batches])

    return run_group(open_group(engine, world_size), train)
