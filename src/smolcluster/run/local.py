"""`--local N`: the ranks of a run as N fresh processes of this machine, seen to their end by this one.

This process imports no torch. It owns the run folder: the ranks send it their rows, and rank 0 the result.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import smolcluster
from smolcluster.config.schema import Config
from smolcluster.errors import CheckpointError, TrainingStopped
from smolcluster.kinds import JsonObject
from smolcluster.log import log_to_file
from smolcluster.monitoring.reporters import Reporter
from smolcluster.run.folder import Ran, RunFolder
from smolcluster.run.rank import Bootstrap
from smolcluster.run.resume import ResumePoint, find_resume_point
from smolcluster.run.supervisor import EXIT_FAILED, ChildSpec, Elastic, Outcome, Supervisor
from smolcluster.run.support import PARAMETER_SERVERS, check_supported, min_ranks, rank_weights
from smolcluster.transport.security import new_token

logger = logging.getLogger(__name__)


def run_local(
    config: Config,
    world_size: int,
    out: Path,
    reporter: Reporter,
    *,
    resume: ResumePoint | None = None,
    skip_nonfinite: bool = False,
    trace: bool = False,
    respawn: bool = False,
) -> Ran:
    """Train with `world_size` ranks on this machine; blocks. No process is left when it returns or raises.

    Args:
        config: the resolved configuration; host names and addresses in it are not used.
        world_size: ranks.
        out: the run folder.
        reporter: shows progress.
        resume: the checkpoint to go on from; None: the run begins.
        skip_nonfinite: pass over updates that are not finite instead of stopping.
        trace: write trace.json.
        respawn: start ranks that die again: with a parameter server those alone, else all from the newest checkpoint.

    Raises:
        ConfigError: this release cannot do what the configuration asks for, or the folder is taken.
    """
    check_supported(config, world_size)
    names = [f"rank{rank}" for rank in range(world_size)]
    rank_weights(config, names)
    while True:
        ran = _run_once(config, names, out, reporter, resume, skip_nonfinite, trace, respawn)
        if ran.exit_code != EXIT_FAILED or not respawn or config.algorithm in PARAMETER_SERVERS:
            return ran
        reporter.note(f"{ran.error}")
        before = None if resume is None else resume.step
        try:
            resume = find_resume_point(str(out), out, {})
        except CheckpointError:
            return ran
        if resume.step == before:  # it got no further than the last time: it would not now either
            return ran
        reporter.note(f"starting all ranks again from {resume.checkpoint}")


def _run_once(
    config: Config,
    names: Sequence[str],
    out: Path,
    reporter: Reporter,
    resume: ResumePoint | None,
    skip_nonfinite: bool,
    trace: bool,
    respawn: bool,
) -> Ran:
    # A folder that a SIGKILL leaves behind, so only where torch.distributed needs a file to meet at.
    meets_at_file = config.backend != "tcp" and len(names) > 1
    scratch_folder = tempfile.TemporaryDirectory(prefix="smolcluster-") if meets_at_file else contextlib.nullcontext()
    with (
        RunFolder(out, config, len(names), reporter, None if resume is None else resume.step) as folder,
        scratch_folder as scratch,
    ):
        handler = log_to_file(folder.path / "logs" / "launcher.log")
        try:
            return _LocalRun(config, names, folder, scratch, resume, skip_nonfinite, trace, respawn).run()
        finally:
            logging.getLogger("smolcluster").removeHandler(handler)
            handler.close()


class _LocalRun:
    """What the messages of the ranks change."""

    def __init__(
        self,
        config: Config,
        names: Sequence[str],
        folder: RunFolder,
        scratch: str | None,
        resume: ResumePoint | None,
        skip_nonfinite: bool,
        trace: bool,
        respawn: bool,
    ) -> None:
        self._folder = folder
        self._resume = resume
        self._result: JsonObject | None = None
        self._leader: str | None = None
        self._restarts = 0 if resume is None else resume.meta.restarts + 1
        token, run_id = new_token().hex(), os.urandom(8).hex()
        self._bootstraps = [
            Bootstrap(
                rank=rank,
                names=list(names),
                config=config,
                token=token,
                run_id=run_id,
                init_file=None if scratch is None else str(Path(scratch, "rendezvous")),
                log_path=folder.log_path(rank).absolute(),
                checkpoints=folder.checkpoints.absolute(),
                resume=None if resume is None else resume.checkpoint.absolute(),
                skip_nonfinite=skip_nonfinite,
                trace=folder.trace.absolute() if trace else None,
            )
            for rank in range(len(names))
        ]
        specs = [self._spec(bootstrap) for bootstrap in self._bootstraps]
        is_elastic = config.algorithm in PARAMETER_SERVERS
        elastic = Elastic(min_ranks(config, len(names)), self._again if respawn else None) if is_elastic else None
        self._others = range(1, len(names))
        self._supervisor = Supervisor(
            specs,
            self._hear,
            patience=config.cluster.patience,
            on_stop=lambda: folder.note("stopping after this step; Ctrl-C again ends at once"),
            elastic=elastic,
        )

    def _spec(self, bootstrap: Bootstrap) -> ChildSpec:
        return ChildSpec(
            rank=bootstrap.rank,
            command=[sys.executable, "-m", "smolcluster.run.rank"],
            bootstrap=bootstrap.model_dump(mode="json"),
            log_path=self._folder.log_path(bootstrap.rank),
            environment=child_environment(),
        )

    def _again(self, rank: int) -> ChildSpec:
        """How a rank that died is started again. The server goes back to its newest checkpoint, and its rows too."""
        bootstrap = self._bootstraps[rank]
        self._folder.note(f"rank {rank} died and is started again")
        if rank == 0:
            checkpoint: Path | None
            try:
                point = find_resume_point(str(self._folder.checkpoints), None, {})
                checkpoint, step = point.checkpoint.absolute(), point.step
            except CheckpointError:  # none of its own yet: back to where this run began
                checkpoint, step = bootstrap.resume, 0 if self._resume is None else self._resume.step
            self._folder.rewind(step)
            self._restarts += 1
            bootstrap = bootstrap.model_copy(update={"resume": checkpoint, "restarts": self._restarts})
        return self._spec(bootstrap)

    def run(self) -> Ran:
        try:
            outcome = self._supervisor.run()
        except TrainingStopped as full_disk:  # this process writes the metrics
            return Ran(full_disk.exit_code, self._folder.path, self._folder.fail(), str(full_disk))
        error = outcome.failure.message if outcome.failure is not None else None
        if self._result is None:
            if outcome.exit_code == 0:
                return self._ended(3, "the ranks ended without a result. Look at their logs", outcome)
            return self._ended(outcome.exit_code, error, outcome)
        run, ranks = cast(JsonObject, self._result["run"]), cast("list[JsonObject]", self._result["ranks"])
        summary = self._folder.finish(run, ranks, exit_code=outcome.exit_code)
        return Ran(outcome.exit_code, self._folder.path, summary, error)

    def _ended(self, exit_code: int, error: str | None, outcome: Outcome) -> Ran:
        # Lost is who fell silent or died; a rank that said why it stops is not lost but wrong.
        lost = sorted({failure.rank for failure in outcome.failures if failure.died})
        if not lost and outcome.failure is not None and outcome.failure.consequence:
            lost = list(outcome.killed) if outcome.failure.lost is None else [outcome.failure.lost]
        return Ran(exit_code, self._folder.path, self._folder.fail(lost, has_time=not outcome.interrupted), error)

    def _hear(self, rank: int, message: JsonObject) -> None:
        event = message.get("event")
        if event == "row":
            self._folder.write(cast(JsonObject, message["row"]))
        elif event == "progress":
            done, total = cast(int, message["done"]), cast(int, message["total"])
            self._folder.progress(done, total, cast(JsonObject, message["row"]))
        elif event == "rows_end":
            self._folder.sync()
            self._supervisor.tell(rank, {"command": "rows_written"})
        elif event == "note":
            self._folder.note(str(message["text"]))
        elif event == "started" and rank > 0:
            if self._leader is not None:
                self._supervisor.tell(rank, {"command": "leader", "address": self._leader})
        elif event == "listening" and rank == 0:
            self._leader = str(message["address"])
            for other in self._others:
                self._supervisor.tell(other, {"command": "leader", "address": message["address"]})
        elif event == "result":
            self._result = message


def child_environment() -> dict[str, str]:
    """What child processes need besides, to run the code that this process runs, also from a checkout."""
    root = Path(smolcluster.__file__).parent.parent
    installed = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    if root in installed:
        return {}  # and not on PYTHONPATH: there it would come before the standard library
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
