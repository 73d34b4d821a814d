"""One machine of a cluster file that trains over a parameter server: its server, or one of its workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

import psutil

from smolcluster.config.hosts import Address, Member, roles
from smolcluster.config.schema import Config
from smolcluster.errors import ClusterError, ConfigError, PeerLost, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.log import FORMAT, log_to_file
from smolcluster.monitoring.reporters import Reporter
from smolcluster.run.folder import Ran, RunFolder
from smolcluster.run.node import NodeOptions, check_interface, error_text, stopping_on_signals
from smolcluster.run.supervisor import EXIT_FAILED, EXIT_INTERRUPTED
from smolcluster.run.support import check_supported, exposure, rank_weights, shared_options, tcp_options
from smolcluster.transport.security import load_token
from smolcluster.transport.tcp import TcpNetwork, format_address, listen

if TYPE_CHECKING:
    from smolcluster.cluster.sessions import SessionWorld
    from smolcluster.collectives.param_server import Worker
    from smolcluster.collectives.param_worker import WorkerPort

logger = logging.getLogger(__name__)

# Rows that a worker keeps while it has no connection.
MAX_KEPT_ROWS = 10_000
# Seconds between looks whether somebody wants a worker to stop.
SLICE = 0.2


def run_param_server_node(config: Config, hostname: str, options: NodeOptions, say: Callable[[str], None]) -> Ran:
    """Be the machine `hostname`: the server, or a worker; blocks until the run has ended.

    Args:
        config: with the machines.
        hostname: this machine's name there.
        options: what the user said besides; the run folder, progress and resuming are the server's.
        say: prints this machine's role.

    Raises:
        ConfigError: no such machine, or this one does not have its address.
    """
    local = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    members = roles(config, hostname=hostname, local_addresses=local)
    names = [member.name for member in members]
    if hostname not in names:
        raise ConfigError(
            f"the cluster has no machine {hostname!r}; its machines are {', '.join(names)}. Give one of these to "
            "--hostname"
        )
    me = members[names.index(hostname)]
    check_supported(config, len(members))
    rank_weights(config, names)
    addresses = [ip for member in members for ip, _ in (*member.listens, *([member.dials] if member.dials else []))]
    if me.role == "server":
        check_interface(config, me.name, me.listens[0][0])
    say(_role(config, members, me))
    if warning := exposure(dict.fromkeys(addresses), tls=config.cluster.tls):
        say(f"warning: {warning}")
    token = load_token(options.token_file)
    # The files of two machines may give a worker another address, but not another name or rank.
    run_id = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    if me.role == "server":
        return _serve(config, names, me, options, token, run_id)
    return _work(config, names, me, options, token, run_id)


def _role(config: Config, members: Sequence[Member], me: Member) -> str:
    if me.role == "server":
        where = ", ".join(f"{ip}:{port}" for ip, port in me.listens)
        workers = ", ".join(f"{member.name} (rank {member.rank})" for member in members if member.role == "worker")
        return f"{me.name} is the server of {config.algorithm}, at {where}; it keeps the run folder, for {workers}"
    assert me.dials is not None, "a worker dials"
    ip, port = me.dials
    return (
        f"{me.name} is a worker of {config.algorithm}, rank {me.rank} of {len(members)}; the server is "
        f"{members[0].name} at {ip}:{port}"
    )


def _serve(config: Config, names: Sequence[str], me: Member, options: NodeOptions, token: bytes, run_id: str) -> Ran:
    sockets = tcp_options(config, me.name)
    step = None if options.resume is None else options.resume.step
    stop = threading.Event()
    with contextlib.ExitStack() as closing:
        # Before torch: workers may knock.
        listeners = [
            closing.enter_context(
                contextlib.closing(listen(ip, port, token=token, run_id=run_id, rank=0, options=sockets))
            )
            for ip, port in me.listens
        ]
        folder = closing.enter_context(RunFolder(options.out, config, len(names), options.reporter, step, names))
        handler = log_to_file(folder.log_path(0))
        closing.callback(handler.close)
        closing.callback(logging.getLogger("smolcluster").removeHandler, handler)
        mail = closing.enter_context(_ServerMail(folder, options.reporter))
        try:
            with stopping_on_signals(stop, options.reporter) as training:
                from smolcluster.run.build import prepare
                from smolcluster.run.param_server import run_server
                from smolcluster.training.role import RunContext

                parts = prepare(config, 0, names)
                training.set()
                result = run_server(
                    parts,
                    listeners,
                    names,
                    RunContext(mail, None, stop),
                    options=shared_options(config),
                    folder=folder.path,
                    resume=None if options.resume is None else options.resume.checkpoint,
                    skip_nonfinite=options.skip_nonfinite,
                    trace=folder.trace if options.trace else None,
                    deliver=folder.sync,
                    note=options.reporter.note,
                    opened=mail.open,
                )
        except KeyboardInterrupt:
            return Ran(EXIT_INTERRUPTED, folder.path, folder.fail(has_time=False))
        except Exception as error:
            logger.exception("server failed")
            lost = [error.rank] if isinstance(error, PeerLost) and error.rank > 0 else []
            code = error.exit_code if isinstance(error, SmolError) else EXIT_FAILED
            return Ran(code, folder.path, folder.fail(lost), error_text(0, error))
        if result.note is not None:
            options.reporter.note(result.note)
        code = EXIT_INTERRUPTED if result.stopped else 0
        return Ran(code, folder.path, folder.finish(result.run, result.ranks, exit_code=code))


def _work(config: Config, names: Sequence[str], me: Member, options: NodeOptions, token: bytes, run_id: str) -> Ran:
    assert me.dials is not None, "a worker dials"
    stop = threading.Event()
    host, port = me.dials
    try:
        with stopping_on_signals(stop, options.reporter) as training, _WorkerMail(options.reporter) as mail:
            from smolcluster.run.build import prepare
            from smolcluster.run.param_server import run_worker
            from smolcluster.training.role import RunContext

            parts = prepare(config, me.rank, names)
            training.set()

            def attach(worker_port: WorkerPort) -> None:
                watcher = threading.Thread(target=_leave_on, args=(stop, worker_port), name="leave", daemon=True)
                watcher.start()

            try:
                run_worker(
                    parts,
                    TcpNetwork(token, tcp_options(config, me.name)),
                    lambda: format_address(host, port),
                    me.name,
                    RunContext(mail, None, stop),
                    run_id=run_id,
                    address=format_address(*_own_address(me)),
                    options=shared_options(config),
                    attach=attach,
                    began=mail.begin,
                )
            except SmolError:
                if stop.is_set():
                    return Ran(EXIT_INTERRUPTED)
                raise
            return Ran(0)
    except KeyboardInterrupt:
        return Ran(EXIT_INTERRUPTED)
    except Exception as error:
        if not isinstance(error, SmolError):
            logger.exception("worker failed rank=%d", me.rank)
        code = error.exit_code if isinstance(error, SmolError) else EXIT_FAILED
        return Ran(code, None, None, error_text(me.rank, error))


def _own_address(me: Member) -> Address:
    """Where this worker is; nobody dials it."""
    assert me.dials is not None, "a worker dials"
    return me.listens[0] if me.listens else (me.dials[0], 0)


def _leave_on(stop: threading.Event, port: WorkerPort) -> None:
    """Ctrl-C on a worker's machine: it leaves, the run goes on."""
    while not port.is_closed:
        if stop.wait(SLICE):
            port.abort(ClusterError("this worker was stopped"))
            return


