"""Faults at random moments of runs over a parameter server: they go on, and every sample counts exactly once.

    python benchmarks/param_server_storm.py --algorithm syncps --fault kill --trials 20   20 faults, several a run
    python benchmarks/param_server_storm.py --algorithm edp                               20 of each kind
    python benchmarks/param_server_storm.py --algorithm edp --reference                   only runs without a fault

kill    SIGKILL of a random worker; --respawn starts it again
stop    SIGSTOP of a random worker for 0.2 to 5 s, then SIGCONT
server  SIGKILL of the server; --respawn starts it again, from its newest checkpoint
join    `smolcluster node`s on loopback: the server and one worker begin, the others come when they like
link    `smolcluster node`s in network namespaces: a worker's link is down for 0.5 to 6 s (root; see --netlab)

Each run must end with exit code 0 before its deadline and leave no process behind, its ledger must hold every sample of
every epoch once (audit_ledger.py), and its validation loss must be that of a run without a fault: not more than 2 %
above the median of three.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
import psutil
from audit_ledger import audit

FAULTS = ("kill", "stop", "server", "join", "link")
ROOT = Path(__file__).parent.parent
SAMPLES = 60_000  # of MNIST's training split
# About 30 s of training on two cores that others use too: whoever is killed needs 10 to be back. edp waits for nobody.
EPOCHS = {"syncps": 2, "edp": 6}
# With 1e-3 undisturbed runs of edp are 4 to 15 % apart, with this about 1.5: what a fault does can be told from chance.
LEARNING_RATES = {"syncps": 1e-3, "edp": 2e-4}
REFERENCES = 3
TOLERANCE = 0.02
PATIENCE = {"join": 1.0}  # so that the server soon begins without those who are to come
DEFAULT_PATIENCE = 2.0
START_LIMIT = 120.0  # torch is imported by all at once
# A machine that was started longer ago, and has not joined, was kept out: that is a problem.
STARTS_S = 15.0
FAULT_LIMIT = 40.0  # added to a run's deadline for each fault: it may have to import torch again
# In the environment of everything that a run starts, so that it is found wherever it went.
MARK = "SMOLCLUSTER_STORM"
STARTED = re.compile(r"rank started rank=(\d+) world_size=\d+ pid=(\d+)")
BEGAN = "session began number="


@dataclass
class Fault:
    """One fault, and how long it was felt.

    Attributes:
        rank: who was struck, or came.
        at_s: after training began.
        lasts_s: how long it was stopped or cut.
        back_s: from the end of the fault until samples of this rank count again; None: the run ended before.
        pause_s: the longest time without an update of the server from the fault until then.
    """

    rank: int
    at_s: float
    lasts_s: float = 0.0
    back_s: float | None = None
    pause_s: float | None = None
    began: float = 0.0
    ended: float = 0.0


@dataclass
class Trial:
    """A run, its faults, and what came of it."""

    number: int
    seed: int
    faults: list[Fault] = field(default_factory=list)
    wall_s: float = 0.0
    val_loss: float | None = None
    loss_deviation: float | None = None
    restarts: int | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Run:
    """The processes of one run."""

    def __init__(self, algorithm: str, options: argparse.Namespace, patience: float, folder: Path) -> None:
        workers = options.workers
        self.folder = folder
        self.out = folder / "run"
        self.workers = workers
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.started_at: dict[str, float] = {}  # `time.monotonic()`
        self.mark = os.urandom(8).hex()
        self._environment = {
            **os.environ,
            MARK: self.mark,
            "SMOLCLUSTER_TOKEN": os.urandom(32).hex(),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        }
        overrides = {
            "cluster.patience": patience,
            "cluster.min_ranks": 2,
            "training.epochs": EPOCHS[algorithm],
            "training.learning_rate": LEARNING_RATES[algorithm],
            "training.batch_size": 32,
            "checkpoint.steps": 100,
            # Down to 0: with a constant one a sample more or less in the last updates changes the loss by 2 %.
            "lr_schedule.kind": "cosine",
        }
        self._arguments = ["--algorithm", algorithm, "--preset", "single_mnist", "--quiet", "--out", str(self.out)]
        settings = [*(f"{key}={value}" for key, value in overrides.items()), *options.override]
        self._arguments += [text for setting in settings for text in ("--override", setting)]

    def start(self, name: str, arguments: list[str], before: list[str] | None = None) -> None:
        """Start `smolcluster ARGUMENTS`; `before` stands in front of the command."""
        command = [*(before or []), sys.executable, "-m", "smolcluster", *arguments, *self._arguments]
        self.started_at[name] = time.monotonic()
        with (self.folder / f"output-{name}").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment,
                start_new_session=True,
            )  # fmt: skip

    def start_local(self) -> None:
        """All ranks under one parent."""
        self.start("local", ["train", "--local", str(self.workers + 1), "--respawn"])

    def start_node(self, rank: int, before: list[str] | None = None) -> None:
        """One machine of the cluster file."""
        name = f"host{rank}"
        self.start(name, ["node", "--cluster", str(self.folder / "cluster.yaml"), "--hostname", name], before)

    def write_cluster(self, address: Callable[[int], str], port: int) -> None:
        """The cluster file: host0 serves."""
        names = [f"host{rank}" for rank in range(self.workers + 1)]
        hosts = {name: address(rank) for rank, name in enumerate(names)}
        cluster = {"server": "host0", "workers": names[1:], "host_ip": hosts, "port": port, "num_workers": self.workers}
        (self.folder / "cluster.yaml").write_text(json.dumps({"cluster": cluster}), encoding="utf-8")

    # ---- what is seen of it

    def is_over(self) -> bool:
        """All processes that were started here have ended."""
        return all(process.poll() is not None for process in self.processes.values())

    def has_failed(self) -> bool:
        """One has, with an error."""
        return any(process.poll() not in (None, 0) for process in self.processes.values())

    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, which a server that was started again makes shorter."""
        return whole_lines(self.out / "metrics.jsonl")

    def ledger(self) -> list[dict[str, Any]]:
        """Leases that count."""
        return whole_lines(self.out / "ledger.jsonl")

    def log(self, rank: int) -> str:
        """A rank's log so far."""
        path = self.out / "logs" / f"rank{rank}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def pid(self, rank: int) -> int | None:
        """The process of a rank, if it lives."""
        if (node := self.processes.get(f"host{rank}")) is not None:
            return node.pid if node.poll() is None else None
        found = [int(pid) for number, pid in STARTED.findall(self.log(rank)) if int(number) == rank]
        return found[-1] if found and is_alive(found[-1]) else None

    def has_worker(self) -> bool:
        """Whether the server has let one in; it then waits some patiences for the others."""
        return "worker joined rank=" in self.log(0)

    def has_begun(self, rank: int) -> bool:
        """Whether a machine of the cluster file ever had a session: it must then end by itself."""
        return f"worker joined rank={rank} " in self.log(0)

    def is_in(self, rank: int) -> bool:
        """Whether a worker's newest process has a session."""
        log = self.log(rank)
        return self.pid(rank) is not None and log.rfind(BEGAN) > log.rfind("rank started")

    def left(self) -> list[psutil.Process]:
        """Every process that lives and was started by this run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> None:
        """Whatever happened, nothing is left."""
        for _ in range(3):
            for process in self.left():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.2)
        for started in self.processes.values():
            started.wait(10)

    def stacks(self) -> str:
        """Where all processes are."""
        if shutil.which("py-spy") is None:
            return ""
        told = []
        for process in self.left():
            command = ["py-spy", "dump", "-p", str(process.pid)]
            told.append(subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout)
        return "\n".join(told)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that may not be there yet, and is being written."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# ---- faults


class Storm:
    """Strikes one run. Each method does one fault; it returns None if the run ended before."""

    def __init__(self, run: Run, dice: random.Random, trial: Trial, netlab: Netlab | None) -> None:
        self.run = run
        self.dice = dice
        self.trial = trial
        self.netlab = netlab
        self.began = time.time()
        self.absent: list[int] = []  # ranks that are to join

    def wait(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Sleep, or until something is so; False: the run ended meanwhile, or it did not become so."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.run.has_failed() or self.run.is_over():
                return False
            if until is not None and until():
                return True
            time.sleep(min(0.05 if until is None else 0.2, max(0.0, deadline - time.monotonic())))
        return until is None

    def kill(self) -> Fault | None:
        """Not the last worker: torch takes longer than the server waits with none."""
        if not self.wait(self.dice.uniform(0.3, 5.0)):
            return None
        for _ in range(50):
            inside = [rank for rank in range(1, self.run.workers + 1) if self.run.is_in(rank)]
            victim = self.dice.randint(1, self.run.workers)
            pid = self.run.pid(victim)
            if pid is not None and set(inside) - {victim}:
                return self._signal(victim, pid, signal.SIGKILL)
            if not self.wait(0.5):
                return None
        return None

    def server(self) -> Fault | None:
        """Mostly when it trains; every third time while it starts again."""
        is_early = bool(self.trial.faults) and self.dice.random() < 1 / 3
        known = self.trial.faults[-1].ended if self.trial.faults else 0.0
        if not is_early and not self.wait(START_LIMIT, lambda: last_row(self.run, 0) > known):
            return None
        if not self.wait(FAULT_LIMIT, lambda: self.run.pid(0) is not None):
            return None
        if not self.wait(self.dice.uniform(0.2, 10.0 if is_early else 5.0)):
            return None
        pid = self.run.pid(0)
        return None if pid is None else self._signal(0, pid, signal.SIGKILL)

    def stop(self) -> Fault | None:
        """Shorter or longer than patience."""
        if not self.wait(self.dice.uniform(0.3, 3.0)):
            return None
        victim = self.dice.randint(1, self.run.workers)
        pid = self.run.pid(victim)
        if pid is None or (fault := self._signal(victim, pid, signal.SIGSTOP)) is None:
            return None
        fault.lasts_s = self.dice.uniform(0.2, 5.0)
        self.wait(fault.lasts_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        fault.ended = time.time()
        return fault

    def join(self) -> Fault | None:
        """One more machine. It takes some seconds to import torch, the server six patiences to begin without it."""
        if not self.wait(self.dice.uniform(2.0, 7.0)):
            return None
        rank = self.absent.pop(self.dice.randrange(len(self.absent)))
        fault = self._fault(rank)
        self.run.start_node(rank)
        return fault

    def link(self) -> Fault | None:
        """Nothing is refused, nothing answers."""
        assert self.netlab is not None
        if not self.wait(self.dice.uniform(0.3, 3.0)):
            return None
        victim = self.dice.randint(1, self.run.workers)
        fault = self._fault(victim)
        self.netlab.call("cut", str(victim + 1))
        fault.lasts_s = self.dice.uniform(0.5, 6.0)
        self.wait(fault.lasts_s)
        self.netlab.call("heal", str(victim + 1))
        fault.ended = time.time()
        return fault

    def _signal(self, rank: int, pid: int, signum: int) -> Fault | None:
        fault = self._fault(rank)
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            return None
        return fault

    def _fault(self, rank: int) -> Fault:
        now = time.time()
        return Fault(rank, round(now - self.began, 2), began=now, ended=now)


def last_row(run: Run, rank: int) -> float:
    """When the newest row of a rank was made; 0: there is none."""
    return max((row["time"] for row in run.rows() if row["rank"] == rank), default=0.0)


def felt(fault: Fault, run: Run, kind: str) -> None:
    """How long a fault was felt: from the server's rows, and the ledger, which says whose samples are in which step."""
    made_at = {row["step"]: row["time"] for row in run.rows() if row["rank"] == 0 and "train/loss" in row}
    counted = [line for line in run.ledger() if fault.rank in (0, line["rank"]) and line["step"] in made_at]
    if kind == "kill":  # what it had pushed before counts too
        before = {line["session"] for line in counted if made_at[line["step"]] <= fault.began}
        counted = [line for line in counted if line["session"] not in before]
    times = [made_at[line["step"]] for line in counted]
    back = min((when for when in times if when > fault.ended), default=None)
    fault.back_s = None if back is None else round(back - fault.ended, 2)
    updates = sorted(made_at.values())
    until = back or fault.ended
    gaps = [b - a for a, b in itertools.pairwise(updates) if b > fault.began and a < until]
    fault.pause_s = round(max(gaps), 2) if gaps else None
    fault.lasts_s = round(fault.lasts_s, 2)


