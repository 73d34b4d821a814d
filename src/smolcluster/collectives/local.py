"""The communicator without a network: N ranks are N threads of one process. For tests, and to see what a call means.

Idea      Every rank puts its tensors for call number k on a table and goes on at once. Whoever comes last checks that
          all ranks called the same thing, computes the result in rank order and writes it into everybody's tensors.
          Nobody else touches the tensors meanwhile: they belong to the call until its Work is done. So collectives copy
          nothing beforehand; `send` does copy, and is done at once, like a message in a socket buffer.
Cost      N tensors of additions on one thread; no bytes move.
Breaks if ranks are not threads of one process: use the tcp engine.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from smolcluster.collectives.base import Codec, ReduceOp, Work
from smolcluster.collectives.checks import (
    check_all_gather,
    check_all_reduce,
    check_all_to_all,
    check_broadcast,
    check_contiguous,
    check_peer,
    check_ragged,
    check_reduce_scatter,
    check_split,
    encode_message,
)
from smolcluster.collectives.codec import ErrorFeedback, Int8Codec
from smolcluster.collectives.mesh import encode_sum
from smolcluster.collectives.wire import combine, finish_average
from smolcluster.collectives.work import PendingWork
from smolcluster.errors import ClusterError, CollectiveMismatch, PeerLost, SmolError
from smolcluster.kinds import JsonValue
from smolcluster.telemetry import Telemetry

T = TypeVar("T")


class LocalGroup:
    """N ranks of this process that act as one.

    Args:
        world_size: number of ranks.
        generation: what the communicators report as their generation.
    """

    def __init__(self, world_size: int, generation: int = 0) -> None:
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}: a group has at least one rank")
        table = _Table("world", world_size)
        self.communicators = [LocalCommunicator(table, rank, generation, Telemetry()) for rank in range(world_size)]

    def run(self, fn: Callable[[LocalCommunicator], T]) -> list[T]:
        """Run fn(comm) on one thread per rank, close all, and return the results in rank order.

        Blocks. The first error that a rank raises fails the other ranks' calls and is raised here.
        """
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def rank_thread(comm: LocalCommunicator) -> None:
            try:
                results[comm.rank] = fn(comm)
            except BaseException as exc:  # noqa: BLE001 - top of the thread: stored, the others woken, raised by run()
                errors.append(exc)
                comm.abort(exc if isinstance(exc, SmolError) else PeerLost(f"rank {comm.rank}: {exc!r}", comm.rank))
            finally:
                comm.close()

        threads = [
            threading.Thread(target=rank_thread, args=(comm,), name=f"local-rank-{comm.rank}", daemon=True)
            for comm in self.communicators
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(len(threads))]


class LocalCommunicator:
    """One rank of a LocalGroup. See collectives.base.Communicator."""

    def __init__(self, table: _Table, rank: int, generation: int, telemetry: Telemetry) -> None:
        self._table = table
        self.rank = rank
        self.world_size = table.world_size
        self.generation = generation
        self.telemetry = telemetry
        self.all_reduce_scattered = None
        self._children: weakref.WeakSet[LocalCommunicator] = weakref.WeakSet()

    def all_reduce(
        self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | ErrorFeedback | None = None
    ) -> Work:
        check_all_reduce(tensor, op, codec)
        says = f"all_reduce {op.name.lower()} of {_describe(tensor, codec)}"
        if isinstance(codec, ErrorFeedback):
            int8, tensors = codec.codec, [tensor.detach(), codec.residual]
            return self._issue(says, tensor, tensors, lambda calls: _feedback_all_reduce(calls, op, int8))
        return self._issue(says, tensor, [tensor.detach()], lambda calls: _all_reduce(calls, op, codec))

    def reduce_scatter(
        self, output: Tensor, input: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | None = None
    ) -> Work:
        check_reduce_scatter(output, input, op, codec, self.world_size)
        says = f"reduce_scatter {op.name.lower()} of {_describe(input, codec)}"
        tensors = [output.detach(), input.detach()]
        return self._issue(says, output, tensors, lambda calls: _reduce_scatter(calls, op, codec))

    def all_gather(self, output: Tensor, input: Tensor, codec: Codec | None = None) -> Work:
        check_all_gather(output, input, codec, self.world_size)
        says = f"all_gather of {_describe(input, codec)}"
        tensors = [output.detach(), input.detach()]
        return self._issue(says, output, tensors, lambda calls: _all_gather(calls, codec))

    def broadcast(self, tensor: Tensor, src: int = 0) -> Work:
        check_broadcast(tensor, src, self.world_size)
        says = f"broadcast from rank {src} of {_describe(tensor)}"
        return self._issue(says, tensor, [tensor.detach()], lambda calls: _broadcast(calls, src))

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_rows: Sequence[int] | None = None,
        input_rows: Sequence[int] | None = None,
    ) -> Work:
        incoming, outgoing = check_all_to_all(output, input, output_rows, input_rows, self.world_size)
        says = f"all_to_all of {input.dtype} rows of {tuple(input.shape[1:])}"
        tensors = [output.detach(), input.detach()]
        return self._issue(says, output, tensors, _all_to_all, rows=(incoming, outgoing))

    def all_to_all_ragged(self, inputs: Sequence[Tensor]) -> Work:
        check_ragged(inputs, self.world_size)
        says = f"all_to_all_ragged of {inputs[0].dtype}"
        return self._issue(says, None, [tensor.detach() for tensor in inputs], _all_to_all_ragged)

    def send(self, tensor: Tensor, dst: int, tag: int) -> Work:
        check_peer(self.rank, dst, tag, self.world_size, "dst")
        check_contiguous(tensor, "tensor")
        message = tensor.detach().to("cpu", copy=True)
        work = _pending(f"send to rank {dst} with tag {tag}", [tensor])
        self._table.send(self.rank, dst, tag, message, work)
        return work

    def recv(self, src: int, tag: int, out: Tensor | None = None) -> Work:
        check_peer(self.rank, src, tag, self.world_size, "src")
        if out is not None:
            check_contiguous(out, "out")
        work = _pending(f"recv from rank {src} with tag {tag}", [] if out is None else [out])
        self._table.recv(self.rank, src, tag, out, work)
        return work

    def exchange(self, message: JsonValue, timeout: float | None = None) -> list[JsonValue]:
        encoded = encode_message(message)
        call = _Call("exchange", [], message=encoded)
        work = self._table.issue(self.rank, call, _exchange)
        work.wait(timeout)
        return [json.loads(part) for part in call.messages]

    def barrier(self, timeout: float | None = None) -> None:
        self._table.issue(self.rank, _Call("barrier", []), lambda calls: None).wait(timeout)

    def split(self, ranks: Sequence[int], name: str) -> LocalCommunicator | None:
        members = check_split(ranks, self.world_size)
        call = _Call(f"split {name} of ranks {members}", [])

        def make_table(calls: list[_Call]) -> None:
            table = self._table.add_child(f"{self._table.name}/{name}", members)
            for other in calls:
                other.table = table

        self._table.issue(self.rank, call, make_table).wait()
        if self.rank not in members:
            return None
        assert call.table is not None
        child = LocalCommunicator(call.table, members.index(self.rank), self.generation, self.telemetry)
        self._children.add(child)
        return child

    def abort(self, error: SmolError) -> None:
        """Fail every pending and later call of the whole group, and of groups split from it, with `error`."""
        self._table.abort(error)

    def close(self) -> None:
        """Leave the group. Whoever still waits for a call of this rank gets PeerLost. May be called again."""
        for child in [*self._children]:
            child.close()
        self._table.leave(self.rank)

    def _issue(
        self,
        says: str,
        output: Tensor | None,
        tensors: list[Tensor],
        compute: _Compute,
        rows: tuple[list[int], list[int]] | None = None,
    ) -> Work:
        call = _Call(says, tensors, output=output, rows=rows)
        return self._table.issue(self.rank, call, compute)


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Call:
    """What one rank put on the table for one call, and what it gets back besides its tensors' new values."""

    says: str  # must be equal on all ranks
    tensors: list[Tensor]
    output: Tensor | None = None
    rows: tuple[list[int], list[int]] | None = None  # all_to_all: (from each rank, to each rank)
    message: bytes = b""
    messages: list[bytes] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)
    table: _Table | None = None
    work: PendingWork | None = None


