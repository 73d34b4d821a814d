"""One server, many workers that are not in lock-step: gradients are pushed to it, weights come back.

Idea: each worker has a session with the server, a world of two (cluster/sessions.py). What is said (a lease, a push's
numbers, an answer) goes over its control link, where it never waits behind tensors; the tensors follow as messages,
under the number that was said. So a lease overtakes the weights that a slow link still carries.

    server → worker   lease {number, weights, ...}   answer {push, ...}   weights {number, version}   over {reason}
    worker → server   push {number, ...}             ask {leases}           report {...}                bye {}

The port knows no algorithm. A worker whose connection breaks asks for a new session by itself; what the old one had
under way is lost on both sides, and the server hears of it as Left.

Source: Li et al. 2014, Scaling Distributed Machine Learning with the Parameter Server, sections 3 and 4.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from smolcluster.cluster.sessions import SERVER, WORKER, Granted, Newcomer, SessionWorld, Wait
from smolcluster.collectives.base import Codec, Work
from smolcluster.collectives.codec import Int8Codec
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import ConfigError, FrameError, PeerLost, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.telemetry import Telemetry

logger = logging.getLogger(__name__)

# A worker whose rank another process seems to hold waits for so many patiences: that one may be dead, unnoticed yet.
RANK_PATIENCES = 2
# Leases that a worker may ask for at once.
MAX_ASKED = 1024
# Seconds between looks whether somebody has ended the run, while a worker waits for the server.
SLICE = 0.5


class FlatLayout:
    """Tensors of a model as one flat tensor for each dtype, in the order of the first tensor of each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Describe the layout of these tensors; every process of a run has the same."""
        self.dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        self._groups = [[i for i, tensor in enumerate(tensors) if tensor.dtype == dtype] for dtype in self.dtypes]
        self._shapes = [tensor.shape for tensor in tensors]
        self._counts = [tensor.numel() for tensor in tensors]
        self.numels = [sum(self._counts[i] for i in group) for group in self._groups]
        places: dict[int, tuple[int, int]] = {}  # tensor → flat tensor, first element
        for number, group in enumerate(self._groups):
            start = 0
            for i in group:
                places[i] = (number, start)
                start += self._counts[i]
        self._places = [places[i] for i in range(len(tensors))]

    def flatten(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """New flat tensors on the CPU with the values of `tensors`; zeros for None."""
        flats = []
        for group, dtype in zip(self._groups, self.dtypes, strict=True):
            pieces = []
            for i in group:
                tensor = tensors[i]
                if tensor is None:
                    pieces.append(torch.zeros(self._counts[i], dtype=dtype))
                else:
                    pieces.append(tensor.detach().reshape(-1).cpu())
            flats.append(torch.cat(pieces))
        return flats

    def parts(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Views into the flat tensors, one for each tensor, in its shape."""
        return [
            flats[number][start : start + count].view(shape)
            for (number, start), count, shape in zip(self._places, self._counts, self._shapes, strict=True)
        ]

    def empty(self, codec: Codec | None = None) -> list[Tensor]:
        """Flat tensors to receive into, encoded or not."""
        if codec is None:
            return [torch.empty(numel, dtype=dtype) for numel, dtype in zip(self.numels, self.dtypes, strict=True)]
        return [torch.empty(codec.encoded_nbytes(numel), dtype=torch.uint8) for numel in self.numels]


