"""`bench train --against fully_shard`: what it refuses, that both sides train the same, and how it is made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from smolcluster import cli
from smolcluster.bench.fully_shard import FullyShardTraining
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.data.batch import Batch
from smolcluster.errors import ConfigError
from smolcluster.models.build import build_model

GPT = [
    "model.type=gpt", "model.model_dim=16", "model.num_layers=2", "model.num_heads=2", "model.ff_dim=32",
    "model.dropout=0", "model.max_seq_len=16", "data.dataset=pydoc", "data.tokenizer=bytes", "training.batch_size=2",
    "training.max_steps=100", "training.grad_clip_norm=0.5", "training.device=cpu", "lr_schedule.kind=constant",
]  # fmt: skip


def config(*overrides: str) -> Config:
    return load_config(overrides=[*GPT, *overrides], flags={"algorithm": "fsdp"}, environ={}).config


def run(*arguments: str, overrides: list[str]) -> int:
    """`bench train` in this process, without the exit that ends `main`."""
    options = [part for override in overrides for part in ("--override", override)]
    return cli._run(["bench", "train", "--local", "2", "--against", "fully_shard", *arguments, *options], "smolcluster")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def some_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, 256, (2, 17), generator=generator) for _ in range(count)]
    return [Batch(ids[:, :-1], ids[:, 1:]) for ids in tokens]


def test_it_is_no_match_for_another_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--algorithm", "classicdp", overrides=GPT) == 2
    out, err = capsys.readouterr()
    assert err == "error: --against fully_shard is for --algorithm fsdp, not classicdp. Use ddp or single\n"
    assert out == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [("training.precision=fp16", r"fp32, bf16 and fp64"), ("cluster.fsdp_stage=0", r"Use --against ddp, or stage 1")],
)
def test_a_precision_and_a_stage_that_it_has_not_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FullyShardTraining(nn.Linear(2, 2), config(override), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "micro_batches"), [(3, 1), (3, 2), (2, 2), (1, 2)])
def test_both_sides_train_the_same(stage: int, micro_batches: int, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [
        f"cluster.fsdp_stage={stage}",
        f"training.micro_batches={micro_batches}",
        "training.learning_rate=0.01",
        "cluster.shared_memory=off",
    ]
    size = ["--pairs", "2", "--steps", "2"]
    assert run("--algorithm", "fsdp", *size, "--json", overrides=[*GPT, *chosen]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert result["against"] == "fully_shard"
    assert result["ratio"] > 0
    assert {"exposed_s", "against_exposed_s", "exposed_ratio"} <= result.keys()
    losses = result["losses"]
    # fp32, 12 updates: measured 1e-7. Ranks that did not talk, or gradients that are not averaged, are 1e-3 away.
    assert losses["ours"] == pytest.approx(losses["against"], abs=1e-4)
    assert losses["ours_alone"] == pytest.approx(losses["against_alone"], abs=1e-4)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_one_rank_trains_as_the_plain_model_does(precision: str) -> None:
    chosen = config("cluster.fsdp_stage=3", f"training.precision={precision}", "training.learning_rate=0.01")
    model = build_model(chosen.model, seed=1, vocab_size=256)
    plain = build_model(chosen.model, seed=1, vocab_size=256)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=chosen.training.weight_decay)
    training = FullyShardTraining(model, chosen, torch.device("cpu"))
    for _ in range(3):
        batches = some_batches(2)
        optimizer.zero_grad()
        losses = [nn.functional.cross_entropy(plain(b.inputs).flatten(0, -2), b.targets.flatten()) for b in batches]
        loss = torch.stack(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        # bf16 has 8 bits: a loss of 5.5 is then right to about 0.01.
        tolerance = 0.02 if precision == "bf16" else 1e-5
        assert training.train_step(batches) == pytest.approx(loss.item(), abs=tolerance)


@pytest.mark.usefixtures("one_rank")
def test_with_bf16_parameters_are_computed_with_in_bf16_and_kept_in_fp32() -> None:
    chosen = config("cluster.fsdp_stage=2", "training.precision=bf16")
    model = build_model(chosen.model, seed=1, vocab_size=256)
    seen: list[torch.dtype] = []
    weight_of = model.get_submodule("blocks.0.attention.qkv")
    weight_of.register_forward_pre_hook(lambda module, _args: seen.append(module.weight.dtype))
    training = FullyShardTraining(model, chosen, torch.device("cpu"), communicates=False)
    training.train_step(some_batches(1))
    assert seen == [torch.bfloat16]
    assert {param.dtype for param in model.parameters()} == {torch.float32}


@pytest.mark.usefixtures("one_rank")
def test_units_that_share_a_parameter_stay_with_the_rest() -> None:
    blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    blocks[2].weight = blocks[1].weight
    training = FullyShardTraining(blocks, config("cluster.fsdp_stage=3"), torch.device("cpu"))
    assert [name for name, block in blocks.named_children() if isinstance(block, FSDPModule)] == ["0", "3"]
    batch = Batch(torch.ones(4, 8), torch.arange(4))
    first, second = training.train_step([batch]), training.train_step([batch])
    assert second < first
