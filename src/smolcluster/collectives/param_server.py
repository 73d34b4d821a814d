"""One server, many workers that are not in lock-step: gradients are pushed to it, weights come back.

Idea: each worker has a session with the server, a world of two (cluster/sessions.py). What is said (a lease, a push's
numbers, an answer) goes over its control link, where it never waits behind tensors; the tensors follow as messages,
under the number that was said. So a lease overtakes the weights that a slow link still carries.

    server → worker   mail {items: [[kind, body], ...]}
                      lease {number, weights, ...}   answer {push, ...}   weights {number, version}   over {reason}
    worker → server   push {number, ...}             ask {leases}         report {...}                bye {}

What the server has to say to a worker waits for `flush`, and goes as one message then: every message wakes a thread on
the other side, which on a busy machine costs more than what is in it.

The port knows no algorithm. A worker whose connection breaks asks for a new session by itself; what the old one had
under way is lost on both sides, and the server hears of it as Left.

Source: Li et al. 2014, Scaling Distributed Machine Learning with the Parameter Server, sections 3 and 4.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeAlias

from pydantic import ValidationError
from torch import Tensor

from smolcluster.cluster.sessions import WORKER, Granted, Newcomer, SessionWorld, Wait
from smolcluster.collectives.base import Codec, Work
from smolcluster.collectives.flat import FlatLayout, decode_flats
from smolcluster.collectives.param_messages import Answer, PushNote
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import ConfigError, FrameError, PeerLost, SmolError
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.telemetry import Telemetry

logger = logging.getLogger(__name__)

# A worker whose rank another process seems to hold waits for so many patiences: that one may be dead, unnoticed yet.
RANK_PATIENCES = 2
# Leases that a worker may ask for at once.
MAX_ASKED = 1024


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker in one session, as the server knows it: its rank in the run, its name, and the session's number."""

    session: int
    rank: int
    name: str


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker has come; it has the model's structure and needs weights and a lease."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class Left:
    """A worker is gone; `error` says why, None: it said good-bye."""

    worker: Worker
    error: SmolError | None


@dataclass(frozen=True, slots=True)
class Push:
    """A gradient has arrived. `number` is of the session; `gradients` is flat, decoded."""

    worker: Worker
    number: int
    note: PushNote
    gradients: list[Tensor]


@dataclass(frozen=True, slots=True)
class Asked:
    """A worker would like some leases more."""

    worker: Worker
    leases: int


@dataclass(frozen=True, slots=True)
class Drained:
    """The tensors that a worker was sent have left."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class Reported:
    """What a worker says of itself when it has ended."""

    worker: Worker
    report: JsonObject


Event: TypeAlias = Joined | Left | Push | Asked | Drained | Reported


class Dealt(Protocol):
    """What the port needs to know of a lease that it sends."""

    @property
    def number(self) -> int: ...
    @property
    def ranges(self) -> tuple[tuple[int, int, int], ...]: ...


@dataclass(slots=True)
class _Client:
    """The server's side of one session."""

    worker: Worker
    instance: str
    world: SessionWorld
    comm: TcpCommunicator
    has: list[Tensor] | None = None  # with a codec: the weights that the worker has
    sent: int = 0  # weights announced so far
    items: list[JsonValue] = field(default_factory=list)  # to say with the next `flush`
    tensors: list[tuple[int, Tensor]] = field(default_factory=list)  # to send then, with their tags
    under_way: int = 0  # tensors that were sent and have not left
    is_gone: bool = False


