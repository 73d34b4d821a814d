"""The columns `link/<peer>/…` of a row: what passes between this rank and each of the others, and how fast.

docs/network-metrics.md says what each of them means and how it compares with what the system counts.
"""

from __future__ import annotations

import threading
import time

from smolcluster.cluster.world import LinkState, World
from smolcluster.collectives.base import Communicator
from smolcluster.collectives.tcp import TcpCommunicator
from smolcluster.kinds import JsonObject
from smolcluster.monitoring.metrics import EverySteps

# Seconds between pings: each takes both sides about 0.1 ms.
PING_INTERVAL = 1.0


class LinkMetrics:
    """Measures the links of one rank. For one thread."""

    def __init__(self, world: World, interval: int) -> None:
        """Measure the links of `world`; rows are due every `interval` steps."""
        self._world = world
        self._every = EverySteps(interval)
        self._peers = {member.rank: member.name for member in world.view().members if member.rank != world.rank}
        self._pinged = time.monotonic()
        self._row_time = time.time()
        self._before = {peer: world.link_state(peer) for peer in self._peers}
        world.ping()  # the first row comes soon

    def row(self, step: int, row_time: float) -> JsonObject:
        """The columns of a row, none where it is not due; to be called at the end of every step.

        With most algorithms no rank has anything to send then: a ping finds the links empty.

        Args:
            step: of the row.
            row_time: its `time`: so that bandwidth times the time between two rows is what was sent between them.
        """
        columns: JsonObject = {}
        if self._every.is_due(step):
            seconds, self._row_time = max(row_time - self._row_time, 1e-3), row_time
            for peer, name in self._peers.items():
                before, state = self._before[peer], self._world.link_state(peer)
                self._before[peer] = state
                columns |= {f"link/{name}/{key}": value for key, value in _columns(before, state, seconds).items()}
        if time.monotonic() - self._pinged >= PING_INTERVAL:
            self._pinged = time.monotonic()
            self._world.ping()
        return columns


class SessionLinks:
    """Measures the links between a parameter server and its workers: sessions come and go. Thread-safe."""

    def __init__(self, interval: int) -> None:
        """Measure those that are opened; rows are due every `interval` steps."""
        self._interval = interval
        self._lock = threading.Lock()
        self._sessions: list[tuple[World, LinkMetrics]] = []

    def open(self, world: World) -> None:
        """A session begins."""
        metrics = LinkMetrics(world, self._interval)
        with self._lock:
            self._sessions.append((world, metrics))

    def row(self, step: int, row_time: float) -> JsonObject:
        """As that of LinkMetrics, of those sessions that have not ended."""
        columns: JsonObject = {}
        with self._lock:
            self._sessions = [(world, metrics) for world, metrics in self._sessions if not world.is_over]
            for _, metrics in self._sessions:
                columns |= metrics.row(step, row_time)
        return columns


def measure_links(comm: Communicator, interval: int) -> LinkMetrics | None:
    """Measures the links of `comm`; None where it has none of ours: gloo, nccl, one process."""
    return LinkMetrics(comm.world, interval) if isinstance(comm, TcpCommunicator) else None


def _columns(before: LinkState, now: LinkState, seconds: float) -> JsonObject:
    moved = now.sent_bytes + now.recv_bytes - before.sent_bytes - before.recv_bytes
    columns: JsonObject = {
        "bandwidth_bytes_per_s": moved / seconds,
        "rtt_ms": None if now.round_trip is None else now.round_trip * 1e3,
        "buffer_bytes": now.buffer_bytes,
        "queued_bytes": now.queued_bytes,
    }
    if now.wire_bytes is not None and before.wire_bytes is not None:
        columns["wire_bytes_per_s"] = (now.wire_bytes - before.wire_bytes) / seconds
    return columns
