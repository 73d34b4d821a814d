"""One rank of `--local N`, started by local.py as `python -m smolcluster.run.rank`. Speaks to its parent only.

Nothing at the top imports torch: rank 0 listens, and says where, before the seconds that this takes.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from smolcluster.config.schema import Config
from smolcluster.errors import ClusterError, CollectiveTimeout, PeerLost, RendezvousTimeout, SmolError, TransportError
from smolcluster.kinds import JsonObject
from smolcluster.log import log_to_file
from smolcluster.run.parent import ParentLink
from smolcluster.run.supervisor import EXIT_FAILED, EXIT_INTERRUPTED
from smolcluster.run.support import PARAMETER_SERVERS, shared_options, tcp_options
from smolcluster.transport.tcp import TcpNetwork, listen

if TYPE_CHECKING:
    from smolcluster.cluster.world import World
    from smolcluster.collectives.base import Communicator
    from smolcluster.transport.base import Listener

logger = logging.getLogger("smolcluster.run.rank")  # it is run as __main__

LOOPBACK = "127.0.0.1"
# Progress is for eyes: more often costs a fast run time in the parent.
_PROGRESS_INTERVAL_S = 0.1


class Bootstrap(BaseModel):
    """The first message that a rank gets. Holds the token: never logged."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    rank: int
    names: list[str]
    config: Config
    token: str = Field(repr=False)
    """In hex."""
    run_id: str
    init_file: str | None
    """Where the ranks of backend gloo and nccl find each other."""
    log_path: Path
    checkpoints: Path
    resume: Path | None = None
    """The checkpoint to go on from."""
    restarts: int = 0
    """How often this rank was started before in this run."""
    skip_nonfinite: bool = False
    trace: Path | None = None
    """Where rank 0 writes the trace."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return len(self.names)


class _PipeSink:
    """Rows and progress as lines to the parent."""

    def __init__(self, link: ParentLink, rank: int) -> None:
        self._link = link
        self._shows_progress = rank == 0
        self._shown_at = 0.0

    def write(self, row: JsonObject) -> None:
        self._link.tell({"event": "row", "row": row})

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        now = time.monotonic()
        is_due = done == total or "val/loss" in row or now - self._shown_at >= _PROGRESS_INTERVAL_S
        if self._shows_progress and is_due:
            self._shown_at = now
            self._link.tell({"event": "progress", "done": done, "total": total, "row": row})


def main() -> None:
    """Run the rank that the parent describes; ends the process."""
    faulthandler.enable()  # a crash in native code leaves its stack in the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    link = ParentLink()
    start = Bootstrap.model_validate(link.bootstrap())
    log_to_file(start.log_path)
    logger.info("rank started rank=%d world_size=%d pid=%d", start.rank, start.world_size, os.getpid())
    link.tell({"event": "started"})  # one that is started again is told what the others know
    try:
        exit_code = _Rank(link, start).run()
    except BaseException as error:
        logger.exception("rank failed rank=%d", start.rank)
        link.tell(error_event(start.rank, error, start.log_path, consequence=is_consequence(error)))
        exit_code = error.exit_code if isinstance(error, SmolError) else EXIT_FAILED
    logging.shutdown()
    # Not sys.exit: after an error, destructors of torch.distributed may wait for ranks that are gone.
    os._exit(exit_code)


def is_consequence(error: BaseException) -> bool:
    """Whether an error only says that another rank failed."""
    return isinstance(error, PeerLost | RendezvousTimeout | CollectiveTimeout | TransportError)


def error_event(rank: int, error: BaseException, log_path: Path | None, *, consequence: bool) -> JsonObject:
    """What a rank tells of its error."""
    message = str(error)
    if not isinstance(error, SmolError):
        where = "" if log_path is None else f" Its log has the traceback: {log_path}"
        message = f"rank {rank} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}.{where}"
    return {
        "event": "error",
        "message": message,
        "exit_code": error.exit_code if isinstance(error, SmolError) else EXIT_FAILED,
        "consequence": consequence,
        "lost": error.rank if isinstance(error, PeerLost) else None,
    }


class _Failure:
    """What ended the run from outside, if anything did."""

    def __init__(self) -> None:
        self._error: SmolError | None = None

    def set(self, error: SmolError) -> None:
        """The first counts."""
        self._error = self._error or error

    def get(self) -> SmolError | None:
        """None: it goes on."""
        return self._error


class _Rank:
    """The run of this process."""

    def __init__(self, link: ParentLink, start: Bootstrap) -> None:
        self._link = link
        self._start = start
        self._told: BaseException | None = None  # the error of which the parent knows

    def run(self) -> int:
        """Train; returns the exit code."""
        if self._start.config.algorithm in PARAMETER_SERVERS:
            return self._serve() if self._start.rank == 0 else self._work()
        start = self._start
        over_tcp = start.world_size > 1 and start.config.backend == "tcp"
        listener = self._listen() if over_tcp else None

        # From here on torch is imported.
        from smolcluster.run.build import prepare
        from smolcluster.run.session import run_rank
        from smolcluster.training.role import RunContext

        parts = prepare(start.config, start.rank, start.names, local_rank=start.rank)
        world, comm = self._join(listener)
        stop = threading.Event()
        self._link.attach(stop.set, comm.abort)
        if world is not None:
            world.on_failure(self._tell_of_loss)
        try:
            result = run_rank(
                parts,
                comm,
                RunContext(_PipeSink(self._link, start.rank), comm, stop),
                checkpoints=start.checkpoints if start.rank == 0 else None,
                resume=start.resume if start.rank == 0 else None,
                skip_nonfinite=start.skip_nonfinite,
                trace=start.trace if start.rank == 0 else None,
                name=start.names[start.rank],
                deliver=lambda _comm: self._link.deliver(),
                say=self._say if start.rank == 0 else None,
            )
        except Exception as error:  # noqa: BLE001 - told to the parent and to the other ranks
            return self._fail(error, world, comm)
        if result.note is not None:
            self._say(result.note)
        if start.rank == 0:
            self._link.tell({"event": "result", "run": result.run, "ranks": [*result.ranks], "stopped": result.stopped})
        comm.close()
        return EXIT_INTERRUPTED if result.stopped else 0

    def _listen(self) -> Listener:
        start = self._start
        sockets, token = tcp_options(start.config), bytes.fromhex(start.token)
        listener = listen(LOOPBACK, 0, token=token, run_id=start.run_id, rank=start.rank, options=sockets)
        self._link.tell({"event": "listening", "address": listener.address})
        return listener

    def _serve(self) -> int:
        """Be the parameter server."""
        start, listener = self._start, self._listen()
        from smolcluster.run.build import prepare
        from smolcluster.run.param_server import run_server
        from smolcluster.training.role import RunContext

        parts = prepare(start.config, start.rank, start.names)
        stop, failure = threading.Event(), _Failure()
        self._link.attach(stop.set, failure.set)
        result = run_server(
            parts,
            [listener],
            start.names,
            RunContext(_PipeSink(self._link, start.rank), None, stop),
            options=shared_options(start.config),
            folder=start.checkpoints.parent,
            resume=start.resume,
            restarts=start.restarts,
            skip_nonfinite=start.skip_nonfinite,
            trace=start.trace,
            deliver=self._link.deliver,
            note=lambda text: self._link.tell({"event": "note", "text": text}),
            ended=failure.get,
        )
        if result.note is not None:
            self._link.tell({"event": "note", "text": result.note})
        self._link.tell({"event": "result", "run": result.run, "ranks": [*result.ranks], "stopped": result.stopped})
        return EXIT_INTERRUPTED if result.stopped else 0

    def _work(self) -> int:
        """Be a worker of the parameter server."""
        start = self._start
        from smolcluster.run.build import prepare
        from smolcluster.run.param_server import run_worker
        from smolcluster.training.role import RunContext

        parts = prepare(start.config, start.rank, start.names, local_rank=start.rank - 1)
        sockets = tcp_options(start.config)
        run_worker(
            parts,
            TcpNetwork(bytes.fromhex(start.token), sockets),
            self._link.leader_address,
            start.names[start.rank],
            # The server ends a run that is asked to stop; a worker computes as long as it lends.
            RunContext(_PipeSink(self._link, start.rank), None, threading.Event()),
            run_id=start.run_id,
            address=f"tcp://{LOOPBACK}:0",
            options=shared_options(start.config),
            attach=lambda port: self._link.attach(lambda: None, port.abort),
        )
        return 0

    def _join(self, listener: Listener | None) -> tuple[World | None, Communicator]:
        from smolcluster.run.connect import alone, join_tcp, join_torch

        start = self._start
        if listener is not None:
            return join_tcp(
                rank=start.rank,
                world_size=start.world_size,
                name=start.names[start.rank],
                listener=listener,
                token=bytes.fromhex(start.token),
                leader_address=listener.address if start.rank == 0 else self._link.leader_address(),
                run_id=start.run_id,
                patience=start.config.cluster.patience,
                options=shared_options(start.config),
                buffer_bytes=tcp_options(start.config).buffer_bytes,
                tls=start.config.cluster.tls,
                shared_memory=tcp_options(start.config).shared_memory,
            )
        if start.world_size == 1:
            return None, alone()
        assert start.init_file is not None
        method, patience = Path(start.init_file).absolute().as_uri(), start.config.cluster.patience
        return None, join_torch(start.config.backend, start.rank, start.world_size, method, patience)

    def _say(self, text: str) -> None:
        self._link.tell({"event": "note", "text": text})

    def _tell_of_loss(self, error: SmolError) -> None:
        """At once, on the thread that notices it: this rank may compute for long before it needs the lost one."""
        if self._told is None:
            self._told = error
            self._link.tell(error_event(self._start.rank, error, self._start.log_path, consequence=True))

    def _fail(self, error: Exception, world: World | None, comm: Communicator) -> int:
        """Tell the parent first: what the other ranks say then counts as a consequence. Then end the other ranks."""
        logger.exception("rank failed rank=%d", self._start.rank)
        told_by_others = world is not None and world.error() is not None
        consequence = told_by_others or is_consequence(error)
        event = error_event(self._start.rank, error, self._start.log_path, consequence=consequence)
        if self._told is not error:
            self._told = error
            self._link.tell(event)
        comm.abort(error if isinstance(error, SmolError) else ClusterError(str(event["message"])))
        return error.exit_code if isinstance(error, SmolError) else EXIT_FAILED


if __name__ == "__main__":
    main()
