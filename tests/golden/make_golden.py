"""Examples of everything that crosses the wire, for those who write a peer: `python tests/golden/make_golden.py`.

Writes one `NAME.hex` per example and `index.json`, which says what each one is and what its fields hold. Nothing is
random: token, nonces and values are fixed. test_golden.py compares the files with what the code says now. If they
differ, the protocol has changed: think twice, raise `PROTOCOL_VERSION`, and run this file again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolcluster.collectives.base import ReduceOp
from smolcluster.collectives.codec import Bf16Codec, ErrorFeedback, Int8Codec
from smolcluster.collectives.groups import inproc_group
from smolcluster.collectives.plan import Plan
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.errors import SmolError
from smolcluster.kinds import JsonObject
from smolcluster.transport import security
from smolcluster.transport.base import Channel, Hello
from smolcluster.transport.frame import DTYPES
from smolcluster.transport.messages import MessageCodec
from smolcluster.transport.security import Transcript

FOLDER = Path(__file__).parent
BYTES_PER_LINE = 32

TOKEN = b"correct horse battery staple"
DIALLER_NONCE = bytes(range(32))
LISTENER_NONCE = bytes(range(128, 160))
HELLO = Hello(rank=2, lane="control", run_id="golden", to=0)
TRANSCRIPT = Transcript(HELLO, DIALLER_NONCE, LISTENER_NONCE)
WAIT = 20.0

# What a dialler and a listener say on one control connection, in order; each direction counts on its own.
FROM_DIALLER: dict[str, JsonObject] = {
    "join": {
        "kind": "join", "rank": 2, "name": "größer", "world_size": 3, "address": "tcp://192.168.1.12:50123",
        "options": {"training.seed": "1"},
    },
    "beat": {"kind": "beat"},
    "ping": {"kind": "ping", "sent": 5081.25},
    "leave": {"kind": "leave"},
}  # fmt: skip
FROM_LISTENER: dict[str, JsonObject] = {
    "view": {
        "kind": "view", "generation": 1, "leader": 0, "run_id": "0123456789abcdef",
        "members": [
            {"rank": 0, "name": "mini1", "address": "tcp://192.168.1.10:65432"},
            {"rank": 1, "name": "mini2", "address": "tcp://192.168.1.11:65432"},
            {"rank": 2, "name": "größer", "address": "tcp://192.168.1.12:50123"},
        ],
    },
    "pong": {"kind": "pong", "sent": 5081.25, "held": 0.0009765625},
    "abort": {"kind": "abort", "error": "PeerLost", "text": "rank 1 (mini2) is lost: it was silent", "lost": 1},
    "refused": {"kind": "refused", "reason": "'größer' expects 3 ranks, rank 0 expects 2"},
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """Bytes as they are on the wire, what they are, and the values in them."""

    description: str
    data: bytes
    fields: dict[str, Any]


def examples() -> dict[str, Example]:
    """All examples by name."""
    return {**_handshake(), **_control(), **_messages(), **_collectives()}


def tensors() -> dict[str, Tensor]:
    """What the point-to-point examples carry."""
    found = {name: torch.tensor([0, 1, 2, 100]).to(getattr(torch, name)) for name in DTYPES}
    found["float32"] = torch.tensor([[1.5, -0.0, float("inf")], [1e-45, 3.25, -2.0]])
    found["bfloat16"] = torch.tensor([[[1.0, -2.5], [0.1, 3e38]]]).to(torch.bfloat16)
    found["int64"] = torch.tensor([-(2**63), -1, 2**63 - 1])
    found["scalar"] = torch.tensor(-7, dtype=torch.int16)
    found["empty"] = torch.empty(3, 0, 2, dtype=torch.float64)
    return found


def read_hex(path: Path) -> bytes:
    """The bytes of a `.hex` file."""
    return bytes.fromhex(path.read_text(encoding="ascii"))


def main() -> None:
    """Write all files, and remove those of examples that are no more."""
    for old in FOLDER.glob("*.hex"):
        old.unlink()
    index = {}
    for name, example in examples().items():
        lines = [example.data[i : i + BYTES_PER_LINE].hex(" ") for i in range(0, len(example.data), BYTES_PER_LINE)]
        (FOLDER / f"{name}.hex").write_text("\n".join(lines) + "\n", encoding="ascii", newline="\n")
        index[name] = {"description": example.description, "nbytes": len(example.data), **example.fields}
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (FOLDER / "index.json").write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(index)} examples in {FOLDER}")


def _handshake() -> dict[str, Example]:
    common: dict[str, Any] = {
        "token": TOKEN.decode(), "rank": HELLO.rank, "to": HELLO.to, "lane": HELLO.lane, "run_id": HELLO.run_id,
        "dialler_nonce": DIALLER_NONCE.hex(), "listener_nonce": LISTENER_NONCE.hex(),
    }  # fmt: skip
    refusals = {"version": 1, "token": 2, "run": 3, "taken": 4, "rank": 7}
    found = {
        "handshake_1_hello": Example(
            "HELLO, dialler to listener", security.pack_hello(HELLO, DIALLER_NONCE), common
        ),
        "handshake_2_challenge": Example(
            "CHALLENGE, listener to dialler", security.pack_challenge(LISTENER_NONCE), common
        ),
        "handshake_3_proof": Example(
            "PROOF, dialler to listener", security.pack_proof(TRANSCRIPT.proof(TOKEN, "dialler")), common
        ),
        "handshake_4_accept": Example(
            "ACCEPT, listener to dialler", security.pack_accept(TRANSCRIPT.proof(TOKEN, "listener")), common
        ),
        "handshake_session_key": Example(
            "never sent: the key of the control frames on this connection", TRANSCRIPT.proof(TOKEN, "session"), common
        ),
        "handshake_hello_utf8": Example(
            "HELLO with a lane that is not ASCII; lengths count bytes",
            security.pack_hello(Hello(258, "p2p:größer", "", 257), DIALLER_NONCE),
            {"rank": 258, "to": 257, "lane": "p2p:größer", "run_id": "", "dialler_nonce": DIALLER_NONCE.hex()},
        ),
    }  # fmt: skip
    for name, reason in refusals.items():
        found[f"handshake_refused_{name}"] = Example(
            f"REFUSED, listener to dialler: {name}", security.pack_refused(reason), {"reason": reason}
        )
    return found


def _control() -> dict[str, Example]:
    key = TRANSCRIPT.proof(TOKEN, "session")
    found = {}
    for direction, messages in (("dialler", FROM_DIALLER), ("listener", FROM_LISTENER)):
        codec = MessageCodec(key, from_dialler=direction == "dialler")
        for sequence, (kind, message) in enumerate(messages.items()):
            found[f"control_{direction}_{sequence}_{kind}"] = Example(
                f"control frame {sequence} from the {direction}, after the handshake of these examples",
                codec.pack(message),
                {"session_key": key.hex(), "sequence": sequence, "direction": direction[0].upper(), "message": message},
            )
    return found


def _messages() -> dict[str, Example]:
    found = {}
    for tag, (name, tensor) in enumerate(tensors().items()):
        (sent,) = _sent(2, "p2p:world", (0, 1), lambda comm, t=tensor, tag=tag: _pass_on(comm, t, tag))
        found[f"p2p_{name}"] = Example(
            f"a message of rank 0 to rank 1 with tag {tag}, on the lane p2p:world",
            sent,
            {"tag": tag, "dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape), "values": _spell(tensor)},
        )
    return found


def _collectives() -> dict[str, Example]:
    """The first frame (where it says so, more) of a communicator's first call, as one rank sends it to another."""
    values = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])

    def own(comm: TcpCommunicator) -> Tensor:
        return values * (comm.rank + 1)

    ring = Plan(one_round_bytes=0)
    calls: dict[str, tuple[str, int, tuple[int, int], Plan, Callable[[TcpCommunicator], object]]] = {
        "all_reduce_one_round": (
            "all_reduce sum of 6 float32 by 2 ranks: rank 1 sends all it has to rank 0",
            2, (1, 0), Plan(), lambda comm: comm.all_reduce(own(comm)).wait(WAIT),
        ),
        "all_reduce_ring": (
            "all_reduce average of 6 float32 by 3 ranks, as if it was large: the 4 frames of rank 1 to rank 2. The "
            "average is taken before the third",
            3, (1, 2), ring, lambda comm: comm.all_reduce(own(comm), ReduceOp.AVG).wait(WAIT),
        ),
        "all_reduce_bf16": (
            "all_reduce maximum of 6 float32 by 2 ranks with codec bf16: rank 0 sends its chunk 1, then the result's "
            "chunk 0",
            2, (0, 1), Plan(), lambda comm: comm.all_reduce(own(comm), ReduceOp.MAX, Bf16Codec()).wait(WAIT),
        ),
        "all_reduce_int8": (
            "all_reduce sum of 6 float32 by 2 ranks with codec int8 and nothing left from earlier calls: rank 0 sends "
            "its chunk 1, then the result's chunk 0. Here 0.2 is added to each input, so that no number is halfway",
            2, (0, 1), Plan(),
            lambda comm: comm.all_reduce(own(comm) + 0.2, codec=ErrorFeedback(Int8Codec(), torch.zeros(6))).wait(WAIT),
        ),
        "reduce_scatter": (
            "reduce_scatter sum of 6 float32 by 3 ranks: the 2 frames of rank 0 to rank 1",
            3, (0, 1), ring, lambda comm: comm.reduce_scatter(torch.empty(2), own(comm)).wait(WAIT),
        ),
        "all_gather": (
            "all_gather of 6 float32 by 3 ranks: the 2 frames of rank 0 to rank 1",
            3, (0, 1), ring, lambda comm: comm.all_gather(torch.empty(6), own(comm)[:2]).wait(WAIT),
        ),
        "broadcast": (
            "broadcast of 6 float32 from rank 1 to 3 ranks: rank 1 to rank 2. The hop starts at the source",
            3, (1, 2), Plan(), lambda comm: comm.broadcast(own(comm), 1).wait(WAIT),
        ),
        "all_to_all": (
            "all_to_all of 3 rows of 2 float32 by 3 ranks: rank 0 to rank 2",
            3, (0, 2), Plan(), lambda comm: comm.all_to_all(torch.empty(3, 2), own(comm).view(3, 2)).wait(WAIT),
        ),
        "all_to_all_ragged": (
            "all_to_all_ragged of float32 by 2 ranks: rank 0's part of shape (1, 2) to rank 1",
            2, (0, 1), Plan(),
            lambda comm: comm.all_to_all_ragged([own(comm)[:0], own(comm)[:2].view(1, 2)]).wait(WAIT),
        ),
        "exchange": (
            "exchange: rank 1's JSON to rank 0",
            2, (1, 0), Plan(), lambda comm: comm.exchange({"rank": comm.rank, "text": "größer"}, WAIT),
        ),
        "barrier": ("barrier: rank 1 to rank 0", 2, (1, 0), Plan(), lambda comm: comm.barrier(WAIT)),
    }  # fmt: skip
    found = {}
    for name, (description, world_size, way, plan, call) in calls.items():
        found[f"bulk_{name}"] = Example(
            f"{description}; on the lane bulk:world",
            b"".join(_sent(world_size, "bulk:world", way, call, plan)),
            {"inputs": "rank r has (r + 1) times [0.5, 1, 2, 4, 8, 16]"} if name not in ("exchange", "barrier") else {},
        )
    return found


