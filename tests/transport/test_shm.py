"""The ring in shared memory: what goes in comes out, in order, whoever is faster and whoever dies."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from smolcluster.errors import ConnectionLost, FrameError
from smolcluster.transport import shm
from smolcluster.transport.base import Channel, Hello
from smolcluster.transport.shm import Segment, SharedMemoryChannel
from smolcluster.transport.tcp import TcpChannel, TcpNetwork, TcpOptions, listen

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ranks of one host speak TCP on Windows")

RING = 64 << 10
KEY = bytes(32)  # the session's
DEADLINE = 10.0


class Blocking:
    """A socket as the handshake sees it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise ConnectionLost("closed during the negotiation")
            data += piece
        return data

    def write(self, data: bytes) -> None:
        self.sock.sendall(data)


def negotiate(near: socket.socket, far: socket.socket, ring_bytes: int = RING) -> tuple[Segment | None, Segment | None]:
    """What the dialler and the listener have at the end."""
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(shm.answer, Blocking(far), KEY)
        return shm.offer(Blocking(near), ring_bytes, KEY), answering.result(DEADLINE)


@contextlib.contextmanager
def channels(ring_bytes: int = RING) -> Iterator[tuple[SharedMemoryChannel, SharedMemoryChannel]]:
    """The dialler's and the listener's end."""
    near, far = socket.socketpair()
    mine, theirs = negotiate(near, far, ring_bytes)
    assert mine is not None
    assert theirs is not None
    ends = (
        SharedMemoryChannel(TcpChannel(near, "the listener"), mine, is_dialler=True),
        SharedMemoryChannel(TcpChannel(far, "the dialler"), theirs, is_dialler=False),
    )
    try:
        yield ends
    finally:
        for end in ends:
            end.abort(ConnectionLost("the test is over"))


@pytest.fixture
def pair() -> Iterator[tuple[SharedMemoryChannel, SharedMemoryChannel]]:
    with channels() as ends:
        yield ends


def receive(channel: SharedMemoryChannel, count: int) -> bytes:
    """Exactly one part of `count` bytes that is there already."""
    target = memoryview(bytearray(count))
    assert channel.try_recv_into(target) == count
    return bytes(target)


def readable(channel: SharedMemoryChannel) -> bool:
    return bool(select.select([channel.fileno()], [], [], 0)[0])


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            return False
        select.select([], [], [], 0.01)
    return True


def segments(pid: int | None = None) -> int:
    """How many segments the process has mapped (Linux); of this one, those that something still refers to."""
    if pid is None:
        gc.collect()
    maps = Path(f"/proc/{pid or os.getpid()}/maps").read_text(encoding="utf-8")
    return sum("memfd:smolcluster" in line for line in maps.splitlines())


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# ---- the stream


@pytest.mark.parametrize("from_dialler", [True, False])
def test_bytes_arrive_in_order_and_are_counted(
    pair: tuple[SharedMemoryChannel, SharedMemoryChannel], from_dialler: bool
) -> None:
    sender, receiver = pair if from_dialler else pair[::-1]
    head, payload = os.urandom(48), os.urandom(30_001)
    assert sender.try_send([memoryview(head), memoryview(payload)]) == len(head) + len(payload)
    assert receive(receiver, len(head)) == head
    assert receive(receiver, len(payload)) == payload
    assert sender.sent_bytes == receiver.recv_bytes == len(head) + len(payload)
    assert receiver.try_recv_into(memoryview(bytearray(8))) == 0


def test_a_full_ring_takes_no_more_until_the_receiver_gives_back(
    pair: tuple[SharedMemoryChannel, SharedMemoryChannel],
) -> None:
    sender, receiver = pair
    payload = memoryview(os.urandom(RING + 4096))
    assert sender.try_send([payload]) == RING
    assert sender.try_send([payload[RING:]]) == 0
    first = receive(receiver, RING)
    assert sender.try_send([payload[RING:]]) == 4096
    assert first + receive(receiver, 4096) == bytes(payload)


def test_a_payload_larger_than_the_ring_passes_in_pieces(pair: tuple[SharedMemoryChannel, SharedMemoryChannel]) -> None:
    sender, receiver = pair
    payload = memoryview(os.urandom(5 * RING + 13))
    target = memoryview(bytearray(len(payload)))
    sent = got = 0
    while got < len(payload):
        sent += sender.try_send([payload[sent:]]) if sent < len(payload) else 0
        got += receiver.try_recv_into(target[got:])
    assert target == payload


