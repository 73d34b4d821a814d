"""Many processes act as one: what every engine (tcp, torch.distributed, local) offers to algorithms.

Collectives of one communicator run one after the other in the order of their calls, as in one NCCL stream, and
every rank must call the same ones in the same order. Point-to-point messages have a lane of their own, matched by
(source, tag). Every call returns at once; the `Work` says when it is done.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from smolcluster.collectives.codec import ErrorFeedback
from smolcluster.errors import SmolError
from smolcluster.kinds import JsonValue
from smolcluster.telemetry import Telemetry


class ReduceOp(enum.IntEnum):
    """How values of several ranks become one. AVG divides the sum once, at the end."""

    SUM = 1
    AVG = 2
    MAX = 3


class Codec(Protocol):
    """What a collective puts on the wire instead of the tensor's own bytes. See codec.py."""

    name: str

    def encoded_nbytes(self, count: int) -> int:
        """Bytes on the wire for `count` elements."""
        ...

    def encode(self, tensor: Tensor, out: Tensor) -> None:
        """Encode a flat float tensor (n,) into `out`, uint8 (encoded_nbytes(n),)."""
        ...

    def decode(self, data: Tensor, out: Tensor) -> None:
        """Decode uint8 `data` (encoded_nbytes(n),) into the flat float tensor `out` (n,)."""
        ...


class Work(Protocol):
    """A collective or message under way.

    Attributes:
        call_id: the group's name and the call's number in it, the same on all its ranks; None where nobody counts.
    """

    call_id: tuple[str, int] | None

    def wait(self, timeout: float | None = None) -> None:
        """Block until done. `timeout` in seconds; None: as long as all peers are alive.

        Raises:
            PeerLost: a rank it needs is gone.
            CollectiveTimeout: not done after `timeout` seconds.
            CollectiveMismatch: the ranks called different things.
        """
        ...

    def done(self) -> bool:
        """True when finished or failed. Never blocks."""
        ...

    def exception(self) -> SmolError | None:
        """The error it failed with, None while it runs or when it succeeded."""
        ...

    def result(self) -> list[Tensor]:
        """Waits; the received tensors, for `recv` without `out` and `all_to_all_ragged`, else the output in a list."""
        ...

    def add_done_callback(self, fn: Callable[[Work], None]) -> None:
        """Call `fn(work)` when done, on whichever thread finishes it; at once if it is done already.

        `fn` must not wait for another Work: it may be running on the thread that would finish that one.
        """
        ...


class Communicator(Protocol):
    """A group of ranks. Tensors may live on any device; those outside CPU memory pass through CPU staging."""

    rank: int
    world_size: int
    generation: int
    telemetry: Telemetry

    def all_reduce(
        self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | ErrorFeedback | None = None
    ) -> Work:
        """Reduce `tensor` (any shape, contiguous, alike on all ranks) in place; the same bits everywhere.

        An ErrorFeedback (SUM and AVG) also changes its residual, which belongs to this call until the Work is done.
        """
        ...

    @property
    def all_reduce_scattered(self) -> Callable[[Sequence[Tensor]], Work] | None:
        """Sums contiguous CPU tensors of one dtype in place, as if they were one behind the other, and copies none.

        As many and as long ones on every rank. For ranks that read each other's memory; None, on all ranks: this group
        would have to copy them together, which its caller knows better how to do.
        """
        ...

    def reduce_scatter(
        self, output: Tensor, input: Tensor, op: ReduceOp = ReduceOp.SUM, codec: Codec | None = None
    ) -> Work:
        """Reduce `input` (world_size * n,) and leave part `rank` in `output` (n,). `input` may be overwritten."""
        ...

    def all_gather(self, output: Tensor, input: Tensor, codec: Codec | None = None) -> Work:
        """Put every rank's `input` (n,) into `output` (world_size * n,), in rank order."""
        ...

    def broadcast(self, tensor: Tensor, src: int = 0) -> Work:
        """Copy rank `src`'s tensor into every rank's `tensor`, in place."""
        ...

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_rows: Sequence[int] | None = None,
        input_rows: Sequence[int] | None = None,
    ) -> Work:
        """Send rows of dim 0: the first input_rows[0] to rank 0, and so on; None: equal parts."""
        ...

    def all_to_all_ragged(self, inputs: Sequence[Tensor]) -> Work:
        """Send inputs[i] to rank i; `result()[j]` is what rank j sent. Shapes come from the frames; dtypes agree."""
        ...

    def send(self, tensor: Tensor, dst: int, tag: int) -> Work:
        """Send one tensor (shape and dtype travel along) to `dst`. The tensor may not change until done."""
        ...

    def recv(self, src: int, tag: int, out: Tensor | None = None) -> Work:
        """Receive the oldest message of (src, tag), into `out` or, with None, as a new CPU tensor in `result()[0]`."""
        ...

    def exchange(self, message: JsonValue, timeout: float | None = None) -> list[JsonValue]:
        """Every rank's message, in rank order; blocks. For small agreements, at most 1 MiB a message."""
        ...

    def barrier(self, timeout: float | None = None) -> None:
        """Block until every rank has called it."""
        ...

    def split(self, ranks: Sequence[int], name: str) -> Communicator | None:
        """A communicator of `ranks` (in this order) with its own channels; None elsewhere. All ranks call it."""
        ...

    def abort(self, error: SmolError) -> None:
        """Fail every pending and later call with `error`. From any thread; returns at once."""
        ...

    def close(self) -> None:
        """Release connections and threads, and those of what was split off.

        Call after the last Work is done, on every rank. May be called again.
        """
        ...
