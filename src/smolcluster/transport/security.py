"""The cluster token, and the handshake that every connection begins with.

Both sides prove that they know the token, the dialler first, before anything else is read. The messages are small and
fixed in layout (big-endian), so that nothing is parsed or allocated for a stranger. `docs/protocol.md` is the
description for other languages; `tests/golden/` holds the bytes.

    dialler  -> HELLO      who I am, nonce
    listener -> CHALLENGE  nonce
    dialler  -> PROOF      HMAC(token, "dialler", everything above)
    listener -> ACCEPT     HMAC(token, "listener", everything above)    or REFUSED with a reason
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from smolcluster.errors import AuthFailed, ConfigError, FrameError
from smolcluster.transport.base import Hello

PROTOCOL_VERSION = 3
MAGIC = b"SMOL"
NONCE_BYTES = 32
MAC_BYTES = 32
MAX_RANK = 0xFFFF
MAX_NAME_BYTES = 64  # of a lane or run id: what a stranger can make us read is at most 48 + 2 * 64 bytes
NO_TLS = bytes(32)  # stands in the transcript where the TLS certificate's SHA-256 would
TOKEN_BYTES = 32
TOKEN_VARIABLE = "SMOLCLUSTER_TOKEN"  # of the environment; not handed on to processes that do not need it

# magic, version, type, lane length, run id length, 1 if it offers memory, rank dialled, rank, nonce; lane and run id in
# UTF-8
_HELLO = struct.Struct("!4sHBBBBHi32s")
# magic, version, type, refusal reason (of ACCEPT: 1 if it wants the memory), nonce or MAC
_REPLY = struct.Struct("!4sHBB32s")
HELLO_BYTES = _HELLO.size
REPLY_BYTES = _REPLY.size

_TYPE_HELLO, _TYPE_CHALLENGE, _TYPE_PROOF, _TYPE_ACCEPT, _TYPE_REFUSED = 1, 2, 3, 4, 5

REFUSED_VERSION, REFUSED_TOKEN, REFUSED_RUN, REFUSED_TAKEN, REFUSED_TLS, REFUSED_PLAIN = 1, 2, 3, 4, 5, 6
REFUSED_RANK = 7
_REFUSALS = {
    REFUSED_VERSION: "it speaks another protocol version (install the same smolcluster on both machines)",
    REFUSED_TOKEN: "the cluster tokens differ (copy the token of the first machine: smolcluster token new)",
    REFUSED_RUN: "it belongs to another run (start every machine with the same cluster file and options)",
    REFUSED_TAKEN: "it has this rank and lane already (is the same machine started twice?)",
    REFUSED_TLS: "it does not speak TLS and was spoken to in TLS (set cluster.tls alike on every machine)",
    REFUSED_PLAIN: "it speaks TLS only and was spoken to without (set cluster.tls alike on every machine)",
    REFUSED_RANK: "it is another rank than the one that was dialled (do all machines have the same address of rank 0?)",
}


class Refused(AuthFailed):
    """The listener refused, with a reason code. REFUSED_RUN may pass when the listener is not ready yet."""

    def __init__(self, address: str, reason: int) -> None:
        super().__init__(f"{address} refused the connection: {_REFUSALS.get(reason, f'reason {reason}')}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Transcript:
    """All that both proofs cover."""

    hello: Hello
    dialler_nonce: bytes
    listener_nonce: bytes
    fingerprint: bytes = NO_TLS

    def proof(self, token: bytes, role: str) -> bytes:
        """HMAC-SHA256 of `role` ("dialler", "listener" or "session") and everything both sides said; 32 bytes."""
        lane, run_id, who = self.hello.lane.encode(), self.hello.run_id.encode(), role.encode()
        covered = b"".join(
            [
                struct.pack("!B", len(who)),
                who,
                struct.pack("!H", PROTOCOL_VERSION),
                self.dialler_nonce,
                self.listener_nonce,
                struct.pack("!iHBB", self.hello.rank, self.hello.to, len(lane), len(run_id)),
                lane,
                run_id,
                self.fingerprint,
            ]
        )
        return hmac.new(token, covered, hashlib.sha256).digest()


def pack_hello(hello: Hello, nonce: bytes) -> bytes:
    """The dialler's first message.

    Raises:
        ValueError: lane or run id is longer than MAX_NAME_BYTES, or a rank that the field cannot hold.
    """
    lane, run_id = hello.lane.encode(), hello.run_id.encode()
    if max(len(lane), len(run_id)) > MAX_NAME_BYTES:
        raise ValueError(f"lane {hello.lane!r} or run id {hello.run_id!r} is longer than {MAX_NAME_BYTES} bytes")
    if not 0 <= hello.to <= MAX_RANK:
        raise ValueError(f"rank {hello.to} cannot be dialled: ranks are 0 to {MAX_RANK}")
    lengths = len(lane), len(run_id)
    fixed = _HELLO.pack(
        MAGIC, PROTOCOL_VERSION, _TYPE_HELLO, *lengths, hello.offers_memory, hello.to, hello.rank, nonce
    )
    return fixed + lane + run_id


def hello_tail_bytes(fixed: bytes) -> int:
    """How many bytes follow the fixed part of a HELLO.

    Raises:
        FrameError: not a HELLO, or a name too long.
        Refused: another protocol version.
    """
    magic, version, kind, lane_len, run_len, _, _, _, _ = _HELLO.unpack(fixed)
    if magic != MAGIC or kind != _TYPE_HELLO:
        raise FrameError("not a smolcluster handshake")
    if version != PROTOCOL_VERSION:
        raise Refused("this rank", REFUSED_VERSION)
    if max(lane_len, run_len) > MAX_NAME_BYTES:
        raise FrameError(f"handshake names of {lane_len} and {run_len} bytes, at most {MAX_NAME_BYTES} are allowed")
    return int(lane_len + run_len)


def unpack_hello(fixed: bytes, tail: bytes) -> tuple[Hello, bytes]:
    """The dialler's (hello, nonce). Call `hello_tail_bytes` first.

    Raises:
        FrameError: names that are not UTF-8.
    """
    _, _, _, lane_len, _, memory, to, rank, nonce = _HELLO.unpack(fixed)
    try:
        return Hello(rank, tail[:lane_len].decode(), tail[lane_len:].decode(), to, memory == 1), nonce
    except UnicodeDecodeError as exc:
        raise FrameError("handshake names are not UTF-8") from exc


def pack_challenge(nonce: bytes) -> bytes:
    """The listener's nonce."""
    return _REPLY.pack(MAGIC, PROTOCOL_VERSION, _TYPE_CHALLENGE, 0, nonce)


