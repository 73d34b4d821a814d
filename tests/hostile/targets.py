"""Everything that reads what others sent, each with somebody hostile at the other end of a socket pair.

`attack(dice)` makes one case, lets the real code have it, and returns how that ended. It raises AssertionError for what
must not happen, and lets any exception through that is not one of errors.py: both are defects.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from hostile.mutator import EDGES, MAX_CASE_BYTES, PICKLES, STRANGE, STRANGE_JSON, mutate, mutate_json
from smolcluster.cluster import world as world_module
from smolcluster.cluster.rendezvous import _Lobby, _unpack_view
from smolcluster.cluster.world import Member, View, World
from smolcluster.collectives.base import ReduceOp
from smolcluster.collectives.codec import Bf16Codec
from smolcluster.collectives.groups import inproc_group
from smolcluster.collectives.plan import Plan
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import CollectiveTimeout, ConnectFailed, ConnectionLost, SmolError, TransportError
from smolcluster.kinds import JsonObject
from smolcluster.transport import admission, frame, messages, security, shm, tcp
from smolcluster.transport.base import Channel, ControlLink, Hello, SocketState
from smolcluster.transport.messages import MessageCodec
from smolcluster.transport.security import Transcript
from smolcluster.transport.tcp import CONTROL, TcpChannel, TcpControlLink, TcpListener, TcpOptions

TOKEN = b"correct horse battery staple"
WRONG_TOKEN = b"battery staple horse correct"
RUN = "run-7"
NONCE = bytes(range(32))  # of both sides, so that a whole handshake can be written down beforehand
KEY = bytes(range(32, 64))
HANG = 20.0  # seconds after which a case that has not ended counts as hanging


class Target(Protocol):
    """One reader of foreign bytes."""

    name: str

    def attack(self, dice: random.Random) -> str:
        """Make one case and say how it ended."""
        ...


class Handshakes:
    """Somebody dials a listener; `token` is what they know."""

    def __init__(self, listener: TcpListener, log: CountingLog, token: bytes) -> None:
        self.name = "listener, with token" if token == TOKEN else "listener, without token"
        self._listener = listener
        self._log = log
        self._token = token

    def attack(self, dice: random.Random) -> str:
        hello = Hello(
            dice.choice((1, 1, 1, 0, -1, 7, 2**31 - 1, -(2**31))),
            dice.choice(("bulk:world", "bulk:world", CONTROL, "p2p:world", "", "é" * 32, "x" * 64, "\x00\n%s")),
            dice.choice((RUN, RUN, RUN, "run-6", "", "x" * 64)),
            dice.choice((0, 0, 0, 1, 65535)),
        )
        said = security.pack_hello(hello, NONCE)
        proof = security.pack_proof(Transcript(hello, NONCE, NONCE).proof(self._token, "dialler"))
        data = mutate(dice, [said[:48], said[48:], proof]) if dice.random() < 0.95 else dice.choice(STRANGE)
        listener, lines = self._listener, self._log.lines
        near, far = socket.socketpair()
        with near:
            near.sendall(data)
            near.shutdown(socket.SHUT_WR)
            listener._strangers.add(threading.current_thread(), far, "attacker")
            listener._greet(far, "attacker")
            answer = b""
            with contextlib.suppress(ConnectionResetError):  # what was not read resets it
                answer = near.recv(200)
        assert not listener._strangers._by_thread
        accepted = [*listener._channels.values(), *(link for _, link in listener._links)]
        if not accepted:
            assert not listener._taken, "a refused connection left its name behind"
            assert far.fileno() == -1, "a refused connection was left open"
            assert self._log.lines == lines + 1, "a refused connection is one line in the log"
            return f"refused: {_reason_code(answer)}"
        assert self._log.lines == lines
        # Byte 9 has no meaning yet, nor has byte 7 of a PROOF; what follows the handshake is the lane's own.
        expected, got = bytearray(said + proof), bytearray(data[: len(said + proof)])
        for place in (9, len(said) + 7):
            if place < len(got):
                expected[place] = got[place]
        assert self._token == TOKEN, "somebody who does not know the token was let in"
        assert got == expected, "a changed handshake was accepted"
        assert (hello.run_id, hello.to) == (RUN, 0)
        listener._channels.clear()
        listener._links.clear()
        listener._taken.clear()
        far.close()
        return "accepted"


class Knocking:
    """A crowd at a live listener: some talk, some are silent, some hang up; whoever knows the token still gets in."""

    name = "live listener"
    CROWD = 80  # more than it keeps
    HONEST_EVERY = 25

    def __init__(self, listener: TcpListener) -> None:
        self._listener = listener
        self._crowd: deque[socket.socket] = deque()
        self._honest = itertools.count()

    def attack(self, dice: random.Random) -> str:
        if next(self._honest) % self.HONEST_EVERY == 0:
            return self._visit()
        sock = socket.create_connection(tcp.parse_address(self._listener.address), timeout=HANG)
        hello = security.pack_hello(Hello(1, CONTROL, RUN, 0), NONCE)
        with contextlib.suppress(OSError):  # it may have been closed already
            sock.sendall(mutate(dice, [hello, security.pack_proof(NONCE)]) if dice.random() < 0.7 else b"")
        if dice.random() < 0.3:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
            sock.close()
            return "reset"
        self._crowd.append(sock)
        if len(self._crowd) > self.CROWD:
            self._crowd.popleft().close()
        return "stays"

    def _visit(self) -> str:
        network = tcp.TcpNetwork(TOKEN)
        near = network.dial_channel(self._listener.address, Hello(5, "p2p:world", RUN, 0), HANG)
        far = self._listener.accept_channel(5, "p2p:world", HANG)
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("handshake")]
        near.abort(ConnectionLost("the visit is over"))
        far.abort(ConnectionLost("the visit is over"))
        self._listener._taken.clear()
        assert len(threads) <= admission.MAX_UNAUTHENTICATED + 1, f"{len(threads)} threads for strangers"
        return "honest rank let in"

    def close(self) -> None:
        """Everybody goes."""
        for sock in self._crowd:
            sock.close()


class Answers:
    """A rank dials somebody hostile; `token` is what they know."""

    def __init__(self, token: bytes) -> None:
        self.name = "dialler, to one with the token" if token == TOKEN else "dialler, to one without the token"
        self._token = token

    def attack(self, dice: random.Random) -> str:
        hello = Hello(1, "bulk:world", RUN, 0)
        proof = Transcript(hello, NONCE, NONCE).proof(self._token, dice.choice(("listener", "listener", "dialler")))
        parts = [security.pack_challenge(NONCE), security.pack_accept(proof)]
        if dice.random() < 0.2:
            parts[dice.randrange(2)] = security.pack_refused(dice.choice(EDGES) % 256)
        data = mutate(dice, parts) if dice.random() < 0.95 else dice.choice(STRANGE)
        near, far = socket.socketpair()
        with near, far:
            near.sendall(data)
            near.shutdown(socket.SHUT_WR)
            stream = tcp._Deadline(far, time.monotonic() + HANG, "attacker")
            try:
                tcp._prove(stream, hello, TOKEN, "attacker", security.NO_TLS)
            except TransportError as error:
                return f"refused: {type(error).__name__}"
        honest = Transcript(hello, NONCE, NONCE).proof(TOKEN, "listener")
        assert self._token == TOKEN, "somebody who does not know the token was believed"
        assert data[8:40] == NONCE
        assert data[48:80] == honest, "a changed answer was believed"
        return "accepted"


class MemoryOffers:
    """Somebody on the way between two ranks of one host names files of the listener's user as their shared memory."""

    name = "shared memory offers"
    RING = 4096

    def attack(self, dice: random.Random) -> str:
        key = bytes(32)  # not the session's
        path = dice.choice(
            (b"", b"/etc/passwd", b"/proc/self/mem", b"/dev/zero", b"../" * 300, b"\x00", b"\xff" * 1024)
        )
        ring_bytes = dice.choice((self.RING, self.RING, 0, 4097, 2**30, 2**31, 2**32 - 1))
        mac = dice.choice((bytes(16), shm.offer_mac(key, ring_bytes, path), shm.offer_mac(KEY, ring_bytes, b"/meant")))
        data = mutate(dice, [shm._OFFER.pack(b"SM", ring_bytes, len(path), mac), path])
        near, far = socket.socketpair()
        with near, far:
            near.sendall(data)
            near.shutdown(socket.SHUT_WR)
            try:
                shm.answer(tcp._Deadline(far, time.monotonic() + HANG, "attacker"), KEY)
            except TransportError as error:
                return f"refused: {type(error).__name__}"
        raise AssertionError("it looked for the file")


