"""`model.type: package.module:ClassName`: built from model.args, from the seed, or refused with one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from smolcluster.config.schema import ModelConfig
from smolcluster.errors import ConfigError
from smolcluster.models.build import build_model
from smolcluster.models.init import InitRule, draw_parameter
from smolcluster.models.weights import weights_sha256

SOURCE = """
import torch
from torch import nn

from smolcluster.models.init import InitRule

class Bag(nn.Module):
    def __init__(self, width, vocab_size, max_seq_len=3, depth=1):
        super().__init__()
        self.asked = (width, vocab_size, max_seq_len, depth)
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))

class Ruled(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(4, num_classes)

    def init_rule(self, name):
        return InitRule("normal", 0.5)

class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        raise RuntimeError("no such\\nthing")

class Empty(nn.Module):
    def forward(self, tokens):
        return tokens

class NoModule:
    pass

a_function = torch.relu
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package in a working directory that is not on sys.path, as for the installed command."""
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "models.py").write_text(SOURCE)
    (tmp_path / "mine" / "broken.py").write_text("import torch\nx = 1 / 0\n")
    (tmp_path / "mine" / "syntax.py").write_text("def f(:\n")
    (tmp_path / "mine" / "lacking.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "mine" / "script.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


def test_the_class_is_imported_from_the_working_directory_and_gets_its_arguments(package: Path) -> None:
    model = build_model(ModelConfig(type="mine.deep.models:Bag", args={"width": 5, "depth": 2}), seed=0, vocab_size=11)
    # vocab_size is the data's and max_seq_len the configuration's, as the constructor names them
    assert model.asked == (5, 11, 128, 2)
    assert model.training
    assert model(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 11)


def test_arguments_of_the_user_win(package: Path) -> None:
    args = {"width": 5, "vocab_size": 300, "max_seq_len": 9}
    model = build_model(ModelConfig(type="mine.deep.models:Bag", args=args), seed=0, vocab_size=11)
    assert model.asked == (5, 300, 9, 1)


def test_random_numbers_of_the_constructor_depend_on_the_seed_only(package: Path) -> None:
    section = ModelConfig(type="mine.deep.models:Bag", args={"width": 5})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(section, seed=3, vocab_size=11)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert weights_sha256(build_model(section, seed=3, vocab_size=11)) == weights_sha256(first)
    assert weights_sha256(build_model(section, seed=4, vocab_size=11)) != weights_sha256(first)


def test_a_class_with_init_rules_is_initialised_by_name(package: Path) -> None:
    model = build_model(ModelConfig(type="mine.deep.models:Ruled"), seed=3, num_classes=10)
    expected = draw_parameter("head.weight", (10, 4), InitRule("normal", 0.5), 3)
    assert torch.equal(model.head.weight, expected)


@pytest.mark.parametrize(
    ("spec", "args", "message"),
    [
        (
            "mine.deep.models:Bag",
            {},
            r"do not fit .*: missing a required argument: 'width'. It takes width, vocab_size",
        ),
        ("mine.deep.models:Bag", {"width": 1, "hight": 2}, r"unexpected keyword argument 'hight'"),
        ("mine.deep.models:Failing", {}, r"cannot be made: RuntimeError: no such \(.*models\.py, line 28\)"),
        (
            "mine.deep.models:Bag",
            {"width": "x"},
            r"cannot be made: TypeError: .*models\.py, line 11\). Check model\.args",
        ),
        ("mine.deep.models:Bog", {}, r"models\.py has no Bog; its models are: Bag, Ruled, Failing, Empty"),
        ("mine.deep.models:NoModule", {}, r"NoModule is no subclass of torch\.nn\.Module"),
        ("mine.deep.models:a_function", {}, r"a_function is no subclass of torch\.nn\.Module"),
        ("mine.elsewhere:Bag", {}, r"there is no module mine\.elsewhere in .* or on PYTHONPATH"),
        ("theirs.models:Bag", {}, r"there is no module theirs in .* or on PYTHONPATH"),
        ("mine.broken:Bag", {}, r"importing mine\.broken fails: ZeroDivisionError: .*broken\.py, line 2\)"),
        ("mine.syntax:Bag", {}, r"importing mine\.syntax fails: SyntaxError: .* \(.*syntax\.py, line 1\)\. Mend"),
        ("mine.deep.models:Empty", {}, r"mine\.deep\.models:Empty has no parameters to train"),
        ("mine.lacking:Bag", {}, r"importing mine\.lacking fails: .*No module named 'a_package_that_nobody_has'"),
        ("mine.script:Bag", {}, r"importing mine\.script fails: SystemExit: 1"),
    ],
)
def test_mistakes_are_one_line(package: Path, spec: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(ModelConfig(type=spec, args=args), seed=0, vocab_size=11)
    assert "\n" not in str(caught.value)


def test_the_example_can_be_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(Path(__file__).resolve().parents[2] / "examples")
    model = build_model(ModelConfig(type="custom_model:Echo", args={"letters": 256, "width": 8}), seed=0)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 256)
    del sys.modules["custom_model"]
