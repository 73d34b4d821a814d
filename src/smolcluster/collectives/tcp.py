"""The communicator over our own channels: TCP between machines, `inproc` within a process.

Idea: one bulk connection to every other rank for collectives, one for messages, one non-blocking loop over all of them.
This file maps each call to pieces of an algorithm of ring.py or mesh.py; progress.py runs them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor

from smolcluster.cluster.world import World
from smolcluster.collectives import checks, mesh, ring
from smolcluster.collectives.base import Codec, ReduceOp
from smolcluster.collectives.codec import ErrorFeedback
from smolcluster.collectives.lane import CROWDED_QUANTUM_BYTES, QUANTUM_BYTES, Lane, Receiver
from smolcluster.collectives.lane_spans import LaneSpans
from smolcluster.collectives.messages import MessageBox
from smolcluster.collectives.plan import ALIGNED_ELEMENTS, Plan, measure_link, plan_for, plan_for_one_host
from smolcluster.collectives.progress import SPIN_SECONDS, Call, ProgressLoop
from smolcluster.collectives.staging import DeviceStaging, Staging
from smolcluster.collectives.wire import Arrival, Steps
from smolcluster.collectives.work import PendingWork
from smolcluster.device import cores
from smolcluster.errors import SmolError
from smolcluster.kinds import JsonValue
from smolcluster.telemetry import Telemetry
from smolcluster.transport import frame
from smolcluster.transport.frame import CODECS, KIND_COLLECTIVE, KIND_MESSAGE, Prelude
from smolcluster.transport.tensors import dtype_code, raw_bytes

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 30.0
# Up to this size a call's first bytes are sent by its caller, before any other thread is woken.
SMALL_BYTES = 64 << 10


class TcpCommunicator:
    """See collectives.base.Communicator. `close` also leaves the world, unless this is a part made by `split`."""

    def __init__(
        self,
        world: World,
        *,
        ranks: Sequence[int] | None = None,
        name: str = "world",
        plan: Plan | None = None,
        staging: Staging | None = None,
        telemetry: Telemetry | None = None,
        timeout: float = CONNECT_TIMEOUT,
        spins: bool = True,
    ) -> None:
        """Open the connections to all other ranks; blocks until they are there.

        Args:
            world: the ranks of this run.
            ranks: world ranks of this group, in its order; None: all.
            name: of the group, the same on all its ranks; part of the lanes' names.
            plan: sizes that decide how tensors are cut; the same on all ranks.
            staging: how device tensors reach host memory.
            telemetry: where counters and spans go; None: a new one.
            timeout: seconds to wait for the connections.
            spins: look for bytes for a moment before sleeping, where there is a core to spare.

        Raises:
            ConnectFailed: a rank did not connect in time. The world stays open.
        """
        members = list(range(world.world_size)) if ranks is None else list(ranks)
        self.rank = members.index(world.rank)
        self.world_size = len(members)
        self.generation = world.view().generation
        self.telemetry = telemetry or Telemetry()
        self._world = world
        self._members = members
        self._name = name
        self._owns_world = ranks is None
        self._plan = plan or Plan()
        self._staging = staging or DeviceStaging()
        self._split_names: set[str] = set()
        self._children: list[TcpCommunicator] = []  # split off; closed together with this one
        self._is_closed = False
        self._order = threading.Lock()  # sequence numbers are given out in the order of submission
        self._sequence = 0
        self._forget: list[Callable[[], None]] = []  # what the world is to forget of a closed group
        self._is_crowded = world.neighbours() >= cores()
        self._quantum_bytes = CROWDED_QUANTUM_BYTES if self._is_crowded else QUANTUM_BYTES
        spin_seconds = SPIN_SECONDS if spins and not self._is_crowded else 0.0  # a core that another rank could use
        self._loop = ProgressLoop(
            f"{name} rank {self.rank}", self._broken, patience=world.patience, spin_seconds=spin_seconds
        )
        self._box = MessageBox(self._loop, self.generation)
        self._collective_lanes: dict[int, Lane] = {}
        self._message_lanes: dict[int, Lane] = {}
        try:
            for peer, member in enumerate(members):
                if peer != self.rank:
                    bulk = self._lane(peer, member, "bulk", self._loop, timeout)
                    self._loop.add_lane(bulk, collective=True)
                    p2p = self._lane(peer, member, "p2p", self._box, timeout)
                    self._loop.add_lane(p2p, collective=False)
                    self._collective_lanes[peer], self._message_lanes[peer] = bulk, p2p
                    self._forget.append(world.watch_queue(member, partial(_queued_bytes, bulk, p2p)))
        except BaseException:
            self._loop.close()
            self._be_forgotten()
            raise
        shares_pair = self.world_size == 2 and self._collective_lanes[1 - self.rank].shares_memory
        self.all_reduce_scattered = self._sum_scattered if shares_pair else None
        self._forget.append(world.on_failure(self._loop.fail))
        self.telemetry.add_source(self._count_bytes)

    @property
    def plan(self) -> Plan:
        """How tensors are cut. Communicators that are split off later have the same."""
        return self._plan

    def tune(self, plan: Plan | None = None) -> None:
        """Agree on rank 0's plan; blocks, and every rank calls it while nothing else is under way.

        Args:
            plan: that of the checkpoint which the run goes on from; None: made for the links, which are measured.
        """
        if self.world_size == 1:
            return
        is_one_host = self._world.neighbours() + 1 == self._world.world_size
        if not self.exchange(plan is not None or is_one_host)[0]:
            link = measure_link(self)
            plan = plan_for(self.world_size, link)
            logger.info("links measured rank=%d hop_s=%.6f bytes_per_s=%.0f", self.rank, *astuple(link))
        elif plan is None:
            plan = plan_for_one_host(is_crowded=self._is_crowded)
        decided = self.exchange(plan.to_json())[0]
        if isinstance(decided, dict):
            self._plan = Plan.from_json(decided)
        logger.info("collectives planned rank=%d plan=%s", self.rank, self._plan)

    @property
    def world(self) -> World:
        """The ranks of this run, of which this group may be a part."""
        return self._world

    # ---- collectives

    def all_reduce(
        self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | ErrorFeedback | None = None
    ) -> PendingWork:
        checks.check_all_reduce(tensor, op, codec)
        host = self._staging.to_host(tensor.detach())
        flat = host.view(-1)
        if self.all_reduce_scattered is not None and codec is None:
            return self._swap([flat], op, restore=[(host, tensor)])
        is_star = flat.nbytes <= self._plan.star_bytes and codec is None
        is_one_round = flat.nbytes <= self._plan.one_round_bytes and codec is None
        span = flat.numel() if is_star or is_one_round else self._chunk_elements(flat, codec) * self.world_size

        def begin(wire: _PieceWire, piece: int) -> Steps:
            part = flat[piece * span : (piece + 1) * span]
            if is_star:
                return mesh.star_all_reduce(wire, part, op)
            if is_one_round:
                return mesh.one_round_all_reduce(wire, part, op)
            chunks = list(part.tensor_split(self.world_size))
            if codec is None:
                return ring.ring_all_reduce(wire, chunks, op)
            if isinstance(codec, ErrorFeedback):
                residuals = list(codec.residual[piece * span : (piece + 1) * span].tensor_split(self.world_size))
                return mesh.feedback_all_reduce(wire, chunks, residuals, op, codec.codec)
            return mesh.mesh_all_reduce(wire, chunks, op, codec)

        return self._collective(
            frame.OP_ALL_REDUCE, flat, flat.numel(), begin,
            pieces=_pieces(flat.numel(), span), reduce=op, codec=codec, restore=[(host, tensor)],
        )  # fmt: skip

    def reduce_scatter(
        self, output: Tensor, input: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | None = None
    ) -> PendingWork:
        checks.check_reduce_scatter(output, input, op, codec, self.world_size)
        rows = self._staging.to_host(input.detach()).view(self.world_size, -1)
        out = self._staging.to_host(output.detach())
        span = self._chunk_elements(rows, codec)

        def begin(wire: _PieceWire, piece: int) -> Steps:
            chunks = [row[piece * span : (piece + 1) * span] for row in rows]
            if codec is None:
                return ring.ring_reduce_scatter(wire, chunks, op)
            return mesh.mesh_reduce_scatter(wire, chunks, op, codec)

        return self._collective(
            frame.OP_REDUCE_SCATTER, rows, rows.numel(), begin,
            pieces=_pieces(rows.shape[1], span), reduce=op, codec=codec,
            last=lambda: out.view(-1).copy_(rows[self.rank]), restore=[(out, output)],
        )  # fmt: skip

    def all_gather(self, output: Tensor, input: Tensor, codec: Codec | None = None) -> PendingWork:
        checks.check_all_gather(output, input, codec, self.world_size)
        host = self._staging.to_host(output.detach())
        rows = host.view(self.world_size, -1)
        rows[self.rank].copy_(self._staging.to_host(input.detach()).view(-1))
        span = self._chunk_elements(rows, codec)

        def begin(wire: _PieceWire, piece: int) -> Steps:
            chunks = [row[piece * span : (piece + 1) * span] for row in rows]
            return ring.ring_all_gather(wire, chunks) if codec is None else mesh.mesh_all_gather(wire, chunks, codec)

        return self._collective(
            frame.OP_ALL_GATHER, rows, rows.numel(), begin,
            pieces=_pieces(rows.shape[1], span), codec=codec, restore=[(host, output)],
        )  # fmt: skip

    def broadcast(self, tensor: Tensor, src: int = 0) -> PendingWork:
        checks.check_broadcast(tensor, src, self.world_size)
        host = self._staging.to_host(tensor.detach())
        flat = host.view(-1)
        span = self._chunk_elements(flat)

        def begin(wire: _PieceWire, piece: int) -> Steps:
            return ring.ring_broadcast(wire, flat[piece * span : (piece + 1) * span], src)

        return self._collective(
            frame.OP_BROADCAST, flat, flat.numel(), begin,
            pieces=_pieces(flat.numel(), span), first_hop=src, restore=[(host, tensor)],
        )  # fmt: skip

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_rows: Sequence[int] | None = None,
        input_rows: Sequence[int] | None = None,
    ) -> PendingWork:
        rows_in, rows_out = checks.check_all_to_all(output, input, output_rows, input_rows, self.world_size)
        host = self._staging.to_host(output.detach())
        incoming = torch.split(host, rows_in)
        outgoing = torch.split(self._staging.to_host(input.detach()), rows_out)
        incoming[self.rank].copy_(outgoing[self.rank])
        return self._collective(
            frame.OP_ALL_TO_ALL, host, 0, lambda wire, piece: mesh.mesh_exchange(wire, outgoing, incoming),
            pieces=1, restore=[(host, output)],
        )  # fmt: skip

    def all_to_all_ragged(self, inputs: Sequence[Tensor]) -> PendingWork:
        checks.check_ragged(inputs, self.world_size)
        return self._exchange(frame.OP_ALL_TO_ALL_RAGGED, [self._staging.to_host(tensor.detach()) for tensor in inputs])

    def exchange(self, message: JsonValue, timeout: float | None = None) -> list[JsonValue]:
        mine = torch.frombuffer(bytearray(checks.encode_message(message)), dtype=torch.uint8)
        work = self._exchange(frame.OP_EXCHANGE, [mine] * self.world_size)
        work.wait(timeout)
        return [checks.decode_message(bytes(raw_bytes(part)), rank) for rank, part in enumerate(work.result())]

    def barrier(self, timeout: float | None = None) -> None:
        self._exchange(frame.OP_BARRIER, [torch.empty(0, dtype=torch.uint8)] * self.world_size).wait(timeout)

    # ---- point-to-point

    def send(self, tensor: Tensor, dst: int, tag: int) -> PendingWork:
        checks.check_peer(self.rank, dst, tag, self.world_size, "dst")
        checks.check_contiguous(tensor, "tensor")
        host = self._staging.to_host(tensor.detach())
        work = PendingWork(self._loop, lambda: f"send to rank {dst} tag {tag}", [])
        dims = tuple(tensor.shape)
        prelude = Prelude(
            KIND_MESSAGE, 0, 0, dtype_code(host.dtype), 0, self.generation, tag, 0, 0, host.numel(), host.nbytes
        )
        buffers = [memoryview(frame.pack(prelude, dims)), raw_bytes(host)]
        lane = self._message_lanes[dst]

        def begin() -> None:
            if (left := self._loop.departed(dst)) is not None:
                self._loop.finish(work, left)
            else:
                lane.enqueue(prelude, buffers, on_sent=lambda error: self._loop.finish(work, error))

        self._loop.submit(work, begin, is_small=host.nbytes <= SMALL_BYTES)
        return work

    def recv(self, src: int, tag: int, out: Tensor | None = None) -> PendingWork:
        checks.check_peer(self.rank, src, tag, self.world_size, "src")
        if out is not None:
            checks.check_contiguous(out, "out")
        target = out.detach() if out is not None else None
        host = self._staging.to_host(target) if target is not None else None
        results = [out] if out is not None else []
        work = PendingWork(self._loop, lambda: f"recv from rank {src} tag {tag}", results)
        inner = work
        if out is not None and host is not None and host is not target:  # receive on the host, then copy to the device
            inner = PendingWork(self._loop, lambda: f"recv from rank {src} tag {tag}", [])

            def restore(done: object) -> None:
                error = inner.exception()
                try:
                    if error is None:
                        self._staging.from_host(host, out.detach())
                except RuntimeError as exc:  # what torch raises for a device: this receive fails, not the loop
                    error = SmolError(f"a received tensor could not be copied to {out.device}: {exc}")
                work.finish(error, [out])

            inner.add_done_callback(restore)
        self._loop.submit(inner, lambda: self._box.post(src, tag, inner, host))
        return work

    # ---- life

    def split(self, ranks: Sequence[int], name: str) -> TcpCommunicator | None:
        group = checks.check_split(ranks, self.world_size)
        if self.rank not in group:
            return None
        members = [self._members[rank] for rank in group]
        if name in self._split_names:
            raise ValueError(f"split: this communicator has been split as {name!r} already; take another name")
        self._split_names.add(name)
        child = TcpCommunicator(
            self._world, ranks=members, name=f"{self._name}/{name}", plan=self._plan, staging=self._staging,
            telemetry=self.telemetry,
        )  # fmt: skip
        self._children.append(child)
        child._forget.append(partial(self._children.remove, child))
        return child

    def abort(self, error: SmolError) -> None:
        """Ends the run on every rank: they all fail with `error`, of the same class where they know it."""
        self._world.abort(error)  # first: whoever wakes with the error here may close at once
        self._loop.fail(error)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for child in [*self._children]:
            child.close()
        self._loop.close()
        self._be_forgotten()
        self.telemetry.remove_source(self._count_bytes)
        if self._owns_world:
            self._world.leave()
            self._world.close()

    # ---- helpers

    def _sum_scattered(self, tensors: Sequence[Tensor]) -> PendingWork:
        checks.check_scattered(tensors)
        return self._swap([tensor.detach().view(-1) for tensor in tensors], ReduceOp.SUM)

    def _swap(
        self, tensors: Sequence[Tensor], op: ReduceOp, restore: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> PendingWork:
        """An all-reduce of two ranks that share memory, of flat tensors."""
        return self._collective(
            frame.OP_ALL_REDUCE, tensors[0], sum(tensor.numel() for tensor in tensors),
            lambda wire, piece: wire.swap_all_reduce(tensors, op), pieces=1, reduce=op, restore=restore,
        )  # fmt: skip

    def _be_forgotten(self) -> None:
        while self._forget:
            self._forget.pop()()

    def _count_bytes(self) -> None:
        sent, received = self._world.new_bytes()
        self.telemetry.count("link/sent_bytes", sent)
        self.telemetry.count("link/recv_bytes", received)

    def _lane(self, peer: int, member: int, kind: str, receiver: Receiver, timeout: float) -> Lane:
        channel = self._world.open_channel(member, f"{kind}:{self._name}", timeout)
        own, other = self._world.run_rank(self._world.rank), self._world.run_rank(member)
        spans = LaneSpans(self.telemetry, self._name, own, other, messages=kind == "p2p")
        return Lane(peer, channel, receiver, spans, quantum_bytes=self._quantum_bytes)

    def _broken(self, peer: int, error: SmolError) -> None:
        self._world.suspect(self._members[peer], error, lambda left: self._loop.depart(peer, left))

    def _chunk_elements(self, tensor: Tensor, codec: Codec | ErrorFeedback | None = None) -> int:
        plain = codec.codec if isinstance(codec, ErrorFeedback) else codec
        item_bytes: float = tensor.element_size()
        if plain is not None:  # encoded small, a chunk has more elements: it costs Python as much as a large one
            item_bytes = plain.encoded_nbytes(ALIGNED_ELEMENTS) / ALIGNED_ELEMENTS
        return self._plan.chunk_elements(tensor.numel(), item_bytes, self.world_size)

    def _exchange(self, operation: int, outgoing: list[Tensor]) -> PendingWork:
        arrivals: list[Arrival] = []

        def begin(wire: _PieceWire, piece: int) -> Steps:
            for step in mesh.mesh_exchange(wire, outgoing, [None] * self.world_size):
                arrivals.extend(step)
                yield step

        def collect() -> list[Tensor]:
            found = {arrival.src: arrival.into for arrival in arrivals}
            found[self.rank] = outgoing[self.rank].clone()  # the sender may go on to use its own
            return [tensor for src in range(self.world_size) if (tensor := found[src]) is not None]

        return self._collective(operation, outgoing[0], 0, begin, pieces=1, collect=collect)

    def _collective(
        self,
        operation: int,
        like: Tensor,
        count: int,
        begin: Callable[[_PieceWire, int], Steps],
        *,
        pieces: int,
        reduce: ReduceOp | None = None,
        codec: Codec | ErrorFeedback | None = None,
        first_hop: int = 0,
        last: Callable[[], object] | None = None,
        restore: Sequence[tuple[Tensor, Tensor]] = (),
        collect: Callable[[], list[Tensor]] | None = None,
    ) -> PendingWork:
        """Queue a collective: `begin(wire, piece)` makes a piece's generator; then `last`, `restore`, …."""

        def on_success() -> list[Tensor] | None:
            if last is not None:
                last()
            for host, tensor in restore:
                self._staging.from_host(host, tensor.detach())
            return collect() if collect is not None else None

        with self._order:
            prelude = Prelude(
                KIND_COLLECTIVE, operation, int(reduce or 0), dtype_code(like.dtype),
                CODECS[codec.name] if codec else 0,
                self.generation, 0, 0, self._sequence + 1, count, 0,
            )  # fmt: skip
            self._sequence += 1  # not before: a call that is refused here counts for nothing
            work = PendingWork(self._loop, prelude.describe, [tensor for _, tensor in restore])
            work.call_id = (self._name, prelude.sequence)
            shapes = operation in frame.SHAPED

            def start(call: Call, piece: int) -> Steps:
                return begin(_PieceWire(self, prelude, piece, shapes, first_hop), piece)

            call = Call(work, prelude, pieces, start, window=self._plan.window, on_success=on_success)
            if self.world_size == 1 and (ended := self._loop.error()) is not None:
                work.finish(ended)
            elif self.world_size == 1:
                for piece in range(pieces):
                    for _ in start(call, piece):
                        pass
                work.finish(results=on_success())
            else:
                is_small = max(like.nbytes, count * like.element_size()) <= SMALL_BYTES
                self._loop.submit(work, lambda: self._loop.enqueue_call(call), is_small=is_small)
        return work