class Netlab:
    """Hosts in namespaces; host i of the tool is rank i - 1."""

    def __init__(self, tool: Path, folder: Path) -> None:
        self._tool = tool
        self.prefix = f"storm{os.getpid()}x"
        self._environment = {**os.environ, "NETLAB_PREFIX": self.prefix, "NETLAB_STATE": str(folder / "netlab")}

    def call(self, *arguments: str) -> None:
        """Run the tool."""
        subprocess.run(["bash", str(self._tool), *arguments], env=self._environment, check=True)

    def on_host(self, rank: int) -> list[str]:
        """What stands before a command that runs there."""
        return ["ip", "netns", "exec", f"{self.prefix}{rank + 1}"]


# ---- trials


def strike(
    trial: Trial,
    algorithm: str,
    kind: str,
    wanted: int,
    options: argparse.Namespace,
    folder: Path,
    limit: float,
) -> None:
    """One run with at most `wanted` faults; `limit`: seconds that it may train, without those for faults."""
    dice = random.Random(f"{algorithm} {kind} {trial.seed} {trial.number}")
    run = Run(algorithm, options, PATIENCE.get(kind, DEFAULT_PATIENCE), folder)
    with contextlib.ExitStack() as closing:
        netlab = Netlab(options.netlab, folder) if kind == "link" else None
        if netlab is not None:
            closing.callback(netlab.call, "down")
            netlab.call("up", str(options.workers + 1))
        closing.callback(run.end)
        storm = Storm(run, dice, trial, netlab)
        start(run, storm, kind, wanted, netlab)
        began = time.monotonic()
        if not storm.wait(START_LIMIT, run.has_worker if kind == "join" else lambda: last_row(run, 0) > 0):
            trial.problems.append("training did not begin")
        storm.began = time.time()
        while len(trial.faults) < wanted and not trial.problems:
            fault = getattr(storm, kind)()
            if fault is None:
                break
            trial.faults.append(fault)
        began_waiting = time.monotonic()
        while not run.is_over() and time.monotonic() < began_waiting + limit + FAULT_LIMIT * len(trial.faults):
            time.sleep(0.1)
            if kind == "join" and run.processes["host0"].poll() is not None:
                leave_out_late(trial, run)
        trial.wall_s = round(time.monotonic() - began, 1)
        judge(trial, run, algorithm, kind)
        if kind == "join":
            leave_out_early(trial, run)


