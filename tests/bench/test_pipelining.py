"""`bench train --against torch_pipelining`: what it refuses, and that both sides and one process train the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.hf_folders import make_hf_folder
from smolcluster import cli
from smolcluster.bench.pipelining import check_offered
from smolcluster.bench.train import Options, measure_training
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.errors import ConfigError

GPT = [
    "model.type=gpt", "model.model_dim=16", "model.num_layers=4", "model.num_heads=2", "model.ff_dim=32",
    "model.dropout=0", "model.max_seq_len=16", "data.dataset=pydoc", "data.tokenizer=bytes", "training.batch_size=8",
    "training.max_steps=100", "training.grad_clip_norm=0.5", "training.learning_rate=0.01", "training.device=cpu",
    "lr_schedule.kind=constant", "training.micro_batches=4", "cluster.shared_memory=off",
]  # fmt: skip


def config(*overrides: str) -> Config:
    return load_config(overrides=[*GPT, *overrides], flags={"algorithm": "mp_pipeline"}, environ={}).config


def run(*arguments: str, overrides: list[str]) -> int:
    """`bench train` in this process, without the exit that ends `main`."""
    options = [part for override in overrides for part in ("--override", override)]
    return cli._run(["bench", "train", *arguments, *options], "smolcluster")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--algorithm", "classicdp", "--against", "torch_pipelining"],
            "is for --algorithm mp_pipeline, not classicdp",
        ),
        (["--algorithm", "mp_pipeline", "--against", "ddp"], "mp_pipeline all ranks the same one. Use single"),
        (
            ["--algorithm", "mp_pipeline", "--against", "fully_shard"],
            "is for --algorithm fsdp, not mp_pipeline. Use single",
        ),
    ],
)
def test_it_is_no_match_for_another_algorithm(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--local", "2", *arguments, overrides=GPT) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert out == ""


@pytest.mark.parametrize(
    ("override", "world_size", "message"),
    [
        ("training.micro_batches=4", 1, "needs a second rank"),
        ("training.precision=bf16", 2, "has fp32 and fp64"),
        ("training.micro_batches=3", 2, r"batch_size 8 is not 3 micro-batches of one size"),
        ("training.micro_batches=2", 3, r"torch's 1F1B wants as many as there are ranks, 3, or more"),
        ("cluster.staleness_bound=1", 2, "Set cluster.staleness_bound to 0"),
    ],
)
def test_what_torchs_pipeline_has_not_is_refused(override: str, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_offered(config(override), world_size)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "world_size"), [("gpipe", 2), ("1f1b", 2), ("1f1b", 3), ("interleaved", 2)])
def test_both_sides_train_the_same(schedule: str, world_size: int) -> None:
    options = Options("torch_pipelining", pairs=2, steps=2)
    losses = measure_training(config(f"training.schedule={schedule}"), world_size, options).losses
    # fp32, 12 updates: measured equal. A tied head whose parts are not added, or one stage's norm only, is 1e-2 away.
    assert losses["ours"] == pytest.approx(losses["against"], abs=1e-4)


@pytest.mark.slow
def test_both_sides_train_a_llama_with_a_tied_head_the_same(tmp_path: Path) -> None:
    """Its exit calls the shared matrix lm_head.weight, its entry model.embed_tokens.weight."""
    folder = make_hf_folder(tmp_path, "llama", num_hidden_layers=4, vocab_size=256)
    options = Options("torch_pipelining", pairs=2, steps=2)
    losses = measure_training(
        config("model.type=hf", f"model.hf_model_name={folder}", "model.max_seq_len=12"), 2, options
    ).losses
    assert losses["ours"] == pytest.approx(losses["against"], abs=1e-4)


@pytest.mark.slow
def test_a_rank_with_nothing_to_train_is_refused() -> None:
    """Three ranks, and a model whose entry and exit are empty: two of three layers have parameters."""
    three = config("model.type=simple_nn", "data.dataset=digits", "training.batch_size=12")
    with pytest.raises(ConfigError, match=r"rank \d of 3 gets no parameters to train"):
        measure_training(three, 3, Options("torch_pipelining", pairs=2, steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("whole_batch", [False, True])
def test_one_process_trains_the_same(whole_batch: bool) -> None:
    options = Options("single", pairs=2, steps=2, whole_batch=whole_batch)
    losses = measure_training(config(), 2, options).losses
    assert losses["ours"] == pytest.approx(losses["against"], abs=1e-4)


@pytest.mark.slow
def test_the_command_prints_the_keys_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--algorithm", "mp_pipeline", "--local", "2", "--against", "torch_pipelining", "--json"]
    assert run(*arguments, "--pairs", "2", "--steps", "1", overrides=GPT) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert {"tokens_per_s", "against_tokens_per_s", "ratio", "ratio_interval"} <= result.keys()
    assert "exposed_s" not in result
    assert result["micro_batches"] == 4
