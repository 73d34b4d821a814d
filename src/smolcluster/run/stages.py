"""Over which processes a served model is spread: stages or replicas on this machine, or on those of a cluster file."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil

from smolcluster.config.hosts import ServingHosts
from smolcluster.config.schema import ServingConfig
from smolcluster.errors import ConfigError
from smolcluster.kinds import JsonObject, JsonValue
from smolcluster.models.split import needed_room, split_by_cost
from smolcluster.run.stage import StageBootstrap, node_options
from smolcluster.run.stage_processes import StageProcesses
from smolcluster.serving.executor import Executor, LocalExecutor
from smolcluster.serving.layer_store import CacheSize, LayerStore, Machine, measure_machine
from smolcluster.serving.replica import Recover
from smolcluster.serving.stage_group import StageGroup
from smolcluster.serving.stage_hub import StageHub
from smolcluster.transport.base import Listener
from smolcluster.transport.security import new_token
from smolcluster.transport.tcp import TcpNetwork, TcpOptions, listen

logger = logging.getLogger(__name__)

# For the processes of this machine to import torch, and to come.
START_SECONDS = 120.0
# For machines that somebody starts one after the other, in patiences.
MACHINES_PATIENCES = 60
# How long streams wait for a node to come back where none is left, in patiences.
RETURN_PATIENCES = 12
# What a machine has besides: the system, and what a step needs.
_USABLE_MEMORY = 0.9
# A context that is shorter is of no use.
LEAST_LENGTH = 64
LOCALHOST = "127.0.0.1"

Mode = Literal["mp", "dp"]


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines of a cluster file, as the controller sees them.

    Attributes:
        hosts: who serves; the controller is this one.
        token: of the cluster.
        tcp: how this machine's sockets are set up.
        say: tells the user what is waited for.
    """

    hosts: ServingHosts
    token: bytes
    tcp: TcpOptions
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, slots=True)
class Layout:
    """Over how many processes a model is spread.

    Attributes:
        mode: "mp": each has some of the layers; "dp": each has all of them, and answers requests of its own.
        processes: that compute, this one among them if it does; of machines those above are spare.
        split: blocks of each stage; None: by what they cost.
        patience: seconds until a silent process counts as lost.
        is_deterministic: an answer does not depend on the others', to the last bit, nor on what dies meanwhile.
        logs: folder for the logs of this machine's processes; None: they have none.
        machines: where they are; None: on this machine.
    """

    mode: Mode = "mp"
    processes: int = 1
    split: tuple[int, ...] | None = None
    patience: float = 5.0
    is_deterministic: bool = False
    logs: Path | None = None
    machines: Machines | None = None


