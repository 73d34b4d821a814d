from pathlib import Path

import pytest
import torch

from smolcluster.config.schema import ModelConfig
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models.build import build_model, restore_model
from smolcluster.models.gpt import GPT, GPTConfig
from smolcluster.models.simple_nn import SimpleNN
from smolcluster.models.weights import weights_sha256


def test_simple_nn_takes_its_sizes_and_seed() -> None:
    model = build_model(ModelConfig(type="simple_nn", input_dim=64, hidden=7, out=10), seed=3, num_classes=10)
    assert isinstance(model, SimpleNN)
    assert torch.equal(model.hidden.weight, SimpleNN(64, 7, 10, seed=3).hidden.weight)


def test_gpt_takes_its_sizes_seed_and_the_tokenizers_vocabulary() -> None:
    section = ModelConfig(type="gpt", model_dim=8, num_layers=1, num_heads=2, ff_dim=12, dropout=0.25, max_seq_len=6)
    model = build_model(section, seed=3, vocab_size=256)
    assert isinstance(model, GPT)
    expected = GPTConfig(vocab_size=256, model_dim=8, num_layers=1, num_heads=2, ff_dim=12, dropout=0.25, max_seq_len=6)
    assert model.config == expected
    assert torch.equal(model.token_embedding.weight, GPT(expected, seed=3).token_embedding.weight)


def test_a_larger_vocabulary_than_the_tokenizers_is_kept_and_a_smaller_one_refused() -> None:
    model = build_model(ModelConfig(type="gpt", num_layers=1, vocab_size=300), seed=0, vocab_size=256)
    assert isinstance(model, GPT)
    assert model.config.vocab_size == 300
    with pytest.raises(ConfigError, match=r"model.vocab_size is 100, but the tokenizer has 256"):
        build_model(ModelConfig(type="gpt", vocab_size=100), seed=0, vocab_size=256)
    with pytest.raises(ConfigError, match=r"model.vocab_size is not set"):
        build_model(ModelConfig(type="gpt"), seed=0)


def test_fewer_outputs_than_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.out is 2, but the dataset has 10 classes"):
        build_model(ModelConfig(type="simple_nn", out=2), seed=0, num_classes=10)


def test_a_published_model_needs_a_name() -> None:
    for section in (ModelConfig(type="gpt", init="pretrained"), ModelConfig(type="hf")):
        with pytest.raises(ConfigError, match=r"model\.hf_model_name is not set"):
            build_model(section, seed=0, vocab_size=256)


def test_weights_of_another_model_are_refused_by_where_they_come_from() -> None:
    with pytest.raises(CheckpointError, match=r"the weights in runs.7 are not those of its configuration") as caught:
        restore_model(ModelConfig(), SimpleNN(3, 4, 5).state_dict(), origin=Path("runs", "7"))
    assert "\n" not in str(caught.value)


def test_weights_come_back_in_their_own_precision() -> None:
    trained = SimpleNN(seed=3).double()
    restored = restore_model(ModelConfig(), trained.state_dict(), origin=Path("run"))
    assert weights_sha256(restored) == weights_sha256(trained)
