"""The table of published weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolcluster.config.load import check_file, load_config
from smolcluster.config.weights import WeightsSource, find_weights
from smolcluster.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "model_weights.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_table_that_ships_has_gpt2_with_its_checksum() -> None:
    found = find_weights("gpt2")
    assert found.hf_model_name == "openai-community/gpt2"
    assert found.revision is not None
    assert found.sha256 is not None


def test_a_table_of_the_users_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, "mine:\n  url: https://example.org/x.safetensors\n")
    assert find_weights("mine", file) == WeightsSource(url="https://example.org/x.safetensors")
    assert check_file(file) == check_file(write(tmp_path, ""))


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="preset model_weights has no weights gpt3; nearest: gpt2; it has gpt2, "):
        find_weights("gpt3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  hf_model: x\n", "2: unknown key a.hf_model; nearest: a.hf_model_name"),
        ("a: {}\n", "1: a: needs hf_model_name or url, and only one of them"),
        ("a: {hf_model_name: x, url: 'https://y'}\n", "1: a: needs hf_model_name or url, and only one of them"),
        ("a: {url: 'https://y', revision: z}\n", "1: a: revision belongs to hf_model_name; a url has none"),
        ("a:\n  url: http://y\n", "2: a.url: got 'http://y', expected an address that begins with https://, or null"),
        (
            "a: {hf_model_name: x,\n  sha256: 12}\n",
            "2: a.sha256: got 12, expected 64 hexadecimal digits in lower case, in quotes, or null",
        ),
        ("a: gpt2\n", "1: a: got 'gpt2', expected a section with keys such as hf_model_name, url, revision"),
    ],
)
def test_a_mistake_gives_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    assert check_file(file).errors == (f"{file}:{message}",)
    with pytest.raises(ConfigError) as caught:
        find_weights("a", file)
    assert str(caught.value) == f"{file}:{message}"


def test_a_table_of_weights_configures_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lists published weights"):
        load_config(files=[write(tmp_path, "a: {hf_model_name: x}\n")], environ={})