def pack_proof(mac: bytes) -> bytes:
    """The dialler's proof."""
    return _REPLY.pack(MAGIC, PROTOCOL_VERSION, _TYPE_PROOF, 0, mac)


def pack_accept(mac: bytes, wants_memory: bool = False) -> bytes:
    """The listener's proof, and whether an offer of shared memory is to follow."""
    return _REPLY.pack(MAGIC, PROTOCOL_VERSION, _TYPE_ACCEPT, wants_memory, mac)


def pack_refused(reason: int) -> bytes:
    """The listener's last word before it closes."""
    return _REPLY.pack(MAGIC, PROTOCOL_VERSION, _TYPE_REFUSED, reason, bytes(32))


def unpack_challenge(reply: bytes, address: str) -> bytes:
    """The listener's nonce. Raises FrameError or Refused."""
    return _unpack(reply, _TYPE_CHALLENGE, address)


def unpack_proof(reply: bytes) -> bytes:
    """The dialler's MAC. Raises FrameError."""
    return _unpack(reply, _TYPE_PROOF, "the dialler")


def check_accept(reply: bytes, address: str, expected: bytes) -> bool:
    """Check the listener's proof; returns whether it wants the shared memory that was offered.

    Raises:
        FrameError: not a handshake message.
        Refused: the listener refused.
        AuthFailed: the listener does not know the token.
    """
    if not hmac.compare_digest(_unpack(reply, _TYPE_ACCEPT, address), expected):
        raise AuthFailed(f"{address} does not know the cluster token: somebody else listens there")
    return bool(_REPLY.unpack(reply)[3] == 1)


def handshake_bytes(hello: Hello) -> tuple[int, int]:
    """How long a handshake that succeeds is: (from the dialler, from the listener)."""
    names = len(hello.lane.encode()) + len(hello.run_id.encode())
    return HELLO_BYTES + names + REPLY_BYTES, 2 * REPLY_BYTES


def proofs_equal(mac: bytes, expected: bytes) -> bool:
    """Compare two MACs in constant time."""
    return hmac.compare_digest(mac, expected)


def _unpack(reply: bytes, wanted: int, address: str) -> bytes:
    magic, version, kind, reason, value = _REPLY.unpack(reply)
    if magic != MAGIC:
        raise FrameError(f"{address} does not speak smolcluster's protocol (is another program on that port?)")
    if kind == _TYPE_REFUSED:
        raise Refused(address, reason)
    if version != PROTOCOL_VERSION:
        raise Refused(address, REFUSED_VERSION)
    if kind != wanted:
        raise FrameError(f"{address} sent handshake message {kind} where {wanted} belongs")
    return bytes(value)


def new_nonce() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(NONCE_BYTES)


def new_token() -> bytes:
    """A fresh cluster token."""
    return secrets.token_bytes(TOKEN_BYTES)


def user_folder() -> Path:
    """Where smolcluster keeps what is the user's: in the config folder of this system. It may not exist."""
    if sys.platform == "win32":
        base = Path(os.environ.get("APPDATA", Path.home() / "AppData" / "Roaming"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    return base / "smolcluster"


def token_path() -> Path:
    """Where the user's token lives."""
    return user_folder() / "token"


def load_token(file: Path | None = None) -> bytes:
    """The cluster token: `file` where one is named, else `SMOLCLUSTER_TOKEN`, else the user's config folder.

    Raises:
        ConfigError: there is none, it is unreadable or shorter than 16 characters, or others may read the file.
    """
    if file is None and (text := os.environ.get(TOKEN_VARIABLE)):
        return _checked(text, TOKEN_VARIABLE)
    path = file or token_path()
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"no cluster token: {path} cannot be read ({getattr(exc, 'strerror', None) or 'not text'}). Make one with: "
            "smolcluster token new, and copy it to the other machines"
        ) from exc
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"other users can read the cluster token {path}. Close it with: chmod 600 {path}")
    return _checked(text, str(path))


def save_token(token: bytes, path: Path | None = None) -> Path:
    """Write `token` as hex to `path` (default: the user's config folder), mode 0600; returns the path."""
    path = path or token_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # an older, wider mode would stay otherwise
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(token.hex() + "\n")
    return path


def _checked(text: str, source: str) -> bytes:
    text = text.strip()
    if len(text) < 16:
        raise ConfigError(f"the cluster token in {source} has {len(text)} characters, at least 16 are needed")
    return text.encode()