def start(run: Run, storm: Storm, kind: str, wanted: int, netlab: Netlab | None) -> None:
    """All processes but those that are to join."""
    if kind in ("kill", "stop", "server"):
        run.start_local()
        return
    ranks = list(range(run.workers + 1))
    if kind == "join":
        storm.absent = storm.dice.sample(ranks[1:], min(wanted, run.workers - 1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run.write_cluster(lambda rank: "127.0.0.1" if netlab is None else f"198.18.0.{rank + 1}", port)
    for rank in ranks:
        if rank not in storm.absent:
            run.start_node(rank, None if netlab is None else netlab.on_host(rank))


def leave_out_late(trial: Trial, run: Run) -> None:
    """Machines that were still starting when the run was over: they look for a server that nobody will start."""
    for fault in list(trial.faults):
        name = f"host{fault.rank}"
        late = run.processes.get(name)
        is_starting = late is not None and late.poll() is None and time.monotonic() - run.started_at[name] < STARTS_S
        if late is not None and is_starting and not run.has_begun(fault.rank):
            trial.faults.remove(fault)
            trial.notes.append(f"rank {fault.rank} came when the run was over")
            del run.processes[name]
            late.kill()
            late.wait()


def leave_out_early(trial: Trial, run: Run) -> None:
    """Machines that came before the run had begun: they have joined nothing."""
    with contextlib.suppress(OSError):
        joined = json.loads((run.out / "summary.json").read_text())["joined_ranks"]
        for fault in [fault for fault in trial.faults if fault.rank not in joined]:
            trial.faults.remove(fault)
            trial.notes.append(f"rank {fault.rank} came before the run had begun")


def judge(trial: Trial, run: Run, algorithm: str, kind: str) -> None:
    """What the run was to do and did not."""
    if not run.is_over():
        running = [name for name, process in run.processes.items() if process.poll() is None]
        trial.problems.append(f"hangs: {', '.join(running)} had not ended after {trial.wall_s} s")
        (run.folder / "stacks").write_text(run.stacks(), encoding="utf-8")
    for name, process in run.processes.items():
        if process.poll() not in (None, 0):
            said = (run.folder / f"output-{name}").read_text(errors="replace").strip().splitlines()
            last = said[-1].replace(str(run.folder), "...") if said else ""
            trial.problems.append(f"{name} ended with {process.poll()}: {last[:300]}")
    for left in run.left() if run.is_over() else []:
        trial.problems.append(f"process left: {' '.join(left.cmdline()[1:4])}")
    trial.problems += audit(run.out, SAMPLES, EPOCHS[algorithm])
    for fault in trial.faults:
        felt(fault, run, kind)
    with contextlib.suppress(OSError):
        summary = json.loads((run.out / "summary.json").read_text())
        trial.val_loss, trial.restarts = summary["val_loss"], summary.get("restarts")
        if summary["samples"] != SAMPLES * EPOCHS[algorithm]:
            trial.problems.append(f"summary.json says {summary['samples']} samples")
    text = "".join(run.log(rank) for rank in range(run.workers + 1))
    if (count := text.count("Traceback (most recent call last)")) > 0:
        trial.notes.append(f"{count} tracebacks in the logs")


def compare(trial: Trial, reference: dict[str, Any]) -> None:
    """The validation loss with that of runs without a fault. A lower one is no fault."""
    if trial.val_loss is None:
        trial.problems.append("no validation loss")
        return
    trial.loss_deviation = round(trial.val_loss / reference["median"] - 1, 4)
    if trial.loss_deviation > TOLERANCE:
        trial.problems.append(f"validation loss {trial.val_loss:.4f} is {trial.loss_deviation:+.1%} from undisturbed")


def settings_of(algorithm: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a run without a fault must have in common with one that has some."""
    return {
        "epochs": EPOCHS[algorithm], "learning_rate": LEARNING_RATES[algorithm], "workers": options.workers,
        "lr_schedule": "cosine", "overrides": options.override,
    }  # fmt: skip


def measure_reference(algorithm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs without a fault: validation losses, their median, how far they are apart, and how long they take."""
    losses, walls, problems = [], [], []
    for _ in range(REFERENCES):
        with scratch() as folder:
            run = Run(algorithm, options, DEFAULT_PATIENCE, folder)
            began = time.monotonic()
            run.start_local()
            try:
                while not run.is_over() and time.monotonic() < began + 300:
                    time.sleep(0.1)
                walls.append(round(time.monotonic() - began, 1))
                losses.append(json.loads((run.out / "summary.json").read_text())["val_loss"])
                problems += audit(run.out, SAMPLES, EPOCHS[algorithm])
            finally:
                run.end()
    median = statistics.median(losses)
    spread = round((max(losses) - min(losses)) / median, 4)
    measured = {"val_losses": losses, "median": median, "spread": spread, "wall_s": walls, "problems": problems}
    return {**settings_of(algorithm, options), **measured}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one run."""
    folder = Path(tempfile.mkdtemp(prefix="smolcluster-storm-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def storm_of(algorithm: str, kind: str, reference: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """As many runs as it takes for the wanted number of faults."""
    trials: list[Trial] = []
    done = 0
    while done < options.trials and len(trials) < 2 * options.trials:
        trial = Trial(len(trials), options.seed)
        a_run = {"join": options.workers - 1}.get(kind, options.per_run)
        with scratch() as folder:
            wanted, limit = min(a_run, options.trials - done), 3 * max(reference["wall_s"])
            strike(trial, algorithm, kind, wanted, options, folder, limit)
            compare(trial, reference)
            if options.keep is not None and (trial.problems or trial.notes):
                kept = options.keep / f"{algorithm}-{kind}-{trial.seed}-{trial.number}"
                shutil.copytree(folder, kept, dirs_exist_ok=True)
        done += len(trial.faults)
        trials.append(trial)
        print(algorithm, kind, json.dumps(as_json(trial)), flush=True)
    return entry(algorithm, kind, trials, reference)


def as_json(trial: Trial) -> dict[str, Any]:
    """Without the moments, which are of this machine's clock."""
    told = asdict(trial)
    for fault in told["faults"]:
        del fault["began"], fault["ended"]
    return told


def entry(algorithm: str, kind: str, trials: list[Trial], reference: dict[str, Any]) -> dict[str, Any]:
    """What one storm found."""
    faults = [fault for trial in trials for fault in trial.faults]
    deviations = [trial.loss_deviation for trial in trials if trial.loss_deviation is not None]
    return {
        "algorithm": algorithm,
        "fault": kind,
        "faults": len(faults),
        "runs": len(trials),
        "failed_runs": sum(bool(trial.problems) for trial in trials),
        "loss_deviation_max": max(deviations, key=abs, default=None),
        "back_s_max": max((fault.back_s for fault in faults if fault.back_s is not None), default=None),
        "pause_s_max": max((fault.pause_s for fault in faults if fault.pause_s is not None), default=None),
        "measured": described(),
        "reference": reference,
        "trials": [as_json(trial) for trial in trials],
    }


def described() -> dict[str, Any]:
    """Where it was measured, without this machine's paths."""
    told = machine.describe()
    return told | {"command": re.sub(r" --(keep|out|netlab)[ =]\S+", "", told["command"])}


def missing(kind: str, netlab: Path) -> str | None:
    """Why a fault cannot be made here."""
    if kind != "link":
        return None
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    return None if netlab.is_file() and shutil.which("ip") else "needs netlab and iproute2: give --netlab"


def main() -> None:
    """Run, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=sorted(EPOCHS), required=True)
    parser.add_argument("--fault", choices=FAULTS, action="append", help="default: all")
    parser.add_argument("--trials", type=int, default=20, help="faults in all, of each kind")
    parser.add_argument("--per-run", type=int, default=4, help="faults of a run, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--override", action="append", default=[], help="KEY=VALUE for all runs")
    parser.add_argument("--netlab", type=Path, default=Path("..", "shared", "tools", "netlab"))
    parser.add_argument("--reference", action="store_true", help="only measure runs without a fault, anew")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "param_server_storm.json")
    parser.add_argument("--keep", type=Path, help="keep the folders of runs with a problem there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # so that nothing is left behind
    before = json.loads(options.out.read_text()) if options.out.exists() else {"references": {}, "storms": []}
    references, algorithm = before["references"], options.algorithm
    known = references.get(algorithm, {})
    settings = settings_of(algorithm, options)
    if options.reference or {key: known.get(key) for key in settings} != settings:
        references[algorithm] = measure_reference(algorithm, options)
        print(algorithm, "reference", json.dumps(references[algorithm]), flush=True)
    storms = {(one["algorithm"], one["fault"]): one for one in before["storms"]}
    failed = False
    kinds = [] if options.reference else (options.fault or FAULTS)
    write(options.out, references, storms)
    for kind in kinds:
        if (reason := missing(kind, options.netlab)) is not None:
            print(f"{kind}: left out, {reason}")
            continue
        found = storm_of(algorithm, kind, references[algorithm], options)
        failed |= found["failed_runs"] > 0 or found["faults"] < options.trials
        storms[(algorithm, kind)] = found
        told = {key: value for key, value in found.items() if not isinstance(value, dict | list)}
        print(json.dumps(told), flush=True)
        write(options.out, references, storms)
    sys.exit(failed)


def write(path: Path, references: dict[str, Any], storms: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The results file; other storms stay as they are."""
    ordered = [storms[key] for key in sorted(storms)]
    figures = {"measured": described(), "references": references, "storms": ordered}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
