"""A peer written from docs/protocol.md alone, with nothing but the standard library: no torch, no smolcluster.

    PEER_TOKEN=... python plain_peer.py HOST PORT RUN_ID WORLD_SIZE RANK

Rank 1 dials the real rank 0 at HOST:PORT. Rank 0 is the leader: it listens on HOST:PORT (port 0: any), prints
`listening HOST PORT` and waits for a real rank 1. The run has two ranks. Once joined, both do the same:

1. echo every point-to-point message with tag 7 under tag 8, until one with tag 9 arrives;
2. `barrier`, `exchange` of {"peer": "plain"}, `all_reduce` SUM of float32 0..9 (sequences 1, 2, 3);
3. send `leave` and end.

Exit codes: 0 done, 3 refused (the reason is printed), 1 anything else. PEER_PATIENCE is `cluster.patience`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from typing import Any

MAGIC = b"SMOL"
VERSION = 3
HELLO, CHALLENGE, PROOF, ACCEPT, REFUSED = 1, 2, 3, 4, 5
REASONS = {
    1: "protocol version", 2: "token", 3: "run id", 4: "this rank's lane is connected already",
    7: "another rank was dialled",
}  # fmt: skip
WRONG_VERSION, WRONG_TOKEN, WRONG_RUN, CONNECTED_ALREADY, WRONG_RANK = 1, 2, 3, 4, 7
HELLO_HEAD = struct.Struct(">4sHBBBBHi32s")
REPLY = struct.Struct(">4sHBB32s")
HANDSHAKE_SECONDS = 5.0
JOIN_SECONDS = 20.0
WAIT_SECONDS = 30.0

CONTROL_HEAD = struct.Struct(">IQ")
MAX_JSON = 1_048_576

BULK_HEAD = struct.Struct(">HBBBBBBIII4sQQQ")
BULK_MAGIC = 0x5346
COLLECTIVE, MESSAGE = 1, 2
OP_NONE, OP_ALL_REDUCE, OP_EXCHANGE, OP_BARRIER = 0, 1, 7, 8
REDUCE_NONE, REDUCE_SUM = 0, 1
FLOAT32, UINT8 = 1, 6
ELEMENT_SIZE = {1: 4, 2: 8, 3: 2, 4: 2, 5: 1, 6: 1, 7: 2, 8: 4, 9: 8, 10: 1}
MAX_DIMS = 8
MAX_MESSAGE = 1 << 30

ECHO, ECHOED, STOP = 7, 8, 9


class RefusedError(Exception):
    """The other side refused us. `code` is the handshake's reason, 0 for a refused join."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class ProtocolError(Exception):
    """The other side broke the protocol."""


def say(*words: object) -> None:
    print(*words, flush=True)


def check(condition: bool, what: str) -> None:
    if not condition:
        raise ProtocolError(what)


def read_exact(sock: socket.socket, size: int, seconds: float | None = None) -> bytes:
    """Exactly `size` bytes. `seconds` bounds the whole read; None leaves the socket's own timeout."""
    deadline = None if seconds is None else time.monotonic() + seconds
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
        part = sock.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError(f"the connection ended {size - len(data)} bytes before the end of a read")
        data += part
    return bytes(data)


# ---- handshake ------------------------------------------------------------------------------------------------------


def make_mac(
    token: bytes, role: bytes, nonces: tuple[bytes, bytes], ranks: tuple[int, int], lane: bytes, run_id: bytes
) -> bytes:
    """`ranks`: the dialler's and the one that was dialled."""
    text = bytes([len(role)]) + role + struct.pack(">H", VERSION) + nonces[0] + nonces[1] + struct.pack(">iH", *ranks)
    text += bytes([len(lane), len(run_id)]) + lane + run_id + bytes(32)  # zeros: no TLS
    return hmac.new(token, text, hashlib.sha256).digest()


def read_reply(sock: socket.socket, expected: int, deadline: float) -> bytes:
    """The 32 bytes of the expected handshake message; RefusedError if it is REFUSED instead."""
    raw = read_exact(sock, REPLY.size, deadline - time.monotonic())
    magic, version, kind, reason, body = REPLY.unpack(raw)
    check(magic == MAGIC, "handshake: not SMOL")
    if kind == REFUSED:
        raise RefusedError(reason, REASONS.get(reason, f"reason {reason}"))
    check(version == VERSION, f"handshake: version {version}")
    check(kind == expected and reason == 0, f"handshake: message {kind}, expected {expected}")
    return body


