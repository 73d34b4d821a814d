"""A run at Weights & Biases: one W&B run per rank, in one group. What speaks to W&B is another process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from smolcluster.config.schema import Config, resolved_batch_size
from smolcluster.errors import ConfigError
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.monitoring.summary import RANK_KEYS, RUN_KEYS
from smolcluster.monitoring.wandb_process import DroppingQueue, end_descendants
from smolcluster.transport.security import TOKEN_VARIABLE

# Offline everything is written within a second. Online a slow line gets so long to send what is still on the way.
FINISH_S = 10.0
# A run that was stopped or that failed has its own limits to keep.
HURRY_S = 0.5
# Would make all ranks one run, or belong to another process of wandb's; and what is none of its business.
_NOT_PASSED_ON = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SERVICE", TOKEN_VARIABLE)
_END = ""


class WandbRuns:
    """Sends the rows of all ranks to W&B, or into offline files below the run folder.

    `write` may be called from any thread and never waits: what W&B is too slow for is dropped. Everything else from
    one thread.

    Args:
        config: `logging` decides where to and how often.
        world_size: ranks of the run.
        names: the machine of each rank, by its name in the cluster file; None: all are on this one.
        note: shows a line to the user; called from a thread of this object's.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(
        self, config: Config, world_size: int, names: Sequence[str] | None, note: Callable[[str], None]
    ) -> None:
        if not _is_installed():
            raise ConfigError(
                f"logging.wandb is {config.logging.wandb}, but the package wandb is not installed. Install it: "
                'pip install "smolcluster[wandb]", or set logging.wandb to off'
            )
        self._config = config
        self._rank_names = [run_name(config, rank, names) for rank in range(world_size)]
        self._note = note
        self._collected: dict[int, JsonObject] = {}
        self._lock = threading.Lock()
        self._queue = DroppingQueue()
        self._folder = Path()
        self._process: subprocess.Popen[str] | None = None
        self._threads: list[threading.Thread] = []
        self._deadline: float | None = None

    def start(self, folder: Path) -> None:
        """Start the process that speaks to W&B; does not wait for it."""
        log_path = folder / "logs" / "wandb.log"
        try:
            with log_path.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "smolcluster.monitoring.wandb_process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                    bufsize=1,
                    env=_environment(),
                    start_new_session=True,  # a Ctrl-C in the terminal is for the run, which then ends this process
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
        except OSError as exc:
            self._note(f"W&B: it cannot be started ({exc.strerror or exc}). metrics.jsonl holds everything")
            return
        config = self._config.model_dump(mode="json")
        config["cluster"].pop("ssh", None)  # how to log in to the machines
        start: JsonObject = {
            "mode": self._config.logging.wandb,
            "project": self._config.logging.project_name,
            "group": folder.absolute().name,
            "folder": str(folder.absolute()),
            "rank_names": [*self._rank_names],
            "config": config,
        }
        self._folder = folder
        self._threads = [
            threading.Thread(
                target=_feed, args=(process, json.dumps(start), self._queue), name="wandb-feed", daemon=True
            ),
            threading.Thread(target=_hear, args=(process, self._note), name="wandb-notes", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._process = process

    def write(self, row: JsonObject) -> None:
        """Take a row of any rank. Not every row becomes a point; a point has the newest of each metric since the last.

        Args:
            row: as in metrics.jsonl.
        """
        rank, step = row.get("rank"), row.get("step")
        if self._process is None or not isinstance(rank, int) or not isinstance(step, int):
            return
        with self._lock:
            collected = self._collected.setdefault(rank, {})
            collected |= row
            if step % self._config.logging.log_interval == 0 or "val/loss" in row:
                self._send(self._collected.pop(rank))

    def finish(self, summary: JsonObject, *, exit_code: int = 0) -> None:
        """End the W&B runs; does not wait: `close` does. Only the first call counts.

        Args:
            summary: what stands in summary.json.
            exit_code: 0: the run ended as it should, and has time to wait for what is still on the way.
        """
        if self._process is None or self._deadline is not None:
            return
        with self._lock:
            for collected in self._collected.values():
                self._send(collected)
            self._collected.clear()
        summaries: list[JsonValue] = [rank_summary(summary, rank) for rank in range(len(self._rank_names))]
        self._queue.put(json.dumps({"exit_code": exit_code, "summaries": summaries}))
        self._deadline = time.monotonic() + (FINISH_S if exit_code == 0 else HURRY_S)

    def close(self) -> None:
        """Wait within `finish`'s limit for W&B, then end its process in any case. No process is left."""
        self.finish({}, exit_code=1)
        process, self._process = self._process, None
        if process is None:
            return
        assert self._deadline is not None
        try:
            process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._note(
                "W&B: it has not taken everything in time; metrics.jsonl holds it all. Send what is in its files: "
                f"wandb sync {self._folder / 'wandb' / '*run-*'}"
            )
        finally:
            end_descendants(process.pid)
            process.kill()
            process.wait()
            self._queue.put(_END)
            for thread in self._threads:
                thread.join(timeout=1)
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
        if self._queue.dropped:
            self._note(f"W&B: it was too slow, {self._queue.dropped} points are missing there; metrics.jsonl has them")

    def _send(self, row: JsonObject) -> None:
        point: JsonObject = {key: value for key, value in row.items() if isinstance(value, int | float)}
        rank, step, at = point.pop("rank"), point.pop("step"), point.pop("time", None)
        if at is not None:
            point["_timestamp"] = at  # wandb's own name: else it takes the time of arrival
        self._queue.put(json.dumps({"rank": rank, "step": step, "point": point}))


def _is_installed() -> bool:
    """Whether wandb can be found. Not imported here: this process trains, or answers for those that do."""
    try:
        spec = find_spec("wandb")
    except (ImportError, ValueError):  # somebody blocks it
        return False
    return spec is not None and spec.origin is not None  # without origin: a folder `wandb/` that offline runs left here


def run_name(config: Config, rank: int, names: Sequence[str] | None) -> str:
    """What a rank's run is called: algorithm, machine, rank, learning rate and its batch size."""
    if names is None:
        where = f"{socket.gethostname().split('.')[0]}-rank{rank}"
    elif names[rank] == f"rank{rank}":
        where = names[rank]  # a launcher's job: it numbers the ranks and does not say where they are
    else:
        where = f"{names[rank]}-rank{rank}"
    learning_rate, batch_size = config.training.learning_rate, resolved_batch_size(config)
    return f"{config.algorithm}-{where}_lr{learning_rate:g}_bs{batch_size}"


def rank_summary(summary: Mapping[str, JsonValue], rank: int) -> JsonObject:
    """What of summary.json belongs to one rank's W&B run: the whole run's results, and its own."""
    result: JsonObject = {key: summary[key] for key in RUN_KEYS if summary.get(key) not in (None, [])}
    for key in RANK_KEYS:
        values = summary.get(key)
        if isinstance(values, list) and rank < len(values) and values[rank] is not None:
            result[key] = values[rank]
    return result


def _feed(process: subprocess.Popen[str], start: str, queue: DroppingQueue) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # it ended by itself; its notes have said why
        line = start
        while line != _END:
            process.stdin.write(line + "\n")
            line = queue.get()


def _hear(process: subprocess.Popen[str], note: Callable[[str], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        note(line.rstrip("\n"))


def _environment() -> dict[str, str]:
    """The other process runs the code that this one runs, also from a checkout that is not installed."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    environment.setdefault("WANDB_ERROR_REPORTING", "false")  # what goes wrong is for the log, not for the network
    root = Path(__file__).parents[2]
    if root not in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        environment["PYTHONPATH"] = os.pathsep.join(
            path for path in (str(root), environment.get("PYTHONPATH", "")) if path
        )
    return environment
