"""When a control message arrived: what pings measure must not depend on how busy this process is."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

import pytest

from smolcluster.transport import tcp
from smolcluster.transport.inproc import InprocControlLink
from smolcluster.transport.tcp import TcpControlLink

WAIT = 20.0
LATE = 0.2


def wait_for_time_stamps(stack: contextlib.ExitStack, server: socket.socket) -> None:
    """Until the kernel, asked for them by the first socket, has begun to stamp packets."""
    left = stack.enter_context(socket.create_connection(server.getsockname()))
    right = stack.enter_context(server.accept()[0])
    right.setsockopt(socket.SOL_SOCKET, tcp._ARRIVAL_TIME, 1)
    deadline = time.monotonic() + WAIT
    waited = 0.0
    while waited == 0.0:
        assert time.monotonic() < deadline, "no packet was stamped"
        left.send(b"1")
        _, waited = tcp._receive(right, 1)


@pytest.mark.skipif(not tcp._HAS_ARRIVAL_TIME, reason="only 64-bit Linux says when bytes arrived")
def test_a_message_arrived_when_the_kernel_had_it_not_when_it_was_read() -> None:
    arrived: queue.SimpleQueue[float] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
        near = TcpControlLink(left, bytes(32), is_dialler=True, address="near", patience=WAIT)
        far = TcpControlLink(right, bytes(32), is_dialler=False, address="far", patience=WAIT)
        stack.callback(near.close)
        stack.callback(far.close)
        wait_for_time_stamps(stack, server)
        sent = time.perf_counter()
        near.send({"kind": "beat"})
        threading.Event().wait(LATE)
        far.on_message(lambda message: arrived.put(far.arrived_at()))
        assert 0 <= arrived.get(timeout=WAIT) - sent < LATE / 2


def test_within_a_process_a_message_arrives_when_it_is_handled() -> None:
    arrived: queue.SimpleQueue[float] = queue.SimpleQueue()
    near, far = InprocControlLink.pair()
    with contextlib.closing(near), contextlib.closing(far):
        far.on_message(lambda message: arrived.put(far.arrived_at()))
        began = time.perf_counter()
        near.send({"kind": "beat"})
        assert began <= arrived.get(timeout=WAIT) <= time.perf_counter()
