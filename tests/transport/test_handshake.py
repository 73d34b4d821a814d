"""The handshake over real sockets: who is let in, who is not, and that strangers disturb nobody."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from smolcluster.errors import AuthFailed, ConfigError, ConnectFailed, ConnectionLost, PeerLost, TransportError
from smolcluster.transport import security, tcp
from smolcluster.transport.admission import MAX_UNAUTHENTICATED
from smolcluster.transport.base import Hello
from smolcluster.transport.security import Refused, Transcript
from smolcluster.transport.tcp import CONTROL, TcpChannel, TcpListener, TcpNetwork, TcpOptions, listen, parse_address

TOKEN = b"correct horse battery staple"
WRONG_TOKEN = b"battery staple horse correct"
RUN = "run-7"
PATIENCE = 10.0  # for what ought to happen at once
STRANGER_TIMEOUT = 0.4  # instead of 5 s


def hello(rank: int = 1, lane: str = "bulk:world", run_id: str = RUN) -> Hello:
    return Hello(rank, lane, run_id)


@pytest.fixture
def listener() -> Iterator[TcpListener]:
    with contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id=RUN)) as opened:
        yield opened


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers have STRANGER_TIMEOUT seconds instead of 5. Ask for it before `listener`."""
    assert tcp.HANDSHAKE_TIMEOUT == 5.0
    monkeypatch.setattr(tcp, "HANDSHAKE_TIMEOUT", STRANGER_TIMEOUT)


@contextlib.contextmanager
def stranger(listener: TcpListener) -> Iterator[socket.socket]:
    """A plain connection that has said nothing yet."""
    with socket.create_connection(parse_address(listener.address), timeout=PATIENCE) as sock:
        yield sock


def serves(listener: TcpListener, rank: int = 9) -> bool:
    """A proper rank gets a channel and bytes pass in both directions."""
    near = TcpNetwork(TOKEN).dial_channel(listener.address, hello(rank), PATIENCE)
    far = listener.accept_channel(rank, "bulk:world", PATIENCE)
    try:
        return exchange(near, far) and exchange(far, near)
    finally:
        near.abort(ConnectionLost("the test is over"))
        far.abort(ConnectionLost("the test is over"))


def exchange(sender: object, receiver: object) -> bool:
    assert isinstance(sender, TcpChannel)
    assert isinstance(receiver, TcpChannel)
    assert sender.try_send([memoryview(b"hel"), memoryview(b"lo")]) == 5
    got, target, deadline = 0, bytearray(5), time.monotonic() + PATIENCE
    while got < 5 and time.monotonic() < deadline:
        got += receiver.try_recv_into(memoryview(target)[got:])
    return bytes(target) == b"hello"


