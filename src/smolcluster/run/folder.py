"""The run folder: everything that a run leaves behind, written by the one process that owns it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from smolcluster.config.dump import config_yaml
from smolcluster.config.schema import Config, reads_text
from smolcluster.errors import ConfigError, TrainingStopped
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.monitoring.curves import LossCurves, draw_losses
from smolcluster.monitoring.metrics import MetricsFile, keep_rows_before, read_rows
from smolcluster.monitoring.reporters import Reporter
from smolcluster.monitoring.summary import build_summary, write_summary
from smolcluster.monitoring.wandb_runs import WandbRuns

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Ran:
    """How a run ended, for whoever started it.

    Attributes:
        exit_code: what the process exits with.
        out: the run folder; None on ranks that do not own it.
        summary: what stands in summary.json; None on ranks that do not own it.
        error: one or two lines for the user.
    """

    exit_code: int
    out: Path | None = None
    summary: JsonObject | None = None
    error: str | None = None


class RunFolder:
    """Owns `config.yaml`, `metrics.jsonl`, `summary.json` and `loss.png` of one run, and shows its progress.

    `write` and `sync` may be called from any thread; everything else from one.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        world_size: int,
        reporter: Reporter,
        resume_step: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Make the folder, or take it up again.

        Args:
            path: where.
            config: the resolved configuration.
            world_size: all ranks.
            reporter: shows progress.
            resume_step: updates that the run has already; rows of later ones are dropped. None: it begins.
            names: the machine of each rank; None: all are on this one.

        Raises:
            ConfigError: it holds a run already, or cannot be made; or wandb is wanted and not installed.
        """
        is_wandb_on = config.logging.wandb != "off"
        self._wandb = WandbRuns(config, world_size, names, reporter.note) if is_wandb_on else None
        self.path = path
        self._config = config
        self._world_size = world_size
        self._reporter = reporter
        self._curves = LossCurves()
        self._last: JsonObject = {}
        self._samples = 0
        self._went_on = resume_step is None  # else with the first row
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._closed = False
        try:
            path.mkdir(parents=True, exist_ok=True)
            metrics = path / METRICS
            if metrics.exists() and metrics.stat().st_size > 0:
                if resume_step is None:
                    raise ConfigError(
                        f"--out {path} holds a run already. Give another folder, remove that one, or go on with "
                        "--resume latest"
                    )
                keep_rows_before(metrics, resume_step)
                for row in read_rows(metrics):
                    self._note_row(row)
            (path / "logs").mkdir(exist_ok=True)
            (path / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
            self._metrics = MetricsFile(metrics)
        except OSError as exc:
            raise ConfigError(
                f"the run folder {path} cannot be made ({exc.strerror or exc}). Give another one with --out"
            ) from exc
        if self._wandb is not None:
            self._wandb.start(path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def log_path(self, rank: int) -> Path:
        """Where a rank's log goes."""
        return self.path / "logs" / f"rank{rank}.log"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def trace(self) -> Path:
        """Where --trace goes."""
        return self.path / "trace.json"

    def write(self, row: JsonObject) -> None:
        """Take a row of any rank."""
        with self._lock:
            if self._closed:
                return  # a late row of a rank that was slow to hear of the end
            self._metrics.write(row)
            self._went_on = True
            self._note_row(row)
            if self._wandb is not None:
                self._wandb.write(row)

    def sync(self) -> None:
        """Wait until the rows so far are on the disk.

        Raises:
            TrainingStopped: the disk is full.
        """
        with self._lock:
            if not self._closed:
                self._metrics.sync()

    def rewind(self, step: int) -> None:
        """Forget the rows of `step` and later ones: the run goes on from a checkpoint of `step` updates."""
        with self._lock:
            self._metrics.close()
            keep_rows_before(self.path / METRICS, step)
            self._curves, self._last, self._samples = LossCurves(), {}, 0
            for row in read_rows(self.path / METRICS):
                self._note_row(row)
            self._metrics = MetricsFile(self.path / METRICS)

    def _note_row(self, row: JsonObject) -> None:
        self._curves.add(row)
        if row.get("rank") == 0:
            self._last |= row
            samples = row.get("train/samples")
            self._samples += samples if isinstance(samples, int) else 0

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """Show how far it is."""
        self._reporter.progress(done, total, row)

    def note(self, text: str) -> None:
        """Show a line."""
        self._reporter.note(text)

    def finish(
        self, run: Mapping[str, JsonValue], ranks: Sequence[Mapping[str, JsonValue] | None], *, exit_code: int = 0
    ) -> JsonObject:
        """Write summary and picture of a run that ended as it should, or that the user stopped; the summary."""
        return self._conclude({**self._known(), **run}, ranks, draw=True, exit_code=exit_code)

    def fail(self, lost_ranks: Sequence[int] = (), *, has_time: bool = True) -> JsonObject:
        """The same for a run that broke off: with what is known from the rows.

        A run that was to go on and broke off before it did keeps the summary that it has.

        Args:
            lost_ranks: who is gone.
            has_time: False: no picture. A lost rank ends the run within patience + 2 s, and matplotlib takes one.
        """
        last = self._last
        partial: JsonObject = {
            "steps": len(self._curves.steps),
            "samples": self._samples,
            "wall_s": time.monotonic() - self._started,
            "train_loss": last.get("train/loss"),
            "val_loss": last.get("val/loss"),
            "val_accuracy": last.get("val/accuracy"),
            "val_perplexity": last.get("val/perplexity"),
            "lost_ranks": [*lost_ranks],
        }
        draw = has_time and not lost_ranks and bool(self._curves.steps)
        values, ranks = {**self._known(), **partial}, [None] * self._world_size
        try:
            return self._conclude(values, ranks, draw=draw, exit_code=1, is_failure=True)
        except TrainingStopped as error:  # the disk is full, which is mostly why the run broke off: one line says so
            logger.info("no summary reason=%s", error)
            return build_summary(values, ranks)

    def close(self) -> None:
        """Close the files and give the terminal back."""
        self._reporter.close()
        with self._lock:
            self._closed = True
            self._metrics.close()
        if self._wandb is not None:
            self._wandb.close()

    def _known(self) -> dict[str, JsonValue]:
        config = self._config
        return {"algorithm": config.algorithm, "model": config.model.type, "world_size": self._world_size}

    def _conclude(
        self,
        run: Mapping[str, JsonValue],
        ranks: Sequence[Mapping[str, JsonValue] | None],
        *,
        draw: bool,
        exit_code: int,
        is_failure: bool = False,
    ) -> JsonObject:
        self._reporter.close()
        summary = build_summary(run, ranks)
        if self._wandb is not None:
            self._wandb.finish(summary, exit_code=exit_code)
        if self._went_on or not is_failure:
            write_summary(self.path / "summary.json", summary)
        count = f"{self._world_size} ranks" if self._world_size > 1 else "one process"
        if not draw:
            return summary
        title = f"{self._config.algorithm}, {self._config.model.type} on {self._config.data.dataset}, {count}"
        note = draw_losses(self._curves, self.path / "loss.png", title, loss_unit(self._config))
        if note is not None and not is_failure:  # why it failed is told in one line
            self._reporter.note(note)
        return summary


def default_out(config: Config) -> Path:
    """`runs/<algorithm>-<model>-<timestamp>`, one that does not exist yet."""
    model = config.model.type.rsplit(":", 1)[-1]
    name = f"{config.algorithm}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path("runs", name), 1
    while path.exists():  # two runs in one second
        number += 1
        path = Path("runs", f"{name}-{number}")
    return path


def loss_unit(config: Config) -> str:
    """What a loss of this run is counted in."""
    if not reads_text(config):
        return "nats"
    return "nats per byte" if config.data.tokenizer == "bytes" else "nats per token"


def rate_unit(config: Config) -> str:
    """What the speed is counted in: targets are tokens for texts, else samples."""
    return "tokens" if reads_text(config) else "samples"
