"""How tensors are cut, and when one round pays: decided once per generation, from what the links are measured to do.

The plan decides in which order numbers are added, and so the last bits of a sum. Therefore the leader decides for all
ranks, and a checkpoint keeps it: a run that goes on with as many ranks goes on with the same plan.

Notation: a seconds per hop, b seconds per byte, N ranks, S bytes. One round costs a + (N-1)Sb, a ring
2(N-1)a + 2(N-1)/N Sb (Thakur, Rabenseifner and Gropp 2005, section 4), so one round is faster for

    S < a/b * N(2N-3) / ((N-1)(N-2))

With two ranks both send the same bytes, and the ring waits once more; but it adds only half as many numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch

from smolcluster.collectives.base import Communicator
from smolcluster.errors import CheckpointError
from smolcluster.kinds import JsonObject, JsonValue

KIB = 1 << 10
# One round also saves our own work for each frame: up to here it is faster even without latency (measured on loopback).
MIN_ONE_ROUND_BYTES = 64 * KIB
MAX_ONE_ROUND_BYTES = 4096 * KIB
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 64 * KIB, 1024 * KIB
ALIGNED_ELEMENTS = 1024  # so that a chunk does not split a codec's block
# A chunk takes about so long: the last one of a call is sent while nothing else is, so it must be short.
CHUNK_SECONDS = 0.002
MIN_WINDOW, MAX_WINDOW = 4, 64
# What is sent to measure bandwidth: more, until it takes long enough to be measured.
PROBE_BYTES = (64 * KIB, 512 * KIB, 4096 * KIB)
PROBE_SECONDS = 0.02
PINGS = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides which bits a reduction gives. The same on every rank of a generation.

    Attributes:
        star_bytes: up to this size one rank adds for all.
        one_round_bytes: up to this size everybody sends everything to everybody, in one hop.
        chunk_bytes: payload of one frame of a ring; a piece has world_size chunks.
        window: pieces under way at once: enough to keep all links busy, few enough to stay in the processor's cache.
    """

    one_round_bytes: int = 256 * KIB
    chunk_bytes: int = 1024 * KIB
    window: int = 4
    star_bytes: int = 0

    def chunk_elements(self, elements: int, item_bytes: float, world_size: int) -> int:
        """Elements of a chunk of a tensor: at least two pieces, if they are not too small for that.

        `item_bytes`: of an element on the wire.
        """
        half = _aligned(-(-elements // (2 * world_size)) + ALIGNED_ELEMENTS - 1)
        least, most = _aligned(MIN_CHUNK_BYTES / item_bytes), _aligned(self.chunk_bytes / item_bytes)
        return max(1, min(most, max(half, least)))

    def to_json(self) -> JsonObject:
        """For a checkpoint."""
        return cast("JsonObject", asdict(self))

    @staticmethod
    def from_json(values: JsonObject) -> Plan:
        """What `to_json` made.

        Raises:
            CheckpointError: it was something else.
        """
        match values:
            case {"one_round_bytes": int(one_round), "chunk_bytes": int(chunk), "window": int(window)} if (
                min(one_round, chunk, window) > 0 and isinstance(star := values.get("star_bytes", 0), int) and star >= 0
            ):
                return Plan(one_round, chunk, window, star)
        raise CheckpointError(f"the checkpoint's plan of the collectives is damaged: {values}")


@dataclass(frozen=True, slots=True)
class Link:
    """The slowest way between two ranks: seconds of one hop, our own work included, and bytes per second."""

    hop_seconds: float
    bytes_per_second: float


def plan_for_one_host(*, is_crowded: bool) -> Plan:
    """The plan for ranks of one host, measured on loopback. `is_crowded`: they are more than its cores.

    A crowded host has no time for more frames than needed. Of 4 ranks on 2 cores, a star takes 1.8 ms for 256 KiB and
    3.7 for 1 MiB; one round 2.5, and a ring 4.9; from 4 MiB on the ring is as fast.
    """
    return Plan(chunk_bytes=4096 * KIB, star_bytes=2048 * KIB) if is_crowded else Plan()


def plan_for(world_size: int, link: Link) -> Plan:
    """The plan for such links; its sizes are powers of two, so that it seldom differs from one start to the next."""
    in_flight = link.hop_seconds * link.bytes_per_second
    n = world_size
    factor = n * (2 * n - 3) / ((n - 1) * (n - 2)) if n > 2 else 4.0
    seconds = max(CHUNK_SECONDS, link.hop_seconds / 4)  # far away, fewer and larger ones
    chunk = _power_of_two(link.bytes_per_second * seconds, MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)
    return Plan(
        one_round_bytes=_power_of_two(factor * in_flight, MIN_ONE_ROUND_BYTES, MAX_ONE_ROUND_BYTES),
        chunk_bytes=chunk,
        window=_power_of_two(4 * in_flight / chunk, MIN_WINDOW, MAX_WINDOW),
    )


def measure_link(comm: Communicator) -> Link:
    """The slowest link, on every rank the same. Blocks; every rank calls it."""
    token = torch.zeros(1)
    hops = []
    for _ in range(PINGS):
        start = time.perf_counter()
        comm.all_reduce(token).wait()
        hops.append(time.perf_counter() - start)
    hop = min(hops)
    rate = 0.0
    for nbytes in PROBE_BYTES:
        rows = torch.zeros(comm.world_size, nbytes, dtype=torch.uint8)
        start = time.perf_counter()
        comm.all_gather(rows.view(-1), rows[comm.rank].clone()).wait()
        seconds = time.perf_counter() - start
        rate = (comm.world_size - 1) * nbytes / max(1e-6, seconds - (comm.world_size - 1) * hop)
        if max(_numbers(comm.exchange(seconds))) > PROBE_SECONDS:
            break
    return Link(max(_numbers(comm.exchange(hop))), min(_numbers(comm.exchange(rate))))


def _numbers(values: Sequence[JsonValue]) -> list[float]:
    return [float(value) for value in values if isinstance(value, int | float)]


def _aligned(elements: float) -> int:
    """The multiple of ALIGNED_ELEMENTS below, if there is one."""
    return int(elements // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS or int(elements)


def _power_of_two(value: float, least: int, most: int) -> int:
    """The largest power of two up to `value`, within the limits, which are powers of two themselves."""
    result = least
    while 2 * result <= min(value, most):
        result *= 2
    return result
