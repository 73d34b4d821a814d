"""A rank's side of its lifeline: JSON lines to and from the process that started it (see supervisor.py)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

from smolcluster.errors import PeerLost, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.run.supervisor import EXIT_FAILED, EXIT_INTERRUPTED

logger = logging.getLogger(__name__)

_STDIN, _STDOUT, _STDERR = 0, 1, 2


class ParentLink:
    """Claims stdin and stdout of this process for messages; whatever else prints goes to stderr, the log.

    A thread reads stdin for as long as the process lives. At end-of-file the parent is gone and the process exits at
    once: whoever could have used its work is not there any more.
    """

    def __init__(self) -> None:
        self._events = os.dup(_STDOUT)  # a private descriptor: a stray print may not break a line of ours
        os.dup2(_STDERR, _STDOUT)
        self._write_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._bootstrap: SimpleQueue[JsonObject] = SimpleQueue()
        self._leader: str | None = None
        self._has_leader = threading.Event()
        self._written = threading.Semaphore(0)
        self._request_stop: Callable[[], None] | None = None
        self._abort: Callable[[SmolError], None] | None = None
        # daemon: it sits in read() until the process ends, and nothing can wake it
        self._reader = threading.Thread(target=self._read, name="lifeline", daemon=True)
        self._reader.start()

    def bootstrap(self) -> JsonObject:
        """Block until the first message is there."""
        return self._bootstrap.get()

    def leader_address(self) -> str:
        """Where rank 0 listens, as the parent said last; blocks until it has."""
        self._has_leader.wait()
        assert self._leader is not None
        return self._leader

    def tell(self, message: JsonObject) -> None:
        """Send one line, from any thread. A parent that is gone is noticed by the reader."""
        data = memoryview(json.dumps(message, allow_nan=False).encode() + b"\n")
        with self._write_lock, contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._events, data) :]

    def deliver(self) -> None:
        """Block until the rows that were told are on the disk. The parent answers, or it is gone and so are we."""
        self.tell({"event": "rows_end"})
        self._written.acquire()

    def attach(self, request_stop: Callable[[], None], abort: Callable[[SmolError], None]) -> None:
        """From now on there is something to finish: "stop" and "abort" go to these, from the reader's thread."""
        with self._state_lock:
            self._request_stop, self._abort = request_stop, abort

    def _read(self) -> None:
        pending = b""
        # os.read, not sys.stdin: a daemon thread that holds a BufferedReader's lock breaks the interpreter's exit
        while chunk := _read_some():
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._handle(json.loads(line))
        os._exit(EXIT_FAILED)

    def _handle(self, message: JsonObject) -> None:
        command = message.get("command")
        with self._state_lock:
            request_stop, abort = self._request_stop, self._abort
        if command == "leader":
            self._leader = str(message["address"])
            self._has_leader.set()
        elif command == "rows_written":
            self._written.release()
        elif command == "stop":
            if request_stop is None:
                os._exit(EXIT_INTERRUPTED)  # still starting: nothing to save
            request_stop()
        elif command == "abort":
            rank, reason = message.get("rank"), str(message.get("message"))
            logger.warning("told to end reason=%s", reason)
            if abort is None:
                os._exit(EXIT_FAILED)
            abort(PeerLost(reason, rank if isinstance(rank, int) else -1))
        else:
            self._bootstrap.put(message)


def _read_some() -> bytes:
    try:
        return os.read(_STDIN, 65536)
    except OSError:
        return b""
