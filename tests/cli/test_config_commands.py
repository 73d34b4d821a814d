"""`smolcluster config show | check | list`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from smolcluster.cli.config import app
from smolcluster.config.load import load_config, preset_names
from smolcluster.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_show_prints_yaml_that_reads_back_with_config(runner: CliRunner, folder: Path) -> None:
    (folder / "c.yaml").write_text("seed: 3\nhost_ip: {a: 10.0.0.1}\n")
    arguments = ["--preset", "demo", "--cluster", "c.yaml", "--override", "training.epochs=4"]
    result = runner.invoke(app, ["show", *arguments])
    assert result.exit_code == 0
    (folder / "shown.yaml").write_text(result.stdout, encoding="utf-8")
    expected = load_config("demo", cluster_files=["c.yaml"], overrides=["training.epochs=4"]).config
    assert load_config(files=["shown.yaml"]).config == expected
    again = runner.invoke(app, ["show", "--config", "shown.yaml"])
    assert [line.split("#")[0] for line in again.stdout.splitlines()] == [
        line.split("#")[0] for line in result.stdout.splitlines()
    ]


def test_show_names_the_source_of_every_value(runner: CliRunner, folder: Path) -> None:
    (folder / "c.yaml").write_text("\nseed: 3\n")
    result = runner.invoke(app, ["show", "--cluster", "c.yaml"])
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "seed: 3 # c.yaml:2" in lines
    assert all("#" in line for line in lines if not line.endswith(":"))


def test_show_warns_on_stderr(runner: CliRunner, folder: Path) -> None:
    (folder / "c.yaml").write_text("host_ip: {a: 10.0.0.1, b: 10.0.0.1}\n")
    result = runner.invoke(app, ["show", "--cluster", "c.yaml"])
    assert result.exit_code == 0
    assert result.stderr == "warning: c.yaml:1: cluster.host_ip: a, b share the address 10.0.0.1 port 65432\n"


def test_show_lets_a_mistake_through_to_the_shared_handler(runner: CliRunner) -> None:
    result = runner.invoke(app, ["show", "--override", "training.epoch=4"])
    assert isinstance(result.exception, ConfigError)


def test_check_says_ok(runner: CliRunner, folder: Path) -> None:
    (folder / "a.yaml").write_text("training: {epochs: 3}\n")
    (folder / "b.yaml").write_text("num_workers: 3\n")
    result = runner.invoke(app, ["check", "a.yaml", "b.yaml"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "a.yaml: ok\nb.yaml: ok\n", "")


def test_check_prints_every_mistake_and_exits_2(runner: CliRunner, folder: Path) -> None:
    (folder / "a.yaml").write_text("training:\n  epoch: 3\n  batch_size: 0\n")
    (folder / "b.yaml").write_text("num_workers: 3\n")
    result = runner.invoke(app, ["check", "a.yaml", "b.yaml", "c.yaml"])
    assert result.exit_code == 2
    assert result.stdout == "b.yaml: ok\n"
    assert result.stderr.splitlines() == [
        "error: a.yaml:2: unknown key training.epoch; nearest: training.epochs",
        "error: a.yaml:3: training.batch_size: got 0, expected a whole number of at least 1, or null",
        "error: c.yaml: no such file",
    ]


def test_check_warns_on_stdout_and_exits_0(runner: CliRunner, folder: Path) -> None:
    (folder / "c.yaml").write_text("host_ip: {a: 10.0.0.1, b: 10.0.0.1}\n")
    result = runner.invoke(app, ["check", "c.yaml"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "warning: c.yaml:1: cluster.host_ip: a, b share the address 10.0.0.1 port 65432",
        "c.yaml: ok",
    ]


def test_check_ignores_the_environment(runner: CliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLCLUSTER__TRAINING__EPOCHS", "x")
    (folder / "a.yaml").write_text("training: {epochs: 3}\n")
    assert runner.invoke(app, ["check", "a.yaml"]).exit_code == 0


def test_list_describes_every_preset_in_one_line(runner: CliRunner) -> None:
    lines = runner.invoke(app, ["list"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    assert all(len(line.split()) > 3 and "#" not in line for line in lines)
