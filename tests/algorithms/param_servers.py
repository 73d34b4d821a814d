"""A parameter server and its workers as threads of one process, for the tests of syncps and edp."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from algorithms.equality import Case, Outcome
from smolcluster.algorithms.syncps import SyncPsServer, SyncPsWorker
from smolcluster.checkpoint.ledger import LEDGER, Ledger, read_ledger
from smolcluster.checkpoint.store import open_checkpoint, save_checkpoint
from smolcluster.cluster.sessions import Newcomer, Reception, SessionWorld, join_session
from smolcluster.collectives.codec import codec_for
from smolcluster.collectives.flat import FlatLayout
from smolcluster.collectives.param_server import ServerPort
from smolcluster.collectives.param_worker import WorkerPort
from smolcluster.data.batch import NO_TARGET, Batch
from smolcluster.data.leases import Range, SamplePool, range_indices
from smolcluster.data.sampler import Sampler
from smolcluster.errors import PeerLost
from smolcluster.kinds import JsonObject
from smolcluster.training.leased import LeasedBatches
from smolcluster.training.optim import optimizer_factory
from smolcluster.training.role import RunContext, TrainerRole
from smolcluster.training.schedule import lr_schedule
from smolcluster.training.server import ServerRole
from smolcluster.training.shares import WorkerShares
from smolcluster.training.trainer import Progress, Trainer, TrainResult
from smolcluster.transport.inproc import InprocNetwork

PATIENCE = 3.0
NEVER = 1 << 40


class CaseData:
    """The samples of a Case, as a Dataset."""

    name = "case"
    vocab_size = None
    num_classes = None

    def __init__(self, case: Case) -> None:
        self._inputs, self._targets = case.samples()

    def __len__(self) -> int:
        return len(self._inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._inputs[indices], self._targets[indices]

    def targets_per_sample(self, indices: Tensor) -> int:
        return int((self._targets[indices] != NO_TARGET).sum())


class Rows:
    """A sink that keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[JsonObject] = []

    def write(self, row: JsonObject) -> None:
        self.rows.append(row)

    def progress(self, done: int, total: int, row: JsonObject) -> None:
        pass


