"""Which nodes are there: the controller's side. Nodes come and go, each in a session of its own (cluster/sessions.py).

What they compute is decided for each chain of stages (stage_group.py).

    controller -> node    measure  dtype
    node -> controller    machine  bytes_per_s, free_bytes; or failed: generation 0, reason
    controller -> node    assign   generation, run_id, rank, layers, slots, length, dtype, is_deterministic
    node -> controller    accepted generation
    node -> controller    loaded   generation, address; or failed: generation, reason
    controller -> node    meet     generation, members
    controller -> node    end      it will not come back; another one may
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from smolcluster.cluster.sessions import WORKER, Granted, Newcomer, Reception, SessionWorld, Wait
from smolcluster.cluster.world import World
from smolcluster.errors import ServingError
from smolcluster.kinds import JsonObject
from smolcluster.serving.layer_store import Machine
from smolcluster.transport.base import Listener

logger = logging.getLogger(__name__)

# A look at whether a node that is waited for is still there.
TICK = 0.1


@dataclass(slots=True, eq=False)
class Node:
    """A node that is here. The hub's lock guards it.

    Attributes:
        ended: its session is over.
        machine: what it can do; None: not known yet.
        group: which chains it is for; None: nobody's.
        assigned: the newest generation that it was given layers for.
        accepted: the one that it has begun to read.
        is_reading: it was reading for an earlier one then.
        loaded: the generation whose layers it has read.
        address: where it listens for that generation.
        failed: why it could not read them, or cannot serve this model at all.
    """

    newcomer: Newcomer
    world: World
    ended: threading.Event = field(default_factory=threading.Event)
    machine: Machine | None = None
    group: object | None = None
    assigned: int = 0
    accepted: int = -1
    is_reading: bool = False
    loaded: int = 0
    address: str = ""
    failed: str | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self.newcomer.name

    def assign(self, generation: int) -> None:
        """It is given layers."""
        self.is_reading = self.accepted == self.assigned != self.loaded
        self.assigned = generation


class StageHub:
    """The nodes of a model. `news` guards them."""

    def __init__(
        self,
        doors: Sequence[Listener],
        *,
        name: str,
        patience: float,
        options: Mapping[str, str],
        dtype: str,
        measures: bool,
    ) -> None:
        """Let nodes in.

        Args:
            doors: where nodes knock.
            name: this host's.
            patience: seconds until a silent node counts as lost.
            options: what must be equal on all nodes.
            dtype: of the layers.
            measures: nodes are asked how fast they are; False: all are alike.
        """
        self.name, self.patience = name, patience
        self.news = threading.Condition()
        self._dtype, self._measures = dtype, measures
        self._nodes: dict[int, Node] = {}
        self._sessions = self._generation = 0
        self._is_closing = False
        self._reception = Reception(
            doors,
            name=name,
            patience=patience,
            options=options,
            grant=self._grant,
            begin=self._begin,
            revoke=lambda granted: None,
        )

    def nodes(self) -> list[Node]:
        """Those that are here and have said what they can do, by rank."""
        with self.news:
            return [
                node for _, node in sorted(self._nodes.items()) if node.machine is not None and not node.ended.is_set()
            ]

    def wait_for(self, ranks: Sequence[int], names: Mapping[int, str], seconds: float) -> None:
        """Block until these nodes are here.

        Raises:
            ServingError: one is not in time, or cannot serve this model.
        """
        deadline = time.monotonic() + seconds
        with self.news:
            while True:
                self.check_open()
                for node in self._nodes.values():
                    if node.failed is not None and node.newcomer.rank in ranks:
                        raise ServingError(f"node {node.name} cannot serve this model: {node.failed}")
                here = {node.newcomer.rank for node in self.nodes()}
                missing = [names[rank] for rank in ranks if rank not in here]
                if not missing:
                    return
                if time.monotonic() >= deadline:
                    raise ServingError(
                        f"{', '.join(missing)} did not come within {seconds:g} s. Start it there as well"
                    )
                self.news.wait(TICK)

    def next_generation(self) -> int:
        """The number of another chain."""
        with self.news:
            self._generation += 1
            return self._generation

    def check_open(self) -> None:
        """Raises: ServingError: the hub is closing."""
        if self._is_closing:
            raise ServingError("the server is shutting down")

    def stop(self) -> None:
        """Make no chain any more; one that is being made is given up soon."""
        with self.news:
            self._is_closing = True
            self.news.notify_all()

    def close(self) -> None:
        """Let all nodes go; blocks until the door is closed."""
        self.stop()
        with self.news:
            nodes = list(self._nodes.values())
        for node in nodes:
            node.world.send(WORKER, "end", {})
            node.world.leave()
            node.ended.set()
        self._reception.close()

    # ---- sessions, each in a thread of the reception

    def _grant(self, newcomer: Newcomer) -> Granted:
        with self.news:
            if self._is_closing:
                raise Wait("the server is shutting down")
            known = self._nodes.get(newcomer.rank)
            if known is not None and known.newcomer.instance != newcomer.instance:
                raise Wait(f"node {newcomer.rank} is here already")
            if known is not None:
                known.world.report_lost(WORKER, "it has come again")
                raise Wait("its earlier session has not ended yet")
            self._sessions += 1
            return Granted(self._sessions, self._sessions)

    def _begin(self, newcomer: Newcomer, world: SessionWorld) -> None:
        node = Node(newcomer, world, machine=None if self._measures else Machine())
        world.on("machine", lambda _, message: self._measured(node, message))
        world.on("accepted", lambda _, message: self._accepted(node, message))
        world.on("loaded", lambda _, message: self._answered(node, message))
        world.on("failed", lambda _, message: self._answered(node, message))
        with self.news:
            self._nodes[newcomer.rank] = node
            if self._is_closing:  # since it was granted: `close` may not know of it
                node.ended.set()
            self.news.notify_all()
        world.on_failure(lambda error: node.ended.set())
        if self._measures:
            world.send(WORKER, "measure", {"dtype": self._dtype})
        node.ended.wait()
        with self.news:
            if self._nodes.get(newcomer.rank) is node:
                del self._nodes[newcomer.rank]
            self.news.notify_all()
        if world.error() is not None:
            logger.warning("node lost name=%s reason=%s", newcomer.name, world.error())
        world.close()

    def _measured(self, node: Node, message: JsonObject) -> None:
        match message:
            case {"bytes_per_s": float(bytes_per_s), "free_bytes": int(free_bytes)} if bytes_per_s > 0:
                with self.news:
                    node.machine = Machine(bytes_per_s, float(free_bytes))
                    self.news.notify_all()
                logger.info("node measured name=%s machine=%s", node.name, node.machine)

    def _accepted(self, node: Node, message: JsonObject) -> None:
        with self.news:
            if message.get("generation") == node.assigned:
                node.accepted = node.assigned
            self.news.notify_all()

    def _answered(self, node: Node, message: JsonObject) -> None:
        with self.news:
            if message.get("generation") == node.assigned:
                node.loaded = node.assigned
                node.address = str(message.get("address"))
                reason = message.get("reason")
                node.failed = None if reason is None else str(reason)
            self.news.notify_all()
