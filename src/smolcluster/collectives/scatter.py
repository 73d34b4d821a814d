"""Gradients summed into the parts that the ranks own, while backward computes the rest.

Where gradients are kept whole (stages 0 and 1), micro-batches add up in flat buckets, which leave during the backward
of the last one. Where each rank keeps its own part only (stages 2 and 3), the gradients of every micro-batch leave, and
the parts add up; a bucket's whole gradient exists only until it has left.

One step, as an algorithm sees it:

    gradients.begin(step)             a free set of gradients
    gradients.arm(); ... .flush()     around the backward of each micro-batch whose gradients leave
    due = gradients.end()             the step's gradients on their way
    due.wait(); due.grads(pieces)     now, or K steps later: the sums of the pieces that this rank owns

Buckets leave in the order of the layout, never in that of the hooks, so that all ranks issue the same operations.

A table's gradient (see rows.py) comes stripe by stripe where the model multiplies with it, and as single rows where it
looks rows up. The first is summed like all others. The rows go straight to their owner, who adds them at the end.
Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, sections 5.2 and 7.1.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smolcluster.collectives.base import Codec, Communicator, Work
from smolcluster.collectives.gather import ShardedParameters
from smolcluster.collectives.shards import Bucket, Piece, Placed, Stripe
from smolcluster.errors import ConfigError
from smolcluster.telemetry import BUCKETS

# Whole buckets of gradients that exist at once where ranks keep parts only: one that is filled, one that leaves.
BUCKETS_IN_FLIGHT = 2


@dataclass(slots=True)
class _Leaving:
    """A bucket on its way."""

    number: int
    step: int
    work: Work
    nbytes: int
    issued: float
    ended: float | None = None
    buffer: Tensor | None = None  # a whole bucket that is not kept
    addend: Tensor | None = None  # the sum over the ranks, to be added to this rank's part

    def note_end(self, _work: Work) -> None:
        self.ended = time.monotonic()


@dataclass(slots=True)
class RowGradients:
    """Gradients of single rows of a table, from all ranks, on their way to this one, which owns the rows.

    Attributes:
        index: the parameter's.
        rows: for each rank, which of this rank's rows it looked up, each once.
        grads: their gradients, one behind the other (all ranks' rows, D), when `work` is done.
        work: the exchange.
        has_grad: whether this rank has sent what is a gradient and not just zeros.
    """

    index: int
    rows: list[Tensor]
    grads: Tensor
    work: Work
    has_grad: bool


class ShardedGradients:
    """The gradients of one model on one rank. Hooks run on autograd's thread while its caller waits for it."""

    def __init__(
        self,
        shards: ShardedParameters,
        comm: Communicator,
        *,
        keeps_whole: bool,
        codec: Codec | None = None,
        sets: int = 1,
        on_done: Callable[[int], None] | None = None,
        is_here: Callable[[int], bool] = lambda unit: True,
    ) -> None:
        """Register the hooks.

        Args:
            shards: the parameters, and who owns what of them: with all of them owned by all, sums go to all.
            comm: sums the buckets.
            keeps_whole: whole gradients are kept and leave once a step; else this rank's parts.
            codec: what goes over the wire instead of the gradients' own bytes.
            sets: steps that may be under way at once (K + 1).
            on_done: called with the number of a unit when backward has computed all its gradients.
            is_here: whether a unit's parameters are those of this step.
        """
        self._shards = shards
        self._comm = comm
        self._keeps_whole = keeps_whole
        self._codec = codec
        self._on_done = on_done
        self._is_here = is_here
        self._params = shards.params
        self._numbers = [n for n in range(len(shards.stripes)) if self._bucket(n).trained]
        self._place: dict[int, tuple[int, Placed]] = {}
        self._tables: dict[int, list[int]] = {}  # the stripes of each
        for number in self._numbers:
            for place in self._bucket(number).places:
                if self._bucket(number).is_table:
                    self._tables.setdefault(place.index, []).append(number)
                else:
                    self._place[place.index] = (number, place)
        # Parameters of each unit: frozen ones never get a gradient, so where there are such, none knows when backward
        # has done with them.
        self._units: dict[int, int] = {}
        for bucket in shards.buckets:
            self._units[bucket.unit] = self._units.get(bucket.unit, 0) + len(bucket.places)
        self._sets = [self._new_set() for _ in range(sets)]
        self._step = 0
        self._is_armed, self._counts = False, True
        self._leaving: deque[_Leaving] = deque()
        self._filling: dict[int, Tensor] = {}  # whole buckets that are not kept
        self._spare: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._lent: set[int] = set()  # where buckets lie that are autograd's own tensors
        self._previous_end = 0.0
        sizes = [self._length(number) * self._bucket(number).dtype.itemsize for number in self._numbers]
        self._limit_bytes = BUCKETS_IN_FLIGHT * max(sizes, default=0) * sets
        self._whole_bytes = 0
        self._spare_bytes = 0
        self.peak_bytes = 0  # of whole buckets that are not kept
        for index in self._place:
            self._params[index].register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]
        self._open()

    @property
    def kept(self) -> list[Tensor]:
        """The memory of all sets."""
        return [tensor for kept in self._sets for tensor in kept.values()]

    def begin(self, step: int) -> None:
        """Open a step. The set that it uses is that of step - sets, which must be applied by now."""
        self._step = step
        self._set = self._sets[step % len(self._sets)]
        self._has_grad = [False] * len(self._params)  # in any micro-batch of this step
        self._has_sum = dict.fromkeys(self._numbers, False)  # a part that the next sum is added to
        self._overflowed: Tensor | None = None
        self._rows: list[RowGradients] = []
        self._is_armed, self._counts = False, True
        self._open()

    def arm(self, *, counts: bool = True) -> None:
        """From now on buckets leave as soon as they are complete.

        Args:
            counts: False: the backward that follows is run for the other ranks' sake. What it computes, be it NaN, is
                no gradient: zeros leave.
        """
        self._is_armed = True
        self._counts = counts

    def flush(self) -> None:
        """End the backward of a micro-batch; after `arm`, what has got no gradient leaves as zeros."""
        if self._is_armed:
            for number in [n for numbers in self._tables.values() for n in numbers if self._missing[n]]:
                flat, is_new = self.room(number)
                if is_new:
                    flat.zero_()
                self._missing[number] = 0
            for index in self._place:
                if not self._taken[index]:
                    self._take(index)
            self._send_complete()
            for send in self._look_ups:
                self._rows.append(send(self._counts))
                self._has_grad[self._rows[-1].index] |= self._rows[-1].has_grad
        self._is_armed, self._counts = False, True
        self._open()

    def end(self) -> StepShards:
        """The step's gradients, all of which are on their way."""
        for number in [n for numbers in self._tables.values() for n in numbers if not self._has_sum[n]]:
            self._own_strip(self._set, number).zero_()
        return StepShards(self, self._step, self._set, self._has_grad, self._overflowed, self._rows)

    def restore(self, step: int, has_grad: list[bool]) -> tuple[StepShards, dict[int, Tensor]]:
        """A step as a checkpoint has it, and this rank's parts of its gradients by bucket, zeros to be filled."""
        own = self._sets[step % len(self._sets)]
        for tensor in own.values():
            tensor.zero_()
        return StepShards(self, step, own, has_grad, None, []), {n: self.own_part(own, n) for n in own}

    def collect(self, step: int) -> None:
        """Wait for all buckets of `step` and those before it."""
        while self._leaving and self._leaving[0].step <= step:
            self._collect_oldest()

    def add_rows(self, kept: dict[int, Tensor], arriving: RowGradients) -> None:
        """Wait for gradients of single rows and add them to this rank's part, in rank order."""
        with self._comm.telemetry.span("comm_wait"):
            arriving.work.wait()
        number = self._shards.stripes[self._tables[arriving.index][0]].bucket
        part = self.own_part(kept, number).view(-1, arriving.grads.shape[1])
        grads = torch.split(arriving.grads, [len(rows) for rows in arriving.rows])
        for rows, theirs in zip(arriving.rows, grads, strict=True):
            part.index_add_(0, rows, theirs)  # each row once: the order of additions is no device's to choose

    def own_part(self, kept: dict[int, Tensor], number: int) -> Tensor:
        """What this rank owns of a bucket."""
        part, first = self._shards.buckets[number].part, self._shards.first
        if self._keeps_whole and self._shards.is_divided:
            return kept[number][first * part : (first + 1) * part]
        return kept[number]

    # ---- tables: what rows.py computes

    def expect(self, index: int) -> None:
        """A forward multiplies with a table: backward will `give` each of its stripes a gradient."""
        for number in self._tables[index]:
            self._missing[number] += 1
            self._is_expected[number] = True

    def room(self, number: int) -> tuple[Tensor, bool]:
        """Where the gradient of a stripe goes (N * length,), and whether it is new, of undefined values: else add."""
        is_new = number not in self._filling
        if is_new:
            self._filling[number] = self._buffer(number)
        return self._filling[number], is_new

    def give(self, number: int) -> None:
        """A gradient of a stripe is in its `room`; with the last one that is expected it leaves."""
        if self._counts:
            self._has_grad[self._bucket(number).places[0].index] = True
        else:
            self._filling[number].zero_()
        self._missing[number] -= 1
        if self._is_armed:
            self._send_complete()

    def remember(self, send: Callable[[bool], RowGradients]) -> None:
        """Rows of a table were looked up: `flush` will send their gradients (or zeros), in the order of the look-ups.

        Not their backward: which of them has a gradient may differ from rank to rank.
        """
        self._look_ups.append(send)

    # ---- hooks

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        # Weakly: Python does not see that a parameter's hook holds what holds the parameter, and would keep all.
        weak = weakref.ref(self)

        def take(_param: Tensor) -> None:
            if (gradients := weak()) is not None:
                gradients._take(index)

        return take

    def _open(self) -> None:
        self._taken = [False] * len(self._params)
        is_table = {n: self._bucket(n).is_table for n in self._numbers}
        self._missing = {n: 0 if is_table[n] else len(self._bucket(n).places) for n in self._numbers}
        self._is_expected = {n: not is_table[n] for n in self._numbers}
        self._missing_of_unit = dict(self._units)
        self._next = 0
        self._look_ups: list[Callable[[bool], RowGradients]] = []

    def _take(self, index: int) -> None:
        """Move a parameter's gradient to its bucket; every bucket that is full with all before it leaves."""
        if self._taken[index]:
            raise ConfigError(
                f"parameter {index} of shape {tuple(self._params[index].shape)} received a gradient twice in one "
                f"backward. Use activation checkpointing with use_reentrant=False."
            )
        self._taken[index] = True
        number, place = self._place[index]
        param = self._params[index]
        grad, param.grad = param.grad, None
        if grad is not None and not self._shards.is_freed and not self._is_here(self._bucket(number).unit):
            raise ConfigError(
                f"parameter {index} of shape {tuple(param.shape)} was used without a call of the module that it is "
                "of, while it was still on its way from its owners. Call the module, or keep the parameter outside of "
                "lists of modules"
            )
        grad = grad if self._counts else None
        if self._keeps_whole:
            self._put(self._set[self._stripe(number).bucket], place, grad, adds=self._has_grad[index])
        elif not self._use_as_bucket(number, grad):
            if number not in self._filling:
                self._filling[number] = self._buffer(number)
            self._put(self._filling[number], place, grad, adds=False)
        self._has_grad[index] = self._has_grad[index] or grad is not None
        self._missing[number] -= 1
        unit = self._bucket(number).unit
        self._missing_of_unit[unit] -= 1
        if self._missing_of_unit[unit] == 0 and self._on_done is not None:
            self._on_done(unit)
        if self._is_armed:
            self._send_complete()

    def _send_complete(self) -> None:
        """Let go what is complete with all before it. A table that nobody multiplied with has nothing to send."""
        while self._next < len(self._numbers) and self._missing[self._numbers[self._next]] == 0:
            number = self._numbers[self._next]
            self._next += 1
            if self._is_expected[number]:
                self._send(number)

    @staticmethod
    def _put(flat: Tensor, place: Placed, grad: Tensor | None, *, adds: bool) -> None:
        view = flat[place.offset : place.offset + place.numel].view(place.shape)
        if grad is None:
            if not adds:
                view.zero_()
        elif adds:
            view.add_(grad)
        else:
            view.copy_(grad)

    def _use_as_bucket(self, number: int, grad: Tensor | None) -> bool:
        """A gradient that fills its bucket alone need not be copied."""
        dtype = self._bucket(number).dtype
        if grad is None or grad.numel() != self._length(number) or grad.dtype != dtype or not grad.is_contiguous():
            return False
        storage = grad.untyped_storage()
        if storage.data_ptr() in self._lent or storage.nbytes() != grad.nbytes or not _is_exclusive(storage):
            return False  # what was added to something else has its gradient's memory, which backward may still read
        self._wait_for_room(grad.nbytes)
        self._count(grad.nbytes)
        self._lent.add(storage.data_ptr())
        self._filling[number] = grad.view(-1)
        return True

    def _send(self, number: int) -> None:
        flat = self._set[self._stripe(number).bucket] if self._keeps_whole else self._filling.pop(number)
        if self._codec is not None:
            # A codec may turn what is not finite into numbers, so each rank says so before it encodes.
            overflowed = ~torch.isfinite(flat.sum())
            self._overflowed = overflowed if self._overflowed is None else self._overflowed | overflowed
        addend: Tensor | None = None
        issued = time.monotonic()
        if not self._shards.is_divided:
            work = self._comm.all_reduce(flat, codec=self._codec)
        else:
            own = self._own_strip(self._set, number)
            if self._has_sum[number]:
                own = addend = torch.empty_like(own)
            self._has_sum[number] = not self._keeps_whole
            work = self._comm.reduce_scatter(own, flat, codec=self._codec)
        buffer = None if self._keeps_whole else flat
        leaving = _Leaving(number, self._step, work, flat.nbytes, issued, buffer=buffer, addend=addend)
        work.add_done_callback(leaving.note_end)
        self._leaving.append(leaving)

    def _collect_oldest(self) -> None:
        leaving = self._leaving.popleft()
        telemetry = self._comm.telemetry
        start = time.monotonic()
        is_done = leaving.work.done()
        leaving.work.wait()
        end = time.monotonic()
        if not is_done:
            call = "reduce_scatter" if self._shards.is_divided else "all_reduce"
            telemetry.record("comm_wait", start, end, leaving.step, details={"call": call})
        self._record(leaving, end)
        if leaving.addend is not None:
            self._own_strip(self._sets[leaving.step % len(self._sets)], leaving.number).add_(leaving.addend)
        if leaving.buffer is not None:
            self._whole_bytes -= leaving.buffer.nbytes
            if leaving.buffer.data_ptr() in self._lent:
                self._lent.remove(leaving.buffer.data_ptr())
            else:
                self._spare.setdefault((leaving.buffer.numel(), leaving.buffer.dtype), []).append(leaving.buffer)
                self._spare_bytes += leaving.buffer.nbytes

    def _record(self, leaving: _Leaving, end: float) -> None:
        details: dict[str, int | str] = {"bucket": leaving.number, "bytes": leaving.nbytes}
        if leaving.work.call_id is not None:
            details["group"], details["sequence"] = leaving.work.call_id
        name = "reduce_scatter" if self._shards.is_divided else "all_reduce"
        started = max(leaving.issued, self._previous_end)  # one runs after the other
        ended = self._previous_end = max(started, end if leaving.ended is None else leaving.ended)
        self._comm.telemetry.record(name, started, ended, leaving.step, track=BUCKETS, details=details)

    # ---- memory

    def _new_set(self) -> dict[int, Tensor]:
        """One step's gradients by bucket: whole ones, or this rank's parts of them."""
        own = {n: tensor for n, tensor in enumerate(self._shards.own) if self._shards.buckets[n].trained}
        copies = self._comm.world_size if self._keeps_whole and self._shards.is_divided else 1
        return {n: torch.zeros(copies * t.numel(), dtype=t.dtype, device=t.device) for n, t in own.items()}

    def _stripe(self, number: int) -> Stripe:
        return self._shards.stripes[number]

    def _bucket(self, number: int) -> Bucket:
        """That of a stripe."""
        return self._shards.buckets[self._stripe(number).bucket]

    def _own_strip(self, kept: dict[int, Tensor], number: int) -> Tensor:
        """What this rank owns of a stripe."""
        stripe = self._stripe(number)
        return self.own_part(kept, stripe.bucket)[stripe.start : stripe.start + stripe.length]

    def _length(self, number: int) -> int:
        return self._comm.world_size * self._stripe(number).length

    def _buffer(self, number: int) -> Tensor:
        """Memory for a whole stripe, its padding zero; of a table all is left as it is."""
        bucket, length = self._bucket(number), self._length(number)
        self._wait_for_room(length * bucket.dtype.itemsize)
        if spare := self._spare.get((length, bucket.dtype)):
            buffer = spare.pop()
            self._spare_bytes -= buffer.nbytes
        else:
            device = self._shards.own[self._stripe(number).bucket].device
            buffer = torch.empty(length, dtype=bucket.dtype, device=device)
        self._count(buffer.nbytes)
        if not bucket.is_table:
            buffer[bucket.used :].zero_()
        return buffer

    def _wait_for_room(self, nbytes: int) -> None:
        while self._leaving and self._whole_bytes + nbytes > self._limit_bytes:
            self._collect_oldest()

    def _count(self, nbytes: int) -> None:
        """Whole gradients of so many bytes more are in use; buffers that are not go where they are too much."""
        if self._whole_bytes + self._spare_bytes + nbytes > self._limit_bytes:
            self._spare.clear()
            self._spare_bytes = 0
        self._whole_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self._whole_bytes + self._spare_bytes)


