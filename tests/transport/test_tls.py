"""TLS: what crosses the wire is unreadable, a man in the middle is refused, and the engine notices no difference."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from smolcluster.collectives.base import Communicator, ReduceOp
from smolcluster.collectives.groups import inproc_group, tcp_group
from smolcluster.errors import AuthFailed, ConfigError, ConnectFailed, ConnectionLost, TransportError
from smolcluster.kinds import JsonObject
from smolcluster.transport import security, tcp
from smolcluster.transport.base import Channel, Hello
from smolcluster.transport.tcp import CONTROL, TcpListener, TcpNetwork, TcpOptions, listen, parse_address
from smolcluster.transport.tls import Identity, TlsSocket

pytest.importorskip("cryptography", reason="needs the extra tls")

TOKEN = b"correct horse battery staple"
RUN = "run-seven"
LANE = "bulk:world"
PATIENCE = 10.0  # for what ought to happen at once
STRANGER_TIMEOUT = 0.4  # instead of 5 s
TLS = TcpOptions(tls=True)
OVER = ConnectionLost("the test is over")
RECORD_HEAD = struct.Struct("!BHH")


def hello(rank: int = 1, lane: str = LANE) -> Hello:
    return Hello(rank, lane, RUN, 0)


@contextlib.contextmanager
def listening(options: TcpOptions = TLS, token: bytes = TOKEN) -> Iterator[TcpListener]:
    with contextlib.closing(listen("127.0.0.1", 0, token=token, run_id=RUN, options=options)) as listener:
        yield listener


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers have STRANGER_TIMEOUT seconds instead of 5."""
    assert tcp.HANDSHAKE_TIMEOUT == 5.0
    monkeypatch.setattr(tcp, "HANDSHAKE_TIMEOUT", STRANGER_TIMEOUT)


@contextlib.contextmanager
def channels(
    options: TcpOptions = TLS, through: Callable[[str], contextlib.AbstractContextManager[str]] | None = None
) -> Iterator[tuple[Channel, Channel]]:
    """Two ends of an encrypted connection; `through` may lead it over a proxy."""
    with listening(options) as listener, contextlib.ExitStack() as stack:
        address = listener.address if through is None else stack.enter_context(through(listener.address))
        near = TcpNetwork(TOKEN, options).dial_channel(address, hello(), PATIENCE)
        stack.callback(near.abort, OVER)
        far = listener.accept_channel(1, LANE, PATIENCE)
        stack.callback(far.abort, OVER)
        yield near, far


def send_all(channel: Channel, payload: bytes) -> None:
    rest, deadline = memoryview(payload), time.monotonic() + PATIENCE
    while rest:
        assert time.monotonic() < deadline
        select.select([], [channel], [], PATIENCE)
        rest = rest[channel.try_send([rest[:48], rest[48:]]) :]


def receive_all(channel: Channel, count: int) -> bytes:
    target, got, deadline = bytearray(count), 0, time.monotonic() + PATIENCE
    while got < count:
        assert time.monotonic() < deadline
        if channel.due() is None:
            select.select([channel], [], [], PATIENCE)
        got += channel.try_recv_into(memoryview(target)[got:])
    return bytes(target)


class Proxy:
    """Passes a connection on and remembers both directions; may change or cut what the dialler sends."""

    def __init__(self, upstream: str, change: Callable[[int, bytes], bytes | None] | None = None) -> None:
        """`change(position, piece)` returns what goes on to the listener instead; None cuts the connection."""
        self.words = {"dialler": bytearray(), "listener": bytearray()}
        self._change = change or (lambda _position, piece: piece)
        self._upstream = parse_address(upstream)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, name="test-proxy")]
        self._threads[0].start()

    def __enter__(self) -> str:
        return self.address

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._server.close()

    def _accept(self) -> None:
        try:
            near, _ = self._server.accept()
        except OSError:
            return
        far = socket.create_connection(self._upstream, timeout=PATIENCE)
        near.settimeout(PATIENCE)
        back = threading.Thread(target=self._pump, args=(far, near, "listener"), name="test-proxy-back")
        self._threads.append(back)
        back.start()
        self._pump(near, far, "dialler")
        back.join(PATIENCE)
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket, who: str) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                changed = self._change(len(self.words[who]), piece) if who == "dialler" else piece
                self.words[who] += piece
                if changed is None:
                    break
                sink.sendall(changed)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


# --- bytes


