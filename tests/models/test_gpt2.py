"""GPT-2 folders of Hugging Face in our GPT and back: the same logits, and refused where they could not be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.hf_folders import TIME, VOCAB, make_hf_folder, transformers
from smolcluster.config.schema import ModelConfig
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models.build import build_model, restore_model
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.gpt2 import gpt2_config, load_gpt2, save_gpt2
from smolcluster.models.weights import exported_tensors, weights_sha256

TOKENS = torch.randint(VOCAB, (3, TIME), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("gpt2"), "gpt2")


def section(folder: Path, **changes: object) -> ModelConfig:
    values = {"type": "gpt", "init": "pretrained", "hf_model_name": str(folder), "max_seq_len": TIME, "dropout": 0.0}
    return ModelConfig(**{**values, **changes})


def with_config(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    content = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**content, **changes}))
    return target


def test_a_published_gpt2_gives_the_same_logits_here(published: Path) -> None:
    ours = build_model(section(published), seed=0, vocab_size=VOCAB)
    assert isinstance(ours, GPT)
    theirs = transformers().AutoModelForCausalLM.from_pretrained(published)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-5)
        # The float32 bound could hide another epsilon; this one could not.
        torch.testing.assert_close(ours.double()(TOKENS), theirs.double()(TOKENS).logits, rtol=0, atol=1e-12)
    assert exported_tensors(ours).keys() == theirs.state_dict().keys()
    assert weights_sha256(ours) == weights_sha256(theirs)


def test_sizes_are_the_folders_and_dropout_is_the_runs(published: Path) -> None:
    ours = build_model(section(published, dropout=0.25, model_dim=64, num_layers=9, max_seq_len=5), seed=0)
    assert isinstance(ours, GPT)
    # All positions are kept, though the run's samples are shorter: the export is whole again.
    assert ours.config == GPTConfig(VOCAB, 12, 2, 3, 20, 0.25, TIME)
    assert gpt2_config(published) == GPTConfig(VOCAB, 12, 2, 3, 20, 0.0, TIME)


def test_the_feed_forward_width_is_four_times_the_models_where_the_folder_is_silent(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "gpt2", n_inner=None)
    assert load_gpt2(tmp_path).config.ff_dim == 48


def test_files_with_the_published_names_load_too(published: Path, tmp_path: Path) -> None:
    folder = with_config(published, tmp_path / "old")
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, TIME, TIME).tril() for layer in range(2)}
    tensors |= {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, folder / "model.safetensors")
    assert weights_sha256(load_gpt2(folder)) == weights_sha256(load_gpt2(published))


def test_what_we_write_is_a_gpt2_for_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(GPTConfig(VOCAB, 12, 2, 3, 20, 0.1, TIME), seed=3)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.2)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "transformers", None)  # nor is it needed
        save_gpt2(model, tmp_path, eos_id=7)
        assert weights_sha256(load_gpt2(tmp_path)) == weights_sha256(model)
    theirs, report = transformers().AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert not any(report.values())
    assert (theirs.config.eos_token_id, theirs.config.attn_pdrop) == (7, 0.1)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(TOKENS).logits, model.eval()(TOKENS), rtol=0, atol=1e-5)
    assert weights_sha256(theirs) == weights_sha256(model)


def test_float64_is_written_as_it_is(tmp_path: Path) -> None:
    model = GPT(GPTConfig(VOCAB, 12, 1, 3, 20, 0.0, TIME)).double()
    save_gpt2(model, tmp_path)
    theirs = transformers().AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert theirs.dtype == torch.float64
    assert weights_sha256(theirs) == weights_sha256(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("tie_word_embeddings", False),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("model_type", "gpt_neo"),
    ],
)
def test_variants_that_compute_something_else_are_refused(
    published: Path, tmp_path: Path, key: str, value: object
) -> None:
    folder = with_config(published, tmp_path / "variant", **{key: value})
    with pytest.raises(ConfigError, match=rf"config\.json has {key} {value}.*Set model.type=hf"):
        build_model(section(folder), seed=0)


def test_a_head_of_its_own_is_refused(published: Path, tmp_path: Path) -> None:
    folder = with_config(published, tmp_path / "untied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not tied"):
        build_model(section(folder), seed=0)


def test_sizes_that_do_not_fit_are_errors_that_name_the_key(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model\.max_seq_len is 13, but .* has {TIME} positions"):
        build_model(section(published, max_seq_len=13), seed=0)
    with pytest.raises(ConfigError, match=rf"the tokenizer has 256 ids, but .* has {VOCAB}"):
        build_model(section(published), seed=0, vocab_size=256)
    folder = with_config(published, tmp_path / "silent", n_head=None, n_layer=None)
    with pytest.raises(ConfigError, match="does not say the model's num_heads, num_layers"):
        build_model(section(folder), seed=0)


def test_a_run_that_began_with_published_weights_is_restored_without_them(published: Path, tmp_path: Path) -> None:
    trained = load_gpt2(published)
    with torch.no_grad():
        trained.norm.bias.add_(1)
    only_config = tmp_path / "only_config"
    only_config.mkdir()
    shutil.copy(published / "config.json", only_config)
    restored = restore_model(section(only_config), trained.state_dict(), origin=Path("run"))
    assert weights_sha256(restored) == weights_sha256(trained)
