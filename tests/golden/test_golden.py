"""The golden files say what the code says: a change of the protocol turns this red."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.make_golden import (
    DIALLER_NONCE,
    FOLDER,
    FROM_DIALLER,
    FROM_LISTENER,
    HELLO,
    LISTENER_NONCE,
    TOKEN,
    Example,
    examples,
    read_hex,
    tensors,
)
from smolcluster.collectives.groups import inproc_group
from smolcluster.transport import security
from smolcluster.transport.frame import PRELUDE_BYTES, unpack
from smolcluster.transport.messages import HEAD_BYTES, MAC_BYTES, MessageCodec
from smolcluster.transport.tcp import TcpNetwork, listen, parse_address
from transport.leaks import no_leftovers

REPAIR = "the protocol has changed: if that is meant, raise PROTOCOL_VERSION and run python tests/golden/make_golden.py"
NAMES = sorted(path.stem for path in FOLDER.glob("*.hex"))
TIMEOUT = 20.0


@pytest.fixture(scope="module")
def current() -> dict[str, Example]:
    """What the code says now."""
    return examples()


@pytest.fixture(scope="module")
def index() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(autouse=True)
def closes_everything() -> Iterator[None]:
    with no_leftovers():
        yield


def golden(name: str) -> bytes:
    return read_hex(FOLDER / f"{name}.hex")


@pytest.mark.parametrize("name", NAMES)
def test_the_code_says_what_the_file_says(name: str, current: dict[str, Example]) -> None:
    assert current[name].data.hex(" ", -4) == golden(name).hex(" ", -4), REPAIR


def test_every_example_has_a_file_and_a_description(current: dict[str, Example], index: dict[str, Any]) -> None:
    assert sorted(current) == NAMES == sorted(index), REPAIR
    for name, example in current.items():
        assert index[name]["description"] == example.description
        assert index[name]["nbytes"] == len(golden(name))
        assert {key: index[name][key] for key in example.fields} == example.fields


def test_the_examples_are_the_same_every_time(current: dict[str, Example]) -> None:
    assert {name: example.data for name, example in examples().items()} == {n: e.data for n, e in current.items()}


def test_a_real_listener_says_the_golden_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "new_nonce", lambda: LISTENER_NONCE)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(listen("127.0.0.1", 0, token=TOKEN, run_id=HELLO.run_id)))
        peer = stack.enter_context(socket.create_connection(parse_address(listener.address), timeout=TIMEOUT))
        peer.sendall(golden("handshake_1_hello"))
        assert peer.recv(40, socket.MSG_WAITALL) == golden("handshake_2_challenge")
        peer.sendall(golden("handshake_3_proof"))
        assert peer.recv(40, socket.MSG_WAITALL) == golden("handshake_4_accept")
        said, link = listener.accept_control(TIMEOUT)
        with contextlib.closing(link):
            assert said == HELLO
            for n, (kind, message) in enumerate(FROM_DIALLER.items()):
                peer.sendall(golden(f"control_dialler_{n}_{kind}"))
                assert link.receive(TIMEOUT) == message
            for n, (kind, message) in enumerate(FROM_LISTENER.items()):
                link.send(message)
                wanted = golden(f"control_listener_{n}_{kind}")
                assert peer.recv(len(wanted), socket.MSG_WAITALL) == wanted


def test_a_real_dialler_says_the_golden_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "new_nonce", lambda: DIALLER_NONCE)
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT)

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.settimeout(TIMEOUT)
                heard.append(peer.recv(len(golden("handshake_1_hello")), socket.MSG_WAITALL))
                peer.sendall(golden("handshake_2_challenge"))
                heard.append(peer.recv(40, socket.MSG_WAITALL))
                peer.sendall(golden("handshake_4_accept"))
                for n, kind in enumerate(FROM_DIALLER):
                    heard.append(peer.recv(len(golden(f"control_dialler_{n}_{kind}")), socket.MSG_WAITALL))
                for n, kind in enumerate(FROM_LISTENER):
                    peer.sendall(golden(f"control_listener_{n}_{kind}"))

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with contextlib.closing(TcpNetwork(TOKEN).dial_control(address, HELLO, TIMEOUT)) as link:
            for message in FROM_DIALLER.values():
                link.send(message)
            assert [link.receive(TIMEOUT) for _ in FROM_LISTENER] == list(FROM_LISTENER.values())
        thread.join()
    wanted = [
        "handshake_1_hello",
        "handshake_3_proof",
        *(f"control_dialler_{n}_{k}" for n, k in enumerate(FROM_DIALLER)),
    ]
    assert heard == [golden(name) for name in wanted]


@pytest.mark.parametrize("direction", ["dialler", "listener"])
def test_golden_control_frames_are_read_back(direction: str, index: dict[str, Any]) -> None:
    codec = MessageCodec(golden("handshake_session_key"), from_dialler=direction == "dialler")
    for n, (kind, message) in enumerate((FROM_DIALLER if direction == "dialler" else FROM_LISTENER).items()):
        name = f"control_{direction}_{n}_{kind}"
        data = golden(name)
        head, body, mac = data[:HEAD_BYTES], data[HEAD_BYTES:-MAC_BYTES], data[-MAC_BYTES:]
        assert codec.body_bytes(head) == len(body)
        assert codec.unpack(head, body, mac) == message == index[name]["message"]


def test_golden_messages_are_received_as_the_tensors_they_are() -> None:
    comms = inproc_group(2)
    try:
        for tag, (name, tensor) in enumerate(tensors().items()):
            data = memoryview(golden(f"p2p_{name}"))
            assert comms[0]._message_lanes[1].channel.try_send([data]) == len(data)
            received = comms[1].recv(0, tag).result()[0]
            assert received.dtype == tensor.dtype
            assert received.shape == tensor.shape
            assert torch.equal(received.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    finally:
        for comm in comms:
            comm.close()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("p2p_", "bulk_"))])
def test_golden_frames_are_whole_frames(name: str) -> None:
    data, frames = golden(name), 0
    while data:
        prelude = unpack(data[:PRELUDE_BYTES])
        data = data[PRELUDE_BYTES + 8 * prelude.ndim + prelude.nbytes :]
        frames += 1
    assert frames == {"bulk_all_reduce_ring": 4, "bulk_all_reduce_bf16": 2, "bulk_all_reduce_int8": 2,
                      "bulk_reduce_scatter": 2, "bulk_all_gather": 2}.get(name, 1)  # fmt: skip


def test_the_files_are_plain_hex_with_unix_line_ends() -> None:
    for path in FOLDER.glob("*.hex"):
        text = path.read_bytes()
        assert set(text) <= set(b"0123456789abcdef \n"), path
        assert text.endswith(b"\n")
    assert b"\r" not in Path(FOLDER / "index.json").read_bytes()
