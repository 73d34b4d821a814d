"""Control links, over TCP and in process: order, endings, and what a broken or hostile other side does."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from smolcluster.errors import ConnectionLost, FrameError, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.transport.base import ControlLink
from smolcluster.transport.inproc import InprocControlLink
from smolcluster.transport.messages import HEAD_BYTES, MessageCodec
from smolcluster.transport.tcp import TcpControlLink

KEY = bytes(range(32))
PATIENCE = 10.0


def tcp_link(sock: socket.socket, *, is_dialler: bool, patience: float = PATIENCE) -> TcpControlLink:
    return TcpControlLink(sock, KEY, is_dialler=is_dialler, address="tcp://peer:1", patience=patience)


@pytest.fixture(params=["tcp", "inproc"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[ControlLink, ControlLink]]:
    """Two connected ends."""
    near: ControlLink
    far: ControlLink
    if request.param == "tcp":
        left, right = socket.socketpair()
        near, far = tcp_link(left, is_dialler=True), tcp_link(right, is_dialler=False)
    else:
        near, far = InprocControlLink.pair()
    yield near, far
    near.close()
    far.close()


@pytest.fixture
def hostile() -> Iterator[tuple[TcpControlLink, socket.socket]]:
    """A link whose other end is a plain socket."""
    left, right = socket.socketpair()
    link = tcp_link(left, is_dialler=False, patience=0.3)
    with contextlib.closing(link), right:
        right.settimeout(PATIENCE)
        yield link, right


class Heard:
    """Collects what a link delivers."""

    def __init__(self, link: ControlLink) -> None:
        self.messages: queue.SimpleQueue[JsonObject] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[SmolError] = queue.SimpleQueue()
        link.on_close(self.ends.put)
        link.on_message(self.messages.put)


# --- both kinds


def test_messages_arrive_in_order_in_both_directions(pair: tuple[ControlLink, ControlLink]) -> None:
    near, far = pair
    heard_near, heard_far = Heard(near), Heard(far)
    for n in range(100):
        near.send({"n": n})
        far.send({"n": -n})
    assert [heard_far.messages.get(timeout=PATIENCE)["n"] for _ in range(100)] == list(range(100))
    assert [heard_near.messages.get(timeout=PATIENCE)["n"] for _ in range(100)] == [-n for n in range(100)]


def test_what_was_sent_before_the_handler_came_is_not_lost(pair: tuple[ControlLink, ControlLink]) -> None:
    near, far = pair
    near.send({"n": 1})
    near.send({"n": 2})
    assert far.receive(PATIENCE) == {"n": 1}
    assert Heard(far).messages.get(timeout=PATIENCE) == {"n": 2}


def test_receive_returns_none_when_nothing_comes(pair: tuple[ControlLink, ControlLink]) -> None:
    assert pair[0].receive(0.05) is None
    assert pair[0].receive(0.0) is None


def test_messages_of_many_threads_do_not_mix(pair: tuple[ControlLink, ControlLink]) -> None:
    near, far = pair
    heard = Heard(far)

    def send(sender: int) -> None:
        for n in range(50):
            near.send({"sender": sender, "n": n, "text": "x" * 2000})

    threads = [threading.Thread(target=send, args=(sender,), name=f"test-send-{sender}") for sender in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    received = [heard.messages.get(timeout=PATIENCE) for _ in range(200)]
    for sender in range(4):
        assert [message["n"] for message in received if message["sender"] == sender] == list(range(50))


def test_the_other_sides_end_is_told_once_after_the_last_message(pair: tuple[ControlLink, ControlLink]) -> None:
    near, far = pair
    heard = Heard(far)
    near.send({"last": True})
    near.close()
    assert heard.messages.get(timeout=PATIENCE) == {"last": True}
    assert isinstance(heard.ends.get(timeout=PATIENCE), ConnectionLost)
    assert heard.ends.empty()


def test_a_waiting_receive_notices_the_end(pair: tuple[ControlLink, ControlLink]) -> None:
    near, far = pair
    near.close()
    with pytest.raises(ConnectionLost):
        far.receive(PATIENCE)


def test_closing_ones_own_end_is_no_loss(pair: tuple[ControlLink, ControlLink]) -> None:
    near, _ = pair
    heard = Heard(near)
    near.close()
    near.close()
    assert heard.ends.empty()


def test_sending_on_a_closed_link_raises_connection_lost(pair: tuple[ControlLink, ControlLink]) -> None:
    near, far = pair
    near.close()
    with pytest.raises(ConnectionLost):
        near.send({"kind": "beat"})
    heard = Heard(far)
    heard.ends.get(timeout=PATIENCE)
    with contextlib.suppress(ConnectionLost):
        far.send({"kind": "beat"})  # TCP may take the first one
    with pytest.raises(ConnectionLost):
        far.send({"kind": "beat"})


def test_last_heard_is_when_the_last_message_came(pair: tuple[ControlLink, ControlLink]) -> None:
    near, far = pair
    heard = Heard(far)
    before = time.monotonic()
    near.send({"kind": "beat"})
    heard.messages.get(timeout=PATIENCE)
    after = time.monotonic()
    assert before <= far.last_heard() <= after


def test_a_handler_that_fails_ends_the_link_and_says_why(
    pair: tuple[ControlLink, ControlLink], caplog: pytest.LogCaptureFixture
) -> None:
    near, far = pair
    ends: queue.SimpleQueue[SmolError] = queue.SimpleQueue()

    def fail(message: JsonObject) -> None:
        raise KeyError(message["kind"])

    far.on_close(ends.put)
    far.on_message(fail)
    near.send({"kind": "row"})
    assert "could not be handled here: KeyError('row')" in str(ends.get(timeout=PATIENCE))
    assert "KeyError" in caplog.text


def test_a_link_may_be_closed_by_its_own_handler(pair: tuple[ControlLink, ControlLink]) -> None:
    near, far = pair
    closed = threading.Event()

    def close(message: JsonObject) -> None:
        far.close()
        closed.set()

    far.on_message(close)
    near.send({"kind": "leave"})
    assert closed.wait(PATIENCE)


# --- bytes


def packed(*bodies: JsonObject) -> bytes:
    codec = MessageCodec(KEY, from_dialler=True)
    return b"".join(codec.pack(body) for body in bodies)


def test_a_message_may_come_in_many_segments(hostile: tuple[TcpControlLink, socket.socket]) -> None:
    link, other = hostile
    heard = Heard(link)
    for byte in packed({"kind": "beat"}, {"text": "größer"}):
        other.sendall(bytes([byte]))
    assert heard.messages.get(timeout=PATIENCE) == {"kind": "beat"}
    assert heard.messages.get(timeout=PATIENCE) == {"text": "größer"}


def test_a_half_message_is_kept_until_the_rest_comes(hostile: tuple[TcpControlLink, socket.socket]) -> None:
    link, other = hostile
    data = packed({"kind": "beat"})
    cuts = [0, 3, HEAD_BYTES, HEAD_BYTES + 4, len(data) - 1, len(data)]
    received = []
    for start, end in pairwise(cuts):
        other.sendall(data[start:end])
        received.append(link.receive(0.0))
    assert received == [None, None, None, None, {"kind": "beat"}]


def test_many_messages_may_come_in_one_segment(hostile: tuple[TcpControlLink, socket.socket]) -> None:
    link, other = hostile
    heard = Heard(link)
    other.sendall(packed(*({"n": n} for n in range(20))))
    assert [heard.messages.get(timeout=PATIENCE)["n"] for _ in range(20)] == list(range(20))


def test_the_largest_message_passes() -> None:
    left, right = socket.socketpair()
    near, far = tcp_link(left, is_dialler=True), tcp_link(right, is_dialler=False)
    with contextlib.closing(near), contextlib.closing(far):
        heard = Heard(far)
        near.send({"text": "x" * ((1 << 20) - 11)})
        assert len(str(heard.messages.get(timeout=PATIENCE)["text"])) == (1 << 20) - 11


@pytest.mark.parametrize(
    "place", [0, 4, HEAD_BYTES - 1, HEAD_BYTES + 3, -1], ids=["length", "sequence", "sequence end", "json", "mac"]
)
def test_a_changed_byte_ends_the_link_with_one_line_in_the_log(
    hostile: tuple[TcpControlLink, socket.socket], place: int, caplog: pytest.LogCaptureFixture
) -> None:
    link, other = hostile
    heard = Heard(link)
    data = bytearray(packed({"kind": "beat"}, {"kind": "beat"}))
    data[place if place >= 0 else len(data) // 2 - 1] ^= 0x40
    with caplog.at_level(logging.INFO, "smolcluster"):
        other.sendall(data)
        assert isinstance(heard.ends.get(timeout=PATIENCE), FrameError)
    assert heard.messages.empty()
    assert [record.getMessage().split(" peer=")[0] for record in caplog.records] == ["control frame refused"]


def test_an_oversized_message_ends_the_link_before_it_came(hostile: tuple[TcpControlLink, socket.socket]) -> None:
    link, other = hostile
    heard = Heard(link)
    other.sendall((1 << 30).to_bytes(4, "big") + bytes(8))
    assert "1073741824 bytes" in str(heard.ends.get(timeout=PATIENCE))


def test_a_message_that_breaks_off_ends_the_link(hostile: tuple[TcpControlLink, socket.socket]) -> None:
    link, other = hostile
    heard = Heard(link)
    other.sendall(packed({"kind": "beat"})[:-1])
    other.close()
    assert isinstance(heard.ends.get(timeout=PATIENCE), ConnectionLost)
    assert heard.messages.empty()


def flood(link: ControlLink) -> None:
    """Send more than any buffer takes."""
    for _ in range(100):
        link.send({"text": "x" * 500_000})


def test_a_peer_that_does_not_read_is_given_up_after_the_patience(
    hostile: tuple[TcpControlLink, socket.socket],
) -> None:
    link, _ = hostile
    start = time.monotonic()
    with pytest.raises(ConnectionLost, match=r"tcp://peer:1 reads no control messages for 0\.3 s"):
        flood(link)
    assert 0.3 <= time.monotonic() - start < 0.3 + 2


def test_nothing_follows_half_a_message(hostile: tuple[TcpControlLink, socket.socket]) -> None:
    link, other = hostile
    heard = Heard(link)
    with pytest.raises(ConnectionLost):
        flood(link)
    with pytest.raises(ConnectionLost):
        link.send({"kind": "beat"})
    assert isinstance(heard.ends.get(timeout=PATIENCE), ConnectionLost)  # so that the peer counts as lost
    codec, complete = MessageCodec(KEY, from_dialler=False), 0
    received = bytearray()
    while piece := other.recv(1 << 20):
        received += piece
    while len(received) >= HEAD_BYTES:
        end = HEAD_BYTES + codec.body_bytes(bytes(received[:HEAD_BYTES]))
        if len(received) < end + 16:
            break
        codec.unpack(bytes(received[:HEAD_BYTES]), bytes(received[HEAD_BYTES:end]), bytes(received[end : end + 16]))
        complete += 1
        del received[: end + 16]
    assert received  # the half one, and nothing behind it
