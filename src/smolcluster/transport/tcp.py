"""TCP: authenticated connections between two processes. The only place where OSError becomes one of our errors."""

from __future__ import annotations

import contextlib
import logging
import random
import select
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from smolcluster.errors import (
    AuthFailed,
    ConfigError,
    ConnectFailed,
    ConnectionLost,
    FrameError,
    SmolError,
    TransportError,
)
from smolcluster.kinds import JsonObject
from smolcluster.transport import messages, security
from smolcluster.transport.admission import RefusalLog, Strangers
from smolcluster.transport.base import Channel, ControlLink, Ended, Hello, SocketState
from smolcluster.transport.security import NO_TLS, REFUSED_RUN, Refused, Transcript
from smolcluster.transport.tls import Identity, NotTls, TlsSocket, begins_tls, client_hello_bytes

if TYPE_CHECKING:
    from smolcluster.transport.shm import Segment

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT = 5.0  # seconds a stranger may hold a connection before it is authenticated (CONTRACT section 3)
# Connections that the system keeps until they are accepted. It drops what comes on top, and an honest rank then tries
# again after a second.
BACKLOG = 256
# Authenticated connections that nobody here has asked for yet: a few for each rank and group while all find each other.
MAX_UNCLAIMED = 512
# Seconds of one attempt to connect; the kernel sends a lost SYN again after one, and a new attempt does the same.
CONNECT_TIMEOUT = 1.0
# Seconds between looks whether the run has ended for which a handshake waits.
ENDED_SLICE = 0.25
# Seconds that a listener may refuse our run before we believe it: it may not have heard of the run yet.
OTHER_RUN_TIMEOUT = 5.0
CONTROL = "control"
# The first of these that the system lets this user set; loopback only.
LOOPBACK_CONGESTION = (b"reno", b"cubic")
Argument = TypeVar("Argument")
# Linux takes at most 1024 buffers in one sendmsg; more than 64 frames at once brings nothing.
MAX_SEND_BUFFERS = 64
_HAS_SENDMSG = hasattr(socket.socket, "sendmsg")  # not on Windows
# The largest buffer that is asked for: the system call takes a C int, and Linux doubles it.
MAX_BUFFER_BYTES = 1 << 30
MIN_BUFFER_BYTES = 64 << 10
# Linux's SO_TIMESTAMPNS, which Python does not name: recvmsg also says when the kernel had the bytes, as two int64.
_ARRIVAL_TIME = 35
_ARRIVAL_TIME_FORMAT = "=qq"
_HAS_ARRIVAL_TIME = sys.platform == "linux" and sys.maxsize > 2**32  # with 32 bits it looks different
# Of one packet: Ethernet 14, IP 20 or 40, TCP with time stamps 32.
_HEADER_BYTES = {socket.AF_INET: 66, socket.AF_INET6: 86}
_TCP_INFO_BYTES = 208  # up to and with tcpi_bytes_sent
_TLS_READ_BYTES = 4096  # more than a HELLO without TLS: left unread, it would reset what answers it


@dataclass(frozen=True, slots=True)
class TcpOptions:
    """Socket options. `patience`: seconds until unacknowledged control messages count as a lost peer.

    `buffer_bytes`: send and receive buffer, set before connect; None: the kernel tunes. The kernel may grant less.
    `tls`: encrypt everything; the other side must as well.
    `shared_memory`: between processes of one host, where both want it and neither has `tls`.
    """

    patience: float = 5.0
    buffer_bytes: int | None = None
    tls: bool = False
    shared_memory: bool = False


def parse_address(address: str) -> tuple[str, int]:
    """Split `tcp://host:port`; IPv6 hosts stand in brackets.

    Raises:
        ConfigError: anything else.
    """
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is not an address such as tcp://192.168.1.10:65432")
    return host.strip("[]"), int(port)


