"""Static rendezvous: every rank dials the leader (rank 0), which answers with the view when all are there.

Any order of start works: whoever comes before the leader knocks until the deadline. Afterwards every rank opens a
control link to every lower rank, so that all of them notice a death at the same time.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Mapping

from smolcluster.cluster.heartbeat import Heartbeat
from smolcluster.cluster.world import BEATS_PER_PATIENCE, Member, View, World, refuse, wait_until
from smolcluster.errors import ConfigError, ConnectFailed, FrameError, PeerLost, RendezvousTimeout, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.transport.base import ControlLink, Hello, Listener, Network
from smolcluster.transport.security import MAX_NAME_BYTES
from smolcluster.transport.tcp import CONTROL, TcpNetwork, TcpOptions

logger = logging.getLogger(__name__)

LEADER = 0
JOIN_TIMEOUT = 5.0  # seconds that an authenticated newcomer may take to say who it is
MAX_WORD_BYTES = 300  # of a name or address; host names have at most 255
TICK = 0.2  # seconds between looks whether a waiting rank has gone away


class JoinedWorld(World):
    """A World together with its heartbeat and, on the leader, somebody at the door."""

    def __init__(
        self,
        rank: int,
        view: View,
        links: dict[int, ControlLink],
        listener: Listener,
        network: Network,
        patience: float,
    ) -> None:
        super().__init__(rank, view, links, listener, network, patience)
        self._heartbeat = Heartbeat(self)
        self._door = _Doorkeeper(listener, view) if rank == LEADER else None

    def close(self) -> None:
        """Close all control links and the listener, then end the threads."""
        if self._door is not None:
            self._door.close()
        super().close()
        self._heartbeat.close()


def join_world(
    *,
    rank: int,
    world_size: int,
    name: str,
    listener: Listener,
    token: bytes = b"",
    leader_address: str = "",
    run_id: str = "",
    patience: float = 5.0,
    timeout: float = 60.0,
    options: Mapping[str, str] | None = None,
    network: Network | None = None,
) -> World:
    """Wait until all ranks of a run are here, and return the world they form.

    Args:
        rank: this rank. Rank 0 is the leader.
        world_size: number of ranks, the same everywhere.
        name: this rank's name, such as its host name; unique.
        listener: where this rank accepts connections; closed by the world, or here if the ranks do not come together.
        token: the cluster token.
        leader_address: where rank 0 listens; ignored on rank 0.
        run_id: what the ranks must have in common before they talk, such as a digest of the cluster file.
        patience: seconds until a silent rank counts as lost.
        timeout: seconds to wait for all ranks.
        options: settings that must be equal on all ranks; a difference is refused by name.
        network: how to dial; None: TCP with `token`.

    Raises:
        RendezvousTimeout: not all ranks came in time; names those that are missing.
        AuthFailed: wrong token, version or run.
        ConfigError: the leader refused this rank (name or rank taken, options differ).
    """
    deadline = time.monotonic() + timeout
    network = network or TcpNetwork(token, TcpOptions(patience=patience))
    me = Member(rank, name, listener.address)
    wanted = dict(options or {})
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        if rank == LEADER:
            view, links = _lead(me, world_size, listener, deadline, timeout, wanted, patience)
        else:
            view, links = _follow(me, world_size, network, leader_address, run_id, deadline, timeout, wanted, patience)
        undo.callback(_close_all, links)
        listener.allow_run(view.run_id)
        undo.pop_all()
    # From here on this rank beats and listens, also while the ranks look for each other: a death is noticed at once.
    world = JoinedWorld(rank, view, links, listener, network, patience)
    try:
        world.link_all(wait_until(deadline))
    except SmolError as error:
        world.close()
        if isinstance(error, ConnectFailed):
            raise RendezvousTimeout(
                f"rank {rank} and the other ranks could not all reach each other: {error}"
            ) from error
        raise
    return world


class _Lobby:
    """The leader's waiting room."""

    def __init__(self, me: Member, world_size: int, options: dict[str, str], patience: float) -> None:
        self._world_size = world_size
        self._options = options
        self._interval = patience / BEATS_PER_PATIENCE
        self._next_beat = 0.0
        self.tick = min(TICK, self._interval)
        self.members: dict[int, Member] = {me.rank: me}
        self.links: dict[int, ControlLink] = {}

    def missing(self) -> list[int]:
        """Ranks that have not come, or went away again. Those that wait hear now and then that the leader is there."""
        is_due = time.monotonic() >= self._next_beat
        if is_due:
            self._next_beat = time.monotonic() + self._interval
        for rank, link in list(self.links.items()):
            try:
                link.receive(timeout=0.0)  # a waiting rank says nothing: this only notices that it is gone
                if is_due:
                    link.send({"kind": "beat"})
            except SmolError:
                logger.warning("rank left before the start rank=%d", rank)
                link.close()
                del self.links[rank], self.members[rank]
        return [rank for rank in range(self._world_size) if rank not in self.members]

    def admit(self, hello: Hello, link: ControlLink) -> None:
        """Read a newcomer's "join"; keep it, or tell it why not."""
        deadline = time.monotonic() + JOIN_TIMEOUT
        message: JsonObject | None = None
        while message is None and time.monotonic() < deadline:
            try:
                message = link.receive(timeout=self.tick)
            except SmolError as error:
                logger.warning("rank refused reason=%s", error)
                link.close()
                return
            self.missing()
        refusal = self._refusal(hello, message or {})
        if refusal is None and message is not None:
            member = Member(hello.rank, str(message["name"]), str(message["address"]))
            self.members[hello.rank], self.links[hello.rank] = member, link
            logger.info("rank joined rank=%d name=%s address=%s", member.rank, member.name, member.address)
            return
        refuse(link, refusal or "its join message is missing")

    def _refusal(self, hello: Hello, message: JsonObject) -> str | None:
        match message:
            case {
                "kind": "join",
                "rank": rank,
                "name": str(name),
                "world_size": int(world_size),
                "address": str(address),
                "options": dict(theirs),
            } if (
                rank == hello.rank
                and not isinstance(rank, bool)
                and is_plain(name, address)
                and all(isinstance(value, str) for value in theirs.values())
            ):
                pass
            case _:
                return "its join message is malformed"
        if world_size != self._world_size:
            return f"{name!r} expects {world_size} ranks, rank 0 expects {self._world_size}"
        if not 0 <= hello.rank < self._world_size:
            return f"{name!r} wants rank {rank}, but the ranks are 0 to {self._world_size - 1}"
        for member in self.members.values():
            if member.rank == rank or member.name == name:
                return (
                    f"{name!r} wants rank {rank}, but {member.name!r} (rank {member.rank}) is here already; "
                    "is the same machine started twice?"
                )
        return find_difference(name, theirs, self._options)


