"""What a user reads when something outside of smolcluster fails: one line, the right exit code, nothing lost.

The command line runs in this process: a rank in a process of its own costs three seconds of processor time.
"""

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from smolcluster.cli import _run

SOURCE = str(Path(__file__).parent.parent.parent / "src")
COMMON = ["train", "--preset", "classicdp_digits", "--algorithm", "single", "--max-steps", "12"]
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")


@dataclass
class Ended:
    """A command that has ended, and what it printed."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The only line on stderr that is no progress."""
        lines = [line for line in self.err.splitlines() if not line.startswith("step ")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Ended:
        code = _run([*arguments], "smolcluster")
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


def overrides(*values: str) -> list[str]:
    return [word for value in values for word in ("--override", value)]


WILD = overrides("training.optimizer=sgd", "training.learning_rate=1e30", "training.grad_clip_norm=null")


def test_a_loss_that_is_not_finite_stops_the_run(command: Any, tmp_path: Path) -> None:
    ended = command(*COMMON, *WILD, "--out", str(tmp_path / "run"))
    assert ended.code == 4
    assert "the weights are those before this update. Lower training.learning_rate" in ended.error()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == len(rows) < 12


def test_a_model_beyond_all_memory_is_told_in_one_line(command: Any, tmp_path: Path) -> None:
    sizes = overrides("model.hidden=1000000000000000", "cluster.memory=1e12")  # no warning beforehand
    ended = command(*COMMON, *sizes, "--out", str(tmp_path / "run"))
    assert ended.code == 2
    assert ended.error() == (
        "error: the model does not fit into this machine's memory. Make the sizes of model smaller"
    )


def test_skip_nonfinite_passes_over_such_steps(command: Any, tmp_path: Path) -> None:
    ended = command(*COMMON, *WILD, "--skip-nonfinite", "--out", str(tmp_path / "run"))
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
    assert rows[0]["train/loss"] > 0
    assert rows[-1]["train/grad_norm"] is None  # as JSON knows no NaN


@needs_dev_full
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("metrics.jsonl", "the metrics cannot be written to {}/metrics.jsonl (No space left on device)"),
        ("summary.json.tmp", "the summary cannot be written to {}/summary.json (No space left on device)"),
        ("config.yaml", "the run folder {} cannot be made (No space left on device)"),
    ],
)
def test_a_full_disk_is_told_in_one_line(command: Any, tmp_path: Path, file: str, message: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / file).symlink_to("/dev/full")
    ended = command(*COMMON, "--out", str(out), *overrides("checkpoint.steps=null"))
    assert ended.code == (2 if file == "config.yaml" else 4)
    lines = [line for line in ended.err.splitlines() if not line.startswith("step ")]
    assert lines[0].startswith(f"error: {message.format(out)}")
    assert "Traceback" not in ended.err
    if file == "summary.json.tmp":
        assert lines[1:] == [f"the newest checkpoint is {out / 'checkpoints' / 'step_00000012'}"]
    else:
        assert lines[1:] == []


@needs_dev_full
def test_a_log_that_cannot_be_written_does_not_stop_the_run(command: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "rank0.log").symlink_to("/dev/full")
    ended = command(*COMMON, "--quiet", "--out", str(tmp_path / "run"))
    assert (ended.code, ended.err) == (0, "")


@needs_dev_full
def test_a_full_disk_of_a_run_with_several_ranks_is_told_in_one_line(tmp_path: Path) -> None:
    """Here the launcher writes the metrics, and the ranks are processes of their own."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    script = "from smolcluster.cli import main; main()"
    arguments = ["train", "--preset", "classicdp_digits", "--local", "1", "--max-steps", "5", "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 4
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: the metrics cannot be written to {out / 'metrics.jsonl'} (No space left on device)")
    assert json.loads((out / "summary.json").read_text())["steps"] == 0


FULL_DISK = """
import json, subprocess, sys
from pathlib import Path
from smolcluster.checkpoint.store import load_weights
from smolcluster.cli import _run
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], check=True)
code = _run([*sys.argv[2:], "--out", str(disk / "run")], "smolcluster")
found = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
print(json.dumps({"code": code, "found": found, "step": load_weights(disk / "run" / "checkpoints")[1]["step"]}))
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None or not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="needs root and unshare (Linux), to mount a small disk that nobody else sees",
)
def test_a_disk_that_fills_up_leaves_the_checkpoints_before_whole(tmp_path: Path) -> None:
    arguments = [*COMMON, "--quiet", *overrides("checkpoint.steps=1", "checkpoint.keep=null")]
    ended = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", FULL_DISK, str(tmp_path), *arguments],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["code"] == 4
    first, second = ended.stderr.splitlines()
    last = told["step"]
    assert 1 <= last < 12
    assert first.startswith(f"error: the checkpoint of step {last + 1} cannot be written to {tmp_path}/run/checkpoints")
    assert "earlier checkpoints are whole" in first
    assert second == f"the newest checkpoint is {tmp_path}/run/checkpoints/step_{last:08d}"
    assert [name for name in told["found"] if name.startswith("writing-")] == []