@pytest.mark.parametrize("buffer_bytes", [None, 1 << 16])
def test_bytes_arrive_unchanged_in_both_directions_at_once_whatever_the_buffers_take(buffer_bytes: int | None) -> None:
    sizes = (0, 1, 47, 48, 16384, 16385, 65536, 3_000_001)
    payload = os.urandom(sum(sizes))
    with channels(TcpOptions(buffer_bytes=buffer_bytes, tls=True)) as (near, far):
        began = {end: (end.sent_bytes, end.recv_bytes) for end in (near, far)}
        rest = {end: memoryview(payload) for end in (near, far)}
        heard: dict[Channel, bytearray] = {near: bytearray(), far: bytearray()}
        target, blocked, deadline = memoryview(bytearray(5000)), 0, time.monotonic() + PATIENCE
        while any(len(words) < len(payload) for words in heard.values()):
            assert time.monotonic() < deadline
            for end in (near, far):
                if rest[end]:
                    taken = end.try_send([rest[end][:10], rest[end][10:100_000]])
                    blocked += taken == 0
                    rest[end] = rest[end][taken:]
                heard[end] += target[: end.try_recv_into(target)]
        assert heard == {near: payload, far: payload}
        for end, (sent, received) in began.items():
            assert (end.sent_bytes - sent, end.recv_bytes - received) == (len(payload), len(payload))  # not the records
        assert blocked > 0 or buffer_bytes is None


def test_a_retry_may_offer_less_than_what_was_encrypted_already() -> None:
    payload = os.urandom(4_000_000)
    with channels(TcpOptions(buffer_bytes=1 << 16, tls=True)) as (near, far):
        sent = 0
        while count := near.try_send([memoryview(payload)[sent:]]):
            sent += count
        assert near.try_send([memoryview(payload)[sent : sent + 1]]) == 0
        heard, target = bytearray(), memoryview(bytearray(1 << 16))
        while not (count := near.try_send([memoryview(payload)[sent : sent + 1]])):
            heard += target[: far.try_recv_into(target)]
        assert count > 1
        sent += count
        send_all(near, payload[sent : sent + 1000])
        heard += receive_all(far, sent + 1000 - len(heard))
        assert bytes(heard) == payload[: sent + 1000]


def test_what_is_decrypted_and_not_yet_read_is_due_though_poll_sees_nothing() -> None:
    with channels() as (near, far):
        send_all(near, b"a" * 100)
        assert receive_all(far, 1) == b"a"
        assert select.select([far], [], [], 0) == ([], [], [])
        due = far.due()
        assert due is not None
        assert due <= time.monotonic()
        assert receive_all(far, 99) == b"a" * 99
        assert far.try_recv_into(memoryview(bytearray(1))) == 0
        assert far.due() is None


def everything(comm: Communicator) -> list[torch.Tensor]:
    """The result of each collective, small and large, and of messages."""
    rank, size = comm.rank, comm.world_size
    made: list[torch.Tensor] = []
    for count in (1, 1000, 700_000):  # one round, and a ring in pieces
        total = torch.arange(count, dtype=torch.float32) * 0.37 + rank
        comm.all_reduce(total, ReduceOp.AVG).wait(PATIENCE)
        part = torch.empty(count)
        comm.reduce_scatter(part, torch.arange(count * size, dtype=torch.float32) * (rank + 1)).wait(PATIENCE)
        parts = torch.empty(count * size)
        comm.all_gather(parts, torch.full((count,), float(rank))).wait(PATIENCE)
        copy = torch.full((count,), float(rank))
        comm.broadcast(copy, src=size - 1).wait(PATIENCE)
        swapped = torch.empty(count * size)
        comm.all_to_all(swapped, torch.arange(count * size, dtype=torch.float32) + rank).wait(PATIENCE)
        made += [total, part, parts, copy, swapped]
    made += comm.all_to_all_ragged([torch.full((peer + rank,), rank) for peer in range(size)]).result()
    sent = comm.send(torch.arange(50_000) + rank, (rank + 1) % size, tag=3)
    made += comm.recv((rank - 1) % size, tag=3).result()
    sent.wait(PATIENCE)
    assert comm.exchange({"rank": rank}, PATIENCE) == [{"rank": peer} for peer in range(size)]
    comm.barrier(PATIENCE)
    pair = comm.split(range(size), "again")
    assert pair is not None
    again = torch.ones(10) * rank
    pair.all_reduce(again).wait(PATIENCE)
    pair.close()
    return [*made, again]


