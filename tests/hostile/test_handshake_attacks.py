"""Somebody on the way between two ranks, who does not know the token: relays, replays, reflects and changes."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from hostile.mutator import PICKLES, TLS_CLIENT_HELLO
from smolcluster.errors import AuthFailed, ConnectFailed, ConnectionLost, FrameError
from smolcluster.transport import security
from smolcluster.transport.base import ControlLink, Hello
from smolcluster.transport.messages import HEAD_BYTES, MAC_BYTES
from smolcluster.transport.security import Refused
from smolcluster.transport.tcp import CONTROL, TcpListener, TcpNetwork, listen, parse_address

TOKEN = b"correct horse battery staple"
RUN = "run-7"
PATIENCE = 10.0
Change = Callable[[bytes], bytes]


@pytest.fixture
def listeners() -> Iterator[list[TcpListener]]:
    """Ranks 0, 1 and 2 of one run."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id=RUN, rank=rank)))
            for rank in range(3)
        ]


class Attacker:
    """Takes connections and passes the bytes on to `target`; `change` may alter what the dialler says."""

    def __init__(self, target: str, change: Change = lambda said: said) -> None:
        self.said = bytearray()  # by diallers, before the change
        self._target = target
        self._change = change
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(PATIENCE)
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._serve, name="test-attacker")]
        self._threads[0].start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(parse_address(self._target), timeout=PATIENCE)
                self._sockets += [near, far]
                for source, sink, change in ((near, far, self._spoil), (far, near, None)):
                    thread = threading.Thread(target=self._pass_on, args=(source, sink, change), name="test-attacker")
                    self._threads.append(thread)
                    thread.start()

    def _spoil(self, said: bytes) -> bytes:
        self.said += said
        return self._change(said)

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket, change: Change | None) -> None:
        with contextlib.suppress(OSError):
            while said := source.recv(65536):
                sink.sendall(change(said) if change is not None else said)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


def visit(listener: TcpListener, to: int = 0) -> None:
    """The run goes on: an honest rank gets in."""
    near = TcpNetwork(TOKEN).dial_channel(listener.address, Hello(9, "bulk:world", RUN, to), PATIENCE)
    far = listener.accept_channel(9, "bulk:world", PATIENCE)
    near.abort(ConnectionLost("the visit is over"))
    far.abort(ConnectionLost("the visit is over"))


# --- the handshake


def test_who_only_passes_bytes_on_is_a_wire(listeners: list[TcpListener]) -> None:
    # Else the tests below would prove nothing.
    with contextlib.closing(Attacker(listeners[0].address)) as attacker:
        near = TcpNetwork(TOKEN).dial_channel(attacker.address, Hello(2, "bulk:world", RUN, 0), PATIENCE)
        far = listeners[0].accept_channel(2, "bulk:world", PATIENCE)
        near.abort(ConnectionLost("the test is over"))
        far.abort(ConnectionLost("the test is over"))
    assert TOKEN not in attacker.said
    assert b"bulk:world" in attacker.said


@pytest.mark.parametrize("lane", ["bulk:world", CONTROL])
@pytest.mark.parametrize("led_to", [1, 2], ids=["another rank", "the dialler itself"])
def test_a_rank_cannot_be_led_to_another_rank(listeners: list[TcpListener], lane: str, led_to: int) -> None:
    with contextlib.closing(Attacker(listeners[led_to].address)) as attacker:
        dial = TcpNetwork(TOKEN).dial_control if lane == CONTROL else TcpNetwork(TOKEN).dial_channel
        with pytest.raises(Refused, match="another rank than the one that was dialled") as caught:
            dial(attacker.address, Hello(2, lane, RUN, 0), PATIENCE)
    assert caught.value.reason == security.REFUSED_RANK
    with pytest.raises(ConnectFailed):
        listeners[led_to].accept_control(0.0)
    visit(listeners[led_to], led_to)


