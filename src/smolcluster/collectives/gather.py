"""A rank's parts of all parameters, and the units that are put together from all ranks' parts when they are needed.

Stage 3 gathers a unit right before its forward or backward and lets it go afterwards. Its neighbour is gathered
meanwhile, on connections of its own, so that it does not queue behind gradients. Stages 1 and 2 keep all units, and
gather each anew after its owners have stepped, while the forward of those before it runs.

    need(2) | compute 2            | need(3) | compute 3 ...
    start(3)| gather 3 runs        | free(2), start(4)

A table (see shards.py) is never whole: each of its stripes is a unit, and rows.py computes with them.

Cost: (N-1)/N of a unit's bytes per gather. In stage 3 the rest of the model, and at most two units, lie in memory.
Source: Zhao et al. 2023, PyTorch FSDP, arXiv:2304.11277, sections 3.2.1 and 3.3.2 (prefetch).
"""

from __future__ import annotations

import enum
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from smolcluster.collectives.base import Communicator, Work
from smolcluster.collectives.shards import Bucket, Piece, pieces_of, stripes_of, views_of
from smolcluster.errors import ConfigError
from smolcluster.telemetry import GATHERS
from smolcluster.transport.tensors import alias_of, raw_bytes

REST = 0  # the unit that is needed throughout: models.partition puts it first


