"""What is printed reads back as the same configuration."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolcluster.config.dump import config_yaml
from smolcluster.config.load import load_config, preset_names
from smolcluster.config.schema import Config

EVERYTHING = [
    "training.batch_size=9",
    "lr_schedule.min_lr=0",
    "cluster.server=null",
    "cluster.memory={a: 16}",
    "training.learning_rate=1e-5",
    "cluster.host_ip={a: 10.0.0.1, b.c: '::1', 'on': 10.0.0.3}",
    "cluster.port={default: 1, a: 2}",
    "cluster.workers=[a, b.c]",
    "cluster.shares=[1, 2.5]",
    "cluster.buffer_size=8",
    "cluster.use_quantization=true",
    "cluster.allToAllTopology={workers: {regular: [{hostname: a, rank: 0, ip: 10.0.0.1, port: 5}]}}",
    "cluster.ssh={a: {host: 10.0.0.9, user: me, os: windows}}",
    "model.args={depth: [1, {x: null}], name: '1e3'}",
    "serving.decoding_strategies.top_p.p=0.5",
]


def read_back(text: str, folder: Path) -> Config:
    file = folder / "shown.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(files=[file], environ={}).config


@pytest.mark.parametrize("preset", [None, *preset_names()])
@pytest.mark.parametrize("overrides", [[], EVERYTHING], ids=["plain", "everything"])
def test_the_printed_configuration_reads_back(tmp_path: Path, preset: str | None, overrides: list[str]) -> None:
    resolved = load_config(preset, overrides=overrides, environ={})
    assert read_back(config_yaml(resolved.config, resolved.sources), tmp_path) == resolved.config
    assert read_back(config_yaml(resolved.config), tmp_path) == resolved.config


def test_another_yaml_reader_sees_the_same_values() -> None:
    resolved = load_config("demo", overrides=EVERYTHING, environ={})
    other = yaml.safe_load(config_yaml(resolved.config, resolved.sources))
    assert Config.model_validate(other) == resolved.config
    assert other["logging"]["wandb"] == "off"
    assert other["training"]["learning_rate"] == 1e-5


# Text that some YAML reader takes for something else.
TRAPS = [
    "6e-4",
    "0o7",
    "off",
    "null",
    "~",
    "<<",
    "=",
    "1:30",
    "a: b",
    "# x",
    "2024-01-01",
    " x ",
    "---",
    "?",
    "!a",
    "a\nb",
    "\x85",
]


# The temporary folder is overwritten in every example, so sharing it between examples is safe.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(blacklist_categories=["Cs"]), max_size=20) | st.sampled_from(TRAPS),
    rate=st.floats(min_value=0, max_value=1e300, exclude_min=True, allow_subnormal=False),
)
def test_any_text_and_number_reads_back(tmp_path: Path, name: str, rate: float) -> None:
    config = Config.model_validate({"logging": {"project_name": name}, "training": {"learning_rate": rate}})
    text = config_yaml(config)
    assert text.count("\n") == config_yaml(Config()).count("\n")
    found = read_back(text, tmp_path)
    assert found.logging.project_name == name
    assert math.isclose(found.training.learning_rate, rate, rel_tol=0.0)


def test_each_value_is_followed_by_its_source() -> None:
    resolved = load_config("demo", overrides=["cluster.buffer_size.a=3"], environ={})
    lines = {" ".join(line.split()) for line in config_yaml(resolved.config, resolved.sources).splitlines()}
    assert "type: gpt # preset demo" in lines
    assert "a: 3 # --override" in lines
    assert "patience: 5.0 # default" in lines
    assert "epochs: null # default" in lines


def test_automatic_values_say_what_they_mean() -> None:
    resolved = load_config(environ={})
    lines = {" ".join(line.split()) for line in config_yaml(resolved.config, resolved.sources).splitlines()}
    assert "batch_size: null # default, means 32" in lines
    assert "epochs: null # default, means 3" in lines