class ServerPort:
    """The server's end: what workers do comes as events, in the order of arrival. Methods are for one thread.

    `grant` and `begin` are for a Reception, on its threads.
    """

    def __init__(
        self,
        names: Sequence[str],
        layout: FlatLayout,
        *,
        patience: float,
        constants: Sequence[Tensor] = (),
        codec: Codec | None = None,
        generation: int = 0,
        record: Callable[[int, Sequence[Worker]], None] | None = None,
        telemetry: Telemetry | None = None,
        opened: Callable[[Worker, SessionWorld], None] | None = None,
    ) -> None:
        """Wait for nobody yet.

        Args:
            names: of all ranks that there may be, the server's first.
            layout: of the gradients, and of the weights, which are the same parameters.
            patience: seconds until a silent worker counts as lost.
            constants: what else a worker needs of the model, such as frozen parameters; sent with its first weights.
            codec: what gradients and changes of weights are encoded with; workers have the same.
            generation: the last one of the run so far.
            record: called with each new generation and its workers before the first of its steps, on any thread.
            telemetry: where traffic is counted.
            opened: called with each new session before anything is received in it, on its own thread.
        """
        self.telemetry = telemetry or Telemetry()
        self.layout = layout
        self._names = list(names)
        self._patience = patience
        self._constants = list(constants)
        self._codec = codec
        self._generation = generation
        self._record = record
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._clients: dict[int, _Client] = {}
        self._opened = opened
        self._granted: dict[int, Worker] = {}  # sessions whose connections are being opened
        self._waiting_since: dict[str, float] = {}
        self._over: JsonObject | None = None  # what workers are told once the run is over

    # ---- for the Reception

    def grant(self, newcomer: Newcomer) -> Granted:
        """Whether a newcomer may begin a session; see Reception."""
        with self._lock:
            if not 1 <= newcomer.rank < len(self._names):
                raise ConfigError(
                    f"{newcomer.name!r} wants rank {newcomer.rank}, but the workers are ranks 1 to "
                    f"{len(self._names) - 1}"
                )
            if self._names[newcomer.rank] != newcomer.name:
                raise ConfigError(
                    f"{newcomer.name!r} wants rank {newcomer.rank}, but that is {self._names[newcomer.rank]!r}"
                )
            self._make_room(newcomer)
            self._generation += 1
            worker = Worker(self._generation, newcomer.rank, newcomer.name)
            self._granted[worker.session] = worker
            self._record_members()
            # The session has the generation's number: unique, also where the server is started again.
            return Granted(self._generation, self._generation)

    def _make_room(self, newcomer: Newcomer) -> None:
        """One session for a rank at a time. Raises Wait while another process seems to hold it."""
        if any(worker.rank == newcomer.rank for worker in self._granted.values()):
            raise Wait(f"{newcomer.name} is just beginning a session")
        for client in self._clients.values():
            if client.worker.rank != newcomer.rank or client.is_gone:
                continue
            if client.instance == newcomer.instance:  # it has given up a connection that the server still believes in
                error = PeerLost(f"worker {newcomer.name} has come back with a new connection", WORKER)
                threading.Thread(target=client.world.abort, args=(error,), name="session-replaced", daemon=True).start()
            began = self._waiting_since.setdefault(newcomer.instance, time.monotonic())
            if time.monotonic() - began > RANK_PATIENCES * self._patience:
                raise ConfigError(f"worker {newcomer.name!r} is here already; is the same machine started twice?")
            raise Wait(f"rank {newcomer.rank} is held by an earlier connection of {newcomer.name}")
        self._waiting_since.pop(newcomer.instance, None)

    def revoke(self, granted: Granted) -> None:
        """The session that was granted has not begun; see Reception."""
        with self._lock:
            if self._granted.pop(granted.session, None) is not None:
                self._generation += 1
                self._record_members()

    def begin(self, newcomer: Newcomer, world: SessionWorld) -> None:
        """Open the session's connections; see Reception."""
        worker = Worker(world.number, newcomer.rank, newcomer.name)
        try:
            comm = TcpCommunicator(
                world, name=f"session{world.number}", telemetry=self.telemetry, timeout=self._patience, spins=False
            )
        except SmolError:
            world.close()
            raise
        client = _Client(worker, newcomer.instance, world, comm)
        with self._lock:
            del self._granted[worker.session]
            self._clients[worker.session] = client
            over = self._over
        if over is not None:  # it came when the others had been told
            world.send(WORKER, "mail", {"items": [["over", over]]})
        if self._opened is not None:
            self._opened(worker, world)
        self._events.put(Joined(worker))
        world.on("push", lambda _rank, message: self._expect_push(client, message))
        world.on("ask", lambda _rank, message: self._asked(client, message))
        world.on("report", lambda _rank, message: self._events.put(Reported(worker, _payload(message))))
        world.on("bye", lambda _rank, message: self._gone(client, None))
        world.on_failure(partial(self._gone, client))

    # ---- for the server's thread

    def next_event(self, timeout: float | None) -> Event | None:
        """Wait for what comes next; None: nothing came within `timeout` seconds. Gradients come decoded."""
        try:
            event = self._events.get(block=timeout is None or timeout > 0, timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(event, Push) and self._codec is not None:
            return Push(event.worker, event.number, event.note, decode_flats(event.gradients, self._codec, self.layout))
        return event

    def workers(self) -> list[Worker]:
        """Who is here, in the order of ranks."""
        with self._lock:
            here = [client.worker for client in self._clients.values() if not client.is_gone]
        return sorted(here, key=lambda worker: worker.rank)

    def generation(self) -> int:
        """The present one's number."""
        return self._generation

    def lend(
        self, worker: Worker, lease: Dealt, *, step: int, planned: int, version: int, weights: Sequence[Tensor] | None
    ) -> None:
        """Tell a worker what to compute, and with which weights; it hears of it with the next `flush`.

        Args:
            worker: who; nothing happens if it is gone.
            lease: its samples.
            step: that they count for.
            planned: targets of the whole step.
            version: of `weights`.
            weights: flat, not changed afterwards by anybody; None: the worker goes on with what it has.
        """
        client = self._clients.get(worker.session)
        if client is None or client.is_gone:
            return
        message: JsonObject = {
            "number": lease.number,
            "ranges": [list(part) for part in lease.ranges],
            "step": step,
            "planned": planned,
        }
        if weights is not None:
            message["weights"] = self._announce(client, version)
            self._add_weights(client, weights)
            if client.sent == 1:
                client.tensors += [(client.sent, tensor.detach().contiguous()) for tensor in self._constants]
        client.items.append(["lease", message])

    def send_weights(self, worker: Worker, version: int, weights: Sequence[Tensor]) -> None:
        """Send a worker weights, with the next `flush`; it takes them when it is ready to."""
        client = self._clients.get(worker.session)
        if client is None or client.is_gone:
            return
        client.items.append(["weights", self._announce(client, version)])
        self._add_weights(client, weights)

    def has_room(self, worker: Worker) -> bool:
        """Whether all weights that a worker was sent have left. An event comes when they have."""
        client = self._clients.get(worker.session)
        return client is None or not (client.tensors or client.under_way)

    def is_sending(self) -> bool:
        """Whether tensors are on their way to anybody who is here."""
        with self._lock:
            return any(client.under_way for client in self._clients.values() if not client.is_gone)

    def answer(self, worker: Worker, push: int, answer: Answer) -> None:
        """Tell a worker what became of its push, with the next `flush`."""
        client = self._clients.get(worker.session)
        if client is not None and not client.is_gone:
            client.items.append(["answer", {"push": push, "answer": answer.model_dump(mode="json")}])

    def flush(self) -> None:
        """Say all that is to be said. Returns before anybody has heard it."""
        with self._lock:
            clients = [client for client in self._clients.values() if client.items and not client.is_gone]
        for client in clients:
            items, tensors = client.items, client.tensors
            client.items, client.tensors = [], []
            client.world.send(WORKER, "mail", {"items": items})
            if tensors:
                with self._lock:
                    client.under_way += len(tensors)
                for tag, tensor in tensors:
                    client.comm.send(tensor, WORKER, tag=tag).add_done_callback(partial(self._sent, client))

    def end(
        self, error: BaseException | None = None, version: int = 0, weights: Sequence[Tensor] | None = None
    ) -> None:
        """Tell all workers that the run is over.

        Args:
            error: what it failed with.
            version: of `weights`.
            weights: that all workers shall end with, exact; None: each keeps what it has.
        """
        told: JsonObject = {"reason": None}
        if error is not None:
            told = {"reason": str(error) or "the server was stopped", "error": type(error).__name__}
        with self._lock:
            self._record = None  # who leaves now changes nothing
            self._over = told
            clients = [client for client in self._clients.values() if not client.is_gone]
        for client in clients:
            message = dict(told)
            if weights is not None and client.sent:
                client.has = None  # so that they go as they are
                message["weights"] = self._announce(client, version)
                self._add_weights(client, weights)
            client.items.append(["over", message])
        self.flush()

    def forget(self, worker: Worker) -> None:
        """Close the session of a worker that has Left."""
        with self._lock:
            client = self._clients.pop(worker.session, None)
        if client is not None:
            client.comm.close()

    def close(self) -> None:
        """Close all sessions. The reception must be closed before."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.comm.close()

    # ---- helpers

    def _announce(self, client: _Client, version: int) -> JsonObject:
        client.sent += 1
        is_whole = self._codec is None or client.has is None
        return {"number": client.sent, "version": version, "is_first": client.sent == 1, "is_whole": is_whole}

    def _add_weights(self, client: _Client, weights: Sequence[Tensor]) -> None:
        outgoing = list(weights)
        if self._codec is not None and client.has is None:
            client.has = [flat.clone() for flat in weights]
        elif self._codec is not None and client.has is not None:
            # The change since what the worker really has: what the last encoding lost is in it.
            outgoing = self.layout.empty(self._codec)
            for flat, has, out in zip(weights, client.has, outgoing, strict=True):
                self._codec.encode(flat - has, out)
            for has, change in zip(client.has, decode_flats(outgoing, self._codec, self.layout), strict=True):
                has.add_(change)
        client.tensors += [(client.sent, flat) for flat in outgoing]

    def _sent(self, client: _Client, _work: Work) -> None:
        """A tensor has left, or never will."""
        with self._lock:
            client.under_way -= 1
            is_last = not client.under_way
        if is_last:
            self._events.put(Drained(client.worker))

    def _asked(self, client: _Client, message: JsonObject) -> None:
        leases = message.get("leases")
        if isinstance(leases, int) and 0 < leases <= MAX_ASKED:
            self._events.put(Asked(client.worker, leases))

    def _expect_push(self, client: _Client, message: JsonObject) -> None:
        """On the session's link thread: the numbers of a push are here, its tensors are on their way."""
        number = message.get("number")
        try:
            note = PushNote.model_validate(message.get("note"))
            if not isinstance(number, int) or isinstance(number, bool) or len(note.bases) != len(note.leases):
                raise FrameError(f"{client.worker.name} sent a push that is malformed")
        except (ValidationError, FrameError) as error:
            client.world.abort(PeerLost(f"worker {client.worker.name} sent a push that is malformed: {error}", WORKER))
            return
        flats = self.layout.empty(self._codec)
        works = [client.comm.recv(WORKER, tag=number, out=flat) for flat in flats]

        def arrived(_work: Work) -> None:
            if all(work.done() and work.exception() is None for work in works):
                self._events.put(Push(client.worker, number, note, flats))

        works[-1].add_done_callback(arrived)

    def _gone(self, client: _Client, error: SmolError | None) -> None:
        with self._lock:
            if client.is_gone:
                return
            client.is_gone = True
            self._generation += 1
            self._record_members()
        self._events.put(Left(client.worker, error))

    def _record_members(self) -> None:
        """Those that are here, and those that are just beginning. With the lock."""
        members = [client.worker for client in self._clients.values() if not client.is_gone]
        if self._record is not None:
            everyone = [*members, *self._granted.values()]
            self._record(self._generation, sorted(everyone, key=lambda worker: worker.rank))


def _payload(message: JsonObject) -> JsonObject:
    return {key: value for key, value in message.items() if key != "kind"}