class ShardedParameters:
    """The parameters of a model in buckets, of which this rank owns a part.

    Attributes:
        params: the model's, by index; in place of a table what stands for it.
        buckets: their layout.
        stripes: what travels at once: buckets, those of tables in several stripes.
        own: what this rank owns of each bucket, in the parameters' full precision: all of it in stage 0.
        whole: each stripe as forward sees it; in stage 3 without memory while it is not gathered.
        pieces: what this rank owns of each parameter.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        buckets: Sequence[Bucket],
        comm: Communicator,
        *,
        is_divided: bool,
        is_freed: bool,
        half: torch.dtype | None = None,
    ) -> None:
        """Describe; `fill` gives each bucket its values.

        Args:
            params: those of the model, on the device where they are computed with.
            buckets: see `plan_shards`.
            comm: the ranks that share the parameters.
            is_divided: each rank owns a part; else all of it.
            is_freed: whole buckets exist only while they are gathered.
            half: the dtype in which halved buckets are gathered; None: in their own.
        """
        self.params = list(params)
        self.buckets = list(buckets)
        self.stripes = stripes_of(buckets)
        self.comm = comm
        self.is_divided = is_divided
        self.is_freed = is_freed
        self._half = half
        self.own: list[Tensor] = []
        self.whole: list[Tensor] = []
        self.pieces: list[Piece] = []
        self._views: list[dict[int, Tensor]] = []
        self._empty: dict[torch.dtype, Tensor] = {}

    @property
    def is_halved(self) -> bool:
        """Whether forward sees some parameters in half precision."""
        return self._half is not None and self.is_divided and any(bucket.halved for bucket in self.buckets)

    @property
    def first(self) -> int:
        """This rank's number if each owns a part, else 0: `first * part` is the first element that it owns."""
        return self.comm.rank if self.is_divided else 0

    def fill(self, values: Callable[[Bucket], Mapping[int, Tensor]], *, are_alike: bool) -> None:
        """Lay out all buckets, one after the other, and point the parameters at them. Every rank calls it; blocks.

        Args:
            values: the parameters of a bucket, by index; asked for bucket after bucket.
            are_alike: the ranks' values ought to be the same, so that a short comparison will do. Where they are not,
                every rank takes rank 0's.
        """
        for number, bucket in enumerate(self.buckets):
            if bucket.is_table:
                self._fill_table(number, bucket, values, are_alike)
            else:
                self._fill(number, bucket, values, are_alike)

    def _fill(
        self, number: int, bucket: Bucket, values: Callable[[Bucket], Mapping[int, Tensor]], are_alike: bool
    ) -> None:
        device = self.params[bucket.places[0].index].device
        flat = torch.zeros(self.comm.world_size * bucket.part, dtype=bucket.dtype, device=device)
        with torch.no_grad():
            given = values(bucket)
            for index, view in views_of(bucket, flat).items():
                view.copy_(given[index])
            del given
        if not (are_alike and self._is_same(flat)):
            self.comm.broadcast(flat).wait()
        dtype = self._dtype_of(bucket)
        own = flat
        if self.is_divided:
            own = flat[self.first * bucket.part : (self.first + 1) * bucket.part]
        whole = flat
        if self.is_freed or dtype != bucket.dtype:
            own = own.clone()
            whole = torch.empty_like(flat, dtype=dtype) if self.is_freed else flat.to(dtype)
        self._take(number, bucket, own)
        self._add_whole(whole, views_of(bucket, whole))

    def _fill_table(
        self, number: int, bucket: Bucket, values: Callable[[Bucket], Mapping[int, Tensor]], are_alike: bool
    ) -> None:
        """The same, part by part: besides the values that are given there is no whole table, not even here."""
        index = bucket.places[0].index
        device = self.params[index].device
        given = values(bucket)[index].detach().reshape(-1)
        sends_first = not (are_alike and self._is_same(given))
        for rank in range(self.comm.world_size) if sends_first else (self.first,):
            part = torch.zeros(bucket.part, dtype=bucket.dtype, device=device)
            elements = given[rank * bucket.part : (rank + 1) * bucket.part]
            part[: elements.numel()].copy_(elements)
            if sends_first:
                self.comm.broadcast(part).wait()
            if rank == self.first:
                self._take(number, bucket, part)
        for stripe in self.stripes:
            if stripe.bucket == number:
                length = self.comm.world_size * stripe.length
                self._add_whole(torch.empty(length, dtype=self._dtype_of(bucket), device=device), {})

    def _is_same(self, tensor: Tensor) -> bool:
        """Whether all ranks have the same bits. Every rank calls it; blocks."""
        digest = hashlib.sha256(raw_bytes(tensor.cpu().contiguous())).hexdigest()
        return len(set(map(str, self.comm.exchange(digest)))) == 1

    def _dtype_of(self, bucket: Bucket) -> torch.dtype:
        """In which forward sees it."""
        return self._half if bucket.halved and self._half is not None and self.is_divided else bucket.dtype

    def _take(self, number: int, bucket: Bucket, own: Tensor) -> None:
        self.own.append(own)
        self.pieces += pieces_of(bucket, number, own, self.first * bucket.part)

    def _add_whole(self, whole: Tensor, views: dict[int, Tensor]) -> None:
        self.whole.append(whole)
        self._views.append(views)
        number = len(self.whole) - 1
        self.install(number)
        if self.is_freed:
            self.free(number)

    def own_of(self, number: int) -> Tensor:
        """What this rank owns of a stripe."""
        stripe = self.stripes[number]
        return self.own[stripe.bucket][stripe.start : stripe.start + stripe.length]

    def install(self, number: int) -> None:
        """Point the parameters of a stripe at its whole; a table has none."""
        for index, view in self._views[number].items():
            self.params[index].data = view

    def allocate(self, number: int) -> None:
        """Give the whole stripe memory."""
        whole = self.whole[number]
        whole.untyped_storage().resize_(whole.nbytes)

    def free(self, number: int) -> None:
        """Take the memory of the whole stripe away. Its parameters have no elements until the next `install`.

        What autograd has saved for backward are views of this very storage: they find it filled again by then.
        """
        whole = self.whole[number]
        empty = self._empty.setdefault(whole.dtype, torch.empty(0, dtype=whole.dtype, device=whole.device))
        for index in self._views[number]:
            self.params[index].data = empty
        whole.untyped_storage().resize_(0)

    def of_unit(self, unit: int) -> list[int]:
        """The numbers of a unit's stripes."""
        return [number for number, stripe in enumerate(self.stripes) if stripe.unit == unit]


class _State(enum.Enum):
    AWAY = 1
    COMING = 2
    HERE = 3


@dataclass(slots=True)
class _Coming:
    """A stripe that is being gathered."""

    number: int
    whole: Tensor  # kept as long as bytes may arrive
    work: Work
    issued: float
    ended: float | None = None

    def note_end(self, _work: Work) -> None:
        self.ended = time.monotonic()


