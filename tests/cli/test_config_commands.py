"""`smolcluster config show | check | list`, and what the command says of a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from smolcluster.cli import _run
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


def test_check_says_how_an_older_file_is_read(runner: CliRunner, folder: Path) -> None:
    (folder / "nn_config.yaml").write_text("num_epochs: 2\nmodel:\n  type: SimpleNN\n")
    result = runner.invoke(app, ["check", "nn_config.yaml"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "warning: nn_config.yaml:3: model.type: SimpleNN is read as simple_nn",
        "nn_config.yaml: ok",
    ]


def test_show_names_the_line_of_a_translated_value_and_what_a_name_implies(runner: CliRunner, folder: Path) -> None:
    (folder / "nn_config.yaml").write_text("num_epochs: 2\ngradient_clipping: {max_norm: 3}\n")
    (folder / "cluster_config_ddp.yaml").write_text("seed: 3\n")
    result = runner.invoke(app, ["show", "--config", "nn_config.yaml", "--cluster", "cluster_config_ddp.yaml"])
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "epochs: 2 # nn_config.yaml:1" in lines
    assert "grad_clip_norm: 3.0 # nn_config.yaml:2" in lines
    assert "algorithm: classicdp # name of cluster_config_ddp.yaml" in lines


def test_show_names_the_key_that_a_value_follows(runner: CliRunner) -> None:
    overrides = ["model.type=hf", "model.hf_model_name=gpt2", "cluster.use_quantization=true"]
    result = runner.invoke(app, ["show", *(word for text in overrides for word in ("--override", text))])
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "dataset: wikitext2 # follows model.type" in lines
    assert "tokenizer: gpt2 # follows model.hf_model_name" in lines
    assert "compression: int8 # follows cluster.use_quantization" in lines


# --- mistakes: one clear line, exit code 2

HOSTS = "host_ip: {a: 10.0.0.1, b: 10.0.0.2}\n"
REGULAR = "allToAllTopology:\n  workers:\n    regular:\n"
BOMB = "".join(
    [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(10)] + ["training: *a9\n"]
)

# What is wrong with a file → (its text, words that the line has).
IN_FILES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "unknown key": ("training:\n  batchsize: 4\n", ("f.yaml:2", "batchsize", "nearest: training.batch_size")),
    "unknown section": ("trainig:\n  epochs: 4\n", ("f.yaml:1", "trainig", "nearest: training")),
    "unknown flat key": ("num_epoch: 4\n", ("f.yaml:1", "num_epoch", "nearest")),
    "wrong type": ("training:\n  epochs: [3]\n", ("f.yaml:2", "training.epochs", "[3]", "whole number")),
    "wrong type of a flat key": ("num_epochs: three\n", ("f.yaml:1", "num_epochs", "'three'", "whole number")),
    "out of range": ("training:\n  polyak_alpha: 2\n", ("f.yaml:2", "polyak_alpha", "from 0 to 1")),
    "unknown choice": ("algorithm: clasicdp\n", ("f.yaml:1", "clasicdp", "classicdp")),
    "number with a unit": ("cluster:\n  timeout: 5s\n", ("f.yaml:2", "cluster.timeout", "'5s'", "a number above 0")),
    "no YAML": ("a: [1, 2\n", ("f.yaml:2", "not valid YAML")),
    "doubled key": ("training:\n  epochs: 1\n  epochs: 2\n", ("f.yaml:3", "epochs", "given twice", "line 2")),
    "tab": ("training:\n\tepochs: 1\n", ("f.yaml:2", "tab")),
    "list": ("- a\n", ("f.yaml:1", "list", "key: value")),
    "plain text": ("hello\n", ("f.yaml:1", "'hello'", "key: value")),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\xff", ("f.yaml:1", "UTF-8")),
    "not UTF-8": ("# caf\xe9\n".encode("latin-1"), ("f.yaml:1", "UTF-8")),
    "nul bytes": (b"a: \x00\n", ("f.yaml:1", "U+0000")),
    "nested too deeply": ("a: " + "[" * 5000 + "\n", ("f.yaml", "nested too deeply")),
    "aliases that multiply": (BOMB, ("f.yaml", "more than 100000 values")),
    "alias of itself": ("training: &a\n  x: *a\n", ("f.yaml:2", "contains itself")),
    "tag that runs code": ("training: !!python/object:os.system {}\n", ("f.yaml:1", "not allowed")),
    "key over two lines": ('"a\\nb": 4\n', ("f.yaml:1", r"a\nb")),
    "quantization against compression": (
        "use_quantization: true\ncompression: bf16\n",
        ("f.yaml:2", "cluster.compression", "bf16", "use_quantization"),
    ),
    "more parts than samples": (
        "batch_size: 4\ntraining:\n  micro_batches: 8\n",
        ("f.yaml:3", "micro_batches", "8", "4"),
    ),
    "nccl on the cpu": ("backend: nccl\ntraining: {device: cpu}\n", ("f.yaml:1", "nccl", "cuda", "cpu")),
    "text without a path": ("data:\n  dataset: text\n", ("f.yaml:2", "data.path")),
    "hf without a name": ("model:\n  type: hf\n", ("f.yaml:2", "model.hf_model_name")),
    "bad host name": ("host_ip:\n  a b: 10.0.0.1\n", ("f.yaml:2", "'a b'", "a host name")),
    "bad address": ("host_ip:\n  a: 10.0.0.256\n", ("f.yaml:2", "10.0.0.256", "an IP address")),
    "address that is a number": ("host_ip:\n  a: 10.1\n", ("f.yaml:2", "10.1", "an IP address")),
    "port out of range": ("port: 65536\n", ("f.yaml:1", "65536", "from 1 to 65535")),
    "port with minutes": ("port: 18:12\n", ("f.yaml:1", "'18:12'", "from 1 to 65535")),
    "doubled rank": (
        REGULAR + "      - {hostname: a, rank: 0}\n      - {hostname: b, rank: 0}\n",
        ("f.yaml:5", "regular[1].rank: 0", "twice"),
    ),
    "gap in the ranks": (
        REGULAR + "      - {hostname: a, rank: 0}\n      - {hostname: b, rank: 2}\n",
        ("f.yaml:3", "0, 2", "without a gap"),
    ),
    "worker without an address": (HOSTS + "workers: [c]\n", ("f.yaml:2", "c has no address", "a, b")),
    "server as a worker": (HOSTS + "server: a\nworkers: [a, b]\n", ("f.yaml:3", "a is the server")),
    "memory of nothing": ("memory: 0\n", ("f.yaml:1", "cluster.memory", "above 0")),
    "a value in two forms": ("num_epochs: 1\ntraining: {epochs: 2}\n", ("f.yaml:1", "num_epochs", "training.epochs")),
}

# What is wrong elsewhere → (arguments, words).
ELSEWHERE: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "missing file": (["check", "gone.yaml"], ("gone.yaml", "no such file")),
    "a folder": (["check", "."], ("cannot be read",)),
    "missing cluster file": (["show", "--cluster", "gone.yaml"], ("gone.yaml", "no such file")),
    "unknown preset": (["show", "--preset", "dmo"], ("dmo", "nearest: demo", "config list")),
    "override without a value": (["show", "--override", "training.epochs"], ("training.epochs", "KEY=VALUE")),
    "override that is no YAML": (["show", "--override", "training.epochs=[1"], ("not valid YAML",)),
    "override of an unknown key": (["show", "--override", "epoch=1"], ("unknown key epoch", "training.epochs")),
    "override of the wrong type": (["show", "--override", "training.epochs=x"], ("--override", "'x'", "whole number")),
    "no file": (["check"], ("FILE", "--help")),
    "unknown option": (["show", "--prest", "demo"], ("--prest", "--help")),
}


def check_mistake(arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["config", *arguments], "smolcluster") == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith("error: ")
    assert "Traceback" not in printed.err
    assert [word for word in words if word not in printed.err] == []


@pytest.mark.parametrize(("content", "words"), IN_FILES.values(), ids=IN_FILES.keys())
def test_a_mistake_in_a_file_is_one_clear_line_and_exit_code_2(
    folder: Path, content: str | bytes, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "f.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    check_mistake(["check", "f.yaml"], words, capsys)
    check_mistake(["show", "--cluster", "f.yaml"], words[1:], capsys)


@pytest.mark.parametrize(("arguments", "words"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_a_mistake_on_the_command_line_is_one_clear_line_and_exit_code_2(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    check_mistake(arguments, words, capsys)


def test_a_mistake_in_the_environment_is_one_clear_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMOLCLUSTER__TRAINING__EPOCHS", "x")
    check_mistake(["show"], ("SMOLCLUSTER__TRAINING__EPOCHS", "'x'", "whole number"), capsys)


def test_an_option_that_contradicts_an_override_is_one_clear_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["train", "--max-steps", "5", "--override", "training.max_steps=6"]
    assert _run(arguments, "smolcluster") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --max-steps 5 and --override training.max_steps=6 contradict each other; give only one of them"
    ]


@pytest.mark.parametrize(
    "text",
    ["", "# nothing yet\n", "port: 65_432\n", "cluster: {tls: no}\n", "host_ip: {on: 10.0.0.1}\n", "seed: 010\n"],
)
def test_what_yaml_readers_disagree_about_is_no_mistake(
    folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "f.yaml").write_text(text)
    assert _run(["config", "check", "f.yaml"], "smolcluster") == 0
    assert capsys.readouterr().out == "f.yaml: ok\n"
