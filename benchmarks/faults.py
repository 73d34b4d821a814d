"""Faults at random moments of real runs: who is left ends in time, names the rank, and nothing stays behind.

    python benchmarks/faults.py                                   50 of each kind, one after the other
    python benchmarks/faults.py --kind stop --first 10 --count 5  only these; the results file keeps the others
    python benchmarks/faults.py --kind half --count 4 --out FILE  other results file: what the test suite runs

kill  SIGKILL of a rank, every tenth time of the parent of --local
stop  SIGSTOP of a rank; when the others have ended it is woken, and must end as well and write nothing more
link  the link of a machine goes down (needs root: each machine is a network namespace)
half  a rank sends a part of a frame; then it closes the connection, dies, freezes, or sends nothing more on it

A run has three ranks, and every third one a staleness bound of 1. Four of five are `smolcluster node`: forks of this
process, so that torch is imported once. Every fifth kill and stop hits a `train --local 3`, whose ranks are started as
ever. The moment is uniform between the start and the end of a run without a fault.

In time is `cluster.patience` + 2 s, from the fault to the end of the last process. Before all machines have joined
there is no run that could end: a machine that goes away is waited for, and when it comes (back) the run begins.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch

from netns import lab
from smolcluster import cli
from smolcluster.cluster.world import World
from smolcluster.run import build, connect, node, session  # noqa: F401 - what a rank imports
from smolcluster.transport.security import new_token
from smolcluster.transport.tcp import TcpChannel

KINDS = ("kill", "stop", "link", "half")
HALVES = ("close", "die", "freeze", "silent")
RANKS = 3
PATIENCE = 1.5
LIMIT = PATIENCE + 2.0
# 1.2 MB of gradients a step, so that frames are under way most of the time; an evaluation every 20 steps, a
# checkpoint every 30: they take their share of the moments.
ARGUMENTS = [
    "--preset", "classicdp_digits", "--quiet", "--override", "model.hidden=4000", "--override", "training.batch_size=8",
    "--override", "training.eval_steps=20", "--override", "checkpoint.steps=30", "--override", "training.epochs=1000",
    "--override", f"cluster.patience={PATIENCE}", "--override", "cluster.metrics_log_interval=5",
]  # fmt: skip
STEPS = 150
LEFTOVERS = ("process", "socket", "shared", "temporary")  # what `Run.leftovers` begins with
CLONE_NEWNET = 0x40000000
STARTED = re.compile(r"training rank=")
JOINED = re.compile(r"rank joined rank=(\d+)")
TRAINED = re.compile(r"trained rank=")


# ---- processes


@dataclass
class Process:
    """A process that we started: its output, and when and how it ended."""

    pid: int
    output: Path
    fd: int
    ended: float | None = None
    code: int | None = None

    def signal(self, signum: int) -> None:
        """Send a signal, unless it has ended."""
        if self.ended is None:
            os.kill(self.pid, signum)

    def said(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace")


def fork(call: Callable[[], object], output: Path, environment: dict[str, str]) -> Process:
    """Run `call` in a process of its own, in a session of its own."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            into = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(into, descriptor)
            os.environ.update(environment)
            tempfile.tempdir = None
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            call()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
            kept = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
            if kept:  # they would keep an interpreter from ending
                print("left behind: threads", kept, file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Process(pid, output, os.pidfd_open(pid))


def watch(processes: Sequence[Process], deadline: float) -> bool:
    """Wait until all have ended, at most until `deadline` (`time.monotonic()`); note when each did."""
    poll = select.poll()
    running = {process.fd: process for process in processes if process.ended is None}
    for descriptor in running:
        poll.register(descriptor, select.POLLIN)
    while running:
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready and time.monotonic() >= deadline:
            return False
        for descriptor, _ in ready:
            process = running.pop(descriptor)
            poll.unregister(descriptor)
            process.ended = time.monotonic()
            process.code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
            os.close(descriptor)
    return True


def end_all(processes: Sequence[Process]) -> None:
    """Whatever happened, none is left."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.signal(signal.SIGKILL)
    watch(processes, time.monotonic() + 10)


# ---- runs


@dataclass
class Run:
    """Three ranks under way, or the parent of three."""

    folder: Path
    processes: list[Process]  # ours: the machines in rank order, or the parent alone
    hosts: lab.Lab | None = None
    start_again: Callable[[int], Process] | None = None
    children: list[psutil.Process] = field(default_factory=list)
    addresses: set[tuple[str, int]] = field(default_factory=set)

    @property
    def is_local(self) -> bool:
        """Whether a parent looks after the ranks."""
        return self.start_again is None

    def log(self, rank: int) -> str:
        """A rank's log, as far as it is in the run folder."""
        path = self.folder / "run0" / "logs" / f"rank{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def files(self) -> dict[str, tuple[int, float]]:
        """Everything in the run folder but the logs, with size and time of change."""
        root = self.folder / "run0"
        paths = [path for path in root.rglob("*") if path.is_file() and "logs" not in path.relative_to(root).parts]
        return {str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime) for path in paths}

    def look(self) -> None:
        """Note the children and the sockets that are there now."""
        with contextlib.suppress(psutil.Error):
            for process in self.processes:
                if process.ended is None:
                    self.children += psutil.Process(process.pid).children(recursive=True)
        if self.hosts is not None:
            return
        for pid in [*(p.pid for p in self.processes if p.ended is None), *(child.pid for child in self.children)]:
            with contextlib.suppress(psutil.Error):
                self.addresses |= {tuple(c.laddr) for c in psutil.Process(pid).net_connections("tcp")}

    def leftovers(self) -> list[str]:
        """What is there that should not be, once all processes have ended."""
        found = []
        alive = [child for child in self.children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        sessions = {process.pid for process in self.processes}
        for other in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(other.pid) in sessions and other not in alive:
                    alive.append(other)
        found += [f"process {process.pid}" for process in alive]
        # Whatever the kernel still has to say of a closed connection (TIME_WAIT) belongs to nobody.
        open_states = (psutil.CONN_LISTEN, psutil.CONN_ESTABLISHED, psutil.CONN_SYN_SENT, psutil.CONN_CLOSE_WAIT)
        ours = {None, *(process.pid for process in alive)}  # another program may have got the same port since
        for connection in psutil.net_connections("tcp"):
            is_ours = connection.pid in ours and tuple(connection.laddr) in self.addresses
            if is_ours and connection.status in open_states:
                found.append(f"socket {connection.laddr} {connection.status} of {connection.pid}")
        if self.hosts is not None:
            for host in range(RANKS):
                shown = self.hosts.popen(host, ["ss", "-Htan", "state", "listening", "state", "established"], {})
                found += [f"socket {line} on host{host}" for line in shown.communicate()[0].splitlines()]
        kept = (path.name for path in (self.folder / "tmp").iterdir())
        found += [f"temporary file {name}" for name in kept if not name.startswith("torchinductor_")]  # torch's cache
        return found


def environment(folder: Path) -> dict[str, str]:
    """Of every process of a run: a temporary folder in which nothing may stay."""
    (folder / "tmp").mkdir(exist_ok=True)
    return {"SMOLCLUSTER_TOKEN": new_token().hex(), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}


def start_local(folder: Path, arguments: list[str]) -> Run:
    """`train --local 3`; its ranks are fresh processes."""
    command = ["train", *ARGUMENTS, *arguments, "--local", str(RANKS), "--out", str(folder / "run0")]
    parent = fork(lambda: cli.main(command), folder / "output0", environment(folder))
    return Run(folder, [parent])


def start_nodes(
    folder: Path,
    arguments: list[str],
    dice: random.Random,
    hosts: lab.Lab | None = None,
    prepare: Callable[[int], None] | None = None,
) -> Run:
    """Three `node`s in any order: on loopback, or each in a namespace of its own."""
    ports = [7000] * RANKS if hosts is not None else free_ports(RANKS)
    regular = [
        {
            "hostname": f"host{rank}",
            "rank": rank,
            "port": ports[rank],
            "ip": hosts.address(rank) if hosts else "127.0.0.1",
        }
        for rank in range(RANKS)
    ]
    cluster = folder / "cluster.yaml"
    cluster.write_text(json.dumps({"num_workers": RANKS, "allToAllTopology": {"workers": {"regular": regular}}}))
    variables = environment(folder)

    def start(rank: int) -> Process:
        command = ["node", *ARGUMENTS, *arguments, "--cluster", str(cluster), "--hostname", f"host{rank}"]

        def call() -> None:
            if hosts is not None:
                enter(Path(f"/run/netns/{hosts.prefix}{rank}"))
            if prepare is not None:
                prepare(rank)
            cli.main([*command, "--out", str(folder / f"run{rank}")])

        return fork(call, folder / f"output{rank}", variables)

    order = dice.sample(range(RANKS), RANKS)
    started = {rank: start(rank) for rank in order}
    return Run(folder, [started[rank] for rank in range(RANKS)], hosts, start)


def enter(namespace: Path) -> None:
    """Move this process into a network namespace."""
    with namespace.open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def heal(hosts: lab.Lab, host: int) -> None:
    """The link is back."""
    subprocess.run(["ip", "-n", f"{hosts.prefix}{host}", "link", "set", "eth0", "up"], check=True)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


# ---- half a frame


class HalfFrame:
    """In the victim's process: at SIGUSR1 the next bulk bytes are cut within a frame, and then it happens."""

    def __init__(self, what: str, cut: float, report: int) -> None:
        self.what = what
        self.cut = cut
        self.report = report
        self.armed = False
        self.silent: set[TcpChannel] = set()
        self.peers: dict[TcpChannel, int] = {}

    def install(self) -> None:
        """From now on channels know their peer, and may be cut."""
        open_channel, try_send = World.open_channel, TcpChannel.try_send

        def opening(world: World, peer: int, lane: str, timeout: float) -> Any:
            channel = open_channel(world, peer, lane, timeout)
            if isinstance(channel, TcpChannel):
                self.peers[channel] = peer
            return channel

        def sending(channel: TcpChannel, buffers: Sequence[memoryview]) -> int:
            if channel in self.silent:
                return 0
            at = min(1, len(buffers) - 1)  # a head, and of what follows a part
            if not self.armed or len(buffers[at]) < 2:
                return try_send(channel, buffers)
            self.armed = False
            # Frames end where buffers end: within a buffer is within a frame.
            taken = try_send(channel, [*buffers[:at], buffers[at][: max(1, int(self.cut * len(buffers[at])))]])
            self.silent.add(channel)
            os.write(self.report, json.dumps([time.monotonic(), self.peers.get(channel, -1)]).encode())
            self.happen(channel)
            return taken

        World.open_channel, TcpChannel.try_send = opening, sending  # type: ignore[method-assign]
        signal.signal(signal.SIGUSR1, lambda signum, frame: setattr(self, "armed", True))

    def happen(self, channel: TcpChannel) -> None:
        """What follows the half frame."""
        if self.what == "close":
            socket.socket(fileno=os.dup(channel.fileno())).shutdown(socket.SHUT_RDWR)
        elif self.what in ("die", "freeze"):
            os.kill(os.getpid(), signal.SIGKILL if self.what == "die" else signal.SIGSTOP)


# ---- one fault


@dataclass
class Trial:
    """One fault, and what came of it."""

    kind: str
    number: int
    seed: int
    mode: str
    victim: int
    variant: str
    shared_memory: str
    staleness_bound: int
    at_s: float
    phase: str = ""
    outcome: str = ""
    seconds: float | None = None  # from the fault to the end of the last survivor
    woken_s: float | None = None  # from SIGCONT to the end of the woken
    late_s: float = 0.0  # by how much this process was woken too late at most: how busy the machine was
    problems: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def plan(kind: str, number: int, seed: int, attempt: int) -> tuple[Trial, random.Random]:
    """What shall happen, from these numbers alone; `at_s` is still a part of the run's length."""
    dice = random.Random(f"{kind} {seed} {number} {attempt}")
    mode = {"link": "hosts"}.get(kind, "local" if kind in ("kill", "stop") and number % 5 == 4 else "nodes")
    variant = HALVES[number % len(HALVES)] if kind == "half" else ""
    if mode == "local" and kind == "kill" and number % 10 == 9:
        variant = "parent"
    shared_memory = "off" if kind == "half" or number % 2 else "auto"
    staleness_bound = int(number % 3 == 2)
    victim, moment = dice.randrange(RANKS), dice.random()
    return Trial(kind, number, seed, mode, victim, variant, shared_memory, staleness_bound, moment), dice


def strike(trial: Trial, dice: random.Random, hosts: lab.Lab | None, length: float, folder: Path) -> None:
    """Start a run, let it happen, and judge what follows."""
    arguments = ["--max-steps", str(STEPS)]
    for key in ("shared_memory", "staleness_bound"):
        arguments += ["--override", f"cluster.{key}={getattr(trial, key)}"]
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    half = HalfFrame(trial.variant, dice.uniform(0.05, 0.95), writing)

    def prepare(rank: int) -> None:
        if trial.kind == "half" and rank == trial.victim:
            half.install()

    trial.at_s = round(trial.at_s * length, 3)
    shm = set(os.listdir("/dev/shm"))
    if trial.mode == "local":
        run = start_local(folder, arguments)
    else:
        run = start_nodes(folder, arguments, dice, hosts, prepare)
    try:
        began = time.monotonic()
        has_ended = watch(run.processes, began + trial.at_s)
        run.look()
        struck = hit(trial, run, reading, began)
        if has_ended or struck is None:
            trial.outcome = "after the end"
            end_all(run.processes)
        else:
            judge(trial, run, struck)
        end_all(run.processes)
        trial.problems += run.leftovers()
        left = {name for name in set(os.listdir("/dev/shm")) - shm if "smol" in name}
        trial.problems += [f"shared memory {name}" for name in sorted(left)]
    finally:
        end_all(run.processes)
        for child in run.children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        os.close(reading)
        os.close(writing)
        if hosts is not None and trial.kind == "link":
            heal(hosts, trial.victim)


def hit(trial: Trial, run: Run, report: int, began: float) -> tuple[float, int] | None:
    """Let it happen; when (`time.monotonic()`), and the other end of a cut connection. None: there was nothing left."""
    trial.late_s = max(0.0, time.monotonic() - began - trial.at_s)
    target = run.processes[0] if run.is_local else run.processes[trial.victim]
    if target.ended is not None:
        return None
    if trial.kind == "link":
        assert run.hosts is not None
        run.hosts.cut(trial.victim)
        return time.monotonic(), -1
    if trial.kind == "half":
        with contextlib.suppress(ProcessLookupError):
            if "SIGUSR1" not in caught_signals(target.pid):
                return None  # so early that nothing could be cut
        target.signal(signal.SIGUSR1)
        return cut_at(report, run.processes)
    signum = signal.SIGKILL if trial.kind == "kill" else signal.SIGSTOP
    if run.is_local and trial.variant != "parent":
        ranks = sorted(set(run.children), key=lambda child: (child.create_time(), child.pid))
        if trial.victim >= len(ranks):
            return None  # the parent has not started it yet
        try:
            ranks[trial.victim].send_signal(signum)
        except psutil.Error:
            return None
    else:
        target.signal(signum)
    return time.monotonic(), -1


def caught_signals(pid: int) -> set[str]:
    """Signals that a process handles."""
    text = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line for line in text.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return {signal.Signals(number).name for number in range(1, 32) if mask >> (number - 1) & 1}


def cut_at(report: int, processes: Sequence[Process]) -> tuple[float, int] | None:
    """When the victim says that it has cut a frame, and towards whom; None if the run ended without."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            when, peer = json.loads(os.read(report, 100))
            return float(when), int(peer)
        except BlockingIOError:
            if watch(processes, time.monotonic() + 0.01):
                return None
    return None


def judge(trial: Trial, run: Run, struck: tuple[float, int]) -> None:
    """Wait for the ends, and compare them with what ought to be."""
    when, peer = struck
    is_victim_ours = not run.is_local
    survivors = [p for rank, p in enumerate(run.processes) if not is_victim_ours or rank != trial.victim]
    if trial.variant == "parent":
        judge_orphans(trial, run, when)
        return
    # Who only lost its link ends too, and so does who sent half a frame but lives.
    ending = run.processes if trial.kind == "link" or trial.variant in ("close", "silent") else survivors
    slice_began = time.monotonic()
    while not watch(ending, min(slice_began + 0.05, when + LIMIT + 1.0)) and time.monotonic() < when + LIMIT + 1.0:
        trial.late_s = max(trial.late_s, time.monotonic() - slice_began - 0.05)
        slice_began = time.monotonic()
    trial.phase = phase(run, trial, when)
    trial.said = [last_line(process.said()) for process in run.processes]
    if trial.phase == "joining" and trial.victim != 0 and all(process.ended is not None for process in survivors):
        trial.phase = "connecting"  # what the victim had sent before it was struck made it a member after that
    if trial.phase == "joining" and not run.is_local:
        judge_waiting(trial, run, survivors)
        return
    ends = [process.ended for process in ending]
    if None in ends:
        trial.outcome = "hangs"
        trial.problems.append(f"{sum(end is None for end in ends)} of {len(ends)} processes have not ended")
        return
    if all(process.code == 0 for process in survivors):
        trial.outcome = "the run was over"
        if trial.phase != "ending":
            trial.problems.append("the run ended as if nothing had happened")
    else:
        trial.seconds = round(max(end for end in ends if end is not None) - when, 3)
        trial.outcome = "ended"
        may_be_named = {trial.victim} | ({peer} if trial.variant in ("close", "silent") else set())
        for process in survivors:
            if process.code != 3:
                trial.problems.append(f"exit code {process.code}")
            if not any(re.search(rf"error: rank {rank}\b", process.said()) for rank in may_be_named):
                trial.problems.append("does not name the rank")
        if trial.kind == "link" and run.processes[trial.victim].code != 3:
            trial.problems.append(f"the cut machine ended with {run.processes[trial.victim].code}")
    if trial.seconds is not None and trial.seconds > LIMIT:
        trial.problems.append(f"took {trial.seconds} s")
    if any("Traceback" in process.said() for process in run.processes):
        trial.problems.append("a traceback")
    if is_victim_ours and (trial.kind == "stop" or trial.variant == "freeze"):
        wake(trial, run)


def wake(trial: Trial, run: Run) -> None:
    """The suspended process goes on: it ends with a message, and writes nothing more into the run folder."""
    before, woken = run.files(), time.monotonic()
    victim = run.processes[trial.victim]
    victim.signal(signal.SIGCONT)
    if not watch([victim], woken + LIMIT + 1.0):
        trial.problems.append("the woken process has not ended")
        return
    assert victim.ended is not None
    trial.woken_s = round(victim.ended - woken, 3)
    trial.said[trial.victim] = last_line(victim.said())
    if trial.outcome == "the run was over":
        return
    if trial.woken_s > LIMIT:
        trial.problems.append(f"the woken process took {trial.woken_s} s")
    if victim.code != 3 or f"error: rank {trial.victim}" not in victim.said():
        trial.problems.append(f"the woken process ended with {victim.code}")
    after = run.files()
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if changed:
        trial.problems.append(f"the woken process wrote {', '.join(changed)}")


def judge_orphans(trial: Trial, run: Run, when: float) -> None:
    """The parent was killed: its ranks end by themselves."""
    watch(run.processes, when + 1.0)
    _, alive = psutil.wait_procs(run.children, timeout=max(0.0, when + LIMIT + 1.0 - time.monotonic()))
    trial.seconds = round(time.monotonic() - when, 3)
    trial.phase, trial.outcome = "parent", "ended"
    if alive:
        trial.problems.append(f"{len(alive)} ranks have not ended")
    if trial.seconds > LIMIT:
        trial.problems.append(f"took {trial.seconds} s")


def judge_waiting(trial: Trial, run: Run, survivors: Sequence[Process]) -> None:
    """The machines had not all met: those that wait for the lost one go on when it comes."""
    assert run.start_again is not None
    trial.outcome = "was waited for"
    if trial.victim == 0 and trial.kind in ("kill", "stop", "half"):
        # Whoever had found rank 0 knows that it is gone; who has not, knocks on.
        for process in survivors:
            if process.ended is not None and (process.code != 3 or "rank 0" not in process.said()):
                trial.problems.append(f"ended with {process.code}")
        if trial.kind == "stop":
            run.processes[0].signal(signal.SIGCONT)
            watch(run.processes[:1], time.monotonic() + 0.5)
        return
    if any(process.ended is not None for process in survivors):
        trial.problems.append("a machine that waits has ended")
        return
    if trial.kind == "link":
        assert run.hosts is not None
        heal(run.hosts, trial.victim)
        if run.processes[trial.victim].ended is not None:
            run.processes[trial.victim] = run.start_again(trial.victim)
    elif trial.kind == "stop":
        run.processes[trial.victim].signal(signal.SIGCONT)
    else:
        run.processes[trial.victim] = run.start_again(trial.victim)
    watch(run.processes, time.monotonic() + 60)
    codes = [process.code for process in run.processes]
    if codes != [0] * RANKS:
        trial.problems.append(f"the run that began later ended with {codes}")


def phase(run: Run, trial: Trial, when: float) -> str:
    """What the run was doing, from rank 0's log."""
    until = time.time() - (time.monotonic() - when)
    lines = [line for line in run.log(0).splitlines() if (at := logged_at(line)) is not None and at <= until]
    text = "\n".join(lines)
    if TRAINED.search(text):
        return "ending"
    if STARTED.search(text):
        return "training"
    if run.is_local:
        return "starting"
    return "connecting" if len(set(JOINED.findall(text))) == RANKS - 1 else "joining"


def logged_at(line: str) -> float | None:
    """Unix seconds of a log line."""
    try:
        return time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")) + float(line[20:23]) / 1000
    except ValueError:
        return None


def last_line(text: str) -> str:
    """The error, or else the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "")[:300]


# ---- all of them


def measure_length(mode: str, hosts: lab.Lab | None) -> float:
    """Seconds of a run in which nothing happens."""
    with scratch() as folder:
        began = time.monotonic()
        arguments = ["--max-steps", str(STEPS)]
        run = (
            start_local(folder, arguments)
            if mode == "local"
            else start_nodes(folder, arguments, random.Random(0), hosts)
        )
        done = watch(run.processes, began + 100)
        end_all(run.processes)
        outputs = [process.said() for process in run.processes]
        assert done, outputs
        assert all(process.code == 0 for process in run.processes), outputs
        return max(process.ended or 0.0 for process in run.processes) - began


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one run."""
    folder = Path(tempfile.mkdtemp(prefix="smolcluster-faults-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def storm(
    kind: str, numbers: Sequence[int], seed: int, lengths: dict[str, float], keep: Path | None
) -> Iterator[Trial]:
    """One fault for each number. A moment after the end of its run is drawn again.

    `lengths`: seconds of a run of each mode; measured if it is missing.
    """
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(lab.network(RANKS)) if kind == "link" else None
        for number in numbers:
            for attempt in range(10):
                trial, dice = plan(kind, number, seed, attempt)
                if trial.mode not in lengths:
                    lengths[trial.mode] = round(measure_length(trial.mode, hosts), 2)
                with scratch() as folder:
                    strike(trial, dice, hosts, lengths[trial.mode], folder)
                    if keep is not None and trial.problems:
                        shutil.copytree(folder, keep / f"{kind}-{seed}-{number}", dirs_exist_ok=True)
                if trial.outcome != "after the end" or trial.problems:
                    break
            yield trial


def table(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each kind and outcome."""
    rows = []
    for kind in KINDS:
        mine = [trial for trial in trials if trial["kind"] == kind]
        seconds = [trial["seconds"] for trial in mine if trial["seconds"] is not None]
        woken = [trial["woken_s"] for trial in mine if trial["woken_s"] is not None]
        if mine:
            rows.append({
                "kind": kind,
                "count": len(mine),
                "ok": sum(not trial["problems"] for trial in mine),
                "seconds_median": round(statistics.median(seconds), 3) if seconds else None,
                "seconds_max": max(seconds, default=None),
                "woken_s_max": max(woken, default=None),
                "left_behind": sum(problem.split()[0] in LEFTOVERS for trial in mine for problem in trial["problems"]),
            })  # fmt: skip
    return rows


def main() -> None:
    """Run, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault: a storm can be run in parts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "faults.json")
    parser.add_argument("--keep", type=Path, help="keep the folders of runs with a problem there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # so that nothing is left behind
    gc.collect()
    gc.freeze()
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"trials": [], "run_s": {}}
    known = {(trial["kind"], trial["seed"], trial["number"]): trial for trial in before["trials"]}
    lengths = before["run_s"]
    for kind in arguments.kind or KINDS:
        if kind == "link" and (reason := lab.missing()) is not None:
            print(f"link: left out, {reason}")
            continue
        numbers = range(arguments.first, arguments.first + arguments.count)
        for trial in storm(kind, numbers, arguments.seed, lengths, arguments.keep):
            found = vars(trial)
            trial.late_s = round(trial.late_s, 3)
            known[(kind, trial.seed, trial.number)] = found
            print(json.dumps({key: value for key, value in found.items() if value not in ("", None, [])}), flush=True)
    trials = [known[key] for key in sorted(known)]
    figures = {"patience_s": PATIENCE, "limit_s": LIMIT, "run_s": lengths, "table": table(trials), "trials": trials}
    for row in figures["table"]:
        print(row)
    arguments.out.write_text(json.dumps({"measured": machine.describe(), **figures}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(trial["problems"] for trial in trials))


if __name__ == "__main__":
    main()
