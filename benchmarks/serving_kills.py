"""Stages of a served model die at random tokens: every answer goes on to its end, and is the same as without.

    python benchmarks/serving_kills.py                                   25 of each kind
    python benchmarks/serving_kills.py --kind stop --first 10 --count 5  only these; the results file keeps the others
    python benchmarks/serving_kills.py --kind half --count 4 --out FILE  other results file: what the test suite runs

kill  SIGKILL of a stage
stop  SIGSTOP of a stage
link  the link of a stage's machine goes down (needs root: each machine is a network namespace)
half  a stage sends a part of a message; then it closes the connection, dies, freezes, or sends nothing more on it

A run is a controller, one or two more stages and sometimes a spare one: the machines of a cluster file, as forks of
this process, so that torch is imported once. The controller has the first layers, in some runs the engine only. How
fast a machine reads weights is drawn and not measured, so that splits differ. Several answers are written at the same
time, greedy and drawn ones after prompts of mixed length, some begun later than others, sometimes more than there are
slots. A fault hits a stage after the first at a random token, or while prompts are computed. In every third run another
machine is lost soon after, or while the chain is being made again. In every third one what was suspended, cut off or
killed comes back: then it must be used again.

Each answer is compared with that of one process which is asked nothing else: in float64, and in float32 with
--deterministic. Stall: the longest time between two tokens of a stream; `calm_s` is the longest before the fault.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import logging
import math
import os
import random
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
import psutil

from faults import HALVES, Process, end_all, enter, fork, heal, last_line, scratch, watch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch

from netns import lab
from smolcluster.config.load import load_config
from smolcluster.config.schema import ServingConfig
from smolcluster.device import prepare_process
from smolcluster.run import serve_machines, stages
from smolcluster.run.stage import StagePlace, serve_layers
from smolcluster.serving import node as serving_node
from smolcluster.serving.engine import Engine
from smolcluster.serving.executor import LocalExecutor
from smolcluster.serving.layer_store import CacheSize, LayerStore, Machine
from smolcluster.serving.requests import Event, Request
from smolcluster.serving.sampling import Sampling
from smolcluster.serving.stage_group import StageGroup
from smolcluster.transport.security import new_token
from smolcluster.transport.tcp import TcpChannel

KINDS = ("kill", "stop", "link", "half")
FAMILIES = ("llama", "gpt2", "qwen2", "mistral")
TRAINED = "stories260K-hf"
NAMES = ("first", "second", "third", "spare")
PATIENCE = 1.0
BLOCKS, LENGTH, TOKENS = 5, 512, 96
PROMPTS = (3, 300, 17, 60, 1, 150, 33, 5)
# Who sends half a message and then lives on.
LIVES = (("half", "close"), ("half", "silent"))
# Until all answers are there after a fault; a stall is looked at by itself.
ANSWER_SECONDS = 60.0
START_SECONDS = 60.0
END_SECONDS = 8.0
# Below those that the system gives to whoever connects: a node must be able to listen there again and again.
PORTS = range(20000, 32000)


# ---- what is asked


def models() -> list[str]:
    """Random ones of each family, and the trained one where it is."""
    return [*FAMILIES, *([TRAINED] if trained_folder().is_dir() else [])]


def trained_folder() -> Path:
    """In SMOLCLUSTER_DATA, or in shared/data beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("SMOLCLUSTER_DATA") or beside, TRAINED)


def make_folder(folder: Path, name: str) -> None:
    """A model's folder; in a process of its own, as transformers is large."""
    if name == TRAINED:
        folder.symlink_to(trained_folder())
        return
    from models.hf_folders import make_hf_folder

    sizes: dict[str, Any] = {"num_hidden_layers": BLOCKS, "max_position_embeddings": LENGTH}
    if name == "gpt2":
        sizes = {"n_layer": BLOCKS, "n_positions": LENGTH}
    if name == "mistral":
        sizes["sliding_window"] = 40
    make_hf_folder(folder, name, tie_word_embeddings=False, **sizes)


