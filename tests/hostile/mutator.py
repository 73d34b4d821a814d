"""Bytes and JSON as somebody hostile would make them: valid ones with something wrong, all drawn from a seed."""

from __future__ import annotations

import pickle
import random
import struct
from collections.abc import Sequence
from typing import Any

# What lengths, counts and ranks break on.
EDGES = (
    0,
    1,
    2,
    3,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
MAX_CASE_BYTES = 60_000  # a socket pair takes it without a reader


EXECUTED: list[str] = []


def execute(what: str) -> None:
    """What the pickles here call when somebody unpickles them."""
    EXECUTED.append(what)


class Exploit:
    """Unpickled, it runs something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return execute, ("a payload was unpickled",)


PICKLES = [pickle.dumps(Exploit(), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
TLS_CLIENT_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(32)) + bytes(160)
STRANGE = [
    *PICKLES,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    TLS_CLIENT_HELLO,
    b"SSH-2.0-OpenSSH_9.6\r\n",
    bytes(64),
    b"\xff" * 64,
    struct.pack("!I", 2**32 - 1) * 8,  # 4 GiB, whatever the field is
    struct.pack("!Q", 2**32) * 8,
    b"[" * 2000,
    b'{"a":' * 2000,
    b"9" * 5000,
]
STRANGE_JSON = [
    b"",
    b"null",
    b"[]",
    b"7",
    b'"text"',
    b"NaN",
    b'{"kind":NaN}',
    b'{"kind":Infinity}',
    b'{"a":1e999}',
    b"\xef\xbb\xbf{}",
    b'{"kind":"beat","kind":"leave"}',
    b'{"a":' + b"9" * 4000 + b"}",
    b'{"a":' + b"9" * 5000 + b"}",
    b'{"kind":"\\ud800"}',
    b'{"kind":"\xed\xa0\x80"}',
    b'{"kind":"beat"'.ljust(3000),
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b"[" * 100_000,
    '{"kind":"beat"}'.encode("utf-16"),
    b'{"kind":"beat"}\x00',
    b"{'kind':'beat'}",
    *PICKLES,
]


def mutate(dice: random.Random, parts: Sequence[bytes]) -> bytes:
    """One to three things wrong with the concatenation of `parts`; they are the places where fields or frames end."""
    parts = list(parts)
    if len(parts) > 1 and dice.random() < 0.3:
        _rearrange(dice, parts)
    data = bytearray(b"".join(parts))
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
        _break(dice, data)
    return bytes(data[:MAX_CASE_BYTES])


def _rearrange(dice: random.Random, parts: list[bytes]) -> None:
    first, second = dice.randrange(len(parts)), dice.randrange(len(parts))
    match dice.randrange(4):
        case 0:
            parts[first], parts[second] = parts[second], parts[first]
        case 1:
            parts.insert(first, parts[second])
        case 2:
            del parts[first]
        case _:
            parts.insert(first, dice.choice(STRANGE))


def _break(dice: random.Random, data: bytearray) -> None:
    at = dice.randrange(len(data) + 1)
    match dice.randrange(8):
        case 0 | 1:
            if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
        case 2 | 3:
            # Fields lie at multiples of their length from the beginning of a message, and most at its beginning.
            width = dice.choice((1, 2, 4, 8))
            at = dice.randrange(0, min(len(data), 200) + 1, width)
            data[at : at + width] = (dice.choice(EDGES) % 256**width).to_bytes(width, "big")
        case 4:
            del data[at:]
        case 5:
            del data[at : at + dice.randrange(1, 64)]
        case 6:
            data[at:at] = dice.choice(STRANGE)
        case _:
            end = min(len(data), at + dice.randrange(1, 32))
            data[at:end] = dice.randbytes(end - at)


def mutate_json(dice: random.Random, value: Any) -> Any:
    """`value` with one to three of its parts replaced, left out, added or doubled."""
    for _ in range(dice.choice((0, 1, 1, 2, 3))):
        value = _mutate_once(dice, value)
    return value


def _mutate_once(dice: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        match dice.randrange(6):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {**value, strange_text(dice): strange_value(dice)}
            case _:
                return {**value, key: _mutate_once(dice, value[key])}
    if isinstance(value, list) and value and dice.random() < 0.8:
        at = dice.randrange(len(value))
        match dice.randrange(4):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, *value]
            case _:
                return [*value[:at], _mutate_once(dice, value[at]), *value[at + 1 :]]
    return strange_value(dice)


def strange_value(dice: random.Random) -> Any:
    """What JSON can say and nobody expects."""
    match dice.randrange(10):
        case 0:
            return dice.choice(EDGES) * dice.choice((1, -1))
        case 1:
            return 10 ** dice.choice((20, 400, 4000))
        case 2:
            return dice.choice((1e308, -1e308, 5e-324, -0.0, 0.5, True, False, None))
        case 3:
            nested: Any = 0
            for _ in range(dice.choice((1, 10, 900))):
                nested = [nested] if dice.random() < 0.5 else {"a": nested}
            return nested
        case 4:
            return [0] * dice.choice((0, 1, 100))
        case 5:
            return {strange_text(dice): 0}
        case _:
            return strange_text(dice)


def strange_text(dice: random.Random) -> str:
    """What a string can hold and nobody expects."""
    texts = (
        "",
        "\x00",
        "\ud800",
        "a\nb\r\x1b[2J",
        "größer",
        "x" * 300,
        "x" * 70_000,
        "é" * 64,
        "%s%n{0}",
        "../../etc/passwd",
        "tcp://127.0.0.1:0",
        "tcp://[::1]:99999",
        "__class__",
        "PeerLost",
        "errors",
        "annotations",
        "view",
        "abort",
        "row",
    )
    return dice.choice(texts)
