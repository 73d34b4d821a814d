"""Older spellings: what they become, where they say they came from, and what is said about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolcluster.config.load import Resolved, check_file, load_config, model_keys
from smolcluster.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that messages name files without their folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, name: str = "run.yaml", **more: object) -> Resolved:
    Path(name).write_text(text, encoding="utf-8")
    return load_config(files=[name], **{"environ": {}, **more})  # type: ignore[arg-type]


def error_of(text: str, name: str = "run.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, name)
    return str(caught.value)


def warnings_of(text: str, name: str = "run.yaml") -> list[str]:
    Path(name).write_text(text, encoding="utf-8")
    report = check_file(name)
    assert report.errors == ()
    return [warning.removeprefix(f"{name}:") for warning in report.warnings]


# --- flat model files


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("batch_size: 7", "training.batch_size", 7),
        ("learning_rate: 5e-4", "training.learning_rate", 5e-4),
        ("num_epochs: 2", "training.epochs", 2),
        ("eval_steps: 9", "training.eval_steps", 9),
        ("track_gradients: true", "training.track_gradients", True),
        ("polyak_alpha: 0.25", "training.polyak_alpha", 0.25),
        ("gradient_clipping: {enabled: true, max_norm: 2.5}", "training.grad_clip_norm", 2.5),
        ("gradient_clipping: {max_norm: 2.5}", "training.grad_clip_norm", 2.5),
        ("gradient_clipping: {enabled: false, max_norm: 2.5}", "training.grad_clip_norm", None),
        ("gradient_clipping: {enabled: off}", "training.grad_clip_norm", None),
        ("gradient_clipping: {enabled: on}", "training.grad_clip_norm", 1.0),
        ("dataset: {name: digits}", "data.dataset", "digits"),
        ("dataset: digits", "data.dataset", "digits"),
        ("model: simple_nn", "model.type", "simple_nn"),
    ],
)
def test_a_flat_key_is_read_into_its_section_and_keeps_its_line(text: str, key: str, value: object) -> None:
    resolved = load(f"\n{text}\n")
    section, name = key.split(".")
    assert getattr(getattr(resolved.config, section), name) == value
    assert resolved.sources[key] == "run.yaml:2"
    assert resolved.warnings == ()


def test_flat_keys_that_say_nothing_leave_the_preset_alone() -> None:
    config = load("gradient_clipping:\ndataset:\nmodel:\n", preset="demo").config
    assert config == load_config("demo", environ={}).config


def test_clipping_that_is_switched_on_without_a_norm_replaces_a_null_below_it() -> None:
    Path("first.yaml").write_text("training: {grad_clip_norm: null}\n", encoding="utf-8")
    Path("second.yaml").write_text("gradient_clipping: {enabled: true}\n", encoding="utf-8")
    assert load_config(files=["first.yaml", "second.yaml"], environ={}).config.training.grad_clip_norm == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_epochs: x\n", "1: num_epochs: got 'x', expected a whole number of at least 1, or null"),
        (
            "gradient_clipping:\n  max_norm: -1\n",
            "2: gradient_clipping.max_norm: got -1, expected a number above 0, or null",
        ),
        (
            "gradient_clipping:\n  maxnorm: 1\n",
            "2: unknown key gradient_clipping.maxnorm; nearest: gradient_clipping.max_norm",
        ),
        ("gradient_clipping: 3\n", "1: gradient_clipping: got 3, expected the keys enabled and max_norm"),
        (
            "gradient_clipping: {enabled: 3}\n",
            "1: gradient_clipping.enabled: got 3, expected true or false",
        ),
        ("dataset:\n  nam: x\n", "2: unknown key dataset.nam; nearest: dataset.name"),
        ("dataset: [a]\n", "1: dataset: got ['a'], expected text (in quotes)"),
        (
            "num_epochs: 1\ntraining:\n  epochs: 2\n",
            "1: num_epochs is given here and as training.epochs as well; keep one of them",
        ),
        (
            "training:\n  micro_batches: 8\nbatch_size: 4\n",
            "2: training.micro_batches: 8 parts of a batch of 4; lower it or raise training.batch_size",
        ),
        ("learning_rate: 1e-4\nlr_schedule:\n  min_lr: 1e-3\n", "3: lr_schedule.min_lr: 0.001 is more than "),
        ("dataset:\n  name: text\n", "2: dataset.name: text needs data.path (a file or folder)"),
        (
            "causal_gpt2:\n  hf_model_name: x\n  max_new_token: 3\n",
            "3: unknown key causal_gpt2.max_new_token; nearest: causal_gpt2.max_new_tokens",
        ),
        (
            "causal_gpt2:\n  hf_model_name: x\n  decoding_strategies:\n    top_k: {k: 0}\n",
            "4: causal_gpt2.decoding_strategies.top_k.k: got 0, expected a whole number of at least 1",
        ),
        (
            "causal_gpt2:\n  hf_model_name: x\nserving:\n  max_queue: 3\n",
            "1: causal_gpt2 is read as the section serving, which this file has as well",
        ),
        ("modle:\n  hf_model_name: x\n", "1: unknown key modle; nearest: model"),
        ("training: 5\nbatch_size: 3\n", "1: training: got 5, expected a section with keys such as batch_size, "),
    ],
)
def test_a_mistake_names_the_key_as_it_was_written(text: str, message: str) -> None:
    assert error_of(text).splitlines()[0].startswith(f"run.yaml:{message}")


# --- names


@pytest.mark.parametrize(
    ("written", "kind"), [("SimpleNN", "simple_nn"), ("causal_gpt2", "gpt"), ("GPT", "gpt"), ("simplenn", "simple_nn")]
)
def test_an_older_name_of_a_model_is_read_and_said(written: str, kind: str) -> None:
    assert load(f"model: {{type: {written}}}\n").config.model.type == kind
    assert warnings_of(f"model: {{type: {written}}}\n") == [f"1: model.type: {written} is read as {kind}"]


def test_a_class_of_the_user_keeps_its_name() -> None:
    assert load("model: {type: 'GPT:SimpleNN'}\n").config.model.type == "GPT:SimpleNN"


@pytest.mark.parametrize(("written", "name"), [("MNIST", "mnist"), ("SNLI", "snli"), ("WikiText-2", "wikitext2")])
def test_a_dataset_is_found_in_any_case(written: str, name: str) -> None:
    text = f"dataset:\n  name: {written}\nmodel: my:Net\n"
    resolved = load(text)
    assert (resolved.config.data.dataset, resolved.sources["data.dataset"]) == (name, "run.yaml:2")
    assert warnings_of(text) == [f"2: dataset.name: {written} is read as {name}"]


def test_an_id_of_hugging_face_keeps_its_case() -> None:
    assert load("data: {dataset: My/Set}\nmodel: my:Net\n").config.data.dataset == "My/Set"


def test_older_names_are_read_from_overrides_and_the_environment_too() -> None:
    resolved = load_config(overrides=["model.type=SimpleNN"], environ={"SMOLCLUSTER__DATA__DATASET": "Digits"})
    assert (resolved.config.model.type, resolved.config.data.dataset) == ("simple_nn", "digits")
    assert resolved.sources["model.type"] == "--override"
    assert resolved.warnings == (
        "--override: model.type: SimpleNN is read as simple_nn",
        "environment SMOLCLUSTER__DATA__DATASET: data.dataset: Digits is read as digits",
    )


def test_a_model_with_model_dim_and_no_type_is_gpt() -> None:
    text = "model:\n  num_layers: 2\n  model_dim: 64\n"
    resolved = load(text)
    assert (resolved.config.model.type, resolved.sources["model.type"]) == ("gpt", "run.yaml:3")
    assert resolved.config.data.dataset == "wikitext2"
    assert warnings_of(text) == ["3: model.type: not given; a model with model_dim is read as gpt"]


def test_what_a_file_implies_is_lower_than_what_any_source_says() -> None:
    Path("first.yaml").write_text("model: {type: moe}\n", encoding="utf-8")
    Path("second.yaml").write_text("model: {model_dim: 64}\n", encoding="utf-8")
    resolved = load_config(files=["first.yaml", "second.yaml"], environ={})
    assert (resolved.config.model.type, resolved.warnings) == ("moe", ())


def test_a_file_with_model_dim_means_gpt_above_a_preset_that_has_no_use_for_it() -> None:
    text = "model: {model_dim: 64}\ndata: {dataset: pydoc}\n"
    resolved = load(text, preset="classicdp_mnist")
    assert (resolved.config.algorithm, resolved.config.model.type) == ("classicdp", "gpt")
    assert resolved.sources["model.type"] == "run.yaml:1"
    assert resolved.warnings == ("run.yaml:1: model.type: not given; a model with model_dim is read as gpt",)
    resolved = load(text, preset="classicdp_mnist", overrides=["model.type=moe"])
    assert (resolved.config.model.type, resolved.warnings) == ("moe", ())


def test_a_type_that_is_given_with_model_dim_or_above_it_stays() -> None:
    assert load("model: {model_dim: 64, type: simple_nn}\n", preset="single_mnist").config.model.type == "simple_nn"
    assert load("model: {model_dim: 64}\n", overrides=["model.type=simple_nn"]).config.model.type == "simple_nn"
    own = load_config(overrides=["model.type=my:Net"], environ={}).config
    assert load("model: {model_dim: 64}\n", base=(own, "checkpoint x")).config.model.type == "my:Net"


def test_an_override_of_model_dim_alone_means_gpt_too() -> None:
    resolved = load_config(overrides=["model.model_dim=64"], environ={})
    assert (resolved.config.model.type, resolved.sources["model.type"]) == ("gpt", "--override")


def test_the_layers_of_a_cluster_file_count_for_a_gpt_that_names_none() -> None:
    text = "num_layers: 4\nmodel: {type: gpt}\n"
    assert load(text).config.model.num_layers == 4
    assert load(text, overrides=["model.num_layers=2"]).config.model.num_layers == 2
    assert load("num_layers: 4\nmodel: {type: simple_nn}\n").sources["model.num_layers"] == "default"


def test_the_model_of_a_cluster_file_counts_where_no_model_is_given() -> None:
    resolved = load("model_name: causal_gpt2\nnum_layers: 4\n")
    assert (resolved.config.model.type, resolved.config.model.num_layers) == ("gpt", 4)
    assert resolved.warnings == ("run.yaml:1: model_name: causal_gpt2 is read as model.type gpt",)


def test_a_given_model_wins_over_that_of_a_cluster_file() -> None:
    text = "model_name: causal_gpt2\nnum_layers: 4\nmodel: {type: moe, num_layers: 2}\n"
    resolved = load(text)
    assert (resolved.config.model.type, resolved.config.model.num_layers) == ("moe", 2)
    assert warnings_of(text) == [
        "1: cluster.model_name: causal_gpt2 is ignored, model.type moe counts",
        "2: cluster.num_layers: 4 is ignored, model.num_layers 2 counts",
    ]


def test_a_model_under_both_names_is_said_once() -> None:
    assert warnings_of("model_name: causal_gpt2\nmodel: {type: gpt}\n") == []


# --- names of files


@pytest.mark.parametrize("said", ["ddp", "classicdp", "fsdp", "edp", "syncps", "mp", "mp_pipeline", "ep"])
def test_a_cluster_file_is_named_after_its_algorithm(said: str) -> None:
    name = f"cluster_config_{said}.yaml"
    resolved = load("seed: 1\n", name)
    assert resolved.config.algorithm == ("classicdp" if said == "ddp" else said)
    assert resolved.sources["algorithm"] == f"name of {name}"
    expected = [f"name of {name}: ddp is read as algorithm classicdp"] if said == "ddp" else []
    assert list(resolved.warnings) == warnings_of("seed: 1\n", name) == expected


@pytest.mark.parametrize("name", ["cluster_config_inference.yaml", "cluster_config_mine.yaml", "edp.yaml"])
def test_other_names_say_no_algorithm(name: str) -> None:
    assert load("seed: 1\n", name).sources["algorithm"] == "default"


@pytest.mark.parametrize(
    "more",
    [
        {"preset": "single_gpt"},
        {"overrides": ["algorithm=single"]},
        {"environ": {"SMOLCLUSTER__ALGORITHM": "single"}},
        {"flags": {"algorithm": "single"}},
    ],
    ids=["preset", "override", "environment", "flag"],
)
def test_whatever_else_says_the_algorithm_wins_over_the_name(more: dict[str, object]) -> None:
    assert load("seed: 1\n", "cluster_config_edp.yaml", **more).config.algorithm == "single"


def test_the_file_itself_wins_over_its_name() -> None:
    assert load("algorithm: mp\n", "cluster_config_edp.yaml").sources["algorithm"] == "cluster_config_edp.yaml:1"


# --- timeout, and null


MP, EDP, INFERENCE = "cluster_config_mp.yaml", "cluster_config_edp.yaml", "cluster_config_inference.yaml"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (MP, "timeout: 30\n"),
        (INFERENCE, "timeout: 30\n"),
        ("x.yaml", "timeout: 30\nalgorithm: mp\n"),
        ("x.yaml", "timeout: 30\nweb_interface: {api_port: 80}\n"),
    ],
)
def test_the_timeout_of_files_for_mp_and_serving_is_a_requests(name: str, text: str) -> None:
    resolved = load(text, name)
    assert (resolved.config.serving.timeout, resolved.config.cluster.timeout) == (30, None)
    assert resolved.sources["serving.timeout"] == f"{name}:1"
    assert resolved.warnings == (f"{name}:1: timeout: 30 is read as serving.timeout, a request's",)


@pytest.mark.parametrize("name", [MP, INFERENCE])
def test_a_timeout_below_a_second_is_ignored_there(name: str) -> None:
    resolved = load("timeout: 0.1\n", name)
    assert (resolved.config.serving.timeout, resolved.config.cluster.timeout) == (300, None)
    assert resolved.warnings == (
        f"{name}:1: timeout: 0.1 is ignored here; serving.timeout, a request's, is at least 1 second",
    )


@pytest.mark.parametrize("name", ["cluster_config_syncps.yaml", EDP, "x.yaml"])
def test_elsewhere_the_timeout_is_that_of_stragglers(name: str) -> None:
    resolved = load("timeout: 0.1\n", name)
    assert (resolved.config.serving.timeout, resolved.config.cluster.timeout) == (300, 0.1)
    assert resolved.warnings == ()


def test_a_wrong_timeout_is_named_as_it_was_written() -> None:
    assert error_of("timeout: -3\n", MP) == f"{MP}:1: timeout: got -3, expected a number above 0"


def test_what_null_means_is_said_by_check_alone() -> None:
    text = "model: {type: gpt, max_seq_len: 512}\ntraining:\n  batch_size: null\n  epochs: null\n"
    assert warnings_of(text) == [
        "3: training.batch_size: null is read as 8",
        "4: training.epochs: null is read as 30",
    ]
    assert load(text).warnings == ()


def test_null_epochs_mean_nothing_beside_max_steps() -> None:
    assert warnings_of("training:\n  epochs: null\n  max_steps: 3\n") == []


# --- files of models


def test_the_first_model_of_a_file_is_the_one_served() -> None:
    text = "causal_gpt2:\n  hf_model_name: x\n  timeout: 60\nother:\n  hf_model_name: y\n"
    resolved = load(text)
    assert (resolved.config.serving.hf_model_name, resolved.config.serving.timeout) == ("x", 60)
    assert resolved.sources["serving.hf_model_name"] == "run.yaml:2"
    assert warnings_of(text) == [
        "1: causal_gpt2: read as the section serving, which this model is served with",
        "4: other: not read; the first model of the file, causal_gpt2, is the one served",
    ]


def test_a_model_that_is_named_is_the_one_served(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("causal_gpt2:\n  hf_model_name: x\n  timeout: 60\nother:\n  hf_model_name: y\n")
    assert model_keys(files=[file]) == ["causal_gpt2", "other"]
    resolved = load_config(files=[file], environ={}, model="other")
    assert (resolved.config.serving.hf_model_name, resolved.config.serving.timeout) == ("y", 300)
    assert resolved.sources["serving.hf_model_name"] == f"{file}:5"
    assert resolved.warnings == (f"{file}:4: other: read as the section serving, which this model is served with",)


def test_a_model_that_no_file_has_is_the_preset_s_and_the_lowest_of_all(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("other:\n  hf_model_name: y\nserving:\n  ctx_length: 64\n")
    serving = load_config(files=[file], environ={}, model="causal_gpt2").config.serving
    assert (serving.hf_model_name, serving.ctx_length, serving.num_nodes) == ("openai-community/gpt2", 64, 3)
