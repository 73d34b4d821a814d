"""Runs at Weights & Biases: what is in the offline files, and that neither a missing key nor a dead line costs time."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import psutil
import pytest

from monitoring.wandb_files import OfflineRun, offline_runs
from smolcluster.config.load import load_config
from smolcluster.config.schema import Config
from smolcluster.errors import ConfigError
from smolcluster.monitoring.wandb_process import DroppingQueue
from smolcluster.monitoring.wandb_runs import FINISH_S, HURRY_S, WandbRuns, rank_summary, run_name

SOURCE = str(Path(__file__).parent.parent.parent / "src")
MARK = "SMOLCLUSTER_TEST_MARK"
# For killing two processes on a busy machine; less than the 5 s that wandb waits for a server that hangs.
ENDING_S = 3.0


@pytest.fixture(autouse=True)
def _no_account(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a key, whose files of wandb's are ours."""
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # reading the files back imports wandb into this process


def make_config(mode: str, *overrides: str) -> Config:
    return load_config("classicdp_digits", overrides=[f"logging.wandb={mode}", *overrides]).config


class Session:
    """A WandbRuns of two ranks and what it told the user."""

    def __init__(self, folder: Path, config: Config, names: list[str] | None = None, world_size: int = 2) -> None:
        (folder / "logs").mkdir(parents=True)
        self.folder = folder
        self.notes: list[str] = []
        self.runs = WandbRuns(config, world_size, names, self.notes.append)
        self.runs.start(folder)

    def write(self, steps: int, world_size: int = 2, **more: Any) -> None:
        for step in range(steps):
            for rank in range(world_size):
                row = {"time": 1000.0 + step, "rank": rank, "step": step, "train/loss": step + rank / 8}
                self.runs.write({**row, **more})

    def wait_for_files(self, count: int) -> None:
        """Until W&B's runs are open: on a busy machine that takes seconds."""
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("wandb/offline-run-*/*.wandb"))) < count and time.monotonic() < deadline:
            threading.Event().wait(0.05)

    def end(self, exit_code: int = 0) -> float:
        """Seconds that it took."""
        started = time.monotonic()
        self.runs.finish({"train_loss": 0.5, "rank_samples": [3, 4]}, exit_code=exit_code)
        self.runs.close()
        return time.monotonic() - started

    def log(self) -> str:
        return (self.folder / "logs" / "wandb.log").read_text()


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of every process that a test starts, and so of those that these start."""
    value = f"{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv(MARK, value)
    return value


def marked(mark: str) -> list[psutil.Process]:
    """The processes that are left of a test."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_three_ranks_leave_three_offline_runs_in_one_group(tmp_path: Path, mark: str) -> None:
    pytest.importorskip("wandb")
    config = make_config("offline", "logging.log_interval=4", "logging.project_name=garage")
    session = Session(tmp_path / "my-run", config, ["mini1", "mini2", "mini3"], world_size=3)
    session.write(2, 3, **{"sys/rss_bytes": 7})
    for step in range(2, 12):
        for rank in range(3):
            row = {"time": 1000.0 + step, "rank": rank, "step": step, "train/loss": 1.5, "grad_norm/net.0.weight": step}
            session.runs.write({**row, **({"val/loss": 2.5, "val/accuracy": None} if step == 9 else {})})
    session.wait_for_files(3)
    session.runs.finish({"train_loss": 1.5, "rank_samples": [10, 20, 30], "steps": 12, "lost_ranks": []})
    session.runs.close()
    assert (session.notes, session.log()) == ([], "")
    assert marked(mark) == []
    runs = offline_runs(session.folder)
    assert [run.name for run in runs] == [f"classicdp-mini{rank + 1}-rank{rank}_lr0.001_bs16" for rank in range(3)]
    for rank, run in enumerate(runs):
        assert (run.group, run.project, run.job_type, run.exit_code) == ("my-run", "garage", "train", 0)
        assert run.config["training"]["learning_rate"] == 0.001
        assert "ssh" not in run.config["cluster"]
        # every fourth step, the evaluation, and what was left at the end; metrics of the rows between are not lost
        assert [point["_step"] for point in run.points] == [0, 4, 8, 9, 11]
        assert [point["_timestamp"] for point in run.points] == [1000, 1004, 1008, 1009, 1011]
        assert [point.get("sys/rss_bytes") for point in run.points] == [7, 7, None, None, None]
        assert [point.get("grad_norm/net.0.weight") for point in run.points] == [None, 4, 8, 9, 11]
        assert [point.get("val/loss") for point in run.points] == [None, None, None, 2.5, None]
        assert not any("val/accuracy" in point or "rank" in point for point in run.points)
        assert (run.summary["rank_samples"], run.summary["train_loss"]) == (10 * (rank + 1), 1.5)
        # wandb's own measurements are of another process
        assert not run.kinds & {"stats", "output", "output_raw", "files", "environment"}


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def the_points_are_there(runs: list[OfflineRun], steps: int) -> None:
    assert len(runs) == 2
    for run in runs:
        assert run.points[-1]["_step"] == steps - 1


