"""Text from a checkpoint: the same for the same seed, counted honestly, refused where there is none to write."""

from pathlib import Path

import pytest

from models.hf_folders import make_hf_folder
from run.saved_runs import save_model
from smolcluster.checkpoint.store import save_checkpoint
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models.build import build_model
from smolcluster.run.generate import generate_text

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "text.txt").write_text(TEXT)
    small = ["model.model_dim=16", "model.num_layers=1", "model.num_heads=2", "model.ff_dim=32", "model.max_seq_len=16"]
    data = ["data.dataset=text", f"data.path={tmp_path / 'text.txt'}"]
    return load_config("single_gpt", overrides=[*small, *data]).config


def save(config: Config, folder: Path) -> Path:
    model = build_model(config.model, seed=1, vocab_size=256, num_classes=10)
    return save_model(folder, model, config)


def test_the_same_seed_writes_the_same_text_and_another_one_does_not(config: Config, tmp_path: Path) -> None:
    path = save(config, tmp_path / "checkpoints")
    first = generate_text(path, "the ", 40, seed=1)
    assert first == generate_text(tmp_path / "checkpoints", "the ", 40, seed=1)
    assert first != generate_text(path, "the ", 40, seed=2)
    assert first.text.startswith("the ")
    assert len(first.text) > 4


def test_words_are_counted_against_the_training_text(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smolcluster.data.tokenizer import ByteTokenizer

    path = save(config, tmp_path / "checkpoints")
    written = "fox The quick cat, dogs at noon"
    monkeypatch.setattr(ByteTokenizer, "decode", _decoding(written))
    counted = generate_text(path, "fox ", 4)
    # "The quick cat, dogs at noon": the prompt's fox is not the model's, "at" is too short
    assert (counted.words, counted.known_words) == (5, 2)


def _decoding(written: str) -> object:
    texts = [written, TEXT]
    return lambda self, tokens: texts.pop(0)


def test_what_cannot_write_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        generate_text(tmp_path / "nothing", "the ", 4)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate_text(save(config, tmp_path / "gpt"), "", 4)
    classifier = load_config("classicdp_digits").config
    with pytest.raises(ConfigError, match="simple_nn writes no text"):
        generate_text(save(classifier, tmp_path / "classifier"), "the ", 4)
    foreign = save_checkpoint(tmp_path / "foreign", 1, {}, {})
    with pytest.raises(CheckpointError, match="does not say how its model is built"):
        generate_text(foreign, "the ", 4)
    mixed = save_checkpoint(tmp_path / "mixed", 1, {}, {"config": config.model_dump(mode="json")})
    with pytest.raises(CheckpointError, match="are not those of its configuration"):
        generate_text(mixed, "the ", 4)


def test_a_model_of_transformers_writes_with_its_tokenizer(config: Config, tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "llama", "llama", vocab_size=256)
    model = config.model.model_copy(update={"type": "hf", "hf_model_name": str(folder), "max_seq_len": 12})
    path = save(config.model_copy(update={"model": model}), tmp_path / "checkpoints")
    written = generate_text(path, "the ", 20, seed=1)
    assert written.text.startswith("the ")
    assert len(written.text.encode()) >= 24
    assert written == generate_text(path, "the ", 20, seed=1)