class _Recorder:
    """A channel that keeps what is sent."""

    def __init__(self, inner: Channel, sent: list[bytes]) -> None:
        self._inner = inner
        self._sent = sent

    def try_send(self, buffers: Sequence[memoryview]) -> int:
        taken = self._inner.try_send(buffers)
        self._sent.append(b"".join(buffers)[:taken])
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _sent(
    world_size: int,
    lane: str,
    way: tuple[int, int],
    call: Callable[[TcpCommunicator], object],
    plan: Plan | None = None,
) -> list[bytes]:
    """What one rank sends to another (`way`) on `lane` while every rank runs `call`."""
    sent: list[bytes] = []
    low, high = sorted(way)

    def hook(rank: int, hello: Hello, channel: Channel) -> Channel:
        # The higher rank dials. Of the ends of its connections to others, only those of `way` count.
        wanted = hello.lane == lane and hello.rank == high and rank == way[0]
        return _Recorder(channel, sent) if wanted and (rank != high or dialled.pop(0) == low) else channel

    dialled = [rank for rank in range(high) for name in ("bulk:world", "p2p:world") if name == lane]
    comms = inproc_group(world_size, hook=hook, plan=plan)
    errors: list[SmolError] = []

    def run(comm: TcpCommunicator) -> None:
        try:
            call(comm)
        except SmolError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for comm in comms:
        comm.close()
    if errors:
        raise errors[0]
    return [b"".join(sent)]


def _pass_on(comm: TcpCommunicator, tensor: Tensor, tag: int) -> None:
    if comm.rank == 0:
        comm.send(tensor, 1, tag).wait(WAIT)
    else:
        comm.recv(0, tag).wait(WAIT)


def _spell(tensor: Tensor) -> list[str]:
    # As text: JSON has no infinity, and not every reader has 64 bits or tells -0.0 from 0.
    return [str(value) for value in tensor.view(-1).tolist()]


if __name__ == "__main__":
    main()