class UnitGather:
    """Gathers units by number; see above. For the thread that computes. Every rank makes the same calls."""

    def __init__(self, shards: ShardedParameters, comm: Communicator) -> None:
        """Gather over `comm`: the same ranks, and best connections of its own."""
        self.comm = comm
        self._shards = shards
        units = range(max((stripe.unit for stripe in shards.stripes), default=0) + 1)
        self._numbers = [shards.of_unit(unit) for unit in units]
        self._state = [_State.AWAY if shards.is_freed else _State.HERE for _ in units]
        self._coming: list[list[_Coming]] = [[] for _ in units]
        self._previous_end = 0.0
        self._held_bytes = 0
        self.peak_bytes = 0

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self._numbers)

    def expire(self) -> None:
        """The owners have stepped: what was gathered is old."""
        for unit in range(self.units):
            self.free(unit)
            self._state[unit] = _State.AWAY

    def start(self, unit: int) -> None:
        """Begin to gather a unit, if it is not there or on its way."""
        if self._state[unit] is not _State.AWAY:
            return
        self._state[unit] = _State.COMING
        shards = self._shards
        for number in self._numbers[unit]:
            whole, own = shards.whole[number], shards.own_of(number)
            if shards.is_freed:
                shards.allocate(number)
                self._held_bytes += whole.nbytes
            # Not `whole` itself: who sends a tensor's bytes makes it keep its memory for good.
            target = alias_of(whole) if shards.is_freed and whole.is_cpu else whole
            issued = time.monotonic()
            coming = _Coming(number, whole, self.comm.all_gather(target, own.to(whole.dtype)), issued)
            coming.work.add_done_callback(coming.note_end)
            self._coming[unit].append(coming)
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)

    def need(self, unit: int) -> None:
        """Return when a unit is there; records the time that this takes.

        Raises:
            PeerLost: a rank is gone.
        """
        if self._state[unit] is _State.HERE:
            return
        self.start(unit)
        coming, self._coming[unit] = self._coming[unit], []
        start = time.monotonic()
        is_late = not all(item.work.done() for item in coming)
        for item in coming:
            item.work.wait()
        end = time.monotonic()
        if is_late:
            self.comm.telemetry.record("comm_wait", start, end, details={"call": "all_gather"})
        for item in coming:
            self._record(item, end)
        if self._shards.is_freed:
            for number in self._numbers[unit]:
                self._shards.install(number)
        self._state[unit] = _State.HERE

    def _record(self, item: _Coming, end: float) -> None:
        details: dict[str, int | str] = {"bucket": item.number, "bytes": _length_bytes(self._shards.whole[item.number])}
        if item.work.call_id is not None:
            details["group"], details["sequence"] = item.work.call_id
        started = max(item.issued, self._previous_end)  # one runs after the other
        ended = self._previous_end = max(started, end if item.ended is None else item.ended)
        self.comm.telemetry.record("all_gather", started, ended, track=GATHERS, details=details)

    def free(self, unit: int) -> None:
        """Let a unit go; one that is on its way is waited for. Without effect where all are kept."""
        if not self._shards.is_freed or self._state[unit] is _State.AWAY:
            return
        self.need(unit)
        for number in self._numbers[unit]:
            self._shards.free(number)
            self._held_bytes -= _length_bytes(self._shards.whole[number])
        self._state[unit] = _State.AWAY

    def is_here(self, unit: int) -> bool:
        """Whether somebody has asked for a unit since it was gathered, and it is there."""
        return self._state[unit] is _State.HERE

    def settle(self) -> None:
        """Wait for all that is on its way."""
        for unit, state in enumerate(self._state):
            if state is _State.COMING:
                self.need(unit)


