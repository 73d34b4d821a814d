"""The workers of a parameter server come and go: each has a session, which begins and ends without the others.

A session is a world of two, the server as its rank 0 and the worker as its rank 1, so that heartbeats, good-byes and
losses are those of every other world; a lost session is a lost worker and not the end of the run. All sessions share
the server's listeners. Their lanes are told apart by the session's number, which a server never uses twice. Beginning
or ending a session makes a new generation (DESIGN section 2.8), whose number stands on every frame of the session.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from smolcluster.cluster.heartbeat import Heartbeat
from smolcluster.cluster.rendezvous import JOIN_TIMEOUT, TICK, find_difference, is_plain
from smolcluster.cluster.world import Member, View, World, refuse, wait_until
from smolcluster.errors import (
    ConfigError,
    ConnectFailed,
    FrameError,
    RendezvousTimeout,
    SmolError,
    TransportError,
)
from smolcluster.kinds import JsonObject
from smolcluster.transport.base import Channel, ControlLink, Ended, Hello, Listener, Network
from smolcluster.transport.security import MAX_NAME_BYTES
from smolcluster.transport.tcp import CONTROL

logger = logging.getLogger(__name__)

# Within a session's world.
SERVER, WORKER = 0, 1
# A joining worker is asked to wait for the end of its rank's earlier session, or for a server that is not ready: it
# tries again, at first after this many seconds, then less and less often.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
# One attempt to reach the server; then its address is asked for again.
DIAL_TIMEOUT = 2.0
# How long the server takes at most to answer a "join", in patiences.
ANSWER_PATIENCES = 2


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A worker that asks to be let in.

    Attributes:
        rank: its rank in the run, from 1.
        name: its machine's name.
        instance: of its process. One that comes back after a broken link has the same, one that was started anew not.
        address: `tcp://host:port` where it is; it may not listen there.
    """

    rank: int
    name: str
    instance: str
    address: str


@dataclass(frozen=True, slots=True)
class Granted:
    """What the server gives a newcomer: its session's number, and the generation that begins with it."""

    session: int
    generation: int


class Wait(Exception):
    """The server's answer to a newcomer that may be let in later; says why not now."""


class SessionWorld(World):
    """One session as one of its two sides sees it."""

    def __init__(
        self,
        side: int,
        view: View,
        link: ControlLink,
        listener: Listener,
        network: Network,
        patience: float,
        number: int,
        worker_rank: int,
    ) -> None:
        self.number = number
        self._worker_rank = worker_rank
        super().__init__(side, view, {1 - side: link}, listener, network, patience)
        self._heartbeat = Heartbeat(self)

    def name(self, rank: int) -> str:
        """How messages call the other side."""
        name = self.view().members[rank].name
        return f"the server ({name})" if rank == SERVER else f"worker {name}"

    def run_rank(self, rank: int) -> int:
        """The server is rank 0 of the run, the worker the one that it came as."""
        return 0 if rank == SERVER else self._worker_rank

    def close(self) -> None:
        """Close the link, then end the threads. The server's listeners stay."""
        super().close()
        self._heartbeat.close()


