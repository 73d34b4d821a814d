"""Control messages with a right MAC and strange JSON: what whoever knows the token, or has a defect, may send."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from hostile.targets import JOIN, KEY, RUN, VIEW, Said
from smolcluster.cluster.rendezvous import _Lobby, _unpack_view
from smolcluster.cluster.world import MAX_TEXT, Member
from smolcluster.errors import FrameError
from smolcluster.kinds import JsonObject
from smolcluster.transport.base import Hello
from smolcluster.transport.messages import MessageCodec
from smolcluster.transport.tcp import CONTROL


def unpacked(body: bytes) -> JsonObject:
    """What a link makes of a frame around `body`."""
    codec = MessageCodec(KEY, from_dialler=True)
    head = struct.pack("!IQ", len(body), 0)
    assert codec.body_bytes(head) == len(body)
    return codec.unpack(head, body, codec._mac(head, body))


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"a":' + b"9" * 5000 + b"}",
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-32"),
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":1}{"b":2}',
        b'{"a":1,}',
        b"{'a':1}",
    ],
    ids=[
        "nan",
        "infinity",
        "-infinity",
        "overflow",
        "deep",
        "5000 digits",
        "bom",
        "utf-16",
        "utf-32",
        "surrogate",
        "two",
        "comma",
        "quotes",
    ],
)
def test_what_json_does_not_allow_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError, match="not JSON"):
        unpacked(body)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_does_not_allow_is_not_sent(value: float) -> None:
    codec = MessageCodec(KEY, from_dialler=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        codec.pack({"kind": "row", "row": {"train/loss": value}})


def test_of_a_key_that_stands_there_twice_the_last_one_counts() -> None:
    assert unpacked(b'{"kind":"beat","kind":"leave"}') == {"kind": "leave"}


def nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 2**40},
        {"generation": -1},
        {"generation": 1.0},
        {"leader": 7},
        {"leader": -1},
        {"run_id": "x" * 65},
        {"run_id": "a\nb"},
        {"run_id": "\ud800"},
        {"run_id": "é" * 33},
        {"members": [VIEW["members"][0]] * 3},  # type: ignore[index]
        {"members": [{"name": "a\nb", "address": "tcp://h:1"}] * 2},
        {"members": [{"name": "x" * 301, "address": "b"}] * 2},
        {"members": [{"name": "a", "address": "\ud800"}] * 2},
        {"members": nested(900)},
    ],
    ids=str,
)
def test_a_view_that_could_not_be_used_is_refused(change: JsonObject) -> None:
    assert _unpack_view(VIEW, 2).run_id == "r"
    with pytest.raises(FrameError, match="malformed view of 2 ranks"):
        _unpack_view({**VIEW, **change}, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a\nb"},
        {"name": "x" * 301},
        {"name": "\ud800"},
        {"name": "\x1b[2J"},
        {"address": "tcp://h:1\n"},
        {"options": {"seed": nested(900)}},
        {"options": {"seed": 1}},
        {"world_size": nested(900)},
        {"rank": nested(900)},
        {"rank": 10**4000},
        {"world_size": 10**4000},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_join_that_could_not_be_used_is_refused(change: JsonObject, caplog: pytest.LogCaptureFixture) -> None:
    lobby = _Lobby(Member(0, "rank0", "tcp://127.0.0.1:1"), 2, {"seed": "1"}, 5.0)
    link = Said({**JOIN, **change})
    lobby.admit(Hello(1, CONTROL, RUN), link)
    assert list(lobby.members) == [0]
    assert link.closed
    assert [said["kind"] for said in link.sent] == ["refused"]
    assert len(str(link.sent[0]["reason"])) <= MAX_TEXT
    assert len(caplog.records) == 1
    assert len(caplog.text) < 2 * MAX_TEXT
    good = Said(JOIN)
    lobby.admit(Hello(1, CONTROL, RUN), good)
    assert list(lobby.members) == [0, 1]