class _Doorkeeper:
    """Answers those that come after the start, on a thread of its own. Else they would wait until their deadline."""

    def __init__(self, listener: Listener, view: View) -> None:
        self._listener = listener
        self._world_size = len(view.members)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"door {listener.address}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the door."""
        self._stop.set()
        self._listener.close()  # wakes the thread
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                _, link = self._listener.accept_control(TICK)
            except ConnectFailed:
                continue
            name: object = None
            with contextlib.suppress(SmolError):
                name = (link.receive(timeout=1.0) or {}).get("name")
            if not isinstance(name, str) or not is_plain(name):
                name = None
            refuse(
                link,
                f"the run of {self._world_size} ranks has begun already; is {name!r} started twice, or is rank 0 still "
                "in an earlier run?",
            )


def find_difference(name: str, theirs: JsonObject, ours: dict[str, str]) -> str | None:
    """What differs between the options of a newcomer and the leader's, the first three keys; None: nothing."""
    keys = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    if not keys:
        return None
    shown = "; ".join(f"{key} is {theirs.get(key)} on {name} and {ours.get(key)} on rank 0" for key in keys[:3])
    more = f" (and {len(keys) - 3} more)" if len(keys) > 3 else ""
    return f"the options differ: {shown}{more}. Start every machine with the same options"