class Stages:
    """What computes: executors for the engine, and the processes behind them."""

    def __init__(self, folder: Path, store: LayerStore, settings: ServingConfig, device: str, layout: Layout) -> None:
        """Let the others come, and make their chains; blocks until all have read their layers.

        Raises:
            ConfigError: the split is none, or the model does not fit.
            ServingError: a process did not come.
            CheckpointError: the weights are damaged.
        """
        self._store, self._layout, self._timeout = store, layout, settings.timeout
        self._hub: StageHub | None = None
        self._groups: list[StageGroup] = []
        self.executors: list[tuple[Executor, Recover | None]] = []
        with contextlib.ExitStack() as undo:
            own = self._begin(folder, device, undo)
            self._size = _cache_size(store, settings, self._room(own))
            self._check_split()
            self._make(own)
            self._undo = undo.pop_all()

    def describe(self) -> JsonObject:
        """How the layers are spread: blocks of each stage, in order, of all replicas."""
        groups = [[layers for _, layers in group.stages] for group in self._groups]
        hosts = [[name for name, _ in group.stages] for group in self._groups]
        if len(self._groups) < len(self.executors):
            groups.insert(0, [range(self._store.layers)])
            hosts.insert(0, [self._name])
        split: list[JsonValue] = [_blocks_of(self._store, stages) for stages in groups]
        names: list[JsonValue] = [list(each) for each in hosts]
        if self._layout.mode == "dp":
            return {"mode": "dp", "split": split, "nodes": names}
        return {"mode": "mp", "split": split[0], "nodes": names[0]}

    def stop(self) -> None:
        """Put no stages together any more."""
        if self._hub is not None:
            self._hub.stop()

    def close(self) -> None:
        """Let the others go, and end the processes of this machine; blocks."""
        self._undo.close()

    # ---- the beginning

    def _begin(self, folder: Path, device: str, undo: contextlib.ExitStack) -> Machine | None:
        """Let the others come; what this host can do, None: it only runs the engine."""
        layout, machines = self._layout, self._layout.machines
        if machines is not None:
            return self._begin_machines(folder, device, machines, undo)
        self._name = "stage0"
        if layout.processes > 1:
            self._begin_processes(folder, device, undo)
        return Machine()

    def _begin_processes(self, folder: Path, device: str, undo: contextlib.ExitStack) -> None:
        layout = self._layout
        token, run_id = new_token(), secrets.token_hex(8)
        tcp = TcpOptions(layout.patience, shared_memory=False)
        door = listen(LOCALHOST, 0, token=token, run_id=run_id, rank=0, options=tcp)
        options = node_options(folder)
        processes = undo.enter_context(
            contextlib.closing(
                StageProcesses(
                    StageBootstrap(
                        rank=number,
                        name=f"stage{number}",
                        host=LOCALHOST,
                        controller=door.address,
                        token=token.hex(),
                        run_id=run_id,
                        model=folder.absolute(),
                        device=device,
                        patience=layout.patience,
                        options=options,
                        log=None if layout.logs is None else layout.logs.absolute() / f"stage{number}.log",
                    )
                    for number in range(1, layout.processes)
                )
            )
        )
        hub = self._open_hub([door], options, undo, measures=False)
        self._listen = partial(_listen_at, LOCALHOST, token, tcp)
        self._network = TcpNetwork(token, tcp)
        processes.wait_for(lambda: len(hub.nodes()) == layout.processes - 1, START_SECONDS)

    def _begin_machines(
        self, folder: Path, device: str, machines: Machines, undo: contextlib.ExitStack
    ) -> Machine | None:
        hosts, store = machines.hosts, self._store
        self._name = hosts.controller.name
        run_id = cluster_run_id(hosts)
        doors = [
            listen(ip, port, token=machines.token, run_id=run_id, rank=0, options=machines.tcp)
            for ip, port in hosts.controller.listens
        ]
        hub = self._open_hub(doors, node_options(folder), undo, measures=True)
        self._listen = partial(_listen_at, hosts.controller.listens[0][0], machines.token, machines.tcp)
        self._network = TcpNetwork(machines.token, machines.tcp)
        own = measure_machine(store.config, store.dtype, device) if hosts.has_layers else None
        names = {number: node.name for number, node in enumerate(hosts.nodes, start=1)}
        wanted = list(names)[: self._layout.processes - hosts.has_layers]
        if wanted:
            machines.say(f"waiting for {', '.join(names[number] for number in wanted)}")
        hub.wait_for(wanted, names, MACHINES_PATIENCES * self._layout.patience)
        return own

    def _open_hub(
        self, doors: Sequence[Listener], options: dict[str, str], undo: contextlib.ExitStack, *, measures: bool
    ) -> StageHub:
        hub = StageHub(
            doors,
            name=self._name,
            patience=self._layout.patience,
            options=options,
            dtype=self._store.dtype,
            measures=measures,
        )
        self._hub = undo.enter_context(contextlib.closing(hub))
        undo.callback(self._close_groups)  # before the hub lets its nodes go
        return hub

    def _room(self, own: Machine | None) -> float:
        """Bytes of memory that a replica can have, over all its stages."""
        available = float(psutil.virtual_memory().available)
        if self._layout.machines is None:
            return available / (self._layout.processes if self._layout.mode == "dp" else 1)
        assert self._hub is not None, "machines have one"
        free = [] if own is None else [own.free_bytes]
        free += [node.machine.free_bytes for node in self._hub.nodes() if node.machine is not None]
        free = free[: self._layout.processes]
        return min(free) if self._layout.mode == "dp" else sum(free)

    def _check_split(self) -> None:
        layout = self._layout
        if layout.split is not None and layout.mode == "mp":
            _split_as_told(self._store, layout.split, layout.processes)

    # ---- chains

    def _make(self, own: Machine | None) -> None:
        layout, store = self._layout, self._store
        if own is not None and (layout.processes == 1 or layout.mode == "dp"):
            self.executors.append((LocalExecutor(store.decoder(range(store.layers), self._size)), None))
        if self._hub is None or (own is not None and layout.processes == 1):
            return
        if layout.mode == "mp":
            self._add_group(layout.processes, own)
        else:
            for _ in range(layout.processes - (own is not None)):
                self._add_group(1, None)

    def _add_group(self, stages: int, own: Machine | None) -> None:
        assert self._hub is not None, "somebody else computes"
        group = StageGroup(
            self._hub, self._listen, self._network, self._store, self._size, self._plan, stages=stages, own=own,
            timeout=self._timeout,
        )  # fmt: skip
        self._groups.append(group)
        executor = group.chain(timeout=START_SECONDS, needs_all=True)
        self.executors.append((executor, partial(group.recover, timeout=RETURN_PATIENCES * self._layout.patience)))

    def _plan(self, machines: Sequence[Machine]) -> Sequence[range]:
        told = self._layout.split
        if told is not None and len(told) == len(machines):
            return _split_as_told(self._store, told, len(machines))
        return plan_layers(self._store, self._size, machines)

    def _close_groups(self) -> None:
        for group in self._groups:
            group.close()
        self._groups = []


