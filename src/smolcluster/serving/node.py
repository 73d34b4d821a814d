"""A node that computes layers for a controller: reads what it is told to, takes its place in the chain, and again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from smolcluster.cluster.generations import meet
from smolcluster.cluster.sessions import SERVER
from smolcluster.cluster.world import Member, View, World
from smolcluster.collectives.direct import DirectRing
from smolcluster.errors import FrameError, ServingError, SmolError
from smolcluster.kinds import JsonObject
from smolcluster.serving.executor import LayerDecoder
from smolcluster.serving.layer_store import CacheSize, LayerStore, measure_machine
from smolcluster.serving.stage_group import MEET_PATIENCES, Listen
from smolcluster.serving.stage_server import run_stage
from smolcluster.transport.base import Listener, Network

logger = logging.getLogger(__name__)

# The model in some dtype, deterministic or not.
OpenStore = Callable[[str, bool], LayerStore]


@dataclass(frozen=True, slots=True)
class _Assignment:
    generation: int
    run_id: str
    rank: int
    layers: range
    size: CacheSize
    dtype: str
    is_deterministic: bool


@dataclass(frozen=True, slots=True)
class _Ready:
    """Has read its layers, and listens for the other stages."""

    assigned: _Assignment
    decoder: LayerDecoder
    listener: Listener


class StageNode:
    """One session's work. `run` returns when the session is over."""

    def __init__(
        self, session: World, listen: Listen, network: Network, open_store: OpenStore, device: str, patience: float
    ) -> None:
        """Args:
        session: with the controller.
        listen: opens where the other stages of a chain connect.
        network: how to dial.
        open_store: the model.
        device: where to compute.
        patience: seconds until a silent stage counts as lost.
        """
        self._session, self._listen, self._network = session, listen, network
        self._open_store, self._device, self._patience = open_store, device, patience
        self._news: SimpleQueue[tuple[str, JsonObject]] = SimpleQueue()
        self._lock = threading.Lock()
        self._world: World | None = None
        self._generation = 0
        self._ready: _Ready | None = None
        session.on("measure", lambda _, message: self._told("measure", message))
        session.on("assign", lambda _, message: self._told("assign", message))
        session.on("meet", lambda _, message: self._told("meet", message))
        session.on("end", lambda _, message: self._told("end", message))
        session.on_failure(lambda error: self._told("end", {}))

    def run(self) -> SmolError | None:
        """Compute until the session ends; why it did."""
        try:
            return self._obey()
        except FrameError as error:  # of a controller that speaks otherwise; the next one may not
            return error
        finally:
            self._unready()

    def _obey(self) -> SmolError | None:
        while True:
            kind, message = self._news.get()
            if kind != "meet":
                self._unready()
            if kind == "end":
                return self._session.error()
            if kind == "measure":
                self._measure(str(message.get("dtype")))
            if kind == "assign":
                assigned = _read_assignment(message)
                if assigned.generation == self._generation:  # nothing newer is known yet
                    self._session.send(SERVER, "accepted", {"generation": assigned.generation})
                    self._ready = self._prepare(assigned)
            elif self._ready is not None and message.get("generation") == self._ready.assigned.generation:
                members = _read_members(message)
                ready, self._ready = self._ready, None
                self._serve(ready, members)

    def _unready(self) -> None:
        """Listen no more for the other stages."""
        if self._ready is not None:
            self._ready.listener.close()
            self._ready = None

    def _told(self, kind: str, message: JsonObject) -> None:
        """On the session's thread: what is new ends what is under way."""
        with self._lock:
            if kind == "assign":
                generation = message.get("generation")
                self._generation = generation if isinstance(generation, int) else 0
            if kind != "meet" and self._world is not None:
                self._world.abort(FrameError("the controller has begun another chain"))
        self._news.put((kind, message))

    def _measure(self, dtype: str) -> None:
        try:
            config = self._open_store(dtype, False).config
            machine = measure_machine(config, dtype, self._device)
        except (SmolError, MemoryError, RuntimeError) as error:
            logger.error("not measured reason=%s", error)
            self._session.send(SERVER, "failed", {"generation": 0, "reason": str(error)[:1000]})
            return
        answer: JsonObject = {"bytes_per_s": machine.bytes_per_s, "free_bytes": int(machine.free_bytes)}
        self._session.send(SERVER, "machine", answer)

    def _prepare(self, assigned: _Assignment) -> _Ready | None:
        generation = assigned.generation
        try:
            store = self._open_store(assigned.dtype, assigned.is_deterministic)
            decoder = store.decoder(assigned.layers, assigned.size)
            listener = self._listen(assigned.rank, assigned.run_id)
        except (SmolError, MemoryError, RuntimeError) as error:
            logger.error("layers not read reason=%s", error)
            self._session.send(SERVER, "failed", {"generation": generation, "reason": str(error)[:1000]})
            return None
        logger.info("layers read generation=%d layers=%s", generation, assigned.layers)
        self._session.send(SERVER, "loaded", {"generation": generation, "address": listener.address})
        return _Ready(assigned, decoder, listener)

    def _serve(self, ready: _Ready, members: tuple[Member, ...]) -> None:
        assigned, timeout = ready.assigned, MEET_PATIENCES * self._patience
        view = View(assigned.generation, members, 0, assigned.run_id)
        try:
            world = meet(
                assigned.rank,
                view,
                ready.listener,
                self._network,
                patience=self._patience,
                timeout=timeout,
                begun=lambda world: self._watch(world, assigned.generation),
            )
            try:
                ring = DirectRing(world, timeout=timeout)
            except SmolError:
                world.close()
                raise
            try:
                run_stage(ring, ready.decoder)
            except Exception as error:
                # The others must not wait; this process may do better with other layers.
                ring.abort(error if isinstance(error, SmolError) else ServingError(f"a stage has failed: {error!r}"))
                raise
            finally:
                ring.close()
        except SmolError as error:
            logger.warning("chain over generation=%d reason=%s", assigned.generation, error)
        except Exception:
            logger.exception("stage failed generation=%d", assigned.generation)
        finally:
            self._watch(None, assigned.generation)

    def _watch(self, world: World | None, generation: int) -> None:
        """What the session's thread is to abort when there is news."""
        with self._lock:
            self._world = world
            is_over = world is not None and generation != self._generation
        if world is not None and is_over:
            world.abort(FrameError("the controller has begun another chain"))


def _read_assignment(message: JsonObject) -> _Assignment:
    match message:
        case {
            "generation": int(generation),
            "run_id": str(run_id),
            "rank": int(rank),
            "layers": [int(start), int(stop)],
            "slots": int(slots),
            "length": int(length),
            "dtype": str(dtype),
            "is_deterministic": bool(is_deterministic),
        }:
            size = CacheSize(slots, length)
            return _Assignment(generation, run_id, rank, range(start, stop), size, dtype, is_deterministic)
    raise FrameError("the controller sent an assignment that cannot be read")


def _read_members(message: JsonObject) -> tuple[Member, ...]:
    members = message.get("members")
    if not isinstance(members, list):
        raise FrameError("the controller sent a list of members that cannot be read")
    return tuple(
        Member(rank, str(member[0]), str(member[1]))
        for rank, member in enumerate(members)
        if isinstance(member, list) and len(member) == 2
    )