def test_parts_of_any_length_wrap_around_whoever_is_faster(
    pair: tuple[SharedMemoryChannel, SharedMemoryChannel],
) -> None:
    sender, receiver = pair
    choose = random.Random(7)
    parts = [choose.randbytes(choose.choice((0, 1, 7, 8, 48, 4095, 20_000, RING - 8))) for _ in range(300)]
    waiting = [memoryview(part) for part in parts if part]
    arrived: list[bytes] = []
    partial, got = memoryview(bytearray(0)), 0
    while len(arrived) < len(parts):
        if choose.random() < 0.5:
            taken = sender.try_send(waiting[:10])
            while taken:
                here = min(taken, len(waiting[0]))
                waiting[0] = waiting[0][here:]
                taken -= here
                if not waiting[0]:
                    waiting.pop(0)
        else:
            for _ in range(choose.randrange(20)):
                if len(arrived) == len(parts):
                    break
                if got == 0:
                    partial = memoryview(bytearray(len(parts[len(arrived)])))
                got += receiver.try_recv_into(partial[got:]) if got < len(partial) else 0
                if got < len(partial):
                    break
                arrived.append(bytes(partial))
                got = 0
    assert arrived == parts


@pytest.mark.parametrize("odd", [1, 3, 7])
def test_every_part_begins_where_numbers_of_any_dtype_can_be_read(
    pair: tuple[SharedMemoryChannel, SharedMemoryChannel], odd: int
) -> None:
    sender, receiver = pair
    numbers = np.arange(1000, dtype=np.float64)
    sender.try_send([memoryview(bytes(odd)), memoryview(numbers).cast("B")])
    receive(receiver, odd)
    view = receiver.try_recv_view(numbers.nbytes)
    assert view is not None
    array = np.frombuffer(view, np.float64)
    assert array.ctypes.data % 8 == 0
    assert (array == numbers).all()


def test_a_view_stays_as_it_is_until_it_is_given_back(pair: tuple[SharedMemoryChannel, SharedMemoryChannel]) -> None:
    sender, receiver = pair
    sender.try_send([memoryview(b"a" * RING)])
    view = receiver.try_recv_view(RING)
    assert view is not None
    assert sender.try_send([memoryview(b"b" * RING)]) == 0
    assert view == b"a" * RING
    receiver.give_back(RING)
    assert sender.try_send([memoryview(b"b" * RING)]) == RING
    assert view == b"b" * RING  # it is the memory itself, no copy


def test_counters_that_cannot_be_true_end_the_connection(
    pair: tuple[SharedMemoryChannel, SharedMemoryChannel],
) -> None:
    sender, receiver = pair
    _, words = sender._outgoing._shared()
    words[shm._WRITTEN] = RING + 8
    with pytest.raises(FrameError, match="out of step"):
        receiver.due()
    sender.try_send([memoryview(b"12345678")])
    words[shm._READ] = 16
    with pytest.raises(FrameError, match="out of step"):
        sender.prepare_sleep(receiving=False, sending=True)


# ---- sleeping and waking


def test_whoever_sleeps_is_woken_once_by_what_comes(pair: tuple[SharedMemoryChannel, SharedMemoryChannel]) -> None:
    sender, receiver = pair
    assert receiver.prepare_sleep(receiving=True, sending=False)
    assert receiver.due() is None
    for _ in range(3):
        sender.try_send([memoryview(b"12345678")])
    assert readable(receiver)
    assert receiver.due() == 0.0
    receive(receiver, 8)
    receive(receiver, 8)
    receive(receiver, 8)
    assert receiver.try_recv_into(memoryview(bytearray(8))) == 0
    assert receiver.try_recv_into(memoryview(bytearray(8))) == 0  # now the connection is looked at
    assert not readable(receiver)
    assert (sender.sent_bytes, receiver.recv_bytes) == (24, 24)  # what only wakes is not counted


def test_nobody_is_woken_who_does_not_sleep(pair: tuple[SharedMemoryChannel, SharedMemoryChannel]) -> None:
    sender, receiver = pair
    sender.try_send([memoryview(b"12345678")])
    assert not readable(receiver)
    receive(receiver, 8)
    assert not readable(sender)