class _ServerMail:
    """Writes the server's rows, and those and the logs that workers send, into the run folder. A MetricsSink."""

    def __init__(self, folder: RunFolder, reporter: Reporter) -> None:
        self._folder = folder
        self._reporter = reporter
        self._lock = threading.Lock()
        self._logs: dict[int, TextIO] = {}
        self._is_closed = False

    def __enter__(self) -> _ServerMail:
        return self

    def __exit__(self, *_details: object) -> None:
        with self._lock:
            self._is_closed = True
            for log in self._logs.values():
                log.close()

    def write(self, row: JsonObject) -> None:
        """Take one row."""
        self._folder.write(row)

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """Show it."""
        self._reporter.progress(done, total, row)

    def open(self, worker: Worker, world: SessionWorld) -> None:
        """Listen to a new session."""
        world.on("row", lambda _rank, message: self._row(message))
        world.on("log", lambda _rank, message: self._log(worker.rank, message))

    def _row(self, message: JsonObject) -> None:
        row = message.get("row")
        if isinstance(row, dict):
            try:
                self._folder.write(row)
            except SmolError as error:  # a full disk, which the server's own rows notice too
                logger.error("row not written reason=%s", error)

    def _log(self, rank: int, message: JsonObject) -> None:
        with self._lock:
            if self._is_closed:
                return
            if rank not in self._logs:
                self._logs[rank] = self._folder.log_path(rank).open("a", encoding="utf-8", buffering=1)
            self._logs[rank].write(f"{message.get('line')}\n")


class _WorkerMail(logging.Handler):
    """Sends a worker's rows and log to the server; keeps rows while there is no connection. A MetricsSink."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))
        self._reporter = reporter
        self._world: SessionWorld | None = None
        self._kept: deque[JsonObject] = deque(maxlen=MAX_KEPT_ROWS)

    def __enter__(self) -> _WorkerMail:
        logs = logging.getLogger("smolcluster")
        self._level_before = logs.level
        logs.addHandler(self)
        logs.setLevel(logging.INFO)
        return self

    def __exit__(self, *_details: object) -> None:
        logs = logging.getLogger("smolcluster")
        logs.removeHandler(self)
        logs.setLevel(self._level_before)

    def begin(self, world: SessionWorld) -> None:
        """From now on over this session."""
        before, self._world = self._world, world
        if before is not None and before.view().run_id != world.view().run_id:
            self._kept.clear()  # of steps that a server which was started again has gone back behind
        while self._kept:
            world.send(0, "row", {"row": self._kept.popleft()})

    def write(self, row: JsonObject) -> None:
        """Take one row."""
        world = self._world
        if world is None or world.error() is not None:
            self._kept.append(row)
        else:
            world.send(0, "row", {"row": row})

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        """The server shows it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line of the log. What is logged while sending is not sent."""
        world = self._world
        if world is None or world.error() is not None or record.name.startswith("smolcluster.transport"):
            return
        with contextlib.suppress(SmolError, ValueError):
            world.send(0, "log", {"line": self.format(record)})