class _PieceWire:
    """See wire.Wire: numbers the hops to and from each peer within one piece."""

    __slots__ = ("_comm", "_first_hop", "_piece", "_prelude", "_received", "_sent", "_shapes", "rank", "world_size")

    def __init__(self, comm: TcpCommunicator, prelude: Prelude, piece: int, shapes: bool, first_hop: int) -> None:
        self.rank = comm.rank
        self.world_size = comm.world_size
        self._comm = comm
        self._prelude = prelude
        self._piece = piece
        self._shapes = shapes  # frames carry their tensor's shape, and count is that tensor's
        self._first_hop = first_hop  # broadcast: its source, so that ranks which name different ones notice
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}

    def send(self, dst: int, data: Tensor) -> None:
        hop = self._sent.get(dst, self._first_hop)
        self._sent[dst] = hop + 1
        p, nbytes = self._prelude, data.nbytes
        count = data.numel() if self._shapes else p.count
        prelude = Prelude(*p[:6], self._piece, hop, p.sequence, count, nbytes)
        head = frame.pack(prelude, tuple(data.shape) if self._shapes else ())
        self._comm._collective_lanes[dst].enqueue(prelude, [memoryview(head), raw_bytes(data)])

    def expect(self, src: int, into: Tensor | None, op: ReduceOp | None = None) -> Arrival:
        hop = self._received.get(src, self._first_hop)
        self._received[src] = hop + 1
        return Arrival(src, into, hop, op)

    def swap_all_reduce(self, tensors: Sequence[Tensor], op: ReduceOp) -> Steps:
        """Two ranks that share memory: see shm.py."""
        peer, p = 1 - self.rank, self._prelude
        nbytes = sum(tensor.nbytes for tensor in tensors)
        prelude = Prelude(*p[:6], self._piece, 0, p.sequence, p.count, nbytes)
        self._comm._collective_lanes[peer].begin_swap(prelude, tensors, op)
        yield [Arrival(peer, None, 0, op, nbytes)]


def _queued_bytes(*lanes: Lane) -> int:
    return sum(lane.queued_bytes for lane in lanes)


def _pieces(elements: int, span: int) -> int:
    return max(1, -(-elements // max(1, span)))