def dial_once(address: tuple[str, int], token: bytes, lane: str, run_id: str, rank: int) -> tuple[socket.socket, bytes]:
    """A connection for one lane and its session key."""
    sock = socket.create_connection(address, timeout=HANDSHAKE_SECONDS)
    try:
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        names, ranks = (lane.encode(), run_id.encode()), (rank, 0)  # this peer dials the leader only
        mine = secrets.token_bytes(32)
        head = HELLO_HEAD.pack(MAGIC, VERSION, HELLO, len(names[0]), len(names[1]), 0, 0, rank, mine)
        sock.sendall(head + names[0] + names[1])
        nonces = (mine, read_reply(sock, CHALLENGE, deadline))
        sock.sendall(REPLY.pack(MAGIC, VERSION, PROOF, 0, make_mac(token, b"dialler", nonces, ranks, *names)))
        theirs = read_reply(sock, ACCEPT, deadline)
        check(hmac.compare_digest(theirs, make_mac(token, b"listener", nonces, ranks, *names)), "ACCEPT: wrong MAC")
    except BaseException:
        sock.close()
        raise
    sock.settimeout(None)
    return sock, make_mac(token, b"session", nonces, ranks, *names)


def dial(address: tuple[str, int], token: bytes, lane: str, run_id: str, rank: int) -> tuple[socket.socket, bytes]:
    """dial_once, again and again while nobody answers or the listener has not heard of the run yet."""
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return dial_once(address, token, lane, run_id, rank)
        except RefusedError as error:
            if error.code != WRONG_RUN or time.monotonic() > deadline:
                raise
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def answer(sock: socket.socket, token: bytes, run_id: str, taken: set[tuple[int, str]]) -> tuple[int, str, bytes]:
    """The listener's side: the dialler's rank, the lane and the session key; RefusedError after having refused."""
    deadline = time.monotonic() + HANDSHAKE_SECONDS

    def refuse(reason: int) -> RefusedError:
        sock.sendall(REPLY.pack(MAGIC, VERSION, REFUSED, reason, bytes(32)))
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):  # closing with unread bytes could take the refusal back
            sock.settimeout(1.0)
            while sock.recv(4096):
                pass
        return RefusedError(reason, REASONS[reason])

    raw = read_exact(sock, HELLO_HEAD.size, deadline - time.monotonic())
    magic, version, kind, lane_size, run_size, zero, to, rank, theirs = HELLO_HEAD.unpack(raw)
    check(magic == MAGIC and kind == HELLO, "HELLO: not a handshake")
    if version != VERSION:
        raise refuse(WRONG_VERSION)
    check(lane_size <= 64 and run_size <= 64 and zero == 0, "HELLO: malformed")
    lane = read_exact(sock, lane_size, deadline - time.monotonic())
    run = read_exact(sock, run_size, deadline - time.monotonic())
    if run != run_id.encode():
        raise refuse(WRONG_RUN)
    nonces = (theirs, secrets.token_bytes(32))
    sock.sendall(REPLY.pack(MAGIC, VERSION, CHALLENGE, 0, nonces[1]))
    proof = read_reply(sock, PROOF, deadline)
    if not hmac.compare_digest(proof, make_mac(token, b"dialler", nonces, (rank, to), lane, run)):
        raise refuse(WRONG_TOKEN)
    if to != 0:
        raise refuse(WRONG_RANK)
    if (rank, lane.decode()) in taken:
        raise refuse(CONNECTED_ALREADY)
    sock.sendall(REPLY.pack(MAGIC, VERSION, ACCEPT, 0, make_mac(token, b"listener", nonces, (rank, to), lane, run)))
    sock.settimeout(None)
    return rank, lane.decode(), make_mac(token, b"session", nonces, (rank, to), lane, run)


# ---- the control lane -----------------------------------------------------------------------------------------------