def _lead(
    me: Member,
    world_size: int,
    listener: Listener,
    deadline: float,
    timeout: float,
    options: dict[str, str],
    patience: float,
) -> tuple[View, dict[int, ControlLink]]:
    lobby = _Lobby(me, world_size, options, patience)
    while missing := lobby.missing():
        left = deadline - time.monotonic()
        if left <= 0:
            _close_all(lobby.links)
            raise RendezvousTimeout(
                f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {world_size} did not come to "
                f"{listener.address} within {timeout:g} s. Start the missing ranks, or look for a firewall in between"
            )
        with contextlib.suppress(ConnectFailed):
            lobby.admit(*listener.accept_control(min(left, lobby.tick)))
    members = tuple(lobby.members[rank] for rank in range(world_size))
    view = View(generation=1, members=members, leader=LEADER, run_id=secrets.token_hex(8))
    listener.allow_run(view.run_id)
    packed: JsonObject = {
        "kind": "view",
        "generation": view.generation,
        "leader": view.leader,
        "run_id": view.run_id,
        "members": [{"rank": m.rank, "name": m.name, "address": m.address} for m in members],
    }
    for rank, link in lobby.links.items():
        try:
            link.send(packed)
        except SmolError as error:
            _close_all(lobby.links)
            raise PeerLost(f"rank {rank} ({lobby.members[rank].name}) is lost: {error}", rank) from error
    return view, lobby.links


def _follow(
    me: Member,
    world_size: int,
    network: Network,
    leader_address: str,
    run_id: str,
    deadline: float,
    timeout: float,
    options: dict[str, str],
    patience: float,
) -> tuple[View, dict[int, ControlLink]]:
    try:
        link = network.dial_control(leader_address, Hello(me.rank, CONTROL, run_id, LEADER), wait_until(deadline))
    except ConnectFailed as error:
        raise RendezvousTimeout(f"rank {me.rank} waited for rank 0: {error}") from error
    # dict() because a mapping of str is no mapping of JsonValue to the type checker
    join: JsonObject = {
        "kind": "join",
        "rank": me.rank,
        "name": me.name,
        "world_size": world_size,
        "address": me.address,
        "options": dict(options.items()),
    }
    try:
        link.send(join)
        message = _await_view(link, deadline, patience)
    except PeerLost:
        link.close()
        raise
    except SmolError as error:
        link.close()
        raise PeerLost(f"rank 0 ended before all ranks were there: {error}", LEADER) from error
    if message is None:
        link.close()
        raise RendezvousTimeout(f"rank {me.rank} waited {timeout:g} s at {leader_address}: other ranks are missing")
    if message.get("kind") == "refused":
        link.close()
        raise ConfigError(f"rank 0 at {leader_address} refused {me.name!r}: {message.get('reason')}")
    return _unpack_view(message, world_size), {LEADER: link}


def _await_view(link: ControlLink, deadline: float, patience: float) -> JsonObject | None:
    """The leader's answer, or None at the deadline.

    A leader that still starts says nothing: its silence counts from its first beat on.
    """
    silent_at = deadline
    while True:
        message = link.receive(wait_until(min(deadline, silent_at)))
        if message is not None and message.get("kind") in ("view", "refused"):
            return message
        now = time.monotonic()
        if message is not None:  # a beat, or a kind that this version does not know
            silent_at = now + patience
        elif now >= deadline:
            return None
        elif now >= silent_at:
            raise PeerLost(
                f"rank 0 was silent for {patience:g} s (cluster.patience) before all ranks were there", LEADER
            )


def _unpack_view(message: JsonObject, world_size: int) -> View:
    match message:
        case {
            "kind": "view",
            "generation": int(generation),
            "leader": int(leader),
            "run_id": str(run_id),
            "members": list(packed),
        } if (
            len(packed) == world_size
            and 0 <= generation < 2**32
            and 0 <= leader < world_size
            and is_plain(run_id)
            and len(run_id.encode()) <= MAX_NAME_BYTES
        ):
            members = tuple(
                Member(rank, name, address)
                for rank, entry in enumerate(packed)
                if isinstance(entry, dict)
                and isinstance(name := entry.get("name"), str)
                and isinstance(address := entry.get("address"), str)
            )
            if len(members) == world_size and all(is_plain(member.name, member.address) for member in members):
                return View(generation, members, leader, run_id)
    raise FrameError(f"rank 0 sent a malformed view of {world_size} ranks")


def is_plain(*words: str) -> bool:
    """Whether each may stand in a log line, a file and a handshake, whoever it came from."""
    return all(len(word.encode(errors="replace")) <= MAX_WORD_BYTES and word.isprintable() for word in words)


def _close_all(links: dict[int, ControlLink]) -> None:
    for link in links.values():
        link.close()