class ControlFrames:
    """Control frames that somebody on the path has changed, or (`knows_key`) that the other rank has made itself."""

    def __init__(self, *, knows_key: bool) -> None:
        self.name = "control frames, with the key" if knows_key else "control frames, without the key"
        self._knows_key = knows_key

    def attack(self, dice: random.Random) -> str:
        codec = MessageCodec(KEY, from_dialler=True)
        sent: list[JsonObject] = [{"kind": "beat", "n": n, "text": "x" * dice.choice((0, 1, 100))} for n in range(4)]
        if self._knows_key:
            data = b"".join(self._packed(dice, codec) for _ in range(2))
        else:
            parts = [codec.pack(message) for message in sent]
            data = mutate(dice, parts)
            if dice.random() < 0.1:  # of another session, or sent back to where it came from
                key, from_dialler = dice.choice(((bytes(32), True), (KEY, False)))
                other = MessageCodec(key, from_dialler=from_dialler)
                data = other.pack(sent[0]) + data
        near, far = socket.socketpair()
        link = TcpControlLink(far, KEY, is_dialler=False, address="attacker", patience=1.0)
        got: list[JsonObject] = []
        with near:
            near.sendall(data[:MAX_CASE_BYTES])
            near.shutdown(socket.SHUT_WR)
            try:
                while (message := link.receive(HANG)) is not None:
                    got.append(message)
                raise AssertionError("the link waits for ever")
            except TransportError as error:
                ending = type(error).__name__
            finally:
                link.close()
        if not self._knows_key:
            assert got == sent[: len(got)], "a message that nobody sent"
        assert all(isinstance(message, dict) for message in got)
        return f"{len(got)} messages, then {ending}"

    @staticmethod
    def _packed(dice: random.Random, codec: MessageCodec) -> bytes:
        """A frame with a right MAC around anything."""
        if dice.random() < 0.3:
            return codec.pack({"kind": "beat"})
        body = dice.choice(STRANGE_JSON)
        if dice.random() < 0.5:
            body = mutate(dice, [body, b'{"kind":"beat"}'])
        body = body[: messages.MAX_MESSAGE_BYTES]
        head = struct.pack("!IQ", len(body), codec._sequence)
        codec._sequence += 1
        return head + body + codec._mac(head, body)