def format_address(host: str, port: int) -> str:
    """`tcp://host:port`."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class TcpChannel:
    """A non-blocking authenticated connection. See transport.base.Channel."""

    def __init__(self, sock: socket.socket, address: str, sent_bytes: int = 0, recv_bytes: int = 0) -> None:
        """`sent_bytes`, `recv_bytes`: what the handshake took."""
        sock.setblocking(False)
        self.sent_bytes = sent_bytes
        self.recv_bytes = recv_bytes
        self._sock = sock
        self._address = address
        self._error: SmolError | None = None

    def fileno(self) -> int:
        return self._sock.fileno()

    def wants(self, *, sending: bool) -> tuple[bool, bool]:
        return True, sending

    def due(self) -> float | None:
        return 0.0 if isinstance(self._sock, TlsSocket) and self._sock.holds_bytes() else None

    def try_send(self, buffers: Sequence[memoryview]) -> int:
        try:
            sent = self._sock.sendmsg(buffers[:MAX_SEND_BUFFERS]) if _HAS_SENDMSG else self._sock.send(buffers[0])
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as exc:
            raise self._lost(exc) from exc
        self.sent_bytes += sent
        return sent

    def try_recv_into(self, buffer: memoryview) -> int:
        try:
            received = self._sock.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as exc:
            raise self._lost(exc) from exc
        if received == 0 and len(buffer) > 0:
            raise self._lost(None)
        self.recv_bytes += received
        return received

    def socket_state(self) -> SocketState:
        return _socket_state(self._sock)

    def abort(self, error: SmolError) -> None:
        if self._error is None:
            self._error = error
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _lost(self, exc: OSError | None) -> SmolError:
        return self._error or ConnectionLost(f"{self._address} {_reason(exc)}")


class TcpControlLink:
    """JSON messages with MAC and sequence number; one reader thread. See transport.base.ControlLink."""

    # How often the reader looks whether it shall stop, and the writer whether its deadline passed.
    _TICK = 0.5

    def __init__(
        self,
        sock: socket.socket,
        session_key: bytes,
        *,
        is_dialler: bool,
        address: str,
        patience: float,
        sent_bytes: int = 0,
        recv_bytes: int = 0,
    ) -> None:
        # Not a time-out: with one, Python waits before each call, and then again for the interpreter. That is up to
        # 5 ms in a process that computes, and pings would measure it.
        sock.setblocking(False)
        if _HAS_ARRIVAL_TIME:
            sock.setsockopt(socket.SOL_SOCKET, _ARRIVAL_TIME, 1)
        self.sent_bytes = sent_bytes
        self.recv_bytes = recv_bytes
        self._sock = sock
        self._address = address
        self._patience = patience
        self._outgoing = messages.MessageCodec(session_key, from_dialler=is_dialler)
        self._incoming = messages.MessageCodec(session_key, from_dialler=not is_dialler)
        self._send_lock = threading.Lock()
        self._heard = time.monotonic()
        self._arrived = time.perf_counter()
        self._on_message: Callable[[JsonObject], None] | None = None
        self._on_close: Callable[[SmolError], None] | None = None
        self._partial = bytearray()
        self._closing = threading.Event()
        self._reader: threading.Thread | None = None

    def send(self, message: JsonObject) -> None:
        with self._send_lock:
            rest = memoryview(self._outgoing.pack(message))
            deadline = time.monotonic() + self._patience
            while rest:
                if self._closing.is_set():
                    raise ConnectionLost(f"the control link to {self._address} is closed")
                try:
                    sent = self._sock.send(rest)
                    self.sent_bytes += sent
                    rest = rest[sent:]
                except BlockingIOError:
                    if not self._writable() and time.monotonic() > deadline:
                        with contextlib.suppress(OSError):
                            self._sock.shutdown(socket.SHUT_RDWR)  # half a message is under way: nothing may follow it
                        raise ConnectionLost(
                            f"{self._address} reads no control messages for {self._patience:g} s"
                        ) from None
                except OSError as exc:
                    raise ConnectionLost(f"{self._address} {_reason(exc)}") from exc

    def receive(self, timeout: float) -> JsonObject | None:
        assert self._reader is None
        return self._next(time.monotonic() + timeout)

    def on_message(self, handler: Callable[[JsonObject], None]) -> None:
        assert self._reader is None
        self._on_message = handler
        self._reader = threading.Thread(target=self._read, name=f"control {self._address}", daemon=True)
        self._reader.start()

    def on_close(self, handler: Callable[[SmolError], None]) -> None:
        self._on_close = handler

    def last_heard(self) -> float:
        return self._heard

    def arrived_at(self) -> float:
        return self._arrived

    def socket_state(self) -> SocketState:
        return _socket_state(self._sock)

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(timeout=2.0)
        self._sock.close()

    def _writable(self) -> bool:
        """Wait for one tick at most until the system takes more bytes."""
        try:
            return _ready(self._sock, self._TICK, sending=True)
        except (OSError, ValueError) as exc:  # ValueError: closed by another thread meanwhile
            raise ConnectionLost(f"the control link to {self._address} is closed") from exc

    def _read(self) -> None:
        assert self._on_message is not None
        try:
            while not self._closing.is_set():
                message = self._next(time.monotonic() + self._TICK)
                if message is not None:
                    self._on_message(message)
        except SmolError as error:
            if not self._closing.is_set():
                if isinstance(error, FrameError):
                    logger.warning("control frame refused peer=%s reason=%s", self._address, error)
                if self._on_close is not None:
                    self._on_close(error)
        except Exception as exc:  # top of the thread: a link that went deaf must not look like a silent peer
            logger.exception("control message not handled peer=%s", self._address)
            if self._on_close is not None:
                self._on_close(SmolError(f"sent a control message that could not be handled here: {exc!r}"))

    def _next(self, deadline: float) -> JsonObject | None:
        """The next message, or None at the deadline; what has arrived of it until then is kept."""
        if not self._fill(messages.HEAD_BYTES, deadline):
            return None
        head = bytes(self._partial[: messages.HEAD_BYTES])
        end = messages.HEAD_BYTES + self._incoming.body_bytes(head)
        if not self._fill(end + messages.MAC_BYTES, deadline):
            return None
        body, mac = bytes(self._partial[messages.HEAD_BYTES : end]), bytes(self._partial[end:])
        self._partial.clear()
        return self._incoming.unpack(head, body, mac)

    def _fill(self, count: int, deadline: float) -> bool:
        while len(self._partial) < count:
            try:
                if not _ready(self._sock, max(0.0, deadline - time.monotonic()), sending=False):
                    return False
                piece, waited = _receive(self._sock, count - len(self._partial))
            except BlockingIOError:
                continue
            except (OSError, ValueError) as exc:  # ValueError: closed by another thread meanwhile
                raise ConnectionLost(f"{self._address} {_reason(exc if isinstance(exc, OSError) else None)}") from exc
            if not piece:
                raise ConnectionLost(f"{self._address} {_reason(None)}")
            self._heard, self._arrived = time.monotonic(), time.perf_counter() - waited
            self.recv_bytes += len(piece)
            self._partial += piece
        return True


class TcpListener:
    """Accepts connections, each authenticated in a short-lived thread of its own, so that none delays another."""

    def __init__(self, host: str, port: int, token: bytes, run_id: str, rank: int, options: TcpOptions) -> None:
        self._token = token
        self._rank = rank
        self._options = options
        self._identity = Identity() if options.tls else None
        self._run_ids = {run_id}
        self._ready = threading.Condition()
        self._channels: dict[tuple[int, str], Channel] = {}
        self._taken: set[tuple[int, str]] = set()
        self._links: list[tuple[Hello, ControlLink]] = []
        self._strangers = Strangers()
        self._closing = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if sys.platform != "win32":  # there it would let two programs share the port
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _set_buffers(self._sock, options)
            _warn_of_small_buffers(self._sock, options)
            self._sock.bind((host, port))
            self._sock.listen(BACKLOG)
        except OSError as exc:
            self._sock.close()
            raise ConfigError(
                f"cannot listen on {format_address(host, port)} ({exc.strerror or exc}). Use an address of this "
                "machine and a free port, and look whether this rank is started already"
            ) from exc
        self.address = format_address(host, self._sock.getsockname()[1])
        self._refusals = RefusalLog(self.address)
        self._sock.settimeout(0.5)
        self._thread = threading.Thread(target=self._accept, name=f"listener {self.address}", daemon=True)
        self._thread.start()

    def allow_run(self, run_id: str) -> None:
        """Accept connections of this run too."""
        with self._ready:
            self._run_ids.add(run_id)

    def accept_channel(self, rank: int, lane: str, timeout: float) -> Channel:
        key = (rank, lane)
        with self._ready:
            self._ready.wait_for(lambda: key in self._channels or self._closing.is_set(), timeout)
            if key not in self._channels:
                raise ConnectFailed(
                    f"rank {rank} did not open its {lane} connection to {self.address} within {timeout:g} s"
                )
            return self._channels.pop(key)

    def accept_control(self, timeout: float) -> tuple[Hello, ControlLink]:
        with self._ready:
            self._ready.wait_for(lambda: bool(self._links) or self._closing.is_set(), timeout)
            if not self._links:
                raise ConnectFailed(f"nobody opened a control connection to {self.address} within {timeout:g} s")
            return self._links.pop(0)

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes accept() on Linux; elsewhere its timeout does
        self._thread.join(timeout=2.0)
        self._sock.close()
        with self._ready:
            waiting, self._channels = list(self._channels.values()), {}
            links, self._links = self._links, []
            self._ready.notify_all()
        self._strangers.close()
        self._refusals.look(at_end=True)
        for channel in waiting:
            channel.abort(ConnectionLost("the listener is closed"))
        for _, link in links:
            link.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            self._refusals.look()
            try:
                sock, peer = self._sock.accept()
                if self._identity is not None:
                    sock = TlsSocket(sock, self._identity)  # shakes hands in the thread
            except TimeoutError:
                continue
            except OSError as exc:
                if self._closing.is_set():
                    return
                # Out of descriptors, or the stranger hung up before we took it: neither may end the listener.
                self._refusals.refused("unknown", f"accept failed ({exc.strerror or exc})")
                self._closing.wait(0.1)
                continue
            if peer:  # macOS has no address of somebody who has hung up already
                self._admit(sock, peer[0], format_address(peer[0], peer[1]))
            else:
                sock.close()

    def _admit(self, sock: socket.socket, host: str, address: str) -> None:
        name = f"handshake {address}"
        thread = threading.Thread(target=self._greet, args=(sock, address), name=name, daemon=True)
        try:
            self._strangers.add(thread, sock, host)
        except ConnectionLost as error:
            self._refuse(sock, address, error)
            return
        try:
            thread.start()
        except RuntimeError as exc:  # the system gives no more threads
            self._strangers.remove(thread)
            self._refuse(sock, address, exc)

    def _refuse(self, sock: socket.socket, address: str, reason: object) -> None:
        self._refusals.refused(address, reason)
        sock.close()

    def _greet(self, sock: socket.socket, address: str) -> None:
        try:
            hello, key, segment = self._authenticate(sock, address)
        except (SmolError, OSError) as exc:
            self._refuse(sock, address, self._strangers.evicted() or exc)
            return
        finally:
            self._strangers.remove(threading.current_thread())
        _log_buffers(sock, self._options, f"rank {hello.rank}", hello.lane)
        recv_bytes, sent_bytes = security.handshake_bytes(hello)
        with self._ready:
            if self._closing.is_set():
                sock.close()
            elif len(self._links) + len(self._channels) >= MAX_UNCLAIMED:
                self._taken.discard((hello.rank, hello.lane))
                self._refuse(sock, address, f"{MAX_UNCLAIMED} connections wait here already")
            elif hello.lane == CONTROL:
                link = TcpControlLink(
                    sock, key, is_dialler=False, address=address, patience=self._options.patience,
                    sent_bytes=sent_bytes, recv_bytes=recv_bytes,
                )  # fmt: skip
                self._links.append((hello, link))
            else:
                channel = TcpChannel(sock, address, sent_bytes, recv_bytes)
                self._channels[(hello.rank, hello.lane)] = _with_memory(channel, segment, is_dialler=False)
            self._ready.notify_all()

    def _authenticate(self, sock: socket.socket, address: str) -> tuple[Hello, bytes, Segment | None]:
        stream = _Deadline(sock, time.monotonic() + HANDSHAKE_TIMEOUT, address)
        try:
            fingerprint = _accept_tls(stream, sock) if isinstance(sock, TlsSocket) else NO_TLS
            fixed = stream.read(security.HELLO_BYTES)
            if self._identity is None and begins_tls(fixed):
                stream.read(client_hello_bytes(fixed) - len(fixed))  # unread, it would reset what answers it
                raise Refused("this rank", security.REFUSED_TLS)
            hello, dialler_nonce = security.unpack_hello(fixed, stream.read(security.hello_tail_bytes(fixed)))
            nonce = security.new_nonce()
            stream.write(security.pack_challenge(nonce))
            transcript = Transcript(hello, dialler_nonce, nonce, fingerprint)
            proof = security.unpack_proof(stream.read(security.REPLY_BYTES))
            if not security.proofs_equal(proof, transcript.proof(self._token, "dialler")):
                raise Refused("this rank", security.REFUSED_TOKEN)
            self._strangers.proved()
            # Only somebody who knows the token learns which runs and ranks are here.
            slot = (hello.rank, hello.lane)
            with self._ready:
                if hello.run_id not in self._run_ids:
                    raise Refused("this rank", security.REFUSED_RUN)
                if hello.to != self._rank:
                    raise Refused("this rank", security.REFUSED_RANK)
                if slot in self._taken:
                    raise Refused("this rank", security.REFUSED_TAKEN)
                if hello.lane != CONTROL:  # doubled control links are told apart by their "join"
                    self._taken.add(slot)  # before the answer: of two that knock at once one is let in
            try:
                _set_options(sock, self._options, hello.lane)
                wants_memory = hello.offers_memory and _can_share(sock, self._options, hello.lane)
                stream.write(security.pack_accept(transcript.proof(self._token, "listener"), wants_memory))
                key = transcript.proof(self._token, "session")
                segment = _answer(stream, key) if wants_memory else None
            except (SmolError, OSError):
                with self._ready:
                    self._taken.discard(slot)
                raise
        except Refused as refused:
            with contextlib.suppress(SmolError):
                stream.write(security.pack_refused(refused.reason))
            raise
        return hello, key, segment


class TcpNetwork:
    """How this process listens and dials. Implements transport.base.Network."""

    def __init__(self, token: bytes, options: TcpOptions | None = None) -> None:
        self._token = token
        self._options = options or TcpOptions()

    def dial_channel(self, address: str, hello: Hello, timeout: float, ended: Ended | None = None) -> Channel:
        """Connect and authenticate, trying again until `timeout`; see `dial`."""
        sock, _, segment = self._dial(address, hello, timeout, ended)
        channel = TcpChannel(sock, address, *security.handshake_bytes(hello))
        return _with_memory(channel, segment, is_dialler=True)

    def dial_control(self, address: str, hello: Hello, timeout: float, ended: Ended | None = None) -> ControlLink:
        """Connect and authenticate, trying again until `timeout`; see `dial`."""
        sock, key, _ = self._dial(address, hello, timeout, ended)
        sent_bytes, recv_bytes = security.handshake_bytes(hello)
        return TcpControlLink(
            sock, key, is_dialler=True, address=address, patience=self._options.patience,
            sent_bytes=sent_bytes, recv_bytes=recv_bytes,
        )  # fmt: skip

    def _dial(
        self, address: str, hello: Hello, timeout: float, ended: Ended | None
    ) -> tuple[socket.socket, bytes, Segment | None]:
        dialled = dial(address, hello, self._token, timeout, self._options, ended)
        _log_buffers(dialled[0], self._options, address, hello.lane)
        return dialled


def listen(
    host: str, port: int, *, token: bytes, run_id: str, rank: int = 0, options: TcpOptions | None = None
) -> TcpListener:
    """Listen on one address of this machine, on behalf of `rank`; port 0 takes a free one.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken.
    """
    return TcpListener(host, port, token, run_id, rank, options or TcpOptions())


def dial(
    address: str, hello: Hello, token: bytes, timeout: float, options: TcpOptions, ended: Ended | None = None
) -> tuple[socket.socket, bytes, Segment | None]:
    """Connect to a listener and authenticate both ways.

    Tries again, with growing pauses and jitter, while nobody listens there or the listener does not know the run yet,
    and `ended()` gives no reason to stop.

    Returns:
        (connected socket, session key for control messages, memory shared with the listener if there is).

    Raises:
        ConnectFailed: not connected within `timeout` seconds.
        AuthFailed: wrong token, protocol version or run.
    """
    deadline = time.monotonic() + timeout
    other_run_deadline: float | None = None
    pause = 0.02
    while True:
        if ended is not None and (reason := ended()) is not None:
            raise reason
        try:
            return _dial_once(address, hello, token, deadline, options, ended)
        except Refused as refused:
            if refused.reason != REFUSED_RUN:
                raise
            other_run_deadline = other_run_deadline or min(deadline, time.monotonic() + OTHER_RUN_TIMEOUT)
            if time.monotonic() + pause >= other_run_deadline:
                raise
        except AuthFailed:
            raise
        except (OSError, TransportError) as exc:
            if time.monotonic() + pause >= deadline:
                cause = exc if isinstance(exc, TransportError) else _reason(exc)
                raise ConnectFailed(
                    f"could not reach {address} within {timeout:g} s ({cause}). Is it started, and is the port open?"
                ) from exc
        time.sleep(pause * random.uniform(0.5, 1.0))  # jitter: ranks that started together do not knock together
        pause = min(pause * 1.5, 1.0)


def _dial_once(
    address: str, hello: Hello, token: bytes, deadline: float, options: TcpOptions, ended: Ended | None
) -> tuple[socket.socket, bytes, Segment | None]:
    host, port = parse_address(address)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        _set_buffers(sock, options)
        remaining = max(0.05, deadline - time.monotonic())
        sock.settimeout(min(remaining, CONNECT_TIMEOUT))
        sock.connect((host, port))
        if options.tls:
            sock = TlsSocket(sock, None)
        stream = _Deadline(sock, time.monotonic() + min(remaining, HANDSHAKE_TIMEOUT), address, ended)
        fingerprint = _dial_tls(stream, address) if isinstance(sock, TlsSocket) else NO_TLS
        hello = replace(hello, offers_memory=_can_share(sock, options, hello.lane))
        transcript, wants_memory = _prove(stream, hello, token, address, fingerprint)
        key = transcript.proof(token, "session")
        segment = _offer(stream, hello.lane, key) if wants_memory else None
        _set_options(sock, options, hello.lane)
    except Refused as refused:
        sock.close()
        if options.tls and refused.reason == security.REFUSED_TOKEN:
            raise AuthFailed(f"{refused}; or somebody on the way decrypts and encrypts again") from refused
        raise
    except BaseException:
        sock.close()
        raise
    return sock, key, segment


def _prove(stream: _Deadline, hello: Hello, token: bytes, address: str, fingerprint: bytes) -> tuple[Transcript, bool]:
    """The dialler's side of the handshake; returns the transcript, and whether the listener wants to share memory."""
    nonce = security.new_nonce()
    stream.write(security.pack_hello(hello, nonce))
    challenge = security.unpack_challenge(stream.read(security.REPLY_BYTES), address)
    transcript = Transcript(hello, nonce, challenge, fingerprint)
    stream.write(security.pack_proof(transcript.proof(token, "dialler")))
    accept = stream.read(security.REPLY_BYTES)
    wants_memory = security.check_accept(accept, address, transcript.proof(token, "listener"))
    return transcript, hello.offers_memory and wants_memory