def _length_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class UnitHooks:
    """Asks for a model's units as forward and backward reach them, each with its neighbour, and lets them go.

    The hooks belong to the modules, so that the model's own code stays as it is. The order is that of the units'
    numbers, and then that of `follow`; where a model runs through them in another one, the prefetch is of no use and
    nothing else changes.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], gather: UnitGather, *, frees: bool) -> None:
        """Hook into `modules`, those of the units 1, 2, … Unit 0 is there from the model's forward until `leave`."""
        self._gather = gather
        self._frees = frees
        self._order = list(range(1, len(modules) + 1))
        self._is_backward = False
        self._ahead: int | None = None  # what was started and not yet asked for
        model.register_forward_pre_hook(self._enter)
        for unit, module in enumerate(modules, start=1):
            module.register_forward_pre_hook(self._before_module(unit))
            module.register_forward_hook(self._after_module(unit))

    def follow(self, units: Sequence[int]) -> None:
        """Forward goes on with these units after all others, from now on; without effect where it does already."""
        if units[0] not in self._order:
            if self._order and not self._is_backward:
                self._gather.free(self._order[-1])  # it was kept as the last
            self._order += units

    def prefetch(self) -> None:
        """Begin with what the next forward needs first."""
        for unit in (REST, *self._order[:1]) if self._frees else range(self._gather.units):
            self._gather.start(unit)

    def before_forward(self, unit: int) -> None:
        """A unit is about to compute."""
        self._need(unit)
        # A checkpointed unit runs forward once more within backward, which goes the other way.
        if not self._is_backward:
            self._start_neighbour(unit, 1)

    def after_forward(self, unit: int, *, comes_back: bool) -> None:
        """A unit has computed; `comes_back`: backward may need it."""
        if self._frees and not (comes_back and unit == self._order[-1]):  # backward begins with the last
            self._gather.free(unit)

    def before_backward(self, unit: int) -> None:
        """Backward has reached a unit."""
        self._is_backward = True
        self._need(unit)
        self._start_neighbour(unit, -1)

    def done(self, unit: int) -> None:
        """Backward has computed all that depends on a unit's parameters."""
        if self._frees and unit not in (REST, *self._order[:1]):  # a next micro-batch begins with the first unit
            self._gather.free(unit)

    def leave(self) -> None:
        """Forward and backward are over: let everything go."""
        self._is_backward = False
        if self._frees:
            for unit in range(self._gather.units):
                self._gather.free(unit)

    def end_of_backward(self) -> None:
        """A backward is over and a forward with the same weights follows: what both need is kept."""
        self._is_backward = False
        for unit in range(self._gather.units):
            self.done(unit)

    def _need(self, unit: int) -> None:
        """Wait for a unit; one that was started in vain, since the model takes another way, is let go."""
        if self._frees and self._ahead not in (None, unit):
            assert self._ahead is not None
            self._gather.free(self._ahead)
        self._ahead = None
        self._gather.need(unit)

    def _start_neighbour(self, unit: int, step: int) -> None:
        place = self._order.index(unit) + step
        if 0 <= place < len(self._order) and not self._gather.is_here(self._order[place]):
            self._ahead = self._order[place]
            self._gather.start(self._ahead)

    def _enter(self, _module: nn.Module, _args: object) -> None:
        self._is_backward = False
        for unit in (REST, *self._order[:1]):
            self._gather.start(unit)
        self._gather.need(REST)

    def _before_module(self, unit: int) -> Callable[[nn.Module, object], None]:
        def before(_module: nn.Module, _args: object) -> None:
            self.before_forward(unit)

        return before

    def _after_module(self, unit: int) -> Callable[[nn.Module, object, Any], None]:
        def after(module: nn.Module, _args: object, output: Any) -> None:
            if self._is_backward:
                return
            leaves = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if self._frees and output is not None and not leaves:
                raise ConfigError(
                    f"a {type(module).__name__} returns a {type(output).__name__}, in which no tensor is found to tell "
                    "when backward needs its parameters again. Return tensors, or tuples, lists or dicts of them; or "
                    "set cluster.fsdp_stage to 2"
                )
            outputs = [leaf for leaf in leaves if leaf.requires_grad]
            for tensor in outputs:
                tensor.register_hook(self._before_module_backward(unit))  # type: ignore[no-untyped-call]
            self.after_forward(unit, comes_back=bool(outputs))

        return after

    def _before_module_backward(self, unit: int) -> Callable[[Tensor], None]:
        def before(_grad: Tensor) -> None:
            self.before_backward(unit)

        return before