def read_all(sock: socket.socket) -> bytes:
    """What the other side sends until it closes; resets count as closing."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(4096):
            data += piece
    return bytes(data)


# --- who is let in


def test_both_sides_get_the_lane_they_agreed_on(listener: TcpListener) -> None:
    assert serves(listener)


def test_a_control_link_carries_the_hello_and_a_session_of_its_own(listener: TcpListener) -> None:
    near = TcpNetwork(TOKEN).dial_control(listener.address, hello(2, CONTROL), PATIENCE)
    said, far = listener.accept_control(PATIENCE)
    try:
        assert said == hello(2, CONTROL)
        near.send({"kind": "ping"})
        assert far.receive(PATIENCE) == {"kind": "ping"}
        far.send({"kind": "pong"})
        assert near.receive(PATIENCE) == {"kind": "pong"}
    finally:
        near.close()
        far.close()


def test_connections_are_handed_out_by_rank_and_lane(listener: TcpListener) -> None:
    wanted = [(2, "p2p:world"), (1, "bulk:world"), (1, "p2p:world"), (2, "bulk:world")]
    near = [TcpNetwork(TOKEN).dial_channel(listener.address, hello(*who), PATIENCE) for who in wanted]
    far = [listener.accept_channel(*who, PATIENCE) for who in reversed(wanted)]
    try:
        assert all(exchange(a, b) for a, b in zip(near, reversed(far), strict=True))
    finally:
        for channel in near + far:
            channel.abort(ConnectionLost("the test is over"))


def test_a_dialler_waits_for_a_listener_that_starts_later() -> None:
    with contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id=RUN)) as first:
        address = first.address
    started: list[TcpListener] = []

    def start() -> None:
        host, port = parse_address(address)
        started.append(listen(host, port, token=TOKEN, run_id=RUN))

    timer = threading.Timer(0.2, start)
    timer.start()
    channel = TcpNetwork(TOKEN).dial_channel(address, hello(), PATIENCE)
    timer.join()
    channel.abort(ConnectionLost("the test is over"))
    started[0].close()


def test_a_run_that_the_listener_does_not_know_yet_is_waited_for(listener: TcpListener) -> None:
    timer = threading.Timer(0.2, listener.allow_run, ("run-8",))
    timer.start()
    channel = TcpNetwork(TOKEN).dial_channel(listener.address, hello(run_id="run-8"), PATIENCE)
    timer.join()
    channel.abort(ConnectionLost("the test is over"))


# --- who is not


def test_a_wrong_token_is_refused_at_once_and_others_are_served(listener: TcpListener) -> None:
    start = time.monotonic()
    with pytest.raises(Refused, match="the cluster tokens differ") as caught:
        TcpNetwork(WRONG_TOKEN).dial_channel(listener.address, hello(), PATIENCE)
    assert time.monotonic() - start < PATIENCE / 2  # not tried again until the deadline
    assert caught.value.reason == security.REFUSED_TOKEN
    assert listener.address in str(caught.value)
    assert serves(listener)


def test_a_wrong_run_is_refused_in_the_end_and_others_are_served(listener: TcpListener) -> None:
    with pytest.raises(Refused, match="belongs to another run"):
        TcpNetwork(TOKEN).dial_channel(listener.address, hello(run_id="run-6"), 0.3)
    assert serves(listener)


def test_a_wrong_token_learns_nothing_of_runs_and_ranks(listener: TcpListener) -> None:
    with pytest.raises(Refused, match="tokens differ"):
        TcpNetwork(WRONG_TOKEN).dial_channel(listener.address, hello(run_id="run-6"), 0.3)


def test_another_protocol_version_is_refused_and_others_are_served(
    listener: TcpListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = security.pack_hello

    def older(who: Hello, nonce: bytes) -> bytes:
        packed = bytearray(pack(who, nonce))
        packed[4:6] = struct.pack("!H", 1)
        return bytes(packed)

    with monkeypatch.context() as patch:
        patch.setattr(security, "pack_hello", older)
        with pytest.raises(Refused, match="another protocol version"):
            TcpNetwork(TOKEN).dial_channel(listener.address, hello(), PATIENCE)
    assert serves(listener)


@pytest.mark.parametrize("handed_out", [False, True])
def test_a_doubled_lane_is_refused_and_the_first_stays(listener: TcpListener, handed_out: bool) -> None:
    near = TcpNetwork(TOKEN).dial_channel(listener.address, hello(), PATIENCE)
    far = listener.accept_channel(1, "bulk:world", PATIENCE) if handed_out else None
    with pytest.raises(Refused, match="this rank and lane already") as caught:
        TcpNetwork(TOKEN).dial_channel(listener.address, hello(), PATIENCE)
    assert caught.value.reason == security.REFUSED_TAKEN
    far = far or listener.accept_channel(1, "bulk:world", PATIENCE)
    assert exchange(near, far)
    near.abort(ConnectionLost("the test is over"))
    far.abort(ConnectionLost("the test is over"))


def test_of_two_that_dial_the_same_lane_at_once_one_is_refused(listener: TcpListener) -> None:
    accepting = threading.Barrier(2)
    outcomes: list[object] = []
    original = security.pack_accept

    def pack_together(mac: bytes, wants_memory: bool = False) -> bytes:
        with contextlib.suppress(threading.BrokenBarrierError):
            accepting.wait(0.3)  # for the other one, which should not come
        return original(mac, wants_memory)

    def dial() -> None:
        try:
            outcomes.append(TcpNetwork(TOKEN).dial_channel(listener.address, hello(), PATIENCE))
        except AuthFailed as error:
            outcomes.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(security, "pack_accept", pack_together)
        threads = [threading.Thread(target=dial, name=f"test-dial-{n}") for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    near = [outcome for outcome in outcomes if isinstance(outcome, TcpChannel)]
    assert len(near) == 1, outcomes
    far = listener.accept_channel(1, "bulk:world", PATIENCE)
    assert exchange(near[0], far)
    near[0].abort(ConnectionLost("the test is over"))
    far.abort(ConnectionLost("the test is over"))


def test_a_recorded_proof_is_worth_nothing_later(listener: TcpListener) -> None:
    nonce = security.new_nonce()
    said = security.pack_hello(hello(), nonce)
    with stranger(listener) as first:
        first.sendall(said)
        challenge = security.unpack_challenge(first.recv(40, socket.MSG_WAITALL), "")
        recorded = security.pack_proof(Transcript(hello(), nonce, challenge).proof(TOKEN, "dialler"))
        first.sendall(recorded)
        assert first.recv(40, socket.MSG_WAITALL)[6] == 4  # accepted: the recording is good
    listener.accept_channel(1, "bulk:world", PATIENCE).abort(ConnectionLost("the test is over"))

    with stranger(listener) as second:
        second.sendall(said)
        assert second.recv(40, socket.MSG_WAITALL)[8:] != challenge
        second.sendall(recorded)
        assert read_all(second) == security.pack_refused(security.REFUSED_TOKEN)


def test_a_listener_that_does_not_know_the_token_is_refused_by_the_dialler() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            sock, _ = server.accept()
            with sock:
                sock.settimeout(PATIENCE)
                sock.recv(48 + len("bulk:world") + len(RUN), socket.MSG_WAITALL)
                sock.sendall(security.pack_challenge(bytes(32)))
                sock.recv(40, socket.MSG_WAITALL)
                sock.sendall(security.pack_accept(bytes(32)))

        thread = threading.Thread(target=pretend, name="test-pretend")
        thread.start()
        with pytest.raises(AuthFailed, match="does not know the cluster token"):
            TcpNetwork(TOKEN).dial_channel(f"tcp://127.0.0.1:{server.getsockname()[1]}", hello(), PATIENCE)
        thread.join()


def test_a_listener_that_hangs_once_is_tried_again(impatient: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        said: list[bytes] = []

        def hang_once() -> None:
            first, _ = server.accept()
            second, _ = server.accept()
            with first, second:
                second.settimeout(PATIENCE)
                said.append(second.recv(4))

        thread = threading.Thread(target=hang_once, name="test-hang")
        thread.start()
        start = time.monotonic()
        with pytest.raises(ConnectFailed):
            TcpNetwork(TOKEN).dial_channel(f"tcp://127.0.0.1:{server.getsockname()[1]}", hello(), 3 * STRANGER_TIMEOUT)
        assert time.monotonic() - start < 3 * STRANGER_TIMEOUT + 2
        thread.join()
        assert said == [b"SMOL"]


def test_another_program_on_the_port_is_named_when_the_time_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def web_server() -> None:
            server.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    sock, _ = server.accept()
                    with sock:
                        sock.settimeout(PATIENCE)
                        sock.recv(48 + len("bulk:world") + len(RUN), socket.MSG_WAITALL)
                        sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=web_server, name="test-web-server")
        thread.start()
        with pytest.raises(ConnectFailed, match="is another program on that port"):
            TcpNetwork(TOKEN).dial_channel(f"tcp://127.0.0.1:{server.getsockname()[1]}", hello(), 0.3)
        stop.set()
        thread.join()


def test_nobody_there_is_said_with_address_and_time() -> None:
    with contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id=RUN)) as opened:
        address = opened.address
    with pytest.raises(ConnectFailed, match=rf"could not reach {address} within 0.2 s .*refused.*Is it started"):
        TcpNetwork(TOKEN).dial_channel(address, hello(), 0.2)


def test_a_channel_that_never_comes_is_named(listener: TcpListener) -> None:
    with pytest.raises(ConnectFailed, match="rank 3 did not open its p2p:world connection"):
        listener.accept_channel(3, "p2p:world", 0.05)
    with pytest.raises(ConnectFailed, match="nobody opened a control connection"):
        listener.accept_control(0.05)


# --- strangers

SAID = security.pack_hello(hello(), bytes(32))
NOISE = {
    "nothing": b"",
    "half a hello": SAID[:20],
    "a hello without its names": SAID[:48],
    "a hello without its last byte": SAID[:-1],
    "a hello and no proof": SAID,
    "half a proof": SAID + security.pack_proof(bytes(32))[:39],
    "one byte": b"S",
}
GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: something long enough\r\n\r\n",
    "zeros": bytes(100),
    "a reply instead of a hello": security.pack_challenge(bytes(32)) + bytes(8),
    "a lane of 65 bytes": SAID[:7] + b"\x41" + SAID[8:] + bytes(100),
    "a run id of 255 bytes": SAID[:8] + b"\xff" + SAID[9:] + bytes(300),
    "a lane that is not utf-8": SAID[:48] + b"\xff" * (len(SAID) - 48),
}


@pytest.mark.parametrize("said", NOISE.values(), ids=NOISE.keys())
def test_a_stranger_that_does_not_go_on_is_closed_in_time(impatient: None, listener: TcpListener, said: bytes) -> None:
    with stranger(listener) as sock:
        start = time.monotonic()
        sock.sendall(said)
        assert serves(listener)  # meanwhile
        read_all(sock)
        assert STRANGER_TIMEOUT * 0.8 < time.monotonic() - start < STRANGER_TIMEOUT + 2
    assert serves(listener, rank=8)


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_closed_at_once_with_one_line_in_the_log(
    listener: TcpListener, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "smolcluster"), stranger(listener) as sock:
        sock.sendall(said)
        start = time.monotonic()
        assert read_all(sock) == b""
        assert time.monotonic() - start < 3  # not the 5 s of a silent one
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "connection refused peer=tcp://127.0.0.1:" in caplog.text
    assert serves(listener)


def test_a_stranger_that_drips_bytes_does_not_get_more_time(impatient: None, listener: TcpListener) -> None:
    with stranger(listener) as sock:
        start = time.monotonic()
        for byte in SAID:
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(STRANGER_TIMEOUT / 10)  # each byte well within the time of one
        read_all(sock)
        assert time.monotonic() - start < STRANGER_TIMEOUT + 2


def test_a_handshake_that_comes_byte_by_byte_is_accepted(listener: TcpListener) -> None:
    nonce = bytes(32)
    with stranger(listener) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in security.pack_hello(hello(), nonce):
            sock.sendall(bytes([byte]))
        challenge = security.unpack_challenge(sock.recv(40, socket.MSG_WAITALL), "")
        transcript = Transcript(hello(), nonce, challenge)
        for byte in security.pack_proof(transcript.proof(TOKEN, "dialler")):
            sock.sendall(bytes([byte]))
        security.check_accept(sock.recv(40, socket.MSG_WAITALL), "", transcript.proof(TOKEN, "listener"))
        listener.accept_channel(1, "bulk:world", PATIENCE).abort(ConnectionLost("the test is over"))


def test_at_most_64_strangers_are_kept_and_the_oldest_makes_room(
    listener: TcpListener, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(stranger(listener)) for _ in range(64)]
        stack.enter_context(stranger(listener))
        assert read_all(kept[0]) == b""
        for sock in kept[1:]:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):  # still open
                sock.recv(1)
        assert serves(listener)  # meanwhile
        assert "before too many others came" in caplog.text
    assert serves(listener, rank=8)


def test_authenticated_connections_do_not_count_as_strangers(listener: TcpListener) -> None:
    near = [
        TcpNetwork(TOKEN).dial_channel(listener.address, hello(rank), PATIENCE)
        for rank in range(MAX_UNAUTHENTICATED + 2)
    ]
    for channel in near:
        channel.abort(ConnectionLost("the test is over"))


def test_strangers_are_cut_off_when_the_listener_closes() -> None:
    opened = listen("127.0.0.1", 0, token=TOKEN, run_id=RUN)
    with stranger(opened) as sock:
        sock.sendall(SAID)
        assert sock.recv(40, socket.MSG_WAITALL)[6] == 2  # it is being served
        start = time.monotonic()
        opened.close()
        read_all(sock)
        assert time.monotonic() - start < 3
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("handshake")]


def test_closing_a_listener_closes_what_nobody_took() -> None:
    opened = listen("127.0.0.1", 0, token=TOKEN, run_id=RUN)
    channel = TcpNetwork(TOKEN).dial_channel(opened.address, hello(), PATIENCE)
    link = TcpNetwork(TOKEN).dial_control(opened.address, hello(1, CONTROL), PATIENCE)
    opened.close()
    opened.close()  # harmless
    with pytest.raises(ConnectionLost):
        link.receive(PATIENCE)
    link.close()
    assert isinstance(channel, TcpChannel)
    select.select([channel], [], [], PATIENCE)
    with pytest.raises(ConnectionLost):
        channel.try_recv_into(memoryview(bytearray(1)))
    channel.abort(ConnectionLost("the test is over"))


# --- secrets


def test_the_token_never_stands_in_the_log_or_in_an_error(
    impatient: None, listener: TcpListener, caplog: pytest.LogCaptureFixture
) -> None:
    texts: list[str] = []
    with caplog.at_level(logging.DEBUG):
        assert serves(listener)
        for network, who in [
            (TcpNetwork(WRONG_TOKEN), hello(2)),
            (TcpNetwork(TOKEN), hello(2, run_id="run-6")),
            (TcpNetwork(TOKEN), hello(9)),
        ]:
            with pytest.raises(TransportError) as caught:
                network.dial_channel(listener.address, who, 0.1)
            texts.append(str(caught.value))
        with stranger(listener) as sock:
            sock.sendall(GARBAGE["http"])
            read_all(sock)
    texts += [record.getMessage() for record in caplog.records]
    assert len(texts) > 4
    for secret in (TOKEN, WRONG_TOKEN):
        assert not [text for text in texts if secret.decode() in text or secret.hex() in text]


def test_the_token_never_crosses_the_wire(listener: TcpListener, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = bytearray()
    write = tcp._Deadline.write

    def recorded(self: tcp._Deadline, data: bytes) -> None:
        wire.extend(data)
        write(self, data)

    monkeypatch.setattr(tcp._Deadline, "write", recorded)
    assert serves(listener)
    assert b"bulk:world" in wire
    assert TOKEN not in wire


# --- addresses and options


@pytest.mark.parametrize(
    "address", ["127.0.0.1:80", "tcp://127.0.0.1", "tcp://:80", "tcp://host:port", "udp://h:1", "tcp://h:65536", ""]
)
def test_an_address_of_another_form_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match="is not an address such as tcp://"):
        parse_address(address)


def test_addresses_are_written_as_they_are_read() -> None:
    for host, port in [("127.0.0.1", 65432), ("::1", 1), ("mini3.local", 80)]:
        assert parse_address(tcp.format_address(host, port)) == (host, port)


def test_a_port_that_is_taken_is_said(listener: TcpListener) -> None:
    host, port = parse_address(listener.address)
    with pytest.raises(ConfigError, match=rf"cannot listen on {listener.address} .*free port"):
        listen(host, port, token=TOKEN, run_id=RUN)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_works_too() -> None:
    try:
        opened = listen("::1", 0, token=TOKEN, run_id=RUN)
    except ConfigError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    with contextlib.closing(opened):
        assert serves(opened)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_a_bulk_connection_outlives_a_peer_that_reads_nothing_for_longer_than_the_patience() -> None:
    # A rank that computes does not read what the others already send. Whether it lives, its heartbeats say;
    # TCP_USER_TIMEOUT would end the connection as soon as its window was closed for so long.
    options = TcpOptions(patience=0.2)
    with contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id=RUN, options=options)) as opened:
        near = TcpNetwork(TOKEN, options).dial_channel(opened.address, hello(), PATIENCE)
        far = opened.accept_channel(1, "bulk:world", PATIENCE)
        block, deadline = memoryview(bytes(1 << 20)), time.monotonic() + 1.5
        sent = {near: 0, far: 0}
        while time.monotonic() < deadline:
            for channel in sent:
                sent[channel] += channel.try_send([block])
            threading.Event().wait(0.02)
        assert min(sent.values()) > 0
        near.abort(ConnectionLost("the test is over"))
        far.abort(ConnectionLost("the test is over"))


def test_a_listener_of_another_run_is_believed_after_a_while(
    listener: TcpListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "OTHER_RUN_TIMEOUT", 0.2)
    began = time.monotonic()
    with pytest.raises(AuthFailed, match="another run"):
        TcpNetwork(TOKEN).dial_channel(listener.address, hello(run_id="run-6"), 60.0)
    assert time.monotonic() - began < 10.0


def test_dialling_ends_when_the_world_has_ended(listener: TcpListener) -> None:
    address = listener.address
    listener.close()
    ended = PeerLost("rank 3 is lost", 3)
    with pytest.raises(PeerLost):
        TcpNetwork(TOKEN).dial_channel(address, hello(), 60.0, lambda: ended)