def test_nobody_sleeps_over_what_is_there_already(pair: tuple[SharedMemoryChannel, SharedMemoryChannel]) -> None:
    sender, receiver = pair
    sender.try_send([memoryview(b"12345678")])
    assert not receiver.prepare_sleep(receiving=True, sending=False)
    assert receiver.prepare_sleep(receiving=False, sending=False)  # a frame that nobody expects yet
    assert not sender.prepare_sleep(receiving=True, sending=True)  # there is room


def test_a_sender_that_waits_for_room_is_woken_when_a_quarter_is_free(
    pair: tuple[SharedMemoryChannel, SharedMemoryChannel],
) -> None:
    sender, receiver = pair
    sender.try_send([memoryview(bytes(RING))])
    assert sender.prepare_sleep(receiving=True, sending=True)
    receive(receiver, RING // 8)
    assert not readable(sender)
    receive(receiver, RING // 8)
    assert readable(sender)
    assert sender.try_send([memoryview(bytes(RING))]) == RING // 4


# ---- the end


def test_what_was_sent_before_the_end_still_arrives(pair: tuple[SharedMemoryChannel, SharedMemoryChannel]) -> None:
    sender, receiver = pair
    sender.try_send([memoryview(b"the end.")])
    sender.abort(ConnectionLost("done"))
    assert receive(receiver, 8) == b"the end."
    assert receiver.try_recv_into(memoryview(bytearray(8))) == 0
    with pytest.raises(ConnectionLost):
        receiver.try_recv_into(memoryview(bytearray(8)))


def test_a_sender_that_waits_for_room_hears_of_the_end(pair: tuple[SharedMemoryChannel, SharedMemoryChannel]) -> None:
    sender, receiver = pair
    sender.try_send([memoryview(bytes(RING))])
    receiver.abort(ConnectionLost("gone"))
    with pytest.raises(ConnectionLost):
        sender.try_send([memoryview(b"more")])


def test_after_abort_every_call_raises_the_reason(pair: tuple[SharedMemoryChannel, SharedMemoryChannel]) -> None:
    sender, _ = pair
    sender.abort(ConnectionLost("the reason"))
    with pytest.raises(ConnectionLost, match="the reason"):
        sender.try_send([memoryview(b"more")])
    with pytest.raises(ConnectionLost, match="the reason"):
        sender.try_recv_into(memoryview(bytearray(8)))
    assert sender.due() is None
    assert not sender.prepare_sleep(receiving=True, sending=True)


@linux
def test_the_segment_goes_with_both_channels_even_while_a_view_was_held() -> None:
    before = segments()
    with channels() as (sender, receiver):
        sender.try_send([memoryview(b"held on.")])
        view = receiver.try_recv_view(8)
        assert segments() == before + 2
    assert view == b"held on."  # the memory under it stays
    del view
    assert segments() == before


# ---- negotiation


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def test_both_stay_with_tcp_when_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with connected() as (near, far), monkeypatch.context() as patched:
        patched.setattr(os, "write", no_space)
        assert negotiate(near, far) == (None, None)


def test_both_stay_with_tcp_when_the_listener_cannot_open_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_processes(path: bytes, ring_bytes: int, mac: bytes) -> Segment:
        raise PermissionError(13, "Permission denied")

    with connected() as (near, far), monkeypatch.context() as patched:
        patched.setattr(shm, "_open", other_processes)
        assert negotiate(near, far) == (None, None)


@pytest.mark.parametrize("wrong", ["MAC", "size", "folder", "nothing"])
def test_the_listener_refuses_what_is_not_the_segment(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "segment"
    mac = shm.offer_mac(KEY, RING, bytes(path))
    if wrong == "folder":
        path.mkdir()
    elif wrong != "nothing":
        path.write_bytes((bytes(16) if wrong == "MAC" else mac) + bytes(4080 + 2 * RING - (wrong == "size")))
    with connected() as (near, far):
        near.sendall(shm._OFFER.pack(b"SM", RING, len(bytes(path)), mac) + bytes(path))
        assert shm.answer(Blocking(far), KEY) is None
        assert near.recv(100) == b"SM\0"


@pytest.mark.parametrize("key", [KEY, bytes(range(32))], ids=["another path", "another key"])
def test_nobody_on_the_way_can_name_another_file(tmp_path: Path, key: bytes) -> None:
    # It would be opened for writing, whoever's it is.
    path, meant = tmp_path / "segment", tmp_path / "meant"
    mac = shm.offer_mac(key, RING, bytes(meant if key == KEY else path))
    path.write_bytes(mac + bytes(4080 + 2 * RING))
    with connected() as (near, far):
        near.sendall(shm._OFFER.pack(b"SM", RING, len(bytes(path)), mac) + bytes(path))
        with pytest.raises(FrameError, match="wrong MAC"):
            shm.answer(Blocking(far), KEY)
    assert path.read_bytes() == mac + bytes(4080 + 2 * RING)


@pytest.mark.parametrize(
    "offer",
    [
        shm._OFFER.pack(b"SF", RING, 0, bytes(16)),
        shm._OFFER.pack(b"SM", RING + 1, 0, bytes(16)),
        shm._OFFER.pack(b"SM", 0, 0, bytes(16)),
        shm._OFFER.pack(b"SM", 2 << 30, 0, bytes(16)),
        shm._OFFER.pack(b"SM", RING, 1 << 31, bytes(16)),
    ],
)
def test_an_offer_that_cannot_be_one_ends_the_connection(offer: bytes) -> None:
    with connected() as (near, far):
        near.sendall(offer)
        with pytest.raises(FrameError):
            shm.answer(Blocking(far), KEY)


def test_an_answer_that_is_none_ends_the_connection() -> None:
    with connected() as (near, far):
        far.sendall(b"SF\1")
        with pytest.raises(FrameError):
            shm.offer(Blocking(near), RING, KEY)


def test_systems_without_memfd_share_a_file_that_is_gone_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with channels() as (sender, receiver):
        assert list(tmp_path.iterdir()) == []
        sender.try_send([memoryview(b"12345678")])
        assert receive(receiver, 8) == b"12345678"


@linux
def test_negotiating_leaves_no_descriptor_of_the_segment_but_that_of_its_mapping() -> None:
    gc.collect()
    before = psutil.Process().num_fds()
    with connected() as (near, far):
        sockets = psutil.Process().num_fds() - before
        mine, theirs = negotiate(near, far)
        assert psutil.Process().num_fds() - before - sockets == 2  # mmap has one of its own
        del mine, theirs
        gc.collect()
    assert psutil.Process().num_fds() == before


# ---- two processes

PEER = """
import socket, sys
from smolcluster.transport import shm
from smolcluster.transport.tcp import TcpChannel

class Blocking:
    def __init__(self, sock): self.sock = sock
    def read(self, count): return self.sock.recv(count, socket.MSG_WAITALL)
    def write(self, data): self.sock.sendall(data)

sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
dials = sys.argv[2] == "dialler"
key = bytes(32)
segment = shm.offer(Blocking(sock), 65536, key) if dials else shm.answer(Blocking(sock), key)
channel = shm.SharedMemoryChannel(TcpChannel(sock, "the test"), segment, is_dialler=dials)
channel.try_send([memoryview(b"I am up.")])
sys.stdin.read()
"""


@linux
@pytest.mark.parametrize("role", ["dialler", "listener"])
def test_nothing_of_the_segment_is_left_when_the_other_process_is_killed(role: str) -> None:
    before, names = segments(), set(Path("/dev/shm").iterdir())
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = subprocess.Popen([sys.executable, "-c", PEER, str(server.getsockname()[1]), role], stdin=subprocess.PIPE)
        with peer:
            try:
                server.settimeout(DEADLINE)
                sock, _ = server.accept()
                sock.settimeout(DEADLINE)
                is_dialler = role == "listener"
                segment = shm.offer(Blocking(sock), RING, KEY) if is_dialler else shm.answer(Blocking(sock), KEY)
                assert segment is not None
                channel = SharedMemoryChannel(TcpChannel(sock, "the peer"), segment, is_dialler=is_dialler)
                del segment
                assert eventually(lambda: channel.due() is not None)
                view = channel.try_recv_view(8)
                assert segments(peer.pid) == 1
            finally:
                peer.kill()
    assert view == b"I am up."  # a view that is held outlives the peer
    channel.give_back(8)
    assert eventually(lambda: readable(channel))
    assert channel.try_recv_into(memoryview(bytearray(8))) == 0
    with pytest.raises(ConnectionLost):
        channel.try_recv_into(memoryview(bytearray(8)))
    channel.abort(ConnectionLost("the test is over"))
    del view
    assert segments() == before
    assert set(Path("/dev/shm").iterdir()) == names


# ---- who shares with whom

TOKEN = b"correct horse battery staple"
ON, OFF, TLS = TcpOptions(shared_memory=True), TcpOptions(), TcpOptions(tls=True, shared_memory=True)


@contextlib.contextmanager
def dialled(
    dialling: TcpOptions, listening: TcpOptions, lane: str = "bulk:world", host: str = "127.0.0.1"
) -> Iterator[tuple[Channel, Channel]]:
    """The dialler's and the listener's channel."""
    with contextlib.closing(listen(host, 0, token=TOKEN, run_id="run", options=listening)) as listener:
        near = TcpNetwork(TOKEN, dialling).dial_channel(listener.address, Hello(1, lane, "run"), DEADLINE)
        far = listener.accept_channel(1, lane, DEADLINE)
        try:
            yield near, far
        finally:
            near.abort(ConnectionLost("the test is over"))
            far.abort(ConnectionLost("the test is over"))


def speak(sender: Channel, receiver: Channel) -> bool:
    target = memoryview(bytearray(8))
    got = 0
    assert sender.try_send([memoryview(b"12345678")]) == 8
    while got < 8:
        select.select([receiver.fileno()], [], [], 0.01)
        got += receiver.try_recv_into(target[got:])
    return target == b"12345678"


@pytest.mark.parametrize("lane", ["bulk:world", "p2p:world"])
@pytest.mark.parametrize(
    ("dialling", "listening", "shared"), [(ON, ON, True), (ON, OFF, False), (OFF, ON, False), (OFF, OFF, False)]
)
def test_memory_is_shared_where_both_sides_want_it(
    dialling: TcpOptions, listening: TcpOptions, shared: bool, lane: str
) -> None:
    with dialled(dialling, listening, lane) as ends:
        assert [isinstance(end, SharedMemoryChannel) for end in ends] == [shared, shared]
        assert speak(*ends)
        assert speak(*ends[::-1])


def test_a_tls_link_stays_tls() -> None:
    pytest.importorskip("cryptography")
    with dialled(TLS, TLS) as ends:
        assert not any(isinstance(end, SharedMemoryChannel) for end in ends)
        assert speak(*ends)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of this host")
def test_another_address_of_this_host_is_another_host() -> None:
    with dialled(ON, ON, host="127.0.0.2") as ends:  # as between two network namespaces
        assert not any(isinstance(end, SharedMemoryChannel) for end in ends)
        assert speak(*ends)


@pytest.mark.parametrize("broken", ["_create", "_open"])
def test_a_link_without_a_segment_goes_on_with_tcp_and_says_why_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shm, broken, fails)
    with caplog.at_level("INFO"), dialled(ON, ON) as ends:
        assert not any(isinstance(end, SharedMemoryChannel) for end in ends)
        assert speak(*ends)
        assert speak(*ends[::-1])
    assert "No space left on device" in caplog.text


def test_a_rank_that_offers_nonsense_is_refused_and_may_come_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def offer(stream: shm.Stream, ring_bytes: int, key: bytes) -> None:
        stream.write(shm._OFFER.pack(b"SF", ring_bytes, 0, bytes(16)))

    with contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id="run", options=ON)) as listener:
        network, hello = TcpNetwork(TOKEN, ON), Hello(1, "bulk:world", "run")
        with monkeypatch.context() as patched:
            patched.setattr(shm, "offer", offer)
            network.dial_channel(listener.address, hello, DEADLINE).abort(ConnectionLost("out of its mind"))
        assert eventually(lambda: "an offer of shared memory" in caplog.text)
        near = network.dial_channel(listener.address, hello, DEADLINE)
        far = listener.accept_channel(1, "bulk:world", DEADLINE)
        assert speak(near, far)
        near.abort(ConnectionLost("the test is over"))
        far.abort(ConnectionLost("the test is over"))