@pytest.mark.slow
def test_a_local_run_trains_over_tls(tmp_path: Path) -> None:
    arguments = ["--preset", "classicdp_digits", "--local", "2", "--max-steps", "4", "--out", str(tmp_path / "run")]
    overrides = ["--override", "cluster.tls=true"]
    program = [sys.executable, "-c", "from smolcluster.cli import main; main()", "train", "--quiet"]
    done = subprocess.run([*program, *arguments, *overrides], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    hashes = json.loads((tmp_path / "run" / "summary.json").read_text())["rank_weights_sha256"]
    assert len(hashes) == 2
    assert len(set(hashes)) == 1


def run_all(comms: list[Communicator]) -> list[list[torch.Tensor]]:
    results: dict[int, list[torch.Tensor]] = {}

    def run(comm: Communicator) -> None:
        with contextlib.closing(comm):
            results[comm.rank] = everything(comm)

    threads = [threading.Thread(target=run, args=(comm,), name=f"test-rank-{comm.rank}") for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE)
    return [results[rank] for rank in range(len(comms))]


def test_every_collective_gives_the_same_bits_as_without_tls() -> None:
    encrypted = run_all([*tcp_group(3, tls=True)])
    for ours, plain in zip(encrypted, run_all([*inproc_group(3)]), strict=True):
        assert len(ours) == len(plain)
        assert all(torch.equal(left, right) for left, right in zip(ours, plain, strict=True))


def test_control_messages_cross_in_both_directions_at_once_from_several_threads() -> None:
    count = 300
    with listening() as listener, contextlib.ExitStack() as stack:
        links = [TcpNetwork(TOKEN, TLS).dial_control(listener.address, hello(1, CONTROL), PATIENCE)]
        links.append(listener.accept_control(PATIENCE)[1])
        heard: list[list[JsonObject]] = [[], []]
        complete = [threading.Event(), threading.Event()]

        def hear(end: int) -> Callable[[JsonObject], None]:
            def on_message(message: JsonObject) -> None:
                heard[end].append(message)
                if len(heard[end]) == 2 * count:
                    complete[end].set()

            return on_message

        for end, link in enumerate(links):
            stack.callback(link.close)
            link.on_message(hear(end))

        def send(end: int, who: int) -> None:
            for number in range(count):
                links[end].send({"kind": "beat", "who": who, "number": number, "text": "x" * (number * 97 % 20_000)})

        threads = [threading.Thread(target=send, args=(end, who), name="test-send") for end in (0, 1) for who in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert all(event.wait(PATIENCE) for event in complete)
        for end in (0, 1):
            for who in (0, 1):
                numbers = [message["number"] for message in heard[end] if message["who"] == who]
                assert numbers == [*range(count)]


@pytest.mark.skipif(not tcp._HAS_ARRIVAL_TIME, reason="only 64-bit Linux says when bytes arrived")
def test_a_control_message_arrived_when_the_kernel_had_it() -> None:
    late, arrived = 0.2, threading.Event()
    with listening() as listener, contextlib.ExitStack() as stack:
        near = TcpNetwork(TOKEN, TLS).dial_control(listener.address, hello(1, CONTROL), PATIENCE)
        stack.callback(near.close)
        far = listener.accept_control(PATIENCE)[1]
        stack.callback(far.close)
        near.send({"kind": "beat"})  # the kernel begins to stamp packets with the first socket that asks, a little late
        assert far.receive(PATIENCE) is not None
        threading.Event().wait(0.1)
        sent = time.perf_counter()
        near.send({"kind": "beat"})
        threading.Event().wait(late)
        times: list[float] = []
        far.on_message(lambda message: (times.append(far.arrived_at()), arrived.set())[1])
        assert arrived.wait(PATIENCE)
        assert 0 <= times[0] - sent < late / 2


# --- what somebody on the way can do


def test_nothing_readable_crosses_the_wire() -> None:
    payload = b"the weights of a model that is nobody's business " * 2000
    proxies: list[Proxy] = []

    def through(address: str) -> Proxy:
        proxies.append(Proxy(address))
        return proxies[-1]

    with channels(through=through) as (near, far):
        send_all(near, payload)
        assert receive_all(far, len(payload)) == payload
        send_all(far, payload)
        assert receive_all(near, len(payload)) == payload
    with listening() as listener, through(listener.address) as address:
        link = TcpNetwork(TOKEN, TLS).dial_control(address, hello(1, CONTROL), PATIENCE)
        far_link = listener.accept_control(PATIENCE)[1]
        link.send({"kind": "metrics", "loss": "secret-loss"})
        assert far_link.receive(PATIENCE) == {"kind": "metrics", "loss": "secret-loss"}
        link.close()
        far_link.close()
    for proxy in proxies:
        for words in proxy.words.values():
            assert len(words) > 500
            clear = (payload[:49], b"SMOL", LANE.encode(), CONTROL.encode(), RUN.encode(), TOKEN, b"secret-loss")
            assert not [text for text in clear if text in words]
            at = 0
            while at + RECORD_HEAD.size <= len(words):  # nothing but whole TLS records, the last perhaps cut off
                kind, version, length = RECORD_HEAD.unpack_from(words, at)
                assert kind in (20, 21, 22, 23)
                assert version in (0x0301, 0x0303)
                assert length <= 16384 + 256
                at += RECORD_HEAD.size + length
    assert (
        len(proxies[0].words["dialler"]) < 1.02 * len(payload) + 3000
    )  # the price: 22 bytes a record, and a handshake


def shake_hands(sock: TlsSocket) -> None:
    while not sock.shake_hands(4096):
        pass


def test_a_man_in_the_middle_with_a_certificate_of_his_own_is_refused_on_both_sides(
    caplog: pytest.LogCaptureFixture,
) -> None:
    relayed = bytearray()

    def relay(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(4096):
                relayed.extend(piece)
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def sit_in_the_middle() -> None:
        near, _ = server.accept()
        near.settimeout(PATIENCE)
        with TlsSocket(near, Identity()) as victim:
            shake_hands(victim)
            far = socket.create_connection(parse_address(listener.address), timeout=PATIENCE)
            with TlsSocket(far, None) as upstream:
                shake_hands(upstream)
                back = threading.Thread(target=relay, args=(upstream, victim), name="test-relay")
                back.start()
                relay(victim, upstream)
                back.join(PATIENCE)

    with listening() as listener, socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=sit_in_the_middle, name="test-middle")
        thread.start()
        began = time.monotonic()
        with pytest.raises(AuthFailed, match=r"tokens differ .*; or somebody on the way decrypts"):
            TcpNetwork(TOKEN, TLS).dial_channel(f"tcp://127.0.0.1:{server.getsockname()[1]}", hello(), PATIENCE)
        assert time.monotonic() - began < PATIENCE / 2
        thread.join(PATIENCE)
        assert b"SMOL" in relayed  # he did read the handshake: it is the proof that fails
        with pytest.raises(ConnectFailed):
            listener.accept_channel(1, LANE, 0.05)
        assert caplog.text.count("connection refused peer=") == 1


def test_a_man_in_the_middle_who_answers_himself_is_refused_by_the_dialler() -> None:
    def pretend() -> None:
        near, _ = server.accept()
        near.settimeout(PATIENCE)
        with TlsSocket(near, Identity()) as victim:
            shake_hands(victim)
            victim.recv(4096)
            victim.sendall(security.pack_challenge(bytes(32)))
            victim.recv(4096)
            victim.sendall(security.pack_accept(bytes(32)))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=pretend, name="test-pretend")
        thread.start()
        with pytest.raises(AuthFailed, match="does not know the cluster token"):
            TcpNetwork(TOKEN, TLS).dial_channel(f"tcp://127.0.0.1:{server.getsockname()[1]}", hello(), PATIENCE)
        thread.join(PATIENCE)


def test_a_changed_byte_ends_the_connection_and_is_never_delivered() -> None:
    payload = bytes(200_000)
    is_on = threading.Event()

    def flip(_position: int, piece: bytes) -> bytes:
        return piece[:-1] + bytes([piece[-1] ^ 1]) if is_on.is_set() else piece

    with channels(through=lambda address: Proxy(address, flip)) as (near, far):
        is_on.set()
        send_all(near, payload)
        target, deadline = bytearray(b"\xff" * len(payload)), time.monotonic() + PATIENCE
        got = 0

        def receive() -> None:
            nonlocal got
            while time.monotonic() < deadline:
                select.select([far], [], [], PATIENCE)
                got += far.try_recv_into(memoryview(target)[got:])

        with pytest.raises(ConnectionLost, match=r"broke the rules of TLS \(DECRYPTION_FAILED_OR_BAD_RECORD_MAC\)"):
            receive()
        assert bytes(target[:got]) == bytes(got)


@pytest.mark.parametrize("kept", [3, 100, 16384 + 22 + 100], ids=["in its head", "in the first", "in the second"])
def test_a_peer_that_dies_in_the_middle_of_a_record_is_lost(kept: int) -> None:
    begun: list[int] = []
    is_on = threading.Event()

    def cut(position: int, piece: bytes) -> bytes | None:
        if not is_on.is_set():
            return piece
        begun.append(position)
        left = kept - (position - begun[0])
        return piece[:left] if left > 0 else None

    with channels(through=lambda address: Proxy(address, cut)) as (near, far):
        is_on.set()
        with contextlib.suppress(ConnectionLost):
            send_all(near, bytes(300_000))
            send_all(near, bytes(300_000))
        target, deadline = memoryview(bytearray(600_000)), time.monotonic() + PATIENCE

        def receive() -> None:
            while time.monotonic() < deadline:
                select.select([far], [], [], PATIENCE)
                far.try_recv_into(target)

        with pytest.raises(ConnectionLost, match="closed the connection"):
            receive()


def test_after_an_abort_nothing_is_sent_in_the_clear() -> None:
    proxies: list[Proxy] = []

    def through(address: str) -> Proxy:
        proxies.append(Proxy(address))
        return proxies[-1]

    with channels(through=through) as (near, _):
        near.abort(OVER)
        with pytest.raises(ConnectionLost, match="the test is over"):
            near.try_send([memoryview(b"in the clear")])
        with pytest.raises(ConnectionLost, match="the test is over"):
            near.try_recv_into(memoryview(bytearray(5)))
    assert b"in the clear" not in proxies[0].words["dialler"]


# --- one side without


@pytest.mark.parametrize("lane", [LANE, CONTROL])
@pytest.mark.parametrize(
    ("dialling", "answering", "said", "logged"),
    [
        (TLS, TcpOptions(), "it does not speak TLS and was spoken to in TLS", "it does not speak TLS"),
        (TcpOptions(), TLS, "it speaks TLS only and was spoken to without", "it speaks TLS only"),
    ],
    ids=["the dialler alone", "the listener alone"],
)
def test_tls_on_one_side_only_is_said_at_once_by_both(
    dialling: TcpOptions,
    answering: TcpOptions,
    said: str,
    logged: str,
    lane: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    network, began = TcpNetwork(TOKEN, dialling), time.monotonic()
    dial = network.dial_control if lane == CONTROL else network.dial_channel
    with listening(answering) as listener:
        with pytest.raises(AuthFailed, match=rf"{said} \(set cluster.tls alike on every machine\)"):
            dial(listener.address, hello(lane=lane), 60.0)
        assert time.monotonic() - began < 3
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "connection refused" in line and logged in line]) == len(lines) == 1


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", b"220 mail.example ESMTP\r\n"],
    ids=["http", "smtp"],
)
def test_another_program_on_the_port_is_named(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def other_program() -> None:
            server.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    sock, _ = server.accept()
                    with sock:
                        sock.settimeout(PATIENCE)
                        sock.recv(4096)
                        sock.sendall(answer)

        thread = threading.Thread(target=other_program, name="test-other-program")
        thread.start()
        with pytest.raises(ConnectFailed, match=r"does not speak TLS \(is another program on that port"):
            TcpNetwork(TOKEN, TLS).dial_channel(f"tcp://127.0.0.1:{server.getsockname()[1]}", hello(), 0.3)
        stop.set()
        thread.join()


def test_a_wrong_token_is_refused_under_tls_too() -> None:
    with listening() as listener, pytest.raises(AuthFailed, match="the cluster tokens differ"):
        TcpNetwork(b"battery staple horse correct", TLS).dial_channel(listener.address, hello(), PATIENCE)


# --- strangers


def serves(listener: TcpListener, rank: int = 9) -> bool:
    """A proper rank gets a channel, and bytes pass."""
    near = TcpNetwork(TOKEN, TLS).dial_channel(listener.address, hello(rank), PATIENCE)
    far = listener.accept_channel(rank, LANE, PATIENCE)
    try:
        send_all(near, b"hello")
        return receive_all(far, 5) == b"hello"
    finally:
        near.abort(OVER)
        far.abort(OVER)


def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("part", [0, 1, 60, None], ids=["nothing", "one byte", "half a hello", "a hello and no more"])
def test_a_tls_handshake_that_does_not_go_on_is_cut_in_time_and_delays_nobody(
    impatient: None, part: int | None
) -> None:
    with listening() as listener, socket.create_connection(parse_address(listener.address), timeout=PATIENCE) as sock:
        began = time.monotonic()
        sock.sendall(client_hello()[:part])
        assert serves(listener)  # meanwhile
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
        assert STRANGER_TIMEOUT * 0.8 < time.monotonic() - began < STRANGER_TIMEOUT + 2
        assert serves(listener, rank=8)


def test_tls_and_our_handshake_share_one_time_limit(impatient: None) -> None:
    with listening() as listener:
        sock = socket.create_connection(parse_address(listener.address), timeout=PATIENCE)
        began = time.monotonic()
        with TlsSocket(sock, None) as stranger:
            threading.Event().wait(STRANGER_TIMEOUT / 2)
            shake_hands(stranger)
            stranger.sendall(security.pack_hello(hello(), bytes(32)))
            assert stranger.recv(40)[6] == 2  # the challenge; no proof follows
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
        assert time.monotonic() - began < 1.4 * STRANGER_TIMEOUT + 1


@pytest.mark.parametrize(
    "said",
    [bytes(100), b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(70_000), b"\x16\x03\x01\x00\x05hello"],
    ids=["zeros", "http", "a record that is too long", "a record that is no handshake"],
)
def test_garbage_is_closed_at_once_with_one_line_in_the_log(said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with listening() as listener, socket.create_connection(parse_address(listener.address), timeout=PATIENCE) as sock:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            sock.sendall(said)
            while sock.recv(4096):
                pass
        assert time.monotonic() - began < 3
        assert [record.getMessage()[:24] for record in caplog.records] == ["connection refused peer="]
        assert serves(listener)


def test_an_older_tls_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        listening() as listener,
        socket.create_connection(parse_address(listener.address), timeout=PATIENCE) as sock,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol version"),
    ):
        context.wrap_socket(sock)


# --- secrets


def keys_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[Path]]]:
    """From now on: (text, mode of its folder, what lies in `folder` meanwhile) of each file that OpenSSL loads."""
    load, seen = ssl.SSLContext.load_cert_chain, []

    def looked_at(self: ssl.SSLContext, certfile: str, **arguments: object) -> None:
        mode = stat.S_IMODE(Path(certfile).parent.stat().st_mode)
        seen.append((Path(certfile).read_text(), mode, [*folder.iterdir()]))
        load(self, certfile, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", looked_at)
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no files without a name")
def test_the_key_never_lies_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = keys_loaded(tmp_path, monkeypatch)
    with listening():
        pass
    ((text, _, files),) = seen
    assert "BEGIN ENCRYPTED PRIVATE KEY" in text
    assert files == []  # a kill -9 at this moment would leave them


def test_where_the_key_must_lie_on_disk_it_does_for_a_moment_only_encrypted_and_for_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = keys_loaded(tmp_path, monkeypatch)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sys, "platform", "darwin" if os.name == "posix" else "win32")
        Identity()
    assert [*tmp_path.iterdir()] == []
    ((text, mode, _),) = seen
    assert "BEGIN ENCRYPTED PRIVATE KEY" in text
    assert "BEGIN PRIVATE KEY" not in text
    if os.name == "posix":
        assert mode == 0o700


def test_each_listener_has_an_identity_of_its_own() -> None:
    assert Identity().fingerprint != Identity().fingerprint


def test_nothing_secret_stands_in_the_log_or_in_an_error(impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    texts: list[str] = []
    with caplog.at_level(logging.DEBUG), listening() as listener:
        assert serves(listener)
        for token, options in ((b"battery staple horse correct", TLS), (TOKEN, TcpOptions())):
            with pytest.raises(TransportError) as caught:
                TcpNetwork(token, options).dial_channel(listener.address, hello(), 0.1)
            texts.append(str(caught.value))
        with socket.create_connection(parse_address(listener.address), timeout=PATIENCE) as sock:
            sock.sendall(client_hello()[:60])
    texts += [record.getMessage() for record in caplog.records]
    assert len(texts) > 4
    assert not [text for text in texts if TOKEN.decode() in text or TOKEN.hex() in text or "PRIVATE" in text]


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r'pip install "smolcluster\[tls\]"'):
        listen("127.0.0.1", 0, token=TOKEN, run_id=RUN, options=TLS)