class KeptLog:
    """An application log in memory."""

    def __init__(self) -> None:
        self.rows: list[JsonObject] = []

    def append(self, rows: Sequence[JsonObject]) -> None:
        self.rows.extend(rows)

    def flush(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def updates(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == "update"]


@dataclass
class Setting:
    """How a run over a parameter server differs from the plain one.

    Attributes:
        workers: how many.
        epochs: passes over the data; None: the case's steps decide.
        server: options for the rule.
        worker: options for the workers' strategy.
        compression: of pushes and pulls.
        seconds_per_step: worker rank → how long it takes longer.
        folder: where the ledger goes.
        expected: workers to wait for before the first step.
        min_workers: fewest to go on with.
    """

    workers: int = 2
    epochs: int | None = None
    server: dict[str, Any] = field(default_factory=dict)
    worker: dict[str, Any] = field(default_factory=dict)
    compression: str = "none"
    seconds_per_step: dict[int, float] = field(default_factory=dict)
    folder: Path | None = None
    expected: int | None = None
    min_workers: int = 1


class Slow:
    """Batches that take a while.

    Args:
        batches: the leases'.
        seconds: for each.
        delays: more seconds, for the first ones.
        gate: nothing is given before it opens.
        stop: ends them.
    """

    def __init__(
        self,
        batches: LeasedBatches,
        seconds: float,
        delays: list[float],
        gate: threading.Event | None,
        stop: threading.Event,
    ) -> None:
        self._batches = batches
        self._seconds = seconds
        self._delays = delays
        self._gate = gate
        self._stop = stop
        self.given = 0

    def __iter__(self) -> Slow:
        return self

    def __next__(self) -> list[Batch]:
        batches = next(self._batches)
        if self._gate is not None:
            assert self._gate.wait(30)
        if self._stop.is_set():
            raise StopIteration
        time.sleep(self._seconds + (self._delays.pop(0) if self._delays else 0.0))
        self.given += 1
        return batches


class ParamServerRun:
    """One run; `start` begins it, `result` ends it. Workers can be added and taken away meanwhile."""

    def __init__(
        self,
        case: Case,
        setting: Setting,
        *,
        checkpoint: tuple[Path, int] | None = None,
        resume: Path | None = None,
    ) -> None:
        """`checkpoint`: folder, and the number of updates after which one is written. `resume`: one to go on from."""
        self.case, self.setting = case, setting
        self.delays: dict[int, list[float]] = {}
        self.gates: dict[int, threading.Event] = {}
        self.stops: dict[int, threading.Event] = {}
        self.batches: dict[int, Slow] = {}
        self.network = InprocNetwork()
        self.data = CaseData(case)
        self.sampler = Sampler(case.length, case.global_batch, seed=3)
        self.model = case.build(0)
        self.layout = self._layout(self.model)
        self.names = ["server", *(f"worker{rank}" for rank in range(1, 10))]
        self.generations: list[tuple[int, list[int]]] = []
        self.port = ServerPort(
            self.names, self.layout, patience=PATIENCE, codec=codec_for(setting.compression),
            record=lambda number, workers: self.generations.append((number, [w.rank for w in workers])),
        )  # fmt: skip
        self.pool = SamplePool(self.sampler, setting.epochs)
        self.rule = self.make_rule()
        start = None
        if resume is not None:
            stored = open_checkpoint(resume)
            self.rule.load_state(stored)
            self.pool.load_state(stored.meta["pool"])  # type: ignore[arg-type]
            start = Progress(steps=stored.step, computed=stored.step)
        self.listener = self.network.listen("server", 0)
        self.reception = Reception(
            [self.listener], name="server", patience=PATIENCE, options={"seed": "3"}, grant=self.port.grant,
            begin=self.port.begin, revoke=self.port.revoke,
        )  # fmt: skip
        self.rows = Rows()
        self.notes: list[str] = []
        self.ledger = None if setting.folder is None else Ledger(setting.folder / LEDGER)
        self.log = KeptLog()
        self.role = ServerRole(
            self.rule, self.port, applications=self.log,  # type: ignore[arg-type]
            workers=setting.expected or setting.workers, min_workers=setting.min_workers,
            patience=PATIENCE, planned_steps=case.steps, ledger=self.ledger, note=self.notes.append, start=start,
            checkpoint=None if checkpoint is None else lambda progress: self._save(checkpoint[0], progress),
            checkpoint_steps=None if checkpoint is None else checkpoint[1],
        )  # fmt: skip
        self.stop = threading.Event()
        self.worker_began = threading.Event()  # worker 2's first session
        self._result: TrainResult | BaseException | None = None
        self.worker_ports: dict[int, WorkerPort] = {}
        self.worker_models: dict[int, nn.Module] = {}
        self.worker_rows: dict[int, Rows] = {}
        self.worker_errors: dict[int, BaseException] = {}
        self.worlds: dict[int, SessionWorld] = {}
        self._threads: list[threading.Thread] = []
        self._server = threading.Thread(target=self._serve, name="server")

    def make_rule(self) -> Any:
        case, setting = self.case, self.setting
        options = dict(case.options)
        steps = NEVER if setting.epochs is not None else case.steps
        return SyncPsServer(
            self.model, optimizer_factory("adamw", 3e-3, 0.1), self.port, self.pool,
            steps=steps, count_planned=self.count_planned,
            precision=case.precision, lr_schedule=lr_schedule("cosine", 3e-3, 5, 1e-4, case.steps),
            **{"shares": WorkerShares(case.shares or [1.0] * 9), **options, **setting.server},
        )  # fmt: skip

    def make_worker(self, model: nn.Module, port: WorkerPort) -> Any:
        bound = self.case.options.get("staleness_bound", 0)
        return SyncPsWorker(model, port, staleness_bound=bound, precision=self.case.precision, **self.setting.worker)

    def count_planned(self, ranges: Sequence[Range]) -> int:
        return self.data.targets_per_sample(range_indices(self.sampler, ranges))

    def start(self) -> ParamServerRun:
        self._server.start()
        for rank in range(1, self.setting.workers + 1):
            self.add_worker(rank)
        return self

    def add_worker(self, rank: int, instance: str | None = None) -> None:
        thread = threading.Thread(target=self._work, args=(rank, instance or f"process{rank}"), name=f"worker{rank}")
        self._threads.append(thread)
        thread.start()

    def result(self, timeout: float = 60.0) -> TrainResult:
        self._server.join(timeout)
        assert not self._server.is_alive(), "the server still serves"
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} still works"
        self.reception.close()
        self.port.close()
        if self.ledger is not None:
            self.ledger.close()
        if isinstance(self._result, BaseException):
            raise self._result
        assert self._result is not None
        return self._result

    def wait_for_steps(self, count: int) -> None:
        """Block until so many updates are made."""
        wait_until(lambda: sum("train/loss" in row for row in self.rows.rows) >= count)

    def wait_until_idle(self, rank: int) -> int:
        """Block until a worker has been given nothing for a while; what it was given before."""
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < 0.5:
            given = self.batches[rank].given if rank in self.batches else 0
            if given != seen:
                seen, since = given, time.monotonic()
            time.sleep(0.01)
        return seen

    def lose(self, rank: int) -> None:
        """Break a worker's connections; both sides notice."""
        self.worlds[rank].abort(PeerLost("the connection is cut", 0))

    def stop_worker(self, rank: int) -> None:
        """A worker says good-bye."""
        self.stops[rank].set()

    def _save(self, folder: Path, progress: Progress) -> None:
        save_checkpoint(folder, progress.steps, self.rule.state(), {"pool": self.pool.state()})

    def _began(self, rank: int, world: SessionWorld) -> None:
        self.worlds[rank] = world
        if rank == 2:
            self.worker_began.set()

    def _layout(self, model: nn.Module) -> FlatLayout:
        if self.case.precision == "fp64":
            model = model.double()
        return FlatLayout([param for param in model.parameters() if param.requires_grad])

    def _serve(self) -> None:
        try:
            self._result = self.role.run(RunContext(self.rows, None, self.stop))
        except BaseException as error:  # noqa: BLE001 - top of the thread: raised by `result`
            self._result = error

    def _work(self, rank: int, instance: str) -> None:
        model = self.case.build(rank)  # other weights than the server's, until it has sent some
        layout = self._layout(model)
        newcomer = Newcomer(rank, self.names[rank], instance, "")

        def connect(ended: Any) -> SessionWorld:
            return join_session(
                newcomer, self.network, lambda: self.listener.address, run_id="", patience=PATIENCE,
                timeout=20.0, options={"seed": "3"}, ended=ended,
            )  # fmt: skip

        port = WorkerPort(
            rank, connect, layout, codec=codec_for(self.setting.compression),
            began=lambda world: self._began(rank, world),
        )  # fmt: skip
        self.worker_ports[rank], self.worker_models[rank] = port, model
        batches = LeasedBatches(port, self.data, self.sampler, self.case.micro_batches)  # type: ignore[arg-type]
        stop = self.stops[rank] = threading.Event()
        seconds = self.setting.seconds_per_step.get(rank, 0.0)
        slow = self.batches[rank] = Slow(batches, seconds, self.delays.get(rank, []), self.gates.get(rank), stop)
        trainer = Trainer(self.make_worker(model, port), slow, NEVER, endpoint=port)
        rows = self.worker_rows[rank] = Rows()
        try:
            TrainerRole(trainer).run(RunContext(rows, None, threading.Event()))
            port.report({"rank": rank})
        except BaseException as error:  # noqa: BLE001 - top of the thread
            self.worker_errors[rank] = error
        finally:
            port.close()