def _can_share(sock: socket.socket, options: TcpOptions, lane: str) -> bool:
    """Whether this side would share memory: with a process at its own address.

    Two network namespaces of one machine have different addresses; then it is their link that is wanted.
    """
    return (
        options.shared_memory
        and not options.tls
        and lane != CONTROL
        and sys.platform != "win32"
        and bool(sock.getsockname()[0] == sock.getpeername()[0])
    )


def _offer(stream: _Deadline, lane: str, key: bytes) -> Segment | None:
    from smolcluster.transport import shm  # imports numpy, which a command that opens no connection does not need

    return shm.offer(stream, shm.BULK_RING_BYTES if lane.startswith("bulk:") else shm.MESSAGE_RING_BYTES, key)


def _answer(stream: _Deadline, key: bytes) -> Segment | None:
    from smolcluster.transport import shm

    return shm.answer(stream, key)


def _with_memory(channel: TcpChannel, segment: Segment | None, *, is_dialler: bool) -> Channel:
    if segment is None:
        return channel
    from smolcluster.transport import shm

    return shm.SharedMemoryChannel(channel, segment, is_dialler=is_dialler)


class _Deadline:
    """Blocking reads and writes of a handshake, all before one deadline."""

    def __init__(self, sock: socket.socket, deadline: float, address: str, ended: Ended | None = None) -> None:
        self._sock = sock
        self._deadline = deadline
        self._address = address
        self._ended = ended

    def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._bounded(self._sock.recv, count - len(data))
            if not piece:
                raise ConnectionLost(f"{self._address} closed the connection during the handshake")
            data += piece
        return bytes(data)

    def write(self, data: bytes) -> None:
        self._bounded(self._sock.sendall, data)

    def start_tls(self) -> bytes:
        """Shake hands; the fingerprint of the listener's certificate. Raises NotTls too."""
        assert isinstance(self._sock, TlsSocket)
        while not (fingerprint := self._bounded(self._sock.shake_hands, _TLS_READ_BYTES)):
            pass
        return fingerprint

    def _bounded(self, call: Callable[[Argument], bytes | None], argument: Argument) -> bytes:
        while True:
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                raise ConnectionLost(f"{self._address} did not finish the handshake in time")
            if self._ended is not None and (reason := self._ended()) is not None:
                raise reason
            # A call that timed out may be made again: it has read nothing, and a new connection takes all that we send.
            self._sock.settimeout(remaining if self._ended is None else min(remaining, ENDED_SLICE))
            try:
                return call(argument) or b""
            except TimeoutError:
                continue
            except NotTls:
                raise
            except OSError as exc:
                raise ConnectionLost(f"{self._address} {_reason(exc)}") from exc