def test_without_a_key_nobody_is_asked_and_the_run_is_offline(
    tmp_path: Path, silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    session = Session(tmp_path / "run", make_config("online"))
    session.write(11)
    session.wait_for_files(2)
    assert session.end() < FINISH_S  # mostly 0.1 s
    assert len(session.notes) == 1
    assert session.notes[0].startswith("W&B: offline: No API key configured")
    assert session.notes[0].endswith(f"wandb sync {tmp_path / 'run' / 'wandb' / 'offline-run-*'}")
    the_points_are_there(offline_runs(session.folder), 11)


def test_without_a_network_the_run_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    with socket.socket() as closed:  # bound but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        session = Session(tmp_path / "run", make_config("online"))
        session.write(11)
        session.wait_for_files(2)
        assert session.end() < FINISH_S
    assert len(session.notes) == 1
    assert session.notes[0].startswith("W&B: offline: 127.0.0.1 cannot be reached. Upload the run later: wandb sync ")
    the_points_are_there(offline_runs(session.folder), 11)


def test_a_server_that_hangs_is_left_when_the_run_has_failed(
    tmp_path: Path, silent_server: str, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    session = Session(tmp_path / "run", make_config("online"))
    session.write(11)
    assert session.end(exit_code=3) < HURRY_S + ENDING_S
    assert session.notes[0].startswith("W&B: it has not taken everything in time; metrics.jsonl holds it all.")
    assert marked(mark) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_wandb_that_stands_still_does_not_hold_up_a_row(tmp_path: Path, mark: str) -> None:
    session = Session(tmp_path / "run", make_config("offline", "logging.log_interval=1"))
    (process,) = marked(mark)
    process.suspend()
    started = time.monotonic()
    session.write(20_000)
    # 40 000 rows; a full pipe would hold up the first of them for ever
    assert time.monotonic() - started < 10
    assert session.end(exit_code=1) < HURRY_S + ENDING_S
    assert "points are missing there; metrics.jsonl has them" in session.notes[-1]
    assert marked(mark) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_nothing_is_left_when_the_run_itself_is_killed(tmp_path: Path, mark: str) -> None:
    pytest.importorskip("wandb")
    script = (
        "import sys; from pathlib import Path; from smolcluster.config.load import load_config\n"
        "from smolcluster.monitoring.wandb_runs import WandbRuns\n"
        "folder = Path(sys.argv[1]); (folder / 'logs').mkdir(parents=True)\n"
        "config = load_config('classicdp_digits', overrides=['logging.wandb=offline']).config\n"
        "WandbRuns(config, 1, None, print).start(folder); print('started', flush=True); sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"started\n"
        others = [process for process in marked(mark) if process.pid != owner.pid]
        assert len(others) == 1
        # also once wandb's service is there
        deadline = time.monotonic() + 60
        while not list((tmp_path / "run").glob("wandb/*/*.wandb")) and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        others = [process for process in marked(mark) if process.pid != owner.pid]
        assert len(others) >= 2
        owner.kill()
    assert psutil.wait_procs(others, timeout=5)[1] == []
    assert marked(mark) == []


@pytest.mark.slow
def test_a_real_run_of_two_ranks_leaves_its_offline_files_and_no_process(tmp_path: Path, mark: str) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "my-run"
    overrides = ["logging.wandb=offline", "training.track_gradients=true", "cluster.metrics_log_interval=5"]
    ended = subprocess.run(
        [
            sys.executable, "-c", "from smolcluster.cli import main; main()", "train", "--preset", "classicdp_digits",
            "--local", "2", "--max-steps", "12", "--out", str(folder),
            *(word for value in overrides for word in ("--override", value)),
        ],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "W&B" not in ended.stderr
    assert marked(mark) == []
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    runs = offline_runs(folder)
    host = socket.gethostname().split(".")[0]
    assert [run.name for run in runs] == [f"classicdp-{host}-rank{rank}_lr0.001_bs16" for rank in range(2)]
    for rank, run in enumerate(runs):
        assert (run.group, run.exit_code, run.summary["steps"]) == ("my-run", 0, 12)
        own = {row["step"]: row for row in rows if row["rank"] == rank}
        assert [point["_step"] for point in run.points] == [0, 10, 11]
        last = run.points[-1]
        for key in ("train/loss", "train/grad_norm", "val/loss", "val/accuracy", "time/step_s"):
            assert last[key] == own[11][key]
        assert sum(key.startswith("grad_norm/") for key in last) == 4  # two layers, each with weight and bias
        assert run.points[1]["sys/rss_bytes"] == own[10]["sys/rss_bytes"]
        assert all("link/sent_bytes" in point for point in run.points)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (None, ModuleSpec("wandb", None)):  # the second: a folder wandb/ in the working directory
        monkeypatch.setattr("smolcluster.monitoring.wandb_runs.find_spec", lambda name, spec=spec: spec)
        with pytest.raises(
            ConfigError, match=r'wandb is not installed\. Install it: pip install "smolcluster\[wandb\]"'
        ):
            WandbRuns(make_config("offline"), 1, None, print)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'wandb'"), ValueError("wandb.__spec__ is None")]
)
def test_a_blocked_package_is_a_missing_one(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(name: str) -> None:
        raise error

    monkeypatch.setattr("smolcluster.monitoring.wandb_runs.find_spec", blocked)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        WandbRuns(make_config("offline"), 1, None, print)


def test_a_run_is_named_by_algorithm_machine_rank_learning_rate_and_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "attic.local")
    config = make_config("offline", "training.learning_rate=6e-4", "training.batch_size=8")
    assert run_name(config, 2, None) == "classicdp-attic-rank2_lr0.0006_bs8"
    assert run_name(config, 1, ["mini1", "pi5"]) == "classicdp-pi5-rank1_lr0.0006_bs8"
    assert run_name(config, 1, ["rank0", "rank1"]) == "classicdp-rank1_lr0.0006_bs8"


def test_a_ranks_summary_is_the_runs_and_its_own() -> None:
    summary: Any = {
        "train_loss": 0.5,
        "val_loss": None,
        "lost_ranks": [],
        "rank_samples": [3, 4],
        "sent_bytes": [9, None],
    }
    assert rank_summary(summary, 1) == {"train_loss": 0.5, "rank_samples": 4}
    assert rank_summary({}, 0) == {}


def test_the_oldest_entry_makes_room() -> None:
    queue = DroppingQueue(limit=2)
    for entry in "abc":
        queue.put(entry)
    assert (queue.get(), queue.get(), queue.dropped) == ("b", "c", 1)
