"""Control messages: one JSON object per frame, with a MAC and a sequence number.

    length (4 bytes, of the JSON) | sequence (8) | JSON in UTF-8 | first 16 bytes of the MAC

The MAC is HMAC-SHA256 with the session key of the handshake over direction (b"D" from the dialler, b"L" from the
listener), length, sequence and JSON. A frame whose MAC or sequence is wrong ends the connection.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct

from smolcluster.errors import FrameError
from smolcluster.kinds import JsonObject

MAX_MESSAGE_BYTES = 1 << 20  # 1 MiB: the largest are metric rows of a few hundred steps
MAC_BYTES = 16

_HEAD = struct.Struct("!IQ")
HEAD_BYTES = _HEAD.size


class MessageCodec:
    """Packs and checks the messages of one direction. Not thread-safe: one for sending, one for receiving."""

    def __init__(self, session_key: bytes, *, from_dialler: bool) -> None:
        self._key = session_key
        self._direction = b"D" if from_dialler else b"L"
        self._sequence = 0

    def pack(self, message: JsonObject) -> bytes:
        """The message as bytes.

        Raises:
            ValueError: larger than MAX_MESSAGE_BYTES, or with a NaN or infinity, which JSON does not know.
        """
        # "replace": an error text may name a file whose bytes are no text, and must still travel.
        text = json.dumps(message, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        body = text.encode(errors="replace")
        if len(body) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a control message of {len(body)} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
        head = _HEAD.pack(len(body), self._sequence)
        self._sequence += 1
        return head + body + self._mac(head, body)

    def body_bytes(self, head: bytes) -> int:
        """Length of the JSON that follows `head`.

        Raises:
            FrameError: too long, or the sequence number is not the next one.
        """
        length, sequence = _HEAD.unpack(head)
        if length > MAX_MESSAGE_BYTES:
            raise FrameError(f"a control message of {length} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
        if sequence != self._sequence:
            raise FrameError(f"control message {sequence} where {self._sequence} belongs")
        return int(length)

    def unpack(self, head: bytes, body: bytes, mac: bytes) -> JsonObject:
        """Check the MAC, then read the JSON.

        Raises:
            FrameError: wrong MAC, or not a JSON object.
        """
        if not hmac.compare_digest(mac, self._mac(head, body)):
            raise FrameError("a control message with a wrong MAC")
        self._sequence += 1
        try:
            message = json.loads(body.decode(), parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as exc:
            raise FrameError("a control message that is not JSON") from exc
        if not isinstance(message, dict):
            raise FrameError("a control message that is not a JSON object")
        return message

    def _mac(self, head: bytes, body: bytes) -> bytes:
        return hmac.new(self._key, self._direction + head + body, hashlib.sha256).digest()[:MAC_BYTES]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # such as 1e999: what is not JSON could not be passed on either
        raise ValueError(f"{text} is not a number")
    return value
