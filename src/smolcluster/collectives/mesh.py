"""Mesh algorithms: every rank talks to every other directly. Fewer hops than a ring; one sum in rank order.

Notation: N ranks, S bytes, latency a per hop, b seconds per byte.

Source: Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolcluster.collectives.base import Codec, ReduceOp
from smolcluster.collectives.codec import Int8Codec
from smolcluster.collectives.wire import Arrival, Steps, Wire, combine, finish_average


def one_round_all_reduce(wire: Wire, tensor: Tensor, op: ReduceOp) -> Steps:
    """Send everything to everybody and add in rank order, in place. For small tensors: one hop.

    Cost: a + (N-1) * S * b. All ranks add the same numbers in the same order, so they hold the same bits.
    """
    own = tensor.clone()  # what is being sent must not change while the sum grows in `tensor`
    if wire.world_size == 2:  # a + b is b + a: the other's part can be added as it comes
        peer = 1 - wire.rank
        wire.send(peer, own)
        yield [wire.expect(peer, into=tensor, op=op)]
        finish_average(tensor, op, 2)
        return
    parts = [own if rank == wire.rank else torch.empty_like(own) for rank in range(wire.world_size)]
    for dst in _others(wire):
        wire.send(dst, own)
    yield [wire.expect(src, into=parts[src]) for src in _others(wire)]
    tensor.copy_(parts[0])
    for part in parts[1:]:
        combine(tensor, part, op)
    finish_average(tensor, op, wire.world_size)


def star_all_reduce(wire: Wire, tensor: Tensor, op: ReduceOp) -> Steps:
    """Rank 0 adds for all, in place: the fewest frames, for ranks that share cores and wait for each other's turn.

    Cost: 2a + 2(N-1) * S * b on rank 0's link, and 2(N-1) frames in all: one round has N(N-1), a ring 2N(N-1).
    """
    if wire.rank != 0:
        wire.send(0, tensor)
        yield [wire.expect(0, into=tensor)]  # which comes when rank 0 has all of what was sent
        return
    for src in _others(wire):
        yield [wire.expect(src, into=tensor, op=op)]
    finish_average(tensor, op, wire.world_size)
    for dst in _others(wire):
        wire.send(dst, tensor)


def mesh_all_reduce(wire: Wire, chunks: list[Tensor], op: ReduceOp, codec: Codec) -> Steps:
    """Reduce over all ranks, in place, with `codec` on the wire: two hops, each number is encoded twice in all.

    Rank i gets everybody's chunk i, adds in rank order in the tensor's own dtype, encodes the result once and sends it
    to everybody; it decodes that too, so all ranks hold the same bits.

    Cost: 2a + 2(N-1)/N * S' * b, with S' encoded bytes.
    """
    yield from mesh_reduce_scatter(wire, chunks, op, codec)
    yield from mesh_all_gather(wire, chunks, codec)


def feedback_all_reduce(
    wire: Wire, chunks: list[Tensor], residuals: list[Tensor], op: ReduceOp, codec: Int8Codec
) -> Steps:
    """Reduce over all ranks, in place, each number encoded twice in all, and remember what that has lost.

    As `mesh_all_reduce`, but rank i adds its own chunk i as it is, and every encoding takes up what that of the same
    chunk in the call before has lost. So residuals[rank] is the error of this rank's sum, the others those of its
    contributions, both of the sum that AVG divides.

    Cost: 2a + 2(N-1)/N * S' * b, with S' encoded bytes.
    """
    rank, mine = wire.rank, chunks[wire.rank]
    for dst in _others(wire):
        contribution = _buffer(chunks[dst], codec)
        codec.encode_with_feedback(chunks[dst], residuals[dst], contribution)
        wire.send(dst, contribution)
    parts = {src: _buffer(mine, codec) for src in _others(wire)}
    yield [wire.expect(src, into=part) for src, part in parts.items()]
    for part in parts.values():
        codec.decode_add(part, mine)
    total = _buffer(mine, codec)
    encode_sum(mine, residuals[rank], total, op, wire.world_size, codec)
    yield from _spread(wire, total, chunks, codec)


def encode_sum(total: Tensor, residual: Tensor, out: Tensor, op: ReduceOp, world_size: int, codec: Int8Codec) -> None:
    """Encode a chunk's complete sum, or the average, and leave in `residual` what the sum has lost."""
    finish_average(total, op, world_size)
    finish_average(residual, op, world_size)
    codec.encode_with_feedback(total, residual, out)
    if op == ReduceOp.AVG:
        residual.mul_(world_size)


def mesh_reduce_scatter(wire: Wire, chunks: list[Tensor], op: ReduceOp, codec: Codec) -> Steps:
    """Reduce over all ranks so that chunks[rank] holds the result; one hop. See `mesh_all_reduce`."""
    mine = chunks[wire.rank]
    for dst in _others(wire):
        wire.send(dst, _encoded(chunks[dst], codec))
    own = _encoded(mine, codec)  # through the codec like everybody's: who owns a chunk does not change its sum
    parts = [own if rank == wire.rank else torch.empty_like(own) for rank in range(wire.world_size)]
    yield [wire.expect(src, into=parts[src]) for src in _others(wire)]
    codec.decode(parts[0], mine)
    incoming = torch.empty_like(mine)
    for part in parts[1:]:
        codec.decode(part, incoming)
        combine(mine, incoming, op)
    finish_average(mine, op, wire.world_size)


def mesh_all_gather(wire: Wire, chunks: list[Tensor], codec: Codec) -> Steps:
    """Every rank begins with chunks[rank] and ends with all of them as the codec leaves them; one hop."""
    yield from _spread(wire, _encoded(chunks[wire.rank], codec), chunks, codec)


def _spread(wire: Wire, own: Tensor, chunks: list[Tensor], codec: Codec) -> Steps:
    """Send the encoded `own` to everybody; every rank decodes all of them, its own too."""
    for dst in _others(wire):
        wire.send(dst, own)
    parts = {src: _buffer(chunks[src], codec) for src in _others(wire)}
    yield [wire.expect(src, into=part) for src, part in parts.items()]
    for src, part in {**parts, wire.rank: own}.items():
        codec.decode(part, chunks[src])


def mesh_exchange(wire: Wire, outgoing: Sequence[Tensor], incoming: Sequence[Tensor | None]) -> Steps:
    """Send outgoing[i] to rank i and receive incoming[j] from rank j; own parts are the caller's. One hop.

    An `incoming` of None is allocated from the frame's shape and found in the arrival.
    """
    for dst in _others(wire):
        wire.send(dst, outgoing[dst])
    arrivals: list[Arrival] = [wire.expect(src, into=incoming[src]) for src in _others(wire)]
    yield arrivals


def _others(wire: Wire) -> list[int]:
    # Beginning with the right neighbour, so that not everybody sends to rank 0 first.
    return [(wire.rank + step) % wire.world_size for step in range(1, wire.world_size)]


def _buffer(tensor: Tensor, codec: Codec) -> Tensor:
    return torch.empty(codec.encoded_nbytes(tensor.numel()), dtype=torch.uint8)


def _encoded(tensor: Tensor, codec: Codec) -> Tensor:
    out = _buffer(tensor, codec)
    codec.encode(tensor, out)
    return out