_Compute = Callable[[list[_Call]], None]


@dataclass(slots=True)
class _Receive:
    out: Tensor | None
    work: PendingWork


class _Table:
    """The state that the ranks of one group share. Every method may be called from any thread."""

    def __init__(self, name: str, world_size: int) -> None:
        self.name = name
        self.world_size = world_size
        self._lock = threading.Lock()
        self._issued = [0] * world_size
        self._slots: dict[int, dict[int, _Call]] = {}  # call number -> rank -> call
        self._messages: dict[tuple[int, int, int], deque[Tensor]] = {}  # (src, dst, tag), as receives below
        self._receives: dict[tuple[int, int, int], deque[_Receive]] = {}
        self._left: set[int] = set()
        self._error: SmolError | None = None
        self._children: list[tuple[_Table, list[int]]] = []

    def issue(self, rank: int, call: _Call, compute: _Compute) -> PendingWork:
        """Put a call on the table; the last rank to come computes it, on its own thread."""
        work = call.work = _pending(f"{call.says} on rank {rank} of {self.name}", [])
        with self._lock:
            number = self._issued[rank]
            self._issued[rank] += 1
            error = self._error_of(rank) or self._missing_rank(number)
            if error is None:
                slot = self._slots.setdefault(number, {})
                slot[rank] = call
                if len(slot) < self.world_size:
                    return work
                del self._slots[number]
        if error is not None:
            work.finish(error)
            return work
        self._finish_call(number, [slot[r] for r in range(self.world_size)], compute)
        return work

    def _finish_call(self, number: int, calls: list[_Call], compute: _Compute) -> None:
        error: SmolError | None = _mismatch(self.name, number, calls)
        try:
            if error is None:
                with torch.no_grad():
                    compute(calls)
        except BaseException as exc:
            error = ClusterError(f"{calls[0].says} failed on {self.name}: {exc!r}")
            raise
        finally:
            if error is not None:
                self.abort(error)
            for call in calls:
                assert call.work is not None
                call.work.finish(error, call.received if call.output is None else [call.output])

    def send(self, src: int, dst: int, tag: int, message: Tensor, work: PendingWork) -> None:
        """Hand a message over, or keep it until it is asked for."""
        with self._lock:
            error = self._error_of(src) or self._left_error(dst)
            receive = None
            if error is None:
                waiting = self._receives.get((src, dst, tag))
                if waiting:
                    receive = waiting.popleft()
                else:
                    self._messages.setdefault((src, dst, tag), deque()).append(message)
        if receive is not None:
            _deliver(src, tag, message, receive)
        work.finish(error)

    def recv(self, dst: int, src: int, tag: int, out: Tensor | None, work: PendingWork) -> None:
        """Take the oldest message of (src, tag), or wait for it."""
        receive = _Receive(out, work)
        with self._lock:
            error = self._error_of(dst)
            message = None
            if error is None:
                arrived = self._messages.get((src, dst, tag))
                if arrived:
                    message = arrived.popleft()
                else:
                    error = self._left_error(src)
                    if error is None:
                        self._receives.setdefault((src, dst, tag), deque()).append(receive)
                        return
        if message is None:
            work.finish(error)
        else:
            _deliver(src, tag, message, receive)

    def add_child(self, name: str, members: list[int]) -> _Table:
        """A table for some of the ranks, that fails when this one does."""
        child = _Table(name, len(members))
        with self._lock:
            self._children.append((child, members))
        return child

    def abort(self, error: SmolError) -> None:
        """Fail all that is pending and all that comes; the first error stays."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            works = self._take_pending(lambda waits_for: True)
            children = [child for child, _ in self._children]
        for work in works:
            work.finish(error)
        for child in children:
            child.abort(error)

    def leave(self, rank: int) -> None:
        """The rank makes no more calls; fail what can no longer happen."""
        with self._lock:
            if rank in self._left:
                return
            self._left.add(rank)
            works = self._take_pending(lambda waits_for: rank in waits_for)
            error = self._left_error(rank)
            is_under_way = any(rank in slot for slot in self._slots.values())
            children = [(child, members.index(rank)) for child, members in self._children if rank in members]
        for work in works:
            work.finish(error)
        if is_under_way and error is not None:
            self.abort(error)  # as closed connections would: the others can finish neither that call nor a later one
        for child, child_rank in children:
            child.leave(child_rank)

    # ---- the lock is held below

    def _error_of(self, rank: int) -> SmolError | None:
        if self._error is None and rank in self._left:
            return ClusterError(f"rank {rank} has closed its communicator {self.name}: nothing can be called on it")
        return self._error

    def _left_error(self, rank: int) -> SmolError | None:
        if rank not in self._left:
            return None
        return PeerLost(f"rank {rank} of {self.name} has closed its communicator and will not answer", rank)

    def _missing_rank(self, number: int) -> SmolError | None:
        """PeerLost if a rank left before its call of this number."""
        gone = [rank for rank in sorted(self._left) if self._issued[rank] <= number]
        return self._left_error(gone[0]) if gone else None

    def _take_pending(self, concerns: Callable[[set[int]], bool]) -> list[PendingWork]:
        """Remove and return the works whose set of ranks that they wait for or belong to `concerns`."""
        works: list[PendingWork] = []
        everybody = set(range(self.world_size))
        for number, slot in list(self._slots.items()):
            if concerns(everybody - slot.keys()):
                works += [call.work for call in slot.values() if call.work is not None]
                del self._slots[number]
        for (src, dst, tag), waiting in list(self._receives.items()):
            if concerns({src, dst}):
                works += [receive.work for receive in waiting]
                del self._receives[src, dst, tag]
        return works


class _Sleep:
    """The driver of works that another thread finishes: just wait."""

    def wait(self, finished: threading.Event, timeout: float | None) -> None:
        finished.wait(timeout)


def _pending(says: str, results: list[Tensor]) -> PendingWork:
    return PendingWork(_Sleep(), lambda: says, results)


def _deliver(src: int, tag: int, message: Tensor, receive: _Receive) -> None:
    out = receive.out
    if out is None:
        receive.work.finish(None, [message])
    elif out.numel() != message.numel() or out.dtype != message.dtype:
        receive.work.finish(
            CollectiveMismatch(
                f"rank {src} sent {message.dtype} {tuple(message.shape)} with tag {tag}, but it was to be received "
                f"into {out.dtype} {tuple(out.shape)}: check which tags and shapes the two ranks use"
            )
        )
    else:
        out.detach().copy_(message.view_as(out))
        receive.work.finish(None, [out])


def _mismatch(name: str, number: int, calls: list[_Call]) -> CollectiveMismatch | None:
    where = f"ranks of {name} are out of step at call {number}"
    advice = "every rank must call the same collectives in the same order"
    if any(call.says != calls[0].says for call in calls):
        said = "; ".join(f"rank {rank} called {call.says}" for rank, call in enumerate(calls))
        return CollectiveMismatch(f"{where}: {said}: {advice}")
    for src, call in enumerate(calls):
        for dst, other in enumerate(calls):
            if call.rows is not None and other.rows is not None and call.rows[1][dst] != other.rows[0][src]:
                return CollectiveMismatch(
                    f"{where}: rank {src} sends {call.rows[1][dst]} rows to rank {dst}, which expects "
                    f"{other.rows[0][src]}: {advice}"
                )
    return None


def _describe(tensor: Tensor, codec: Codec | ErrorFeedback | None = None) -> str:
    encoded = "" if codec is None else f" as {codec.name}"
    return f"{tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}{encoded}"


# --- what each collective computes, from all ranks' calls -------------------------------------------------------------


def _all_reduce(calls: list[_Call], op: ReduceOp, codec: Codec | None) -> None:
    result = through_codec(reduce_in_rank_order([call.tensors[0] for call in calls], op, codec), codec)
    for call in calls:
        call.tensors[0].copy_(result.view_as(call.tensors[0]))


def _feedback_all_reduce(calls: list[_Call], op: ReduceOp, codec: Int8Codec) -> None:
    """What mesh.feedback_all_reduce computes: chunk i's sum is rank i's, which adds its own contribution as it is."""
    flats = [_flat(call.tensors[0]) for call in calls]
    chunks = [flat.tensor_split(len(calls)) for flat in flats]
    residuals = [call.tensors[1].tensor_split(len(calls)) for call in calls]
    for owner in range(len(calls)):
        total = chunks[owner][owner]
        encoded = torch.empty(codec.encoded_nbytes(total.numel()), dtype=torch.uint8)
        for step in range(1, len(calls)):
            src = (owner + step) % len(calls)
            codec.encode_with_feedback(chunks[src][owner], residuals[src][owner], encoded)
            codec.decode_add(encoded, total)
        encode_sum(total, residuals[owner][owner], encoded, op, len(calls), codec)
        for parts in chunks:
            codec.decode(encoded, parts[owner])
    for call, flat in zip(calls, flats, strict=True):
        call.tensors[0].copy_(flat.view_as(call.tensors[0]))


def _reduce_scatter(calls: list[_Call], op: ReduceOp, codec: Codec | None) -> None:
    result = reduce_in_rank_order([call.tensors[1] for call in calls], op, codec)
    for call, part in zip(calls, result.tensor_split(len(calls)), strict=True):
        call.tensors[0].copy_(part.view_as(call.tensors[0]))


def _all_gather(calls: list[_Call], codec: Codec | None) -> None:
    # cat copies before anything is written: an input may be a part of its own output.
    result = torch.cat([through_codec(_flat(call.tensors[1]), codec) for call in calls])
    for call in calls:
        call.tensors[0].copy_(result.view_as(call.tensors[0]))


def _broadcast(calls: list[_Call], src: int) -> None:
    source = calls[src].tensors[0]
    for rank, call in enumerate(calls):
        if rank != src:
            call.tensors[0].copy_(source.view_as(call.tensors[0]))


def _all_to_all(calls: list[_Call]) -> None:
    sent = []
    for call in calls:
        assert call.rows is not None
        sent.append(torch.split(call.tensors[1].cpu(), call.rows[1]))
    for dst, call in enumerate(calls):
        call.tensors[0].copy_(torch.cat([parts[dst] for parts in sent]))


def _all_to_all_ragged(calls: list[_Call]) -> None:
    for dst, call in enumerate(calls):
        call.received = [other.tensors[dst].to("cpu", copy=True) for other in calls]


def _exchange(calls: list[_Call]) -> None:
    for call in calls:
        call.messages = [other.message for other in calls]


def reduce_in_rank_order(tensors: list[Tensor], op: ReduceOp, codec: Codec | None) -> Tensor:
    """The reduction of all ranks' tensors, flat, on CPU, in the tensors' own dtype, from rank 0 upwards.

    With a codec every rank's contribution passes through it, as it would on a wire.
    """
    result = through_codec(_flat(tensors[0]), codec).clone()
    for tensor in tensors[1:]:
        combine(result, through_codec(_flat(tensor), codec), op)
    finish_average(result, op, len(tensors))
    return result


def through_codec(tensor: Tensor, codec: Codec | None) -> Tensor:
    """What a receiver sees of a flat CPU tensor: the tensor itself without a codec, else a decoded copy."""
    if codec is None:
        return tensor
    encoded = torch.empty(codec.encoded_nbytes(tensor.numel()), dtype=torch.uint8)
    codec.encode(tensor, encoded)
    decoded = torch.empty_like(tensor)
    codec.decode(encoded, decoded)
    return decoded


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).cpu()