def _accept_tls(stream: _Deadline, sock: TlsSocket) -> bytes:
    try:
        return stream.start_tls()
    except NotTls as exc:
        with contextlib.suppress(OSError):
            sock.send_in_the_clear(security.pack_refused(security.REFUSED_PLAIN))
        if security.MAGIC.startswith(exc.said[: len(security.MAGIC)]):
            raise Refused("this rank", security.REFUSED_PLAIN) from exc
        raise FrameError("not a TLS handshake") from exc


def _dial_tls(stream: _Deadline, address: str) -> bytes:
    try:
        return stream.start_tls()
    except NotTls as exc:
        if security.MAGIC.startswith(exc.said[: len(security.MAGIC)]):
            raise Refused(address, security.REFUSED_TLS) from exc
        raise FrameError(f"{address} does not speak TLS (is another program on that port?)") from exc


def _receive(sock: socket.socket, count: int) -> tuple[bytes, float]:
    """Up to `count` bytes, and the seconds since the kernel had the last of them; 0.0 where it does not say."""
    if not _HAS_ARRIVAL_TIME:
        return sock.recv(count), 0.0
    piece, notes, _, _ = sock.recvmsg(count, socket.CMSG_SPACE(struct.calcsize(_ARRIVAL_TIME_FORMAT)))
    for level, kind, stamp in notes:
        if (level, kind) == (socket.SOL_SOCKET, _ARRIVAL_TIME):
            seconds, nanoseconds = struct.unpack(_ARRIVAL_TIME_FORMAT, stamp)
            return piece, max(0.0, time.time() - seconds - nanoseconds * 1e-9)  # the clock may have been set back
    return piece, 0.0


