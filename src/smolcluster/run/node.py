"""A rank that is this process: a machine of a cluster file, a process of a launcher's job, or a run of one process.

Rank 0 owns the run folder; mail.py brings it what the other ranks have to tell.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import psutil

from smolcluster.config.hosts import Host, members
from smolcluster.config.schema import Config
from smolcluster.errors import ClusterError, ConfigError, PeerLost, SmolError
from smolcluster.log import log_to_file
from smolcluster.monitoring.reporters import Reporter
from smolcluster.run.folder import Ran, RunFolder
from smolcluster.run.launcher import Launch
from smolcluster.run.mail import Mail
from smolcluster.run.resume import ResumePoint
from smolcluster.run.supervisor import EXIT_FAILED, EXIT_INTERRUPTED
from smolcluster.run.support import (
    PARAMETER_SERVERS,
    check_supported,
    exposure,
    rank_weights,
    shared_options,
    tcp_options,
)
from smolcluster.transport.security import load_token
from smolcluster.transport.tcp import listen

if TYPE_CHECKING:
    from smolcluster.cluster.world import World
    from smolcluster.collectives.base import Communicator
    from smolcluster.run.build import Parts

logger = logging.getLogger(__name__)

# Ctrl-C ends within 10 s (CONTRACT section 2); one is left for leaving.
STOP_LIMIT_S = 9.0
# A lost rank ends the run within patience + 2 s. Who computes, and so hears of nothing, is ended so long after the loss
# was noticed. That is after the patience, or with half a frame a second later.
LOSS_LIMIT_S = 0.8


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What the user said besides the configuration.

    Attributes:
        out: the run folder; only rank 0 uses it.
        reporter: shows progress; only rank 0 uses it.
        token_file: where the cluster token is.
        resume: the checkpoint to go on from; only rank 0 uses it.
        skip_nonfinite: pass over updates that are not finite instead of stopping.
        trace: write trace.json; rank 0 decides.
    """

    out: Path
    reporter: Reporter
    token_file: Path | None = None
    resume: ResumePoint | None = None
    skip_nonfinite: bool = False
    trace: bool = False


def run_alone(config: Config, options: NodeOptions) -> Ran:
    """Train in this process alone; blocks."""
    check_supported(config, 1)
    rank_weights(config, ["rank0"])

    def join() -> tuple[World | None, Communicator]:
        from smolcluster.run.connect import alone

        return None, alone()

    return _NodeRun(config, 0, ["rank0"], options).run(join)


def run_node(config: Config, hostname: str, options: NodeOptions, say: Callable[[str], None]) -> Ran:
    """Be the machine `hostname` of the configuration's cluster; blocks until the run has ended.

    Args:
        config: with the machines.
        hostname: this machine's name there.
        options: see NodeOptions.
        say: prints this machine's role.

    Raises:
        ConfigError: no such machine, or this one does not have its address.
    """
    hosts = members(config)
    me = _host(hosts, hostname)
    names = [host.name for host in hosts]
    check_supported(config, len(hosts))
    rank_weights(config, names)
    check_interface(config, me.name, me.ip)
    say(_role(config, hosts, me))
    if warning := exposure([host.ip for host in hosts], tls=config.cluster.tls):
        say(f"warning: {warning}")
    leader = hosts[0]
    if config.backend != "tcp":

        def join_others() -> tuple[World | None, Communicator]:
            from smolcluster.run.connect import join_torch

            method = f"tcp://{leader.ip}:{leader.port}"
            return None, join_torch(config.backend, me.rank, len(hosts), method, config.cluster.patience)

        return _NodeRun(config, me.rank, names, options).run(join_others)

    token = load_token(options.token_file)
    run_id = _digest(hosts)
    sockets = tcp_options(config, me.name)
    # Before torch: others may knock.
    listener = listen(me.ip, me.port, token=token, run_id=run_id, rank=me.rank, options=sockets)

    def join() -> tuple[World | None, Communicator]:
        from smolcluster.run.connect import join_tcp

        return join_tcp(
            rank=me.rank,
            world_size=len(hosts),
            name=me.name,
            listener=listener,
            token=token,
            leader_address=f"tcp://{leader.ip}:{leader.port}",
            run_id=run_id,
            patience=config.cluster.patience,
            options=shared_options(config),
            buffer_bytes=sockets.buffer_bytes,
            tls=sockets.tls,
            shared_memory=sockets.shared_memory,
        )

    with contextlib.closing(listener):
        return _NodeRun(config, me.rank, names, options).run(join)