def _is_exclusive(storage: torch.UntypedStorage) -> bool:
    """Whether a gradient's memory is no other tensor's: it counts for the tensor and for `storage` itself."""
    count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(storage._cdata) <= 2


class StepShards:
    """One step's gradients on their way to the parts that this rank owns.

    Attributes:
        step: the step's number.
        has_grad: for each parameter, whether it got a gradient on this rank.
    """

    def __init__(
        self,
        gradients: ShardedGradients,
        step: int,
        kept: dict[int, Tensor],
        has_grad: list[bool],
        overflowed: Tensor | None,
        rows: list[RowGradients],
    ) -> None:
        self.step = step
        self.has_grad = has_grad
        self._gradients = gradients
        self._kept = kept
        self._overflowed = overflowed
        self._rows = rows

    @property
    def overflowed(self) -> bool:
        """Whether a gradient of this rank was not finite; known only where a codec could hide it."""
        return self._overflowed is not None and bool(self._overflowed)

    def wait(self) -> None:
        """Block until this rank's parts are summed over all ranks.

        Raises:
            PeerLost: a rank is gone.
        """
        self._gradients.collect(self.step)
        while self._rows:
            self._gradients.add_rows(self._kept, self._rows.pop(0))

    def grads(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """The gradients of some of this rank's pieces, as views."""
        return [piece.of(self._gradients.own_part(self._kept, piece.bucket)) for piece in pieces]