def _ready(sock: socket.socket, seconds: float, *, sending: bool) -> bool:
    """Wait for at most `seconds` until the socket can be read (or written); False: it cannot yet."""
    if not sending and isinstance(sock, TlsSocket) and sock.holds_bytes():
        return True
    if not hasattr(select, "poll"):  # Windows
        readable, writable, _ = select.select([] if sending else [sock], [sock] if sending else [], [], seconds)
        return bool(readable or writable)
    poll = select.poll()  # knows descriptors above 1023, which a server with many clients has
    poll.register(sock, select.POLLOUT if sending else select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _set_buffers(sock: socket.socket, options: TcpOptions) -> None:
    """Ask for the buffers; before connect, because the window scale is agreed on there."""
    if options.buffer_bytes is None:
        return
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        nbytes = min(options.buffer_bytes, MAX_BUFFER_BYTES)
        while nbytes >= MIN_BUFFER_BYTES:
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, nbytes)
                break
            except OSError:  # macOS refuses what is above its limit; Linux and Windows take as much as is allowed
                nbytes //= 2


def _granted(sock: socket.socket) -> tuple[int, int]:
    """(send, receive) buffer in bytes of payload. Linux reports twice that: it counts its own bookkeeping."""
    share = 2 if sys.platform.startswith("linux") else 1
    sent, received = (sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_SNDBUF, socket.SO_RCVBUF))
    return sent // share, received // share