def run_launched(config: Config, launch: Launch, options: NodeOptions) -> Ran:
    """Be one process of a launcher's job; blocks until the run has ended.

    Raises:
        ConfigError: this release, or a launcher's job, cannot do what the configuration asks for.
    """
    if config.algorithm in PARAMETER_SERVERS:
        raise ConfigError(
            f"algorithm {config.algorithm} lets workers come and go, which a launcher's job does not. Use --local N, "
            "or smolcluster node on each machine"
        )
    names = [f"rank{rank}" for rank in range(launch.world_size)]
    check_supported(config, launch.world_size)
    rank_weights(config, names)
    patience = config.cluster.patience

    def join() -> tuple[World | None, Communicator]:
        from smolcluster.run.connect import alone, exposed, join_launch, join_torch

        if launch.world_size == 1:
            return None, alone()
        if config.backend == "tcp":
            token = load_token(options.token_file)
            sockets = tcp_options(config)
            world, comm = join_launch(
                launch,
                token,
                patience=patience,
                options=shared_options(config),
                buffer_bytes=sockets.buffer_bytes,
                tls=sockets.tls,
                shared_memory=sockets.shared_memory,
            )
            warning = exposed(world, tls=sockets.tls)
            if warning and launch.rank == 0:
                options.reporter.note(f"warning: {warning}")
            return world, comm
        return None, join_torch(config.backend, launch.rank, launch.world_size, "env://", patience)

    return _NodeRun(config, launch.rank, names, options, local_rank=launch.local_rank).run(join)


class _NodeRun:
    """One run of this process's rank."""

    def __init__(
        self, config: Config, rank: int, names: Sequence[str], options: NodeOptions, local_rank: int = 0
    ) -> None:
        self._config = config
        self._rank = rank
        self._names = list(names)
        self._options = options
        self._local_rank = local_rank
        self._stop = threading.Event()

    def run(self, join: Callable[[], tuple[World | None, Communicator]]) -> Ran:
        if self._rank != 0:
            return self._train(join, None)
        options = self._options
        step = None if options.resume is None else options.resume.step
        names = self._names if len(self._names) > 1 else None
        with RunFolder(options.out, self._config, len(self._names), options.reporter, step, names) as folder:
            handler = log_to_file(folder.log_path(0))
            try:
                return self._train(join, folder)
            finally:
                logging.getLogger("smolcluster").removeHandler(handler)
                handler.close()

    def _train(self, join: Callable[[], tuple[World | None, Communicator]], folder: RunFolder | None) -> Ran:
        out = folder.path if folder is not None else None
        try:
            with stopping_on_signals(self._stop, self._options.reporter) as training:
                from smolcluster.run.build import prepare

                parts = prepare(self._config, self._rank, self._names, self._local_rank)
                world, comm = join()
                trained = threading.Event()
                if world is not None:
                    world.on_failure(partial(self._end_in_time, world, folder, trained))
                training.set()
                if self._stop.is_set():
                    raise KeyboardInterrupt
                try:
                    return self._train_connected(parts, world, comm, folder, trained)
                except Exception as error:
                    # Only rank 0 has a log. Elsewhere this goes to the terminal: there a traceback is for our mistakes.
                    if folder is not None or not isinstance(error, SmolError):
                        logger.exception("rank failed rank=%d", self._rank)
                    comm.abort(error if isinstance(error, SmolError) else ClusterError(error_text(self._rank, error)))
                    lost = list(world.lost) if world is not None else []
                    if world is not None:
                        comm.close()  # before the folder: late rows of the others may not find it closed
                    # Whom the others have given up writes no more: another run may go on in the folder.
                    summary = folder.fail(lost) if folder is not None and self._rank not in lost else None
                    trained.set()
                    code = error.exit_code if isinstance(error, SmolError) else EXIT_FAILED
                    return Ran(code, out, summary, error_text(self._rank, error))
        except KeyboardInterrupt:
            return Ran(EXIT_INTERRUPTED, out, folder.fail(has_time=False) if folder is not None else None)

    def _end_in_time(self, world: World, folder: RunFolder | None, trained: threading.Event, error: SmolError) -> None:
        """A rank is lost: end this process, unless `trained` is set soon, even if it computes for long."""

        def leave() -> None:
            if trained.wait(LOSS_LIMIT_S):
                return
            self._options.reporter.close()
            sys.stderr.write(f"error: {error}\n")
            if folder is not None and self._rank not in world.lost:
                folder.fail(world.lost)
            os._exit(error.exit_code)

        if isinstance(error, PeerLost):
            threading.Thread(target=leave, name="loss-watchdog", daemon=True).start()

    def _train_connected(
        self,
        parts: Parts,
        world: World | None,
        comm: Communicator,
        folder: RunFolder | None,
        trained: threading.Event,
    ) -> Ran:
        from smolcluster.run.session import run_rank
        from smolcluster.training.role import RunContext

        resume = self._options.resume
        with Mail(world, folder, self._options.reporter, self._config.cluster.patience) as mail:
            result = run_rank(
                parts,
                comm,
                RunContext(mail, comm, self._stop),
                checkpoints=folder.checkpoints if folder is not None else None,
                resume=resume.checkpoint if resume is not None and folder is not None else None,
                skip_nonfinite=self._options.skip_nonfinite,
                trace=folder.trace if folder is not None and self._options.trace else None,
                name=self._names[self._rank],
                deliver=mail.deliver,
                say=self._options.reporter.note if folder is not None else None,
            )
        trained.set()
        if world is not None:
            world.confirm()
        if result.note is not None:
            self._options.reporter.note(result.note)
        code = EXIT_INTERRUPTED if result.stopped else 0
        summary = folder.finish(result.run, result.ranks, exit_code=code) if folder is not None else None
        comm.close()
        return Ran(code, folder.path if folder is not None else None, summary)