CHANGES: dict[str, tuple[int, bytes]] = {
    "the rank that was dialled": (10, b"\x00\x01"),
    "the dialler's rank": (12, struct.pack("!i", 7)),
    "the dialler's nonce": (16, bytes(32)),
    "the lane": (48, b"p"),
    "the run": (58, b"s"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_in_the_hello_can_be_changed_on_the_way(listeners: list[TcpListener], what: str) -> None:
    at, new = CHANGES[what]

    def change(said: bytes) -> bytes:
        return said[:at] + new + said[at + len(new) :] if said[6] == 1 else said

    with (
        contextlib.closing(Attacker(listeners[0].address, change)) as attacker,
        pytest.raises(AuthFailed, match="tokens differ"),
    ):
        TcpNetwork(TOKEN).dial_channel(attacker.address, Hello(2, "bulk:world", RUN, 0), PATIENCE)
    visit(listeners[0])


def test_a_recorded_connection_is_worth_nothing_later(listeners: list[TcpListener]) -> None:
    with contextlib.closing(Attacker(listeners[0].address)) as attacker:
        near = TcpNetwork(TOKEN).dial_control(attacker.address, Hello(2, CONTROL, RUN, 0), PATIENCE)
        _, far = listeners[0].accept_control(PATIENCE)
        near.send({"kind": "join"})
        assert far.receive(PATIENCE) == {"kind": "join"}
        near.close()
        far.close()
    with socket.create_connection(parse_address(listeners[0].address), timeout=PATIENCE) as sock:
        sock.sendall(attacker.said)
        answer = b""
        with contextlib.suppress(OSError):  # it may be closed already
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(4096):
                answer += piece
    assert len(answer) <= 2 * security.REPLY_BYTES
    assert answer[40:] in (b"", security.pack_refused(security.REFUSED_TOKEN))
    with pytest.raises(ConnectFailed):
        listeners[0].accept_control(0.0)
    visit(listeners[0])


def test_what_a_listener_says_is_no_proof_for_it(listeners: list[TcpListener]) -> None:
    # Its challenge comes back as the nonce of a second connection, and its answer there as the proof of the first.
    address = parse_address(listeners[0].address)
    who = Hello(2, "bulk:world", RUN, 0)
    with (
        socket.create_connection(address, timeout=PATIENCE) as first,
        socket.create_connection(address, timeout=PATIENCE) as second,
    ):
        first.sendall(security.pack_hello(who, bytes(32)))
        challenge = security.unpack_challenge(first.recv(40, socket.MSG_WAITALL), "")
        second.sendall(security.pack_hello(who, challenge))
        said = second.recv(40, socket.MSG_WAITALL)
        first.sendall(said[:6] + b"\x03" + said[7:])
        assert first.recv(40, socket.MSG_WAITALL) == security.pack_refused(security.REFUSED_TOKEN)
    visit(listeners[0])


OTHER_LANGUAGES = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: something long enough\r\n\r\n",
    "tls": TLS_CLIENT_HELLO,
    "4 GiB, as a length": struct.pack("!I", 2**32 - 1) * 16,
    **{f"pickle {protocol}": pickled.ljust(64, b".") for protocol, pickled in enumerate(PICKLES)},
}


@pytest.mark.parametrize("what", OTHER_LANGUAGES)
def test_another_language_is_closed_with_one_line_in_the_log(
    listeners: list[TcpListener], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "smolcluster"),
        socket.create_connection(parse_address(listeners[0].address), timeout=PATIENCE) as sock,
    ):
        sock.sendall(OTHER_LANGUAGES[what])
        with contextlib.suppress(OSError):  # it may be closed already
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "connection refused peer=tcp://127.0.0.1:" in caplog.text
    visit(listeners[0])


# --- control frames


def split(said: bytes) -> list[bytes]:
    """Control frames, one by one."""
    found, at = [], 0
    while at < len(said):
        end = at + HEAD_BYTES + struct.unpack_from("!I", said, at)[0] + MAC_BYTES
        found.append(said[at:end])
        at = end
    return found


TAMPERING: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "repeated": lambda frames: [frames[0], frames[0]],
    "swapped": lambda frames: [frames[1], frames[0]],
    "left out": lambda frames: frames[1:],
    "changed": lambda frames: [frames[0][:-20] + b"X" + frames[0][-19:]],
    "4 GiB": lambda frames: [struct.pack("!I", 2**32 - 1) + frames[0][4:]],
    "a pickle": lambda frames: [struct.pack("!IQ", len(PICKLES[2]), 0) + PICKLES[2] + bytes(16)],
}


@pytest.fixture
def linked(listeners: list[TcpListener]) -> Iterator[tuple[ControlLink, ControlLink, list[Change]]]:
    """Both ends of a control link, and what the attacker on the way does to the frames of the dialler."""
    changes: list[Change] = []
    with contextlib.closing(
        Attacker(listeners[0].address, lambda said: changes[0](said) if changes else said)
    ) as attacker:
        near = TcpNetwork(TOKEN).dial_control(attacker.address, Hello(2, CONTROL, RUN, 0), PATIENCE)
        _, far = listeners[0].accept_control(PATIENCE)
        yield near, far, changes
        near.close()
        far.close()


@pytest.mark.parametrize("how", TAMPERING)
def test_control_frames_cannot_be_tampered_with(
    linked: tuple[ControlLink, ControlLink, list[Change]], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    near, far, changes = linked
    frames: list[bytes] = []

    def tamper(said: bytes) -> bytes:
        frames.extend(split(said))
        return b"".join(TAMPERING[how](frames)) if len(frames) == 2 else b""

    changes.append(tamper)
    got, errors, ended = [], [], threading.Event()

    def closed(error: Exception) -> None:
        errors.append(error)
        ended.set()

    far.on_close(closed)  # type: ignore[arg-type] # takes less than it could
    far.on_message(got.append)
    near.send({"kind": "first"})
    near.send({"kind": "second"})
    assert ended.wait(PATIENCE)
    assert isinstance(errors[0], FrameError)
    assert got in ([], [{"kind": "first"}])
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert lines[0].startswith("control frame refused peer=tcp://127.0.0.1:")


def test_a_ranks_own_frames_cannot_be_sent_back_to_it(linked: tuple[ControlLink, ControlLink, list[Change]]) -> None:
    near, far, _ = linked
    near.send({"kind": "beat"})
    assert far.receive(PATIENCE) == {"kind": "beat"}
    assert isinstance(far._sock, socket.socket)  # type: ignore[attr-defined] # the attacker's hand
    mine = near._outgoing.pack({"kind": "beat"})  # type: ignore[attr-defined]
    far._sock.sendall(mine)  # type: ignore[attr-defined]
    with pytest.raises(FrameError):
        near.receive(PATIENCE)