JOIN: JsonObject = {
    "kind": "join", "rank": 1, "name": "x", "world_size": 2, "address": "tcp://127.0.0.1:9", "options": {"seed": "1"},
}  # fmt: skip
VIEW: JsonObject = {
    "kind": "view", "generation": 1, "leader": 0, "run_id": "r",
    "members": [{"rank": 0, "name": "a", "address": "tcp://h:1"}, {"rank": 1, "name": "b", "address": "tcp://h:2"}],
}  # fmt: skip
LATER: list[JsonObject] = [
    {"kind": "beat"}, {"kind": "ping", "sent": 1.5}, {"kind": "pong", "sent": 1.5, "held": 0.25}, {"kind": "leave"},
    {"kind": "abort", "error": "PeerLost", "text": "rank 1 is lost", "lost": 1}, {"kind": "row", "row": {"step": 1}},
    {"kind": "refused", "reason": "no"}, {"kind": "abort", "error": "ConfigError", "text": "no"},
]  # fmt: skip


class Joins:
    """Whoever knows the token says something strange while the ranks meet."""

    name = "join and view"

    def attack(self, dice: random.Random) -> str:
        if dice.random() < 0.5:
            return self._join(dice)
        try:
            view = _unpack_view(_over_the_wire(mutate_json(dice, VIEW)), 2)
        except SmolError as error:
            return f"view refused: {type(error).__name__}"
        # What it is used for: these must take it, or refuse it with an error of ours.
        hello = Hello(1, CONTROL, view.run_id, 0)
        assert len(security.pack_hello(hello, NONCE)) <= 48 + 2 * 64
        frame.pack(frame.Prelude(2, 0, 0, 1, 0, view.generation, 0, 0, 0, 0, 0))
        for member in view.members:
            assert "\n" not in f"{member.name}{member.address}"
        return "view taken"

    @staticmethod
    def _join(dice: random.Random) -> str:
        lobby = _Lobby(Member(0, "rank0", "tcp://127.0.0.1:1"), 2, {"seed": "1"}, 5.0)
        link = Said(_over_the_wire(mutate_json(dice, JOIN)))
        lobby.admit(Hello(dice.choice((1, 1, 1, 0, 2, -1)), CONTROL, RUN), link)
        if 1 in lobby.members:
            assert not link.sent
            assert "\n" not in lobby.members[1].name
            return "joined"
        assert link.closed
        assert [message["kind"] for message in link.sent] == ["refused"]
        return "join refused"


