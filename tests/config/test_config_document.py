"""Reading YAML: values as YAML 1.2 has them, with their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolcluster.config import document
from smolcluster.config.document import read_file, read_value
from smolcluster.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1_000", -1000),
        ("010", 10),
        ("0x10", 16),
        ("6e-4", 6e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("off", "off"),
        ("~", None),
        ("null", None),
        ("", None),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("10.0.0.1", "10.0.0.1"),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("C:\\data", "C:\\data"),
        ("pkg.mod:Class", "pkg.mod:Class"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("{on: 1, 2: x}", {"on": 1, "2": "x"}),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text: str, value: object) -> None:
    assert read_value(text, "test").plain() == value


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\n\nb:\n  - x\n  - y: 2\n")
    entry = read_file(file)
    paths: list[list[str | int]] = [["a"], ["b"], ["b", 0], ["b", 1, "y"]]
    lines = [found.source.line for path in paths if (found := entry.at(path))]
    assert lines == [1, 3, 4, 5]
    assert entry.at(["b", 2]) is None
    assert entry.at(["a", "x"]) is None


def test_a_merge_key_is_overridden_by_the_keys_beside_it() -> None:
    text = "{base: &b {x: 1, y: 1}, more: &m {x: 2, z: 2}, all: {<<: [*b, *m], y: 3}}"
    assert read_value(text, "test").at(["all"]).plain() == {"x": 1, "y": 3, "z": 2}  # type: ignore[union-attr]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_file(file).plain() == {"a": 1, "b": 2}


@pytest.mark.parametrize("text", ["[" * 3000, "{a: &x [*x]}", "!!int x", "a: 1\n---\nb: 2", "{<<: 3}"])
def test_what_cannot_be_read_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_value(text, "test")
    assert str(caught.value).startswith("test: ")
    assert "\n" not in str(caught.value)


def test_aliases_that_multiply_are_not_written_out() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match="more than 100000 values"):
        read_value("\n".join(levels), "test")


def test_a_file_without_an_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MOST_BYTES", 8)
    file = tmp_path / "a.yaml"
    file.write_text("a: 12345", encoding="utf-8")
    assert read_file(file).plain() == {"a": 12345}
    file.write_text("a: 123456", encoding="utf-8")
    with pytest.raises(ConfigError, match="larger than"):
        read_file(file)


def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not keep root out
    with pytest.raises(ConfigError, match=r"a.yaml: cannot be read \(Permission denied\)"):
        read_file(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["!!int " + "x" * 5000, "{" + "k" * 500 + ": 1, " + "k" * 500 + ": 2}"])
def test_a_message_does_not_repeat_endless_text(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_value(text, "test")
    assert len(str(caught.value)) < 200
