"""Every preset loads, says what it shows and how to run it."""

from __future__ import annotations

import pytest

from smolcluster.config import memory
from smolcluster.config.hosts import roles
from smolcluster.config.load import load_config, preset_names, preset_text

NAMES = preset_names()
# More machines than take part, as printed in the guide that the file comes from.
WARNS = {
    "cluster_config_inference": (
        "preset cluster_config_inference: cluster.host_ip: mini1, pi4, macbook, win share the address 10.10.0.1 "
        "port 65432",
    )
}


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory_bytes", lambda: 32 * memory.GIB)


def test_the_first_presets_are_there() -> None:
    first = {"classicdp_mnist", "classicdp_digits", "classicdp_gpt", "single_mnist", "single_gpt", "demo"}
    assert first <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_loads_without_warnings(name: str) -> None:
    assert load_config(name, environ={}).warnings == WARNS.get(name, ())


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_its_algorithm_or_leaves_it_open(name: str) -> None:
    kind = name.removeprefix("cluster_config_")
    is_open = name in ("nn_config", "gpt_config", "model_config_inference", "cluster_config_inference")
    expected = "default" if is_open else f"preset {name}" if kind == name else f"name of preset {name}"
    assert load_config(name, environ={}).sources["algorithm"] == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    first, *others = preset_text(name).splitlines()
    assert first.startswith("# ")
    assert any(line.startswith("#") and f"--preset {name}" in line for line in others)


@pytest.mark.parametrize("kind", ["mnist", "gpt"])
def test_a_classicdp_preset_over_two_ranks_is_its_single_preset(kind: str) -> None:
    single = load_config(f"single_{kind}", environ={}).config
    classicdp = load_config(f"classicdp_{kind}", environ={}).config
    assert single.training.batch_size == 2 * (classicdp.training.batch_size or 0)
    same_batch = {"training": single.training, "algorithm": single.algorithm}
    assert classicdp.training.model_copy(update={"batch_size": single.training.batch_size}) == single.training
    assert classicdp.model_copy(update=same_batch) == single
    assert single.model.type != "gpt" or single.model.dropout == 0.0


def test_the_table_of_weights_is_no_preset() -> None:
    assert "model_weights" not in NAMES


def test_every_file_of_the_guide_has_its_preset() -> None:
    clusters = ("fsdp", "classicdp", "ddp", "edp", "syncps", "mp", "inference")
    assert {f"cluster_config_{kind}" for kind in clusters} <= set(NAMES)
    assert {"nn_config", "gpt_config", "model_config_inference"} <= set(NAMES)


def test_the_older_name_of_a_preset_gives_the_same_run() -> None:
    classicdp = load_config("cluster_config_classicdp", environ={}).config
    assert load_config("cluster_config_ddp", environ={}).config == classicdp


def test_the_flat_preset_is_the_same_as_its_sections() -> None:
    config = load_config("nn_config", environ={}).config
    training = config.training
    assert (training.batch_size, training.epochs, training.grad_clip_norm) == (32, 2, 1.0)
    assert (training.track_gradients, training.polyak_alpha) == (True, 0.5)
    assert (config.model.type, config.data.dataset) == ("simple_nn", "mnist")


def test_the_model_of_the_inference_preset_is_served() -> None:
    serving = load_config("model_config_inference", environ={}).config.serving
    assert (serving.hf_model_name, serving.weights_model_name) == ("openai-community/gpt2", "gpt2")
    assert (serving.num_layers, serving.ctx_length, serving.decoding_strategies.top_k.k) == (12, 1024, 40)


@pytest.mark.parametrize("name", ["classicdp_llama", "syncps_llama"])
def test_the_llama_presets_tune_the_published_model_with_its_own_tokenizer(name: str) -> None:
    resolved = load_config(name, environ={})
    model = resolved.config.model
    assert (model.type, model.init) == ("hf", "pretrained")
    assert resolved.config.data.tokenizer == model.hf_model_name == "meta-llama/Llama-3.2-1B-Instruct"
    assert resolved.sources["data.tokenizer"] == "follows model.hf_model_name"


@pytest.mark.parametrize("gib", [16, 8])
def test_the_llama_demo_fits_into_machines_of_16_gib_and_not_of_8(gib: int) -> None:
    warnings = load_config("classicdp_llama", overrides=[f"cluster.memory={gib}"], environ={}).warnings
    assert len(warnings) == (gib == 8)


def test_the_machines_of_the_guide_have_the_roles_of_its_drawings() -> None:
    edp = roles(load_config("cluster_config_edp", environ={}).config)
    assert [(m.name, m.role) for m in edp] == [("mini1", "server"), *((n, "worker") for n in ("pi5", "win", "macbook"))]
    serving = roles(load_config("cluster_config_inference", environ={}).config, serves=True)
    assert [member.name for member in serving] == ["mini2", "mini1", "mini3"]


def test_the_demo_fits_the_digits_of_its_model() -> None:
    demo = load_config("demo", environ={}).config
    assert (demo.algorithm, demo.model.type, demo.data.dataset, demo.data.tokenizer) == (
        "classicdp",
        "gpt",
        "pydoc",
        "bytes",
    )