class Conversations:
    """The other rank says something strange on its control link while the run goes on."""

    name = "messages of a run"

    def attack(self, dice: random.Random) -> str:
        world, link = _world_of_two(Waiting({}))
        try:
            for _ in range(2):
                message = mutate_json(dice, dice.choice(LATER))
                if isinstance(message, dict):
                    world._received(1, _over_the_wire(message))
            error = world.error()
            assert error is None or isinstance(error, SmolError)
            for said in link.sent:
                messages.MessageCodec(KEY, from_dialler=True).pack(said)
            return "goes on" if error is None else f"ended: {type(error).__name__}"
        finally:
            world.close()


class Frames:
    """Bulk or p2p bytes of the other rank that somebody on the path has changed, or that it has made up."""

    def __init__(self, name: str, scenarios: dict[str, Callable[[TcpCommunicator], Any]], *, lane: str) -> None:
        self.name = name
        self._lane = lane
        self._scenarios = scenarios
        self._honest = {title: _record(play) for title, play in scenarios.items()}

    def attack(self, dice: random.Random) -> str:
        title = dice.choice(list(self._scenarios))
        parts = self.honest_frames(title)
        if dice.random() < 0.5:
            parts = _change_fields(dice, parts)
        error = self.ending(title, mutate(dice, parts))
        return "result" if error is None else type(error).__name__

    def honest_frames(self, title: str) -> list[bytes]:
        """What rank 1 sends on the attacked lane when nothing is wrong."""
        return split_frames(self._honest[title][self._lane])

    def ending(self, title: str, said: bytes) -> SmolError | None:
        """How a scenario ends on rank 0 if rank 1 says `said`; None: with a result."""
        waiting = Waiting({**self._honest[title], self._lane: said})
        world, _ = _world_of_two(waiting)
        comm = TcpCommunicator(world, plan=PLAN)
        try:
            self._scenarios[title](comm)
        except CollectiveTimeout as error:
            raise AssertionError(f"{title} hangs") from error
        except SmolError as error:
            text = str(error)
            assert "rank 1" in text, f"nobody is named: {text}"
            assert "unexpectedly" not in text, text
            return error
        finally:
            comm.close()
            waiting.close()
        return None


def _change_fields(dice: random.Random, parts: list[bytes]) -> list[bytes]:
    """One frame with other fields that are packed as they should be."""
    at = dice.randrange(len(parts))
    head = parts[at]
    if len(head) < frame.PRELUDE_BYTES:
        return parts
    fields = list(frame._PRELUDE.unpack(head[: frame.PRELUDE_BYTES]))
    widths = [16, 8, 8, 8, 8, 8, 8, 32, 32, 32, 64, 64, 64]
    for _ in range(dice.choice((1, 1, 2))):
        place = dice.randrange(1, len(fields))
        near = dice.choice((fields[place] + 1, fields[place] - 1, dice.randrange(12), dice.choice(EDGES)))
        fields[place] = near % 2 ** widths[place]
    rest = head[frame.PRELUDE_BYTES :]
    if dice.random() < 0.3:  # a shape that fits its count and bytes, however large
        dims = [dice.choice((*EDGES, 5, 1000)) for _ in range(dice.randrange(9))]
        count = 1
        for dim in dims:
            count *= dim
        itemsize = dice.choice((1, 2, 4, 8))
        fields[6], fields[11], fields[12] = len(dims), count % 2**64, count * itemsize % 2**64
        rest = struct.pack(f"!{len(dims)}Q", *dims) + dice.choice((b"", rest, dice.choice(PICKLES)))
    return [*parts[:at], frame._PRELUDE.pack(*fields) + rest, *parts[at + 1 :]]


