"""Which nodes are there, and which of them are the stages of the chain: the controller's side.

Nodes come and go, each in a session of its own (cluster/sessions.py). For every chain the controller begins a new
generation: it tells each node its layers, waits until all have read them, and lets them meet. When a stage is lost, the
chain is over for all of its stages; the next one is made of the nodes that are left.

    controller -> node    assign   generation, run_id, rank, layers, slots, length
    node -> controller    loaded   generation, address; or failed: generation, reason
    controller -> node    meet     generation, members
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from smolcluster.cluster.generations import meet
from smolcluster.cluster.sessions import WORKER, Granted, Newcomer, Reception, SessionWorld, Wait
from smolcluster.cluster.world import Member, View, World
from smolcluster.collectives.direct import DirectRing
from smolcluster.errors import ClusterError, PeerLost, ServingError, SmolError, TransportError
from smolcluster.kinds import JsonObject
from smolcluster.serving.executor import Executor, LocalExecutor
from smolcluster.serving.layer_store import CacheSize, LayerStore
from smolcluster.serving.stage_server import ChainExecutor
from smolcluster.transport.base import Listener, Network

logger = logging.getLogger(__name__)

# Reading a large model from a slow disk or a network share.
LOAD_TIMEOUT = 1800.0
# A look at whether a node that is waited for is still there.
TICK = 0.1
# After a loss the others may be as good as lost, and not known to be: so many patiences until all answers are there.
MEET_PATIENCES = 4

Planner = Callable[[int], Sequence[range]]
# (rank, run_id) to where the other stages of that run connect.
Listen = Callable[[int, str], Listener]


class NodeFailed(PeerLost):
    """A node is there, but cannot compute what it was given."""


@dataclass(slots=True)
class _Node:
    """A node that is here.

    Attributes:
        loaded: the generation whose layers it has read.
        address: where it listens for that generation.
        failed: why it could not.
    """

    newcomer: Newcomer
    world: World
    ended: threading.Event = field(default_factory=threading.Event)
    loaded: int = 0
    address: str = ""
    failed: str | None = None


class StageHub:
    """The controller of a model's stages. `chain` makes the executor that the engine uses."""

    def __init__(
        self,
        door: Listener,
        listen: Listen,
        network: Network,
        store: LayerStore,
        size: CacheSize,
        plan: Planner,
        *,
        name: str,
        patience: float,
        options: Mapping[str, str],
        has_layers: bool = True,
    ) -> None:
        """Let nodes in.

        Args:
            door: where nodes knock.
            listen: opens where the stages of a chain connect.
            network: how to dial.
            store: the model.
            size: of each stage's cache.
            plan: number of stages to the layers of each.
            name: this host's.
            patience: seconds until a silent node counts as lost.
            options: what must be equal on all nodes.
            has_layers: False: this host runs the engine only.
        """
        self._listen, self._network = listen, network
        self._store, self._size, self._plan = store, size, plan
        self._name, self._patience, self._has_layers = name, patience, has_layers
        self._news = threading.Condition()
        self._nodes: dict[int, _Node] = {}
        self._sessions = self._generation = 0
        self._is_closing = False
        self._chain: ChainExecutor | None = None
        self.stages: list[tuple[str, range]] = []
        self._reception = Reception(
            [door],
            name=name,
            patience=patience,
            options=options,
            grant=self._grant,
            begin=self._begin,
            revoke=lambda granted: None,
        )

    # ---- nodes

    def nodes(self) -> list[str]:
        """The names of those that are here."""
        with self._news:
            return [node.newcomer.name for node in self._nodes.values()]

    def _grant(self, newcomer: Newcomer) -> Granted:
        with self._news:
            known = self._nodes.get(newcomer.rank)
            if known is not None and known.newcomer.instance != newcomer.instance:
                raise Wait(f"node {newcomer.rank} is here already")
            if known is not None:
                known.world.report_lost(WORKER, "it has come again")
                raise Wait("its earlier session has not ended yet")
            self._sessions += 1
            return Granted(self._sessions, self._sessions)

    def _begin(self, newcomer: Newcomer, world: SessionWorld) -> None:
        """A node's session, until it ends."""
        node = _Node(newcomer, world)
        world.on("loaded", lambda _, message: self._answered(node, message))
        world.on("failed", lambda _, message: self._answered(node, message))
        with self._news:
            self._nodes[newcomer.rank] = node
            self._news.notify_all()
        world.on_failure(lambda error: node.ended.set())
        node.ended.wait()
        with self._news:
            if self._nodes.get(newcomer.rank) is node:
                del self._nodes[newcomer.rank]
            self._news.notify_all()
        if world.error() is not None:
            logger.warning("node lost name=%s reason=%s", newcomer.name, world.error())
        world.close()

    def _answered(self, node: _Node, message: JsonObject) -> None:
        with self._news:
            if message.get("generation") == self._generation:
                node.loaded = self._generation
                node.address = str(message.get("address"))
                reason = message.get("reason")
                node.failed = None if reason is None else str(reason)
            self._news.notify_all()

    # ---- chains

    def chain(self, stages: int, *, without: Sequence[str] = (), timeout: float, needs_all: bool = False) -> Executor:
        """A chain of as many stages as told, or of as many nodes as there are; blocks until its stages have met.

        A node that is lost meanwhile is left out, and it begins again.

        Args:
            stages: how many it should have, this host's own included.
            without: names of nodes that are not to be used.
            timeout: seconds to wait for a node, if there is none at all and none can be done without.
            needs_all: a node that cannot compute its layers is not done without.

        Raises:
            ServingError: there is no node, or the hub is closed.
            NodeFailed: `needs_all`, and one cannot compute its layers.
            CheckpointError: this host cannot read its own.
        """
        deadline = time.monotonic() + timeout
        while True:
            self._close_chain()
            nodes = self._chosen(stages, without, deadline)
            try:
                return self._assemble(nodes)
            except PeerLost as error:
                if needs_all and isinstance(error, NodeFailed):
                    raise
                logger.warning("chain not made reason=%s", error)
                if 0 < error.rank <= len(nodes):
                    without = [*without, nodes[error.rank - 1].newcomer.name]
            except (TransportError, ClusterError) as error:
                logger.warning("chain not made reason=%s", error)
                if time.monotonic() >= deadline:
                    raise
                time.sleep(TICK)

    def _chosen(self, stages: int, without: Sequence[str], deadline: float) -> list[_Node]:
        wanted = stages - self._has_layers
        least = 0 if self._has_layers else 1
        with self._news:
            while True:
                self._check_open()
                nodes = [self._nodes[rank] for rank in sorted(self._nodes)]
                able = [node for node in nodes if node.newcomer.name not in without and not node.ended.is_set()]
                if len(able) >= least:
                    return able[:wanted]
                if not self._news.wait(TICK) and time.monotonic() >= deadline:
                    raise ServingError("no node is there to compute. Start one")

    def _assemble(self, nodes: Sequence[_Node]) -> Executor:
        count = len(nodes) + self._has_layers
        split = list(self._plan(count))
        own, others = (split[0], split[1:]) if self._has_layers else (None, split)
        with self._news:
            self._generation += 1
            generation = self._generation
        run_id = secrets.token_hex(8)
        for rank, (node, layers) in enumerate(zip(nodes, others, strict=True), start=1):
            node.world.send(WORKER, "assign", _assignment(generation, run_id, rank, layers, self._size))
        decoder = None if own is None else self._store.decoder(own, self._size)
        self._wait_loaded(nodes, generation)
        names = [*([self._name] if self._has_layers else []), *(node.newcomer.name for node in nodes)]
        self.stages = list(zip(names, split, strict=True))
        if not nodes:
            assert decoder is not None
            return LocalExecutor(decoder)
        listener = self._listen(0, run_id)
        members = [Member(0, self._name, listener.address)]
        members += [Member(rank, node.newcomer.name, node.address) for rank, node in enumerate(nodes, start=1)]
        message: JsonObject = {
            "generation": generation,
            "members": [[member.name, member.address] for member in members],
        }
        for node in nodes:
            node.world.send(WORKER, "meet", message)
        timeout = MEET_PATIENCES * self._patience
        view = View(generation, tuple(members), 0, run_id)

        def watch(world: World) -> None:
            for rank, node in enumerate(nodes, start=1):
                node.world.on_failure(partial(_lose, world, rank, node.newcomer.name))

        world = meet(0, view, listener, self._network, patience=self._patience, timeout=timeout, begun=watch)
        try:
            ring = DirectRing(world, timeout=timeout)
        except BaseException:
            world.close()
            raise
        self._chain = ChainExecutor(ring, decoder, slots=self._size.slots, length=self._size.length)
        logger.info("chain made generation=%d stages=%s", generation, self.stages)
        return self._chain

    def _wait_loaded(self, nodes: Sequence[_Node], generation: int) -> None:
        deadline = time.monotonic() + LOAD_TIMEOUT
        with self._news:
            while True:
                self._check_open()
                for rank, node in enumerate(nodes, start=1):
                    if node.ended.is_set():
                        raise PeerLost(f"node {node.newcomer.name} is lost", rank)
                    if node.loaded == generation and node.failed is not None:
                        raise NodeFailed(f"node {node.newcomer.name} cannot compute its layers: {node.failed}", rank)
                if all(node.loaded == generation for node in nodes):
                    return
                if time.monotonic() >= deadline:
                    raise ServingError(f"the nodes have not read their layers within {LOAD_TIMEOUT:g} s")
                self._news.wait(TICK)

    def _check_open(self) -> None:
        if self._is_closing:
            raise ServingError("the server is shutting down")

    def stop(self) -> None:
        """Make no chain any more; one that is being made is given up soon."""
        with self._news:
            self._is_closing = True
            self._news.notify_all()

    def _close_chain(self) -> None:
        if self._chain is not None:
            self._chain.abandon()
            self._chain = None

    def close(self) -> None:
        """Let all nodes go; blocks until the door is closed."""
        self.stop()
        if self._chain is not None and self._chain.failure() is None:
            with contextlib.suppress(SmolError):
                self._chain.close()
                self._chain = None
        self._close_chain()
        with self._news:
            nodes = list(self._nodes.values())
        for node in nodes:
            node.world.leave()
            node.ended.set()
        self._reception.close()


def _lose(world: World, rank: int, name: str, error: SmolError) -> None:
    """A node whose session has ended takes no part in a chain either."""
    world.abort(PeerLost(f"node {name} is lost: {error}", rank))


def _assignment(generation: int, run_id: str, rank: int, layers: range, size: CacheSize) -> JsonObject:
    return {
        "generation": generation,
        "run_id": run_id,
        "rank": rank,
        "layers": [layers.start, layers.stop],
        "slots": size.slots,
        "length": size.length,
    }
