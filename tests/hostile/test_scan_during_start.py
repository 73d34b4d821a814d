"""A port scan, web browsers and slow talkers at every listener while the ranks of a run look for each other."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import struct
import threading
import time

import pytest
import torch

from cluster.worlds import Attempt, Meeting
from hostile.mutator import PICKLES, TLS_CLIENT_HELLO
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.transport.tcp import parse_address

WORLD_SIZE = 3
WORDS = [b"", TLS_CLIENT_HELLO, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", *PICKLES[-2:], struct.pack("!I", 2**32 - 1) * 20]


class Scan:
    """Knocks at addresses until it is stopped."""

    def __init__(self, addresses: list[str]) -> None:
        self.knocks = 0
        self._stop = threading.Event()
        self._addresses = [parse_address(address) for address in addresses]
        self._slow = [socket.create_connection(address, timeout=5) for address in self._addresses for _ in range(3)]
        self._threads = [threading.Thread(target=run, name="test-scan") for run in (self._knock, self._drip)]
        for thread in self._threads:
            thread.start()

    def _knock(self) -> None:
        for number in itertools.count():
            if self._stop.wait(0.005):
                return
            with (
                contextlib.suppress(OSError),  # at the end of the run nobody listens any more
                socket.create_connection(self._addresses[number % len(self._addresses)], timeout=5) as sock,
            ):
                sock.sendall(WORDS[number % len(WORDS)])
                if number % 3 == 0:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets
            self.knocks += 1

    def _drip(self) -> None:
        """A byte a second, as a handshake would begin."""
        for byte in b"SMOL\x00\x02\x01\x0a":
            for sock in self._slow:
                with contextlib.suppress(OSError):
                    sock.sendall(bytes([byte]))
            if self._stop.wait(1.0):
                return

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for sock in self._slow:
            sock.close()


def test_a_run_starts_and_goes_on_during_a_port_scan(caplog: pytest.LogCaptureFixture) -> None:
    meeting = Meeting("tcp", WORLD_SIZE)
    scan = Scan([listener.address for listener in meeting.listeners])
    try:
        while scan.knocks < 30:
            time.sleep(0.01)
        caplog.set_level(logging.INFO, "smolcluster")
        began = time.monotonic()

        def rank(number: int) -> list[float]:
            comm = TcpCommunicator(meeting.join(number))
            for _ in range(3):
                values = comm.all_reduce(torch.full((1000,), float(number))).result()[0]
            comm.barrier(20.0)
            comm.close()
            return values.tolist()

        attempts = [Attempt(lambda number=number: rank(number)) for number in range(WORLD_SIZE)]
        for attempt in attempts:
            assert attempt.get() == [3.0] * 1000
        # Three silent ones at each listener would cost 5 s each if they stood in a queue.
        assert time.monotonic() - began < 5.0
    finally:
        scan.close()
        meeting.close()
    assert "connection refused" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
