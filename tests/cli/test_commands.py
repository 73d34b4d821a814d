"""The command line without training: errors on one or two lines, exit codes, speed of the help."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree

import pytest

import smolcluster
from smolcluster import cli
from smolcluster.grove import cli as grove_cli

PACKAGE = Path(smolcluster.__file__).parent


def run(*arguments: str) -> int:
    """A command in this process, without the exit that ends `main`."""
    return cli._run(list(arguments), "smolcluster")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--algorithm", "ep"], "algorithm ep divides experts, and model.type simple_nn has none"),
        (["train", "--algorithm", "ep", "--local", "2"], "Set model.type to moe"),
        (["train", "--algorithm", "single", "--local", "2"], "algorithm single is one process, but 2 ranks"),
        (["train", "--preset", "classicdp_digit"], "classicdp_digits"),
        (["train", "--override", "training.batch_sise=3"], "nearest: training.batch_size"),
        (["train", "--max-steps", "3", "--override", "training.max_steps=4"], "contradict each other"),
        (["train", "--local", "0"], "--local 0: give the number of ranks"),
        (["train", "--local", "many"], "'--local'"),
        (["train", "--config", "no-such-file.yaml"], "no-such-file.yaml"),
        (["train", "--no-such-option"], "See smolcluster train --help"),
        (
            ["train", "--override", "cluster.tls=true", "--backend", "gloo", "--algorithm", "classicdp"],
            "cluster.tls is of backend tcp; gloo does not encrypt",
        ),
        (["train", "--override", "cluster.min_ranks=1", "--local", "2", "--algorithm", "classicdp"], "min_ranks"),
        (
            ["train", "--override", "cluster.shares=[1,2]", "--local", "3", "--algorithm", "classicdp"],
            "2 weights for 3",
        ),
        (["train", "--algorithm", "classicdp", "--override", "cluster.num_workers=3"], "Use --local 3"),
        (["node"], "'--hostname'"),
        (["node", "--hostname", "mini1", "--algorithm", "classicdp"], "no machines are named"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_what_a_user_can_mend_exits_2_on_one_or_two_lines(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert message in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []  # no run folder for a run that cannot be


@pytest.mark.parametrize(
    "option",
    [
        ["--tui"], ["--dashboard"],
        ["--metrics-port", "9090"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [["train"], ["node", "--hostname", "mini1"]], ids=["train", "node"])
def test_options_of_later_releases_say_so(
    command: list[str], option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command, *option) == 2
    assert capsys.readouterr().err == f"error: {option[0]} comes in a later release. Leave it out\n"


def test_respawn_is_of_local_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--respawn") == 2
    assert "give --local N with it" in capsys.readouterr().err


def test_a_cluster_file_without_a_name_is_told_how_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("host_ip: {mini1: 10.10.0.1, mini2: 10.10.0.2}\n")
    assert run("train", "--algorithm", "classicdp", "--cluster", str(cluster)) == 2
    assert "smolcluster node --cluster FILE --hostname NAME, or stay on this machine with --local 2" in (
        capsys.readouterr().err
    )


def test_a_folder_with_a_run_is_not_written_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert run("train", "--preset", "classicdp_digits", "--local", "1", "--out", str(tmp_path)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_unexpected_error_is_one_line_and_a_file_with_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("smolcluster.config.load.load_config", lambda *args, **options: 1 / 0)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert run("train") == 3
    err = capsys.readouterr().err
    assert err.startswith("error: ZeroDivisionError: division by zero. This is a defect of smolcluster.")
    assert len(err.splitlines()) == 1
    (traceback,) = tmp_path.iterdir()
    assert str(traceback) in err
    assert "Traceback" in traceback.read_text()


def test_ctrl_c_outside_of_training_exits_130_without_a_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smolcluster.config.load.load_config", interrupted)
    assert run("train") == 130
    assert capsys.readouterr().err == ""


def test_a_new_token_is_for_its_owner_alone_and_is_not_replaced_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "folder" / "token"
    assert run("token", "new", "--file", str(file)) == 0
    first = file.read_text()
    assert len(bytes.fromhex(first.strip())) == 32
    assert first.strip() not in capsys.readouterr().out
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run("token", "new", "--file", str(file)) == 2
    assert "--force" in capsys.readouterr().err
    assert file.read_text() == first
    assert run("token", "new", "--file", str(file), "--force") == 0
    assert file.read_text() != first


def test_version_names_ours_and_torchs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("version") == 0
    out = capsys.readouterr().out
    assert out.startswith("smolcluster ")
    assert "torch 2." in out


def test_grove_says_that_it_comes_later(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        grove_cli.main()
    assert "comes in a later release" in capsys.readouterr().err


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_takes_less_than_a_second_and_lists_the_commands() -> None:
    seconds = []
    for _ in range(3):  # the best of three: other tests may keep the machine busy
        started = time.monotonic()
        shown = python("-c", "from smolcluster.cli import main; main()", "--help")
        seconds.append(time.monotonic() - started)
        assert shown.returncode == 0
        for command in ("train", "node", "demo", "config", "token", "version"):
            assert command in shown.stdout
    assert min(seconds) < 1.0


def test_neither_the_package_nor_the_command_line_imports_torch() -> None:
    script = (
        "import sys, smolcluster, smolcluster.cli, smolcluster.run.rank, smolcluster.run.local, smolcluster.run.node"
    )
    result = python("-c", f"{script}; sys.exit('torch' in sys.modules)")
    assert (result.returncode, result.stderr) == (0, "")


def test_the_package_offers_the_names_of_the_python_interface() -> None:
    for name in smolcluster.__all__:
        assert getattr(smolcluster, name) is not None
        assert name in dir(smolcluster)
    with pytest.raises(AttributeError, match="no_such_name"):
        smolcluster.no_such_name  # noqa: B018


def test_train_runs_as_a_module_and_as_a_file_of_a_checkout(tmp_path: Path) -> None:
    as_module = python("-m", "smolcluster.train", "--algorithm", "ep", cwd=tmp_path)
    assert (as_module.returncode, as_module.stderr[:20]) == (2, "error: algorithm ep ")
    # A copy with a preset of its own: the file must use the package around it, not an installed one.
    checkout = tmp_path / "checkout" / "src" / "smolcluster"
    copytree(PACKAGE, checkout)
    (checkout / "config" / "presets" / "only_here.yaml").write_text("# a preset\nalgorithm: ep\n")
    as_file = python(str(checkout / "train.py"), "--preset", "only_here", cwd=tmp_path)
    assert (as_file.returncode, as_file.stderr[:20]) == (2, "error: algorithm ep ")


def test_how_a_file_is_read_is_said_by_check_and_show_and_not_by_every_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {model_dim: 64}\n", encoding="utf-8")
    for command in ("check", "show"):
        files = [str(file)] if command == "check" else ["--config", str(file)]
        assert run("config", command, *files) == 0
        assert "is read as gpt" in "".join(capsys.readouterr())
    assert run("train", "--config", str(file), "--local", "0") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