def _log_buffers(sock: socket.socket, options: TcpOptions, peer: str, lane: str) -> None:
    with contextlib.suppress(OSError):  # gone already: whoever uses it hears of that
        asked = "auto" if options.buffer_bytes is None else options.buffer_bytes
        sent, received = _granted(sock)
        logger.info("socket buffers peer=%s lane=%s asked=%s sent=%d recv=%d", peer, lane, asked, sent, received)


def _warn_of_small_buffers(sock: socket.socket, options: TcpOptions) -> None:
    """Once for a listener, which every rank has: the limit is the machine's, the same for all its connections."""
    asked, granted = options.buffer_bytes, min(_granted(sock))
    if asked is None or granted >= 0.9 * asked:
        return
    keys = ("net.core.wmem_max", "net.core.rmem_max") if sys.platform.startswith("linux") else ("kern.ipc.maxsockbuf",)
    change = "" if sys.platform == "win32" else f": sysctl -w {' '.join(f'{key}={asked}' for key in keys)}"
    logger.warning(
        "socket buffers smaller than asked asked=%d granted=%d. Raise the system's limit%s, or leave "
        "cluster.buffer_size out: the kernel then tunes them", asked, granted, change,
    )  # fmt: skip


def _socket_state(sock: socket.socket) -> SocketState:
    """See SocketState; of a closed socket nothing is known."""
    try:
        buffer_bytes = _granted(sock)[0]
    except OSError:
        return SocketState(0, None, None)
    return SocketState(_unacknowledged_bytes(sock), buffer_bytes, _wire_bytes(sock))