class FeedbackEncoder:
    """Encodes a sequence of flat tensors so that what one loses is added to the next."""

    def __init__(self, codec: Codec, layout: FlatLayout) -> None:
        self._codec = codec
        self._layout = layout
        self._residuals = [flat.zero_() for flat in layout.empty()]

    def encode(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """What goes on the wire instead of `flats`, uint8."""
        encoded = self._layout.empty(self._codec)
        for flat, residual, out in zip(flats, self._residuals, encoded, strict=True):
            if isinstance(self._codec, Int8Codec):
                self._codec.encode_with_feedback(flat, residual, out)
                continue
            residual.add_(flat)
            self._codec.encode(residual, out)
            decoded = torch.empty_like(residual)
            self._codec.decode(out, decoded)
            residual.sub_(decoded)
            residual.masked_fill_(~torch.isfinite(residual), 0.0)  # one bad step must not spoil those after it
        return encoded


def decode_flats(encoded: Sequence[Tensor], codec: Codec | None, layout: FlatLayout) -> list[Tensor]:
    """The flat tensors that `encoded` stands for; itself without a codec."""
    if codec is None:
        return list(encoded)
    flats = layout.empty()
    for data, flat in zip(encoded, flats, strict=True):
        codec.decode(data, flat)
    return flats


class PushNote(BaseModel):
    """What a worker says of a push; its gradient follows.

    Attributes:
        leases: whose samples it is of, in the order in which they were computed.
        bases: for each of them the version of the weights that it was computed on.
        loss_sum: over all targets; null if it is not finite.
        count: targets.
        samples: samples.
        scale: what each summed loss was multiplied with before backward.
        compute_s: seconds that computing took.
        missing: numbers of the parameters that had no gradient; zeros stand for theirs.
        pull: the worker wants weights once this is applied.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    leases: tuple[int, ...] = Field(min_length=1)
    bases: tuple[int, ...]
    loss_sum: float | None
    count: int = Field(ge=0)
    samples: int = Field(ge=0)
    scale: float = Field(gt=0)
    compute_s: float = Field(ge=0)
    missing: tuple[int, ...] = ()
    pull: bool = False


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
class Reported:
    """What a worker says of itself when it has ended."""

    worker: Worker
    report: JsonObject


Event: TypeAlias = Joined | Left | Push | Asked | Reported


@dataclass(frozen=True, slots=True)
class Lease:
    """What a worker is to compute next.

    Attributes:
        number: the lease's; the push names it.
        ranges: (epoch, first place, place behind the last) in the epochs' orders.
        step: that it belongs to.
        planned: targets of the whole step over all workers; 0: unknown.
        version: of the weights that came with it, or before it.
        weights: flat, on the CPU, that came with it; None: the worker goes on with what it has.
        is_first: the weights are the first of this session: they replace what the worker has.
        constants: what else the worker needs of the model; comes with the first weights.
        waited: seconds that the worker had nothing to compute before it came.
    """

    number: int
    ranges: tuple[tuple[int, int, int], ...]
    step: int
    planned: int
    version: int
    weights: list[Tensor] | None = None
    is_first: bool = False
    constants: Sequence[Tensor] = ()
    waited: float = 0.0


class Answer(BaseModel):
    """What became of a push.

    Attributes:
        status: `applied`; `refused`: it came too late and its samples were given to others; `lost`: nobody knows,
            since the connection broke.
        step: that it counted for; of a refused one the step that was closed.
        loss: mean loss of that step over all workers; null if it is not finite.
        count: targets of the step.
        samples: samples of the step.
        grad_norm: of the step's gradient; null if it is not finite.
        lr: learning rate that the update used.
        is_skipped: the gradient was not finite, and the update was passed over.
        version: of the server's weights after it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: str
    step: int = 0
    loss: float | None = None
    count: int = 0
    samples: int = 0
    grad_norm: float | None = None
    lr: float = 0.0
    is_skipped: bool = False
    version: int = 0


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
    sent: int = 0  # weights sent so far
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
        self._waiting_since: dict[str, float] = {}

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
            members = [client.worker for client in self._clients.values() if not client.is_gone]
            if self._record is not None:
                self._record(self._generation, [*members, worker])
            # The session has the generation's number: unique, also where the server is started again.
            return Granted(self._generation, self._generation)

    def _make_room(self, newcomer: Newcomer) -> None:
        """One session for a rank at a time. Raises Wait while another process seems to hold it."""
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
            if any(c.worker.rank == worker.rank and not c.is_gone for c in self._clients.values()):
                is_doubled = True  # two asked at once, and the other was faster
            else:
                is_doubled = False
                self._clients[worker.session] = client
        if is_doubled:
            comm.close()
            return
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

    def world(self, worker: Worker) -> SessionWorld | None:
        """The session's world; None: it is over."""
        client = self._clients.get(worker.session)
        return None if client is None else client.world

    def lend(
        self, worker: Worker, lease: Dealt, *, step: int, planned: int, version: int, weights: Sequence[Tensor] | None
    ) -> None:
        """Tell a worker what to compute, and with which weights. Returns before it has them.

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
        client.world.send(WORKER, "lease", message)
        if weights is not None:
            self._send_weights(client, weights)
            if client.sent == 1:
                for tensor in self._constants:
                    client.comm.send(tensor.detach().contiguous(), WORKER, tag=client.sent)

    def send_weights(self, worker: Worker, version: int, weights: Sequence[Tensor]) -> None:
        """Send a worker weights that it takes when it is ready to."""
        client = self._clients.get(worker.session)
        if client is None or client.is_gone:
            return
        client.world.send(WORKER, "weights", self._announce(client, version))
        self._send_weights(client, weights)

    def answer(self, worker: Worker, push: int, answer: Answer) -> None:
        """Tell a worker what became of its push."""
        client = self._clients.get(worker.session)
        if client is not None and not client.is_gone:
            client.world.send(WORKER, "answer", {"push": push, "answer": answer.model_dump(mode="json")})

    def end(self, reason: str | None = None, version: int = 0, weights: Sequence[Tensor] | None = None) -> None:
        """Tell all workers that the run is over.

        Args:
            reason: why it failed.
            version: of `weights`.
            weights: that all workers shall end with, exact; None: each keeps what it has.
        """
        self._record = None  # who leaves now changes nothing
        for worker in self.workers():
            client = self._clients[worker.session]
            message: JsonObject = {"reason": reason}
            if weights is not None and client.sent:
                client.has = None  # so that they go as they are
                message["weights"] = self._announce(client, version)
            client.world.send(WORKER, "over", message)
            if weights is not None and client.sent:
                self._send_weights(client, weights)

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

    def _send_weights(self, client: _Client, weights: Sequence[Tensor]) -> None:
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
        for flat in outgoing:
            client.comm.send(flat, WORKER, tag=client.sent)

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
            members = [other.worker for other in self._clients.values() if not other.is_gone]
            if self._record is not None:
                self._record(self._generation, members)
        self._events.put(Left(client.worker, error))


class Ticket:
    """A push under way."""

    def __init__(self, telemetry: Telemetry, ended: Callable[[], SmolError | None]) -> None:
        self._telemetry = telemetry
        self._ended = ended
        self._done = threading.Event()
        self._answer = Answer(status="lost")

    def finish(self, answer: Answer) -> None:
        """The answer is here; the first counts."""
        if not self._done.is_set():
            self._answer = answer
            self._done.set()

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._done.is_set()

    def wait(self, *, is_hidden: bool = False) -> Answer:
        """Block until the server has answered, or the connection is lost. `is_hidden`: meanwhile something computes.

        Raises:
            SmolError: what ended the run meanwhile.
        """
        began = time.monotonic()
        while not self._done.wait(SLICE):
            if (error := self._ended()) is not None:
                raise error
        if not is_hidden:
            self._telemetry.record("comm_wait", began, time.monotonic(), details={"call": "push"})
        return self._answer


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Weights on their way."""

    version: int
    is_first: bool
    is_whole: bool
    flats: list[Tensor]
    constants: list[Tensor]
    works: list[Work]


@dataclass(frozen=True, slots=True)
class _Over:
    reason: str | None
    has_weights: bool


@dataclass(slots=True)
class _Session:
    """The worker's side of one session."""

    world: SessionWorld
    comm: TcpCommunicator
    inbox: queue.SimpleQueue[JsonObject | _Over | SmolError]
    arriving: deque[_Arriving]  # in the order of sending
    tickets: dict[int, Ticket]
    pushes: int = 0
    version: int = 0
    has: list[Tensor] | None = None
    encoder: FeedbackEncoder | None = None
    has_weights: threading.Event = field(default_factory=threading.Event)  # some came since they were last taken
    weights_came_at: float = 0.0


class WorkerPort:
    """A worker's end. For the worker's training thread, but for `abort`.

    Attributes:
        lease: what `next_lease` gave last.
        last_weights: flat, those that the run ended with; None: it has not ended, or they did not come.
        sessions: how many there were so far.
        is_closed: `close` was called.
    """

    def __init__(
        self,
        rank: int,
        connect: Callable[[Callable[[], SmolError | None]], SessionWorld],
        layout: FlatLayout,
        *,
        constants: Sequence[Tensor] = (),
        codec: Codec | None = None,
        telemetry: Telemetry | None = None,
        began: Callable[[SessionWorld], None] | None = None,
        spans_by_lease: bool = False,
    ) -> None:
        """Nothing is opened before the first `next_lease`.

        Args:
            rank: this worker's in the run.
            connect: makes a session (join_session); it is given what says that the run has ended meanwhile.
            layout: as the server's.
            constants: as the server's, of the same shapes; only these are looked at.
            codec: as the server's.
            telemetry: where traffic and waiting are counted.
            began: called with each new session before anything is received in it.
            spans_by_lease: what is measured belongs to the lease's number and not to its step.
        """
        self._spans_by_lease = spans_by_lease
        self.rank = rank
        self.telemetry = telemetry or Telemetry()
        self.layout = layout
        self._constants = list(constants)
        self._connect = connect
        self._codec = codec
        self._began = began
        self._session: _Session | None = None
        self._error: SmolError | None = None
        self._is_over = False
        self.is_closed = False
        self.sessions = 0
        self.lease: Lease | None = None
        self.last_weights: list[Tensor] | None = None

    def next_lease(self) -> Lease | None:
        """Block until there is something to compute; None: the run is over. Reconnects where that is needed.

        Raises:
            SmolError: the run has failed, or the server cannot be reached any more.
        """
        began, is_late = time.monotonic(), False
        while not self._is_over:
            if self._error is not None:
                raise self._error
            session = self._session or self._open()
            is_late = is_late or session.inbox.empty()
            try:
                item = session.inbox.get(timeout=SLICE)
            except queue.Empty:
                continue
            if isinstance(item, _Over):
                self._is_over = True
                if item.reason is not None:
                    raise PeerLost(item.reason, SERVER)
                if item.has_weights:
                    self._take_last(session)
                return None
            if isinstance(item, SmolError):
                self._lose(session, item)
                continue
            try:
                lease = self._lease(session, item)
            except SmolError as error:
                self._lose(session, error)
                continue
            if is_late and not lease.is_first:  # the first comes when the run begins, whenever that is
                ended = time.monotonic()
                number = lease.number if self._spans_by_lease else lease.step
                self.telemetry.record("comm_wait", began, ended, number, details={"call": "lease"})
                lease = replace(lease, waited=ended - began)
            self.lease = lease
            return lease
        return None

    def push(self, gradients: Sequence[Tensor], note: PushNote) -> Ticket:
        """Send a gradient; returns before it has left. `gradients` are flat and belong to the port from now on."""
        ticket = Ticket(self.telemetry, lambda: self._error)
        session = self._session
        if session is None:
            ticket.finish(Answer(status="lost"))
            return ticket
        session.pushes += 1
        number = session.pushes
        session.tickets[number] = ticket
        if session.world.error() is not None:
            ticket.finish(Answer(status="lost"))
            return ticket
        outgoing = list(gradients) if session.encoder is None else session.encoder.encode(gradients)
        session.world.send(SERVER, "push", {"number": number, "note": note.model_dump(mode="json")})
        for flat in outgoing:
            session.comm.send(flat, SERVER, tag=number)
        return ticket

    def ask(self, leases: int = 1) -> None:
        """Ask the server for so many leases more. Returns at once."""
        if self._session is not None:
            self._session.world.send(SERVER, "ask", {"leases": leases})

    def weights_came_at(self) -> float:
        """When the last weights arrived (`time.monotonic()`)."""
        return 0.0 if self._session is None else self._session.weights_came_at

    def version(self) -> int:
        """Of the weights that were taken last."""
        return 0 if self._session is None else self._session.version

    def newest_weights(self, timeout: float = 0.0) -> list[Tensor] | None:
        """Weights that have arrived since, flat on the CPU; None: none have.

        Args:
            timeout: seconds to wait for some if there are none.
        """
        session, newest = self._session, None
        if session is not None and timeout > 0.0 and not session.has_weights.is_set():
            began = time.monotonic()
            session.has_weights.wait(timeout)
            self.telemetry.record("comm_wait", began, time.monotonic(), details={"call": "weights"})
        if session is not None:
            session.has_weights.clear()
        while session is not None and session.arriving:
            if not all(work.done() and work.exception() is None for work in session.arriving[0].works):
                break
            arriving = session.arriving.popleft()
            newest, session.version = self._received(session, arriving), arriving.version
        return newest

    def report(self, report: JsonObject) -> None:
        """Tell the server what this worker gave, at the end."""
        if self._session is not None:
            self._session.world.send(SERVER, "report", report)

    def abort(self, error: SmolError) -> None:
        """End this worker with `error`; from any thread."""
        if self._error is None:
            self._error = error

    def close(self) -> None:
        """Say good-bye and close."""
        self.is_closed = True
        session, self._session = self._session, None
        if session is not None:
            session.world.send(SERVER, "bye", {})
            session.comm.close()

    # ---- helpers

    def _open(self) -> _Session:
        world = self._connect(lambda: self._error)
        try:
            comm = TcpCommunicator(world, name=f"session{world.number}", telemetry=self.telemetry, spins=False)
        except SmolError as error:
            world.close()
            logger.warning("session not opened reason=%s", error)
            return self._open()
        encoder = None if self._codec is None else FeedbackEncoder(self._codec, self.layout)
        session = _Session(world, comm, queue.SimpleQueue(), deque(), {}, encoder=encoder)
        self._session = session
        self.sessions += 1
        if self._began is not None:
            self._began(world)
        world.on("weights", lambda _rank, message: self._expect_weights(session, message))
        world.on("lease", lambda _rank, message: self._lease_came(session, message))
        world.on("answer", lambda _rank, message: self._answer_came(session, message))
        world.on("over", lambda _rank, message: self._over_came(session, message))
        world.on_failure(partial(self._failed, session))
        logger.info("session began number=%d generation=%d", world.number, world.view().generation)
        return session

    def _failed(self, session: _Session, error: SmolError) -> None:
        """On any thread: the session is lost."""
        session.inbox.put(error)
        for ticket in list(session.tickets.values()):
            ticket.finish(Answer(status="lost"))

    def _lose(self, session: _Session, error: SmolError) -> None:
        logger.warning("session lost number=%d reason=%s", session.world.number, error)
        self._session = None
        for ticket in session.tickets.values():
            ticket.finish(Answer(status="lost"))
        session.world.abort(error)
        session.comm.close()

    def _take_last(self, session: _Session) -> None:
        """The run's last weights; without them this worker ends with those that it has."""
        try:
            arriving = session.arriving.pop()  # those before it are older
            for work in arriving.works:
                work.wait()
            self.last_weights = arriving.flats
        except SmolError as error:
            logger.warning("last weights not received reason=%s", error)

    def _over_came(self, session: _Session, message: JsonObject) -> None:
        weights = message.get("weights")
        if isinstance(weights, dict):
            self._expect_weights(session, weights)
        session.inbox.put(_Over(_text(message.get("reason")), isinstance(weights, dict)))
        for ticket in list(session.tickets.values()):  # answers came before; who has none now gets none
            ticket.finish(Answer(status="lost"))

    def _lease_came(self, session: _Session, message: JsonObject) -> None:
        """On the link's thread: post the receives of its weights before anything else, in the order of sending."""
        weights = message.get("weights")
        if isinstance(weights, dict):
            self._expect_weights(session, weights)
        session.inbox.put(message)

    def _expect_weights(self, session: _Session, message: JsonObject) -> None:
        match message:
            case {"number": int(number), "version": int(version), "is_first": bool(first), "is_whole": bool(whole)}:
                flats = self.layout.empty(None if whole else self._codec)
                constants = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in self._constants if first]
                works: list[Work] = [
                    session.comm.recv(SERVER, tag=number, out=tensor) for tensor in (*flats, *constants)
                ]
                session.arriving.append(_Arriving(version, first, whole, flats, constants, works))
                works[-1].add_done_callback(lambda _work: self._weights_came(session))
            case _:
                session.world.abort(PeerLost("the server announced weights in a way that is malformed", SERVER))

    def _weights_came(self, session: _Session) -> None:
        session.weights_came_at = time.monotonic()
        session.has_weights.set()

    def _answer_came(self, session: _Session, message: JsonObject) -> None:
        try:
            answer = Answer.model_validate(message.get("answer"))
        except ValidationError as error:
            session.world.abort(PeerLost(f"the server sent an answer that is malformed: {error}", SERVER))
            return
        number = message.get("push")
        ticket = session.tickets.pop(number, None) if isinstance(number, int) else None
        if ticket is not None:
            ticket.finish(answer)

    def _lease(self, session: _Session, message: JsonObject) -> Lease:
        weights, is_first, constants = None, False, []
        if isinstance(message.get("weights"), dict):
            arriving = session.arriving.popleft()
            weights, is_first, constants = self._received(session, arriving), arriving.is_first, arriving.constants
            session.version = arriving.version
        match message:
            case {"number": int(number), "ranges": list(packed), "step": int(step), "planned": int(planned)}:
                ranges = tuple(_range(part) for part in packed)
                return Lease(number, ranges, step, planned, session.version, weights, is_first, constants)
        raise FrameError("the server sent a lease that is malformed")

    def _received(self, session: _Session, arriving: _Arriving) -> list[Tensor]:
        """Wait for weights, and decode them. With a codec, changes are added to what this worker has."""
        for work in arriving.works:
            work.wait()
        if self._codec is None:
            return arriving.flats
        if arriving.is_whole or session.has is None:
            session.has = arriving.flats
        else:
            for has, change in zip(session.has, decode_flats(arriving.flats, self._codec, self.layout), strict=True):
                has.add_(change)
        return session.has


def _payload(message: JsonObject) -> JsonObject:
    return {key: value for key, value in message.items() if key != "kind"}


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _range(part: object) -> tuple[int, int, int]:
    match part:
        case [int(epoch), int(start), int(stop)] if epoch >= 0 and 0 <= start < stop:
            return epoch, start, stop
    raise FrameError("the server sent a lease that is malformed")
