"""A worker's end of a parameter server: leases come, gradients go, answers and weights come back.

See param_server.py for what is said and how. A worker whose connection breaks asks for a new session by itself, as long
as there may be a server; what was under way is lost, and its Ticket says so.
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

import torch
from pydantic import ValidationError
from torch import Tensor

from smolcluster.cluster.sessions import SERVER, SessionWorld
from smolcluster.collectives.base import Codec, Work
from smolcluster.collectives.flat import FeedbackEncoder, FlatLayout, decode_flats
from smolcluster.collectives.param_messages import Answer, PushNote
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import FrameError, PeerLost, SmolError, error_of
from smolcluster.kinds import JsonObject
from smolcluster.telemetry import Telemetry

logger = logging.getLogger(__name__)

# Seconds between looks whether somebody has ended the run, while a worker waits for the server.
SLICE = 0.5
# Seconds to wait after each try to open a session's connections, before the next.
OPEN_PAUSES = (0.1, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 0.0)


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
    error: SmolError | None
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
    is_over: bool = False  # the server has said its last word: no push will be answered


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
                if item.error is not None:
                    raise item.error
                if item.has_weights:
                    self._take_last(session)
                return None
            if isinstance(item, SmolError):
                self._lose(session, item)
                continue
            if session.is_over:
                continue  # the gradients would not be wanted any more
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
        if session.is_over or session.world.error() is not None:
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

    def lineage(self) -> str | None:
        """Tells whose weights these are: a server that is started again goes back to a checkpoint. None: it is away."""
        session = self._session
        return None if session is None or session.world.is_over else session.world.view().run_id

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

    def last_word(self, speak: Callable[[SessionWorld], None]) -> None:
        """Let somebody else say something to the server, if there still is one."""
        if self._session is not None:
            speak(self._session.world)

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
        for pause in OPEN_PAUSES:
            world = self._connect(lambda: self._error)
            try:
                comm = TcpCommunicator(world, name=f"session{world.number}", telemetry=self.telemetry, spins=False)
                break
            except SmolError as error:
                world.close()
                logger.warning("session not opened reason=%s", error)
                reason = error
                time.sleep(pause)
        else:
            raise PeerLost(f"the server answers, but a connection for tensors does not come up: {reason}", SERVER)
        encoder = None if self._codec is None else FeedbackEncoder(self._codec, self.layout)
        session = _Session(world, comm, queue.SimpleQueue(), deque(), {}, encoder=encoder)
        self._session = session
        self.sessions += 1
        if self._began is not None:
            self._began(world)
        world.on("mail", lambda _rank, message: self._mail_came(session, message))
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
        for ticket in list(session.tickets.values()):
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

    def _mail_came(self, session: _Session, mail: JsonObject) -> None:
        """On the link's thread: what the server had to say, in its order."""
        items = mail.get("items")
        for item in items if isinstance(items, list) else [None]:
            match item:
                case ["lease", dict(message)]:
                    self._lease_came(session, message)
                case ["weights", dict(message)]:
                    self._expect_weights(session, message)
                case ["answer", dict(message)]:
                    self._answer_came(session, message)
                case ["over", dict(message)]:
                    self._over_came(session, message)
                case _:
                    session.world.abort(PeerLost("the server sent a message that is malformed", SERVER))
                    return

    def _over_came(self, session: _Session, message: JsonObject) -> None:
        weights = message.get("weights")
        if isinstance(weights, dict):
            self._expect_weights(session, weights)
        session.is_over = True  # before the tickets are looked through: one that is pushed now looks after it
        reason, kind = message.get("reason"), message.get("error")
        error = None if reason is None else error_of(str(kind), str(reason)) or PeerLost(str(reason), SERVER)
        session.inbox.put(_Over(error, isinstance(weights, dict)))
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


def _range(part: object) -> tuple[int, int, int]:
    match part:
        case [int(epoch), int(start), int(stop)] if epoch >= 0 and 0 <= start < stop:
            return epoch, start, stop
    raise FrameError("the server sent a lease that is malformed")