def split_frames(data: bytes) -> list[bytes]:
    """A valid stream of bulk frames, one by one."""
    found, at = [], 0
    while at < len(data):
        prelude = frame.unpack(data[at : at + frame.PRELUDE_BYTES])
        end = at + frame.PRELUDE_BYTES + 8 * prelude.ndim + prelude.nbytes
        found.append(data[at:end])
        at = end
    return found


# Few bytes, and yet pieces that overlap and rings of several pieces.
PLAN = Plan(one_round_bytes=256, chunk_bytes=128, window=3)


def _wait(work: Any) -> Any:
    work.wait(HANG)
    return work.result()


def _receive_all(comm: TcpCommunicator) -> Any:
    if comm.rank == 1:
        values = [torch.arange(6.0).view(2, 3), torch.tensor([True, False, True]), torch.tensor(7)]
        return [_wait(comm.send(value, 0, tag)) for tag, value in enumerate(values)]
    works = [comm.recv(1, 0, out=torch.zeros(2, 3)), comm.recv(1, 1), comm.recv(1, 2)]
    return [_wait(work) for work in works]


def _receive_late(comm: TcpCommunicator) -> Any:
    """The messages are there before anybody wants them."""
    if comm.rank == 1:
        return [_wait(comm.send(torch.full((4,), float(tag)), 0, tag)) for tag in range(3)]
    return [_wait(comm.recv(1, tag)) for tag in reversed(range(3))]


COLLECTIVES: dict[str, Callable[[TcpCommunicator], Any]] = {
    "one round": lambda comm: _wait(comm.all_reduce(torch.arange(10.0))),
    "ring": lambda comm: _wait(comm.all_reduce(torch.arange(400.0), ReduceOp.AVG)),
    "codec": lambda comm: _wait(comm.all_reduce(torch.arange(400.0), codec=Bf16Codec())),
    "reduce_scatter": lambda comm: _wait(comm.reduce_scatter(torch.zeros(40), torch.arange(80.0))),
    "all_gather": lambda comm: _wait(comm.all_gather(torch.zeros(80).bool(), torch.ones(40).bool())),
    "broadcast": lambda comm: _wait(comm.broadcast(torch.arange(100.0), src=1)),
    "all_to_all": lambda comm: _wait(comm.all_to_all(torch.zeros(4, 5), torch.ones(4, 5))),
    "ragged": lambda comm: _wait(comm.all_to_all_ragged([torch.ones(2, 3), torch.ones(4)])),
    "exchange": lambda comm: [comm.exchange({"rank": comm.rank}, HANG), comm.barrier(HANG)],
}  # fmt: skip
MESSAGES: dict[str, Callable[[TcpCommunicator], Any]] = {"receive": _receive_all, "receive late": _receive_late}


class Said:
    """A control link on which one message has come already."""

    sent_bytes = recv_bytes = 0

    def __init__(self, *said: JsonObject) -> None:
        self._said = deque(said)
        self.sent: list[JsonObject] = []
        self.closed = False

    def send(self, message: JsonObject) -> None:
        self.sent.append(message)

    def receive(self, timeout: float) -> JsonObject | None:
        return self._said.popleft() if self._said else None

    def on_message(self, handler: Callable[[JsonObject], None]) -> None: ...

    def on_close(self, handler: Callable[[SmolError], None]) -> None: ...

    def last_heard(self) -> float:
        return 0.0

    def arrived_at(self) -> float:
        return 100.0

    def socket_state(self) -> SocketState:
        return SocketState(0, None, None)

    def close(self) -> None:
        self.closed = True


