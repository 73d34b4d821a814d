"""What the layers above know of a connection: Channel (bulk bytes), ControlLink (JSON messages), Listener.

Two implementations, chosen by the address scheme: `tcp://host:port` and `inproc://name`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from smolcluster.errors import SmolError
from smolcluster.kinds import JsonObject

# Asked between attempts: the reason to give up, None to go on.
Ended: TypeAlias = "Callable[[], SmolError | None]"


@dataclass(frozen=True, slots=True)
class Hello:
    """What the dialling side says of itself, proved by the handshake.

    Attributes:
        rank: the dialler's rank, or -1 while it has none.
        lane: what the connection is for: "control", "bulk:<group>" or "p2p:<group>".
        run_id: the run it belongs to. A process of an earlier run is refused by it.
        to: the rank that is dialled. Another one refuses, so that nobody on the way can pass ranks off as each other.
        offers_memory: the dialler would share memory with the listener (shm.py). Not proved: whoever changes it on the
            way breaks this connection or slows it down, as he can without.
    """

    rank: int
    lane: str
    run_id: str
    to: int = 0
    offers_memory: bool = False


@dataclass(frozen=True, slots=True)
class SocketState:
    """What the system says of one connection.

    Attributes:
        unacknowledged_bytes: taken by the system and not yet confirmed by the other side; 0 where it does not tell
            (all but Linux).
        buffer_bytes: how much the system takes before it would block; None: there is no socket.
        wire_bytes: both directions, with headers, acknowledgements and what was sent again: what a network card
            counts that sends one packet at a time. None where the system does not tell (all but Linux).
    """

    unacknowledged_bytes: int
    buffer_bytes: int | None
    wire_bytes: int | None


class Channel(Protocol):
    """A non-blocking byte stream to one peer. Has no thread: a communicator's loop drives it.

    Attributes:
        sent_bytes: taken by the system so far, the handshake's included.
        recv_bytes: received so far, the handshake's included.
    """

    @property
    def sent_bytes(self) -> int: ...
    @property
    def recv_bytes(self) -> int: ...

    def socket_state(self) -> SocketState:
        """What the system says of it now; from any thread."""
        ...

    def fileno(self) -> int:
        """The descriptor to poll."""
        ...

    def wants(self, *, sending: bool) -> tuple[bool, bool]:
        """Whether to poll for (reading, writing); `sending`: bytes wait to be sent. TLS may want it crosswise."""
        ...

    def due(self) -> float | None:
        """`time.monotonic()` at which bytes held back (by TLS or a test hook) can be read; None: nothing held."""
        ...

    def try_send(self, buffers: Sequence[memoryview]) -> int:
        """Send from the front of `buffers`; returns the bytes taken, 0 if it would block.

        Raises:
            ConnectionLost: the other side is gone.
        """
        ...

    def try_recv_into(self, buffer: memoryview) -> int:
        """Receive up to len(buffer) bytes; returns the bytes received, 0 if it would block.

        Raises:
            ConnectionLost: the other side closed the connection or is gone.
        """
        ...

    def abort(self, error: SmolError) -> None:
        """Close at once, from any thread. Later calls raise `error`."""
        ...


class ControlLink(Protocol):
    """JSON messages to one peer on a connection of their own, so that bulk bytes never queue before heartbeats.

    `sent_bytes` and `recv_bytes`: as a Channel's.
    """

    @property
    def sent_bytes(self) -> int: ...
    @property
    def recv_bytes(self) -> int: ...

    def socket_state(self) -> SocketState:
        """What the system says of it now; from any thread."""
        ...

    def send(self, message: JsonObject) -> None:
        """Send one message, from any thread. Blocks at most `patience` seconds.

        Raises:
            ConnectionLost: the other side is gone or does not read.
        """
        ...

    def receive(self, timeout: float) -> JsonObject | None:
        """Wait for the next message on the caller's thread; None: nothing complete came. Only before `on_message`.

        Raises:
            ConnectionLost: the other side is gone.
            FrameError: it sent something that is not a message.
        """
        ...

    def on_message(self, handler: Callable[[JsonObject], None]) -> None:
        """Deliver messages, in order, on the link's own thread. Starts the delivery; call once."""
        ...

    def on_close(self, handler: Callable[[SmolError], None]) -> None:
        """Called once, on the link's thread, when the other side is gone. Set before `on_message`."""
        ...

    def last_heard(self) -> float:
        """`time.monotonic()` at which the last byte arrived."""
        ...

    def arrived_at(self) -> float:
        """`time.perf_counter()` at which the message that is being handled arrived. On the link's own thread.

        On Linux that is when the kernel had it: how long this process then took to read it does not count.
        """
        ...

    def close(self) -> None:
        """Close without an error on this side."""
        ...


class Listener(Protocol):
    """Accepts authenticated connections and hands them out by (rank, lane)."""

    address: str

    def allow_run(self, run_id: str) -> None:
        """Accept connections of this run too."""
        ...

    def accept_channel(self, rank: int, lane: str, timeout: float) -> Channel:
        """Wait for the authenticated connection of `rank` for `lane`.

        Raises:
            ConnectFailed: it did not come within `timeout` seconds.
        """
        ...

    def accept_control(self, timeout: float) -> tuple[Hello, ControlLink]:
        """Wait for the next authenticated control connection.

        Raises:
            ConnectFailed: none came within `timeout` seconds.
        """
        ...

    def close(self) -> None:
        """Stop listening. Connections that were handed out stay open."""
        ...


class Network(Protocol):
    """How a process reaches others; one per address scheme."""

    def dial_channel(self, address: str, hello: Hello, timeout: float, ended: Ended | None = None) -> Channel:
        """Connect and authenticate a bulk channel, trying again until `timeout` seconds or `ended()` says why not.

        Raises:
            ConnectFailed: nobody answered in time.
            AuthFailed: wrong token, version or run.
            SmolError: what `ended` returned.
        """
        ...

    def dial_control(self, address: str, hello: Hello, timeout: float, ended: Ended | None = None) -> ControlLink:
        """Connect and authenticate a control link; as `dial_channel`."""
        ...