def _unacknowledged_bytes(sock: socket.socket) -> int:
    if sys.platform == "linux":
        import fcntl
        import termios

        with contextlib.suppress(OSError, ValueError):  # ValueError: closed by another thread meanwhile
            return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return 0


def _wire_bytes(sock: socket.socket) -> int | None:
    """Bytes on the wire of both directions, from Linux's `struct tcp_info`; None elsewhere, or before Linux 4.19."""
    if sys.platform == "linux" and sock.family in _HEADER_BYTES:
        info = b""
        with contextlib.suppress(OSError):
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        if len(info) == _TCP_INFO_BYTES:
            received, segments_out, segments_in = struct.unpack_from("=QII", info, 128)
            sent = struct.unpack_from("=Q", info, 200)[0]  # with what was sent again
            return int(sent + received + _HEADER_BYTES[sock.family] * (segments_out + segments_in))
    return None


def _set_options(sock: socket.socket, options: TcpOptions, lane: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Control links only, which are always read: a peer that computes may leave bulk bytes unread for much longer than
    # the patience, and Linux counts a closed window too. Whether it lives, its heartbeats say.
    if lane == CONTROL and hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(options.patience * 1000))
    if hasattr(socket, "TCP_CONGESTION") and sock.getpeername()[0] in ("127.0.0.1", "::1"):
        # BBR, some kernels' default, halves the speed of loopback. Cubic leaves its slow start early: 4 ranks on 2
        # cores, who want to send much in each turn, take 1.1 to 1.4 times as long for 64 MiB with it as with Reno.
        for name in LOOPBACK_CONGESTION:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
                break
            except OSError:
                continue


def _reason(exc: OSError | None) -> str:
    if exc is None:
        return "closed the connection"
    if isinstance(exc, ssl.SSLError):
        return f"broke the rules of TLS ({exc.reason})"
    return f"is gone ({exc.strerror or exc})"