def requests(vocab_size: int) -> list[Request]:
    """As many as there are PROMPTS: every other one greedy, the others drawn in different ways."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(vocab_size, (count,), generator=generator).tolist() for count in PROMPTS]
    ways: list[dict[str, Any]] = [{"top_k": 12}, {"top_p": 0.9}, {"repetition_penalty": 1.2}, {"min_p": 0.05}]
    return [
        Request(prompt, TOKENS, Sampling(seed=n, temperature=0.9, **ways[n // 2]) if n % 2 else Sampling(temperature=0))
        for n, prompt in enumerate(drawn)
    ]


def decode(tokens: Sequence[int]) -> str:
    """Any text that shows what is missing or doubled."""
    return "".join(f"<{token}>" for token in tokens)


def undisturbed(folder: Path, dtype: str) -> list[list[int]]:
    """Each answer, by one process that is asked one thing after the other."""
    prepare_process()
    is_deterministic = dtype == "fp32"
    store = LayerStore(folder, dtype, is_deterministic=is_deterministic)
    executor = LocalExecutor(store.decoder(range(store.layers), CacheSize(1, LENGTH)))
    engine = Engine([(executor, None)], decode, is_deterministic=is_deterministic)
    answers: list[list[int]] = []
    for request in requests(store.config.vocab_size):
        tokens: list[int] = []
        ended = threading.Event()

        def take(event: Event, tokens: list[int] = tokens, ended: threading.Event = ended) -> None:
            if event.token is not None:
                tokens.append(event.token.token)
            if event.finish_reason is not None:
                ended.set()

        engine.submit(request, take)
        assert ended.wait(100)
        answers.append(tokens)
    engine.close()
    return answers


class Library:
    """Models and their undisturbed answers, made when they are first needed. Nothing of it runs in this process."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._answers: dict[tuple[str, str], list[list[int]]] = {}

    def folder(self, name: str) -> Path:
        """The model's."""
        folder = self._root / name
        if not folder.exists():
            self._run(lambda: make_folder(folder, name))
        return folder

    def answers(self, name: str, dtype: str) -> list[list[int]]:
        """What is asked of it, answered without a fault."""
        if (name, dtype) not in self._answers:
            folder, file = self.folder(name), self._root / "answers.json"
            self._run(lambda: file.write_text(json.dumps(undisturbed(folder, dtype))))
            self._answers[name, dtype] = json.loads(file.read_text())
        return self._answers[name, dtype]

    def _run(self, call: Callable[[], object]) -> None:
        process = fork(lambda: call_whole(call), self._root / "output", {})
        watch([process], time.monotonic() + 200)
        if process.code != 0:
            end_all([process])
            raise RuntimeError(process.said())


# ---- one fault, and what is to happen


@dataclass
class Trial:
    """A run, and what came of it.

    Attributes:
        stages: machines, the controller included; `spares` besides.
        is_engine_only: the controller has no layers.
        streams: answers that are written; `slots`: at the same time.
        moment: at a random token, or soon after prompts have come.
        second: another machine is lost: "soon", while the chain is "remaking", or "" never.
        heals: what was hit comes back.
        killed: names of the machines that were hit.
        at_token: tokens that had been handed out by then, of `streams` * TOKENS.
        chains: that were begun anew.
        recovered_s: from the (first) fault to the end of the longest stall.
        stalls_s: longest time between two tokens of each stream that had a slot, from the fault on.
        calm_s: the same before the fault, of all streams.
        again_s: from when a machine came back until it was used again.
    """

    kind: str
    number: int
    seed: int
    model: str
    dtype: str
    variant: str
    stages: int
    spares: int
    is_engine_only: bool
    streams: int
    slots: int
    moment: str
    second: str
    heals: bool
    killed: list[str] = field(default_factory=list)
    at_token: int = -1
    chains: int = 0
    recovered_s: float | None = None
    stalls_s: list[float] = field(default_factory=list)
    calm_s: float | None = None
    again_s: float | None = None
    is_identical: bool = False
    outcome: str = ""
    problems: list[str] = field(default_factory=list)


