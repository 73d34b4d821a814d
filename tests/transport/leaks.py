"""Checks that a test leaves no thread and no socket behind."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil

# How long what is being closed may take to be gone. A thread that is still joining on its own is no leak.
SETTLE = 3.0


def open_sockets() -> set[tuple[int, str]]:
    """(descriptor, description) of every socket of this process."""
    process = psutil.Process()
    # psutil below 6 calls it connections
    connections = getattr(process, "net_connections", None) or process.connections
    return {(c.fd, f"fd {c.fd} {c.laddr} -> {c.raddr}") for c in connections(kind="all")}


@contextlib.contextmanager
def no_leftovers() -> Iterator[None]:
    """Fails if the body leaves a thread or a socket behind."""
    threads, sockets = set(threading.enumerate()), open_sockets()
    yield
    deadline = time.monotonic() + SETTLE
    for thread in set(threading.enumerate()) - threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread.name for thread in set(threading.enumerate()) - threads if thread.is_alive()]
    assert not left, f"threads left behind: {left}"
    more = open_sockets() - sockets
    assert not more, f"sockets left behind: {sorted(text for _, text in more)}"