class Control:
    """One control connection: JSON objects both ways, then a beating heart."""

    def __init__(self, sock: socket.socket, key: bytes, dialled: bool, patience: float) -> None:
        self.sock = sock
        self.key = key
        self.directions = (b"D", b"L") if dialled else (b"L", b"D")  # what we send, what we receive
        self.sent = 0
        self.received = 0
        self.lock = threading.Lock()
        self.patience = patience
        self.leaving = threading.Event()  # we said `leave`, or they did
        self.ended = threading.Event()

    def _mac(self, direction: bytes, head: bytes, text: bytes) -> bytes:
        return hmac.new(self.key, direction + head + text, hashlib.sha256).digest()[:16]

    def send(self, kind: str, **fields: Any) -> None:
        text = json.dumps({"kind": kind, **fields}).encode()
        check(len(text) <= MAX_JSON, "control: too long")
        with self.lock:
            head = CONTROL_HEAD.pack(len(text), self.sent)
            self.sent += 1
            self.sock.sendall(head + text + self._mac(self.directions[0], head, text))

    def receive(self, seconds: float) -> dict[str, Any]:
        head = read_exact(self.sock, CONTROL_HEAD.size, seconds)
        size, sequence = CONTROL_HEAD.unpack(head)
        check(size <= MAX_JSON, f"control: {size} bytes of JSON")
        text = read_exact(self.sock, size, seconds)
        mac = read_exact(self.sock, 16, seconds)
        check(hmac.compare_digest(mac, self._mac(self.directions[1], head, text)), "control: wrong MAC")
        check(sequence == self.received, f"control: sequence {sequence}, expected {self.received}")
        self.received += 1
        message = json.loads(text)
        check(isinstance(message, dict) and isinstance(message.get("kind"), str), "control: no kind")
        return message

    def wait_for(self, *kinds: str) -> dict[str, Any]:
        """The first message of one of these kinds; those of other kinds are passed over."""
        deadline = time.monotonic() + JOIN_SECONDS
        while True:
            message = self.receive(deadline - time.monotonic())
            if message["kind"] in kinds:
                return message

    def start(self) -> None:
        threading.Thread(target=self._beat, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the listening thread reports how the connection ended
            while not self.leaving.wait(self.patience / 5):
                self.send("beat")

    def _listen(self) -> None:
        try:
            while True:
                message = self.receive(self.patience)
                if message["kind"] == "abort":
                    say("aborted:", message.get("error"), message.get("text"))
                    os._exit(1)
                if message["kind"] == "leave":
                    say("the other rank leaves")
                    self.leaving.set()
        except (OSError, EOFError, ProtocolError, ValueError) as error:
            if not self.leaving.is_set():
                say("lost the other rank:", error)
                os._exit(1)
        finally:
            self.ended.set()

    def leave(self) -> None:
        self.leaving.set()
        self.send("leave")


# ---- the bulk and p2p lanes -----------------------------------------------------------------------------------------


class Frames:
    """One lane of tensor frames."""

    def __init__(self, sock: socket.socket, generation: int) -> None:
        self.sock = sock
        self.generation = generation

    def send(
        self,
        kind: int,
        operation: int,
        reduce: int,
        dtype: int,
        dims: tuple[int, ...],
        payload: bytes,
        *,
        tag: int = 0,
        sequence: int = 0,
        count: int,
    ) -> None:
        fields = (kind, operation, reduce, dtype, 0, len(dims), self.generation, tag, 0, bytes(4))
        head = BULK_HEAD.pack(BULK_MAGIC, *fields, sequence, count, len(payload))
        self.sock.sendall(head + struct.pack(f">{len(dims)}Q", *dims) + payload)

    def receive(self, kind: int, operation: int, reduce: int, sequence: int) -> tuple[int, int, tuple[int, ...], bytes]:
        """The next frame's dtype, tag, dims and payload; everything else is checked."""
        head = BULK_HEAD.unpack(read_exact(self.sock, BULK_HEAD.size, WAIT_SECONDS))
        magic, got_kind, got_operation, got_reduce, dtype, codec, ndim = head[:7]
        generation, tag, hop, zero, got_sequence, count, nbytes = head[7:]
        check(magic == BULK_MAGIC and zero == bytes(4), "frame: malformed")
        got = (got_kind, got_operation, got_reduce, got_sequence)
        check(got == (kind, operation, reduce, sequence), f"frame: {got} for {(kind, operation, reduce, sequence)}")
        check(generation == self.generation, f"frame: generation {generation}")
        check(codec == 0 and hop == 0, f"frame: codec {codec}, hop {hop}")
        check(dtype in ELEMENT_SIZE and ndim <= MAX_DIMS, f"frame: dtype {dtype}, {ndim} dims")
        check(nbytes <= MAX_MESSAGE, f"frame: {nbytes} bytes")
        dims = struct.unpack(f">{ndim}Q", read_exact(self.sock, 8 * ndim, WAIT_SECONDS))
        if ndim or kind == MESSAGE:
            elements = 1
            for dim in dims:
                elements *= dim
            check(count == elements, f"frame: count {count} for dims {dims}")
        check(nbytes == count * ELEMENT_SIZE[dtype], f"frame: {nbytes} bytes for {count} elements of dtype {dtype}")
        return dtype, tag, dims, read_exact(self.sock, nbytes, WAIT_SECONDS)


def echo(lane: Frames) -> int:
    """Send back under tag 8 what comes under tag 7, until tag 9. How many."""
    done = 0
    while True:
        dtype, tag, dims, payload = lane.receive(MESSAGE, OP_NONE, REDUCE_NONE, 0)
        if tag == STOP:
            return done
        check(tag == ECHO, f"message: tag {tag}")
        count = len(payload) // ELEMENT_SIZE[dtype]
        lane.send(MESSAGE, OP_NONE, REDUCE_NONE, dtype, dims, payload, tag=ECHOED, count=count)
        done += 1


def barrier(lane: Frames, sequence: int) -> None:
    lane.send(COLLECTIVE, OP_BARRIER, REDUCE_NONE, UINT8, (0,), b"", sequence=sequence, count=0)
    dtype, tag, dims, _ = lane.receive(COLLECTIVE, OP_BARRIER, REDUCE_NONE, sequence)
    check((dtype, tag, dims) == (UINT8, 0, (0,)), f"barrier: {(dtype, tag, dims)}")


def exchange(lane: Frames, sequence: int, value: Any) -> Any:
    text = json.dumps(value).encode()
    size = len(text)
    lane.send(COLLECTIVE, OP_EXCHANGE, REDUCE_NONE, UINT8, (size,), text, sequence=sequence, count=size)
    dtype, tag, dims, payload = lane.receive(COLLECTIVE, OP_EXCHANGE, REDUCE_NONE, sequence)
    check((dtype, tag, dims) == (UINT8, 0, (len(payload),)), f"exchange: {(dtype, tag, dims)}")
    return json.loads(payload)


def all_reduce_sum(lane: Frames, sequence: int, rank: int, values: list[float]) -> list[float]:
    """float32, in one round: each sends its whole tensor to all, all add in rank order."""
    size = len(values)
    mine = struct.pack(f"<{size}f", *values)
    lane.send(COLLECTIVE, OP_ALL_REDUCE, REDUCE_SUM, FLOAT32, (), mine, sequence=sequence, count=size)
    dtype, tag, dims, theirs = lane.receive(COLLECTIVE, OP_ALL_REDUCE, REDUCE_SUM, sequence)
    check((dtype, tag, dims, len(theirs)) == (FLOAT32, 0, (), 4 * size), f"all_reduce: {(dtype, tag, dims)}")
    both = (mine, theirs) if rank == 0 else (theirs, mine)
    first, second = (struct.unpack(f"<{size}f", data) for data in both)
    total = (a + b for a, b in zip(first, second, strict=True))
    return list(struct.unpack(f"<{size}f", struct.pack(f"<{size}f", *total)))


# ---- the run --------------------------------------------------------------------------------------------------------


def split_address(address: str) -> tuple[str, int]:
    check(address.startswith("tcp://"), f"address {address!r}")
    host, _, port = address[len("tcp://") :].rpartition(":")
    return host, int(port)


def follow(leader: tuple[str, int], token: bytes, run_id: str, patience: float) -> tuple[Control, Frames, Frames]:
    """Join as rank 1 of 2."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # rank 1 of 2 is the highest: nobody dials it
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        control = Control(*dial(leader, token, "control", run_id, 1), dialled=True, patience=patience)
        control.send("join", rank=1, name="plain", world_size=2, address=address, options={})
        view = control.wait_for("view", "refused")
        if view["kind"] == "refused":
            raise RefusedError(0, str(view.get("reason")))
        say("view", json.dumps(view, sort_keys=True))
        check([member["rank"] for member in view["members"]] == [0, 1], "view: not two ranks in order")
        check(view["members"][1]["address"] == address, "view: another address for rank 1")
        control.start()
        lanes = []
        for lane in ("bulk:world", "p2p:world"):
            sock, _ = dial(split_address(view["members"][0]["address"]), token, lane, view["run_id"], 1)
            lanes.append(Frames(sock, view["generation"]))
    return control, lanes[0], lanes[1]


def lead(listen_at: tuple[str, int], token: bytes, run_id: str, patience: float) -> tuple[Control, Frames, Frames]:
    """Be rank 0 of 2."""
    taken: set[tuple[int, str]] = set()
    with socket.create_server(listen_at) as listener:
        listener.settimeout(JOIN_SECONDS)
        host, port = listener.getsockname()[:2]
        say("listening", host, port)

        def accept(wanted: str) -> tuple[socket.socket, bytes]:
            while True:
                sock, _ = listener.accept()
                try:
                    rank, lane, key = answer(sock, token, run_id, taken)
                    check((rank, lane) == (1, wanted), f"rank {rank} came with {lane}, expected rank 1 with {wanted}")
                except (RefusedError, ProtocolError, OSError, EOFError) as error:
                    say("turned away:", error)
                    sock.close()
                    continue
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                taken.add((rank, lane))
                return sock, key

        def wrong(join: dict[str, Any]) -> str:
            if (join.get("rank"), join.get("world_size")) != (1, 2):
                return f"rank 0 waits for rank 1 of 2, not for {join.get('rank')} of {join.get('world_size')}"
            return "" if join.get("options") == {} else "the options differ: rank 0 has none"

        while True:
            control = Control(*accept("control"), dialled=False, patience=patience)
            join = control.receive(JOIN_SECONDS)
            check(join["kind"] == "join", f"{join['kind']} before join")
            reason = wrong(join)
            if not reason:
                break
            control.send("refused", reason=reason)
            control.sock.close()
            taken.clear()
        members = [
            {"rank": 0, "name": "plain", "address": f"tcp://{host}:{port}"},
            {"rank": 1, "name": join["name"], "address": join["address"]},
        ]
        control.send("view", generation=1, leader=0, run_id=run_id, members=members)
        control.start()
        lanes = [Frames(accept(lane)[0], 1) for lane in ("bulk:world", "p2p:world")]
    return control, lanes[0], lanes[1]


def part(control: Control, lanes: tuple[Frames, Frames]) -> None:
    """Say `leave`, end every connection, and let what is still on its way arrive."""
    with contextlib.suppress(OSError):  # they may have left first
        control.leave()
    for sock in (control.sock, *(lane.sock for lane in lanes)):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
    control.ended.wait(1.0)


def main() -> int:
    host, port, run_id, world_size, rank = sys.argv[1:6]
    token = os.environ["PEER_TOKEN"].encode()
    patience = float(os.environ.get("PEER_PATIENCE", "5"))
    check(int(world_size) == 2 and int(rank) in (0, 1), "this peer is rank 0 or 1 of 2")
    join = lead if int(rank) == 0 else follow
    try:
        control, bulk, p2p = join((host, int(port)), token, run_id, patience)
    except RefusedError as error:
        say("refused:", error)
        return 3
    say("joined")
    say("echoed", echo(p2p))
    barrier(bulk, 1)
    say("exchanged", json.dumps(exchange(bulk, 2, {"peer": "plain"}), sort_keys=True))
    say("sum", json.dumps(all_reduce_sum(bulk, 3, int(rank), [float(i) for i in range(10)])))
    part(control, (bulk, p2p))
    return 0


if __name__ == "__main__":
    sys.exit(main())
