"""The schema: documentation of every key, automatic values, what follows from other keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from smolcluster.config.explain import describe, section_at, type_at
from smolcluster.config.schema import (
    MODEL_KEYS,
    Config,
    DataConfig,
    ModelConfig,
    Section,
    TrainingConfig,
    resolved_batch_size,
    resolved_epochs,
    resolved_staleness_bound,
    total_steps,
)

# CONTRACT section 2, the table of canonical keys.
CANONICAL = {
    "": "algorithm backend",
    "model": "type args input_dim hidden out model_dim num_layers num_heads ff_dim dropout max_seq_len hf_model_name "
    "num_experts top_k capacity_factor aux_loss_weight z_loss_weight router_noise init",
    "training": "batch_size epochs max_steps optimizer learning_rate weight_decay grad_clip_norm micro_batches "
    "schedule precision device activation_checkpointing eval_steps track_gradients polyak_alpha",
    "lr_schedule": "kind warmup_iters min_lr",
    "data": "dataset path train_split tokenizer streaming",
    "checkpoint": "steps keep save_optimizer",
    "logging": "project_name wandb log_interval",
    "cluster": "staleness_bound fsdp_stage timeout worker_update_interval use_quantization buffer_size "
    "track_network_metrics metrics_log_interval seed num_workers server workers port host_ip allToAllTopology "
    "num_nodes num_layers model_name web_interface compression bucket_bytes patience min_ranks shares "
    "layer_distribution tls shared_memory interface ssh",
    "serving": "hf_model_name weights_model_name num_nodes num_layers max_new_tokens ctx_length "
    "active_decoding_strategy decoding_strategies timeout max_concurrent max_queue resume_s sessions_file controller",
}


def all_sections(section: type[BaseModel] = Config) -> Iterator[type[BaseModel]]:
    yield section
    for child in Section.__subclasses__():
        if section is Config and child is not Config:
            yield child


def config(**sections: dict[str, object]) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize("section", CANONICAL)
def test_every_canonical_key_is_accepted(section: str) -> None:
    model = section_at((section,)) if section else Config
    assert model is not None
    assert set(CANONICAL[section].split()) <= set(model.model_fields)


@pytest.mark.parametrize("section", list(all_sections()), ids=lambda section: section.__name__)
def test_every_key_is_documented(section: type[BaseModel]) -> None:
    undocumented = [name for name, field in section.model_fields.items() if not field.description]
    assert undocumented == []


def test_every_type_can_be_described_in_words() -> None:
    for name in Config.model_fields:
        section = section_at((name,))
        for key in section.model_fields if section else ():
            assert "any value" not in describe(type_at((name, key))) or key == "args", f"{name}.{key}"


def test_the_keys_that_a_model_uses_exist() -> None:
    assert frozenset().union(*MODEL_KEYS.values()) <= set(ModelConfig.model_fields)


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().training.batch_size = 3  # type: ignore[misc]


def test_bucket_bytes_default_is_four_mebibytes_and_patience_five_seconds() -> None:
    assert (Config().cluster.bucket_bytes, Config().cluster.patience) == (4 * 2**20, 5.0)


@pytest.mark.parametrize(("tokens", "batch_size"), [(64, 32), (128, 32), (129, 16), (256, 16), (512, 8), (8192, 1)])
def test_the_automatic_batch_size_follows_the_tokens(tokens: int, batch_size: int) -> None:
    assert resolved_batch_size(config(model={"type": "gpt", "max_seq_len": tokens})) == batch_size


def test_the_automatic_batch_size_of_images_ignores_max_seq_len() -> None:
    assert resolved_batch_size(config(model={"max_seq_len": 4096})) == 32


def test_a_given_batch_size_and_number_of_epochs_are_kept() -> None:
    given = config(training={"batch_size": 7, "epochs": 2})
    assert (resolved_batch_size(given), resolved_epochs(given)) == (7, 2)


@pytest.mark.parametrize(("dataset", "epochs"), [("wikitext2", 30), ("snli", 20), ("pydoc", 3)])
def test_the_automatic_epochs_follow_the_dataset(dataset: str, epochs: int) -> None:
    assert resolved_epochs(config(model={"type": "gpt"}, data={"dataset": dataset})) == epochs


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(None, None, 30), (2, None, 20), (None, 500, 500), (2, 500, 20), (2, 5, 5)]
)
def test_total_steps_come_from_epochs_and_max_steps(epochs: int | None, max_steps: int | None, steps: int) -> None:
    assert total_steps(config(training={"epochs": epochs, "max_steps": max_steps}), steps_per_epoch=10) == steps


def test_staleness_unset_is_zero_and_unbounded_for_edp() -> None:
    assert resolved_staleness_bound(Config()) == 0
    assert resolved_staleness_bound(Config(algorithm="edp")) is None
    assert resolved_staleness_bound(config(cluster={"staleness_bound": 5})) == 5


def test_a_language_model_is_trained_on_text_unless_told_otherwise() -> None:
    assert Config().data.dataset == "mnist"
    assert config(model={"type": "gpt"}).data.dataset == "wikitext2"
    assert Config(model=ModelConfig(type="gpt"), data=DataConfig(tokenizer="x")).data.dataset == "wikitext2"
    assert config(model={"type": "gpt"}, data={"dataset": "pydoc"}).data.dataset == "pydoc"


@pytest.mark.parametrize(
    ("cluster", "compression"),
    [
        ({}, "none"),
        ({"use_quantization": True}, "int8"),
        ({"use_quantization": False}, "none"),
        ({"use_quantization": False, "compression": "fp16"}, "fp16"),
        ({"use_quantization": True, "compression": "int8"}, "int8"),
    ],
)
def test_use_quantization_means_int8(cluster: dict[str, object], compression: str) -> None:
    assert config(cluster=cluster).cluster.compression == compression


def test_contradictions_are_refused_from_python_too() -> None:
    with pytest.raises(ValidationError, match=r"lr_schedule.min_lr: 0.1 is more than training.learning_rate 0.01"):
        config(training={"learning_rate": 0.01}, lr_schedule={"min_lr": 0.1})


def test_numbers_given_as_text_or_whole_floats_are_numbers() -> None:
    training = TrainingConfig.model_validate({"learning_rate": "6e-4", "batch_size": 32.0})
    assert (training.learning_rate, training.batch_size) == (6e-4, 32)
    assert isinstance(training.batch_size, int)


@pytest.mark.parametrize("name", ["my_package.models:Net", "net:Net"])
def test_a_class_of_the_user_is_a_model_type(name: str) -> None:
    assert ModelConfig(type=name, args={"width": [1, 2]}).type == name


@pytest.mark.parametrize("address", ["10.0.0.1", "::1", "fe80::1", "localhost", "mini1.local"])
def test_addresses_and_names_are_accepted(address: str) -> None:
    assert config(cluster={"host_ip": {"a": address}}).cluster.host_ip == {"a": address}


@pytest.mark.parametrize("address", ["10.0.0", "1:2:3", "a b", "-o", "", "a;b"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValidationError):
        config(cluster={"host_ip": {"a": address}})


@pytest.mark.parametrize(
    ("files", "tokenizer"),
    [([], "bytes"), (["config.json"], "bytes"), (["tokenizer.json"], "own"), (["vocab.json"], "own")],
)
def test_a_local_model_brings_its_tokenizer_where_the_files_are_there(
    tmp_path: Path, files: list[str], tokenizer: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    for model in ({"type": "hf"}, {"type": "gpt", "init": "pretrained"}):
        found = config(model={**model, "hf_model_name": str(tmp_path)})
        assert found.data.tokenizer == (str(tmp_path) if tokenizer == "own" else "bytes")


def test_a_model_by_id_brings_its_tokenizer_unless_another_is_given() -> None:
    model = {"type": "hf", "hf_model_name": "somebody/model"}
    assert config(model=model).data.tokenizer == "somebody/model"
    assert config(model=model, data={"tokenizer": "bytes"}).data.tokenizer == "bytes"
    assert config(model={"type": "gpt", "hf_model_name": "somebody/model"}).data.tokenizer == "bytes"


@pytest.mark.parametrize("dataset", ["mnist", "wikitext2", "somebody/data"])
def test_a_model_of_the_users_reads_any_data(dataset: str) -> None:
    assert config(model={"type": "my:Net"}, data={"dataset": dataset}).data.dataset == dataset


@pytest.mark.parametrize("buffer_size", [8, {"mini1": 8, "pi4": 2}, None])
def test_buffers_are_one_number_or_one_for_each_host(buffer_size: object) -> None:
    assert config(cluster={"buffer_size": buffer_size}).cluster.buffer_size == buffer_size
