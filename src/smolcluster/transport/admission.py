"""What a listener allows to those who have not proved yet that they know the token: a place, some time, a log line."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass

from smolcluster.errors import ConnectionLost, SmolError

logger = logging.getLogger(__name__)

MAX_UNAUTHENTICATED = 64  # at once, each with a thread (CONTRACT section 3)
# Seconds for a thread whose connection was just shut down to notice. It does at once, unless the machine is overloaded.
EVICTION_TIMEOUT = 1.0
# A port scan is a handful of lines. Whoever knocks all day long may not fill the disk: 41 lines a minute, 10 MB a day.
LINES_PER_WINDOW = 20
LINES_WINDOW = 60.0  # seconds
# Reasons that get a line when the others are used up: a flood must not hide that a machine has the wrong token.
KINDS_PER_WINDOW = 20
_NUMBER = re.compile(r"\d+")


@dataclass(slots=True)
class _Stranger:
    sock: socket.socket
    host: str
    is_proved: bool = False
    evicted: SmolError | None = None


class Strangers:
    """The connections in their handshake, by the thread that runs it. Thread-safe.

    At most MAX_UNAUTHENTICATED of them have not proved anything. Whoever comes then takes the place of another one: an
    honest handshake takes milliseconds, so the oldest is the most suspicious; and of the host that has the most, so
    that one host's flood costs the others nothing.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._by_thread: dict[threading.Thread, _Stranger] = {}

    def add(self, thread: threading.Thread, sock: socket.socket, host: str) -> None:
        """Give a newcomer a place before its thread starts; waits a moment for one that has to go.

        Raises:
            ConnectionLost: the one that has to go does not.
        """
        with self._changed:
            if not self._has_room():
                self._evict()
                if not self._changed.wait_for(self._has_room, EVICTION_TIMEOUT):
                    raise ConnectionLost("there are too many unauthenticated connections")
            self._by_thread[thread] = _Stranger(sock, host)

    def proved(self) -> None:
        """The calling thread's connection has proved that it knows the token: nobody takes its place any more.

        Raises:
            ConnectionLost: somebody has just taken it.
        """
        with self._changed:
            stranger = self._by_thread[threading.current_thread()]
            if stranger.evicted is not None:
                raise stranger.evicted
            stranger.is_proved = True
            self._changed.notify_all()

    def evicted(self) -> SmolError | None:
        """Why the calling thread's connection was cut off, if that was for the sake of another one."""
        with self._changed:
            return self._by_thread[threading.current_thread()].evicted

    def remove(self, thread: threading.Thread) -> None:
        """Its handshake is over."""
        with self._changed:
            del self._by_thread[thread]
            self._changed.notify_all()

    def close(self) -> None:
        """Cut all of them off, and wait for their threads."""
        with self._changed:
            left = list(self._by_thread.items())
        for _, stranger in left:
            _shut(stranger.sock)
        for thread, _ in left:
            thread.join(timeout=2.0)

    def _unproved(self) -> list[_Stranger]:
        return [stranger for stranger in self._by_thread.values() if not stranger.is_proved]

    def _has_room(self) -> bool:
        return len(self._unproved()) < MAX_UNAUTHENTICATED

    def _evict(self) -> None:
        unproved = self._unproved()
        crowded = Counter(stranger.host for stranger in unproved).most_common(1)[0][0]
        oldest = next(stranger for stranger in unproved if stranger.host == crowded)
        oldest.evicted = ConnectionLost("it did not finish the handshake before too many others came")
        _shut(oldest.sock)


class RefusalLog:
    """One line for each refused connection; of a flood the first of each minute, then how many more. Thread-safe.

    The first of a kind always has its line: reasons are of one kind if they differ in numbers only.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._lines = 0
        self._hidden = 0
        self._kinds: set[str] = set()

    def refused(self, peer: str, reason: object) -> None:
        """Note that the connection of `peer` was refused."""
        self.look()
        kind = _NUMBER.sub("", str(reason).replace(peer, ""))
        with self._lock:
            self._lines += 1
            is_first = kind not in self._kinds and len(self._kinds) < KINDS_PER_WINDOW
            if is_first:
                self._kinds.add(kind)
            is_shown = is_first or self._lines <= LINES_PER_WINDOW
            self._hidden += not is_shown
        if is_shown:
            logger.warning("connection refused peer=%s reason=%s", peer, reason)

    def look(self, *, at_end: bool = False) -> None:
        """Tell what was left out, once the time for it has come; call now and then."""
        with self._lock:
            now = time.monotonic()
            if not at_end and now - self._began < LINES_WINDOW:
                return
            hidden, self._hidden, self._lines, self._began = self._hidden, 0, 0, now
            self._kinds.clear()
        if hidden:
            logger.warning("connections refused, and %d more address=%s", hidden, self._address)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