class Reception:
    """Lets workers in, on threads of its own, for as long as it is open."""

    def __init__(
        self,
        listeners: Sequence[Listener],
        *,
        name: str,
        patience: float,
        options: Mapping[str, str],
        grant: Callable[[Newcomer], Granted],
        begin: Callable[[Newcomer, SessionWorld], None],
        revoke: Callable[[Granted], None],
    ) -> None:
        """Open the door.

        Args:
            listeners: where workers knock; closed by `close`.
            name: the server's, for messages.
            patience: seconds until a silent worker counts as lost.
            options: settings that must be equal on server and workers; a difference is refused by name.
            grant: decides on a newcomer, on a thread of its own. It may raise Wait, or ConfigError to refuse it.
            begin: takes the session over, on the same thread. It may block, and must close the world at last.
            revoke: called if what was granted did not begin.
        """
        self._listeners = listeners
        self._name = name
        self._patience = patience
        self._options = dict(options)
        self._grant = grant
        self._revoke = revoke
        self._begin = begin
        self._run_id = secrets.token_hex(8)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._welcomes: set[threading.Thread] = set()
        for listener in listeners:
            listener.allow_run(self._run_id)
        self._threads = [
            threading.Thread(target=self._attend, args=(listener,), name=f"reception {listener.address}", daemon=True)
            for listener in listeners
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Let nobody in any more. Sessions that have begun go on until they are closed."""
        self._stop.set()
        for listener in self._listeners:
            listener.close()
        for thread in self._threads:
            thread.join(timeout=2.0)
        with self._lock:
            welcomes = list(self._welcomes)
        for thread in welcomes:
            thread.join(timeout=self._patience)

    def _attend(self, listener: Listener) -> None:
        while not self._stop.is_set():
            try:
                _, link = listener.accept_control(TICK)
            except ConnectFailed:
                continue
            # A thread for each: who is slow to say who it is keeps nobody else waiting.
            thread = threading.Thread(target=self._welcome, args=(listener, link), name="welcome", daemon=True)
            with self._lock:
                self._welcomes.add(thread)
            thread.start()

    def _welcome(self, listener: Listener, link: ControlLink) -> None:
        try:
            self._let_in(listener, link)
        except Wait as later:
            logger.info("worker waits reason=%s", later)
            with contextlib.suppress(SmolError):
                link.send({"kind": "wait", "reason": str(later)})
            link.close()
        except ConfigError as reason:
            refuse(link, str(reason))
        except SmolError as error:
            logger.warning("worker lost while it joined reason=%s", error)
            link.close()
        finally:
            with self._lock:
                self._welcomes.discard(threading.current_thread())

    def _let_in(self, listener: Listener, link: ControlLink) -> None:
        newcomer = self._read_join(link)
        if self._stop.is_set():
            raise Wait("the server is closing")
        granted = self._grant(newcomer)
        try:
            self._begin_session(newcomer, granted, listener, link)
        except BaseException:
            self._revoke(granted)
            raise

    def _begin_session(self, newcomer: Newcomer, granted: Granted, listener: Listener, link: ControlLink) -> None:
        members = (Member(SERVER, self._name, listener.address), Member(WORKER, newcomer.name, newcomer.address))
        view = View(granted.generation, members, SERVER, self._run_id)
        link.send(
            {
                "kind": "session",
                "generation": granted.generation,
                "session": granted.session,
                "run_id": self._run_id,
                "server": self._name,
            }
        )
        logger.info(
            "worker joined rank=%d name=%s session=%d generation=%d",
            newcomer.rank, newcomer.name, granted.session, granted.generation,
        )  # fmt: skip
        world = SessionWorld(
            SERVER, view, link, _Shared(listener), _NeverDials(), self._patience, granted.session, newcomer.rank
        )
        self._begin(newcomer, world)

    def _read_join(self, link: ControlLink) -> Newcomer:
        deadline = time.monotonic() + JOIN_TIMEOUT
        message: JsonObject | None = None
        while message is None and time.monotonic() < deadline and not self._stop.is_set():
            message = link.receive(TICK)
        match message:
            case {
                "kind": "join",
                "rank": int(rank),
                "name": str(name),
                "instance": str(instance),
                "address": str(address),
                "options": dict(options),
            } if (
                not isinstance(rank, bool)
                and is_plain(name, instance, address)
                and all(isinstance(value, str) for value in options.values())
            ):
                if (difference := find_difference(name, options, self._options)) is not None:
                    raise ConfigError(difference)
                return Newcomer(rank, name, instance, address)
        raise ConfigError("its join message is missing or malformed")


def join_session(
    newcomer: Newcomer,
    network: Network,
    server_address: Callable[[], str],
    *,
    run_id: str,
    patience: float,
    timeout: float,
    options: Mapping[str, str],
    ended: Ended | None = None,
) -> SessionWorld:
    """Ask the server for a session until it gives one. Blocks.

    Args:
        newcomer: who asks.
        network: how to dial.
        server_address: asked before each attempt: a server that is started anew may have another one.
        run_id: what the machines have in common before they talk.
        patience: seconds until a silent server counts as lost.
        timeout: seconds to try for.
        options: settings that must be equal on server and workers.
        ended: asked between attempts: the reason to give up, None to go on.

    Raises:
        RendezvousTimeout: the server did not answer, or let nobody in, for `timeout` seconds.
        AuthFailed: wrong token, version or run.
        ConfigError: the server refused this worker.
        SmolError: what `ended` returned.
    """
    deadline = time.monotonic() + timeout
    pause = FIRST_PAUSE
    reason = "it did not answer"
    while True:
        address = server_address()
        left = wait_until(deadline)
        try:
            hello = Hello(WORKER, CONTROL, run_id, SERVER)
            link = network.dial_control(address, hello, min(left, DIAL_TIMEOUT), ended)
        except ConnectFailed as error:
            if left <= DIAL_TIMEOUT:
                raise RendezvousTimeout(
                    f"worker {newcomer.name} waited {timeout:g} s for the server: {error}"
                ) from error
            continue
        try:
            return _ask(link, newcomer, network, address, patience, options)
        except Wait as later:
            link.close()
            reason = str(later)
        except TransportError as error:
            link.close()
            reason = str(error)
        except BaseException:
            link.close()
            raise
        if ended is not None and (why := ended()) is not None:
            raise why
        if time.monotonic() + pause >= deadline:
            raise RendezvousTimeout(
                f"worker {newcomer.name} was not let in by the server at {address} within {timeout:g} s: {reason}"
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _ask(
    link: ControlLink,
    newcomer: Newcomer,
    network: Network,
    address: str,
    patience: float,
    options: Mapping[str, str],
) -> SessionWorld:
    """Say who this is and read the answer. Raises Wait if it is "not now"."""
    link.send(
        {
            "kind": "join",
            "rank": newcomer.rank,
            "name": newcomer.name,
            "instance": newcomer.instance,
            "address": newcomer.address,
            "options": dict(options.items()),
        }
    )
    message = link.receive(ANSWER_PATIENCES * patience + JOIN_TIMEOUT)
    match message:
        case {
            "kind": "session",
            "generation": int(generation),
            "session": int(session),
            "run_id": str(run_id),
            "server": str(server),
        } if 0 <= generation < 2**32 and is_plain(run_id, server) and len(run_id.encode()) <= MAX_NAME_BYTES:
            members = (Member(SERVER, server, address), Member(WORKER, newcomer.name, newcomer.address))
            view = View(generation, members, SERVER, run_id)
            return SessionWorld(WORKER, view, link, _NoListener(), network, patience, session, newcomer.rank)
        case {"kind": "wait", "reason": str(reason)}:
            raise Wait(reason)
        case {"kind": "refused", "reason": str(reason)}:
            raise ConfigError(f"the server at {address} refused {newcomer.name!r}: {reason}")
        case None:
            raise Wait("it took the connection and did not answer")
    raise FrameError(f"the server at {address} answered with what is no session")


class _Shared:
    """A listener that outlives the worlds that use it."""

    def __init__(self, listener: Listener) -> None:
        self.address = listener.address
        self._listener = listener

    def allow_run(self, run_id: str) -> None:
        """The reception has."""

    def accept_channel(self, rank: int, lane: str, timeout: float) -> Channel:
        return self._listener.accept_channel(rank, lane, timeout)

    def accept_control(self, timeout: float) -> NoReturn:
        raise AssertionError("the reception takes these")

    def close(self) -> None:
        """Not this one's to close."""


class _NoListener:
    """A worker only dials."""

    address = ""

    def allow_run(self, run_id: str) -> None:
        """Nobody comes."""

    def accept_channel(self, rank: int, lane: str, timeout: float) -> NoReturn:
        raise AssertionError("a worker only dials")

    def accept_control(self, timeout: float) -> NoReturn:
        raise AssertionError("a worker only dials")

    def close(self) -> None:
        """Nothing is open."""


class _NeverDials:
    """The server's side of a session: workers dial."""

    def dial_channel(self, address: str, hello: Hello, timeout: float, ended: Ended | None = None) -> NoReturn:
        raise AssertionError("the server never dials")

    def dial_control(self, address: str, hello: Hello, timeout: float, ended: Ended | None = None) -> NoReturn:
        raise AssertionError("the server never dials")
