"""TLS 1.3 under the handshake of security.py: what crosses the wire is encrypted, and nobody can sit in between.

No certificate authority and no host names. Each listener makes a certificate of its own when it starts. Whoever dials
does not check it; both sides put its SHA-256 into the transcript that the token's MACs cover. A man in the middle has
another certificate, so the two sides disagree about it and both proofs fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from smolcluster.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

RECORD_BYTES = 1 << 14  # the most that TLS encrypts at once
# What is sealed, and what is read, at once. Larger pieces are slower: malloc then asks the system for each of them.
CHUNK_BYTES = 1 << 16
_ALERT, _HANDSHAKE = 21, 22  # the types of record that a conversation may begin with


class NotTls(OSError):
    """The other side said something that is not TLS; `said` is its beginning."""

    def __init__(self, said: bytes) -> None:
        super().__init__("what it says is not TLS")
        self.said = said


def begins_tls(said: bytes) -> bool:
    """Whether bytes from a stranger (at least one) are the beginning of a TLS conversation."""
    return said[0] in (_ALERT, _HANDSHAKE) and said[1:2] in (b"", b"\x03")


def client_hello_bytes(said: bytes) -> int:
    """How long the TLS record is that begins with `said` (at least 5 bytes)."""
    return 5 + int.from_bytes(said[3:5], "big")


class Identity:
    """A listener's key and certificate, made fresh; they end with the process.

    Attributes:
        context: for the accepted connections.
        fingerprint: SHA-256 of the certificate, 32 bytes.
    """

    def __init__(self) -> None:
        """Make them.

        Raises:
            ConfigError: the package that makes certificates is not installed.
        """
        certificate, key, password = _self_signed()
        self.fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode())).digest()
        self.context = _context(ssl.PROTOCOL_TLS_SERVER)
        self.context.num_tickets = 0  # nothing is resumed, and nothing is sent that the other side does not wait for
        with _as_file(certificate + key) as file:  # OpenSSL takes them from a file only; nobody keeps the password
            self.context.load_cert_chain(file, password=password)


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """The path of a file with `data` that nobody else may read, for as long as it takes."""
    if sys.platform == "linux":
        with os.fdopen(os.memfd_create("smolcluster"), "wb") as memory:  # nothing is left after kill -9
            memory.write(data)
            memory.flush()
            yield f"/proc/self/fd/{memory.fileno()}"
    else:
        with tempfile.TemporaryDirectory(prefix="smolcluster-") as folder:
            file = Path(folder, "identity.pem")
            file.write_bytes(data)
            yield str(file)


class TlsSocket(socket.socket):
    """A connected TCP socket whose bytes are encrypted. Takes the place of the one that it is made from.

    Non-blocking use as of a plain socket, with two differences. After `send` or `sendmsg` raised BlockingIOError, bytes
    that are encrypted already wait here: the next call must offer the same bytes again, sends those, and returns how
    many they were. And decrypted bytes may wait here that `poll` does not know of: `holds_bytes`.

    The bytes pass through memory (ssl.MemoryBIO) instead of ssl.SSLSocket: that one goes on in the clear once another
    thread has shut it down, and asks the system twice for each 16 KiB.
    """

    def __init__(self, sock: socket.socket, identity: Identity | None) -> None:
        """`identity`: the listener's, on its side; None: this side has dialled, and checks no certificate."""
        timeout = sock.gettimeout()
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.settimeout(timeout)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        context = _context(ssl.PROTOCOL_TLS_CLIENT) if identity is None else identity.context
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=identity is not None)
        self._identity = identity
        self._lock = threading.Lock()  # OpenSSL's object is not made for two threads; one may read while another sends
        self._heard = False
        self._holds = False
        self._notes: list[Any] = []  # the ancillary data of the last read
        self._scratch = memoryview(bytearray(CHUNK_BYTES))
        self._sealed = memoryview(b"")  # encrypted, and not yet taken by the system
        self._sealed_bytes = 0  # what of the caller's bytes that is

    def holds_bytes(self) -> bool:
        """Whether bytes may be read without waiting for the system."""
        return self._holds

    def shake_hands(self, limit: int) -> bytes:
        """Go on with the TLS handshake: one read (of at most `limit` bytes) or one write.

        Returns:
            SHA-256 of the listener's certificate once the handshake is complete, 32 bytes; empty before.

        Raises:
            NotTls: the other side does not speak TLS.
            OSError: the handshake failed, or the socket did.
        """
        try:
            self._tls.do_handshake()
            is_complete = True
        except ssl.SSLWantReadError:
            is_complete = False
        except ssl.SSLError:
            with contextlib.suppress(OSError):
                super().send(self._outgoing.read())  # the alert that says why
            raise
        if self._outgoing.pending:
            super().sendall(self._outgoing.read())
        elif not is_complete:
            said = super().recv(limit)
            if not said:
                raise ConnectionAbortedError("connection closed during the TLS handshake")
            if not self._heard and not begins_tls(said):
                raise NotTls(said)
            self._heard = True
            self._incoming.write(said)
        if not is_complete:
            return b""
        if self._identity is not None:
            return self._identity.fingerprint
        return hashlib.sha256(self._tls.getpeercert(binary_form=True) or b"").digest()

    def send_in_the_clear(self, words: bytes) -> None:
        """Tell somebody who does not speak TLS. Before the handshake only."""
        assert not self._heard
        super().sendall(words)

    # ---- what of socket.socket this package uses

    def send(self, data: Buffer, flags: int = 0, /) -> int:
        return self.sendmsg([data])

    def sendmsg(
        self, buffers: Iterable[Buffer], ancdata: Iterable[Any] = (), flags: int = 0, address: Any = None, /
    ) -> int:
        if not self._sealed:
            with self._lock:
                self._sealed_bytes = self._seal(buffers)
                self._sealed = memoryview(self._outgoing.read())
        while self._sealed:
            self._sealed = self._sealed[super().send(self._sealed) :]
        return self._sealed_bytes

    def sendall(self, data: Buffer, flags: int = 0, /) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self.send(rest) :]

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer)
        return self._read(view[:nbytes] if nbytes else view, 0)

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        return self.recvmsg(bufsize)[0]

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> tuple[bytes, list[Any], int, Any]:
        """The notes are those of the last bytes that came from the system."""
        piece = bytearray(min(bufsize, RECORD_BYTES))
        count = self._read(memoryview(piece), ancbufsize)
        return bytes(piece[:count]), self._notes, 0, None

    def _seal(self, buffers: Iterable[Buffer]) -> int:
        """Encrypt the beginning of `buffers`; returns how many bytes that are."""
        sealed = 0
        for buffer in buffers:
            rest = memoryview(buffer)
            while rest:
                if sealed >= CHUNK_BYTES:
                    return sealed
                count = self._tls.write(rest[:RECORD_BYTES])
                sealed += count
                rest = rest[count:]
        return sealed

    def _read(self, view: memoryview, note_bytes: int) -> int:
        while True:
            try:
                with self._lock:
                    return cast(int, self._tls.read(len(view), view))  # typeshed knows only the form without a buffer
            except ssl.SSLWantReadError:
                self._holds = False
            count = self._read_sealed(note_bytes)
            if count == 0:
                return 0  # without TLS's farewell: a frame knows its own length, so nothing can be cut off unseen
            with self._lock:
                self._incoming.write(self._scratch[:count])
            self._holds = True

    def _read_sealed(self, note_bytes: int) -> int:
        if note_bytes == 0:
            return super().recv_into(self._scratch)
        count, self._notes, _, _ = super().recvmsg_into([self._scratch], note_bytes)
        return count


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _self_signed() -> tuple[bytes, bytes, bytes]:
    """A certificate (PEM), its key (PEM, encrypted), and the password of the key."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
    except ImportError as exc:
        raise ConfigError(
            'cluster.tls needs the package cryptography. Install it: pip install "smolcluster[tls]"'
        ) from exc
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "smolcluster")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2000, 1, 1))  # nobody looks at the dates, and clocks differ
        .not_valid_after(datetime(2100, 1, 1))
        .sign(key, hashes.SHA256())
    )
    password = secrets.token_hex(16).encode()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    return certificate.public_bytes(Encoding.PEM), private, password
