"""Chains of stages: which nodes compute which layers, one chain after the other.

For every chain the controller begins a new generation: it tells each node its layers, waits until all have read them,
and lets them meet. When a stage is lost, the chain is over for all of its stages; the next one is made of the nodes
that are left, or of spare ones in the places of those that are gone.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial

from smolcluster.cluster.generations import meet
from smolcluster.cluster.sessions import WORKER
from smolcluster.cluster.world import Member, View, World
from smolcluster.collectives.direct import DirectRing
from smolcluster.errors import ClusterError, PeerLost, ServingError, SmolError, TransportError
from smolcluster.kinds import JsonObject
from smolcluster.serving.executor import Executor, LocalExecutor
from smolcluster.serving.layer_store import CacheSize, LayerStore, Machine
from smolcluster.serving.stage_hub import TICK, Node, StageHub
from smolcluster.serving.stage_server import ChainExecutor
from smolcluster.transport.base import Listener, Network

logger = logging.getLogger(__name__)

# Reading a large model from a slow disk or a network share.
LOAD_TIMEOUT = 1800.0
# After a loss the others may be as good as lost, and not known to be: so many patiences until all answers are there.
MEET_PATIENCES = 4

# What the hosts of the stages can do, in order, to the layers of each.
Planner = Callable[[Sequence[Machine]], Sequence[range]]
# (rank, run_id) to where the other stages of that run connect.
Listen = Callable[[int, str], Listener]


class NodeFailed(PeerLost):
    """A node is there, but cannot compute what it was given."""


class StageGroup:
    """A model, or one of its replicas, over some of a hub's nodes. One thread makes its chains."""

    def __init__(
        self,
        hub: StageHub,
        listen: Listen,
        network: Network,
        store: LayerStore,
        size: CacheSize,
        plan: Planner,
        *,
        stages: int,
        own: Machine | None,
        timeout: float,
    ) -> None:
        """Take no node yet.

        Args:
            hub: has the nodes.
            listen: opens where the stages of a chain connect.
            network: how to dial.
            store: the model.
            size: of each stage's cache.
            plan: divides the layers.
            stages: how many there should be, this host's own included.
            own: what this host can do; None: it runs the engine only.
            timeout: seconds for a micro-batch; see ChainExecutor.
        """
        self._hub, self._listen, self._network = hub, listen, network
        self._store, self._size, self._plan = store, size, plan
        self._timeout = timeout
        self._wanted, self._own = stages - (own is not None), own
        self._chain: ChainExecutor | None = None
        self._unwatch: list[Callable[[], None]] = []  # of the newest chain's nodes
        self.stages: list[tuple[str, range]] = []
        self._nodes: list[Node] = []

    def chain(self, *, timeout: float, needs_all: bool = False) -> Executor:
        """A chain of as many stages as there should be, or of as many nodes as there are; blocks until they have met.

        A node that is lost meanwhile is left out, and it begins again.

        Args:
            timeout: seconds to wait for a node, if there is none at all and none can be done without.
            needs_all: a node that cannot compute its layers is not done without.

        Raises:
            ServingError: there is no node, or the hub is closed.
            NodeFailed: `needs_all`, and one cannot compute its layers.
            ConfigError: the nodes have not enough memory.
            CheckpointError: this host cannot read its own layers.
        """
        return self._make([], timeout, needs_all)

    def recover(self, error: SmolError, *, timeout: float) -> Executor:
        """Another chain, after one has failed; see `chain`. Who was lost is left out, also if it seems to be there."""
        lost = []
        if isinstance(error, PeerLost) and 0 < error.rank <= len(self._nodes):
            lost = [self._nodes[error.rank - 1]]
        return self._make(lost, timeout, needs_all=False)

    def close(self) -> None:
        """End the chain: when nothing is under way, all at once."""
        if self._chain is not None and self._chain.failure() is None:
            with contextlib.suppress(SmolError):
                self._chain.close()
                self._chain = None
        self._abandon()

    def _make(self, without: Sequence[Node], timeout: float, needs_all: bool) -> Executor:
        deadline = time.monotonic() + timeout
        while True:
            self._abandon()
            nodes = self._chosen(without, deadline)
            try:
                return self._assemble(nodes)
            except PeerLost as error:
                if needs_all and isinstance(error, NodeFailed):
                    raise
                logger.warning("chain not made reason=%s", error)
                if 0 < error.rank <= len(nodes):
                    without = [*without, nodes[error.rank - 1]]
            except (TransportError, ClusterError) as error:
                logger.warning("chain not made reason=%s", error)
                if time.monotonic() >= deadline:
                    raise
                time.sleep(TICK)

    def _chosen(self, without: Sequence[Node], deadline: float) -> list[Node]:
        """Those of the newest chain in their places, others in the places of those that are gone.

        Args:
            without: sessions that are not to be used. Whoever comes again has another one.
            deadline: until when somebody is waited for.
        """
        least = 0 if self._own is not None else 1
        hub = self._hub
        with hub.news:
            while True:
                hub.check_open()
                able = {node.name: node for node in hub.nodes() if node.group in (None, self) and node not in without}
                if len(able) >= least:
                    break
                if not hub.news.wait(TICK) and time.monotonic() >= deadline:
                    raise ServingError("no node is there to compute. Start one")
            places = [able.pop(node.name, None) for node in self._nodes[: self._wanted]]
            places += [None] * (self._wanted - len(places))
            spares = iter(able.values())
            found = [node or next(spares, None) for node in places]
            nodes = [node for node in found if node is not None]
            for node in hub.nodes():
                if node.group is self:
                    node.group = None
            for node in nodes:
                node.group = self
            return nodes

    def _assemble(self, nodes: Sequence[Node]) -> Executor:
        hub = self._hub
        machines = [*([self._own] if self._own is not None else []), *(node.machine or Machine() for node in nodes)]
        split = list(self._plan(machines))
        own, others = (split[0], split[1:]) if self._own is not None else (None, split)
        generation, run_id = hub.next_generation(), secrets.token_hex(8)
        for rank, (node, layers) in enumerate(zip(nodes, others, strict=True), start=1):
            with hub.news:
                node.assign(generation)
            node.world.send(WORKER, "assign", self._assignment(generation, run_id, rank, layers))
        decoder = None if own is None else self._store.decoder(own, self._size)
        self._wait_loaded(nodes, generation)
        names = [*([hub.name] if self._own is not None else []), *(node.name for node in nodes)]
        self.stages, self._nodes = list(zip(names, split, strict=True)), list(nodes)
        if not nodes:
            assert decoder is not None, "without nodes this host has all layers"
            return LocalExecutor(decoder)
        listener = self._listen(0, run_id)
        members = [Member(0, hub.name, listener.address)]
        members += [Member(rank, node.name, node.address) for rank, node in enumerate(nodes, start=1)]
        message: JsonObject = {
            "generation": generation,
            "members": [[member.name, member.address] for member in members],
        }
        for node in nodes:
            node.world.send(WORKER, "meet", message)
        timeout = MEET_PATIENCES * hub.patience
        view = View(generation, tuple(members), 0, run_id)

        def watch(world: World) -> None:
            for rank, node in enumerate(nodes, start=1):
                self._unwatch.append(node.world.on_failure(partial(_lose, world, rank, node.name)))

        world = meet(0, view, listener, self._network, patience=hub.patience, timeout=timeout, begun=watch)
        try:
            ring = DirectRing(world, timeout=timeout)
        except BaseException:
            world.close()
            raise
        self._chain = ChainExecutor(
            ring, decoder, slots=self._size.slots, length=self._size.length, timeout=self._timeout
        )
        logger.info("chain made generation=%d stages=%s", generation, self.stages)
        return self._chain

    def _assignment(self, generation: int, run_id: str, rank: int, layers: range) -> JsonObject:
        return {
            "generation": generation,
            "run_id": run_id,
            "rank": rank,
            "layers": [layers.start, layers.stop],
            "slots": self._size.slots,
            "length": self._size.length,
            "dtype": self._store.dtype,
            "is_deterministic": self._store.is_deterministic,
        }

    def _wait_loaded(self, nodes: Sequence[Node], generation: int) -> None:
        deadline = time.monotonic() + LOAD_TIMEOUT
        answered_by = time.monotonic() + MEET_PATIENCES * self._hub.patience
        with self._hub.news:
            while True:
                self._hub.check_open()
                for rank, node in enumerate(nodes, start=1):
                    if node.ended.is_set():
                        raise PeerLost(f"node {node.name} is lost", rank)
                    if node.loaded == generation and node.failed is not None:
                        reason, node.failed = node.failed, None
                        raise NodeFailed(f"node {node.name} cannot compute its layers: {reason}", rank)
                    # Its session lives, but what computes does not: a hung device.
                    if not node.is_reading and node.accepted != generation and time.monotonic() >= answered_by:
                        raise PeerLost(f"node {node.name} does not take layers", rank)
                if all(node.loaded == generation for node in nodes):
                    return
                if time.monotonic() >= deadline:
                    raise ServingError(f"the nodes have not read their layers within {LOAD_TIMEOUT:g} s")
                self._hub.news.wait(TICK)

    def _abandon(self) -> None:
        if self._chain is not None:
            self._chain.abandon()
            self._chain = None
        for forget in self._unwatch:  # or a node's session would keep the worlds of all chains that it was part of
            forget()
        self._unwatch = []


def _lose(world: World, rank: int, name: str, error: SmolError) -> None:
    """A node whose session has ended takes no part in a chain either."""
    world.abort(PeerLost(f"node {name} is lost: {error}", rank))