class Waiting:
    """A listener to which rank 1 has opened each lane of `said` already, said that, and closed its side."""

    address = "tcp://127.0.0.1:1"

    def __init__(self, said: dict[str, bytes]) -> None:
        self._said = said
        self._near: list[socket.socket] = []

    def allow_run(self, run_id: str) -> None: ...

    def accept_channel(self, rank: int, lane: str, timeout: float) -> Channel:
        near, far = socket.socketpair()
        near.sendall(self._said[lane])
        near.shutdown(socket.SHUT_WR)
        self._near.append(near)
        return TcpChannel(far, "attacker")

    def accept_control(self, timeout: float) -> tuple[Hello, ControlLink]:
        raise ConnectFailed("nobody comes")

    def close(self) -> None:
        for near in self._near:
            near.close()


class CountingLog(logging.Handler):
    """Counts the lines that refusals of "attacker" leave in the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += "peer=attacker " in record.getMessage()


@contextlib.contextmanager
def targets() -> Iterator[list[Target]]:
    """All of them, ready."""
    log = CountingLog()
    ours = logging.getLogger("smolcluster")
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (security, "new_nonce", lambda: NONCE),
            (tcp, "_set_options", lambda sock, options, lane: None),  # a socket pair has none of TCP's
            (admission, "LINES_PER_WINDOW", 2**62),
            (world_module, "GRACE", 0.0),  # nobody explains anything here
            (ours, "propagate", False),
        ):
            stack.enter_context(_replaced(owner, name, value))
        ours.addHandler(log)
        stack.callback(ours.removeHandler, log)
        listener = tcp.listen("127.0.0.1", 0, token=TOKEN, run_id=RUN, rank=0, options=TcpOptions())
        stack.callback(listener.close)
        busy = tcp.listen("127.0.0.1", 0, token=TOKEN, run_id=RUN, rank=0, options=TcpOptions())
        stack.callback(busy.close)
        knocking = Knocking(busy)
        stack.callback(knocking.close)
        yield [
            knocking,
            Handshakes(listener, log, WRONG_TOKEN),
            Handshakes(listener, log, TOKEN),
            Answers(WRONG_TOKEN),
            Answers(TOKEN),
            MemoryOffers(),
            ControlFrames(knows_key=False),
            ControlFrames(knows_key=True),
            Joins(),
            Conversations(),
            collective_frames(),
            message_frames(),
        ]


def collective_frames() -> Frames:
    """The bulk lane."""
    return Frames("collective frames", COLLECTIVES, lane="bulk:world")


def message_frames() -> Frames:
    """The lane of point-to-point messages."""
    return Frames("messages between two ranks", MESSAGES, lane="p2p:world")


def _world_of_two(listener: Waiting) -> tuple[World, Said]:
    link = Said()
    view = View(1, (Member(0, "rank0", "tcp://h:1"), Member(1, "rank1", "tcp://h:2")), 0, "run")
    network = tcp.TcpNetwork(TOKEN)
    return World(0, view, {1: link}, listener, network, 0.05), link


def _record(play: Callable[[TcpCommunicator], Any]) -> dict[str, bytes]:
    """What rank 0 receives on each lane when both ranks play honestly."""
    heard: dict[str, bytearray] = {}

    def hook(rank: int, hello: Hello, channel: Channel) -> Channel:
        return Recorder(channel, heard.setdefault(hello.lane, bytearray())) if rank == 0 else channel

    comms = inproc_group(2, hook=hook, plan=PLAN)
    threads = [threading.Thread(target=play, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for comm in comms:
        comm.close()
    return {lane: bytes(data) for lane, data in heard.items()}


class Recorder:
    """A channel that keeps what it receives."""

    def __init__(self, inner: Channel, heard: bytearray) -> None:
        self._inner = inner
        self._heard = heard

    def try_recv_into(self, buffer: memoryview) -> int:
        count = self._inner.try_recv_into(buffer)
        self._heard += buffer[:count]
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _over_the_wire(message: Any) -> Any:
    """As it would arrive. Control messages are read with the same limits."""
    try:
        arrived = json.loads(json.dumps(message))
    except (RecursionError, ValueError):  # it would not arrive
        return {}
    return arrived if isinstance(arrived, dict) else {}


def _reason_code(answer: bytes) -> str:
    last = answer[-security.REPLY_BYTES :]
    return f"reason {last[7]}" if len(last) == security.REPLY_BYTES and last[6] == 5 else "closed"


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