def plan_layers(store: LayerStore, size: CacheSize, machines: Sequence[Machine]) -> list[range]:
    """The layers of each stage: by what a token reads and how fast each machine reads it, within their memory.

    Raises:
        ConfigError: the model does not fit, or has fewer layers than there are machines.
    """
    costs = store.costs(size)
    times = [[cost.read / machine.bytes_per_s for cost in costs] for machine in machines]
    held = [int(cost.held) for cost in costs]
    limits = [machine.free_bytes * _USABLE_MEMORY for machine in machines]
    if max(limits) < float("inf") and needed_room(held, limits) > 1:
        raise ConfigError(
            f"the model does not fit: weights and caches need {sum(held) / 2**30:.1f} GiB, its stages have room for "
            f"{', '.join(f'{limit / 2**30:.1f}' for limit in limits)} GiB. Use more machines, --dtype int8, or a lower "
            "serving.ctx_length"
        )
    return split_by_cost(times, held, limits)


def _split_as_told(store: LayerStore, blocks: Sequence[int], stages: int) -> list[range]:
    layers = store.layers
    if len(blocks) != stages or sum(blocks) != layers - 2 or min(blocks) < 0:
        raise ConfigError(
            f"--split {','.join(map(str, blocks))}: the model has {layers - 2} blocks, so give {stages} numbers that "
            "add up to that"
        )
    edges = [0] + [1 + sum(blocks[:number]) for number in range(1, stages)] + [layers]
    return [range(begin, end) for begin, end in itertools.pairwise(edges)]


def _blocks_of(store: LayerStore, stages: Sequence[range]) -> JsonValue:
    """How many blocks each stage has."""
    return [len(range(max(layers.start, 1), min(layers.stop, store.layers - 1))) for layers in stages]


def _cache_size(store: LayerStore, settings: ServingConfig, free_bytes: float) -> CacheSize:
    """Keys and values of all slots are to take half of the free memory at most, all stages of a replica together.

    Raises:
        ConfigError: a context of `serving.ctx_length` tokens takes more.
    """
    slots, longest = settings.max_concurrent, store.config.max_positions
    room = int(free_bytes / 2 // (slots * store.bytes_per_position()))
    length = min(settings.ctx_length or longest, longest)
    if length <= room:
        return CacheSize(slots, length)
    if settings.ctx_length is not None or room < LEAST_LENGTH:
        raise ConfigError(
            f"{slots} contexts of {length} tokens do not fit into half of the free memory; {room} tokens each would. "
            "Set serving.ctx_length or serving.max_concurrent lower"
        )
    logger.warning("the context is cut from %d to %d tokens, so that %d fit into memory", length, room, slots)
    return CacheSize(slots, room)


def _listen_at(host: str, token: bytes, tcp: TcpOptions, rank: int, run_id: str) -> Listener:
    return listen(host, 0, token=token, run_id=run_id, rank=rank, options=tcp)


def cluster_run_id(hosts: ServingHosts) -> str:
    """What machines with the same cluster file have in common before they talk."""
    names = [hosts.controller.name, *(node.name for node in hosts.nodes)]
    return hashlib.sha256(json.dumps(["serve", *names]).encode()).hexdigest()[:16]
