"""Control messages: only what the other side packed, in its order, is ever unpacked."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolcluster.errors import FrameError
from smolcluster.kinds import JsonObject
from smolcluster.transport import messages
from smolcluster.transport.messages import HEAD_BYTES, MAC_BYTES, MAX_MESSAGE_BYTES, MessageCodec

KEY = bytes(range(32))
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


def codecs() -> tuple[MessageCodec, MessageCodec]:
    """A sender and the receiver of the same direction."""
    return MessageCodec(KEY, from_dialler=True), MessageCodec(KEY, from_dialler=True)


def unpack(codec: MessageCodec, packed: bytes) -> JsonObject:
    """What a link does with the bytes of one message."""
    head = packed[:HEAD_BYTES]
    end = HEAD_BYTES + codec.body_bytes(head)
    return codec.unpack(head, packed[HEAD_BYTES:end], packed[end : end + MAC_BYTES])


def framed(body: bytes, sequence: int = 0) -> bytes:
    """`body` with a right MAC, whatever it is."""
    codec = MessageCodec(KEY, from_dialler=True)
    head = struct.pack("!IQ", len(body), sequence)
    return head + body + codec._mac(head, body)


@settings(max_examples=50)
@given(st.lists(st.dictionaries(TEXT, JSON, max_size=4), max_size=5))
def test_messages_survive_the_wire_in_order(sent: list[JsonObject]) -> None:
    sender, receiver = codecs()
    assert [unpack(receiver, sender.pack(message)) for message in sent] == sent


@given(st.data())
def test_one_changed_byte_anywhere_is_noticed(data: st.DataObject) -> None:
    sender, receiver = codecs()
    packed = bytearray(sender.pack({"kind": "beat", "n": 12345}))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameError):
        unpack(receiver, bytes(packed).ljust(1 << 21, b"\0"))


def test_a_message_of_the_other_direction_is_refused() -> None:
    packed = MessageCodec(KEY, from_dialler=False).pack({"kind": "beat"})
    with pytest.raises(FrameError, match="wrong MAC"):
        unpack(MessageCodec(KEY, from_dialler=True), packed)


def test_a_message_of_another_session_is_refused() -> None:
    packed = MessageCodec(bytes(32), from_dialler=True).pack({"kind": "beat"})
    with pytest.raises(FrameError, match="wrong MAC"):
        unpack(MessageCodec(KEY, from_dialler=True), packed)


def test_a_repeated_message_is_refused() -> None:
    sender, receiver = codecs()
    packed = sender.pack({"kind": "beat"})
    unpack(receiver, packed)
    with pytest.raises(FrameError, match="message 0 where 1 belongs"):
        unpack(receiver, packed)


def test_a_left_out_message_is_noticed() -> None:
    sender, receiver = codecs()
    sender.pack({"kind": "beat"})
    with pytest.raises(FrameError, match="message 1 where 0 belongs"):
        unpack(receiver, sender.pack({"kind": "beat"}))


def test_the_sequence_number_is_under_the_mac() -> None:
    packed = MessageCodec(KEY, from_dialler=True).pack({"kind": "beat"})
    receiver = MessageCodec(KEY, from_dialler=True)
    unpack(receiver, packed)
    with pytest.raises(FrameError, match="wrong MAC"):
        unpack(receiver, packed[:4] + struct.pack("!Q", 1) + packed[HEAD_BYTES:])


def test_an_oversized_message_is_refused_by_its_head_alone() -> None:
    head = struct.pack("!IQ", MAX_MESSAGE_BYTES + 1, 0)
    with pytest.raises(FrameError, match="of 1048577 bytes, at most 1048576"):
        MessageCodec(KEY, from_dialler=True).body_bytes(head)
    assert MessageCodec(KEY, from_dialler=True).body_bytes(struct.pack("!IQ", MAX_MESSAGE_BYTES, 0)) == 1 << 20


def test_an_oversized_message_is_not_sent_and_costs_no_sequence_number() -> None:
    sender, receiver = codecs()
    with pytest.raises(ValueError, match="at most 1048576 are allowed"):
        sender.pack({"text": "x" * MAX_MESSAGE_BYTES})
    assert unpack(receiver, sender.pack({"kind": "beat"})) == {"kind": "beat"}


NO_JSON = [b"", b"\xff\xfe", b"{", b'{"kind"}', b"\x00" * 20, b"[" * 100_000, b"9" * 10_000 + b"}"]


@pytest.mark.parametrize("body", NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError, match="not JSON"):
        unpack(MessageCodec(KEY, from_dialler=True), framed(body))


@pytest.mark.parametrize("body", [b"[]", b"null", b'"beat"', b"1", b"true"])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError, match="not a JSON object"):
        unpack(MessageCodec(KEY, from_dialler=True), framed(body))


@settings(max_examples=2000)
@given(st.binary(min_size=HEAD_BYTES, max_size=200), st.booleans(), st.booleans())
def test_random_bytes_only_ever_raise_frame_error(noise: bytes, right_sequence: bool, right_mac: bool) -> None:
    body = noise[HEAD_BYTES:]
    head = struct.pack("!IQ", len(body), 0) if right_sequence else noise[:HEAD_BYTES]
    codec = MessageCodec(KEY, from_dialler=True)
    mac = codec._mac(head, body) if right_mac else bytes(MAC_BYTES)
    try:
        codec.body_bytes(head)
        message = codec.unpack(head, body, mac)
    except FrameError:
        return
    assert right_mac
    assert isinstance(message, dict)


def test_text_that_utf8_cannot_say_still_travels() -> None:
    # A file name with undecodable bytes in an error message: it must not stop the message that ends the run.
    sender, receiver = codecs()
    assert unpack(receiver, sender.pack({"text": "\udcff größer"})) == {"text": "? größer"}


def test_the_layout_is_the_documented_one() -> None:
    packed = MessageCodec(KEY, from_dialler=True).pack({"kind": "beat"})
    assert (messages.HEAD_BYTES, messages.MAC_BYTES) == (12, 16)
    assert packed[:12].hex() == "0000000f" + "00" * 8
    assert packed[12:27] == b'{"kind":"beat"}'
    assert len(packed) == 12 + 15 + 16