@contextlib.contextmanager
def stopping_on_signals(stop: threading.Event, reporter: Reporter) -> Iterator[threading.Event]:
    """Make Ctrl-C and SIGTERM set `stop`, and end the process if that takes too long, or at the second one.

    Yields an event to be set when there is a step to finish; before, a signal also raises KeyboardInterrupt. While it
    trains, Ctrl-C itself is the business of TrainerRole.
    """
    training, done = threading.Event(), threading.Event()

    def leave() -> NoReturn:
        reporter.close()
        os._exit(EXIT_INTERRUPTED)

    def on_signal(_signum: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            leave()  # not an exception: seen to be lost in the middle of `import torch`
        stop.set()
        if not training.is_set():
            raise KeyboardInterrupt

    def watch() -> None:
        stop.wait()
        if done.is_set():
            return
        if training.is_set():
            reporter.note("stopping after this step; Ctrl-C again ends at once")
        if not done.wait(STOP_LIMIT_S):
            leave()

    is_main = threading.current_thread() is threading.main_thread()
    signums = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    previous = {signum: signal.signal(signum, on_signal) for signum in signums}
    watcher = threading.Thread(target=watch, name="stop-watchdog", daemon=True)
    watcher.start()
    try:
        yield training
    finally:
        done.set()
        stop.set()  # releases the watcher
        watcher.join(timeout=1)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _host(hosts: Sequence[Host], hostname: str) -> Host:
    for host in hosts:
        if host.name == hostname:
            return host
    raise ConfigError(
        f"the cluster has no machine {hostname!r}; its machines are {', '.join(host.name for host in hosts)}. Give one "
        "of these to --hostname"
    )


def _role(config: Config, hosts: Sequence[Host], me: Host) -> str:
    role = (
        f"{me.name} is rank {me.rank} of {len(hosts)} ({config.algorithm} over {config.backend}), at {me.ip}:{me.port}"
    )
    if me.rank == 0:
        others = ", ".join(f"{host.name} (rank {host.rank})" for host in hosts[1:])
        return f"{role}; it leads, keeps the run folder and waits for {others or 'nobody'}"
    return f"{role}; rank 0 is {hosts[0].name} at {hosts[0].ip}:{hosts[0].port}"


def check_interface(config: Config, host: str, ip: str) -> None:
    """Refuse a `cluster.interface` that does not have this machine's address."""
    name = config.cluster.interface
    if name is None:
        return
    interfaces = psutil.net_if_addrs()
    if name not in interfaces:
        raise ConfigError(f"cluster.interface is {name}, but this machine has {', '.join(sorted(interfaces))}")
    addresses = [address.address for address in interfaces[name]]
    if ip not in addresses:
        raise ConfigError(
            f"cluster.interface {name} has the addresses {', '.join(addresses)}, but the cluster file gives {host} "
            f"{ip}. Correct one of them"
        )


def _digest(hosts: Sequence[Host]) -> str:
    """What machines with the same list of machines have in common."""
    listed = json.dumps([[host.rank, host.name, host.ip, host.port] for host in hosts])
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def error_text(rank: int, error: Exception) -> str:
    """One or two lines for the user."""
    if isinstance(error, SmolError):
        return str(error)
    return (
        f"rank {rank} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}. Its log has the traceback"
    )