def draw(kind: str, number: int, seed: int, attempt: int, known: Sequence[str]) -> tuple[Trial, random.Random]:
    """What shall happen, from these numbers alone."""
    dice = random.Random(f"{kind} {seed} {number} {attempt}")
    nodes, spares = dice.choice([(2, 0), (2, 0), (2, 0), (2, 1), (2, 1), (1, 0), (1, 1)])
    is_engine_only = nodes == 2 and dice.random() < 0.3
    trial = Trial(
        kind,
        number,
        seed,
        model=known[number % len(known)],
        dtype=("fp64", "fp32")[number % 2],
        variant=HALVES[number // 2 % len(HALVES)] if kind == "half" else "",
        stages=1 + nodes,
        spares=spares,
        is_engine_only=is_engine_only,
        streams=dice.randint(3, len(PROMPTS)),
        slots=dice.choice((4, len(PROMPTS))),
        moment=dice.choice(("token", "token", "token", "prompt")),
        second=dice.choice(("soon", "remaking")) if number % 3 == 2 and nodes + spares - is_engine_only > 1 else "",
        heals=number % 3 == 1,
    )
    return trial, dice


# ---- the machines


def call_whole(call: Callable[[], object]) -> None:
    """In a fork: a traceback is worth more than an exit code."""
    try:
        call()
    except Exception:  # noqa: BLE001 - the top of a process
        traceback.print_exc()
        raise SystemExit(98) from None
    raise SystemExit(0)


def own_leftovers() -> list[str]:
    """What this process has that it should not have any more: threads, and sockets."""
    deadline = time.monotonic() + 2
    while True:
        found = [f"thread {t.name}" for t in threading.enumerate() if t is not threading.main_thread()]
        gone = (psutil.CONN_TIME_WAIT, psutil.CONN_NONE)
        connections = psutil.Process().net_connections("tcp")
        found += [f"socket {c.laddr} {c.status}" for c in connections if c.status not in gone]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


class HalfMessage:
    """In a stage's process: at SIGUSR1 the next message to the next stage is cut, and then it happens."""

    def __init__(self, what: str, cut: float, report: int) -> None:
        self.what, self.cut, self.report = what, cut, report
        self.armed = False
        self.silent: set[TcpChannel] = set()

    def install(self) -> None:
        """From now on messages may be cut."""
        try_send = TcpChannel.try_send

        def sending(channel: TcpChannel, buffers: Sequence[memoryview]) -> int:
            if channel in self.silent and channel.fileno() >= 0:  # closed, it says so as ever
                time.sleep(0.01)
                return 0
            if not self.armed:
                return try_send(channel, buffers)
            self.armed = False
            whole = b"".join(buffers)
            taken = try_send(channel, [memoryview(whole)[: max(1, int(self.cut * len(whole)))]])
            os.write(self.report, json.dumps({"cut": time.monotonic()}).encode() + b"\n")
            if self.what == "silent":
                self.silent.add(channel)
            elif self.what == "close":
                socket.socket(fileno=os.dup(channel.fileno())).shutdown(socket.SHUT_RDWR)
            else:
                os.kill(os.getpid(), signal.SIGKILL if self.what == "die" else signal.SIGSTOP)
            return taken

        TcpChannel.try_send = sending  # type: ignore[method-assign]
        signal.signal(signal.SIGUSR1, lambda signum, frame: setattr(self, "armed", True))


def be_node(part: StagePlace, folder: Path) -> None:
    """A node until SIGTERM, then 0, or what it has left."""
    with contextlib.suppress(KeyboardInterrupt):
        serve_layers(part, str(folder), "cpu")
    for left in own_leftovers():
        print("left behind:", left, file=sys.stderr)


class Controller:
    """The first machine: it has the engine. Told what to do by lines, and tells what happens by lines."""

    def __init__(self, trial: Trial, report: int) -> None:
        self._trial, self._report = trial, report
        self._chains = 0

    def run(self, part: serve_machines.Machines, folder: Path, commands: int) -> None:
        """Until it is told to end."""
        trial = self._trial
        self._watch_chains()
        prepare_process()
        store = LayerStore(folder, trial.dtype, is_deterministic=trial.dtype == "fp32")
        settings = ServingConfig(max_concurrent=trial.slots, ctx_length=LENGTH)
        layout = stages.Layout(
            processes=trial.stages - trial.is_engine_only,
            patience=PATIENCE,
            is_deterministic=store.is_deterministic,
            machines=part,
        )
        made = stages.Stages(folder, store, settings, "cpu", layout)
        engine = Engine(made.executors, decode, is_deterministic=store.is_deterministic)
        asked = requests(store.config.vocab_size)
        with os.fdopen(commands) as lines:
            for line in lines:
                match json.loads(line):
                    case {"ask": list(numbers), "round": int(turn)}:
                        for number in numbers:
                            engine.submit(asked[number], self._teller(turn, number))
                    case "reconnect":
                        engine.reconnect()
                    case "describe":
                        assert made._hub is not None  # who is there, spare ones too, is nobody else's business
                        self.tell({"there": [n.name for n in made._hub.nodes()], "chain": made.describe()["nodes"]})
                    case "end":
                        break
        made.stop()
        engine.close()
        made.close()
        self.tell({"recoveries": engine.counts.recoveries, "left": own_leftovers()})

    def tell(self, message: Any) -> None:
        """A line for the parent; short enough to be written whole, from any thread."""
        os.write(self._report, json.dumps(message).encode() + b"\n")

    def _teller(self, turn: int, number: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            token = None if event.token is None else event.token.token
            self.tell([turn, number, time.monotonic(), token, event.text, event.finish_reason, event.error])

        return tell

    def _watch_chains(self) -> None:
        assemble = StageGroup._assemble

        def assembling(group: StageGroup, nodes: Any) -> Any:
            self._chains += 1
            self.tell({"making": self._chains})
            return assemble(group, nodes)

        StageGroup._assemble = assembling  # type: ignore[method-assign]


@dataclass
class Answer:
    """What has come of one answer."""

    asked: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    error: str | None = None


class Run:
    """Processes, and what the controller says."""

    def __init__(self, trial: Trial, dice: random.Random, folder: Path, model: Path, hosts: lab.Lab | None) -> None:
        """Start them, in any order; blocks until all of them are there."""
        self.answers: dict[tuple[int, int], Answer] = {}
        self.chains = 0
        self.cut_at: float | None = None
        self.described: dict[str, list[str]] | None = None
        self.left: list[str] | None = None
        self._trial, self._dice, self._folder, self._model, self.hosts = trial, dice, folder, model, hosts
        self._names = NAMES[: trial.stages] + NAMES[len(NAMES) - trial.spares :]
        self._file = self._cluster_file()
        self._token = new_token().hex()
        self._speeds = {name: dice.uniform(1.0, 3.0) for name in self._names}
        self._buffer = b""
        self._reading, self._report = os.pipe()
        self._commands, self._command = os.pipe()
        order = dice.sample(self._names, len(self._names))
        self.processes = {name: self.start(name) for name in order}
        self.ever = list(self.processes.values())

    # ---- processes

    @property
    def controller(self) -> Process:
        return self.processes[self._names[0]]

    def start(self, name: str) -> Process:
        """A machine of the cluster file."""
        count = sum(path.name.startswith(f"{name}.") for path in self._folder.iterdir())
        variables = {"SMOLCLUSTER_TOKEN": self._token, "TMPDIR": str(self._folder), "OMP_NUM_THREADS": "1"}
        return fork(lambda: call_whole(lambda: self._be(name)), self._folder / f"{name}.{count}", variables)

    def _be(self, name: str) -> None:
        if self.hosts is not None:
            enter(Path(f"/run/netns/{self.hosts.prefix}{self._names.index(name)}"))
        os.close(self._command)
        faulthandler.register(signal.SIGUSR2)  # where it hangs
        logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(threadName)s %(message)s")

        def measured(config: object, dtype: str, device: str) -> Machine:
            return Machine(self._speeds[name], 1e9)

        serving_node.measure_machine = measured  # type: ignore[assignment]
        stages.measure_machine = measured  # type: ignore[assignment]
        config = load_config(cluster_files=(self._file,)).config
        hostname = None if name == self._names[0] else name
        part = serve_machines.find_part(config, hostname, None, lambda text: print(text, file=sys.stderr))
        if isinstance(part, StagePlace):
            HalfMessage(self._trial.variant, self._dice.random(), self._report).install()
            be_node(part, self._model)
        else:
            Controller(self._trial, self._report).run(part, self._model, self._commands)

    def _cluster_file(self) -> Path:
        ports = dict.fromkeys(self._names, 7000) if self.hosts else dict(zip(self._names, free_ports(), strict=False))
        ips = {name: self.hosts.address(n) if self.hosts else "127.0.0.1" for n, name in enumerate(self._names)}
        file = self._folder / "cluster.yaml"
        cluster: dict[str, Any] = {"host_ip": ips, "port": ports, "server": self._names[0], "patience": PATIENCE}
        if self._trial.is_engine_only:
            cluster["serving"] = {"controller": self._names[0]}
        file.write_text(json.dumps(cluster))
        return file

    # ---- the controller

    def say(self, command: Any) -> None:
        """To the controller."""
        os.write(self._command, json.dumps(command).encode() + b"\n")

    def ask(self, numbers: Sequence[int], turn: int = 0) -> None:
        """Begin some answers."""
        for number in numbers:
            self.answers[turn, number] = Answer(time.monotonic())
        self.say({"ask": list(numbers), "round": turn})

    def listen(self, until: float) -> bool:
        """Take what is said, until then (`time.monotonic()`) or until something was."""
        ready, _, _ = select.select([self._reading], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return False
        self._buffer += os.read(self._reading, 1 << 16)
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return True

    def wait(self, is_so: Callable[[], bool], seconds: float) -> bool:
        """Listen until something is so; whether it is."""
        deadline = time.monotonic() + seconds
        while not is_so():
            has_ended = watch([self.controller], 0)
            if not self.listen(0 if has_ended else min(deadline, time.monotonic() + 0.5)) and (
                has_ended or time.monotonic() >= deadline
            ):
                return False
        return True

    def is_done(self, turn: int = 0) -> bool:
        """All answers that were begun have ended."""
        return all(answer.reason is not None for (round_, _), answer in self.answers.items() if round_ == turn)

    def handed_out(self) -> int:
        """Tokens of the first round so far."""
        return sum(len(answer.tokens) for (turn, _), answer in self.answers.items() if turn == 0)

    def describe(self) -> dict[str, list[str]]:
        """Which nodes are there, and which are in the chain; empty: it does not say."""
        self.described = None
        self.say("describe")
        self.wait(lambda: self.described is not None, 5)
        return self.described or {"there": [], "chain": []}

    def _take(self, message: Any) -> None:
        match message:
            case [turn, number, at, token, text, reason, error]:
                answer = self.answers[turn, number]
                answer.text += text
                answer.reason, answer.error = reason, error
                if token is not None:
                    answer.tokens.append(token)
                    answer.times.append(at)
            case {"making": int(number)}:
                self.chains = number
            case {"cut": float(at)}:
                self.cut_at = at
            case {"there": list(), "chain": list()}:
                self.described = message
            case {"left": list(left)}:
                self.left = left

    # ---- faults

    def hit(self, name: str, kind: str) -> float | None:
        """Let it happen; when it did, None: nothing was left that it could happen to."""
        process = self.processes[name]
        if kind == "link":
            assert self.hosts is not None
            self.hosts.cut(self._names.index(name))
        elif kind == "half":
            process.signal(signal.SIGUSR1)
            self.wait(lambda: self.cut_at is not None or self.is_done(), ANSWER_SECONDS)
            return self.cut_at
        else:
            process.signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        return time.monotonic()

    def come_back(self, name: str, kind: str) -> None:
        """What was lost is there again."""
        process = self.processes[name]
        if kind == "link":
            assert self.hosts is not None
            heal(self.hosts, self._names.index(name))
        elif watch([process], time.monotonic() + 0.1):  # dead
            self.processes[name] = self.start(name)
            self.ever.append(self.processes[name])
        else:
            process.signal(signal.SIGCONT)

    def close(self, lost: Sequence[str]) -> list[str]:
        """End everything; what does not end, or leaves something behind. `lost`: who need not do so by itself."""
        problems = []
        self.say("end")
        if not self.wait(lambda: self.left is not None, END_SECONDS):
            problems.append("the controller does not end")
            self.controller.signal(signal.SIGUSR2)
            watch([self.controller], time.monotonic() + 0.5)
        problems += [f"left behind by the controller: {left}" for left in self.left or []]
        watch([self.controller], time.monotonic() + 2)
        time.sleep(0.3)  # so that its nodes know
        for name, process in self.processes.items():
            if process.ended is None and process is not self.controller:
                process.signal(signal.SIGKILL if name in lost else signal.SIGTERM)
        if not watch(self.ever, time.monotonic() + END_SECONDS):
            problems += [f"{name} does not end" for name, process in self.processes.items() if process.ended is None]
        end_all(self.ever)
        for name, process in self.processes.items():
            if process.code != 0 and name not in lost:
                problems.append(f"{name} ended with {process.code}: {last_line(process.said())}")
        for process in self.ever:
            said = process.said().splitlines()
            problems += [f"{process.output.name} {line}" for line in said if line.startswith("left behind")]
            problems += [f"{process.output.name} has a traceback" for line in said if line.startswith("Traceback")]
        return problems

    def discard(self) -> None:
        """Whatever happened, nothing is left."""
        end_all(self.ever)
        for descriptor in (self._reading, self._report, self._commands, self._command):
            os.close(descriptor)


def free_ports() -> list[int]:
    """Ports of loopback that nobody uses now; one for each of NAMES."""
    found: list[int] = []
    while len(found) < len(NAMES):
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


# ---- a run


def strike(trial: Trial, dice: random.Random, run: Run, answers: Sequence[Sequence[int]]) -> None:
    """Ask, let it happen, and judge what follows."""
    nodes = [*NAMES[1 : trial.stages], *NAMES[len(NAMES) - trial.spares :]]
    if not run.wait(lambda: run.chains > 0, START_SECONDS) or not all_there(run, nodes):
        trial.problems.append("not all machines came")
        return
    asked = dice.sample(range(len(PROMPTS)), trial.streams)
    later = asked[dice.randint(1, trial.streams - 1) :]
    run.ask([number for number in asked if number not in later])
    # Those that begin later do so before the first ones can be done.
    begin, total = dice.randint(1, TOKENS // 2), trial.streams * TOKENS
    run.wait(lambda: run.handed_out() >= begin, ANSWER_SECONDS)
    run.ask(later)
    if trial.moment == "token":
        at = dice.randint(begin, int(0.85 * total))
        run.wait(lambda: run.handed_out() >= at, ANSWER_SECONDS)
    else:
        run.listen(time.monotonic() + dice.uniform(0, 0.03))
    victim = dice.choice(NAMES[1 + trial.is_engine_only : trial.stages])
    struck = None if run.is_done() else run.hit(victim, trial.kind)
    if struck is None:
        trial.outcome = "after the end"
        trial.problems += run.close([])
        return
    hits = [(victim, trial.kind)]
    trial.at_token = sum(at <= struck for answer in run.answers.values() for at in answer.times)
    if trial.second:
        hits += hit_another(trial, dice, run, [name for name in nodes if name != victim])
    trial.killed = [name for name, _ in hits]
    if not run.wait(run.is_done, ANSWER_SECONDS):
        trial.problems.append(f"{sum(answer.reason is None for answer in run.answers.values())} answers do not end")
    judge(trial, run, struck, answers)
    lost = trial.killed
    if trial.heals and not trial.problems:
        use_again(trial, dice, run, hits, answers)
        watch(run.ever, time.monotonic() + 0.1)
        lost = [name for name in nodes if run.processes[name].ended is not None]
    # What was cut off or only fell silent lives, and has to end as well.
    alive = [name for name, kind in hits if kind == "link" or (kind, trial.variant) in LIVES]
    trial.problems += run.close([name for name in lost if name not in alive])


def all_there(run: Run, nodes: Sequence[str]) -> bool:
    """Wait for the spare ones too."""
    deadline = time.monotonic() + START_SECONDS
    while not set(nodes) <= set(run.describe()["there"]):
        if time.monotonic() > deadline or watch([run.controller], 0):
            return False
        time.sleep(0.05)
    return True


def hit_another(trial: Trial, dice: random.Random, run: Run, others: Sequence[str]) -> list[tuple[str, str]]:
    """A second machine is lost; none if all answers are done before."""
    if trial.second == "remaking":
        known = run.chains
        run.wait(lambda: run.chains > known or run.is_done(), ANSWER_SECONDS)
    until = time.monotonic() + dice.uniform(0, 0.1 if trial.second == "remaking" else 0.3 * PATIENCE)
    while time.monotonic() < until and not run.is_done():
        run.listen(until)
    if run.is_done():
        return []
    kind = dice.choice(("kill", "stop", "link" if trial.kind == "link" else "kill"))
    name = dice.choice(others)
    run.hit(name, kind)
    return [(name, kind)]


def judge(trial: Trial, run: Run, struck: float, answers: Sequence[Sequence[int]]) -> None:
    """Compare with what ought to be."""
    trial.outcome = "went on"
    trial.chains = run.chains - 1
    compare(trial, run, 0, answers)
    calm, stalls = [], []
    for answer in run.answers.values():
        gaps = [(after - before, after) for before, after in zip(answer.times, answer.times[1:], strict=False)]
        if trial.slots >= trial.streams and answer.times:  # else the first token may have waited for a slot
            gaps.append((answer.times[0] - max(answer.asked, struck), answer.times[0]))
        calm += [gap for gap, after in gaps if gap > 0 and after <= struck]
        later = [(gap, after) for gap, after in gaps if after > struck]
        was_queued = trial.slots < trial.streams and min(answer.times, default=struck) > struck
        if later and (trial.second or not was_queued):
            stalls.append(max(later))
    trial.stalls_s = [round(gap, 3) for gap, _ in stalls]
    trial.calm_s = round(max(calm), 3) if calm else None
    trial.recovered_s = round(max(stalls)[1] - struck, 3) if stalls else None
    if not trial.chains and not trial.problems:
        trial.outcome = "after the end"  # the last tokens were on their way already


def compare(trial: Trial, run: Run, turn: int, answers: Sequence[Sequence[int]]) -> None:
    """The answers of a round."""
    trial.is_identical = True
    for (round_, number), answer in run.answers.items():
        if round_ != turn:
            continue
        if answer.reason != "length":
            trial.problems.append(f"answer {number} of round {turn}: {answer.reason} {answer.error}")
        if answer.tokens != answers[number] or answer.text != decode(answers[number]):
            trial.is_identical = False
            same = next((n for n, (a, b) in enumerate(zip(answer.tokens, answers[number], strict=False)) if a != b), -1)
            trial.problems.append(
                f"answer {number} of round {turn} differs from token {same} on; it has {len(answer.tokens)}"
            )


def use_again(
    trial: Trial, dice: random.Random, run: Run, hits: Sequence[tuple[str, str]], answers: Sequence[Sequence[int]]
) -> None:
    """What was lost comes back, while others write; then it is in the chain, if need be in the place of a spare one."""
    run.ask(range(len(PROMPTS)), 1)
    run.listen(time.monotonic() + dice.uniform(0, 0.3))
    began = time.monotonic()
    for name, kind in hits:
        run.come_back(name, kind)
    victim = hits[0][0]
    deadline = began + START_SECONDS
    while victim not in run.describe()["there"] and time.monotonic() < deadline:
        time.sleep(0.02)
    in_place = [name for name in run.describe()["chain"] if name not in (NAMES[0], victim)]
    if trial.spares and in_place:
        run.hit(in_place[-1], "kill")
    while victim not in run.describe()["chain"] and time.monotonic() < deadline:
        run.say("reconnect")
        run.listen(time.monotonic() + 0.2)
        run.wait(lambda: run.is_done(1), ANSWER_SECONDS)
        time.sleep(0.05)
    trial.again_s = round(time.monotonic() - began, 3)
    if victim not in run.describe()["chain"]:
        trial.problems.append(f"{victim} is not used again")
    run.ask(range(len(PROMPTS)), 2)
    if not run.wait(lambda: run.is_done(1) and run.is_done(2), ANSWER_SECONDS):
        trial.problems.append("answers after it came back do not end")
    compare(trial, run, 1, answers)
    first = trial.is_identical
    compare(trial, run, 2, answers)
    trial.is_identical &= first


# ---- all of them


def storm(
    kind: str, numbers: Sequence[int], seed: int, known: Sequence[str], library: Library, keep: Path | None
) -> Iterator[Trial]:
    """One run for each number, with these models in turn. A moment after the end of its answers is drawn again."""
    for number in numbers:
        for attempt in range(10):
            trial, dice = draw(kind, number, seed, attempt, known)
            answers = library.answers(trial.model, trial.dtype)
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(scratch())
                # Links of their own for each run: one that was cut is as it was.
                hosts = stack.enter_context(lab.network(len(NAMES))) if kind == "link" else None
                run = Run(trial, dice, folder, library.folder(trial.model), hosts)
                stack.callback(run.discard)
                strike(trial, dice, run, answers)
                if hosts is not None:
                    trial.problems += open_sockets(hosts)
                if keep is not None and trial.problems:
                    shutil.copytree(folder, keep / f"{kind}-{seed}-{number}", dirs_exist_ok=True)
            if trial.outcome != "after the end" or trial.problems:
                break
        yield trial


def open_sockets(hosts: lab.Lab) -> list[str]:
    """Sockets of processes that have ended."""
    found = []
    for host in range(hosts.hosts):
        shown = hosts.popen(host, ["ss", "-Htan", "state", "listening", "state", "established"], {})
        found += [f"socket {line} on host {host}" for line in shown.communicate()[0].splitlines()]
    return found


def percentile(values: Sequence[float], part: float) -> float | None:
    """The smallest that at least this part of them does not exceed."""
    return sorted(values)[math.ceil(part * len(values)) - 1] if values else None


def table(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each kind of fault, with a spare machine and without; and for two losses at once."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for trial in trials:
        losses = len(trial["killed"])
        for kind in (trial["kind"], "all"):
            groups.setdefault((kind, "yes" if trial["spares"] else "no", losses), []).append(trial)
    rows = []
    for (kind, spare, losses), mine in sorted(groups.items(), key=lambda item: (*KINDS, "all").index(item[0][0])):
        stalls = [stall for trial in mine for stall in trial["stalls_s"]]
        rows.append({
            "kind": kind,
            "spare": spare,
            "losses": losses,
            "runs": len(mine),
            "ok": sum(not trial["problems"] for trial in mine),
            "identical": sum(trial["is_identical"] for trial in mine),
            "streams": len(stalls),
            "stall_p50_s": percentile(stalls, 0.5),
            "stall_p95_s": percentile(stalls, 0.95),
            "stall_max_s": max(stalls, default=None),
            "calm_max_s": max((trial["calm_s"] for trial in mine if trial["calm_s"] is not None), default=None),
        })  # fmt: skip
    return rows


def main() -> None:
    """Run, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--first", type=int, default=0, help="number of the first run: a storm can be run in parts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", choices=models(), action="append", help="default: all that are there, in turn")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "serving_kills.json")
    parser.add_argument("--keep", type=Path, help="keep the logs of runs with a problem there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # so that nothing is left behind
    gc.collect()
    gc.freeze()
    before = json.loads(arguments.out.read_text())["trials"] if arguments.out.exists() else []
    known = {(trial["kind"], trial["seed"], trial["number"]): trial for trial in before}
    with scratch() as folder:
        library = Library(folder)
        for kind in arguments.kind or KINDS:
            if kind == "link" and (reason := lab.missing()) is not None:
                print(f"link: left out, {reason}")
                continue
            numbers = range(arguments.first, arguments.first + arguments.count)
            for trial in storm(kind, numbers, arguments.seed, arguments.model or models(), library, arguments.keep):
                known[kind, trial.seed, trial.number] = asdict(trial)
                print(json.dumps({key: value for key, value in asdict(trial).items() if value not in ("", None, [])}))
                sys.stdout.flush()
    trials = [known[key] for key in sorted(known)]
    figures = {"patience_s": PATIENCE, "tokens": TOKENS, "table": table(trials), "trials": trials}
    for row in figures["table"]:
        print(row)
    arguments.out.write_text(json.dumps({"measured": machine.describe(), **figures}, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(trial["problems"] for trial in trials))


if __name__ == "__main__":
    main()
