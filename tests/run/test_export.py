"""`smolcluster export`: what transformers loads is what was trained, and a folder appears whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from models.hf_folders import FAMILIES, TIME, make_hf_folder, transformers
from run.saved_runs import save_model
from smolcluster import cli
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.errors import ConfigError
from smolcluster.models.build import build_model
from smolcluster.models.gpt import GPT
from smolcluster.models.weights import weights_sha256
from smolcluster.monitoring.reporters import make_reporter
from smolcluster.run import export as export_module
from smolcluster.run.export import export_model
from smolcluster.run.local import run_local

SIZES = ["model_dim=16", "num_layers=2", "num_heads=2", "ff_dim=24", f"max_seq_len={TIME}"]
TOKENS = torch.randint(256, (3, TIME), generator=torch.Generator().manual_seed(1))


def config(*overrides: str, algorithm: str = "classicdp") -> Config:
    text = ["data.dataset=pydoc"] if not any(text.startswith("data.dataset=") for text in overrides) else []
    return load_config(None, overrides=[*text, *overrides], flags={"algorithm": algorithm}, environ={}).config


def gpt_config() -> Config:
    return config("model.type=gpt", *(f"model.{size}" for size in SIZES))


def hf_config(folder: Path, init: str = "random") -> Config:
    name = ["model.type=hf", f"model.hf_model_name={folder}", f"model.init={init}", f"model.max_seq_len={TIME}"]
    return config(*name, "data.tokenizer=bytes")


def as_trained(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Off its initial values, where every bias is 0."""
    generator = torch.Generator().manual_seed(3)
    model.to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator).to(param) * 0.2)
    return model


def a_run(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> tuple[Path, nn.Module]:
    """A run folder with one checkpoint, and the model in it."""
    model = as_trained(build_model(config.model, seed=1, vocab_size=256), dtype)
    save_model(folder / "checkpoints", model, config, step=7)
    return folder, model


def run(*arguments: object) -> int:
    return cli._run([str(argument) for argument in arguments], "smolcluster")


def test_a_gpt_becomes_a_gpt2_with_the_same_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, model = a_run(tmp_path / "run", gpt_config())
    out = tmp_path / "new" / "exported"
    assert run("export", source, out) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        f"gpt after 7 steps, weights_sha256 {weights_sha256(model)}",
        f"written to {out}: config.json, model.safetensors, tokenizer.json, tokenizer_config.json",
    ]
    theirs = transformers().AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model.eval()(TOKENS), rtol=0, atol=1e-5)
    assert weights_sha256(theirs) == weights_sha256(model)
    tokenizer = transformers().AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("naïve") == list("naïve".encode())
    assert [item.name for item in out.parent.iterdir()] == ["exported"]


def test_run_checkpoints_and_checkpoint_name_the_same(tmp_path: Path) -> None:
    source, _ = a_run(tmp_path / "run", gpt_config())
    sources = (source, source / "checkpoints", source / "checkpoints" / "step_00000007")
    exported = [export_model(item, tmp_path / str(number)) for number, item in enumerate(sources)]
    assert len({done.weights_sha256 for done in exported}) == 1
    assert {done.step for done in exported} == {7}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_is_exported_and_loaded_back(family: str, tmp_path: Path) -> None:
    published = make_hf_folder(tmp_path / "published", family, vocab_size=256)
    source, model = a_run(tmp_path / "run", hf_config(published))
    done = export_model(source, tmp_path / "out")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(done.files)
    theirs = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model.eval()(TOKENS), rtol=0, atol=1e-5)
    back = build_model(hf_config(tmp_path / "out", "pretrained").model, seed=0, vocab_size=256)
    assert weights_sha256(back) == weights_sha256(model) == done.weights_sha256
    assert list(back.state_dict()) == list(model.state_dict())


def test_an_exported_gpt_goes_on_as_gpt_and_as_hf(tmp_path: Path) -> None:
    source, model = a_run(tmp_path / "run", gpt_config())
    export_model(source, tmp_path / "out")
    name = ["model.init=pretrained", f"model.hf_model_name={tmp_path / 'out'}", f"model.max_seq_len={TIME}"]
    as_gpt = build_model(config("model.type=gpt", *name).model, seed=0, vocab_size=256)
    assert isinstance(as_gpt, GPT)
    assert weights_sha256(as_gpt) == weights_sha256(model)
    again, _ = a_run(tmp_path / "again", config("model.type=gpt", *name))
    assert export_model(again, tmp_path / "out2").files == ["config.json", "model.safetensors", *_TOKENIZER]
    as_hf = build_model(hf_config(tmp_path / "out", "pretrained").model, seed=0, vocab_size=256)
    assert weights_sha256(as_hf) == weights_sha256(model)


_TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]


def test_float64_keeps_every_bit(tmp_path: Path) -> None:
    published = make_hf_folder(tmp_path / "published", "llama", vocab_size=256)
    for name, run_config in (("gpt", gpt_config()), ("hf", hf_config(published))):
        source, model = a_run(tmp_path / name, run_config, torch.float64)
        done = export_model(source, tmp_path / f"{name}-out")
        theirs = transformers().AutoModelForCausalLM.from_pretrained(done.folder, dtype="auto")
        assert weights_sha256(theirs) == weights_sha256(model) == done.weights_sha256


