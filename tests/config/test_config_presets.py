"""Every preset loads, says what it shows and how to run it."""

from __future__ import annotations

import pytest

from smolcluster.config.load import load_config, preset_names, preset_text

NAMES = preset_names()


def test_the_first_presets_are_there() -> None:
    first = {"classicdp_mnist", "classicdp_digits", "classicdp_gpt", "single_mnist", "single_gpt", "demo"}
    assert first <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_loads_without_warnings(name: str) -> None:
    resolved = load_config(name, environ={})
    assert resolved.warnings == ()
    assert resolved.sources["algorithm"] == f"preset {name}"


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


def test_the_demo_fits_the_digits_of_its_model() -> None:
    demo = load_config("demo", environ={}).config
    assert (demo.algorithm, demo.model.type, demo.data.dataset, demo.data.tokenizer) == (
        "classicdp",
        "gpt",
        "pydoc",
        "bytes",
    )
