"""Worlds in one process, for the tests of this folder, and ways for a rank to end badly."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from smolcluster.cluster.rendezvous import JoinedWorld, join_world
from smolcluster.cluster.world import World
from smolcluster.transport import tcp
from smolcluster.transport.base import Listener, Network
from smolcluster.transport.inproc import InprocNetwork
from smolcluster.transport.tcp import TcpNetwork, TcpOptions

TOKEN = b"correct horse battery staple"
RUN = "run-7"
DEADLINE = 20.0  # for what ought to happen


class Meeting:
    """Where ranks meet: listeners of one kind (tcp or inproc), and `join`, which a thread of each rank calls."""

    def __init__(self, kind: str, world_size: int, patience: float = 5.0) -> None:
        self.kind = kind
        self.world_size = world_size
        self.patience = patience
        self._inproc = InprocNetwork()
        self._names = 0
        self.listeners = [self.listen(rank) for rank in range(world_size)]

    @property
    def leader(self) -> str:
        return self.listeners[0].address

    def listen(self, rank: int) -> Listener:
        if self.kind == "tcp":
            options = TcpOptions(patience=self.patience)
            return tcp.listen("127.0.0.1", 0, token=TOKEN, run_id=RUN, rank=rank, options=options)
        self._names += 1
        return self._inproc.listen(f"rank{rank}-{self._names}", rank)

    def network(self) -> Network:
        return TcpNetwork(TOKEN, TcpOptions(patience=self.patience)) if self.kind == "tcp" else self._inproc

    def join(self, rank: int, listener: Listener | None = None, **settings: Any) -> World:
        """join_world with what all ranks have in common; `settings` replace it."""
        listener = listener or self.listeners[rank]
        common: dict[str, Any] = {
            "world_size": self.world_size, "name": f"rank{rank}", "token": TOKEN, "leader_address": self.leader,
            "run_id": RUN, "patience": self.patience, "timeout": DEADLINE, "network": self.network(),
        }  # fmt: skip
        return join_world(rank=rank, listener=listener, **{**common, **settings})

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


class Attempt:
    """A call on a thread of its own: its result or its error."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="test-attempt")
        self._thread.start()

    def join(self) -> Attempt:
        self._thread.join(DEADLINE + 10)
        assert not self._thread.is_alive(), "still waiting"
        return self

    def get(self) -> Any:
        """The result; raises the error."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.result

    def _run(self) -> None:
        start = time.monotonic()
        try:
            self.result = self._call()
        except BaseException as exc:  # noqa: BLE001 - top of the thread: raised by `get`
            self.error = exc
        self.seconds = time.monotonic() - start


@contextlib.contextmanager
def formed(kind: str, world_size: int, patience: float = 5.0) -> Iterator[list[World]]:
    """The worlds of all ranks, in rank order; closed afterwards."""
    meeting = Meeting(kind, world_size, patience)
    attempts = [Attempt(lambda rank=rank: meeting.join(rank)) for rank in range(world_size)]
    worlds = [attempt.get() for attempt in attempts]
    try:
        yield worlds
    finally:
        for world in worlds:
            world.leave()
        for world in worlds:
            world.close()


def silence(world: World) -> None:
    """The rank hangs: its connections stay open but it says nothing any more."""
    assert isinstance(world, JoinedWorld)
    world._heartbeat.close()


def die(world: World) -> None:
    """The rank's process ends at once: its control links close and nobody says good-bye."""
    silence(world)
    for link in world._links.values():
        link.close()


def first_errors(worlds: Sequence[World], timeout: float) -> list[BaseException | None]:
    """What ended each world, waiting up to `timeout` seconds in all."""
    deadline = time.monotonic() + timeout
    found: list[BaseException | None] = []
    for world in worlds:
        ended = threading.Event()
        world.on_failure(lambda error, ended=ended: ended.set())
        ended.wait(max(0.0, deadline - time.monotonic()))
        found.append(world.error())
    return found
