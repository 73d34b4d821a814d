"""Ring algorithms: every rank talks to its right and left neighbour only, and every link carries the same bytes.

Notation: N ranks, S bytes, latency a per hop, b seconds per byte.

Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", section 3.
"""

from __future__ import annotations

from torch import Tensor

from smolcluster.collectives.base import ReduceOp
from smolcluster.collectives.wire import Steps, Wire, finish_average


def ring_all_reduce(wire: Wire, chunks: list[Tensor], op: ReduceOp) -> Steps:
    """Reduce over all ranks, in place: a reduce-scatter around the ring, then an all-gather around the ring.

    Cost: 2(N-1) hops, each rank sends 2(N-1)/N * S bytes: 2(N-1)a + 2(N-1)/N * S * b.
    Every sum is made once, by one rank, and copied: all ranks hold the same bits.

    Args:
        wire: this piece's network.
        chunks: world_size flat tensors, together the piece; the same sizes on every rank.
        op: SUM, AVG or MAX.
    """
    yield from ring_reduce_scatter(wire, chunks, op)
    yield from ring_all_gather(wire, chunks)


def ring_reduce_scatter(wire: Wire, chunks: list[Tensor], op: ReduceOp) -> Steps:
    """Reduce over all ranks so that chunks[rank] holds the result; the other chunks hold partial sums afterwards.

    Cost: (N-1)a + (N-1)/N * S * b.
    """
    n, rank = wire.world_size, wire.rank
    right, left = (rank + 1) % n, (rank - 1) % n
    for hop in range(n - 1):
        wire.send(right, chunks[(rank - 1 - hop) % n])
        yield [wire.expect(left, into=chunks[(rank - 2 - hop) % n], op=op)]
    finish_average(chunks[rank], op, n)


def ring_all_gather(wire: Wire, chunks: list[Tensor]) -> Steps:
    """Every rank begins with chunks[rank] and ends with all of them.

    Cost: (N-1)a + (N-1)/N * S * b.
    """
    n, rank = wire.world_size, wire.rank
    right, left = (rank + 1) % n, (rank - 1) % n
    for hop in range(n - 1):
        wire.send(right, chunks[(rank - hop) % n])
        yield [wire.expect(left, into=chunks[(rank - 1 - hop) % n])]


def ring_broadcast(wire: Wire, piece: Tensor, src: int) -> Steps:
    """Pass `piece` along the ring from `src`; with many pieces at once all links are busy.

    Cost of P pieces: (N-2+P)(a + S/P * b).
    """
    n, rank = wire.world_size, wire.rank
    right, left = (rank + 1) % n, (rank - 1) % n
    if rank != src:
        yield [wire.expect(left, into=piece)]
    if right != src:
        wire.send(right, piece)