def test_a_run_folder_that_cannot_be_made_is_named(command: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = command(*COMMON, "--out", str(tmp_path / "file" / "run"))
    assert ended.code == 2
    assert ended.error() == (
        f"error: the run folder {tmp_path / 'file' / 'run'} cannot be made (Not a directory). Give another one "
        "with --out"
    )


def test_a_missing_wandb_is_told_before_anything_is_made(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolcluster.monitoring.wandb_runs.find_spec", lambda name: None)
    ended = command(*COMMON, "--out", str(tmp_path / "run"), *overrides("logging.wandb=online"))
    assert ended.code == 2
    assert 'pip install "smolcluster[wandb]"' in ended.error()
    assert not (tmp_path / "run").exists()


TINY_GPT = overrides(
    "model.type=gpt", "model.model_dim=16", "model.num_heads=2", "model.num_layers=1", "model.max_seq_len=16"
)
NOBODYS = "nobody-here/no-such-thing"  # in nobody's cache


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Every way out leads through a proxy that is not there; nothing is in the cache of the datasets."""
    with socket.socket() as closed:  # bound but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.upper(), proxy)
        for name in ("no_proxy", "NO_PROXY", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SMOLCLUSTER_DATA", str(tmp_path / "data"))
        yield


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--preset", "single_mnist"],
            "train-images-idx3-ubyte.gz is not in {}/data/mnist and could not be downloaded",
        ),
        ([*TINY_GPT, *overrides("data.dataset=wikitext2")], "train.txt is not in {}/data/wikitext-2 and could not be"),
        (
            [*TINY_GPT, *overrides("data.dataset=snli")],
            "train.jsonl is not in {}/data/snli and could not be downloaded",
        ),
        ([*TINY_GPT, *overrides(f"data.dataset={NOBODYS}")], f"data.dataset is '{NOBODYS}': "),
        ([*TINY_GPT, *overrides("data.dataset=pydoc", f"data.tokenizer={NOBODYS}")], f"data.tokenizer is {NOBODYS}: "),
        (
            overrides("model.type=hf", f"model.hf_model_name={NOBODYS}", "data.dataset=pydoc", "data.tokenizer=bytes"),
            f"model.hf_model_name is {NOBODYS}: ",
        ),
    ],
    ids=["mnist", "wikitext2", "snli", "dataset id", "tokenizer id", "model id"],
)
def test_a_missing_network_is_told_in_one_line(
    command: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    if NOBODYS in " ".join(arguments):
        pytest.importorskip("transformers")
        pytest.importorskip("datasets")
    started = time.monotonic()
    ended = command("train", "--algorithm", "single", *arguments, "--out", str(tmp_path / "run"))
    assert ended.code == 2, ended.err
    assert message.format(tmp_path) in ended.error()
    assert time.monotonic() - started < 10  # no retries: mostly this is importing the libraries


def truncated_gzip() -> bytes:
    return gzip.compress(os.urandom(5000))[:4000]


@pytest.mark.parametrize(
    ("file", "content", "arguments", "message"),
    [
        ("data/mnist/train-images-idx3-ubyte.gz", truncated_gzip(), ["--preset", "single_mnist"], "{} cannot be read"),
        ("data/mnist/train-images-idx3-ubyte.gz", b"no gzip", ["--preset", "single_mnist"], "{} cannot be read"),
        ("text.txt", b"\xff\xfe", [*TINY_GPT, *overrides("data.dataset=text", "data.path={}")], "{} is not UTF-8 text"),
        (
            "rows.jsonl",
            b'{"text": "a"}\n{"te',
            [*TINY_GPT, *overrides("data.dataset=jsonl", "data.path={}")],
            "{} line 2",
        ),
        (
            "tokenizer.json",
            b"{}",
            [*TINY_GPT, *overrides("data.dataset=pydoc", "data.tokenizer={}")],
            "{} is no tokenizer",
        ),
    ],
    ids=["cut off gzip", "not gzip", "not UTF-8", "cut off jsonl", "not a tokenizer"],
)
@pytest.mark.usefixtures("no_network")
def test_data_that_cannot_be_read_is_named_in_one_line(
    command: Any, tmp_path: Path, file: str, content: bytes, arguments: list[str], message: str
) -> None:
    if file == "tokenizer.json":
        pytest.importorskip("tokenizers")
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    arguments = [word.format(path) for word in arguments]
    ended = command("train", "--algorithm", "single", *arguments, "--out", str(tmp_path / "run"))
    assert ended.code == 2, ended.err
    assert message.format(path) in ended.error()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named_in_one_line(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("text " * 1000)
    path.chmod(0)
    arguments = [*TINY_GPT, *overrides("data.dataset=text", f"data.path={path}")]
    ended = command("train", "--algorithm", "single", *arguments, "--out", str(tmp_path / "run"))
    assert ended.code == 2
    assert f"{path} cannot be read (Permission denied)" in ended.error()