def wait_until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    """Block until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def audit(path: Path, length: int, epochs: int) -> None:
    """Assert that the ledger has every sample of every epoch exactly once."""
    seen: Counter[tuple[int, int]] = Counter()
    for line in read_ledger(path):
        places = [(epoch, place) for epoch, start, stop in line["ranges"] for place in range(start, stop)]  # type: ignore
        assert len(places) == line["samples"]
        seen.update(places)
    assert seen == Counter((epoch, place) for epoch in range(epochs) for place in range(length))


def check_against(reference: Outcome, run: ParamServerRun, tolerance: float) -> None:
    """Assert that a run gave the reference's losses and weights."""
    rows = [row for row in run.rows.rows if "train/loss" in row]
    assert [row["step"] for row in rows] == [result.step for result in reference.results]
    for row, result in zip(rows, reference.results, strict=True):
        assert abs(float(row["train/loss"]) - result.loss) <= tolerance, f"step {result.step}: {row} {result}"  # type: ignore[arg-type]
        assert (row["train/samples"], row["train/lr"]) == (result.samples, result.lr), f"{row} {result}"
    weights = {name: tensor.detach() for name, tensor in run.model.state_dict().items()}
    for name, tensor in reference.weights.items():
        difference = float((weights[name] - tensor).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"