def test_a_gpt_needs_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = a_run(tmp_path / "run", gpt_config())
    for library in ("transformers", "tokenizers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, library, None)
    assert export_model(source, tmp_path / "out").files == ["config.json", "model.safetensors", *_TOKENIZER]


# --- models of the user


USER_MODEL = """
from pathlib import Path

from torch import nn

class Plain(nn.Module):
    def __init__(self, vocab_size, num_classes=None):
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(vocab_size, 4)

    def forward(self, tokens):
        return self.embedding(tokens) @ self.embedding.weight.t()

class Saved(Plain):
    def save_pretrained(self, folder):
        Path(folder, "mine.txt").write_text(f"{self.embedding.weight.sum().item()}")

class Failing(Plain):
    def save_pretrained(self, folder):
        raise KeyError("what")
"""


@pytest.fixture
def user_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "exported_user_models.py").write_text(USER_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "exported_user_models", raising=False)
    return "exported_user_models"


def test_a_users_model_is_exported_if_it_knows_how(user_models: str, tmp_path: Path) -> None:
    source, model = a_run(tmp_path / "run", config(f"model.type={user_models}:Saved"))
    assert export_model(source, tmp_path / "out").files == ["mine.txt", *_TOKENIZER]
    assert float((tmp_path / "out" / "mine.txt").read_text()) == model.embedding.weight.sum().item()


@pytest.mark.slow
def test_a_rank_in_its_own_process_finds_the_users_model_and_its_run_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Found in the working directory alone: nothing of it is on this process's path.
    (tmp_path / "exported_user_models_2.py").write_text(USER_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    small = ["model.max_seq_len=8", "training.max_steps=1", "training.eval_steps=null", "training.batch_size=2"]
    run_config = config("model.type=exported_user_models_2:Saved", *small)
    ran = run_local(run_config, 1, tmp_path / "run", make_reporter(True, 10, "tokens"))
    assert (ran.exit_code, ran.error) == (0, None)
    assert ran.summary is not None
    done = export_model(tmp_path / "run", tmp_path / "out")
    assert done.weights_sha256 == ran.summary["weights_sha256"]
    del sys.modules["exported_user_models_2"]


def test_other_models_have_no_such_form(user_models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "simple_nn": config("model.type=simple_nn", "data.dataset=digits"),
        f"{user_models}:Plain": config(f"model.type={user_models}:Plain"),
    }
    for number, (kind, run_config) in enumerate(cases.items()):
        source, _ = a_run(tmp_path / str(number), run_config)
        assert run("export", source, tmp_path / "out") == 2
        assert f"model.type {kind} has no Hugging Face form" in capsys.readouterr().err
    source, _ = a_run(tmp_path / "failing", config(f"model.type={user_models}:Failing"))
    assert run("export", source, tmp_path / "out") == 2
    assert "save_pretrained of model.type" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


# --- what is refused, with exit code 2 and one line


def damage(folder: Path) -> None:
    file = folder / "checkpoints" / "step_00000007" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def remove_weights(folder: Path) -> None:
    (folder / "checkpoints" / "step_00000007" / "weights.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [(damage, "weights.safetensors"), (remove_weights, "weights.safetensors"), (lambda folder: None, None)],
)
def test_a_damaged_checkpoint_is_named(
    harm: Callable[[Path], None], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = a_run(tmp_path / "run", gpt_config())
    harm(source)
    code = run("export", source / "checkpoints" / "step_00000007", tmp_path / "out")
    err = capsys.readouterr().err
    assert code == (0 if message is None else 2)
    if message is not None:
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_newer_checkpoint_that_is_damaged_is_passed_over_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = a_run(tmp_path / "run", gpt_config())
    newer = save_model(source / "checkpoints", model, gpt_config(), step=9)
    (newer / "weights.safetensors").unlink()
    assert run("export", source, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "gpt after 7 steps" in out
    assert err.startswith("skipped: ")
    assert str(newer / "weights.safetensors") in err


def test_a_wrong_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for source in ("nowhere", "empty", "file"):
        assert run("export", tmp_path / source, tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert str(tmp_path / source) in err
        assert err.count("\n") == 1


def test_a_missing_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = make_hf_folder(tmp_path / "published", "llama", vocab_size=256)
    source, _ = a_run(tmp_path / "run", hf_config(published))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("export", source, tmp_path / "out") == 2
    assert 'pip install "smolcluster[hf]"' in capsys.readouterr().err


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = a_run(tmp_path / "run", gpt_config())
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for target in (taken, taken / "notes.txt", source):
        assert run("export", source, target) == 2
        assert "is not empty" in capsys.readouterr().err
    assert [item.name for item in taken.iterdir()] == ["notes.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("export", source, empty) == 0
    assert (empty / "model.safetensors").is_file()


@pytest.mark.parametrize("moment", ["tokenizer", "sync", "rename"])
def test_a_failure_at_any_moment_leaves_nothing(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = a_run(tmp_path / "run", gpt_config())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if moment == "tokenizer":
        monkeypatch.setattr("smolcluster.data.tokenizer.ByteTokenizer.save", full)
    else:
        monkeypatch.setattr(export_module, {"sync": "sync_file", "rename": "rename"}[moment], full)
    with pytest.raises(ConfigError, match=r"out cannot be written \(No space left on device\)"):
        export_model(source, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = a_run(tmp_path / "run", gpt_config())
    synced: list[str] = []
    monkeypatch.setattr(export_module, "sync_file", lambda file: synced.append(file.name))

    def rename(old: Path, new: Path) -> None:
        assert sorted(synced) == ["config.json", "model.safetensors", *_TOKENIZER]
        os.replace(old, new)

    monkeypatch.setattr(export_module, "rename", rename)
    export_model(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
